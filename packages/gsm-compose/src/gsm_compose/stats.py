"""Intervals and tests for answers to questions that occur in several items.

A composed benchmark uses questions again: one row of GSM8K may be the second question of two items
and the first of a third. Items that share a row are not independent. Here the *clusters* of an item
are its rows, given as one array of labels per role; the same label in two roles is the same row.

Two kinds of interval for smooth functions of means:

- `multiway_estimates`: the function is linearised at the means, and its variance is the sum over
  all pairs of items with a row in common (Cameron, Gelbach and Miller 2011; Aronow, Samii and
  Assenova 2015 for rows that play both roles). This is the default of the gap report.
- `clustered_bootstrap`: items joined by questions in the same role are resampled together. It does
  not see rows that play both roles, and needs many groups.

`bench/coverage.py` compares how often they cover.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gsm_compose.clusters import fewest_labels, joined_groups, label_codes, shared_variances
from gsm_compose.errors import StatisticsError

Array = NDArray[np.float64]
Columns = Mapping[str, Any]
Statistic = Callable[[Columns], Mapping[str, Any]]

MIN_GROUPS: Final = 20  # fewer groups resampled, and percentiles cover far too rarely
_STEP: Final = 1e-20  # complex-step derivative: no cancellation, so exact to rounding


@dataclass(frozen=True)
class Interval:
    """An estimate with the ends of its confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


@dataclass(frozen=True)
class Estimate:
    """A linearised estimate.

    Attributes:
        value: the statistic.
        se: its standard error, at least that of one item more right and one more wrong.
        df: degrees of freedom: rows in the role with fewest, less one.
    """

    value: float
    se: float
    df: int

    def interval(self, level: float = 0.95) -> Interval:
        """Student interval."""
        from scipy.special import stdtrit

        half = float(stdtrit(self.df, 0.5 + _checked(level) / 2)) * self.se
        return Interval(self.value, self.value - half, self.value + half)

    def p_value(self) -> float:
        """Two-sided, of the hypothesis that the statistic is zero."""
        from scipy.special import stdtr

        return float(2 * stdtr(self.df, -abs(self.value) / self.se))


@dataclass(frozen=True)
class McNemar:
    """Two conditions on the same items.

    Attributes:
        only_first: items right under the first condition only.
        only_second: items right under the second only.
        p_exact: two-sided exact p-value.
        p_mid: mid-p, which is less conservative (Fagerland, Lydersen and Laake 2013).
    """

    only_first: int
    only_second: int
    p_exact: float
    p_mid: float


def wilson(successes: float, n: float, level: float = 0.95) -> Interval:
    """Score interval of a proportion; `n` may be an effective number (Wilson 1927).

    Raises:
        StatisticsError: not 0 <= successes <= n, or n not positive, or level not in (0, 1).
    """
    if not (n > 0 and 0 <= successes <= n):
        raise StatisticsError(
            f"successes, n: expected 0 <= successes <= n and n > 0, got {successes} of {n}."
        )
    z = NormalDist().inv_cdf(0.5 + _checked(level) / 2)
    p = successes / n
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    # The ends are 0 and 1 exactly for none and all; rounding must not move the value outside.
    return Interval(p, min(p, max(0.0, middle - half)), max(p, min(1.0, middle + half)))


