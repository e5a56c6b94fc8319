"""What an attention layer of transformers calls in the place of its own attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sbattn import functional
from sbattn.decode import stickbreaking_decode
from sbattn.errors import InvalidInputError, UnsupportedError


@dataclass(frozen=True)
class Settings:
    """How a registered name attends.

    Attributes:
        attend_current: whether a token attends to itself.
        remainder: what becomes of the stick that is left: nothing ("none"), or it goes to the
            token's own value ("value").
        skip_tol: see :func:`sbattn.stickbreaking_attention`.
        backend: see :func:`sbattn.stickbreaking_attention`.
    """

    attend_current: bool = False
    remainder: Literal["none", "value"] = "none"
    skip_tol: float | Literal["exact"] = "exact"
    backend: functional.Backend = "auto"

    def __post_init__(self) -> None:
        if self.remainder not in ("none", "value"):
            raise InvalidInputError(
                f'remainder: expected "none" or "value", got {self.remainder!r}; a learned bias '
                "needs parameters, which sbattn.StickBreakingAttention has"
            )

    def of_weights(self) -> dict[str, Any]:
        """The settings that weights are trained for, as kept in `config.stickbreaking`."""
        return {"attend_current": self.attend_current, "remainder": self.remainder}


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    *,
    settings: Settings,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function registered with transformers' `AttentionInterface`.

    Args:
        module: the attention layer.
        query: `[batch, heads, queries, head_dim]`; the queries are the last tokens.
        key: `[batch, key heads, slots, head_dim]`, the cache included.
        value: `[batch, key heads, slots, value_dim]`.
        attention_mask: what :func:`sbattn.integrations.masks.stickbreaking_mask` made.
        sliding_window: transformers' count, which has the token itself in it: with a window of W,
            a token sees the W - 1 before it, and itself only with `attend_current`.
        settings: those of the registered name.

    Returns:
        `[batch, queries, heads, value_dim]`, and None in the place of the weights.

    Raises:
        UnsupportedError: anything that stick breaking does not have; the message names it.
    """
    _refuse(module, dropout, is_causal, kwargs)
    _check_config(module.config, settings)
    window = None if sliding_window is None else sliding_window - 1 + settings.attend_current
    if window is not None and window < 1:
        raise UnsupportedError(
            f"sliding_window={sliding_window}: a token would see nothing; use at least 2"
        )
    offsets_q, offsets_k = kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k")
    if attention_mask is not None and attention_mask.ndim == 1 and offsets_q is None:
        offsets_q = attention_mask
    if offsets_q is not None:
        if attention_mask is not None and attention_mask.ndim > 1:
            raise UnsupportedError(
                "attention_mask and cu_seq_lens_q: a batch is padded or packed, not both; pass one"
            )
        offsets_k = offsets_q if offsets_k is None else offsets_k
        return _attend_packed(query, key, value, offsets_q, offsets_k, scaling, window, settings)
    if attention_mask is not None and (
        attention_mask.ndim != 2 or attention_mask.dtype != torch.bool
    ):
        raise UnsupportedError(
            f"attention_mask of shape {tuple(attention_mask.shape)}: masks of one's own are not "
            "supported, only padding [batch, tokens]; pack sequences through position_ids"
        )
    if attention_mask is None and getattr(module, "layer_idx", 0) == 0:
        _check_positions(kwargs.get("position_ids"), query.shape[2], key.shape[2])
    return _attend_dense(query, key, value, attention_mask, scaling, window, settings)


def _attend_dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    valid: Tensor | None,
    scaling: float | None,
    window: int | None,
    settings: Settings,
) -> tuple[Tensor, None]:
    queries, padding, own = query.shape[2], None, None
    if valid is None and queries == 1 and not torch.is_grad_enabled():
        return _decode(query, key, value, scaling, window, settings)
    if valid is not None:
        # Slots beyond the mask are unused ones of a static cache.
        key, value = key[:, :, : valid.shape[1]], value[:, :, : valid.shape[1]]
        start = valid.int().argmax(1)
        end = start + valid.sum(1)
        if queries == 1:
            # The token itself is the last valid one, wherever that is in a static cache, so the
            # interval says all, and no length has to come from the device.
            own = (end - 1).clamp(min=0)
            end = torch.maximum(own + int(settings.attend_current), start)
            if window is not None:
                start, window = torch.maximum(start, end - window), None
        padding = torch.stack([start, end], dim=1)
    out, rem = functional.stickbreaking_attention(
        query,
        key,
        value,
        scale=scaling,
        attend_current=settings.attend_current,
        enable_gqa=True,
        key_padding=padding,
        window=window,
        skip_tol=settings.skip_tol,
        backend=settings.backend,
    )
    out = out.transpose(1, 2)
    if settings.remainder == "value":
        current = value[:, :, value.shape[2] - queries :]
        if own is not None:
            current = value.take_along_dim(own[:, None, None, None], dim=2)
        out = _give_rest(out, rem.transpose(1, 2), current.transpose(1, 2))
    return out.contiguous(), None


