from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("decapod.lm")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decapod.lm import SamplingParams, build_model, build_tokenizer
from vineppo.backend import sample_seeds
from vineppo.borders import token_borders
from vineppo.diagnostics import (
    Candidates,
    GroundTruth,
    Interval,
    Predictions,
    ValueReport,
    alternatives,
    best_within,
    calibration,
    collect_states,
    comparison_table,
    evaluate_values,
    gradient_variance,
    ground_truth,
    mae_difference,
    mean_interval,
    score_sets,
    states_of,
    train_test_curve,
)
from vineppo.diagnostics.intervals import linearised_errors, t_quantile
from vineppo.diagnostics.ranking import SetScores, naive_scores
from vineppo.diagnostics.reliability import membership
from vineppo.diagnostics.truth import PREDICTION, TRUTH, stream_seed
from vineppo.episodes import Episode, Rollout, State
from vineppo.errors import InvalidInputError
from vineppo.rollout import TransformersBackend
from vineppo.segmenters import NewlineSegmenter
from vineppo.tasks import TokenTree
from vineppo.values import (
    ConstantValueEstimator,
    CriticValueEstimator,
    ExactValueEstimator,
    MonteCarloValueEstimator,
)

PARAMS = SamplingParams(max_new_tokens=8)


def each_token(ids: Sequence[int]) -> list[int]:
    return list(range(len(ids) + 1))


class Recording:
    """The tree's own backend, and a note of every single sample that was asked for."""

    def __init__(self, tree: TokenTree) -> None:
        self._inner = tree.backend()
        self.samples: set[tuple[tuple[int, ...], int]] = set()

    @property
    def usage(self) -> Any:
        return self._inner.usage

    def load_weights(self, model: Any) -> None:
        self._inner.load_weights(model)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        n: int | Sequence[int],
        params: SamplingParams | Sequence[SamplingParams],
        seeds: Sequence[int],
    ) -> list[list[Rollout]]:
        counts = [n] * len(prompts) if isinstance(n, int) else list(n)
        for prompt, of_prompt in zip(prompts, sample_seeds(seeds, counts), strict=True):
            self.samples |= {(tuple(prompt), seed) for seed in of_prompt}
        return self._inner.generate(prompts, n, params, seeds)


@pytest.fixture(scope="module")
def tree() -> TokenTree:
    """Right answers lie scattered, so that few states are sure to succeed or to fail."""
    drawn = TokenTree.random(vocabulary=3, horizon=5, seed=3, scale=0.5)
    return replace(drawn, rewards=np.random.default_rng(0).permutation(drawn.rewards))


@pytest.fixture(scope="module")
def states(tree: TokenTree) -> list[State]:
    """All states that have a value to estimate; each has a row of its own."""
    return [replace(tree.state(node), row=node) for node in range(tree.shape.internal)]


@pytest.fixture(scope="module")
def exact(tree: TokenTree, states: list[State]) -> GroundTruth:
    return GroundTruth.exact([tree.value(state.response_ids) for state in states])


@pytest.fixture(scope="module")
def sampled(tree: TokenTree, states: list[State]) -> GroundTruth:
    return ground_truth(tree.backend(), tree.score, states, seed=5, params=PARAMS)


@pytest.fixture(scope="module")
def candidates(tree: TokenTree, states: list[State]) -> Candidates:
    origins = [s for s in states if len(s.response_ids) < 3]
    sets = alternatives(tree.backend(), origins, each_token, params=PARAMS, samples=40)
    return Candidates(
        sets, GroundTruth.exact([tree.value(s.response_ids) for s in states_of(sets)])
    )


# --- ground truth -----------------------------------------------------------------------------


def test_truth_has_the_noise_that_it_says(
    tree: TokenTree, sampled: GroundTruth, exact: GroundTruth
) -> None:
    assert (sampled.counts == 256).all()
    assert sampled.standard_errors.max() <= 0.5 / math.sqrt(255)
    noisy = sampled.standard_errors > 0
    z = (sampled.values - exact.values)[noisy] / sampled.standard_errors[noisy]
    assert noisy.sum() > 60
    assert abs(np.mean(z**2) - 1) < 0.5
    assert abs(z.mean()) < 0.3


def test_truth_depends_on_state_and_seed_alone(tree: TokenTree, states: list[State]) -> None:
    chosen = [*states[20:40], states[20], *states[:5]]
    whole = ground_truth(tree.backend(), tree.score, chosen, 16, params=PARAMS)
    parts = ground_truth(
        tree.backend(), tree.score, chosen[::-1], 16, params=PARAMS, states_per_call=3
    )
    np.testing.assert_array_equal(whole.returns, parts.returns[::-1])
    other = ground_truth(tree.backend(), tree.score, chosen, 16, 1, params=PARAMS)
    assert (whole.values != other.values).any()


