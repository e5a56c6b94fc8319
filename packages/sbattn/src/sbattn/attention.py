"""Attention layers: the frame that all of them share, and stick-breaking inside it.

`MultiHeadAttention` projects to heads, rotates them if asked, and feeds the cache; what differs
from layer to layer is `attend`. `StickBreakingAttention` is arXiv 2410.17980's; the baselines are
in `sbattn.baselines`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from sbattn.cache import LayerCache, unchanged_by_failure
from sbattn.checks import check_offsets_form, check_options
from sbattn.decode import stickbreaking_decode
from sbattn.errors import InvalidInputError, UnsupportedError
from sbattn.functional import (
    Backend,
    stickbreaking_attention,
    stickbreaking_attention_varlen,
)
from sbattn.positions import rotate, token_positions

Remainder = Literal["none", "value", "bias"]


@dataclass(frozen=True)
class Call:
    """What a layer was called with; see `MultiHeadAttention.forward`."""

    x: Tensor
    key_padding: Tensor | None
    cu_seqlens: Tensor | None
    max_seqlen: int | None
    cache: LayerCache | None


class MultiHeadAttention(nn.Module):
    """Causal attention with grouped heads: `[B, L, hidden_size]` to the same shape.

    Subclasses say how a query mixes the values, in `attend`.

    Args:
        hidden_size: width `C` of what comes and goes.
        num_heads: query heads.
        num_kv_heads: key and value heads, each serving `num_heads / num_kv_heads` query heads
            (None: as many as query heads).
        head_dim: size of a head (None: `hidden_size / num_heads`).
        bias: whether the four projections have biases.
        scale: factor of the logits (None: `1 / sqrt(head_dim)`).
        rope_theta: base of the rotary position embedding (None: no rotation).

    Raises:
        InvalidInputError: if the sizes do not fit together.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        bias: bool = False,
        scale: float | None = None,
        rope_theta: float | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_heads(hidden_size, num_heads, num_kv_heads, head_dim, rotary=rope_theta is not None)
        if rope_theta is not None and not 0 < rope_theta < math.inf:
            raise InvalidInputError(f"rope_theta: expected None or above 0, got {rope_theta}")
        head_dim = hidden_size // num_heads if head_dim is None else head_dim
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.scale = 1 / math.sqrt(head_dim) if scale is None else scale
        self.rope_theta = rope_theta
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=bias)

    def forward(
        self,
        x: Tensor,
        *,
        key_padding: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Mix tokens, none of which sees a later one.

        Args:
            x: `[B, L, C]`.
            key_padding: which keys count: `[B, 2]` integers, `[start, end)` of each row, or a
                bool mask `[B, keys]` (True: counts) with one run of True per row. `keys` is `L`,
                and what the cache holds before it.
            cu_seqlens: int32 `[N + 1]`, the bounds of `N` sequences packed one after the other
                into the one row of `x`; tokens see their own sequence only.
            max_seqlen: the longest packed sequence, if known; `L` is always right.
            cache: what came before `x`, and will hold `x`, too.

        Returns:
            `[B, L, C]`. What stands at padding has no meaning.

        Raises:
            InvalidInputError: if the shapes do not fit.
            UnsupportedError: if packed sequences are given with a cache.
        """
        self._check(x, key_padding, cu_seqlens, cache)
        past = 0 if cache is None else cache.length
        q, k, v = self.heads(x, token_positions(x.shape[1], x.device, past, cu_seqlens))
        with unchanged_by_failure(cache):
            mixed = self.attend(q, k, v, Call(x, key_padding, cu_seqlens, max_seqlen, cache))
        return self.o_proj(mixed)

    def heads(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `[B, num_heads, L, head_dim]`, and keys and values `[B, num_kv_heads, ...]`."""
        q, k, v = (
            projection(x).unflatten(-1, (heads, self.head_dim)).transpose(1, 2)
            for projection, heads in (
                (self.q_proj, self.num_heads),
                (self.k_proj, self.num_kv_heads),
                (self.v_proj, self.num_kv_heads),
            )
        )
        if self.rope_theta is not None:
            q, k = (rotate(part, positions, self.rope_theta) for part in (q, k))
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """Mixed values, heads side by side: `[B, L, num_heads · head_dim]`."""
        raise NotImplementedError

    def _check(
        self,
        x: Tensor,
        key_padding: Tensor | None,
        cu_seqlens: Tensor | None,
        cache: LayerCache | None,
    ) -> None:
        if x.dim() != 3 or x.shape[-1] != self.hidden_size:
            raise InvalidInputError(
                f"x: expected shape [batch, length, {self.hidden_size}], got {tuple(x.shape)}"
            )
        if cu_seqlens is None:
            return
        check_offsets_form("cu_seqlens", cu_seqlens, "x", x.device)
        if x.shape[0] != 1:
            raise InvalidInputError(
                f"cu_seqlens: packed sequences stand in one row, got a batch of {x.shape[0]}; "
                "concatenate them along the length"
            )
        if key_padding is not None:
            raise InvalidInputError(
                "key_padding: packed sequences have no padding; leave it out, or leave cu_seqlens"
            )
        if cache is not None:
            raise UnsupportedError(
                "cache: packed sequences cannot be decoded; give them as rows, padded on the left"
            )

    def extra_repr(self) -> str:
        """The sizes, for `repr`."""
        return f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}"


