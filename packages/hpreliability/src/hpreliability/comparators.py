"""Other measures of how far a hyper-parameter's ranking agrees over contexts.

Unless said otherwise they take one score per value and context, shape (V, C), larger is better; for
scores of single runs (V, R, C) that is `scores.mean(axis=1)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from hpreliability.errors import NonFiniteScoreError, ShapeError, TooFewValuesError
from hpreliability.intervals import Floats


@dataclass(frozen=True)
class Friedman:
    """Friedman's test with Nemenyi's comparisons.

    Attributes:
        statistic: chi-square on V - 1 degrees of freedom, corrected for ties.
        p_value: of the hypothesis that no value is better than another.
        mean_ranks: shape (V,), 1 = best.
        critical_difference: mean ranks that differ by more than this differ significantly.
        pairwise_p: shape (V, V), Nemenyi p-values; 1 on the diagonal.
    """

    statistic: float
    p_value: float
    mean_ranks: Floats
    critical_difference: float
    pairwise_p: Floats


@dataclass(frozen=True)
class CrossEnvironmentChoice:
    """The one setting for all contexts by cumulative-distribution normalised scores.

    Attributes:
        best: index of the value with the largest mean; the first of equals.
        normalised: shape (V,): mean over contexts and runs of the share of that context's runs
            (of all values) that score no more.
    """

    best: int
    normalised: Floats


def score_ranks(scores: ArrayLike) -> Floats:
    """Ranks (V, C) within each context, 1 = best, equal scores share their mean rank."""
    return np.asarray(stats.rankdata(-_matrix(scores), axis=0))


def kendall_w(ranks: ArrayLike, *, ties: Literal["corrected", "plain"] = "corrected") -> float:
    """Kendall's coefficient of concordance: 1 if contexts rank the values alike, near 0 if not.

    Args:
        ranks: shape (V, C): ranks within each context (`score_ranks`, or `interval_ranks`).
        ties: `"plain"` is 12 S / (C² (V³ - V)) with S the sum of squared deviations of the rank
            sums, which an older version of the paper's code used; it cannot reach 1 with ties.
            `"corrected"` subtracts C Σ (t³ - t) over groups of t equal ranks from the denominator.

    Returns:
        The coefficient; NaN when corrected and every context ties all values.

    Raises:
        TooFewValuesError: V < 2.   ValueError: unknown `ties`.
    """
    if ties not in ("corrected", "plain"):
        raise ValueError(f'ties must be "corrected" or "plain", got {ties!r}')
    ranks = _matrix(ranks)
    n_values, n_contexts = ranks.shape
    total = ranks.sum(axis=1)
    squares = ((total - total.mean()) ** 2).sum()
    scale = n_contexts**2 * (n_values**3 - n_values)
    if ties == "corrected":
        scale -= n_contexts * _tie_sum(ranks)
    return float(12 * squares / scale) if scale > 0 else float("nan")


def friedman(scores: ArrayLike, *, alpha: float = 0.05) -> Friedman:
    """Friedman's test over contexts and Nemenyi's test of all pairs of values.

    Args:
        scores: shape (V, C), larger is better, C ≥ 2.
        alpha: level of the critical difference.

    Raises:
        ValueError: every context ties all values, or `alpha` is out of range.

    Source: Demšar 2006, "Statistical comparisons of classifiers over multiple data sets". The
    statistic is C (V - 1) times the tie-corrected Kendall's W.
    """
    ranks = score_ranks(scores)
    n_values, n_contexts = ranks.shape
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must be between 0 and 1, got {alpha}")
    statistic = n_contexts * (n_values - 1) * kendall_w(ranks)
    if np.isnan(statistic):
        raise ValueError("every context gives all values the same score: nothing to test")
    mean_ranks = ranks.mean(axis=1)
    # The studentised range is in units of a mean rank's standard deviation.
    unit = np.sqrt(n_values * (n_values + 1) / (12 * n_contexts))
    distance = np.abs(mean_ranks[:, None] - mean_ranks[None]) / unit
    upper = np.triu_indices(n_values, 1)
    pairwise = np.ones((n_values, n_values))
    pairwise[upper] = stats.studentized_range.sf(distance[upper], n_values, np.inf)
    pairwise.T[upper] = pairwise[upper]
    return Friedman(
        statistic=float(statistic),
        p_value=float(stats.chi2.sf(statistic, n_values - 1)),
        mean_ranks=mean_ranks,
        critical_difference=float(stats.studentized_range.ppf(1 - alpha, n_values, np.inf) * unit),
        pairwise_p=pairwise,
    )


def rank_correlation(scores: ArrayLike, kind: Literal["kendall", "spearman"] = "kendall") -> float:
    """Mean rank correlation of the values' scores over all pairs of contexts.

    Args:
        scores: shape (V, C), C ≥ 2.
        kind: `"kendall"` (tau-b) or `"spearman"`.

    Returns:
        Between -1 and 1. Pairs with a context that ties all values have no correlation and are
        left out; NaN if none is left.

    Raises:
        ShapeError: a single context.   ValueError: unknown `kind`.
    """
    scores = _matrix(scores)
    if scores.shape[1] < 2:
        raise ShapeError("rank correlation needs at least two contexts, got one")
    if kind not in ("kendall", "spearman"):
        raise ValueError(f'kind must be "kendall" or "spearman", got {kind!r}')
    varied = scores[:, np.ptp(scores, axis=0) > 0]
    if varied.shape[1] < 2:
        return float("nan")
    if kind == "spearman":
        # Spearman's is the ordinary correlation of the ranks, for all pairs at once.
        correlations = np.asarray(np.corrcoef(stats.rankdata(varied, axis=0).T))
        return float(correlations[np.triu_indices(varied.shape[1], 1)].mean())
    return float(np.mean([stats.kendalltau(a, b).statistic for a, b in combinations(varied.T, 2)]))


def best_group(lo: ArrayLike, hi: ArrayLike) -> NDArray[np.bool_]:
    """Which values are not separated from the best one in each context.

    Args:
        lo, hi: interval bounds, shape (V, C).

    Returns:
        Shape (V, C): True where the interval overlaps or touches that of the value with the highest
        midpoint; of several with the same midpoint the widest counts.
    """
    lo, hi = _matrix(lo), _matrix(hi)
    if lo.shape != hi.shape or (lo > hi).any():
        raise ShapeError("lo and hi must share a shape (V, C), with lo <= hi everywhere")
    middle = lo + hi
    threshold = np.where(middle == middle.max(axis=0), lo, np.inf).min(axis=0)
    return np.asarray(hi >= threshold)


def top1_agreement(lo: ArrayLike, hi: ArrayLike) -> Floats:
    """Share of contexts whose best group holds a value.

    Args:
        lo, hi: interval bounds, shape (V, C), for instance from `score_intervals`.

    Returns:
        Shape (V,); the largest entry is how far a single setting can be best everywhere.
    """
    return np.asarray(best_group(lo, hi).mean(axis=1))


def sensitivity(scores: ArrayLike) -> float:
    """What tuning per context gains over one setting for all contexts.

    Args:
        scores: shape (V, C), normalised to a scale that contexts share.

    Returns:
        mean over contexts of the best value's score − best over values of the mean score; ≥ 0.

    Source: Adkins, Bowling & White 2024, "A Method for Evaluating Hyperparameter Sensitivity in
    Reinforcement Learning".
    """
    scores = _matrix(scores)
    # Rounding can push a difference of equal means just below zero.
    return max(0.0, float(scores.max(axis=0).mean() - scores.mean(axis=1).max()))


def lpi(scores: Mapping[str, ArrayLike]) -> dict[str, Floats]:
    """Local parameter importance: each hyper-parameter's share of the variance around the default.

    Args:
        scores: for each hyper-parameter the mean scores (V, C) of its values, the others at their
            default; all over the same C contexts, V may differ.

    Returns:
        For each hyper-parameter its share in each context, shape (C,): the variance over its values
        divided by the sum of those variances. NaN in contexts where nothing varies.

    Raises:
        ShapeError: different numbers of contexts.   ValueError: no hyper-parameter.

    Source: Biedenkapp et al. 2018, "CAVE: Configuration Assessment, Visualization and Evaluation".
    """
    if not scores:
        raise ValueError("lpi needs at least one hyper-parameter")
    matrices = {name: _matrix(array) for name, array in scores.items()}
    widths = {name: matrix.shape[1] for name, matrix in matrices.items()}
    if len(set(widths.values())) > 1:
        raise ShapeError(f"all hyper-parameters need the same contexts, got {widths}")
    variances = {name: matrix.var(axis=0) for name, matrix in matrices.items()}
    total = np.sum(list(variances.values()), axis=0)
    with np.errstate(invalid="ignore"):
        return {name: variance / total for name, variance in variances.items()}


def anova_importance(grid: ArrayLike, *, order: int = 2) -> dict[tuple[int, ...], float]:
    """Share of a full grid's variance that each hyper-parameter and interaction explains.

    Args:
        grid: mean scores of a full factorial design; one axis per hyper-parameter.
        order: largest interaction to report.

    Returns:
        For every set of at most `order` axes, its share of the total variance, values weighted
        equally. With `order = grid.ndim` the shares add up to 1. NaN if nothing varies.

    Raises:
        ShapeError: no axes.   NonFiniteScoreError: the grid has holes.
        ValueError: `order` is not between 1 and the number of axes.

    Source: Hutter, Hoos & Leyton-Brown 2014, "An Efficient Approach for Assessing Hyperparameter
    Importance". On a full grid the functional ANOVA is exact and needs no surrogate model.
    """
    grid = _finite(grid)
    if grid.ndim == 0 or grid.size == 0:
        raise ShapeError(f"grid needs one axis per hyper-parameter, got shape {grid.shape}")
    if not 1 <= order <= grid.ndim:
        raise ValueError(f"order must be between 1 and {grid.ndim}, got {order}")
    axes = range(grid.ndim)
    effects: dict[tuple[int, ...], Floats] = {(): np.asarray(grid.mean(keepdims=True))}
    for size in range(1, order + 1):
        for chosen in combinations(axes, size):
            others = tuple(axis for axis in axes if axis not in chosen)
            marginal = grid.mean(axis=others, keepdims=True)
            inner = [e for key, e in effects.items() if set(key) < set(chosen)]
            effects[chosen] = marginal - sum(inner)
    total = grid.var()
    return {
        key: float(np.mean(effect**2) / total) if total > 0 else float("nan")
        for key, effect in effects.items()
        if key
    }


def chs(scores: ArrayLike) -> CrossEnvironmentChoice:
    """The setting to use in all contexts, by scores normalised with their distribution function.

    Args:
        scores: shape (V, R, C); NaN marks a run that does not exist.

    Raises:
        ShapeError: not three-dimensional.   TooFewValuesError: V < 2.
        NonFiniteScoreError: an infinite score, or a cell without any run.

    Source: Patterson et al. 2024, "The Cross-environment Hyperparameter Setting Benchmark for
    Reinforcement Learning". Invariant under increasing maps of each context's scores.
    """
    runs = np.asarray(scores, dtype=np.float64)
    if runs.ndim != 3:
        raise ShapeError(f"scores must have shape (V, R, C), got {runs.shape}")
    if len(runs) < 2:
        raise TooFewValuesError(f"a choice needs at least two values, got {len(runs)}")
    exists = ~np.isnan(runs)
    if np.isinf(runs).any() or not exists.any(axis=1).all():
        raise NonFiniteScoreError("scores must be finite, with at least one run in every cell")
    pooled = runs.reshape(-1, runs.shape[-1])
    below = stats.rankdata(pooled, method="max", axis=0, nan_policy="omit")
    share = (below / exists.sum(axis=(0, 1))).reshape(runs.shape)
    normalised = np.nanmean(share, axis=1).mean(axis=1)
    return CrossEnvironmentChoice(best=int(np.argmax(normalised)), normalised=normalised)


def _tie_sum(ranks: Floats) -> float:
    """Sum over contexts and groups of t equal ranks of t³ − t."""
    sizes = (ranks[:, None] == ranks[None]).sum(axis=1)
    return float((sizes.astype(np.float64) ** 2 - 1).sum())


def _matrix(array: ArrayLike) -> Floats:
    matrix = _finite(array)
    if matrix.ndim != 2 or matrix.shape[1] == 0:
        raise ShapeError(f"expected shape (V, C) with C ≥ 1, got {matrix.shape}")
    if len(matrix) < 2:
        raise TooFewValuesError(f"at least two values are needed, got {len(matrix)}")
    return matrix


def _finite(array: ArrayLike) -> Floats:
    numbers = np.asarray(array, dtype=np.float64)
    if not np.isfinite(numbers).all():
        raise NonFiniteScoreError(
            f"{int((~np.isfinite(numbers)).sum())} of {numbers.size} numbers are NaN or infinite"
        )
    return numbers
