import numpy as np
import pytest
from scipy import stats

from hpreliability.errors import ShapeError, TooFewRunsError
from hpreliability.intervals import score_intervals

MEAN_BASED = ["mean_std", "mean_sem", "t"]
RESAMPLED = ["mean", "median", "iqm"]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def test_mean_std_uses_the_population_standard_deviation():
    scores = normal(3, 5, 2, 1)
    lo, hi = score_intervals(scores)
    np.testing.assert_allclose(lo, (scores.mean(1) - scores.std(1, ddof=0))[..., 0])
    np.testing.assert_allclose(hi, (scores.mean(1) + scores.std(1, ddof=0))[..., 0])


def test_standard_error_and_student_intervals_agree_with_scipy():
    scores = normal(1, 6, 1, 1)
    cell = scores.ravel()
    lo, hi = score_intervals(scores, "mean_sem")
    np.testing.assert_allclose(hi - lo, 2 * stats.sem(cell))
    lo, hi = score_intervals(scores, "t", level=0.9)
    expected = stats.t.interval(0.9, 5, loc=cell.mean(), scale=stats.sem(cell))
    np.testing.assert_allclose([lo.item(), hi.item()], expected)


@pytest.mark.parametrize("method", MEAN_BASED)
def test_absent_runs_change_nothing(method):
    scores = normal(2, 4, 3, 2)
    padded = np.concatenate([np.full((2, 2, 3, 2), np.nan), scores], axis=1)
    for plain, with_gaps in zip(
        score_intervals(scores, method), score_intervals(padded, method), strict=True
    ):
        np.testing.assert_allclose(plain, with_gaps, rtol=1e-12)


@pytest.mark.parametrize("method", MEAN_BASED + RESAMPLED)
def test_intervals_scale_with_increasing_affine_maps(method):
    scores = normal(2, 5, 2, 3)
    original = score_intervals(scores, method, resamples=200)
    mapped = score_intervals(3 * scores - 7, method, resamples=200)
    for before, after in zip(original, mapped, strict=True):
        np.testing.assert_allclose(after, 3 * before - 7)


@pytest.mark.parametrize("method", RESAMPLED)
def test_bootstrap_interval_of_a_cell_does_not_depend_on_the_others(method):
    scores = normal(3, 5, 2, 4)
    together = score_intervals(scores, method, resamples=300)
    alone = score_intervals(scores[1:2, :, 1:2], method, resamples=300)
    for all_cells, one_cell in zip(together, alone, strict=True):
        np.testing.assert_array_equal(all_cells[1:2, 1:2], one_cell)


@pytest.mark.parametrize("method", RESAMPLED)
def test_bootstrap_intervals_survive_absent_runs(method):
    scores = normal(2, 4, 1, 3)
    padded = np.insert(scores, 1, np.nan, axis=1)
    for plain, with_gaps in zip(
        score_intervals(scores, method, resamples=200),
        score_intervals(padded, method, resamples=200),
        strict=True,
    ):
        np.testing.assert_array_equal(plain, with_gaps)


@pytest.mark.parametrize(
    ("method", "statistic"),
    [
        ("mean", lambda x, axis: x.mean(axis=axis)),
        ("median", lambda x, axis: np.median(x, axis=axis)),
        ("iqm", lambda x, axis: stats.trim_mean(x, 0.25, axis=axis)),
    ],
)
def test_bootstrap_intervals_agree_with_scipy(method, statistic):
    # Both are Monte Carlo: 20,000 replicates put the bounds within a few hundredths of a deviation.
    cell = normal(30, seed=4)
    lo, hi = score_intervals(cell[None, :, None, None], method, resamples=20_000)
    reference = stats.bootstrap(
        (cell,), statistic, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    np.testing.assert_allclose([lo.item(), hi.item()], reference, atol=0.03)


def test_bootstrap_resamples_each_task_by_itself():
    # Task 0 is always 0 and task 1 always 10; resampling across tasks would mix them.
    scores = np.tile([0.0, 10.0], (5, 1))[None, :, None, :]
    lo, hi = score_intervals(scores, "mean", resamples=100)
    assert (lo.item(), hi.item()) == (5, 5)


@pytest.mark.parametrize(
    ("scores", "method", "error"),
    [
        (np.zeros((2, 3, 2)), "mean_std", ShapeError),
        (np.full((2, 3, 2, 1), np.nan), "mean_std", TooFewRunsError),
        (np.zeros((2, 1, 2, 1)), "t", TooFewRunsError),
        (np.array([0.0, np.nan]).reshape(1, 1, 1, 2), "iqm", ShapeError),
        (np.zeros((2, 3, 2, 1)), "range", ValueError),
    ],
)
def test_input_without_an_interval_is_refused(scores, method, error):
    with pytest.raises(error):
        score_intervals(scores, method)


@pytest.mark.parametrize("options", [{"level": 1.0}, {"level": 0.0}, {"resamples": 0}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        score_intervals(np.zeros((2, 3, 2, 1)), "mean", **options)
