"""Log-probabilities of chosen tokens, without a second tensor of the size of the logits.

The log-softmax of all tokens is as large as the logits, and autograd would keep it. Here only its
normaliser is kept, one number per position, and the gradient is made from the logits in pieces.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vineppo.errors import InvalidInputError, positive

_PIECE: Final = 2**22  # logits worked on at once: 16 MiB in float32


def selective_logprobs(logits: Tensor, ids: Tensor, temperature: float = 1.0) -> Tensor:
    """Natural log-probability of each token under the softmax of logits / temperature.

    The arithmetic is in float32, or in float64 if the logits are. Beside the result, forward keeps
    one number per position and the logits themselves; backward allocates their gradient and
    nothing else of that size. Where the incoming gradient is 0, as it is outside a loss's mask,
    the gradient is exactly 0, whatever the logits there. It can be differentiated once.

    Args:
        logits: (B, T, V) or (N, V), a view with any strides; -inf forbids a token.
        ids: (B, T) or (N,) integers from 0 to V - 1, also at places that do not count.
        temperature: T of the sampler. Old, current and reference log-probabilities of one loss
            all use the same.

    Returns:
        (B, T) or (N,), in float32 or float64.

    Raises:
        InvalidInputError: shapes do not fit, an id is outside the vocabulary, or the temperature is
            not above 0.
    """
    _check(logits, ids, temperature)
    ids = ids.long()
    if logits.ndim == 2:
        found: Tensor = _SelectiveLogprobs.apply(logits[None], ids[None], temperature)
        return found[0]
    result: Tensor = _SelectiveLogprobs.apply(logits, ids, temperature)
    return result


def naive_selective_logprobs(logits: Tensor, ids: Tensor, temperature: float = 1.0) -> Tensor:
    """The definition, for logits that fit into memory twice; the oracle of the function above."""
    _check(logits, ids, temperature)
    scaled = logits.to(_working_dtype(logits)) / temperature
    return scaled.log_softmax(-1).gather(-1, ids.long()[..., None])[..., 0]


class _SelectiveLogprobs(torch.autograd.Function):
    """On (B, T, V) and (B, T).

    d log p(id) / d logit_v = (1[v = id] − p(v)) / temperature.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
        normalisers = torch.empty(ids.shape, dtype=_working_dtype(logits), device=logits.device)
        chosen = torch.empty_like(normalisers)
        for part in _parts(logits):
            scaled = logits[part].to(normalisers.dtype) / temperature
            normalisers[part] = scaled.logsumexp(-1)
            chosen[part] = scaled.gather(-1, ids[part].unsqueeze(-1)).squeeze(-1)
        ctx.save_for_backward(logits, ids, normalisers)
        ctx.temperature = temperature
        return chosen - normalisers

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        logits, ids, normalisers = ctx.saved_tensors
        result = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        for part in _parts(logits):
            weight = (grad[part] / ctx.temperature).unsqueeze(-1)
            scaled = logits[part].to(normalisers.dtype) / ctx.temperature
            pull = scaled.sub_(normalisers[part].unsqueeze(-1)).exp_().mul_(-weight)
            pull.scatter_add_(-1, ids[part].unsqueeze(-1), weight)
            result[part] = pull.masked_fill_(weight == 0, 0.0)
        return result, None, None


def _check(logits: Tensor, ids: Tensor, temperature: float) -> None:
    positive("temperature", temperature)
    if logits.ndim not in (2, 3) or ids.shape != logits.shape[:-1]:
        raise InvalidInputError(
            "logits, ids: expected shapes (B, T, V) and (B, T), or (N, V) and (N,), got "
            f"{tuple(logits.shape)} and {tuple(ids.shape)}"
        )
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise InvalidInputError(f"ids: expected integers, got {ids.dtype}")
    if ids.numel():
        # An id outside would end a process on an accelerator without saying which.
        low, high = torch.stack([*ids.aminmax()]).tolist()
        if low < 0 or high >= logits.shape[-1]:
            raise InvalidInputError(
                f"ids: expected from 0 to {logits.shape[-1] - 1}, got {low} to {high}; put any "
                "token of the vocabulary where a place does not count"
            )


def _working_dtype(logits: Tensor) -> torch.dtype:
    dtype: torch.dtype = torch.promote_types(logits.dtype, torch.float32)
    return dtype


def _parts(logits: Tensor) -> Iterator[tuple[slice, slice]]:
    """Cuts of (B, T) into whole rows, or parts of one row, of about :data:`_PIECE` logits."""
    rows, columns, vocabulary = logits.shape
    at_once = max(1, _PIECE // max(1, vocabulary))
    if columns <= at_once:
        height = at_once // max(1, columns)
        for row in range(0, rows, height):
            yield slice(row, row + height), slice(None)
    else:
        for row in range(rows):
            for column in range(0, columns, at_once):
                yield slice(row, row + 1), slice(column, column + at_once)