def test_truth_and_prediction_never_share_a_rollout_whatever_their_seeds(
    tree: TokenTree, states: list[State]
) -> None:
    for seed_of_truth, seed in ((0, 0), (0, 1), (1, 0)):
        for_truth, for_prediction = Recording(tree), Recording(tree)
        truth = ground_truth(for_truth, tree.score, states, 16, seed_of_truth, params=PARAMS)
        estimator = MonteCarloValueEstimator(for_prediction, tree.score, 9, params=PARAMS)
        evaluate_values({"K = 9": estimator}, states, truth, seed=seed, resamples=100)
        assert len(for_truth.samples) == 16 * len(states)
        assert len(for_prediction.samples) == 9 * len(states)
        assert not for_truth.samples & for_prediction.samples


@given(st.integers(0, 2**70), st.integers(0, 2**70))
def test_streams_of_different_names_have_different_seeds(a: int, b: int) -> None:
    assert stream_seed(TRUTH, a) != stream_seed(PREDICTION, b)


@pytest.mark.parametrize("k", [1, 9, 32])
def test_prediction_from_the_rollouts_of_the_truth_is_refused(
    tree: TokenTree, states: list[State], k: int
) -> None:
    sampled = ground_truth(tree.backend(), tree.score, states, 32, params=PARAMS)
    estimator = MonteCarloValueEstimator(tree.backend(), tree.score, k, params=PARAMS)
    assert sampled.stream is not None
    reused = estimator(states, seed=sampled.stream).values
    with pytest.raises(InvalidInputError, match=r"predictors\['mc'\]: .*own rollouts"):
        evaluate_values({"mc": lambda _: reused}, states, sampled)
    with pytest.raises(InvalidInputError, match=r"predictors\['mc'\].seed: "):
        evaluate_values({"mc": Predictions(reused, seed=sampled.stream)}, states, sampled)
    fresh = estimator(states, seed=sampled.stream + 1).values
    evaluate_values({"mc": Predictions(fresh, seed=1)}, states, sampled, resamples=100)


def test_agreement_that_can_be_luck_is_not_refused(tree: TokenTree, states: list[State]) -> None:
    # Two states where all goes well, and one where half does: nothing can be concluded.
    returns = np.concatenate([np.ones((2, 8)), np.tile([0.0, 1.0], (1, 4))])
    errors = np.array([0.0, 0.0, 0.2])
    truth = GroundTruth(returns.mean(1), errors, np.full(3, 8), 0, returns)
    found = evaluate_values({"right": lambda _: [1, 1, 0.5]}, states[:3], truth)
    assert found["right"].mae.value == 0
    # A predictor that is always sure, where nearly everything goes well.
    returns = np.ones((600, 64))
    returns[:, -1] = 0
    errors = returns.std(axis=1, ddof=1) / 8
    truth = GroundTruth(returns.mean(1), errors, np.full(600, 64), 0, returns)
    many = [State(row, (1,)) for row in range(600)]
    evaluate_values({"sure": lambda _: np.ones(600)}, many, truth, resamples=100)


# --- states -----------------------------------------------------------------------------------


def test_collected_states_are_where_steps_begin() -> None:
    episodes = [
        Episode(0, (7, 8), (1, 2, 3, 4), finished=True),
        Episode(0, (7, 8), (1, 2), finished=True),
        Episode(4, (9,), (5,), finished=False),
        Episode(5, (9,), (), finished=False),
    ]

    def twos(ids: Sequence[int]) -> list[int]:
        return [*range(0, len(ids), 2), len(ids)] if ids else [0]

    sample = collect_states(episodes, twos)
    assert sample.states == (
        State(0, (7, 8)),
        State(0, (7, 8), (1, 2)),
        State(0, (7, 8)),
        State(4, (9,)),
    )
    assert sample.positions == (0, 0.5, 0, 0)
    assert sample.clusters == (0, 0, 0, 1)
    assert sample.trajectories == (0, 0, 1, 2)
    few = collect_states(episodes, twos, limit=2, seed=1)
    assert len(few) == 2
    assert few == collect_states(episodes, twos, limit=2, seed=1)
    assert set(few.states) <= set(sample.states)


def test_alternatives_are_different_next_steps(tree: TokenTree, states: list[State]) -> None:
    origins = [states[0], states[0], states[2], states[-1]]
    sets = alternatives(tree.backend(), origins, each_token, n=3, params=PARAMS, samples=50)
    # From the last states every token ends the answer, so there is no next state to choose.
    assert [one.origin for one in sets] == [states[0], states[2]]
    for one in sets:
        assert len(one.states) == len(set(one.states)) == 3
        for state in one.states:
            assert (state.row, state.prompt_ids) == (one.origin.row, one.origin.prompt_ids)
            assert state.response_ids[:-1] == one.origin.response_ids
    alone = alternatives(tree.backend(), [states[2]], each_token, 3, params=PARAMS, samples=50)
    assert alone == sets[1:]
    long = alternatives(
        tree.backend(), origins, each_token, params=PARAMS, samples=50, max_response_tokens=2
    )
    assert [one.origin for one in long] == [states[0]]