def _decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    window: int | None,
    settings: Settings,
) -> tuple[Tensor, None]:
    """One new token per row on a growing cache without padding: the step made for that."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    out, log_rem = stickbreaking_decode(
        query,
        key,
        value,
        cache_seqlens=key.shape[1],
        scale=scaling,
        attend_current=settings.attend_current,
        window=window,
        skip_tol=settings.skip_tol,
        backend=settings.backend,
    )
    if settings.remainder == "value":
        out = _give_rest(out, log_rem.exp(), value[:, -1:])
    return out, None


def _attend_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets_q: Tensor,
    offsets_k: Tensor,
    scaling: float | None,
    window: int | None,
    settings: Settings,
) -> tuple[Tensor, None]:
    batch, _, length, _ = query.shape
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    offsets_q, offsets_k = offsets_q.int(), offsets_k.int()
    out, rem = functional.stickbreaking_attention_varlen(
        q,
        k,
        v,
        offsets_q,
        offsets_k,
        int(offsets_q.diff().max()),
        int(offsets_k.diff().max()),
        scale=scaling,
        attend_current=settings.attend_current,
        window=window,
        skip_tol=settings.skip_tol,
        backend=settings.backend,
    )
    if settings.remainder == "value":
        out = _give_rest(out, rem, v)
    return out.unflatten(0, (batch, length)), None


def _give_rest(out: Tensor, rem: Tensor, own: Tensor) -> Tensor:
    """`out + rem · own`, heads in the last but one dimension, own values shared by groups."""
    own = own.repeat_interleave(out.shape[-2] // own.shape[-2], dim=-2)
    return torch.addcmul(out.to(rem.dtype), rem[..., None], own.to(rem.dtype)).to(out.dtype)


def _refuse(
    module: torch.nn.Module, dropout: float, is_causal: bool | None, kwargs: dict[str, Any]
) -> None:
    where = type(module).__name__
    if dropout:
        raise UnsupportedError(
            f"{where}: dropout of attention weights ({dropout}) is not supported; set "
            "config.attention_dropout = 0"
        )
    if not (getattr(module, "is_causal", False) if is_causal is None else is_causal):
        raise UnsupportedError(
            f"{where} is not causal; stick breaking is for causal attention only"
        )
    unsupported = {
        "softcap": "logits have no cap in stick breaking; set attn_logit_softcapping = None",
        "s_aux": "attention sinks take the place that the rest of the stick has here",
        "head_mask": "heads cannot be masked",
        "position_bias": "logits have no bias by position",
        "cache": "continuous batching with a paged cache is not supported; use generate()",
        "block_table": "continuous batching with a paged cache is not supported; use generate()",
        "output_attentions": "no matrix of weights is ever made; leave output_attentions False",
    }
    for argument, reason in unsupported.items():
        if kwargs.get(argument) is not None and kwargs[argument] is not False:
            raise UnsupportedError(f"{where} passes {argument}: {reason}")


def _check_config(config: Any, settings: Settings) -> None:
    """Refuse to run weights with other mathematics than `convert` wrote down for them."""
    written = getattr(config, "stickbreaking", None)
    if written is None:
        return
    given = settings.of_weights()
    if written != given:
        raise InvalidInputError(
            f"config.stickbreaking: the model is for {written}, but attn_implementation="
            f"{config._attn_implementation!r} is registered with {given}; register another name "
            "with the model's settings"
        )


def _check_positions(position_ids: Tensor | None, queries: int, keys: int) -> None:
    """Refuse packed sequences that came without their offsets, rather than mix them.

    transformers finds them by their positions, but neither beside a cache nor in a program that
    is being compiled. The first layer looks for all; a compiled program looks when it runs.
    """
    if position_ids is None or position_ids.ndim != 2 or not 1 < queries == keys:
        return
    in_one_run = (position_ids.diff(dim=-1) == 1).all()
    message = (
        "position_ids: expected one sequence per row, got positions that start again or jump; "
        "pass use_cache=False with packed sequences, or cu_seq_lens_q and cu_seq_lens_k to a "
        "compiled model"
    )
    if torch.compiler.is_compiling():
        torch._assert_async(in_one_run, message)
    elif not bool(in_one_run):
        raise InvalidInputError(message)
