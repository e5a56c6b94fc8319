"""Importance weights against what separates the learner from the sampler, and what they cost.

Two things do: the sampler's weights are older, and another engine computes other log-probabilities
from the same weights. The second is there even at staleness 0. Weights are constants: no gradient
flows through them, and a policy-gradient loss multiplies its term by them.

Limits: with ``cap=inf`` the weights are the exact ratios (up to the bound on log-ratios of
:data:`asyncrlhf.sequences.LOG_RATIO_LIMIT`); if in addition both sides give the same
log-probabilities, all weights are exactly 1 and the loss is the unweighted one.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from asyncrlhf.errors import InvalidInputError
from asyncrlhf.sequences import bounded_exp, sequence_logps

Level = Literal["token", "sequence"]
Mode = Literal["truncate", "mask"]


def importance_weights(
    learner_logps: Tensor,
    sampler_logps: Tensor,
    mask: Tensor,
    level: Level = "token",
    mode: Mode = "truncate",
    cap: float = 2.0,
    low: float | None = None,
) -> Tensor:
    """Ratios π_learner / π_sampler, bounded, without gradient.

    Args:
        learner_logps: (n, L) token log-probabilities of the learner.
        sampler_logps: (n, L) of the engine that drew the tokens.
        mask: (n, L) bool.
        level: ``"token"``, one weight per token; ``"sequence"``, the product over its tokens.
        mode: ``"truncate"`` brings ratios to [low, cap] (with ``low=None``: min(ratio, cap));
            ``"mask"`` sets those outside to 0, so their token or sequence is not learnt from.
        cap: the largest ratio; ``inf`` for no bound.
        low: the smallest ratio; None for no bound.

    Returns:
        (n, L), 0 outside the mask, or (n,); a sequence without tokens has the weight 1. In float32
        or float64.

    Raises:
        InvalidInputError: shapes differ, or an option is unknown or out of range.
    """
    for name, value, choices in (("level", level, get_args(Level)), ("mode", mode, get_args(Mode))):
        if value not in choices:
            raise InvalidInputError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
    floor = 0.0 if low is None else low
    if math.isnan(cap) or not 0 <= floor <= cap or cap <= 0:
        raise InvalidInputError(
            f"cap, low: expected 0 <= low <= cap and cap > 0, got cap={cap}, low={low}"
        )
    with torch.no_grad():
        ratios = bounded_exp(_log_ratios(learner_logps, sampler_logps, mask, level))
        if mode == "truncate":
            weights = ratios.clamp(floor, cap)
        else:
            weights = torch.where((ratios >= floor) & (ratios <= cap), ratios, 0.0)
        return torch.where(mask, weights, 0.0) if level == "token" else weights


def sequence_log_ratios(learner_logps: Tensor, sampler_logps: Tensor, mask: Tensor) -> Tensor:
    """log(π_learner / π_sampler) of whole completions, (n,), without gradient and unbounded.

    Args:
        learner_logps: (n, L).
        sampler_logps: (n, L).
        mask: (n, L) bool.

    Raises:
        InvalidInputError: shapes differ.
    """
    return _log_ratios(learner_logps, sampler_logps, mask, "sequence").detach()


def effective_sample_size(log_weights: Tensor, valid: Tensor | None = None) -> Tensor:
    """Share of the samples that weighted ones are worth: (Σw)² / (n Σw²), between 1/n and 1.

    It is 1 where all weights are equal and 1/n where one outweighs all. Computed from logarithms,
    so it holds for ratios that no float can; for weights as such pass ``weights.log()``. Of
    unbounded sequence weights (:func:`sequence_log_ratios`) it says how stale a batch is.

    Args:
        log_weights: any shape; −inf is a weight of 0.
        valid: bool of the same shape, which to count; all by default.

    Returns:
        0-d, without gradient; 0 where there is no weight above 0.

    Raises:
        InvalidInputError: shapes differ.
    """
    if valid is not None and valid.shape != log_weights.shape:
        raise InvalidInputError(
            f"valid: expected shape {tuple(log_weights.shape)}, got {tuple(valid.shape)}"
        )
    logs = log_weights.detach().flatten() if valid is None else log_weights.detach()[valid]
    if not logs.numel():
        return torch.zeros((), device=log_weights.device)
    n = logs.numel()
    top = logs.max()
    relative = (logs - top).exp()
    share = relative.sum().square() / (n * relative.square().sum())
    return torch.where(torch.isneginf(top), 0.0, share.clamp(1 / n, 1.0))


def _log_ratios(learner_logps: Tensor, sampler_logps: Tensor, mask: Tensor, level: Level) -> Tensor:
    for name, x in (("sampler_logps", sampler_logps), ("mask", mask)):
        if x.shape != learner_logps.shape or x.ndim != 2:
            raise InvalidInputError(
                f"{name}: expected the shape (n, L) of learner_logps, "
                f"{tuple(learner_logps.shape)}, got {tuple(x.shape)}"
            )
    dtype = torch.promote_types(learner_logps.dtype, torch.float32)
    differences = torch.where(mask, learner_logps.to(dtype) - sampler_logps, 0.0)
    return differences if level == "token" else sequence_logps(differences, mask)
