"""Means and ratios with intervals, where observations come in clusters.

States of one trajectory share their beginning, and trajectories of one prompt share the prompt, so
they err together: a thousand states of ten prompts bound a mean no better than a few dozen
independent ones. Whole clusters are therefore drawn anew. The bootstrap gives the standard error,
corrected by √(G/(G−1)) for G clusters, and Student's t with G − 1 degrees of freedom the width:
plain percentiles are too narrow for the few prompts that are usual here.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from vineppo.diagnostics.arrays import Floats, Ints, codes, floats
from vineppo.errors import InvalidInputError, at_least

_STREAM: Final = 0x696E74  # of the resampling, apart from whatever else the seed is used for
_ELEMENTS: Final = 4_000_000  # weights in memory at once
_ENDLESS: Final = (-math.inf, math.inf)
POSITIVE: Final = (0.0, math.inf)
SHARE: Final = (0.0, 1.0)
Bounds = tuple[float, float]


@dataclass(frozen=True)
class Interval:
    """A number and how far it is known.

    Attributes:
        value: the estimate; NaN where there is nothing to average.
        low: lower end; with a single cluster nothing bounds the value but its range.
        high: upper end.
        n: what the value averages over, e.g. states or pairs.
        clusters: independent groups among them, which is what the width goes by.
    """

    value: float
    low: float
    high: float
    n: int
    clusters: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary; what is not finite becomes None, because JSON has no name for it."""
        ends = {"value": self.value, "low": self.low, "high": self.high}
        return {
            **{name: x if math.isfinite(x) else None for name, x in ends.items()},
            "n": self.n,
            "clusters": self.clusters,
        }

    @classmethod
    def from_json(cls, data: Any) -> Interval:
        """The interval that :meth:`to_json` wrote."""
        value, low, high = data["value"], data["low"], data["high"]
        return cls(
            math.nan if value is None else value,
            -math.inf if low is None else low,
            math.inf if high is None else high,
            data["n"],
            data["clusters"],
        )


@dataclass(frozen=True)
class Resampling:
    """How intervals are made.

    Attributes:
        level: confidence of the intervals, in (0, 1).
        resamples: of the bootstrap, at least 100.
        seed: of the bootstrap; the same seed gives the same intervals.
    """

    level: float = 0.95
    resamples: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.level < 1:
            raise InvalidInputError(f"level: expected a number in (0, 1), got {self.level}")
        at_least("resamples", self.resamples, 100)
        at_least("seed", self.seed, 0)


