"""Does a value function know which of several next steps is the best, and which is the better?

Ties decide what chance is worth. Estimates from nine rollouts tie often, and truths are tied where
all continuations succeed or all fail. Counting each tie as a mistake, as a strict product of signs
does, puts a random guess below one half and punishes coarse estimates twice; so here a tied
prediction is worth what picking at random among the tied would be, and tied truths set no task.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from vineppo.diagnostics.arrays import Floats, floats
from vineppo.errors import InvalidInputError, at_least

_ROUNDING: Final = 1e-12  # of the largest number; exact values that are equal differ by less


class SetScores(NamedTuple):
    """Scores of S sets of candidates, (S,) each.

    Attributes:
        top1: chance that the candidate predicted best is truly a best one, picking at random among
            the predicted best; NaN where all candidates are truly equal, and none can be missed.
        chance: of a random pick: number of the truly best / number of candidates, so 1/m for m
            candidates without ties; NaN as ``top1``.
        agreements: pairs in the predicted order; a predicted tie counts one half.
        pairs: pairs whose truths differ, out of which these are.
        strict: pairs with (difference of predictions) · (difference of truths) > 0.
        all_pairs: m (m − 1) / 2, out of which those are.
    """

    top1: Floats
    chance: Floats
    agreements: Floats
    pairs: Floats
    strict: Floats
    all_pairs: Floats


def score_sets(
    predictions: npt.ArrayLike,
    truth: npt.ArrayLike,
    sizes: npt.ArrayLike,
    *,
    standard_errors: npt.ArrayLike | None = None,
    resolution: float = 0.0,
) -> SetScores:
    """Score every set of candidates by itself.

    Args:
        predictions: (C,) of all candidates, set after set.
        truth: (C,) in the same order.
        sizes: (S,) candidates of each set, at least 2; they sum to C.
        standard_errors: (C,) of the truth; needed for a ``resolution`` above 0.
        resolution: truths count as tied up to so many standard errors of their difference. At 0
            only equal ones do, and where two truths are closer than their noise, their order is
            partly that of the noise, which no value function can know.

    Raises:
        InvalidInputError: lengths that do not fit, or a number that is not finite.
    """
    x = floats("predictions", predictions)
    y = floats("truth", truth, x.shape)
    counts = floats("sizes", sizes).astype(np.int64)
    if counts.min() < 2 or counts.sum() != len(x):
        raise InvalidInputError(
            f"sizes: expected numbers of at least 2 that sum to {len(x)}, the number of "
            f"candidates, got a smallest of {counts.min()} and a sum of {counts.sum()}"
        )
    at_least("resolution", resolution, 0)
    if resolution and standard_errors is None:
        raise InvalidInputError("standard_errors: expected those of the truth, got None")
    noise = (
        np.zeros_like(y)
        if standard_errors is None
        else floats("standard_errors", standard_errors, x.shape)
    )
    starts = np.cumsum(counts) - counts
    scores = SetScores(*(np.empty(len(counts)) for _ in SetScores._fields))
    near = (_ROUNDING * np.abs(x).max(), _ROUNDING * np.abs(y).max())
    for m in np.unique(counts):
        sets = np.flatnonzero(counts == m)
        places = starts[sets, None] + np.arange(m)
        found = _equal_sized(x[places], y[places], resolution * noise[places], near)
        for into, part in zip(scores, found, strict=True):
            into[sets] = part
    return scores


def _equal_sized(x: Floats, y: Floats, noise: Floats, near: tuple[float, float]) -> SetScores:
    """Of sets of m candidates each; all arguments (S, m)."""
    n, m = x.shape
    predicted_best = x.max(axis=1, keepdims=True) - x <= near[0]
    best = y.argmax(axis=1)[:, None]
    apart = np.take_along_axis(y, best, axis=1) - y
    # What is subtracted from itself has no noise, but is 0 and passes anyway.
    truly_best = apart <= np.hypot(np.take_along_axis(noise, best, axis=1), noise) + near[1]
    hits = (predicted_best & truly_best).sum(axis=1) / predicted_best.sum(axis=1)
    chance = truly_best.mean(axis=1)
    no_task = truly_best.all(axis=1)

    i, j = np.triu_indices(m, 1)
    dx, dy = x[:, i] - x[:, j], y[:, i] - y[:, j]
    dx = np.where(np.abs(dx) <= near[0], 0, np.sign(dx))
    dy = np.where(np.abs(dy) <= near[1], 0, np.sign(dy))
    product = dx * dy
    differ = np.abs(y[:, i] - y[:, j]) > np.hypot(noise[:, i], noise[:, j]) + near[1]
    return SetScores(
        top1=np.where(no_task, np.nan, hits),
        chance=np.where(no_task, np.nan, chance),
        agreements=np.where(differ, (product + 1) / 2, 0).sum(axis=1),
        pairs=differ.sum(axis=1).astype(np.float64),
        strict=(product > 0).sum(axis=1).astype(np.float64),
        all_pairs=np.full(n, m * (m - 1) / 2),
    )


def naive_scores(predictions: list[float], truth: list[float]) -> tuple[float, ...]:
    """One set, by the definitions: the oracle of :func:`score_sets` at resolution 0.

    Args:
        predictions: of the candidates; equal or far apart.
        truth: likewise.

    Returns:
        In the order of :class:`SetScores`.
    """
    m = len(truth)
    chosen = [k for k in range(m) if predictions[k] == max(predictions)]
    best = [k for k in range(m) if truth[k] == max(truth)]
    agreements = strict = 0.0
    pairs = all_pairs = 0
    for i in range(m):
        for j in range(i):
            all_pairs += 1
            strict += (predictions[i] - predictions[j]) * (truth[i] - truth[j]) > 0
            if truth[i] == truth[j]:
                continue
            pairs += 1
            if predictions[i] == predictions[j]:
                agreements += 0.5
            elif (predictions[i] > predictions[j]) == (truth[i] > truth[j]):
                agreements += 1
    if len(best) == m:
        return (float("nan"), float("nan"), agreements, pairs, strict, all_pairs)
    top1 = sum(k in best for k in chosen) / len(chosen)
    return (top1, len(best) / m, agreements, pairs, strict, all_pairs)
