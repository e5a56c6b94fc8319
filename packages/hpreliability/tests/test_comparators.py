import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from hpreliability.comparators import (
    anova_importance,
    best_group,
    chs,
    friedman,
    kendall_w,
    lpi,
    rank_correlation,
    score_ranks,
    sensitivity,
    top1_agreement,
)
from hpreliability.errors import NonFiniteScoreError, ShapeError, TooFewValuesError


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def with_ties(seed, shape=(5, 8)):
    return np.random.default_rng(seed).integers(0, 4, shape).astype(float)


def test_score_ranks_give_the_best_rank_1_and_share_ties():
    np.testing.assert_array_equal(score_ranks([[3.0], [1.0], [3.0]]), [[1.5], [3], [1.5]])


@pytest.mark.parametrize("ties", ["plain", "corrected"])
def test_w_is_1_for_equal_rankings_and_0_for_opposite_ones(ties):
    agree = score_ranks(np.arange(5.0)[:, None] + np.arange(4.0))
    assert kendall_w(agree, ties=ties) == pytest.approx(1)
    assert kendall_w(np.column_stack([agree[:, 0], 6 - agree[:, 0]]), ties=ties) == 0


@given(st.integers(0, 500))
def test_corrected_w_is_scipys_friedman_statistic_rescaled(seed):
    scores = with_ties(seed)
    chi_square = stats.friedmanchisquare(*scores).statistic
    assert kendall_w(score_ranks(scores)) == pytest.approx(chi_square / (8 * 4))


@given(st.integers(0, 500))
def test_plain_w_equals_corrected_without_ties_and_is_smaller_with(seed):
    smooth = score_ranks(normal(4, 6, seed=seed))
    assert kendall_w(smooth) == pytest.approx(kendall_w(smooth, ties="plain"))
    tied = score_ranks(with_ties(seed))
    assert kendall_w(tied) >= kendall_w(tied, ties="plain")


def test_w_of_contexts_that_tie_everything_is_undefined():
    assert np.isnan(kendall_w(np.full((3, 4), 2.0)))
    assert kendall_w(np.full((3, 4), 2.0), ties="plain") == 0


def test_friedman_agrees_with_scipy():
    scores = with_ties(3)
    ours, theirs = friedman(scores), stats.friedmanchisquare(*scores)
    assert ours.statistic == pytest.approx(theirs.statistic)
    assert ours.p_value == pytest.approx(theirs.pvalue)


def test_nemenyi_critical_difference_is_the_tabulated_one():
    # Demšar 2006, Table 5(a): q = 2.343 for three and 2.728 for five classifiers at 5 %.
    for n_values, q in ((3, 2.343), (5, 2.728)):
        result = friedman(normal(n_values, 10))
        expected = q * np.sqrt(n_values * (n_values + 1) / 60)
        assert result.critical_difference == pytest.approx(expected, rel=1e-3)


def test_nemenyi_p_values_and_critical_difference_agree():
    result = friedman(np.arange(4)[:, None] + normal(4, 12, seed=1))
    distance = np.abs(result.mean_ranks[:, None] - result.mean_ranks[None])
    np.testing.assert_array_equal(result.pairwise_p < 0.05, distance > result.critical_difference)
    assert (result.pairwise_p < 0.05).any()
    np.testing.assert_array_equal(result.pairwise_p, result.pairwise_p.T)
    np.testing.assert_array_equal(np.diag(result.pairwise_p), 1)


def test_friedman_without_any_difference_is_refused():
    with pytest.raises(ValueError, match="same score"):
        friedman(np.ones((3, 4)))


@pytest.mark.parametrize(
    ("kind", "reference"), [("kendall", stats.kendalltau), ("spearman", stats.spearmanr)]
)
def test_rank_correlation_averages_scipys_over_pairs(kind, reference):
    scores = with_ties(1, (6, 3))
    pairs = [reference(scores[:, i], scores[:, j]).statistic for i, j in ((0, 1), (0, 2), (1, 2))]
    assert rank_correlation(scores, kind) == pytest.approx(np.mean(pairs))


@pytest.mark.parametrize("kind", ["kendall", "spearman"])
def test_context_that_ties_all_values_is_left_out(kind):
    scores = normal(5, 3)
    with_flat = np.column_stack([scores, np.ones(5)])
    assert rank_correlation(with_flat, kind) == pytest.approx(rank_correlation(scores, kind))
    assert np.isnan(rank_correlation(with_flat[:, 2:], kind))


def test_best_group_holds_what_overlaps_the_best():
    lo = np.array([[5.0, 0.0], [3.0, 6.0], [1.0, 1.0]])
    hi = np.array([[7.0, 10.0], [5.0, 8.0], [3.0, 2.0]])
    # In the second context the value with the highest midpoint is the second, not the widest.
    np.testing.assert_array_equal(best_group(lo, hi), [[True, True], [True, True], [False, False]])
    np.testing.assert_array_equal(top1_agreement(lo, hi), [1, 1, 0])


