import numpy as np
import pytest

from hpreliability.consistency import Method, thc_statistic
from hpreliability.errors import ShapeError, TooFewRunsError
from hpreliability.uncertainty import BiasedIntervalWarning, context_influence, thc_interval

NO_EFFECT = (7, 5, 26, 1)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def coverage(how, means, n_runs, *, experiments=200, ties="paper", replicates=200):
    """Share of experiments whose interval holds the expected THC of their design."""
    method = Method(ties=ties)
    means = np.asarray(means)[:, None, :, None]
    shape = (means.shape[0], n_runs, means.shape[2], 1)
    rng = np.random.default_rng(11)
    expected = np.mean(
        [thc_statistic(means + rng.normal(size=(200, *shape)), method).mean() for _ in range(10)]
    )
    hits = 0
    for seed in range(experiments):
        drawn = thc_interval(
            means + rng.normal(size=shape), method, how=how, replicates=replicates, seed=seed
        )
        hits += drawn.low <= expected <= drawn.high
    return hits / experiments


@pytest.mark.parametrize("how", ["bootstrap", "jackknife"])
def test_intervals_cover_the_expected_score_without_effect(how):
    # The advertised claim: 95 % intervals cover in at least 90 % of 200 no-effect experiments.
    assert coverage(how, np.zeros((7, 26)), 5) >= 0.9


@pytest.mark.parametrize("ties", ["paper", "symmetric"])
@pytest.mark.parametrize("n_runs", [3, 5])
def test_bootstrap_intervals_cover_where_contexts_disagree(ties, n_runs):
    means = np.arange(4)[:, None] + normal(4, 8, seed=3)
    assert coverage("bootstrap", means, n_runs, ties=ties) >= 0.9


def test_bootstrap_intervals_cover_where_the_ranking_is_steady():
    assert coverage("bootstrap", 4.0 * np.arange(7)[:, None].repeat(8, axis=1), 5) >= 0.9


@pytest.mark.filterwarnings("ignore::hpreliability.uncertainty.BiasedIntervalWarning")
def test_percentile_intervals_fail_to_cover():
    # Why they are only offered on request: replicates of noise score .46 where THC averages .16,
    # so an interval made of replicates lies above what it should cover.
    assert coverage("percentile", np.zeros((7, 26)), 5, experiments=60) < 0.1
    drawn = thc_interval(normal(*NO_EFFECT), Method(), how="percentile", replicates=500)
    assert drawn.low > drawn.observed


def test_percentile_intervals_warn():
    with pytest.warns(BiasedIntervalWarning, match="bootstrap"):
        thc_interval(normal(3, 5, 4, 1), Method(), how="percentile", replicates=10)


@pytest.mark.parametrize("how", ["bootstrap", "jackknife"])
def test_interval_holds_the_score_and_stays_in_range(how):
    for seed in range(20):
        scores = normal(3, 4, 5, 1, seed=seed)
        drawn = thc_interval(scores, Method(), how=how, replicates=50)
        assert 0 <= drawn.low <= drawn.observed <= drawn.high <= 1
        assert drawn.observed == thc_statistic(scores, Method())
        assert drawn.method == how


def test_score_that_never_moves_keeps_half_a_step_on_each_side():
    steady = 1e6 * np.arange(3.0)[:, None, None, None] + normal(3, 5, 4, 1)
    drawn = thc_interval(steady, Method(), replicates=50)
    assert (drawn.standard_error, drawn.low) == (0, 0)
    assert drawn.high == pytest.approx(1 / 12)


def test_bootstrap_standard_error_is_that_of_repeated_experiments():
    spread = thc_statistic(normal(2000, *NO_EFFECT), Method()).std()
    errors = [
        thc_interval(normal(*NO_EFFECT, seed=s), Method(), replicates=200).standard_error
        for s in range(40)
    ]
    assert np.mean(errors) == pytest.approx(spread, rel=0.25)


def test_jackknife_error_is_that_of_the_textbook():
    scores = normal(4, 5, 6, 1, seed=5)
    parts = [thc_statistic(np.delete(scores, r, axis=1), Method()) for r in range(5)]
    by_hand = np.sqrt(4 / 5 * np.sum((np.array(parts) - np.mean(parts)) ** 2))
    assert by_hand > 0
    drawn = thc_interval(scores, Method(), how="jackknife")
    assert drawn.standard_error == pytest.approx(by_hand)


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_result_does_not_depend_on_the_chunk_size(chunk):
    scores = normal(4, 5, 6, 2)
    scores[1, 3:, 2] = np.nan
    for interval in ("mean_std", "iqm"):
        method = Method(interval=interval, resamples=20)
        whole = thc_interval(scores, method, replicates=30, seed=3)
        assert thc_interval(scores, method, replicates=30, seed=3, chunk=chunk) == whole


def test_absent_runs_change_nothing_but_the_random_draws():
    scores = normal(4, 5, 6, 1, seed=1)
    padded = np.concatenate([np.full((4, 2, 6, 1), np.nan), scores], axis=1)
    plain = thc_interval(scores, Method(), replicates=4000)
    with_gaps = thc_interval(padded, Method(), replicates=4000)
    assert with_gaps.observed == pytest.approx(plain.observed)
    assert with_gaps.standard_error == pytest.approx(plain.standard_error, rel=0.1)


def test_pooled_tasks_are_accepted_with_bootstrap_intervals():
    drawn = thc_interval(
        normal(3, 4, 2, 3), Method(interval="iqm"), replicates=20, inner_resamples=30
    )
    assert 0 <= drawn.low <= drawn.high <= 1


@pytest.mark.parametrize(
    ("scores", "how", "error"),
    [
        (np.zeros((2, 1, 2, 1)), "bootstrap", TooFewRunsError),
        (np.zeros((2, 2, 2, 1)), "jackknife", TooFewRunsError),
        (
            np.where(np.arange(4)[:, None, None] > 2, np.nan, np.zeros((2, 4, 2, 1))),
            "jackknife",
            ShapeError,
        ),
        (np.zeros((2, 3, 2)), "bootstrap", ShapeError),
        (np.zeros((2, 3, 2, 1)), "basic", ValueError),
    ],
)
def test_designs_without_an_interval_are_refused(scores, how, error):
    with pytest.raises(error):
        thc_interval(scores, Method(), how=how)


@pytest.mark.parametrize(
    "options", [{"level": 1.0}, {"replicates": 1}, {"inner_resamples": 0}, {"chunk": 0}]
)
def test_numbers_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        thc_interval(normal(2, 3, 2, 1), Method(), **options)


def test_influence_is_what_the_score_loses_without_a_context():
    scores = normal(4, 5, 6, 1, seed=2)
    influence = context_influence(scores, Method())
    whole = thc_statistic(scores, Method())
    for context in range(6):
        without = thc_statistic(np.delete(scores, context, axis=2), Method())
        assert influence[context] == pytest.approx(whole - without, abs=1e-12)
    assert (influence >= 0).all()


def test_only_the_odd_context_has_influence():
    means = np.arange(3.0)[:, None].repeat(5, axis=1)
    means[:, 3] = means[::-1, 3]
    scores = means[:, None, :, None] + 1e-3 * normal(3, 4, 5, 1)
    influence = context_influence(scores, Method())
    assert influence[3] == pytest.approx(2 / 3)
    np.testing.assert_array_equal(np.delete(influence, 3), 0)


def test_influence_of_a_single_context_is_refused():
    with pytest.raises(ShapeError):
        context_influence(normal(2, 3, 1, 1), Method())
