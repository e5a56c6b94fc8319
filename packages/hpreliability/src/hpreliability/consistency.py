"""The Tuning Hyper-parameter Consistency (THC) score, on arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hpreliability.errors import TooFewValuesError
from hpreliability.intervals import Floats, IntervalMethod, score_intervals
from hpreliability.ranks import Ties, interval_ranks


@dataclass(frozen=True)
class Method:
    """How scores become ranks: everything that defines one THC statistic.

    Attributes:
        interval: how runs become an interval; see `score_intervals`.
        ties: how overlapping intervals are ranked; see `interval_ranks`.
        level: coverage of `"t"` and bootstrap intervals.
        resamples: replicates of bootstrap intervals.
        seed: seed of bootstrap intervals.
    """

    interval: IntervalMethod = "mean_std"
    ties: Ties = "paper"
    level: float = 0.95
    resamples: int = 5000
    seed: int = 0

    def intervals(self, scores: Floats) -> tuple[Floats, Floats]:
        """Bounds (..., V, C) of scores (..., V, R, C, T)."""
        return score_intervals(
            scores, self.interval, level=self.level, resamples=self.resamples, seed=self.seed
        )

    def relevant(self, scores: Floats) -> Floats:
        """The part of scores (..., V, R, C, T) that the intervals depend on.

        Intervals around a mean see only each run's average over its tasks, (..., V, R, C, 1);
        resampling that is cheaper, and right even where the tasks of a run are correlated.
        """
        if scores.ndim < 4 or self.interval in ("mean", "median", "iqm"):
            return scores
        return np.asarray(scores.mean(axis=-1, keepdims=True))

    def ranks(self, lo: Floats, hi: Floats) -> Floats:
        """Ranks (..., V, C) of the values within each context; `lo`, `hi` have that shape."""
        by_context = interval_ranks(np.swapaxes(lo, -1, -2), np.swapaxes(hi, -1, -2), self.ties)
        return np.swapaxes(by_context, -1, -2)


def rank_spread(ranks: Floats) -> Floats:
    """Share of the ranking that each value travels over the contexts.

    Args:
        ranks: shape (..., V, C), 1 = best.

    Returns:
        Shape (..., V): (largest − smallest rank over contexts) / (V − 1), between 0 and 1.

    Raises:
        TooFewValuesError: V < 2.

    Source: arXiv 2406.17523, the peak-to-peak part of the THC score.
    """
    n_values = ranks.shape[-2]
    if n_values < 2:
        raise TooFewValuesError(f"THC needs at least two values to rank, got {n_values}")
    return np.asarray(np.ptp(ranks, axis=-1) / (n_values - 1))


def thc_statistic(scores: Floats, method: Method) -> Floats:
    """THC of every leading index of scores (..., V, R, C, T), shape (...).

    0: the ranking of the values never changes over the contexts. 1: every value is the best
    somewhere and the worst elsewhere. The null expectation is above 0 and grows with C.
    """
    return np.asarray(rank_spread(method.ranks(*method.intervals(scores))).mean(axis=-1))
