"""What every value estimator promises, and what the Monte-Carlo one does beyond that."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decapod.lm import SamplingParams
from vineppo.budget import AdaptiveBudget
from vineppo.episodes import Episode, Rollout, State
from vineppo.errors import InvalidInputError, NotFiniteError, RewardError
from vineppo.states import borders_to_states, unique
from vineppo.tasks.token_tree import TabularBackend, TokenTree, TreeShape
from vineppo.values import (
    ConstantValueEstimator,
    CriticValueEstimator,
    ExactValueEstimator,
    GroupMeanValueEstimator,
    MonteCarloValueEstimator,
    ValueEstimator,
    state_seed,
)

TREE = TokenTree.random(3, 4, seed=3)
PARAMS = SamplingParams(max_new_tokens=8)


def coin(p: float) -> TokenTree:
    """One token, of which 1 is right, with probability p."""
    logits = [[math.log(1 - p), math.log(p)]]
    return TokenTree(TreeShape(2, 1), np.array(logits), np.array([0.0, 1.0]))


def monte_carlo(k: int = 3, tree: TokenTree = TREE, **more: object) -> MonteCarloValueEstimator:
    settings = {"params": PARAMS, **more}
    return MonteCarloValueEstimator(tree.backend(), tree.score, k, **settings)


class Watched(TabularBackend):
    """The exact sampler of a tree, which keeps what it was asked for."""

    def __init__(self, tree: TokenTree) -> None:
        super().__init__(tree)
        self.calls: list[tuple[list[tuple[int, ...]], list[int], list[int]]] = []

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        n: int | Sequence[int],
        params: SamplingParams | Sequence[SamplingParams],
        seeds: Sequence[int],
    ) -> list[list[Rollout]]:
        each = params if isinstance(params, Sequence) else [params] * len(prompts)
        counts = [n] * len(prompts) if isinstance(n, int) else list(n)
        limits = [p.max_new_tokens for p in each]
        self.calls.append(([tuple(p) for p in prompts], counts, limits))
        return super().generate(prompts, n, params, seeds)


def inner_states(tree: TokenTree = TREE) -> list[State]:
    return [tree.state(node) for node in range(tree.shape.internal)]


STATES = [*inner_states()[::3], *inner_states()[:6], inner_states()[0]]  # some of them twice

MAKERS: dict[str, Callable[[], ValueEstimator]] = {
    "monte-carlo": lambda: monte_carlo(3),
    "adaptive": lambda: monte_carlo(9, adaptive=AdaptiveBudget(pilot=3)),
    "critic": lambda: CriticValueEstimator(lambda ids: [math.sin(sum(i) + len(i)) for i in ids]),
    "group mean": lambda: GroupMeanValueEstimator({0: 0.375}),
    "constant": ConstantValueEstimator,
    "exact": lambda: ExactValueEstimator(TREE),
}


# --- every estimator --------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKERS)
def test_one_finite_float64_value_per_state_in_order(name: str) -> None:
    found = MAKERS[name]()(STATES, seed=1)
    assert len(found) == len(STATES)
    for array, kind in ((found.values, np.float64), (found.variances, np.float64)):
        assert array.shape == (len(STATES),)
        assert array.dtype == kind
    assert found.counts.shape == (len(STATES),)
    assert found.counts.dtype == np.int64
    assert np.isfinite(found.values).all()
    by_state = dict(zip(STATES, found.values, strict=True))
    np.testing.assert_array_equal(found.values, [by_state[s] for s in STATES])


@pytest.mark.parametrize("name", MAKERS)
def test_neither_order_nor_repetition_changes_a_value(name: str) -> None:
    once = MAKERS[name]()(STATES, seed=1).values
    order = np.random.default_rng(0).permutation(len(STATES))
    shuffled = [STATES[i] for i in order]
    np.testing.assert_array_equal(MAKERS[name]()(shuffled, seed=1).values, once[order])
    twice = MAKERS[name]()([*STATES, *shuffled], seed=1).values
    np.testing.assert_array_equal(twice, np.concatenate([once, once[order]]))


@pytest.mark.parametrize("name", MAKERS)
def test_equal_calls_give_equal_values_however_often_made(name: str) -> None:
    estimator = MAKERS[name]()
    first = estimator(STATES, seed=7)
    estimator(STATES[:2], seed=8)
    again = estimator(STATES, seed=7)
    np.testing.assert_array_equal(first.values, again.values)
    np.testing.assert_array_equal(first.variances, again.variances)
    np.testing.assert_array_equal(first.counts, again.counts)


@pytest.mark.parametrize("name", MAKERS)
def test_no_states_have_no_values(name: str) -> None:
    found = MAKERS[name]()([], seed=1)
    assert len(found) == 0
    assert found.values.shape == found.variances.shape == found.counts.shape == (0,)


# --- Monte Carlo ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("p", "k", "mean_error"),
    [
        (0.5, 1, 0.5),
        (0.5, 3, 0.25),
        (0.5, 9, 0.1367),
        (0.1, 1, 0.18),
        (0.1, 3, 0.1458),
        (0.1, 9, 0.0775),
    ],
)
def test_error_has_the_moments_of_a_binomial_mean(p: float, k: int, mean_error: float) -> None:
    tree, rows = coin(p), 1500
    states = [State(row, tree.prompt_ids) for row in range(rows)]  # alike, but each with its seed
    found = monte_carlo(k, tree)(states)
    error = found.values - p
    assert abs(error.mean()) < 4.5 * math.sqrt(p * (1 - p) / k / rows)
    spread = (error**2).std() / math.sqrt(rows)
    assert abs((error**2).mean() - p * (1 - p) / k) < 4.5 * spread + 1e-12
    assert abs(np.abs(error).mean() - mean_error) < 4.5 * np.abs(error).std() / rows**0.5 + 5e-5
    if k == 1:
        assert np.isnan(found.variances).all()
    else:  # the estimate of the variance is itself unbiased
        of_estimates = found.variances.std() / math.sqrt(rows)
        assert abs(found.variances.mean() - p * (1 - p) / k) < 4.5 * of_estimates


@pytest.mark.parametrize("adaptive", [None, AdaptiveBudget(pilot=2)])
@pytest.mark.parametrize("k", [3, 4, 9])
def test_decided_states_have_no_error_at_any_k(k: int, adaptive: AdaptiveBudget | None) -> None:
    tree = TokenTree.one_action_matters(2, 4, position=1)
    decided = [s for s in inner_states(tree) if tree.value(s.response_ids) in (0.0, 1.0)]
    assert {tree.value(s.response_ids) for s in decided} == {0.0, 1.0}
    found = monte_carlo(k, tree, adaptive=adaptive)(decided)
    np.testing.assert_array_equal(found.values, [tree.value(s.response_ids) for s in decided])
    np.testing.assert_array_equal(found.variances, 0.0)


def test_three_rollouts_are_the_first_three_of_nine() -> None:
    few, many = monte_carlo(3), monte_carlo(9)
    values = few(STATES, seed=4).values
    many(STATES, seed=4)
    assert few.last is not None
    assert many.last is not None
    for three, nine in zip(few.last.returns, many.last.returns, strict=True):
        np.testing.assert_array_equal(three, nine[:3])
    np.testing.assert_array_equal(values, [r[:3].mean() for r in many.last.returns])


def test_a_batch_equals_one_call_per_state() -> None:
    together = monte_carlo(4)(STATES, seed=2).values
    alone = [monte_carlo(4)([state], seed=2).values[0] for state in STATES]
    np.testing.assert_array_equal(together, alone)


def test_another_seed_draws_other_rollouts() -> None:
    estimator = monte_carlo(9)
    assert (estimator(STATES, seed=0).values != estimator(STATES, seed=1).values).any()


def test_equal_states_are_sampled_once() -> None:
    backend = Watched(TREE)
    estimator = MonteCarloValueEstimator(backend, TREE.score, 5, params=PARAMS)
    found = estimator([STATES[0]] * 7 + [STATES[1]])
    assert backend.usage.requests == 10
    assert len(set(found.values[:7])) == 1
    np.testing.assert_array_equal(found.counts, 5)
    assert estimator.last is not None
    assert (estimator.last.states, estimator.last.unique_states) == (8, 2)
    # The same tokens in answer to another question are another state.
    estimator([STATES[0], State(1, STATES[0].prompt_ids, STATES[0].response_ids)])
    assert backend.usage.requests == 20


def test_one_backend_call_per_phase_with_trajectories_side_by_side() -> None:
    backend = Watched(TREE)
    episodes = [TREE.episode(leaf) for leaf in (5, 40, 70)]
    states = [s for e in episodes for s in borders_to_states(e, [0, 1, 2, 3, 4])]
    shuffled = [states[i] for i in np.random.default_rng(1).permutation(len(states))]
    MonteCarloValueEstimator(backend, TREE.score, 2, params=PARAMS)(shuffled)
    ((prompts, counts, _),) = backend.calls
    assert counts == [2] * len(prompts)
    for episode in episodes:
        whole = episode.prompt_ids + episode.response_ids
        own = [i for i, p in enumerate(prompts) if len(p) > 1 and whole[: len(p)] == p]
        assert own == list(range(own[0], own[0] + 3))
        assert [len(prompts[i]) for i in own] == [2, 3, 4]
    backend.calls.clear()
    budget = AdaptiveBudget(pilot=2)
    MonteCarloValueEstimator(backend, TREE.score, 5, params=PARAMS, adaptive=budget)(shuffled)
    assert [sum(counts) for _, counts, _ in backend.calls] == [2 * 10, 3 * 10]


def test_ids_of_every_request_are_a_prefix_of_the_trajectory() -> None:
    backend = Watched(TREE)
    episode = TREE.episode(33)
    states = borders_to_states(episode, [0, 1, 3, 4])
    MonteCarloValueEstimator(backend, TREE.score, 2, params=PARAMS)(states)
    whole = episode.prompt_ids + episode.response_ids
    assert [whole[: len(p)] == p for p in backend.calls[0][0]] == [True, True, True]


def test_a_rollout_ends_where_its_trajectory_would_have_been_cut() -> None:
    backend = Watched(TREE)
    states = [TREE.state(0), TREE.state(1), TREE.state(4)]
    estimator = MonteCarloValueEstimator(
        backend, TREE.score, 3, params=PARAMS, max_response_tokens=3
    )
    found = estimator(states)
    assert dict(zip(*backend.calls[0][::2], strict=True)) == {
        state.ids: 3 - len(state.response_ids) for state in states
    }
    # All are cut one token before a leaf, which this reward scores 0.
    np.testing.assert_array_equal(found.values, 0.0)
    assert estimator.last is not None
    assert estimator.last.truncated == 1.0
    backend.calls.clear()
    capped = SamplingParams(max_new_tokens=2)
    MonteCarloValueEstimator(backend, TREE.score, 3, params=capped, max_response_tokens=9)(states)
    assert backend.calls[0][2] == [2, 2, 2]


def test_statistics_tell_what_was_done() -> None:
    tree = coin(0.5)
    estimator = monte_carlo(8, tree)
    state = State(0, tree.prompt_ids)
    assert estimator.last is None
    found = estimator([state, state, State(1, tree.prompt_ids)], seed=5)
    last = estimator.last
    assert last is not None
    assert (last.states, last.unique_states, last.rollouts) == (3, 2, 16)
    assert (last.truncated, last.generated_tokens) == (0.0, 16)
    assert last.returns[0] is last.returns[1]
    assert len(last.returns[2]) == 8
    # Two different answers exist, and this seed draws both of them from both states.
    assert last.unique_rollouts == 4 / 16
    std = [np.std(r, ddof=1) for r in (last.returns[0], last.returns[2])]
    assert last.mean_std == pytest.approx(np.mean(std), abs=1e-12)
    assert found.variances[0] == pytest.approx(std[0] ** 2 / 8, abs=1e-12)
    estimator([])
    assert estimator.last is not None
    assert estimator.last.rollouts == 0
    assert math.isnan(estimator.last.truncated)


@pytest.mark.parametrize("k", [0, -1, 2.5, True, None])
def test_no_rollouts_are_refused_by_name(k: int) -> None:
    with pytest.raises(InvalidInputError, match=r"num_rollouts \(k\): expected .* at least 1"):
        monte_carlo(k)


def test_a_state_without_room_is_refused_before_anything_is_sampled() -> None:
    backend = Watched(TREE)
    estimator = MonteCarloValueEstimator(
        backend, TREE.score, 3, params=PARAMS, max_response_tokens=2
    )
    with pytest.raises(InvalidInputError, match="max_response_tokens: expected more than the 2"):
        estimator([TREE.state(0), TREE.state(4)])
    assert backend.calls == []
    assert estimator.last is None
    with pytest.raises(InvalidInputError, match="max_response_tokens"):
        monte_carlo(3, max_response_tokens=0)


@pytest.mark.parametrize(
    ("reward", "problem"),
    [
        (lambda episodes: [math.nan] * len(episodes), "expected finite numbers, got nan"),
        (lambda episodes: [0.0] * (len(episodes) - 1), r"expected 9 numbers.* shape \(8,\)"),
        (lambda episodes: [[0.0]] * len(episodes), r"shape \(9, 1\)"),
        (lambda episodes: [None] * len(episodes), "expected finite numbers|expected numbers"),
        (lambda episodes: ["right"] * len(episodes), "expected numbers"),
    ],
)
def test_unusable_scores_name_the_reward(
    reward: Callable[[Sequence[Episode]], Sequence[float]], problem: str
) -> None:
    reward.__name__ = "exact_match"
    estimator = MonteCarloValueEstimator(TREE.backend(), reward, 9, params=PARAMS)
    with pytest.raises(RewardError, match=problem) as caught:
        estimator([TREE.state(0)])
    assert "exact_match" in str(caught.value)


# --- seeds of states --------------------------------------------------------------------------

ids = st.lists(st.integers(0, 2**40), max_size=5).map(tuple)
some_states = st.builds(State, st.integers(0, 9), ids.filter(bool), ids)


@given(st.lists(some_states, min_size=2, max_size=6, unique=True), st.integers(-5, 2**70))
def test_seeds_are_63_bits_and_differ_by_state_seed_and_purpose(
    states: list[State], seed: int
) -> None:
    found = [state_seed(seed, s) for s in states]
    assert all(0 <= f < 2**63 for f in found)
    assert len(set(found)) == len(states)
    assert state_seed(seed, states[0]) == found[0]
    assert state_seed(seed + 1, states[0]) != found[0]
    assert state_seed(seed, states[0], "truth") != found[0]


def test_seeds_are_the_same_on_every_machine() -> None:
    digest = hashlib.sha256(b"values|-7|3|2|" + struct.pack("<3q", 1, 2, 2**40)).hexdigest()
    assert state_seed(-7, State(3, (1, 2), (2**40,))) == int(digest[:16], 16) // 2


def test_where_the_prompt_ends_is_part_of_a_state() -> None:
    assert state_seed(0, State(0, (1, 2), (3,))) != state_seed(0, State(0, (1,), (2, 3)))


# --- the other estimators ---------------------------------------------------------------------


def test_exact_values_are_those_of_the_tree() -> None:
    states = inner_states()
    found = ExactValueEstimator(TREE)(states)
    np.testing.assert_array_equal(found.values, TREE.values[: TREE.shape.internal])
    np.testing.assert_array_equal(found.variances, 0.0)
    np.testing.assert_array_equal(found.counts, 0)
    with pytest.raises(InvalidInputError, match="response_ids"):
        ExactValueEstimator(TREE)([State(0, TREE.prompt_ids, (9,))])


def test_monte_carlo_converges_to_the_exact_values() -> None:
    states = inner_states()
    k = 500
    found = monte_carlo(k)(states)
    exact = ExactValueEstimator(TREE)(states).values
    bound = 4.5 * np.sqrt(np.clip(exact * (1 - exact), 0, None) / k)  # its rewards are 0 and 1
    assert (np.abs(found.values - exact) <= bound + 1e-12).all()


def test_critic_sees_whole_sequences_and_each_state_once() -> None:
    seen: list[Sequence[int]] = []

    def value_fn(sequences: Sequence[Sequence[int]]) -> list[float]:
        seen.extend(sequences)
        return [float(len(s)) for s in sequences]

    found = CriticValueEstimator(value_fn)(STATES)
    np.testing.assert_array_equal(found.values, [len(s.ids) for s in STATES])
    assert np.isnan(found.variances).all()
    assert sorted(seen) == sorted({s.ids for s in STATES})


def test_critic_with_unusable_values_is_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"value_fn: expected \d+ numbers"):
        CriticValueEstimator(lambda _: [0.0])(STATES)
    with pytest.raises(NotFiniteError, match=r"value_fn: expected finite values"):
        CriticValueEstimator(lambda ids: [math.inf] * len(ids))(STATES)


def test_group_mean_needs_a_mean_for_each_row() -> None:
    states = [State(3, (1,)), State(5, (1,), (2,)), State(3, (1,), (2,))]
    found = GroupMeanValueEstimator({3: 0.25, 5: 1.0})(states)
    np.testing.assert_array_equal(found.values, [0.25, 1.0, 0.25])
    with pytest.raises(InvalidInputError, match=r"rows_to_mean: .* none for row 5"):
        GroupMeanValueEstimator({3: 0.25})(states)
    with pytest.raises(InvalidInputError, match=r"rows_to_mean: .* nan for row 3"):
        GroupMeanValueEstimator({3: math.nan})


def test_constant_is_one_half_unless_told() -> None:
    np.testing.assert_array_equal(ConstantValueEstimator()(STATES).values, 0.5)
    np.testing.assert_array_equal(ConstantValueEstimator(0.25)(STATES).values, 0.25)
    with pytest.raises(InvalidInputError, match="value: expected a finite number"):
        ConstantValueEstimator(math.inf)


# --- states of an episode ---------------------------------------------------------------------


@settings(max_examples=60)
@given(st.data())
def test_states_are_growing_prefixes_and_the_last_one_is_left_out(data: st.DataObject) -> None:
    response = data.draw(st.lists(st.integers(0, 9), max_size=12).map(tuple))
    inner = range(1, len(response))
    cuts = data.draw(st.sets(st.sampled_from(inner))) if inner else set()
    borders = sorted({0, len(response), *cuts})
    episode = Episode(2, (7, 8), response, finished=True)
    states = borders_to_states(episode, borders)
    assert len(states) == len(borders) - 1
    for state, border in zip(states, borders, strict=False):
        assert (state.row, state.prompt_ids) == (2, (7, 8))
        assert state.response_ids == response[:border]
        assert len(state.response_ids) < len(response)
    cap = data.draw(st.integers(1, 14))
    assert borders_to_states(episode, borders, cap) == states[:cap]


@pytest.mark.parametrize("borders", [[], [0], [0, 2], [1, 3], [0, 2, 2, 3], [0, 2, 1, 3], [0, 4]])
def test_borders_of_another_answer_are_refused(borders: list[int]) -> None:
    with pytest.raises(InvalidInputError, match=r"borders: .* from 0 to 3.*row 4"):
        borders_to_states(Episode(4, (1,), (5, 6, 7), finished=False), borders)


def test_an_empty_answer_has_no_states_and_a_cap_is_at_least_one() -> None:
    episode = Episode(4, (1,), (), finished=False)
    assert borders_to_states(episode, [0]) == []
    with pytest.raises(InvalidInputError, match="max_value_steps: expected at least 1"):
        borders_to_states(episode, [0], 0)


@given(st.lists(some_states, max_size=8), st.randoms())
def test_unique_states_rebuild_all_states_in_an_order_of_their_own(
    states: list[State], random: object
) -> None:
    repeated = states + states[:3]
    different, place = unique(repeated)
    assert [different[i] for i in place] == repeated
    assert len(set(different)) == len(different) == len(set(repeated))
    random.shuffle(repeated)  # type: ignore[attr-defined]
    assert unique(repeated)[0] == different
