"""Log-probabilities of given tokens out of logits, without float32 copies of a whole vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# How many logits are held in float32 at one time: 64 MiB.
_CHUNK = 2**24


def naive_selective_log_softmax(
    logits: Tensor, ids: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """The definition of :func:`selective_log_softmax`, which differs in memory alone."""
    logs = (logits.to(_working_dtype(logits)) / temperature).log_softmax(-1)
    entropies = torch.special.entr(logs.exp()).sum(-1).detach()
    return logs.gather(-1, ids[..., None])[..., 0], entropies


def selective_log_softmax(
    logits: Tensor, ids: Tensor, temperature: float, *, entropy: bool = False
) -> tuple[Tensor, Tensor]:
    """log softmax(logits / temperature) at one id per position.

    For the backward pass the logits are kept as they came and their softmax is made anew, a few
    rows at a time; differentiable once.

    Args:
        logits: (n, L, vocabulary), of any floating dtype; −inf where an id is impossible.
        ids: (n, L) int64.
        temperature: positive.
        entropy: compute entropies, too.

    Returns:
        (n, L) log-probabilities in float32, or float64 for such logits, and (n, L) entropies in
        nats without gradient (zeros unless asked for).
    """
    logps, entropies = _Selected.apply(logits, ids, temperature, entropy)
    return logps, entropies


class _Selected(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, ids: Tensor, temperature: float, entropy: bool
    ) -> tuple[Tensor, Tensor]:
        logps = torch.empty(ids.shape, dtype=_working_dtype(logits), device=logits.device)
        norms = torch.empty_like(logps)
        entropies = torch.zeros_like(logps)
        for rows in _pieces(logits):
            scaled = logits[rows].to(logps.dtype) / temperature
            norms[rows] = scaled.logsumexp(-1)
            logps[rows] = scaled.gather(-1, ids[rows][..., None])[..., 0] - norms[rows]
            if entropy:
                probabilities = (scaled - norms[rows][..., None]).exp()
                entropies[rows] = torch.special.entr(probabilities).sum(-1)
        ctx.save_for_backward(logits, ids, norms)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropies)
        return logps, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        logits, ids, norms = ctx.saved_tensors
        result = torch.empty_like(logits)
        for rows in _pieces(logits):
            share = grad[rows][..., None] / ctx.temperature
            chosen = ids[rows][..., None]
            scaled = logits[rows].to(norms.dtype) / ctx.temperature
            pulled = (scaled - norms[rows][..., None]).exp_().mul_(-share)
            result[rows] = pulled.scatter_(-1, chosen, pulled.gather(-1, chosen) + share)
        return result, None, None, None


def _working_dtype(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _pieces(logits: Tensor) -> list[slice]:
    rows = max(1, _CHUNK // max(1, logits[0].numel()))
    return [slice(start, start + rows) for start in range(0, len(logits), rows)]