def mean_interval(
    values: npt.ArrayLike,
    clusters: Sequence[Hashable] | None = None,
    *,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """The mean of anything, e.g. of the divergence of each answer from the reference.

    Pairs are compared through the mean of their differences.

    Args:
        values: (n,) finite.
        clusters: (n,) labels; equal ones are not independent. None: each value for itself.
        level: see :class:`Resampling`.
        resamples: see :class:`Resampling`.
        seed: see :class:`Resampling`.

    Raises:
        InvalidInputError: no value, one that is not finite, or an option out of range.
    """
    how = Resampling(level, resamples, seed)
    x = floats("values", values)
    groups = np.arange(len(x)) if clusters is None else codes("clusters", clusters, len(x))
    return ratios(x[:, None], np.ones((len(x), 1)), groups, [_ENDLESS], how)[0]


def ratios(
    numerators: Floats,
    denominators: Floats,
    groups: Ints,
    bounds: Sequence[Bounds],
    how: Resampling,
) -> list[Interval]:
    """Several ratios of sums over the same observations, each with its interval.

    A mean has denominators 1, a mean over some of the observations 1 and 0, a share of pairs the
    number of pairs.

    Args:
        numerators: (n, M).
        denominators: (n, M), whole numbers of at least 0; where one is 0, the numerator is too.
        groups: (n,) cluster of each observation, from 0 without gaps.
        bounds: M ranges, to which intervals are cut. A share (0 to 1) that is 0 or 1 in every
            cluster has no spread to resample; its other end is Clopper and Pearson's, as if each of
            the G clusters had been one trial: (α/2)^(1/G).
        how: level, number of resamples and seed.

    Returns:
        M intervals.
    """
    total = int(groups.max()) + 1
    top = np.zeros((total, numerators.shape[1]))
    bottom = np.zeros_like(top)
    np.add.at(top, groups, numerators)
    np.add.at(bottom, groups, denominators)
    errors = _bootstrap_errors(top, bottom, how)
    found = []
    for m, bound in enumerate(bounds):
        n, held = int(bottom[:, m].sum()), bottom[:, m] > 0
        clusters = int(held.sum())
        value = float(top[:, m].sum() / n) if n else math.nan
        low, high = _ends(value, float(errors[m]), clusters, how.level)
        if bound == SHARE and clusters > 1:
            rest = ((1 - how.level) / 2) ** (1 / clusters)
            if (top[:, m] == 0).all():
                high = 1 - rest
            elif (top[held, m] == bottom[held, m]).all():
                low = rest
        found.append(Interval(value, max(low, bound[0]), min(high, bound[1]), n, clusters))
    return found


def linearised_errors(top: Floats, bottom: Floats) -> Floats:
    """Standard errors of ratios of sums over G clusters, by their first-order formula.

    √(G/(G−1) · Σ_g (top_g − r · bottom_g)²) / Σ_g bottom_g with r = Σ top / Σ bottom: what the
    bootstrap tends to, with neither resamples nor seed. For one cluster it is NaN.

    Args:
        top: (G, M) sums of the numerators.
        bottom: (G, M) sums of the denominators, each column with some above 0.

    Returns:
        (M,).
    """
    clusters = (bottom > 0).sum(axis=0)
    ratio = top.sum(axis=0) / bottom.sum(axis=0)
    squares = ((top - ratio * bottom) ** 2).sum(axis=0)
    scale = np.where(clusters > 1, clusters / np.maximum(clusters - 1, 1), np.nan)
    return np.asarray(np.sqrt(scale * squares) / bottom.sum(axis=0))


def _bootstrap_errors(top: Floats, bottom: Floats, how: Resampling) -> Floats:
    total, columns = top.shape
    rng = np.random.default_rng((how.seed, _STREAM))
    replicates = np.full((how.resamples, columns), np.nan)
    step = max(1, _ELEMENTS // total)
    for start in range(0, how.resamples, step):
        stop = min(start + step, how.resamples)
        weights = rng.multinomial(total, np.full(total, 1 / total), size=stop - start)
        sums = weights @ bottom
        # A resample may miss all clusters of a rare kind; it then says nothing about it.
        np.divide(weights @ top, sums, out=replicates[start:stop], where=sums > 0)
    # Clusters without weight in a column add nothing to its spread, so G counts those with some.
    clusters = (bottom > 0).sum(axis=0)
    drawn = ~np.isnan(replicates)
    count = drawn.sum(axis=0)
    centre = np.where(drawn, replicates, 0).sum(axis=0) / np.maximum(count, 1)
    squares = np.where(drawn, replicates - centre, 0) ** 2
    variance = squares.sum(axis=0) / np.maximum(count - 1, 1)
    return np.asarray(np.sqrt(variance * clusters / np.maximum(clusters - 1, 1)))


def _ends(value: float, error: float, clusters: int, level: float) -> Bounds:
    if clusters < 2:
        return _ENDLESS
    reach = t_quantile(level, clusters - 1) * error
    return value - reach, value + reach


@lru_cache(maxsize=256)
def t_quantile(level: float, freedom: int) -> float:
    """The t with P(|T| < t) = ``level``, for Student's T.

    With T = √ν tan θ the density of θ is proportional to cos^(ν−1) θ, which is smooth and bounded,
    so that Gauss and Legendre's rule and bisection give all digits that matter, without scipy.

    Args:
        level: in (0, 1).
        freedom: degrees of freedom ν, at least 1.
    """
    log_scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - math.log(math.pi) / 2
    nodes, weights = np.polynomial.legendre.leggauss(64)

    def probability(angle: float) -> float:
        places = angle * (nodes + 1) / 2
        density = np.exp(log_scale + (freedom - 1) * np.log(np.cos(places)))
        return float(angle * (weights @ density))

    # Beyond t = 12 nothing is left for 30 degrees of freedom and more; the rule sees the peak.
    low, high = 0.0, math.pi / 2 if freedom < 30 else math.atan(12 / math.sqrt(freedom))
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if probability(middle) < level else (low, middle)
    return math.sqrt(freedom) * math.tan((low + high) / 2)