def test_steps_of_several_tokens_end_at_their_first_border(tree: TokenTree) -> None:
    def threes(ids: Sequence[int]) -> list[int]:
        return [*range(0, len(ids), 3), len(ids)]

    (one,) = alternatives(tree.backend(), [tree.state(0)], threes, params=PARAMS)
    assert 2 <= len(one.states) <= 5
    assert {len(state.response_ids) for state in one.states} == {3}


def test_language_models_are_judged_by_the_same_calls() -> None:
    tokenizer = build_tokenizer(["0123\n"])
    backend = TransformersBackend(build_model(len(tokenizer), hidden_size=16, layers=1))
    params = SamplingParams(max_new_tokens=12)
    prompts = [(1, 4), (1, 5), (1, 6)]

    def borders(ids: Sequence[int]) -> list[int]:
        return token_borders(NewlineSegmenter(), ids, tokenizer)

    def reward(episodes: Sequence[Episode]) -> list[float]:
        return [len(set(e.response_ids)) / 9 for e in episodes]

    sampled = backend.generate(prompts, 4, params, [0, 1, 2])
    episodes = [
        State(row, prompt).continued(rollout)
        for row, (prompt, rollouts) in enumerate(zip(prompts, sampled, strict=True))
        for rollout in rollouts
    ]
    sample = collect_states(episodes, borders)
    for state, number in zip(sample.states, sample.trajectories, strict=True):
        cut = len(state.response_ids)
        assert state.response_ids == episodes[number].response_ids[:cut]
        assert cut in borders(episodes[number].response_ids)

    sets = alternatives(
        backend, sample.states, borders, params=params, samples=12, max_response_tokens=12
    )
    assert max(len(one.states) for one in sets) == 5
    limits: dict[str, Any] = {"params": params, "max_response_tokens": 12}
    truth = ground_truth(backend, reward, sample.states, 16, **limits)
    candidates = Candidates(sets, ground_truth(backend, reward, states_of(sets), 16, **limits))
    reports = evaluate_values(
        {
            "K = 3": MonteCarloValueEstimator(backend, reward, 3, **limits),
            "far": ConstantValueEstimator(3.0),
        },
        sample.states,
        truth,
        sample.positions,
        sample.clusters,
        candidates=candidates,
    )
    assert reports["K = 3"].mae.clusters == 3
    assert mae_difference(reports["K = 3"], reports["far"]).high < 0
    assert reports["K = 3"].mse.value < 0.05


# --- order ------------------------------------------------------------------------------------


def test_random_predictor_is_at_chance() -> None:
    rng = np.random.default_rng(0)
    truth, guesses = rng.random((2, 50_000))
    scores = score_sets(guesses, truth, np.full(10_000, 5))
    assert abs(scores.top1.mean() - 0.20) < 0.03
    assert (scores.chance == 0.2).all()
    assert abs(scores.agreements.sum() / scores.pairs.sum() - 0.50) < 0.01
    # Guesses of nine rollouts tie with each other, truths of a few values too; still no loss.
    truth = rng.integers(0, 4, 50_000) / 3
    guesses = rng.binomial(9, 0.5, 50_000) / 9
    scores = score_sets(guesses, truth, np.full(10_000, 5))
    assert abs(np.nanmean(scores.top1) - np.nanmean(scores.chance)) < 0.01
    assert abs(scores.agreements.sum() / scores.pairs.sum() - 0.50) < 0.01
    assert scores.strict.sum() / scores.all_pairs.sum() < 0.35  # what counting ties as wrong does


def test_random_predictor_is_at_chance_on_a_tree(
    states: list[State], exact: GroundTruth, candidates: Candidates
) -> None:
    def guess(some: Sequence[State]) -> Any:
        return np.random.default_rng(len(some)).random(len(some))

    many = Candidates(list(candidates.sets) * 2000, _repeated(candidates.truth, 2000))
    report = evaluate_values({"?": guess}, states, exact, candidates=many, resamples=100)["?"]
    assert report.top1 is not None
    assert report.pairwise is not None
    assert report.chance is not None
    assert abs(report.top1.value - report.chance) < 0.03
    assert abs(report.pairwise.value - 0.5) < 0.01


def _repeated(truth: GroundTruth, times: int) -> GroundTruth:
    return GroundTruth.exact(np.tile(truth.values, times))


