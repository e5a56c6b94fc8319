"""What transformers' attention layers are told about padding and packing.

transformers makes the mask of a batch once per forward pass and hands it to every layer. Stick
breaking is causal by itself and needs much less than a matrix of it, so what is made here is:

- None: every query sees all keys before it, and the last query is the last key's token;
- a bool tensor `[batch, keys]`: True where a key is valid. Keys beyond its width are slots of a
  static cache that no token has filled;
- an int32 tensor `[sequences + 1]`: the offsets of sequences packed into the rows of the batch.

Whatever does not fit one of these is refused. Facts about values are read here, once per pass, and
not in the layers; a program that is being compiled reads none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sbattn.errors import InvalidInputError, UnsupportedError
from sbattn.integrations.rotary import warn_if_rotating

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def stickbreaking_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction | None = None,
    attention_mask: Tensor | None = None,
    *,
    config: Any = None,
    use_vmap: bool = False,
    allow_is_causal_skip: bool = True,
    device: Any = None,
    **_: Any,
) -> Tensor | None:
    """The mask function registered with transformers' `AttentionMaskInterface`.

    `mask_function(batch, head, query, key)` is transformers' rule of who sees whom, without the
    padding; `attention_mask` `[batch, tokens seen so far]` has True at tokens that are no padding.

    Raises:
        UnsupportedError: a mask that is not causal, is the model's own, or attends in chunks.
        InvalidInputError: padding that leaves gaps between the tokens of a row, or a mask of
            another shape.
    """
    if use_vmap:
        raise UnsupportedError(
            "attention mask: this model adds a mask of its own to the causal one; stick breaking "
            "needs each query to see one run of keys, so use a model with plain causal attention"
        )
    if getattr(config, "attention_chunk_size", None) is not None:
        raise UnsupportedError(
            f"attention_chunk_size={config.attention_chunk_size}: attention in chunks is not "
            "supported; set it to None, or use sliding_window"
        )
    warn_if_rotating(config)
    # transformers clears `allow_is_causal_skip` where the rule is more than causal or windowed.
    fresh = q_length == kv_length and isinstance(q_offset, int) and q_offset == 0
    plain = allow_is_causal_skip or torch.compiler.is_compiling()
    if mask_function is not None and fresh and not plain:
        offsets = _packed_offsets(mask_function, batch_size, q_length, device)
        if offsets is not None and attention_mask is None:
            return offsets
    return _valid_keys(attention_mask, batch_size, q_length, kv_length, q_offset, kv_offset, device)


def _packed_offsets(rule: MaskFunction, batch_size: int, length: int, device: Any) -> Tensor | None:
    """Offsets of the packed sequences, by asking the rule about neighbours only.

    A token that does not see its predecessor starts a sequence.
    """
    if length < 2:
        return None
    rows = torch.arange(batch_size, device=device)[:, None]
    later = torch.arange(1, length, device=device)[None]
    head = torch.zeros((), dtype=torch.long, device=device)
    if bool(rule(rows, head, later - 1, later).any()):
        raise UnsupportedError(
            "attention mask: a token sees a later one (bidirectional, prefix or block attention); "
            "stick breaking is causal only, so use a causal model"
        )
    starts = ~rule(rows, head, later, later - 1).expand(batch_size, length - 1)
    if not bool(starts.any()):
        return None
    starts = torch.nn.functional.pad(starts, (1, 0), value=True)
    offsets = starts.flatten().nonzero().flatten()
    return torch.nn.functional.pad(offsets, (0, 1), value=batch_size * length).int()


def _valid_keys(
    attention_mask: Tensor | None,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor,
    kv_offset: int,
    device: Any,
) -> Tensor | None:
    """The bool mask of valid keys, or None where it would say nothing."""
    if q_length > 1:
        # The layers need to know where several queries stand. Only a static cache that already
        # holds tokens keeps its length on the device; reading it is one wait per prefill.
        q_offset = int(q_offset)
    filled = q_offset + q_length - kv_offset  # slots in use, with the current tokens
    valid = None
    if attention_mask is not None:
        if attention_mask.ndim != 2 or attention_mask.shape[0] != batch_size:
            raise InvalidInputError(
                "attention_mask: expected a mask [batch, tokens] that is 1 at tokens and 0 at "
                f"padding, got shape {tuple(attention_mask.shape)} for a batch of {batch_size}"
            )
        valid = attention_mask[:, -kv_length:].bool()
        _check_cover(attention_mask, q_length, q_offset)
        valid = torch.nn.functional.pad(valid, (0, kv_length - valid.shape[1]))
    if isinstance(filled, Tensor):
        used = torch.arange(kv_length, device=filled.device)[None] < filled
        return used.expand(batch_size, -1) if valid is None else valid & used
    if valid is None:
        if filled == kv_length:
            return None
        return torch.ones((batch_size, filled), dtype=torch.bool, device=device)
    valid = valid[:, :filled]
    if torch.compiler.is_compiling():
        return valid
    if filled == kv_length and bool(valid.all()):
        return None
    _check_one_run(valid)
    return valid


def _check_cover(attention_mask: Tensor, q_length: int, q_offset: int | Tensor) -> None:
    if isinstance(q_offset, int) and attention_mask.shape[1] < q_offset + q_length:
        raise InvalidInputError(
            f"attention_mask: expected one column for each of the {q_offset + q_length} tokens so "
            f"far, cached ones included, got {attention_mask.shape[1]}"
        )


def _check_one_run(valid: Tensor) -> None:
    runs = valid[:, :1].sum(1) + (valid[:, 1:] & ~valid[:, :-1]).sum(1)
    if bool((runs > 1).any()):
        row = int((runs > 1).int().argmax())
        raise InvalidInputError(
            f"attention_mask: expected the tokens of each row in one run, row {row} has padding "
            "between them; pad on the left to generate, on one side to train"
        )
