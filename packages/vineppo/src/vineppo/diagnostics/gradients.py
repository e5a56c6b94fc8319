"""How much a policy gradient varies from one batch to the next, and where it points."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from vineppo.diagnostics.arrays import Floats, floats
from vineppo.diagnostics.intervals import POSITIVE, Interval, Resampling, ratios
from vineppo.errors import InvalidInputError, at_least

_STREAM: Final = 0x67726164
_RANGE: Final = (-1.0, 1.0)

BatchGradient = Callable[[npt.NDArray[np.int64]], Any]
"""From the numbers of the samples of a batch, repeated or not, to their mean gradient (D,)."""


@dataclass(frozen=True)
class GradientVariance:
    """Spread of the mean gradient of a batch.

    Attributes:
        variance: trace of its covariance, i.e. the sum over parameters of their variances, over
            resampled batches; the interval is over resamples, for the samples as they are.
        exact: what ``variance`` tends to with many resamples: trace of the covariance of single
            samples (divisor N) / batch size. The interval is over samples, so it tells how far
            the variance is known. None where only batches were asked for.
        signal: squared length of the mean over resamples without the part that is noise,
            ‖mean‖² - variance / resamples; around 0 where batches know nothing in common.
        cosine: of a batch's gradient with the reference, mean over resamples; None without one.
    """

    variance: Interval
    exact: Interval | None
    signal: float
    cosine: Interval | None


def gradient_variance(
    gradients: npt.ArrayLike | BatchGradient,
    *,
    samples: int | None = None,
    resamples: int = 32,
    size: int = 32,
    reference: npt.ArrayLike | None = None,
    level: float = 0.95,
    seed: int = 0,
) -> GradientVariance:
    """Variance of a batch's gradient by bootstrap: 32 batches of 32 in the reference code.

    Args:
        gradients: (N, D), of single samples; or a function from the numbers of a batch, (size,), to
            its mean gradient (D,), for models whose N gradients do not fit into memory.
        samples: N, with a function.
        resamples: batches drawn, at least 2.
        size: samples of a batch, drawn with replacement.
        reference: (D,) a gradient to compare directions with, e.g. the exact one; not zero.
        level: confidence of the intervals.
        seed: of the draw.

    Returns:
        The variance, and what goes with it. A batch whose gradient is zero has cosine 0.

    Raises:
        InvalidInputError: shapes that do not fit, numbers that are not finite, or one out of range.
    """
    at_least("resamples", resamples, 2)
    at_least("size", size, 1)
    how = Resampling(level, seed=seed)
    if callable(gradients):
        if samples is None:
            raise InvalidInputError(
                "samples: expected the number of samples that the function knows, got None"
            )
        at_least("samples", samples, 1)
        single = None
        total = samples
    else:
        single = floats("gradients", gradients, (None, None))
        total = len(single)
    rng = np.random.default_rng((seed, _STREAM))
    batches = rng.integers(total, size=(resamples, size))
    if single is None:
        assert callable(gradients)
        first = floats("gradients", gradients(batches[0]))
        rest = (floats("gradients", gradients(batch), first.shape) for batch in batches[1:])
        drawn = np.stack([first, *rest])
    else:
        drawn = np.stack([single[batch].mean(axis=0) for batch in batches])
    centre = drawn.mean(axis=0)
    spread = resamples / (resamples - 1) * ((drawn - centre) ** 2).sum(axis=1)
    variance = _mean(spread, POSITIVE, how)
    return GradientVariance(
        variance,
        None if single is None else _exact(single, size, how),
        float(centre @ centre - variance.value / resamples),
        None if reference is None else _cosine(drawn, reference, how),
    )


def _exact(single: Floats, size: int, how: Resampling) -> Interval:
    apart = ((single - single.mean(axis=0)) ** 2).sum(axis=1)
    return _mean(apart / size, POSITIVE, how)


def _cosine(drawn: Floats, reference: npt.ArrayLike, how: Resampling) -> Interval:
    towards = floats("reference", reference, (drawn.shape[1],))
    if not towards.any():
        raise InvalidInputError("reference: expected a gradient with a direction, got zero")
    lengths = np.linalg.norm(drawn, axis=1)
    along = drawn @ (towards / np.linalg.norm(towards))
    return _mean(along / np.where(lengths > 0, lengths, 1), _RANGE, how)


def _mean(values: Floats, bounds: tuple[float, float], how: Resampling) -> Interval:
    column = values[:, None]
    return ratios(column, np.ones_like(column), np.arange(len(values)), [bounds], how)[0]
