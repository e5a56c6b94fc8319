"""What a run gains at test time for what it gains in training, and for how far it moves."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from vineppo.diagnostics.arrays import Floats, codes, floats
from vineppo.diagnostics.intervals import Interval, Resampling, t_quantile
from vineppo.errors import InvalidInputError

_STREAM: Final = 0x63757276


@dataclass(frozen=True)
class TrainTestCurve:
    """Test accuracy against training accuracy, at the checkpoints of one or more runs.

    Attributes:
        train: (n,) training accuracies.
        test: (n,) test accuracies.
        slope: of the least-squares line: what a point of training accuracy is worth at test time
            (Fig. 5 of arXiv 2410.01679). Its interval is over runs.
        intercept: of that line.
    """

    train: tuple[float, ...]
    test: tuple[float, ...]
    slope: Interval
    intercept: float


def train_test_curve(
    train: npt.ArrayLike,
    test: npt.ArrayLike,
    runs: Sequence[Hashable] | None = None,
    *,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> TrainTestCurve:
    """The line through pairs of accuracies.

    Args:
        train: (n,) at each checkpoint.
        test: (n,) at the same checkpoints.
        runs: (n,) labels; checkpoints of one run are not independent, so whole runs are drawn anew.
            None: each checkpoint for itself, which is too narrow within one run.
        level: confidence of the interval.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        InvalidInputError: lengths that differ, numbers that are not finite, an option out of range,
            or training accuracies that are all equal, so that there is no slope.
    """
    how = Resampling(level, resamples, seed)
    x = floats("train", train)
    y = floats("test", test, x.shape)
    if np.ptp(x) == 0:
        raise InvalidInputError(
            f"train: expected at least two different accuracies, got {len(x)} of {x[0]:g}"
        )
    groups = np.arange(len(x)) if runs is None else codes("runs", runs, len(x))
    clusters = int(groups.max()) + 1
    # Sums of 1, x, y, x², xy over each run say all there is to know about its line. Around the
    # mean, so that no digits are lost where accuracies hardly differ.
    u, v = x - x.mean(), y - y.mean()
    sums = np.zeros((clusters, 5))
    np.add.at(sums, groups, np.stack([np.ones_like(u), u, v, u * u, u * v], axis=1))
    slope = float(_slopes(sums.sum(axis=0, keepdims=True))[0])
    low, high = -np.inf, np.inf
    if clusters > 2:
        rng = np.random.default_rng((how.seed, _STREAM))
        weights = rng.multinomial(clusters, np.full(clusters, 1 / clusters), size=how.resamples)
        drawn = _slopes(weights @ sums)
        drawn = drawn[np.isfinite(drawn)]  # a resample of a single place has no line
        # A line takes two numbers from the runs, so their degrees of freedom are two less.
        error = float(drawn.std(ddof=1)) * np.sqrt(clusters / (clusters - 2))
        reach = t_quantile(level, clusters - 2) * error
        low, high = slope - reach, slope + reach
    return TrainTestCurve(
        tuple(x.tolist()),
        tuple(y.tolist()),
        Interval(slope, float(low), float(high), len(x), clusters),
        float(y.mean() - slope * x.mean()),
    )


def best_within(
    kl: npt.ArrayLike, accuracy: npt.ArrayLike, at: npt.ArrayLike
) -> npt.NDArray[np.float64]:
    """The best accuracy that a run has reached without going further than a divergence.

    Accuracy per unit of divergence from the reference (Fig. D.8 of arXiv 2410.01679): runs are
    compared at equal ``at``.

    Args:
        kl: (n,) divergence from the reference at each checkpoint, in nats per answer.
        accuracy: (n,) at the same checkpoints.
        at: (m,) divergences.

    Returns:
        (m,); NaN below the least divergence of the run.

    Raises:
        InvalidInputError: lengths that differ, or numbers that are not finite.
    """
    x = floats("kl", kl)
    y = floats("accuracy", accuracy, x.shape)
    places = floats("at", at)
    order = np.argsort(x, kind="stable")
    best = np.maximum.accumulate(y[order])
    count = np.searchsorted(x[order], places, side="right")
    return np.where(count > 0, best[np.maximum(count - 1, 0)], np.nan)


def _slopes(sums: Floats) -> Floats:
    n, x, y, xx, xy = sums.T
    found = np.full(len(sums), np.nan)
    spread = n * xx - x * x
    wide = spread > 1e-12 * (n * xx).max()
    np.divide(n * xy - x * y, spread, out=found, where=wide)
    return found
