import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hpreliability.consistency import Method, rank_spread, thc_statistic
from hpreliability.errors import TooFewValuesError

METHODS = [Method(), Method(ties="symmetric")]


@st.composite
def scores(draw, values=(2, 5), contexts=(1, 5)):
    """Integer scores (V, R, C, 1), with frequent ties."""
    shape = (draw(st.integers(*values)), draw(st.integers(2, 4)), draw(st.integers(*contexts)), 1)
    return draw(hnp.arrays(np.float64, shape, elements=st.integers(-20, 20)))


def distinct(shape, seed):
    """Scores without equal bounds, on which the order of values cannot matter."""
    return np.random.default_rng(seed).normal(size=shape)


def separated(means):
    """Runs (V, 3, C, 1) with tiny spread around means (V, C): disjoint intervals."""
    means = np.asarray(means, dtype=float)
    return means[:, None, :, None] + 1e-3 * np.arange(3)[:, None, None]


@pytest.mark.parametrize("method", METHODS)
def test_score_is_0_when_ranks_never_change(method):
    means = np.arange(4)[:, None] + np.array([0.0, 50.0, -3.0])
    assert thc_statistic(separated(means), method) == 0


@pytest.mark.parametrize("method", METHODS)
def test_score_is_1_when_two_values_swap(method):
    assert thc_statistic(separated([[0, 1], [1, 0]]), method) == 1


@pytest.mark.parametrize("method", METHODS)
def test_score_of_a_single_context_is_0(method):
    assert thc_statistic(distinct((4, 5, 1, 1), 0), method) == 0


@pytest.mark.parametrize("method", METHODS)
@given(data=scores())
def test_score_is_between_0_and_1(method, data):
    assert 0 <= thc_statistic(data, method) <= 1


@pytest.mark.parametrize("method", METHODS)
@given(data=scores(values=(2, 2)))
def test_two_values_can_only_score_0_half_or_1(method, data):
    assert thc_statistic(data, method) in (0, 0.5, 1)


@pytest.mark.parametrize("method", METHODS)
@given(data=scores(contexts=(2, 6)))
def test_adding_a_context_never_lowers_the_score(method, data):
    fewer = thc_statistic(data[:, :, :-1], method)
    assert thc_statistic(data, method) >= fewer - 1e-12


@pytest.mark.parametrize("method", METHODS)
@given(seed=st.integers(0, 10_000))
def test_order_of_values_contexts_and_runs_is_irrelevant(method, seed):
    rng = np.random.default_rng(seed)
    data = distinct((5, 4, 3, 1), seed)
    shuffled = data[rng.permutation(5)][:, rng.permutation(4)][:, :, rng.permutation(3)]
    assert thc_statistic(shuffled, method) == pytest.approx(thc_statistic(data, method), abs=1e-12)


@pytest.mark.parametrize("method", METHODS)
@given(seed=st.integers(0, 10_000))
def test_increasing_affine_map_per_context_leaves_the_score(method, seed):
    rng = np.random.default_rng(seed)
    data = distinct((4, 5, 6, 1), seed)
    slope = rng.uniform(0.1, 100, size=(6, 1))
    offset = rng.normal(scale=100, size=(6, 1))
    mapped = thc_statistic(slope * data + offset, method)
    assert mapped == pytest.approx(thc_statistic(data, method), abs=1e-12)


def test_monotone_map_that_is_not_affine_can_change_the_score():
    # Mean ± std are not equivariant under such maps, so the scale of the scores matters.
    data = distinct((5, 5, 8, 1), 1)
    assert thc_statistic(np.exp(3 * data), Method()) != thc_statistic(data, Method())


@given(seed=st.integers(0, 10_000))
def test_symmetric_score_is_unchanged_by_negating_all_scores(seed):
    data = distinct((5, 4, 6, 1), seed)
    method = Method(ties="symmetric")
    assert thc_statistic(-data, method) == pytest.approx(thc_statistic(data, method), abs=1e-12)


def test_paper_score_can_change_when_scores_are_negated():
    data = distinct((6, 5, 8, 1), 1)
    assert thc_statistic(-data, Method()) != thc_statistic(data, Method())


def test_batch_of_experiments_equals_each_alone():
    data = distinct((20, 4, 5, 6, 1), 3)
    each = [thc_statistic(one, Method()) for one in data]
    np.testing.assert_array_equal(thc_statistic(data, Method()), each)


def test_spread_is_the_range_of_ranks_as_a_share_of_the_ranking():
    ranks = np.array([[1.0, 3.0, 2.0], [2.0, 2.0, 2.0], [3.0, 1.0, 2.5]])
    np.testing.assert_array_equal(rank_spread(ranks), [1, 0, 1])


def test_single_value_is_refused():
    with pytest.raises(TooFewValuesError, match="got 1"):
        rank_spread(np.ones((1, 4)))


def test_mean_based_intervals_depend_on_run_averages_alone():
    data = distinct((3, 4, 2, 5), 0)
    method = Method()
    for whole, reduced in zip(
        method.intervals(data), method.intervals(method.relevant(data)), strict=True
    ):
        np.testing.assert_allclose(whole, reduced)
    assert Method(interval="iqm").relevant(data) is data
