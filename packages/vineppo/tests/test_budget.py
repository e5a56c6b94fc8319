"""A budget that looks at returns before it spends must not bias a value, and should pay."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decapod.lm import SamplingParams
from vineppo.budget import AdaptiveBudget, largest_remainder, neyman_weights, variance_ratio
from vineppo.episodes import Episode, State
from vineppo.errors import InvalidInputError, RewardError
from vineppo.states import borders_to_states, unique
from vineppo.tasks.token_tree import TokenTree, TreeShape
from vineppo.values import MonteCarloValueEstimator

Floats = npt.NDArray[np.float64]

PARAMS = SamplingParams(max_new_tokens=8)


def coin(n: int, successes: int) -> Floats:
    return np.array([1.0] * successes + [0.0] * (n - successes))


def binomial(n: int, successes: int, p: float) -> float:
    return math.comb(n, successes) * p**successes * (1 - p) ** (n - successes)


def outcomes(
    p: Sequence[float], budget: AdaptiveBudget, total: int
) -> Iterator[tuple[float, Floats, list[Floats]]]:
    """All that can happen: chance, pilots [U, m], later returns of each state.

    The order of returns within a phase is left out: estimates are functions of their number.
    """
    m = budget.pilot
    for first in itertools.product(range(m + 1), repeat=len(p)):
        chance = math.prod(binomial(m, s, q) for s, q in zip(first, p, strict=True))
        if not chance:
            continue
        pilot = np.stack([coin(m, s) for s in first])
        counts = budget.allocate(pilot, total).tolist()
        for second in itertools.product(*[range(n + 1) for n in counts]):
            more = math.prod(binomial(n, t, q) for n, t, q in zip(counts, second, p, strict=True))
            if more:
                yield (
                    chance * more,
                    pilot,
                    [coin(*both) for both in zip(counts, second, strict=True)],
                )


def pooled(pilot: Floats, later: Sequence[Floats]) -> Floats:
    """The naive estimate: the mean of all returns of a state."""
    return np.array([np.concatenate(b).mean() for b in zip(pilot, later, strict=True)])


# --- bias, by enumeration ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("p", "pilot", "k", "bias_of_pooled"),
    [
        ((0.1, 0.5), 4, 9, (-0.002511, -0.001322)),
        ((0.2, 0.5), 5, 9, (-0.004477, 0.0)),
        ((0.05, 0.5), 4, 12, (-0.001628, -0.000925)),
        ((0.0, 1.0, 0.1), 4, 9, (0.0, 0.0, -0.008935)),  # the one in the docstring: 0.0911
        ((0.0, 0.0, 1.0, 1.0, 0.1), 4, 9, (0.0, 0.0, 0.0, 0.0, -0.008960)),
        ((0.1, 0.5, 0.9), 2, 4, (0.0, 0.0, 0.0)),  # too little to allocate, so nothing to spoil
    ],
)
def test_expected_values_are_exact_where_the_pooled_mean_is_biased(
    p: tuple[float, ...], pilot: int, k: int, bias_of_pooled: tuple[float, ...]
) -> None:
    budget = AdaptiveBudget(pilot=pilot)
    total = budget.total_for(len(p), k)
    mass, ours, naive = 0.0, np.zeros(len(p)), np.zeros(len(p))
    for chance, first, later in outcomes(p, budget, total):
        assert first.size + sum(map(len, later)) == total
        mass += chance
        ours += chance * budget.estimate(first, later)[0]
        naive += chance * pooled(first, later)
    assert mass == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(ours, p, rtol=0, atol=1e-12)
    np.testing.assert_allclose(naive - p, bias_of_pooled, rtol=0, atol=1e-6)


@pytest.mark.parametrize("p", [(0.1, 0.5), (0.3, 0.9)])
def test_the_two_means_are_uncorrelated_so_the_variance_is_known(p: tuple[float, ...]) -> None:
    budget, k = AdaptiveBudget(pilot=3), 8
    total = budget.total_for(2, k)
    second_moment, inverse = np.zeros(2), np.zeros(2)
    for chance, first, later in outcomes(p, budget, total):
        second_moment += chance * (budget.estimate(first, later)[0] - p) ** 2
        inverse += chance / np.array([len(returns) for returns in later])
    weight = budget.pilot * 2 / total
    q = np.array(p)
    expected = q * (1 - q) * (weight**2 / budget.pilot + (1 - weight) ** 2 * inverse)
    np.testing.assert_allclose(second_moment, expected, rtol=0, atol=1e-13)
    # What is simulated is the average of this over the states, against p (1 - p) / k.
    exact = expected.sum() / (q * (1 - q) / k).sum()
    ratio, error = variance_ratio(p, k, budget, draws=4000)
    assert abs(ratio - exact) < 4.5 * error


def two_step_tree() -> TokenTree:
    """Left is nearly decided, right is open; where the pooled mean goes wrong."""
    odds = [[0.6, -0.2], [-2.5, 0.0], [0.3, -0.3]]
    return TokenTree(TreeShape(2, 2), np.array(odds), np.array([1.0, 0.0, 1.0, 0.0]))


Estimate = Callable[[AdaptiveBudget, Floats, list[Floats]], Floats]


def expected_gradient(tree: TokenTree, estimate: Estimate) -> Floats:
    """Over all pairs of trajectories and all rollouts of their states; one budget for a pair."""
    budget, total = AdaptiveBudget(total=18, pilot=4), 18

    @functools.cache
    def expected_values(p: tuple[float, ...]) -> Floats:
        return sum(
            (
                chance * estimate(budget, first, later)
                for chance, first, later in outcomes(p, budget, total)
            ),
            start=np.zeros(len(p)),
        )

    gradient = np.zeros_like(tree.logits)
    for pair in itertools.product(list(tree.episodes()), repeat=2):
        wanted = [s for episode, _, _ in pair for s in borders_to_states(episode, [0, 1, 2])]
        different, place = unique(wanted)
        # The gradient is linear in the values, so their expectation given the pair will do.
        values = expected_values(tuple(tree.value(s.response_ids) for s in different))
        for number, (episode, _, score) in enumerate(pair):
            here = values[place[2 * number : 2 * number + 2]]
            for step, advantage in enumerate((here[1] - here[0], score - here[1])):
                node = tree.node(episode.response_ids[:step])
                score_function = -tree.probabilities[node]
                score_function[episode.response_ids[step]] += 1
                gradient[node] += pair[0][1] * pair[1][1] / 2 * advantage * score_function
    return gradient


def test_policy_gradient_is_exact_though_states_of_a_trajectory_share_the_budget() -> None:
    tree = two_step_tree()
    ours = expected_gradient(tree, lambda budget, first, later: budget.estimate(first, later)[0])
    np.testing.assert_allclose(ours, tree.gradient, rtol=0, atol=1e-12)
    naive = expected_gradient(tree, lambda _, first, later: pooled(first, later))
    assert np.abs(naive - tree.gradient).max() > 1e-4


# --- allocation -------------------------------------------------------------------------------


@settings(max_examples=100)
@given(st.data())
def test_allocation_spends_the_total_and_leaves_no_state_out(data: st.DataObject) -> None:
    states = data.draw(st.integers(1, 12))
    budget = AdaptiveBudget(
        pilot=data.draw(st.integers(2, 6)), minimum=data.draw(st.integers(1, 3))
    )
    k = data.draw(st.integers(budget.pilot + budget.minimum, 20))
    score = st.sampled_from([0.0, 1.0, 0.25]) if data.draw(st.booleans()) else st.just(1.0)
    rows = st.lists(score, min_size=budget.pilot, max_size=budget.pilot)
    pilot = np.array(data.draw(st.lists(rows, min_size=states, max_size=states)))
    total = budget.total_for(states, k)
    counts = budget.allocate(pilot, total)
    assert counts.dtype == np.int64
    assert counts.sum() + pilot.size == total
    assert counts.min() >= budget.minimum
    np.testing.assert_array_equal(counts, budget.allocate(pilot, total))


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=9), st.integers(0, 200))
def test_rounding_adds_up_and_stays_within_one(weights: list[float], total: int) -> None:
    found = largest_remainder(np.array(weights), total)
    shares = np.array(weights) / sum(weights) * total
    assert found.sum() == total
    assert (np.abs(found - shares) < 1 + 1e-9).all()


def test_largest_remainders_are_rounded_up_and_the_first_of_equals() -> None:
    np.testing.assert_array_equal(largest_remainder(np.array([5.0, 3.0, 2.0]), 9), [4, 3, 2])
    np.testing.assert_array_equal(largest_remainder(np.ones(4), 6), [2, 2, 1, 1])


def test_undecided_states_get_more_and_states_with_equal_pilots_get_the_same() -> None:
    budget = AdaptiveBudget(pilot=4)
    mixed = np.stack([coin(4, s) for s in [0, 4, 2, 0, 4, 2, 0, 4]])
    counts = budget.allocate(mixed, 9 * 8)
    np.testing.assert_array_equal(counts, [4, 4, 8, 4, 4, 8, 4, 4])
    for successes in range(5):
        equal = np.stack([coin(4, successes)] * 8)
        np.testing.assert_array_equal(budget.allocate(equal, 9 * 8), 5)


def test_weights_are_roots_of_posterior_variances() -> None:
    successes = np.array([0.0, 3.0, 1.0, 3.0, 0.0, 3.0])
    found = neyman_weights(successes, 3)
    # By hand: the prior by moments, then the integral of p (1 - p) over the posterior, on a grid.
    mean = (10 + 0.5) / 19
    within = np.mean([s * (3 - s) / 6 for s in successes])
    strength = 1 / min(1 - within / (mean * (1 - mean)), 0.9) - 1
    grid = (np.arange(200_000) + 0.5) / 200_000
    for s, weight in zip(successes, found, strict=True):
        a, b = mean * strength + s, (1 - mean) * strength + 3 - s
        log_density = a * np.log(grid) + b * np.log1p(-grid)  # one power more: p and 1 - p
        norm = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
        expected = np.exp(log_density - norm).mean()
        assert weight**2 == pytest.approx(expected, rel=1e-4)


def test_proportional_to_the_root_of_the_variance_is_best() -> None:
    variances = np.array([0.0196, 0.25, 0.09, 0.16])
    best = largest_remainder(np.sqrt(variances), 24)
    least = min(
        float((variances / np.array(counts)).sum())
        for counts in itertools.product(range(1, 22), repeat=4)
        if sum(counts) == 24
    )
    assert (variances / best).sum() == pytest.approx(least, rel=0.01)


# --- what it brings ---------------------------------------------------------------------------

MIXES = {
    "thirds": [0.02, 0.5, 0.98] * 16,
    "decided": [0.0] * 19 + [1.0] * 19 + [0.5] * 10,
    "even": [(i + 0.5) / 48 for i in range(48)],
    "halves": [0.5] * 48,
    "tenths": [0.1] * 48,
}


@pytest.mark.parametrize(
    ("mix", "k", "documented"),
    [
        ("thirds", 6, 1.00),
        ("thirds", 9, 0.92),
        ("thirds", 16, 0.88),
        ("decided", 6, 0.93),
        ("decided", 9, 0.79),
        ("decided", 16, 0.71),
        ("even", 6, 1.00),
        ("even", 9, 1.00),
        ("even", 16, 0.99),
        ("halves", 6, 1.00),
        ("halves", 9, 1.00),
        ("halves", 16, 1.00),
        ("tenths", 6, 1.00),
        ("tenths", 9, 1.00),
        ("tenths", 16, 1.01),
    ],
)
def test_mean_variance_against_uniform_is_as_documented(
    mix: str, k: int, documented: float
) -> None:
    ratio, error = variance_ratio(MIXES[mix], k, AdaptiveBudget(), draws=300)
    assert error < 0.003
    assert abs(ratio - documented) < 0.005 + 4 * error
    if documented < 0.99:
        assert ratio + 4 * error < 1
    # Nobody beats the allocation by the true values.
    p = np.array(MIXES[mix])
    assert ratio + 4 * error > np.sqrt(p * (1 - p)).mean() ** 2 / (p * (1 - p)).mean()


def test_what_neyman_allocation_by_true_values_would_bring_is_as_documented() -> None:
    found = {}
    for name, values in MIXES.items():
        p = np.array(values)
        found[name] = round(np.sqrt(p * (1 - p)).mean() ** 2 / (p * (1 - p)).mean(), 2)
    assert found == {"thirds": 0.7, "decided": 0.21, "even": 0.93, "halves": 1, "tenths": 1}


@pytest.mark.parametrize(
    ("p", "states", "percent"), [(0.1, 48, 1), (0.05, 16, 4), (0.05, 6, 3), (0.5, 48, 0)]
)
def test_equal_values_near_0_or_1_cost_and_do_not_pay(p: float, states: int, percent: int) -> None:
    ratio, error = variance_ratio([p] * states, 16, AdaptiveBudget(), draws=600)
    assert abs(ratio - 1 - percent / 100) < 0.005 + 4 * error
    assert ratio > 1 - 1e-12  # no allocation beats the even one
    if percent:
        assert ratio - 4 * error > 1


# --- through the estimator --------------------------------------------------------------------


def coins() -> tuple[TokenTree, list[State], Floats]:
    """A tree whose first token leads to a state that is lost, won, open, or nearly lost."""
    chances = [0.0, 1.0, 0.5, 0.05]
    logits = [[0.0] * 4]
    rewards = []
    for p in chances:
        right = 0.5 if p in (0.0, 1.0) else p
        logits.append([math.log(right), *[math.log((1 - right) / 3)] * 3])
        rewards += [1.0] * 4 if p == 1.0 else [0.0] * 4 if p == 0.0 else [1.0, 0.0, 0.0, 0.0]
    tree = TokenTree(TreeShape(4, 2), np.array(logits), np.array(rewards))
    return tree, [tree.state(1 + i) for i in range(4)], np.array(chances)


def test_the_estimator_spends_the_total_unbiased_and_with_the_variance_it_tells() -> None:
    tree, four, p = coins()
    rows = 120
    states = [State(row, s.prompt_ids, s.response_ids) for row in range(rows) for s in four]
    backend = tree.backend()
    estimator = MonteCarloValueEstimator(
        backend, tree.score, 9, params=PARAMS, adaptive=AdaptiveBudget()
    )
    found = [estimator(states, seed=seed) for seed in range(2)]
    assert backend.usage.requests == 2 * 9 * len(states)
    assert [f.counts.sum() for f in found] == [9 * len(states)] * 2
    error = np.concatenate([f.values.reshape(rows, 4) for f in found]) - p
    np.testing.assert_array_equal(error[:, :2], 0.0)
    own = np.concatenate([f.variances.reshape(rows, 4) for f in found])
    for column in (2, 3):
        e = error[:, column]
        assert abs(e.mean()) < 4.5 * e.std() / math.sqrt(len(e))
        spread = np.hypot((e**2).std(), own[:, column].std()) / math.sqrt(len(e))
        assert abs((e**2).mean() - own[:, column].mean()) < 4.5 * spread
    assert (error**2).mean() < 0.95 * (p * (1 - p) / 9).mean()
    assert estimator.last is not None
    assert [len(r) for r in estimator.last.returns] == found[-1].counts.tolist()


def test_a_total_in_place_of_k_is_spent_to_the_last_rollout() -> None:
    tree, states, _ = coins()
    backend = tree.backend()
    budget = AdaptiveBudget(total=31, pilot=3, minimum=2)
    estimator = MonteCarloValueEstimator(backend, tree.score, 1, params=PARAMS, adaptive=budget)
    found = estimator([*states, *states])
    assert backend.usage.requests == 31
    assert found.counts[:4].sum() == 31
    assert found.counts.min() >= 5


def test_second_phase_draws_other_returns_than_the_first() -> None:
    tree, states, _ = coins()
    estimator = MonteCarloValueEstimator(
        tree.backend(), tree.score, 80, params=PARAMS, adaptive=AdaptiveBudget(pilot=40)
    )
    estimator([states[2]])
    plain = MonteCarloValueEstimator(tree.backend(), tree.score, 80, params=PARAMS)
    plain([states[2]])
    assert estimator.last is not None
    assert plain.last is not None
    two_phases, one_phase = estimator.last.returns[0], plain.last.returns[0]
    np.testing.assert_array_equal(two_phases[:40], one_phase[:40])
    assert (two_phases[40:] != two_phases[:40]).any()
    assert (two_phases[40:] != one_phase[40:]).any()


# --- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [-0.5, 1.5, 2.0])
def test_scores_outside_0_to_1_are_refused_after_the_pilots_at_the_latest(bad: float) -> None:
    tree, states, _ = coins()
    backend = tree.backend()

    def reward(episodes: Sequence[Episode]) -> list[float]:
        return [bad if score else 0.0 for score in tree.score(episodes)]

    budget = AdaptiveBudget(pilot=4)
    estimator = MonteCarloValueEstimator(backend, reward, 9, params=PARAMS, adaptive=budget)
    with pytest.raises(InvalidInputError, match=r"reward_funcs: expected scores from 0 to 1.*got"):
        estimator(states)
    assert backend.usage.requests == 4 * len(states)  # no second phase
    assert estimator.last is None
    # With a constant number of rollouts any finite reward will do.
    MonteCarloValueEstimator(backend, reward, 9, params=PARAMS)(states)


def test_scores_of_trajectories_can_be_checked_before_any_rollout() -> None:
    AdaptiveBudget().check_scores([0.0, 1.0, 0.3])
    AdaptiveBudget().check_scores([])
    for bad in (-1e-9, 1.0001, math.nan):
        with pytest.raises(InvalidInputError, match="reward_funcs"):
            AdaptiveBudget().check_scores([0.5, bad])


def test_nan_scores_are_an_error_of_the_reward() -> None:
    tree, states, _ = coins()

    def broken(episodes: Sequence[Episode]) -> list[float]:
        return [math.nan] * len(episodes)

    estimator = MonteCarloValueEstimator(
        tree.backend(), broken, 9, params=PARAMS, adaptive=AdaptiveBudget()
    )
    with pytest.raises(RewardError, match="reward broken: expected finite numbers"):
        estimator(states)


@pytest.mark.parametrize(
    ("name", "value"),
    [("pilot", 1), ("pilot", 2.5), ("minimum", 0), ("total", 0), ("pilot", None), ("total", "9")],
)
def test_numbers_out_of_range_are_refused_by_name(name: str, value: int) -> None:
    with pytest.raises(InvalidInputError, match=f"{name}: expected"):
        AdaptiveBudget(**{name: value})


def test_a_budget_too_small_for_two_phases_is_refused_before_anything_is_sampled() -> None:
    tree, states, _ = coins()
    backend = tree.backend()
    with pytest.raises(InvalidInputError, match=r"num_rollouts \(k\): .* 4 \+ 1 .* got 4"):
        MonteCarloValueEstimator(
            backend, tree.score, 4, params=PARAMS, adaptive=AdaptiveBudget(pilot=4)
        )
    small = AdaptiveBudget(total=19, pilot=4)
    estimator = MonteCarloValueEstimator(backend, tree.score, 9, params=PARAMS, adaptive=small)
    with pytest.raises(InvalidInputError, match=r"total: expected at least 20 rollouts.* got 19"):
        estimator(states)
    assert backend.usage.requests == 0


@pytest.mark.parametrize("values", [[0.0, 1.0], [0.5, 1.5], [], [[0.5]], [math.nan]])
def test_a_ratio_of_nothing_is_refused(values: list[float]) -> None:
    with pytest.raises(InvalidInputError, match="values: expected"):
        variance_ratio(values, 9, AdaptiveBudget())
