"""How far a policy is from its reference: divergence, and perplexity in its place."""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import torch
from torch import Tensor

from asyncrlhf.errors import InvalidInputError
from asyncrlhf.sequences import kl_estimates

_LARGEST_LOG: Final = 700.0  # exp of it is finite in float64


class Mean(NamedTuple):
    """A mean over answers and its standard error (infinite with a single answer)."""

    value: float
    standard_error: float


class KL(NamedTuple):
    """Three estimates of the divergence from policy to reference, in nats per answer.

    ``k1``, the mean of log(pi/ref), and ``k3``, which adds ref/pi - 1 to it, are unbiased; every
    term of ``k3`` is at least 0, and it varies less where the two are close. ``k2``, half the mean
    square of the logarithm, is biased.
    """

    k1: Mean
    k2: Mean
    k3: Mean


def kl(logps: Tensor, ref_logps: Tensor, mask: Tensor) -> KL:
    """Divergence of the policy that drew the answers from the reference.

    Log-probabilities of both must be at the temperature at which the answers were drawn. Each
    answer gives the sum over its tokens; the mean over answers estimates the divergence of whole
    answers, averaged over prompts.

    Args:
        logps: ``[n, L]`` of the policy.
        ref_logps: ``[n, L]`` of the reference.
        mask: ``[n, L]`` bool, the tokens that count.

    Raises:
        InvalidInputError: shapes that differ, no answer, or a value under the mask that is not
            finite.
    """
    ours, theirs = _masked("logps", logps, mask), _masked("ref_logps", ref_logps, mask)
    estimates = kl_estimates(ours, theirs, mask)
    return KL(
        mean_of(estimates.sequence_k1),
        mean_of((estimates.k1.square() / 2).sum(dim=1)),
        mean_of(estimates.sequence_k3),
    )


def reference_perplexity(ref_logps: Tensor, mask: Tensor) -> Mean:
    """Perplexity of a policy's answers under the reference: a measure of drift.

    The mean over answers of exp(mean negative log-likelihood of their tokens).

    Args:
        ref_logps: ``[n, L]`` of the reference, at temperature 1.
        mask: ``[n, L]`` bool, the tokens that count; at least one per answer.

    Raises:
        InvalidInputError: shapes that differ, an answer without a token, or a value under the mask
            that is not finite.
    """
    logps = _masked("ref_logps", ref_logps, mask)
    sizes = mask.sum(dim=1)
    if bool((sizes == 0).any()):
        row = int((sizes == 0).nonzero()[0])
        raise InvalidInputError(
            f"mask: expected at least one token per answer, got none in row {row}; leave it out"
        )
    return mean_of((-logps.sum(dim=1) / sizes).clamp(max=_LARGEST_LOG).exp())


def mean_of(values: Tensor) -> Mean:
    """Mean and standard error of ``[n]`` numbers."""
    n = len(values)
    error = float(values.double().std()) / math.sqrt(n) if n > 1 else math.inf
    return Mean(float(values.double().mean()), error)


def _masked(name: str, logps: Tensor, mask: Tensor) -> Tensor:
    """In float64, zero outside the mask, where anything may stand."""
    if logps.shape != mask.shape or logps.ndim != 2 or not len(logps) or mask.dtype != torch.bool:
        raise InvalidInputError(
            f"{name}, mask: expected shapes (n, L), n at least 1, and a bool mask, got "
            f"{tuple(logps.shape)} and {tuple(mask.shape)} {mask.dtype}"
        )
    found = logps.detach().double().masked_fill(~mask, 0.0)
    if not bool(found.isfinite().all()):
        row, column = (int(i) for i in (~found.isfinite()).nonzero()[0])
        raise InvalidInputError(
            f"{name}: expected finite numbers under the mask, got {float(found[row, column])} at "
            f"row {row}, token {column}"
        )
    return found
