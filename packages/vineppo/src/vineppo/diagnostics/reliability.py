"""Where a value function says 0.7, is it 0.7?"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vineppo.diagnostics.arrays import Floats, Ints, codes, floats
from vineppo.diagnostics.intervals import SHARE, Interval, Resampling, ratios
from vineppo.errors import at_least

_ENDLESS = (-np.inf, np.inf)
_ROUNDING = 1e-9  # exact values may be beyond 0 and 1 by as little


@dataclass(frozen=True)
class CalibrationBin:
    """States with predictions from ``low`` to ``high``.

    Attributes:
        low: lower edge, inside.
        high: upper edge, outside but for the last bin.
        predicted: mean prediction.
        truth: mean true value of these states.
    """

    low: float
    high: float
    predicted: float
    truth: Interval


@dataclass(frozen=True)
class Calibration:
    """Mean truth by prediction.

    Attributes:
        bins: those that hold a state, from low to high.
        error: expected calibration error: mean over states of |mean prediction - mean truth| of
            their bin. Noise in either adds to it, so it is above 0 for exact values too; compare it
            only between value functions on the same states.
    """

    bins: tuple[CalibrationBin, ...]
    error: float

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary."""
        bins = [
            {"low": b.low, "high": b.high, "predicted": b.predicted, "truth": b.truth.to_json()}
            for b in self.bins
        ]
        return {"error": self.error, "bins": bins}

    @classmethod
    def from_json(cls, data: Any) -> Calibration:
        """What :meth:`to_json` wrote."""
        bins = (
            CalibrationBin(b["low"], b["high"], b["predicted"], Interval.from_json(b["truth"]))
            for b in data["bins"]
        )
        return cls(tuple(bins), data["error"])


def calibration(
    predictions: npt.ArrayLike,
    truth: npt.ArrayLike,
    bins: int = 10,
    *,
    clusters: Sequence[Hashable] | None = None,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Calibration:
    """Mean true value of the states with similar predictions.

    Args:
        predictions: (S,).
        truth: (S,) true values, or single outcomes of rollouts; independent of the predictions.
        bins: number of bins of equal width, from 0 to 1 where all predictions lie there, else from
            the least to the greatest prediction.
        clusters: (S,) labels; equal ones are not independent. None: each state for itself.
        level: confidence of the intervals.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        InvalidInputError: no state, lengths that differ, a number that is not finite, or an option
            out of range.
    """
    how = Resampling(level, resamples, seed)
    x = floats("predictions", predictions)
    y = floats("truth", truth, x.shape)
    groups = np.arange(len(x)) if clusters is None else codes("clusters", clusters, len(x))
    return calibrate(x, y, groups, bins, how)


def calibrate(x: Floats, y: Floats, groups: Ints, bins: int, how: Resampling) -> Calibration:
    """:func:`calibration` of arrays that are known to fit."""
    at_least("bins", bins, 1)
    ends = SHARE if _are_shares(x) else (float(x.min()), float(x.max()))
    edges = np.linspace(*ends, bins + 1)
    inside = membership(x, edges)
    held = np.flatnonzero(inside.any(axis=0))
    weights = inside[:, held].astype(np.float64)
    counts = weights.sum(axis=0)
    predicted = x @ weights / counts
    bounds = [SHARE if _are_shares(y) else _ENDLESS] * len(held)
    means = ratios(y[:, None] * weights, weights, groups, bounds, how)
    gaps = np.abs(predicted - [mean.value for mean in means])
    found = (
        CalibrationBin(float(edges[b]), float(edges[b + 1]), float(predicted[i]), means[i])
        for i, b in enumerate(held)
    )
    return Calibration(tuple(found), float(counts @ gaps / len(x)))


def membership(x: Floats, edges: Floats) -> npt.NDArray[np.bool_]:
    """(n, B): which bin each number lies in; lower edges are inside, and so is the last one.

    Rounding does not matter: 3/5 lies in the bin that begins at 0.6.
    """
    bins = len(edges) - 1
    nudge = _ROUNDING * (edges[-1] - edges[0])
    place = np.clip(np.searchsorted(edges, x + nudge, side="right") - 1, 0, bins - 1)
    return np.asarray(place[:, None] == np.arange(bins))


def _are_shares(x: Floats) -> bool:
    return bool(x.min() >= -_ROUNDING and x.max() <= 1 + _ROUNDING)
