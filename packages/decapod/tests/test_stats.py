from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from decapod.stats import aggregate, difference, iqm, probability_of_improvement

SCORES = arrays(
    np.float64,
    st.tuples(st.integers(2, 6), st.integers(1, 4)),
    elements=st.integers(-50, 50).map(float),
)


def test_iqm_is_the_mean_of_what_is_left_without_the_outer_quarters():
    assert iqm([1, 2, 3, 4, 5, 6, 7, 1000]) == pytest.approx(4.5)
    assert iqm([[5.0, 1.0], [3.0, -9.0]]) == pytest.approx(2.0)


def test_interval_of_a_mean_of_one_task_is_students_t_interval():
    x = np.array([0.3, 1.1, 0.7, 2.0, 1.4])
    estimate = aggregate(x, "mean", resamples=40_000)
    low, high = scipy.stats.t.interval(0.95, 4, x.mean(), scipy.stats.sem(x))
    assert estimate.value == pytest.approx(1.1)
    assert (estimate.low, estimate.high) == pytest.approx((low, high), rel=0.02)


@pytest.mark.parametrize(("runs", "tasks"), [(3, 1), (5, 1), (5, 6)])
@pytest.mark.parametrize("statistic", ["mean", "iqm", "median"])
def test_advertised_95_percent_covers_in_simulated_experiments(runs, tasks, statistic):
    rng = np.random.default_rng(20)
    offsets = np.arange(tasks) * 0.0
    covered = 0
    for i in range(200):
        x = rng.normal(size=(runs, tasks)) + offsets
        estimate = aggregate(x, statistic, resamples=200, seed=i)
        covered += estimate.low <= 0 <= estimate.high
    assert covered >= 180


@pytest.mark.parametrize("paired", [True, False])
def test_interval_of_a_difference_covers_where_one_arm_is_far_noisier(paired):
    rng = np.random.default_rng(21)
    covered = 0
    for i in range(200):
        shared = rng.normal(size=(5, 2)) if paired else 0.0
        a = shared + rng.normal(size=(5, 2))
        b = shared + 4 * rng.normal(size=(5, 2))
        estimate = difference(a, b, "mean", paired=paired, resamples=200, seed=i)
        covered += estimate.low <= 0 <= estimate.high
    assert covered >= 180


@pytest.mark.parametrize("shift", [0.0, 1.0, 2.5])
def test_interval_of_the_probability_of_improvement_covers_up_to_the_edge(shift):
    rng = np.random.default_rng(22)
    truth = scipy.stats.norm.cdf(shift / np.sqrt(2))
    covered = 0
    for _ in range(200):
        estimate = probability_of_improvement(rng.normal(shift, 1, 5), rng.normal(0, 1, 5))
        covered += estimate.low <= truth <= estimate.high
    assert covered >= 180


def test_pairing_takes_out_the_noise_that_runs_share():
    rng = np.random.default_rng(3)
    shared = 10 * rng.normal(size=(6, 2))
    a, b = shared + 1 + 0.1 * rng.normal(size=(6, 2)), shared + 0.1 * rng.normal(size=(6, 2))
    together, apart = difference(a, b, paired=True), difference(a, b, paired=False)
    assert together.value == apart.value
    assert together.low > 0 > apart.low


@settings(deadline=None, max_examples=40)
@given(SCORES, st.integers(1, 5), st.integers(-9, 9))
def test_aggregate_follows_a_change_of_unit(x, scale, shift):
    plain = aggregate(x, resamples=100)
    changed = aggregate(scale * x + shift, resamples=100)
    expected = [scale * v + shift for v in (plain.value, plain.low, plain.high)]
    assert [changed.value, changed.low, changed.high] == pytest.approx(expected, abs=1e-8)


@settings(deadline=None, max_examples=40)
@given(SCORES)
def test_swapping_paired_arms_mirrors_the_difference(x):
    y = np.roll(x, 1, axis=0) + 1
    forth = difference(x, y, paired=True, resamples=100)
    back = difference(y, x, paired=True, resamples=100)
    assert (back.value, back.low, back.high) == pytest.approx(
        (-forth.value, -forth.high, -forth.low), abs=1e-9
    )


@settings(deadline=None, max_examples=40)
@given(SCORES)
def test_chances_of_either_arm_to_win_sum_to_one(x):
    y = x[::-1, :] + 1
    forth, back = probability_of_improvement(x, y), probability_of_improvement(y, x)
    assert forth.value + back.value == pytest.approx(1)
    assert forth.low + back.high == pytest.approx(1, abs=1e-6)
    assert 0 <= forth.low <= forth.value <= forth.high <= 1


def test_probability_of_improvement_counts_wins_and_half_the_ties():
    a, b = np.array([[1.0, 5.0], [2.0, 5.0]]), np.array([[1.0, 0.0], [0.0, 9.0], [2.0, 5.0]])
    wins = [(x > y) + 0.5 * (x == y) for t in (0, 1) for x in a[:, t] for y in b[:, t]]
    assert probability_of_improvement(a, b).value == pytest.approx(np.mean(wins))


def test_three_wins_out_of_three_do_not_look_certain():
    estimate = probability_of_improvement([3, 4, 5], [0, 1, 2])
    assert estimate.value == estimate.high == 1
    assert 0.3 < estimate.low < 0.7


def test_one_run_bounds_nothing():
    estimate = aggregate([[1.0, 3.0]], "mean")
    assert estimate.value == 2
    assert (estimate.low, estimate.high) == (-np.inf, np.inf)


def test_same_seed_gives_the_same_interval_and_a_function_may_be_the_statistic():
    x = np.random.default_rng(0).normal(size=(5, 3))
    assert aggregate(x, seed=4) == aggregate(x, seed=4)
    assert aggregate(x, "mean") == aggregate(x, lambda s: s.mean(axis=(-2, -1)))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: aggregate([[1.0, np.nan], [0.0, 1.0]]), ["scores", "run 0, task 1"]),
        (lambda: aggregate([[1.0, 2.0], [1.0]]), ["scores", "(runs, tasks)"]),
        (lambda: aggregate([]), ["scores", "(0,)"]),
        (lambda: aggregate([1.0, 2.0], "iqr"), ["statistic", "iqm", "'iqr'"]),
        (lambda: aggregate([1.0, 2.0], level=95), ["level", "95"]),
        (lambda: aggregate([1.0, 2.0], resamples=5), ["resamples", "5"]),
        (lambda: difference([[1.0], [2.0]], [[1.0, 2.0]], paired=False), ["same tasks", "1 and 2"]),
        (lambda: difference([1.0, 2.0], [1.0], paired=True), ["same runs", "2 and 1"]),
    ],
)
def test_bad_input_is_refused_with_what_was_expected_and_got(call, words):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the words are checked below
        call()
    for word in words:
        assert word in str(caught.value)
