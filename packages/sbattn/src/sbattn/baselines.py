"""What stick-breaking is compared with: softmax attention, and forgetting attention.

All of them see their own token. `SoftmaxAttention` goes through torch's
`scaled_dot_product_attention`, with rotary embeddings (arXiv 2104.09864), ALiBi (arXiv 2108.12409)
or no position at all, and with a sliding window if asked. `ForgettingAttention` (FoX, arXiv
2503.02130) has a gate per head and token that makes older keys fade.

Where there is padding, packing, a window, ALiBi or a gate, masks of `Lq × Lk` are built: these are
references to compare with, not fast paths.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sbattn.attention import Call, MultiHeadAttention, check_choice
from sbattn.checks import check_options
from sbattn.positions import alibi_bias, alibi_slopes, sequence_starts, valid_keys
from sbattn.visibility import Visibility

Position = Literal["rope", "alibi", "none"]


class SoftmaxAttention(MultiHeadAttention):
    """Softmax attention, each token seeing itself and what came before.

    Args:
        hidden_size: width `C` of what comes and goes.
        num_heads: query heads.
        num_kv_heads: key and value heads (None: as many as query heads).
        head_dim: size of a head (None: `hidden_size / num_heads`).
        position: how it knows order: "rope": rotated queries and keys; "alibi": a bias that falls
            linearly with distance; "none": by the causal mask alone.
        window: how many positions a token sees, its own among them (None: all).
        bias: whether the four projections have biases.
        scale: factor of the logits (None: `1 / sqrt(head_dim)`).
        rope_theta: base of the rotary embedding; only "rope" uses it.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        position: Position = "rope",
        window: int | None = None,
        bias: bool = False,
        scale: float | None = None,
        rope_theta: float = 10000.0,
    ) -> None:
        check_choice("position", position, get_args(Position))
        check_options(scale, window, "exact")
        super().__init__(
            hidden_size,
            num_heads,
            num_kv_heads,
            head_dim,
            bias=bias,
            scale=scale,
            rope_theta=rope_theta if position == "rope" else None,
        )
        self.position = position
        self.window = window

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """Mixed values `[B, L, num_heads · head_dim]`."""
        if call.cache is not None:
            k, v = call.cache.append(k, v)
        queries, keys = q.shape[2], k.shape[2]
        plain = call.key_padding is None and call.cu_seqlens is None and self.window is None
        if plain and self.position != "alibi" and queries in (1, keys):
            return softmax_mix(q, k, v, mask=None, causal=queries == keys, scale=self.scale)
        mask = visible_keys(q, keys, self.window, call.key_padding, call.cu_seqlens)
        if self.position == "alibi":
            exact = torch.float64 if q.dtype == torch.float64 else torch.float32
            slopes = torch.tensor(alibi_slopes(self.num_heads), dtype=exact, device=q.device)
            bias = alibi_bias(queries, keys, slopes)
            mask = bias.masked_fill(~mask, -torch.inf).to(q.dtype)
        return softmax_mix(q, k, v, mask=mask, causal=False, scale=self.scale)


class ForgettingAttention(MultiHeadAttention):
    """Softmax attention whose keys fade by gates in between (arXiv 2503.02130).

    Every token has a gate per head, `f = sigmoid(gate(x))`, and the logit of key `j` seen from
    query `i` gets `Σ_{j < l ≤ i} log f_l`. There is no other position embedding. This is the
    attention alone, without the extras of that paper's larger block (normalised queries and keys,
    output gate, shifted keys).

    Args:
        hidden_size: width `C` of what comes and goes.
        num_heads: query heads; there is a gate for each.
        num_kv_heads: key and value heads (None: as many as query heads).
        head_dim: size of a head (None: `hidden_size / num_heads`).
        bias: whether the four projections have biases; the gate's always has.
        scale: factor of the logits (None: `1 / sqrt(head_dim)`).
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
    ) -> None:
        super().__init__(hidden_size, num_heads, num_kv_heads, head_dim, bias=bias, scale=scale)
        self.gate = nn.Linear(hidden_size, num_heads)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """Mixed values `[B, L, num_heads · head_dim]`."""
        logits = self.gate(call.x)
        exact = torch.float64 if logits.dtype == torch.float64 else torch.float32
        log_gates = F.logsigmoid(logits.to(exact)).transpose(1, 2)
        if call.cache is not None:
            k, v, log_gates = call.cache.append(k, v, log_gates)
        queries, keys = q.shape[2], k.shape[2]
        faded = log_gates.cumsum(-1)
        bias = faded[:, :, -queries:, None] - faded[:, :, None, :]
        visible = visible_keys(q, keys, None, call.key_padding, call.cu_seqlens)
        mask = bias.masked_fill(~visible, -torch.inf).to(q.dtype)
        return softmax_mix(q, k, v, mask=mask, causal=False, scale=self.scale)


def softmax_mix(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, causal: bool, scale: float
) -> Tensor:
    """`scaled_dot_product_attention` with grouped heads, put side by side `[B, L, H · D]`."""
    mixed = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=causal,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return mixed.transpose(1, 2).flatten(2)


def visible_keys(
    q: Tensor,
    keys: int,
    window: int | None,
    key_padding: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """Who sees whom, `[B or 1, 1, Lq, keys]` bool; a token always sees itself.

    It does so even where it is padding, because a softmax over nothing is not a number.
    """
    queries, device = q.shape[2], q.device
    columns = torch.arange(keys, device=device)
    rows = columns[keys - queries :]
    visibility = Visibility(kv_offset=keys - queries, attend_current=True, window=window)
    starts, ends = visibility.intervals(queries, keys, device)
    if cu_seqlens is not None:
        starts = torch.maximum(starts, sequence_starts(rows, cu_seqlens))
    visible = (columns >= starts[..., None]) & (columns < ends[..., None])
    if key_padding is not None:
        visible = visible & valid_keys(key_padding, q.shape[0], keys)[:, None]
        visible = visible | (columns == rows[:, None])
    return visible[:, None]