@given(st.integers(0, 500))
def test_best_group_ignores_the_order_of_values(seed):
    rng = np.random.default_rng(seed)
    lo = rng.integers(0, 6, (5, 3)).astype(float)
    hi = lo + rng.integers(0, 4, lo.shape)
    order = rng.permutation(5)
    np.testing.assert_array_equal(best_group(lo, hi)[order], best_group(lo[order], hi[order]))
    assert best_group(lo, hi).any(axis=0).all()


def test_sensitivity_is_tuned_per_context_minus_tuned_once():
    # Best per context 1, 1; best single value scores (1 + 0.2) / 2.
    assert sensitivity([[1.0, 0.2], [0.0, 1.0], [0.5, 0.5]]) == pytest.approx(1 - 0.6)


@given(st.integers(0, 500))
def test_sensitivity_is_0_exactly_when_one_value_is_best_everywhere(seed):
    scores = normal(4, 6, seed=seed)
    assert sensitivity(scores) >= 0
    scores[2] = scores.max(axis=0)
    assert sensitivity(scores) == pytest.approx(0, abs=1e-12)


def test_local_importance_is_the_share_of_variance():
    shares = lpi({"lr": [[0.0, 1.0], [2.0, 1.0]], "batch": [[0.0, 0.0], [1.0, 4.0], [2.0, 2.0]]})
    variance = np.array([[1.0, 0.0], [2 / 3, 8 / 3]])
    np.testing.assert_allclose([shares["lr"], shares["batch"]], variance / variance.sum(axis=0))


def test_local_importance_is_nan_where_nothing_varies():
    shares = lpi({"lr": np.ones((2, 1)), "batch": np.zeros((3, 1))})
    assert np.isnan(shares["lr"]).all()


def test_local_importance_refuses_different_contexts():
    with pytest.raises(ShapeError, match="'batch': 3"):
        lpi({"lr": np.ones((2, 1)), "batch": np.zeros((3, 3))})


@given(st.integers(0, 200))
def test_anova_shares_of_all_orders_add_up_to_1(seed):
    shares = anova_importance(normal(3, 4, 2, seed=seed), order=3)
    assert sum(shares.values()) == pytest.approx(1)
    assert len(shares) == 7


def test_anova_finds_additive_effects_and_pure_interaction():
    a, b = np.array([0.0, 1.0, 5.0]), np.array([0.0, 2.0])
    shares = anova_importance(a[:, None] + b)
    assert shares[0,] == pytest.approx(a.var() / (a.var() + b.var()))
    assert shares[0, 1] == pytest.approx(0, abs=1e-12)
    assert anova_importance([[1.0, -1.0], [-1.0, 1.0]])[0, 1] == pytest.approx(1)


def test_anova_needs_a_full_grid():
    with pytest.raises(NonFiniteScoreError):
        anova_importance([[1.0, np.nan], [0.0, 1.0]])
    with pytest.raises(ValueError, match="order"):
        anova_importance(np.eye(2), order=3)


def test_cross_environment_choice_is_not_swayed_by_one_large_scale():
    # The first value wins a single context by a million, the second the other two by a little.
    means = np.array([[1e6, 0.0, 0.0], [0.0, 1.0, 1.0]])
    choice = chs(means[:, None] + 0.01 * normal(2, 5, 3))
    assert choice.best == 1
    assert means.mean(axis=1).argmax() == 0


@given(st.integers(0, 200))
def test_cross_environment_choice_survives_increasing_maps(seed):
    scores = normal(3, 4, 5, seed=seed)
    np.testing.assert_allclose(chs(np.exp(scores)).normalised, chs(scores).normalised)


def test_cross_environment_choice_leaves_absent_runs_out():
    scores = normal(3, 4, 5)
    padded = np.concatenate([scores, np.full((3, 2, 5), np.nan)], axis=1)
    np.testing.assert_allclose(chs(padded).normalised, chs(scores).normalised)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: kendall_w(np.ones((1, 3))), TooFewValuesError),
        (lambda: friedman([[1.0, np.nan], [0.0, 1.0]]), NonFiniteScoreError),
        (lambda: rank_correlation(np.ones((3, 1))), ShapeError),
        (lambda: sensitivity(np.ones(3)), ShapeError),
        (lambda: chs(np.ones((2, 3))), ShapeError),
        (lambda: chs(np.full((2, 3, 2), np.nan)), NonFiniteScoreError),
        (lambda: best_group([[1.0], [2.0]], [[0.0], [3.0]]), ShapeError),
        (lambda: kendall_w(np.ones((2, 3)), ties="none"), ValueError),
        (lambda: rank_correlation(np.ones((2, 3)), "pearson"), ValueError),
        (lambda: lpi({}), ValueError),
        (lambda: friedman(np.eye(2), alpha=0), ValueError),
    ],
)
def test_unusable_input_is_refused(call, error):
    with pytest.raises(error):
        call()