@settings(max_examples=60)
@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=6),
        min_size=1,
        max_size=6,
    )
)
def test_scores_of_sets_are_those_of_the_definitions(sets: list[list[tuple[int, int]]]) -> None:
    predictions = [float(p) for one in sets for p, _ in one]
    truth = [float(t) for one in sets for _, t in one]
    scores = score_sets(predictions, truth, [len(one) for one in sets])
    naive = [naive_scores([float(p) for p, _ in s], [float(t) for _, t in s]) for s in sets]
    for name, fast, slow in zip(SetScores._fields, scores, zip(*naive, strict=True), strict=True):
        np.testing.assert_allclose(fast, slow, err_msg=name)


@settings(max_examples=30)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=8), st.integers(0, 2**32 - 1))
def test_pairwise_of_the_opposite_is_what_is_missing_to_one(truth: list[float], seed: int) -> None:
    guess = np.random.default_rng(seed).integers(0, 3, len(truth))
    size = [len(truth)]
    there, back = score_sets(guess, truth, size), score_sets(-guess, truth, size)
    assert there.agreements + back.agreements == there.pairs


def test_constant_predictor_ties_with_itself_everywhere(
    states: list[State], exact: GroundTruth, candidates: Candidates
) -> None:
    constant = {"half": ConstantValueEstimator(0.5)}
    report = evaluate_values(constant, states, exact, candidates=candidates)["half"]
    assert report.pairwise is not None
    assert report.pairwise_strict is not None
    assert report.top1 is not None
    assert report.pairwise.value == 0.5
    assert report.pairwise_strict.value == 0
    assert report.top1.value == pytest.approx(report.chance)


def test_exact_values_have_no_error_and_the_right_order(
    tree: TokenTree, states: list[State], exact: GroundTruth, candidates: Candidates
) -> None:
    for_all = {"exact": ExactValueEstimator(tree)}
    report = evaluate_values(for_all, states, exact, candidates=candidates)["exact"]
    assert report.mae.value == report.mae.high == report.bias.value == report.mse.value == 0
    assert report.mae_floor == 0
    assert report.calibration.error < 1e-12
    assert report.within.value == 1
    assert report.top1 is not None
    assert report.pairwise is not None
    assert report.top1.value == report.pairwise.value == 1


def test_order_within_the_noise_of_the_truth_is_not_asked_for() -> None:
    truth, noise = [0.50, 0.52, 0.9], [0.03, 0.03, 0.0]
    guess = [2.0, 1.0, 3.0]
    fine = score_sets(guess, truth, [3])
    coarse = score_sets(guess, truth, [3], standard_errors=noise, resolution=2.0)
    assert (fine.agreements, fine.pairs) == (2, 3)
    assert (coarse.agreements, coarse.pairs) == (2, 2)
    assert coarse.top1 == 1
    near = score_sets([2.0, 1.0], truth[:2], [2], standard_errors=noise[:2], resolution=2.0)
    assert np.isnan(near.top1)
    assert near.pairs == 0


# --- the report -------------------------------------------------------------------------------


def test_error_of_k_rollouts_is_that_of_the_binomial(
    tree: TokenTree, states: list[State], exact: GroundTruth
) -> None:
    p = exact.values.clip(0, 1)  # beyond by rounding
    for k in (1, 3, 9):

        def coins(some: Sequence[State], seed: int, k: int = k) -> Any:
            return np.random.default_rng(seed).binomial(k, p) / k

        runs = [
            evaluate_values({"": coins}, states, exact, seed=seed, resamples=100)[""]
            for seed in range(25)
        ]
        wanted = pytest.approx(np.mean(p * (1 - p) / k), rel=0.1)
        assert np.mean([run.mse.value for run in runs]) == wanted
        assert abs(np.mean([run.bias.value for run in runs])) < 0.02
    estimator = MonteCarloValueEstimator(tree.backend(), tree.score, 9, params=PARAMS)
    found = evaluate_values({"K = 9": estimator}, states, exact)["K = 9"].mse
    assert found.low < np.mean(p * (1 - p) / 9) < found.high


def test_mean_absolute_error_of_nine_rollouts_at_one_half() -> None:
    # Section 7 of the specification: 0.5, 0.25 and 0.1367 for K = 1, 3 and 9.
    for k, wanted in ((1, 0.5), (3, 0.25), (9, 0.1367)):
        drawn = np.random.default_rng(k).binomial(k, 0.5, 20_000) / k
        assert mean_interval(np.abs(drawn - 0.5), resamples=100).value == pytest.approx(
            wanted, abs=0.004
        )


