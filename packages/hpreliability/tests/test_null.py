import dataclasses

import numpy as np
import pytest
from scipy import stats

from hpreliability.consistency import Method, thc_statistic
from hpreliability.errors import ShapeError, TooFewValuesError
from hpreliability.null import permutation_null


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def p_values(shape, experiments, permutations, method):
    """Published and tie-randomised p-values of experiments without any effect."""
    rng = np.random.default_rng(2024)
    plain, randomised = [], []
    for seed in range(experiments):
        null = permutation_null(
            rng.normal(size=shape), method, permutations=permutations, seed=seed
        )
        above = (null.samples > null.observed + 1e-9).sum()
        equal = (np.abs(null.samples - null.observed) <= 1e-9).sum()
        plain.append(null.p_value)
        randomised.append((above + rng.random() * (1 + equal)) / (1 + permutations))
    return np.array(plain), np.array(randomised)


@pytest.mark.parametrize(
    ("shape", "method", "experiments"),
    [
        ((7, 5, 26, 1), Method(), 300),
        ((4, 3, 8, 1), Method(ties="symmetric"), 300),
        ((4, 4, 3, 6), Method(interval="t", level=0.8), 300),
        ((3, 4, 3, 3), Method(interval="iqm", resamples=20), 150),
    ],
)
def test_p_values_are_uniform_without_effect(shape, method, experiments):
    # THC is discrete; breaking its ties at random makes an exact test's p-value uniform.
    plain, randomised = p_values(shape, experiments, 59, method)
    assert stats.kstest(randomised, "uniform").pvalue > 0.01
    assert (plain >= randomised).all()


@pytest.mark.parametrize("shape", [(2, 5, 26, 1), (3, 3, 4, 1)])
def test_p_values_never_reject_more_often_than_their_level(shape):
    # Two values can only score 0, 1/2 or 1, so p-values are far from uniform but still valid.
    plain, _ = p_values(shape, 400, 59, Method())
    for level in (0.05, 0.1, 0.2, 0.5):
        noise = 3 * np.sqrt(level * (1 - level) / len(plain))
        assert (plain <= level).mean() <= level + noise


def test_p_value_is_small_when_contexts_disagree():
    means = np.array([[0.0, 9.0], [3.0, 6.0], [6.0, 3.0], [9.0, 0.0]]).repeat(4, axis=1)
    null = permutation_null(means[:, None, :, None] + normal(4, 5, 8, 1), Method())
    assert null.p_value == 1 / 1001
    assert null.calibrated > 0.5


# Section 2.5 of the specification: mean THC of values that do not differ (normal noise, R=5).
NULL_TABLE = [(2, 26, 0.30), (3, 26, 0.22), (4, 26, 0.21), (5, 26, 0.19), (6, 26, 0.18)]
NULL_TABLE += [(7, 26, 0.16), (7, 2, 0.02)]
# And the further cells that the documentation gives.
NULL_TABLE += [(2, 2, 0.02), (3, 2, 0.03), (5, 2, 0.02)]
NULL_TABLE += [(2, 8, 0.10), (3, 8, 0.09), (5, 8, 0.07), (7, 8, 0.06)]


@pytest.mark.parametrize(("n_values", "n_contexts", "expected"), NULL_TABLE)
def test_mean_score_without_effect_is_that_of_the_table(n_values, n_contexts, expected):
    scores = normal(2500, n_values, 5, n_contexts, 1, seed=7)
    assert thc_statistic(scores, Method()).mean() == pytest.approx(expected, abs=0.02)


def test_permutation_null_averages_what_fresh_experiments_average():
    nulls = [
        permutation_null(normal(7, 5, 26, 1, seed=s), Method(), permutations=50, seed=s).mean
        for s in range(60)
    ]
    assert np.mean(nulls) == pytest.approx(0.16, abs=0.02)


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_result_does_not_depend_on_the_chunk_size(chunk):
    scores = normal(4, 5, 6, 2)
    scores[1, 3:, 2] = np.nan
    whole = permutation_null(scores, Method(), permutations=40, seed=3)
    parts = permutation_null(scores, Method(), permutations=40, seed=3, chunk=chunk)
    np.testing.assert_array_equal(whole.samples, parts.samples)


def test_absent_runs_stay_absent_and_no_run_is_lost():
    seen = []

    class Spy(Method):
        def intervals(self, scores):
            seen.append(scores)
            return super().intervals(scores)

    scores = normal(3, 4, 5, 2)
    scores[0, 2:, 1] = np.nan
    scores[2, 0, 4] = np.nan
    permutation_null(scores, Spy(interval="iqm", resamples=2), permutations=20)
    (observed, shuffled) = seen
    np.testing.assert_array_equal(
        np.isnan(shuffled), np.broadcast_to(np.isnan(scores), shuffled.shape)
    )
    # Runs move whole: within a context the same pairs of task scores, dealt differently.
    for copy in shuffled:
        for context in range(5):
            before = observed[:, :, context].reshape(-1, 2)
            after = copy[:, :, context].reshape(-1, 2)
            np.testing.assert_array_equal(
                before[np.argsort(before[:, 0])], after[np.argsort(after[:, 0])]
            )
    assert len({copy.tobytes() for copy in shuffled}) == 20


def test_same_seed_repeats_and_another_differs():
    scores = normal(4, 5, 6, 1)
    first, again, other = (permutation_null(scores, Method(), seed=s) for s in (1, 1, 2))
    np.testing.assert_array_equal(first.samples, again.samples)
    assert (first.samples != other.samples).any()


def test_calibrated_is_0_at_the_null_mean_and_1_at_the_top():
    swap = np.array([[0.0, 9.0], [9.0, 0.0]])[:, None, :, None] + 0.01 * normal(2, 5, 2, 1)
    null = permutation_null(swap, Method())
    assert null.observed == 1
    assert null.calibrated == 1
    steady = permutation_null(np.arange(4.0)[:, None, None, None] + 0 * swap[:1], Method())
    assert steady.calibrated <= 0


def test_null_that_is_always_1_calibrates_to_0():
    # One run per cell has no spread: each shuffle of enough contexts sends both values everywhere.
    scores = np.arange(80.0).reshape(2, 1, 40, 1)
    scores[:, :, ::2] *= -1
    null = permutation_null(scores, Method(), permutations=50)
    assert null.mean == 1
    assert null.calibrated == 0


def test_bootstrap_intervals_use_fewer_resamples_for_data_and_null_alike():
    scores = normal(3, 5, 2, 4)
    null = permutation_null(scores, Method(interval="iqm"), permutations=3, inner_resamples=50)
    method = Method(interval="iqm", resamples=50)
    assert null.observed == thc_statistic(scores, method)


@pytest.mark.parametrize("name", ["permutations", "inner_resamples", "chunk"])
def test_numbers_out_of_range_are_refused(name):
    with pytest.raises(ValueError, match=name):
        permutation_null(normal(3, 5, 2, 1), Method(), **{name: 0})


def test_scores_without_the_axis_of_tasks_are_refused():
    with pytest.raises(ShapeError, match=r"\(3, 5, 2\)"):
        permutation_null(normal(3, 5, 2), Method())


def test_single_value_is_refused():
    with pytest.raises(TooFewValuesError):
        permutation_null(normal(1, 5, 2, 1), Method())


def test_null_is_immutable():
    null = permutation_null(normal(2, 5, 2, 1), Method(), permutations=2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        null.mean = 0.0
