"""What the THC score would be if the values of a hyper-parameter did not matter."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from hpreliability.consistency import Method, thc_statistic
from hpreliability.errors import ShapeError
from hpreliability.intervals import Floats

# Scores are means of at most a few dozen multiples of 1/(2(V-1)); summing them in another order
# moves the last bits, and equal scores must count as equal.
_TIE = 1e-9
_ELEMENTS_PER_CHUNK = 1 << 20
# Keeps these draws apart from those that other parts make from the same seed.
_STREAM = 1


@dataclass(frozen=True)
class Null:
    """A THC score against its permutation null.

    Attributes:
        observed: THC of the data, computed exactly as the samples are.
        samples: shape (permutations,): THC after shuffling the runs among the values.
        mean: mean of the samples: what a hyper-parameter without any effect scores.
        low, high: 5th and 95th percentile of the samples.
        p_value: one-sided, (1 + number of samples at least as large) / (1 + permutations). Valid
            at every level: P(p <= a) <= a when no value matters. Never 0.
        calibrated: (observed - mean) / (1 - mean): 0 at chance level, 1 at most, negative when the
            ranking is steadier than chance; 0 when the null mean is itself 1.
    """

    observed: float
    samples: Floats
    mean: float
    low: float
    high: float
    p_value: float
    calibrated: float


def permutation_null(
    scores: Floats,
    method: Method,
    *,
    permutations: int = 1000,
    seed: int = 0,
    inner_resamples: int = 200,
    chunk: int | None = None,
) -> Null:
    """Compare a THC score with scores of the same runs dealt to the values at random.

    Within each context, whole runs (with all their pooled tasks) are shuffled among the values;
    every cell keeps its number of runs. Contexts are shuffled independently of each other. The
    null hypothesis is that in no context does the value change the distribution of a run.

    Args:
        scores: shape (V, R, C, T); NaN marks a run that does not exist.
        method: the THC statistic.
        permutations: number of shuffles.
        seed: seed of the shuffles.
        inner_resamples: upper limit to the replicates of bootstrap intervals, for the data and for
            every shuffle alike. The p-value stays exact whatever the limit, because the same
            function is applied to all; but `observed` is then not quite the THC at
            `method.resamples`.
        chunk: shuffles held in memory at once; the result does not depend on it.

    Raises:
        ValueError: `permutations`, `inner_resamples` or `chunk` below 1.
        ShapeError, TooFewRunsError, TooFewValuesError: as `thc_statistic`.

    The paper has no null. Its score needs one, because with seven settings that do not differ, 26
    contexts and five runs it averages .16, and with two contexts .02.
    """
    if scores.ndim != 4:
        raise ShapeError(f"scores must have shape (V, R, C, T), got {scores.shape}")
    scores = method.relevant(scores)
    chunk = max(1, _ELEMENTS_PER_CHUNK // max(1, scores.size)) if chunk is None else chunk
    limits = {"permutations": permutations, "inner_resamples": inner_resamples, "chunk": chunk}
    for name, number in limits.items():
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    method = replace(method, resamples=min(method.resamples, inner_resamples))
    observed = float(thc_statistic(scores, method))
    samples = np.empty(permutations)
    rng = np.random.default_rng((seed, _STREAM))
    for start in range(0, permutations, chunk):
        stop = min(start + chunk, permutations)
        samples[start:stop] = thc_statistic(_shuffled(scores, stop - start, rng), method)
    mean = float(samples.mean())
    low, high = np.quantile(samples, [0.05, 0.95])
    as_large = int((samples >= observed - _TIE).sum())
    return Null(
        observed=observed,
        samples=samples,
        mean=mean,
        low=float(low),
        high=float(high),
        p_value=(1 + as_large) / (1 + permutations),
        calibrated=(observed - mean) / (1 - mean) if mean < 1 - _TIE else 0.0,
    )


def _shuffled(scores: Floats, copies: int, rng: np.random.Generator) -> Floats:
    """Independent shuffles, shape (copies, V, R, C, T)."""
    n_values, n_runs, n_contexts, n_tasks = scores.shape
    slots = n_values * n_runs
    runs = scores.reshape(slots, n_contexts, n_tasks)
    absent = np.isnan(runs[..., 0])  # (slots, C)
    # Sorting random keys shuffles; infinite keys keep absent runs at the end, and `ordinal` then
    # hands each existing slot one of the existing runs and each absent slot an absent one.
    keys = rng.random((copies, n_contexts, slots))
    keys[:, absent.T] = np.inf
    deal = np.argsort(keys, axis=-1)
    ordinal = np.argsort(np.argsort(absent, axis=0, kind="stable"), axis=0)  # (slots, C)
    context = np.arange(n_contexts)
    source: NDArray[np.int_] = deal[:, context, ordinal]  # (copies, slots, C)
    return runs[source, context].reshape(copies, n_values, n_runs, n_contexts, n_tasks)