def test_noise_of_the_truth_is_taken_out_of_the_squared_error_alone(
    tree: TokenTree, states: list[State], exact: GroundTruth
) -> None:
    rng = np.random.default_rng(0)
    for_all = {"exact": ExactValueEstimator(tree)}
    p, errors = exact.values, []
    for _ in range(40):
        returns = (rng.random((len(p), 32)) < p[:, None]).astype(float)
        noise = returns.std(axis=1, ddof=1) / math.sqrt(32)
        truth = GroundTruth(returns.mean(axis=1), noise, np.full(len(p), 32), 0, returns)
        report = evaluate_values(for_all, states, truth, resamples=100)["exact"]
        errors.append(report.mse.value)
        assert report.mae.value == pytest.approx(report.mae_floor, rel=0.35)
    assert abs(np.mean(errors)) < 0.1 * np.mean(p * (1 - p)) / 32


def test_any_value_function_is_judged_alike(states: list[State], exact: GroundTruth) -> None:
    def length(some: Sequence[State]) -> list[float]:
        return [len(state.ids) / 8 for state in some]

    numbers = length(states)
    forms = {
        "list": length,
        "tensor": lambda some: torch.tensor(length(some), requires_grad=True),
        "array": lambda some: np.array(length(some), dtype=np.float32),
        "critic": CriticValueEstimator(lambda ids: [len(one) / 8 for one in ids]),
        "before": Predictions(numbers),
    }
    reports = evaluate_values(forms, states, exact, resamples=100)
    for report in reports.values():
        assert report.mae.value == pytest.approx(np.abs(exact.values - numbers).mean())
        assert replace(report, name="list") == reports["list"]


def test_errors_by_position_average_to_the_whole(states: list[State], exact: GroundTruth) -> None:
    positions = np.array([len(s.response_ids) for s in states]) / 4
    report = evaluate_values(
        {"half": ConstantValueEstimator(0.5)}, states, exact, positions, bins=4
    )["half"]
    assert [(b.low, b.high) for b in report.by_position] == [
        (0, 0.25),
        (0.25, 0.5),
        (0.5, 0.75),
        (0.75, 1),
    ]
    # The place 1.0 lies in the last bin, with 0.75.
    assert [b.error.n for b in report.by_position] == [1, 3, 9, 27 + 81]
    total = sum(b.error.value * b.error.n for b in report.by_position)
    assert total / len(states) == pytest.approx(report.mae.value)


def test_numbers_on_an_edge_lie_above_it_in_spite_of_rounding() -> None:
    edges = np.linspace(0, 1, 11)
    x = np.array([i / 10 for i in range(11)])
    assert membership(x, edges).argmax(axis=1).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9]


def test_calibration_finds_what_was_put_in() -> None:
    rng = np.random.default_rng(0)
    value = rng.random(20_000)
    outcome = rng.random(20_000) < value
    good, bold = (calibration(x, outcome, 5, resamples=100) for x in (value, value**2))
    assert good.error < 0.02
    assert bold.error == pytest.approx(np.mean(value - value**2), abs=0.02)
    for b in good.bins:
        assert b.low <= b.predicted <= b.high
        assert b.truth.low < b.predicted < b.truth.high
    assert sum(b.truth.n for b in good.bins) == 20_000
    few = calibration(
        [0.05, 0.9, 0.95], [0.0, 1.0, 0.8]
    )  # bounds of few states are those of 0 to 1
    assert [(b.truth.low, b.truth.high) for b in few.bins] == [(0, 1), (0, 1)]
    # Values that are no probabilities have bins of their own range.
    wide = calibration([-3.0, 0.0, 3.0], [0, 0, 1], 3)
    assert [(b.low, b.high) for b in wide.bins] == [(-3, -1), (-1, 1), (1, 3)]


def test_reports_survive_json(
    states: list[State], sampled: GroundTruth, candidates: Candidates
) -> None:
    positions = np.linspace(0, 1, len(states))
    constant = {"half": ConstantValueEstimator(0.5)}
    for one_prompt in ([0] * len(states), None):
        for sets in (candidates, None):
            report = evaluate_values(
                constant, states, sampled, positions, one_prompt, candidates=sets
            )["half"]
            text = json.dumps(report.to_json(), allow_nan=False)
            assert ValueReport.from_json(json.loads(text)) == report
    with pytest.raises(InvalidInputError, match=r"data: .*mae"):
        ValueReport.from_json({})