class StickBreakingAttention(MultiHeadAttention):
    """Attention in which each query breaks a stick, nearest key first (arXiv 2410.17980).

    It knows order and recency without a position embedding. What is left of the stick, `r_i`, may
    go to the current token's value or to a learned vector per head.

    Args:
        hidden_size: width `C` of what comes and goes.
        num_heads: query heads.
        num_kv_heads: key and value heads (None: as many as query heads).
        head_dim: size of a head (None: `hidden_size / num_heads`).
        remainder: where the rest of the stick goes: "none": nowhere; "value": `+ r_i v_i`;
            "bias": `+ r_i b_h`, with one learned vector per head, zero at first.
        head_norm: whether each head's output is normalised (GroupNorm, one group per head) before
            the output projection.
        attend_current: whether a token sees its own key.
        window: how many positions back a token sees (None: all).
        bias: whether the four projections have biases.
        scale: factor of the logits (None: `1 / sqrt(head_dim)`).
        skip_tol: how small the rest of the stick may be where keys are no longer read; see
            `stickbreaking_attention`.
        backend: see `stickbreaking_attention`.
        rope_theta: base of a rotary position embedding, for ablations (None, the paper's: none).

    Raises:
        InvalidInputError: if the sizes do not fit together, or the remainder is not known.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        remainder: Remainder = "bias",
        head_norm: bool = True,
        attend_current: bool = False,
        window: int | None = None,
        bias: bool = False,
        scale: float | None = None,
        skip_tol: float | Literal["exact"] = "exact",
        backend: Backend = "auto",
        rope_theta: float | None = None,
    ) -> None:
        super().__init__(
            hidden_size,
            num_heads,
            num_kv_heads,
            head_dim,
            bias=bias,
            scale=scale,
            rope_theta=rope_theta,
        )
        check_choice("remainder", remainder, get_args(Remainder))
        check_choice("backend", backend, get_args(Backend))
        check_options(scale, window, skip_tol)
        self.remainder = remainder
        self.attend_current = attend_current
        self.window = window
        self.skip_tol = skip_tol
        self.backend = backend
        if remainder == "bias":
            self.remainder_bias = nn.Parameter(torch.zeros(num_heads, self.head_dim))
        self.head_norm = nn.GroupNorm(num_heads, num_heads * self.head_dim) if head_norm else None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """Mixed values `[B, L, num_heads · head_dim]`, the remainder given away, normalised."""
        mixed, rest = self._break_sticks(q, k, v, call)
        mixed = self._give_remainder(mixed, rest, v).transpose(1, 2).flatten(2)
        if self.head_norm is not None:
            mixed = self.head_norm(mixed.flatten(0, 1)).view(mixed.shape)
        return mixed

    def _break_sticks(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """Mixed values `[B, H, L, D]` and remainders `[B, H, L]`."""
        options: dict[str, Any] = {
            "scale": self.scale,
            "attend_current": self.attend_current,
            "window": self.window,
            "skip_tol": self.skip_tol,
            "backend": self.backend,
        }
        if call.cu_seqlens is not None:
            bounds = call.cu_seqlens
            longest = q.shape[2] if call.max_seqlen is None else call.max_seqlen
            q, k, v = (heads[0].transpose(0, 1) for heads in (q, k, v))
            mixed, rest = stickbreaking_attention_varlen(
                q, k, v, bounds, bounds, longest, longest, **options
            )
            return mixed.transpose(0, 1)[None], rest.transpose(0, 1)[None]
        if call.cache is not None:
            k, v = call.cache.append(k, v)
            if q.shape[2] == 1 and call.key_padding is None:
                q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
                mixed, log_rest = stickbreaking_decode(
                    q, k, v, cache_seqlens=call.cache.length, **options
                )
                return mixed.transpose(1, 2), log_rest.exp().transpose(1, 2)
        return stickbreaking_attention(
            q, k, v, key_padding=call.key_padding, enable_gqa=True, **options
        )

    def _give_remainder(self, mixed: Tensor, rest: Tensor, own: Tensor) -> Tensor:
        if self.remainder == "none":
            return mixed
        if self.remainder == "value":
            receiver = own.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1)
        else:
            receiver = self.remainder_bias[:, None]
        # The remainder is float32 whatever the heads are; the sum is rounded once.
        return (mixed + rest[..., None] * receiver).to(mixed.dtype)


def check_heads(
    hidden_size: int, num_heads: int, num_kv_heads: int, head_dim: int | None, *, rotary: bool
) -> None:
    """Refuse sizes that do not fit together."""
    for name, size in (
        ("hidden_size", hidden_size),
        ("num_heads", num_heads),
        ("num_kv_heads", num_kv_heads),
        ("head_dim", 1 if head_dim is None else head_dim),
    ):
        if size < 1:
            raise InvalidInputError(f"{name}: expected at least 1, got {size}")
    if head_dim is None and hidden_size % num_heads:
        raise InvalidInputError(
            f"hidden_size: expected a multiple of num_heads={num_heads}, got {hidden_size}; "
            "or give head_dim"
        )
    if num_heads % num_kv_heads:
        raise InvalidInputError(
            f"num_heads: expected a multiple of num_kv_heads={num_kv_heads}, got {num_heads}"
        )
    size = hidden_size // num_heads if head_dim is None else head_dim
    if rotary and size % 2:
        raise InvalidInputError(
            f"head_dim: rotary position embeddings turn pairs of coordinates; expected an even "
            f"size, got {size}"
        )


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a word that is not one of those known."""
    if value not in choices:
        raise InvalidInputError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
