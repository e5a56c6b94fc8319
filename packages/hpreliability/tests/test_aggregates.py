import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from hpreliability.aggregates import (
    iqm,
    mean,
    median,
    optimality_gap,
    performance_profile,
    probability_of_improvement,
    stratified_bootstrap,
)
from hpreliability.errors import NonFiniteScoreError, ShapeError

SCORES = hnp.arrays(
    np.float64, st.tuples(st.integers(1, 6), st.integers(1, 6)), elements=st.integers(-9, 9)
)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


@given(SCORES)
def test_iqm_is_scipys_trimmed_mean_of_the_pooled_scores(scores):
    assert iqm(scores) == pytest.approx(stats.trim_mean(scores.ravel(), 0.25))


def test_median_is_over_task_means_and_mean_over_everything():
    scores = np.array([[0.0, 10.0, 2.0], [4.0, 30.0, 4.0]])
    assert median(scores) == 3
    assert mean(scores) == pytest.approx(50 / 6)


def test_optimality_gap_ignores_what_exceeds_the_target():
    assert optimality_gap(np.array([[0.5, 3.0], [1.0, -0.5]])) == pytest.approx(0.5)


@pytest.mark.parametrize("statistic", [iqm, mean, median, optimality_gap])
def test_leading_axes_are_batches(statistic):
    scores = normal(3, 5, 4)
    np.testing.assert_allclose(statistic(scores), [statistic(one) for one in scores])


@pytest.mark.parametrize("statistic", [iqm, mean, median, optimality_gap])
@pytest.mark.parametrize("chunk", [1, 7, 5000])
def test_bootstrap_is_reproducible_and_independent_of_the_chunk_size(statistic, chunk):
    scores = normal(5, 6)
    whole = stratified_bootstrap(scores, statistic, replicates=100, seed=4)
    assert stratified_bootstrap(scores, statistic, replicates=100, seed=4, chunk=chunk) == whole
    assert stratified_bootstrap(scores, statistic, replicates=100, seed=5) != whole


def test_bootstrap_resamples_runs_within_tasks_only():
    scores = np.tile(np.arange(6.0), (4, 1))
    drawn = stratified_bootstrap(scores, mean, replicates=50)
    assert (drawn.low, drawn.value, drawn.high) == (2.5, 2.5, 2.5)


@pytest.mark.parametrize("statistic", [iqm, mean])
def test_bootstrap_intervals_cover_the_truth(statistic):
    # 20 runs of 5 tasks with the same symmetric noise: the truth is 0 for both statistics.
    rng = np.random.default_rng(6)
    hits = 0
    for seed in range(300):
        drawn = stratified_bootstrap(rng.normal(size=(20, 5)), statistic, replicates=300, seed=seed)
        hits += drawn.low <= 0 <= drawn.high
    assert 0.9 <= hits / 300 <= 0.98


@given(SCORES)
def test_profile_falls_from_1_to_0(scores):
    profile = performance_profile(scores, np.arange(-10, 11))
    assert (profile[0], profile[-1]) == (1, 0)
    assert (np.diff(profile) <= 0).all()


def test_profile_counts_runs_strictly_above():
    np.testing.assert_array_equal(
        performance_profile(np.array([[0.0, 1.0], [1.0, 2.0]]), [0, 1, 2]), [0.75, 0.25, 0]
    )


@given(st.integers(0, 1000))
def test_probability_of_improvement_is_scipys_mann_whitney_statistic(seed):
    rng = np.random.default_rng(seed)
    first, second = rng.integers(0, 4, (5, 3)), rng.integers(0, 4, (7, 3))
    per_task = stats.mannwhitneyu(first, second, axis=0).statistic / 35
    assert probability_of_improvement(first, second) == pytest.approx(per_task.mean())
    assert probability_of_improvement(first, second) == pytest.approx(
        1 - probability_of_improvement(second, first)
    )


def test_nan_is_refused_with_the_count():
    with pytest.raises(NonFiniteScoreError, match="1 of 4"):
        iqm(np.array([[0.0, np.nan], [1.0, 2.0]]))


def test_wrong_shapes_are_refused():
    with pytest.raises(ShapeError):
        iqm(np.zeros(3))
    with pytest.raises(ShapeError):
        stratified_bootstrap(np.zeros((2, 3, 4)))
    with pytest.raises(ShapeError):
        probability_of_improvement(np.zeros((2, 3)), np.zeros((2, 4)))
    with pytest.raises(ShapeError):
        performance_profile(np.zeros((2, 3)), 0.5)


@pytest.mark.parametrize("options", [{"level": 1.5}, {"replicates": 0}, {"chunk": 0}])
def test_numbers_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        stratified_bootstrap(np.zeros((2, 3)), **options)