def test_reports_read_as_tables(
    states: list[State], sampled: GroundTruth, candidates: Candidates
) -> None:
    reports = evaluate_values(
        {"half": ConstantValueEstimator(0.5), "none": ConstantValueEstimator(0.0)},
        states,
        sampled,
        np.zeros(len(states)),
        candidates=candidates,
    )
    lines = str(reports["half"]).splitlines()
    assert lines[0] == "half: 121 states in 121 clusters, truth of 256 rollouts"
    assert [line.split("  ")[0].strip() or line.strip().split("  ")[0] for line in lines[2:]] == [
        "mean absolute error",
        "of exact values",
        "bias",
        "mean squared error",
        "within 0.05",
        "top-1",
        "by chance",
        "pairwise",
        "pairwise, strict",
        "error at 0% to 10%",
    ]
    assert f"{reports['half'].mae.value:.3f}" in lines[2]
    table = comparison_table(reports).splitlines()
    assert [line.split()[0] for line in table[1:]] == ["half", "none"]


def test_difference_of_two_errors_is_known_better_than_either(
    tree: TokenTree, states: list[State], exact: GroundTruth
) -> None:
    reports = evaluate_values(
        {
            "biased": lambda some: [tree.value(s.response_ids) ** 2 + 0.01 for s in some],
            "more": lambda some: [tree.value(s.response_ids) ** 2 + 0.03 for s in some],
        },
        states,
        exact,
    )
    gap = mae_difference(reports["biased"], reports["more"])
    a, b = reports["biased"].mae, reports["more"].mae
    assert gap.value == pytest.approx(a.value - b.value)
    assert gap.high - gap.low < a.high - a.low
    other = evaluate_values(
        {"x": lambda some: [0.0] * len(some)}, states[:9], GroundTruth.exact(exact.values[:9])
    )["x"]
    with pytest.raises(InvalidInputError, match="a, b: "):
        mae_difference(reports["more"], other)


# --- intervals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("freedom", "wanted"), [(1, 12.7062047), (2, 4.30265273), (9, 2.26215716), (10**7, 1.95996414)]
)
def test_quantiles_of_student_are_those_of_the_tables(freedom: int, wanted: float) -> None:
    assert t_quantile(0.95, freedom) == pytest.approx(wanted, rel=1e-6)


def test_quantiles_of_student_are_those_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    for level in (0.5, 0.8, 0.99, 0.9999):
        for freedom in (1, 2, 3, 7, 29, 30, 31, 100, 5000):
            assert t_quantile(level, freedom) == pytest.approx(
                stats.t.ppf((1 + level) / 2, freedom), rel=1e-8
            )


def test_bootstrap_has_the_width_of_the_formula() -> None:
    rng = np.random.default_rng(1)
    sizes = rng.integers(1, 9, 60)
    groups = np.repeat(np.arange(60), sizes)
    values = rng.normal(size=60)[groups] + rng.normal(size=len(groups))
    found = mean_interval(values, groups, resamples=4000)
    sums = np.zeros(60)
    np.add.at(sums, groups, values)
    error = linearised_errors(sums[:, None], sizes[:, None].astype(float))[0]
    assert (found.high - found.low) / 2 == pytest.approx(t_quantile(0.95, 59) * error, rel=0.06)
    assert found.value == pytest.approx(values.mean())
    assert (found.n, found.clusters) == (len(values), 60)


def test_intervals_cover_though_states_of_a_prompt_err_together() -> None:
    rng = np.random.default_rng(2)
    groups = np.repeat(np.arange(8), 12)
    covered = {"prompts": 0, "states": 0}
    for _ in range(200):
        values = rng.normal(size=8)[groups] + 0.3 * rng.normal(size=96)
        for name, labels in (("prompts", groups.tolist()), ("states", None)):
            found = mean_interval(values, labels, resamples=200)
            covered[name] += found.low <= 0 <= found.high
    assert 0.91 <= covered["prompts"] / 200 <= 0.99
    assert covered["states"] / 200 < 0.6


def test_states_of_one_prompt_belong_together_unless_told_otherwise(
    tree: TokenTree, exact: GroundTruth
) -> None:
    same_row = [tree.state(node) for node in range(tree.shape.internal)]
    constant = {"half": ConstantValueEstimator(0.5)}
    report = evaluate_values(constant, same_row, exact)["half"]
    assert report.mae.clusters == 1
    assert (report.mae.low, report.mae.high) == (0, math.inf)
    assert (report.within.low, report.within.high) == (0, 1)
    labels = [s.response_ids[:1] for s in same_row]
    assert evaluate_values(constant, same_row, exact, None, labels)["half"].mae.clusters == 4


def test_share_without_a_miss_is_not_certain() -> None:
    truth = GroundTruth.exact(np.zeros(20))
    states = [State(row, (1,)) for row in range(20)]
    report = evaluate_values({"right": lambda _: np.zeros(20)}, states, truth)["right"]
    assert (report.within.value, report.within.high) == (1, 1)
    assert report.within.low == pytest.approx(0.025 ** (1 / 20))  # Clopper and Pearson, 0.832
    report = evaluate_values({"wrong": lambda _: np.ones(20)}, states, truth)["wrong"]
    assert report.within.high == pytest.approx(1 - 0.025 ** (1 / 20))