def mcnemar(first: ArrayLike, second: ArrayLike, clusters: ArrayLike | None = None) -> McNemar:
    """Exact test that two conditions are equally often right on the same items.

    The differences of a cluster keep or change sign together, each with probability one half. With
    one item per cluster this is McNemar's exact test.

    Args:
        first: (n,) right or not under one condition.
        second: (n,) under the other.
        clusters: (n,) labels; items of one label are one observation. None: every item is.

    Raises:
        StatisticsError: lengths differ.
    """
    x, y = _paired(first, second)
    labels = label_codes([np.arange(len(x)) if clusters is None else np.asarray(clusters)], len(x))[
        0
    ]
    sums = np.bincount(labels, weights=x - y).round().astype(int)
    magnitudes, counts = np.unique(np.abs(sums[sums != 0]), return_counts=True)
    chances = np.ones(1)  # of the sum being -reach, …, +reach
    for magnitude, count in zip(magnitudes, counts, strict=True):
        one = np.zeros(2 * magnitude * count + 1)
        one[:: 2 * magnitude] = _coin(int(count))
        chances = np.convolve(chances, one)
    total = np.abs(np.arange(len(chances)) - len(chances) // 2)
    seen = abs(int(sums.sum()))
    beyond, equal = float(chances[total > seen].sum()), float(chances[total == seen].sum())
    exact = min(1.0, beyond + equal)
    mid = min(1.0, beyond + equal / 2) if magnitudes.size else 1.0  # no difference, no evidence
    return McNemar(int(((x == 1) & (y == 0)).sum()), int(((x == 0) & (y == 1)).sum()), exact, mid)


def holm(p_values: ArrayLike) -> Array:
    """p-values (m,) adjusted so that rejecting below α keeps the chance of any error under α.

    Raises:
        StatisticsError: a value is not in [0, 1].
    """
    p = np.atleast_1d(np.asarray(p_values, dtype=float))
    if p.ndim != 1 or not ((p >= 0) & (p <= 1)).all():
        raise StatisticsError(f"p_values: expected numbers in [0, 1], got {p_values!r}.")
    order = np.argsort(p, kind="stable")
    steps = np.maximum.accumulate((len(p) - np.arange(len(p))) * p[order])
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(steps, 1)
    return adjusted


def paired_bootstrap(
    first: ArrayLike,
    second: ArrayLike,
    clusters: Sequence[ArrayLike] | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile interval of mean(first) − mean(second) over the same items.

    Args:
        first: (n,) numbers or booleans.
        second: (n,) of the same items.
        clusters: arrays (n,) of labels, one per role; see the module. None: items are independent.
        level: of confidence.
        resamples: number of bootstrap samples.
        seed: of the samples.

    Raises:
        StatisticsError: as `clustered_bootstrap`.
    """
    x, y = _paired(first, second)
    roles = [np.arange(len(x))] if clusters is None else clusters
    found = clustered_bootstrap(
        {"x": x, "y": y}, lambda m: {"d": m["x"] - m["y"]}, roles, level, resamples, seed
    )["d"]
    if found is None:
        raise StatisticsError("first, second: expected finite numbers, got some that are not.")
    return found


def clustered_bootstrap(
    columns: Mapping[str, Array],
    statistic: Statistic,
    clusters: Sequence[ArrayLike],
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Interval | None]:
    """Percentile intervals of functions of means.

    Items that have a label in common in the same role, directly or through other items, form one
    group; groups are drawn with replacement. Where every first question is used once, the groups
    are the items of one second question.

    Args:
        columns: arrays (n,) by name.
        statistic: from means of the columns, arrays of any shape, to statistics of that shape.
        clusters: arrays (n,) of labels, one per role.
        level: of confidence.
        resamples: number of bootstrap samples.
        seed: of the samples.

    Returns:
        Interval of each statistic; None where it is undefined at the means.

    Raises:
        StatisticsError: fewer than 20 groups, lengths that differ, or no resamples.
    """
    if resamples < 1:
        raise StatisticsError(f"resamples: expected at least 1, got {resamples}.")
    names, table = _table(columns)
    groups = joined_groups(label_codes(clusters, len(table)))
    count = int(groups.max()) + 1
    if count < min(MIN_GROUPS, len(table)):
        raise StatisticsError(
            f"clusters: expected at least {MIN_GROUPS} groups of items that share no question, "
            f"got {count}. Resampling them says little; use multiway intervals."
        )
    totals = np.stack(
        [np.bincount(groups, weights=column) for column in (*table.T, np.ones(len(table)))], axis=1
    )
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, count, size=(resamples, count)) + count * np.arange(resamples)[:, None]
    times = np.bincount(drawn.ravel(), minlength=resamples * count).reshape(resamples, count)
    sums = times.astype(float) @ totals
    with np.errstate(divide="ignore", invalid="ignore"):
        means = dict(zip(names, (sums[:, :-1] / sums[:, -1:]).T, strict=True))
        samples = {name: np.asarray(value) for name, value in statistic(means).items()}
        center = statistic(dict(zip(names, table.mean(axis=0), strict=True)))
    tail = (1 - _checked(level)) / 2
    found: dict[str, Interval | None] = {}
    for name, value in center.items():
        # Samples in which the statistic is undefined (no right first answer at all) are left out.
        sample = samples[name][np.isfinite(samples[name])]
        if not np.isfinite(value) or not sample.size:
            found[name] = None
            continue
        low, high = np.quantile(sample, [tail, 1 - tail])
        found[name] = Interval(float(value), float(low), float(high))
    return found


def multiway_estimates(
    columns: Mapping[str, Array], statistic: Statistic, clusters: Sequence[ArrayLike]
) -> dict[str, Estimate | None]:
    """Functions of means with standard errors that allow for shared questions.

    The variance is that of the mean of the items' influences (`clusters.shared_variances`).

    Where all items agree every ψ_i is zero, although another sample would not agree. So the
    variance is at least that of two items more, one of them right and one wrong in the column that
    matters most: 2 g² / n², with g the largest slope of the statistic (at means of the items and
    those two). Compare the interval of Bonett and Price (2012) for paired proportions.

    Args:
        columns: arrays (n,) by name.
        statistic: from means of the columns to statistics, by arithmetic only (it is evaluated on
            complex numbers, for exact slopes).
        clusters: one or two arrays (n,) of labels.

    Returns:
        Estimate of each statistic; None where it is undefined at the means.

    Raises:
        StatisticsError: lengths differ, or there are neither one nor two arrays of labels.
    """
    names, table = _table(columns)
    roles = label_codes(clusters, n := len(table))
    means = table.mean(axis=0)
    # A step along each column in turn, from the means and from the means of two items more.
    points = np.stack([means, (n * means + 1) / (n + 2)])
    moved = points[:, None] + 1j * _STEP * np.eye(len(names))
    with np.errstate(divide="ignore", invalid="ignore"):
        values = statistic(dict(zip(names, means, strict=True)))
        changed = statistic(dict(zip(names, np.moveaxis(moved, -1, 0), strict=True)))
    slopes = {name: np.asarray(change).imag / _STEP for name, change in changed.items()}
    defined = [n for n, v in values.items() if np.isfinite(v) and np.isfinite(slopes[n]).all()]
    gradients = np.array([slopes[name][0] for name in defined]).reshape(-1, len(names))
    influences = gradients @ (table - means).T
    df = max(1, fewest_labels(roles) - 1)
    found: dict[str, Estimate | None] = dict.fromkeys(values)
    for name, variance in zip(defined, shared_variances(influences, roles), strict=True):
        least = 2 * np.abs(slopes[name][1]).max() ** 2 / n**2
        found[name] = Estimate(float(values[name]), float(max(variance, least)) ** 0.5, df)
    return found


def clustered_rate(
    right: ArrayLike, clusters: Sequence[ArrayLike], level: float = 0.95
) -> Interval:
    """Score interval of the mean of (n,) booleans, with the effective number of items.

    That number is what would give independent items the variance of `multiway_estimates`. Where
    all items agree it cannot be estimated, and is the number of labels in the role with fewest.

    Raises:
        StatisticsError: as `multiway_estimates`.
    """
    x = np.asarray(right, dtype=float)
    roles = label_codes(clusters, len(x))
    p = float(x.mean())
    fewest = fewest_labels(roles)
    effective = float(fewest)
    if 0 < p < 1:
        effective = p * (1 - p) / float(shared_variances((x - p)[None], roles)[0])
        effective = min(float(len(x)), effective)
    return wilson(p * effective, effective, level)


def _coin(count: int) -> Array:
    """Chances (count + 1,) of the number of heads."""
    from scipy.special import gammaln

    heads = np.arange(count + 1)
    ways = gammaln(count + 1) - gammaln(heads + 1) - gammaln(count - heads + 1)
    chances: Array = np.exp(ways - count * np.log(2))
    return chances


def _table(columns: Mapping[str, Array]) -> tuple[list[str], Array]:
    shapes = {name: np.shape(column) for name, column in columns.items()}
    if len(set(shapes.values())) != 1 or len(next(iter(shapes.values()))) != 1:
        raise StatisticsError(f"columns: expected arrays of one length n, got shapes {shapes}.")
    table = np.stack([np.asarray(column, dtype=float) for column in columns.values()], axis=1)
    if not len(table):
        raise StatisticsError("columns: expected at least one item, got none.")
    return list(columns), table


def _paired(first: ArrayLike, second: ArrayLike) -> tuple[Array, Array]:
    x, y = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if x.shape != y.shape or x.ndim != 1 or not len(x):
        raise StatisticsError(
            f"first, second: expected two arrays of one length n >= 1, got {x.shape} and {y.shape}."
        )
    return x, y


def _checked(level: float) -> float:
    if not 0 < level < 1:
        raise StatisticsError(f"level: expected a number in (0, 1), got {level!r}.")
    return level
