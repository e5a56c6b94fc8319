"""Aggregates of scores over runs and tasks, with stratified bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from hpreliability.errors import NonFiniteScoreError, ShapeError
from hpreliability.intervals import Floats

_ELEMENTS_PER_CHUNK = 1 << 20


@dataclass(frozen=True)
class Estimate:
    """A number and its confidence interval.

    Attributes:
        value: the statistic of the data.
        low, high: bounds of the interval.
        level: coverage the interval aims at.
    """

    value: float
    low: float
    high: float
    level: float


def iqm(scores: Floats) -> Floats:
    """Interquartile mean: the mean of the middle half of all runs of all tasks.

    Args:
        scores: shape (..., runs, tasks), on a scale that tasks share.

    Returns:
        Shape (...). Of n numbers, the n // 4 smallest and largest are left out, as
        `scipy.stats.trim_mean(x, 0.25)` does.

    Source: Agarwal et al. 2021 (arXiv 2108.13264).
    """
    pooled = _checked(scores)
    ordered = np.sort(pooled.reshape(*pooled.shape[:-2], -1), axis=-1)
    size = ordered.shape[-1]
    return np.asarray(ordered[..., size // 4 : size - size // 4].mean(axis=-1))


def mean(scores: Floats) -> Floats:
    """Mean over runs and tasks; scores (..., runs, tasks) to (...)."""
    return np.asarray(_checked(scores).mean(axis=(-2, -1)))


def median(scores: Floats) -> Floats:
    """Median over tasks of each task's mean over runs; scores (..., runs, tasks) to (...)."""
    return np.asarray(np.median(_checked(scores).mean(axis=-2), axis=-1))


def optimality_gap(scores: Floats, target: float = 1.0) -> Floats:
    """Mean shortfall below a target score; scores (..., runs, tasks) to (...). Lower is better.

    Source: Agarwal et al. 2021 (arXiv 2108.13264).
    """
    return np.asarray(np.maximum(target - _checked(scores), 0).mean(axis=(-2, -1)))


def stratified_bootstrap(
    scores: Floats,
    statistic: Callable[[Floats], Floats] = iqm,
    *,
    level: float = 0.95,
    replicates: int = 2000,
    seed: int = 0,
    chunk: int | None = None,
) -> Estimate:
    """Percentile bootstrap interval of an aggregate, runs resampled independently in each task.

    Args:
        scores: shape (runs, tasks).
        statistic: maps (..., runs, tasks) to (...), such as `iqm`, `mean`, `median` or
            `optimality_gap`.
        level: coverage the interval aims at.
        replicates: number of bootstrap replicates.
        seed: seed of the resampling.
        chunk: replicates held in memory at once; the result does not depend on it.

    Raises:
        ShapeError: scores are not two-dimensional, or empty.
        NonFiniteScoreError: a score is NaN or infinite.
        ValueError: `level`, `replicates` or `chunk` out of range.

    Source: Agarwal et al. 2021 (arXiv 2108.13264).
    """
    scores = _checked(scores)
    if scores.ndim != 2:
        raise ShapeError(f"scores must have shape (runs, tasks), got {scores.shape}")
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}")
    chunk = max(1, _ELEMENTS_PER_CHUNK // scores.size) if chunk is None else chunk
    for name, number in {"replicates": replicates, "chunk": chunk}.items():
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    rng = np.random.default_rng(seed)
    drawn = np.empty(replicates)
    for start in range(0, replicates, chunk):
        stop = min(start + chunk, replicates)
        picks = (rng.random((stop - start, *scores.shape)) * len(scores)).astype(np.intp)
        drawn[start:stop] = statistic(np.take_along_axis(scores[None], picks, axis=1))
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(statistic(scores)), float(low), float(high), level)


def performance_profile(scores: Floats, thresholds: ArrayLike) -> Floats:
    """Share of runs that score more than each threshold, tasks weighted equally.

    Args:
        scores: shape (..., runs, tasks).
        thresholds: shape (K,).

    Returns:
        Shape (..., K).

    Source: the score distributions of Agarwal et al. 2021 (arXiv 2108.13264).
    """
    levels = np.asarray(thresholds, dtype=np.float64)
    if levels.ndim != 1:
        raise ShapeError(f"thresholds must be one-dimensional, got shape {levels.shape}")
    above = _checked(scores)[..., None] > levels
    return np.asarray(above.mean(axis=(-3, -2)))


def probability_of_improvement(better: Floats, worse: Floats) -> float:
    """Chance that a run of the first beats one of the second in the same task, ties halved.

    Args:
        better: shape (runs, tasks).
        worse: shape (other runs, tasks), the same tasks in the same order.

    Returns:
        Mean over tasks of P(better > worse) + P(equal) / 2.

    Raises:
        ShapeError: not two-dimensional, or different numbers of tasks.

    Source: Agarwal et al. 2021 (arXiv 2108.13264); per task it is the Mann–Whitney statistic
    divided by its largest value.
    """
    first, second = _checked(better), _checked(worse)
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        raise ShapeError(
            f"both need shape (runs, tasks) over the same tasks, got {first.shape} "
            f"and {second.shape}"
        )
    sign = np.sign(first[:, None] - second[None])
    return float((sign.mean() + 1) / 2)


def _checked(scores: ArrayLike) -> Floats:
    array = np.asarray(scores, dtype=np.float64)
    if array.ndim < 2 or array.size == 0:
        raise ShapeError(f"scores must have shape (..., runs, tasks), got {array.shape}")
    if not np.isfinite(array).all():
        raise NonFiniteScoreError(
            f"{int((~np.isfinite(array)).sum())} of {array.size} scores are NaN or infinite; "
            "drop those runs or replace them by the worst score"
        )
    return array
