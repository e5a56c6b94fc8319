"""One interval per value and context from the scores of independent runs."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import scipy
from numpy.typing import NDArray

from hpreliability.errors import ShapeError, TooFewRunsError

IntervalMethod = Literal["mean_std", "mean_sem", "t", "mean", "median", "iqm"]
Floats = NDArray[np.float64]
_ELEMENTS_PER_CHUNK = 1 << 18


def score_intervals(
    scores: Floats,
    method: IntervalMethod = "mean_std",
    *,
    level: float = 0.95,
    resamples: int = 5000,
    seed: int = 0,
) -> tuple[Floats, Floats]:
    """Lower and upper bound of the score of every value in every context.

    Args:
        scores: shape (..., V, R, C, T): values, runs, contexts, and T tasks that are pooled inside
            a context (1 where there are none). NaN marks a run that does not exist: cells may
            have unequal numbers of runs, but a run that exists has all its tasks.
        method: `"mean_std"` (the paper's: mean ± population standard deviation over runs),
            `"mean_sem"` (mean ± standard error), `"t"` (Student interval of the mean), or a
            percentile bootstrap interval of the `"mean"`, `"median"` or `"iqm"` over all tasks and
            runs, runs resampled independently in each task. The first three average the tasks of
            each run first.
        level: coverage that `"t"` and the bootstrap methods aim at.
        resamples: number of bootstrap replicates.
        seed: seed of the bootstrap; the result does not depend on how replicates are chunked.

    Returns:
        Two arrays of shape (..., V, C).

    Raises:
        ShapeError: fewer than four axes, or a run that lacks some of its tasks.
        TooFewRunsError: a cell has no run, or one run where a spread of the mean is needed.
        ValueError: an unknown method, or `level`, `resamples` out of range.

    Source: Section 2.1 of the paper's public analysis code (arXiv 2406.17523) for `"mean_std"` and,
    for axes that pool games, `"iqm"`.
    """
    if scores.ndim < 4:
        raise ShapeError(f"scores must have shape (..., V, R, C, T), got {scores.shape}")
    if method not in get_args(IntervalMethod):
        raise ValueError(f"interval must be one of {get_args(IntervalMethod)}, got {method!r}")
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}")
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    exists = ~np.isnan(scores)
    if (exists.any(axis=-1) != exists.all(axis=-1)).any():
        raise ShapeError("a run must have a score in every pooled task, or in none")
    count = exists[..., 0].sum(axis=-2)
    if (count == 0).any():
        raise TooFewRunsError("every value needs at least one run in every context")
    if method in ("mean_std", "mean_sem", "t"):
        return _around_mean(scores.mean(axis=-1), count, method, level)
    return _bootstrap(scores, method, level, resamples, seed)


def _around_mean(
    runs: Floats, count: NDArray[np.int_], method: IntervalMethod, level: float
) -> tuple[Floats, Floats]:
    """Symmetric interval around the mean of runs (..., V, R, C)."""
    # Plain sums are several times faster than the nan-functions and nulls call this often.
    if np.isnan(runs).any():
        mean = np.nanmean(runs, axis=-2)
        spread = np.nanstd(runs, axis=-2)
    else:
        mean = runs.mean(axis=-2)
        spread = runs.std(axis=-2)
    if method != "mean_std":
        if (count < 2).any():
            raise TooFewRunsError(f"interval {method!r} needs two runs in every cell, got one")
        spread = spread / np.sqrt(count - 1)
        if method == "t":
            spread = spread * scipy.stats.t.ppf((1 + level) / 2, count - 1)
    return mean - spread, mean + spread


def _bootstrap(
    scores: Floats, method: IntervalMethod, level: float, resamples: int, seed: int
) -> tuple[Floats, Floats]:
    *lead, n_values, n_runs, n_contexts, n_tasks = scores.shape
    cells = np.moveaxis(scores, -3, -2).reshape(-1, n_runs, n_tasks)
    counts = (~np.isnan(cells[:, :, 0])).sum(axis=1)
    tails = [(1 - level) / 2, (1 + level) / 2]
    bounds = np.empty((len(cells), 2))
    for count in np.unique(counts):
        # Every cell draws the same indices: common random numbers make equal cells give equal
        # intervals, and a cell's interval does not depend on which others are scored with it.
        picks = np.random.default_rng(seed).integers(count, size=(resamples, count, n_tasks))
        flat = (picks * n_tasks + np.arange(n_tasks)).reshape(resamples, -1)
        equal = np.flatnonzero(counts == count)
        step = max(1, _ELEMENTS_PER_CHUNK // flat.size)
        for chunk in (equal[start : start + step] for start in range(0, len(equal), step)):
            block = cells[chunk]
            runs = block[~np.isnan(block)].reshape(len(chunk), -1)
            # take, unlike indexing, fixes the memory layout and with it the order of summation:
            # results must not depend in their last bits on how cells are grouped.
            replicates = _reduce(np.take(runs, flat, axis=1), method)
            bounds[chunk] = np.quantile(replicates, tails, axis=-1).T
    bounds = bounds.reshape(*lead, n_values, n_contexts, 2)
    return bounds[..., 0], bounds[..., 1]


def _reduce(replicates: Floats, method: IntervalMethod) -> Floats:
    """Statistic over the last axis of `replicates`, which may be sorted in place."""
    if method == "mean":
        return np.asarray(replicates.mean(axis=-1))
    size = replicates.shape[-1]
    # Sorting rows in place beats a partition at these lengths (tens to hundreds).
    replicates.sort(axis=-1)
    cut = size // 4 if method == "iqm" else (size - 1) // 2
    return np.asarray(replicates[..., cut : size - cut].mean(axis=-1))