def test_equal_seeds_give_equal_intervals() -> None:
    values = np.random.default_rng(0).normal(size=30)
    assert mean_interval(values, seed=1) == mean_interval(values, seed=1)
    assert mean_interval(values, seed=1) != mean_interval(values, seed=2)
    assert str(Interval(0.5, 0.25, 0.75, 4, 2)) == "0.500 [0.250, 0.750]"


# --- gradients and curves ---------------------------------------------------------------------


def test_variance_of_batches_tends_to_the_exact_one() -> None:
    rng = np.random.default_rng(0)
    single = rng.normal(size=(200, 5)) * np.arange(1, 6) + 1
    exact = np.trace(np.cov(single.T, bias=True)) / 32
    found = gradient_variance(single, resamples=3000)
    assert found.exact is not None
    assert found.exact.value == pytest.approx(exact, rel=1e-12)
    assert found.variance.value == pytest.approx(exact, rel=0.05)
    assert found.variance.low < exact < found.variance.high
    length = float((single.mean(axis=0) ** 2).sum())
    assert found.signal == pytest.approx(length, rel=0.1)
    as_usual = gradient_variance(single)
    assert as_usual.variance.n == 32
    assert as_usual.variance.value == pytest.approx(exact, rel=0.6)


def test_gradients_of_batches_are_as_good_as_those_of_samples() -> None:
    single = torch.randn(50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    reference = single.mean(dim=0)
    whole = gradient_variance(single, reference=reference, seed=4)
    batches = gradient_variance(
        lambda batch: single[batch].mean(dim=0), samples=50, reference=reference, seed=4
    )
    assert batches.exact is None
    assert batches.variance.value == pytest.approx(whole.variance.value, rel=1e-12)
    assert batches.cosine is not None
    assert whole.cosine is not None
    assert batches.cosine.value == pytest.approx(whole.cosine.value, rel=1e-12)
    assert gradient_variance(np.tile(reference, (4, 1)), reference=reference).cosine == Interval(
        pytest.approx(1), pytest.approx(1), pytest.approx(1), 32, 32
    )


def test_equal_gradients_do_not_vary() -> None:
    found = gradient_variance(np.ones((3, 2)), reference=[1.0, 0.0])
    assert found.exact is not None
    assert found.cosine is not None
    assert found.variance.value == found.exact.value == 0
    assert found.signal == 2
    assert found.cosine.value == pytest.approx(1 / math.sqrt(2))
    nothing = gradient_variance(np.zeros((3, 2)), reference=[1.0, 0.0])
    assert nothing.cosine is not None
    assert nothing.cosine.value == 0


def test_slope_of_a_line_is_found() -> None:
    train = np.linspace(0.3, 0.9, 10)
    curve = train_test_curve(train, 0.2 + 0.5 * train, seed=1)
    assert curve.slope.value == pytest.approx(0.5)
    assert curve.intercept == pytest.approx(0.2)
    assert curve.slope.high - curve.slope.low < 1e-9
    one_run = train_test_curve(train, train, ["a"] * 10)
    assert (one_run.slope.low, one_run.slope.high) == (-math.inf, math.inf)


def test_interval_of_the_slope_covers_it_over_runs() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    runs = np.repeat(np.arange(12), 5).tolist()
    for _ in range(200):
        train = rng.random(60)
        test = 0.4 * train + np.repeat(0.05 * rng.normal(size=12), 5) + 0.05 * rng.normal(size=60)
        slope = train_test_curve(train, test, runs, resamples=200).slope
        covered += slope.low <= 0.4 <= slope.high
    assert 0.88 <= covered / 200 <= 0.99


def test_best_accuracy_within_a_divergence() -> None:
    kl, accuracy = [0.0, 2.0, 1.0, 3.0], [0.1, 0.3, 0.4, 0.5]
    found = best_within(kl, accuracy, [-1.0, 0.0, 1.5, 2.0, 9.0])
    np.testing.assert_array_equal(found, [np.nan, 0.1, 0.4, 0.4, 0.5])


# --- what does not fit ------------------------------------------------------------------------


def _judge(**changes: Any) -> None:
    arguments: dict[str, Any] = {
        "predictors": {"v": lambda some: [0.5] * len(some)},
        "states": [State(0, (1,)), State(1, (1,))],
        "truth": GroundTruth.exact([0.0, 1.0]),
    }
    evaluate_values(**{**arguments, **changes})


_TWO_TOKENS = Episode(0, (1,), (2, 3), finished=True)
_SETS = alternatives(
    TokenTree.random().backend(), [TokenTree.random().state(0)], each_token, params=PARAMS
)


@pytest.mark.parametrize(
    ("name", "act"),
    [
        ("predictors", lambda: _judge(predictors={})),
        (r"predictors\['v'\]", lambda: _judge(predictors={"v": lambda _: [0.5, math.nan]})),
        (r"predictors\['v'\]", lambda: _judge(predictors={"v": lambda _: [0.5]})),
        (r"predictors\['v'\]", lambda: _judge(predictors={"v": lambda _: "many"})),
        (r"predictors\['v'\]", lambda: _judge(predictors={"v": Predictions([1.0])})),
        ("states", lambda: _judge(states=[])),
        ("truth", lambda: _judge(truth=GroundTruth.exact([0.0]))),
        ("positions", lambda: _judge(positions=[0.0])),
        ("positions", lambda: _judge(positions=[0.0, 3.0])),
        ("clusters", lambda: _judge(clusters=[0])),
        ("tolerance", lambda: _judge(tolerance=-0.1)),
        ("bins", lambda: _judge(bins=0)),
        ("level", lambda: _judge(level=1.0)),
        ("resamples", lambda: _judge(resamples=1)),
        ("resolution", lambda: _judge(resolution=-1)),
        ("seed", lambda: _judge(seed=-1)),
        (
            r"predictors\['v'\].candidates",
            lambda: _judge(
                predictors={"v": Predictions([0.5, 0.5])},
                candidates=Candidates(_SETS, GroundTruth.exact(np.zeros(len(states_of(_SETS))))),
            ),
        ),
        ("values", lambda: GroundTruth.exact([math.nan])),
        ("values", lambda: GroundTruth.exact([])),
        ("standard_errors", lambda: GroundTruth([0.0], [-1.0], [4])),
        ("sets", lambda: Candidates([], GroundTruth.exact([0.0]))),
        ("truth", lambda: Candidates(_SETS, GroundTruth.exact([0.0]))),
        ("sizes", lambda: score_sets([0, 1], [0, 1], [3])),
        ("sizes", lambda: score_sets([0, 1], [0, 1], [1, 1])),
        ("standard_errors", lambda: score_sets([0, 1], [0, 1], [2], resolution=1)),
        ("predictions", lambda: calibration([], [])),
        ("truth", lambda: calibration([0.5], [0.5, 0.5])),
        ("bins", lambda: calibration([0.5], [0.5], 0)),
        ("values", lambda: mean_interval([])),
        ("clusters", lambda: mean_interval([1.0], [0, 1])),
        ("gradients", lambda: gradient_variance([1.0, 2.0])),
        ("gradients", lambda: gradient_variance([[math.inf]])),
        ("samples", lambda: gradient_variance(lambda _: [1.0])),
        ("resamples", lambda: gradient_variance([[1.0]], resamples=1)),
        ("reference", lambda: gradient_variance([[1.0]], reference=[0.0])),
        ("reference", lambda: gradient_variance([[1.0]], reference=[1.0, 1.0])),
        ("train", lambda: train_test_curve([0.5, 0.5], [0.1, 0.2])),
        ("test", lambda: train_test_curve([0.5, 0.6], [0.1])),
        ("accuracy", lambda: best_within([1.0], [1.0, 2.0], [0.0])),
        ("episodes", lambda: collect_states([], each_token)),
        ("episodes", lambda: collect_states([Episode(0, (1,), (), finished=False)], each_token)),
        (
            "borders",
            lambda: collect_states([_TWO_TOKENS], lambda _: [0, 1]),
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(name: str, act: Any) -> None:
    with pytest.raises(InvalidInputError, match=f"^{name}: "):
        act()


def test_nothing_is_sampled_for_arguments_that_do_not_fit(
    tree: TokenTree, states: list[State]
) -> None:
    backend = tree.backend()
    for name, act in (
        ("states", lambda: ground_truth(backend, tree.score, [], params=PARAMS)),
        ("rollouts", lambda: ground_truth(backend, tree.score, states, 1, params=PARAMS)),
        ("states", lambda: alternatives(backend, [], each_token, params=PARAMS)),
        ("n", lambda: alternatives(backend, states, each_token, 1, params=PARAMS)),
        ("samples", lambda: alternatives(backend, states, each_token, params=PARAMS, samples=1)),
    ):
        with pytest.raises(InvalidInputError, match=f"^{name}: "):
            act()
    assert backend.usage.requests == 0


def test_importing_diagnostics_loads_nothing_else() -> None:
    code = (
        "import sys, vineppo.diagnostics as d; light = 'torch' not in sys.modules; "
        "d.evaluate_values, d.gradient_variance, d.calibration, d.plots; "
        "heavy = {'matplotlib', 'scipy', 'transformers', 'decapod'} & set(sys.modules); "
        "print(light, callable(d.calibration), sorted(heavy))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "True True []"
