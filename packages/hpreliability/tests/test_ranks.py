import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hpreliability.errors import NonFiniteScoreError, ShapeError
from hpreliability.ranks import interval_ranks

TIES = ["paper", "symmetric"]


def naive_scan(lo, hi):
    """The paper's rule, one position at a time."""
    n = len(hi)
    order = sorted(range(n), key=lambda v: -hi[v])  # stable: equal hi keep their input order
    ranks = np.empty(n)
    for position, value in enumerate(order):
        first = position
        for earlier in range(position):
            if lo[order[earlier]] <= hi[value]:
                first = earlier
                break
        last = position
        while last + 1 < n and hi[order[last + 1]] >= lo[value]:
            last += 1
        ranks[value] = (first + 1 + last + 1) / 2
    return ranks


def naive_symmetric(lo, hi):
    n = len(hi)
    best = [1 + sum(lo[j] > hi[i] for j in range(n)) for i in range(n)]
    worst = [n - sum(hi[j] < lo[i] for j in range(n)) for i in range(n)]
    return (np.array(best) + np.array(worst)) / 2


@st.composite
def intervals(draw, values=(1, 8)):
    """Integer bounds, so that overlaps, touches and equal bounds are frequent."""
    size = draw(st.integers(*values))
    lo = draw(hnp.arrays(np.float64, size, elements=st.integers(-150, -130) | st.integers(0, 8)))
    width = draw(hnp.arrays(np.float64, size, elements=st.integers(0, 5)))
    return lo, lo + width


# Golden examples of the specification: intervals, ranks under the paper's scan, symmetric ranks.
GOLDEN = [
    ([(5, 7), (3, 5), (1, 3)], [1.5, 2, 2.5], [1.5, 2, 2.5]),
    ([(8, 10), (7, 9), (0, 2)], [1.5, 1.5, 3], [1.5, 1.5, 3]),
    ([(0, 10), (6, 8), (1, 2)], [2, 1.5, 2], [2, 1.5, 2.5]),
]


@pytest.mark.parametrize(("bounds", "paper", "symmetric"), GOLDEN)
def test_golden_examples(bounds, paper, symmetric):
    lo, hi = np.array(bounds, dtype=float).T
    np.testing.assert_array_equal(interval_ranks(lo, hi, "paper"), paper)
    np.testing.assert_array_equal(interval_ranks(lo, hi, "symmetric"), symmetric)


@pytest.mark.parametrize("ties", TIES)
@given(order=st.permutations(range(6)))
def test_disjoint_intervals_rank_by_location(ties, order):
    lo = 10.0 * np.array(order)
    np.testing.assert_array_equal(interval_ranks(lo, lo + 1, ties), 6 - np.array(order))


@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("n_values", [1, 2, 5, 40])
def test_equal_intervals_all_take_the_middle_rank(ties, n_values):
    lo = np.zeros(n_values)
    np.testing.assert_array_equal(
        interval_ranks(lo, lo + 1, ties), np.full(n_values, (n_values + 1) / 2)
    )


@given(intervals())
def test_paper_ranks_equal_the_scan(bounds):
    np.testing.assert_array_equal(interval_ranks(*bounds, "paper"), naive_scan(*bounds))


@given(intervals())
def test_symmetric_ranks_equal_their_definition(bounds):
    np.testing.assert_array_equal(interval_ranks(*bounds, "symmetric"), naive_symmetric(*bounds))


@given(intervals())
def test_symmetric_ranks_mirror_when_scores_are_negated(bounds):
    lo, hi = bounds
    mirrored = len(lo) + 1 - interval_ranks(-hi, -lo, "symmetric")
    np.testing.assert_array_equal(interval_ranks(lo, hi, "symmetric"), mirrored)


def test_paper_ranks_do_not_mirror_when_scores_are_negated():
    lo, hi = np.array([0.0, 6, 1]), np.array([10.0, 8, 2])
    assert (interval_ranks(lo, hi) != 4 - interval_ranks(-hi, -lo)).any()


@pytest.mark.parametrize("ties", TIES)
@given(data=st.data())
def test_order_of_values_is_irrelevant_when_upper_bounds_differ(ties, data):
    # Equal upper bounds keep the input's order in the paper's scan, so they are excluded here.
    size = data.draw(st.integers(2, 8))
    top = st.lists(st.integers(0, 20), min_size=size, max_size=size, unique=True)
    hi = np.array(data.draw(top), float)
    lo = hi - data.draw(hnp.arrays(np.float64, size, elements=st.integers(0, 8)))
    order = np.array(data.draw(st.permutations(range(size))))
    np.testing.assert_array_equal(
        interval_ranks(lo, hi, ties)[order], interval_ranks(lo[order], hi[order], ties)
    )


@pytest.mark.parametrize("ties", TIES)
def test_scores_below_minus_100_rank_like_any_others(ties):
    # The public code closes its scan with an interval at -100 and gives such scores rank 1.
    lo = np.array([-500.0, -300.0, -120.0])
    np.testing.assert_array_equal(interval_ranks(lo, lo + 1, ties), [3, 2, 1])


@pytest.mark.parametrize("ties", TIES)
def test_leading_axes_are_independent_rankings_in_any_memory_layout(ties):
    # More rankings than a block of the fast path, transposed so that memory is not contiguous.
    rng = np.random.default_rng(0)
    lo = rng.integers(0, 9, (5, 2, 4500)).astype(float).T
    hi = lo + rng.integers(0, 4, lo.shape)
    whole = interval_ranks(lo, hi, ties)
    oracle = naive_scan if ties == "paper" else naive_symmetric
    for i in (0, 1, 4095, 4096, 4097, 4499):
        for j in (0, 1):
            np.testing.assert_array_equal(whole[i, j], oracle(lo[i, j], hi[i, j]))


@pytest.mark.parametrize(
    ("lo", "hi", "error"),
    [
        ([0.0, np.nan], [1.0, 1.0], NonFiniteScoreError),
        ([0.0, 1.0], [1.0], ShapeError),
        (0.0, 1.0, ShapeError),
        (np.empty((3, 0)), np.empty((3, 0)), ShapeError),
        ([2.0], [1.0], ValueError),
    ],
)
def test_bounds_that_are_no_intervals_are_refused(lo, hi, error):
    with pytest.raises(error):
        interval_ranks(lo, hi)


def test_unknown_tie_rule_is_named_in_the_error():
    with pytest.raises(ValueError, match="'average'"):
        interval_ranks([0.0], [1.0], "average")
