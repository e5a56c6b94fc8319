"""Forward: outputs, log remainders, and what the backward needs to start anywhere.

A program owns a block of query rows. It walks over key tiles from the diagonal towards key 0,
with `acc = log2` of the stick that is left, and stops when no row has any worth breaking:

    t   = log2(e) · scale · q k              sp = log2(1 + 2^t)
    S_j = Σ_{l >= j, l in tile} sp_l         A_j = 2^(t_j - S_j + acc)
    out += A v                               acc -= S_first
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from decapod_kernels.stickbreaking.configs import ForwardConfig, forward_config
from decapod_kernels.stickbreaking.layout import Layout, describe, device_capability, sequence
from decapod_kernels.stickbreaking.maths import agreed, break_stick, dot, interpreting, tile_keys


class Forward(NamedTuple):
    """What `forward` returns.

    Attributes:
        out: `[B, Hq, Lq, Dv]` or packed `[total, Hq, Dv]`, in q's dtype.
        log_rem: `out`'s shape without the last dimension, float32: the natural logarithm of what
            is left of the stick. After an early exit, of what was left then: an upper bound.
        edges: float32, `log_rem`'s shape and one entry per super-block of keys: log2 of the stick
            at the super-block's right edge; 0 where the row's nearest key lies further left,
            -inf where the row's block never got there. Empty if not saved.
        stop: int32 `[B, Hq, query blocks]`: first key of the last tile that was visited (that the
            walk would have started right of, if none was). Empty if not saved.
    """

    out: Tensor
    log_rem: Tensor
    edges: Tensor
    stop: Tensor


@triton.jit
def _walk(
    acc, out, n, live, q, n_last, K, stride_kl, V, stride_vl, top, window, first, last, live_rows,
    c, log2_tol, Scratch, Edges, edge_row, first_chunk,
    DK: tl.constexpr, DV: tl.constexpr, BN: tl.constexpr, TILES: tl.constexpr,
    MASKED: tl.constexpr, SAVE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Visit tiles `n, n-1, …, n_last` while a row lives; return the state and the next tile."""
    BDK: tl.constexpr = q.shape[1]
    BDV: tl.constexpr = out.shape[1]
    cols = tile_keys(BN)
    dk = tl.arange(0, BDK)
    dv = tl.arange(0, BDV)
    if MASKED:
        # What each row sees: [row_lo, row_hi).
        row_hi = top + tl.arange(0, acc.shape[0])
        row_lo = tl.maximum(row_hi - window, first)
        row_hi = tl.minimum(row_hi, last)
    chunk = first_chunk
    while (n >= n_last) & live:
        # The inner loop is a counted one, since only such are pipelined: it ends at the next
        # super-block edge, and early at first, where most sticks break.
        tiles = tl.minimum(tl.minimum(chunk, n - n_last + 1), n % TILES + 1)
        if SAVE:
            at_edge = n % TILES == TILES - 1
            if at_edge:
                tl.store(Edges + edge_row + n // TILES, acc, mask=live_rows)
        for i in tl.range(0, tiles):
            first_key = (n - i) * BN
            k_at = K + first_key.to(tl.int64) * stride_kl
            v_at = V + first_key.to(tl.int64) * stride_vl
            at = cols
            if MASKED:
                # A key that nobody may see is never read: a seen one stands in for it.
                at = tl.minimum(tl.maximum(cols, first - first_key), last - 1 - first_key)
            k_at += at[None, :] * stride_kl + dk[:, None]
            v_at += at[:, None] * stride_vl + dv[None, :]
            k = tl.load(k_at) if DK == BDK else tl.load(k_at, (dk < DK)[:, None], other=0.0)
            v = tl.load(v_at) if DV == BDV else tl.load(v_at, (dv < DV)[None, :], other=0.0)
            t = dot(q, k, None, UPCAST) * c
            if MASKED:
                # -inf takes nothing from the stick and weighs nothing.
                key = first_key + cols[None, :]
                seen = (key >= row_lo[:, None]) & (key < row_hi[:, None])
                t = tl.where(seen, t, float("-inf"))
            weights, acc = break_stick(t, acc)
            out = dot(weights.to(v.dtype), v, out, UPCAST)
        n -= tiles
        chunk *= 2
        if log2_tol > float("-inf"):
            most = agreed(tl.max(tl.where(live_rows, acc, float("-inf"))), Scratch)
            live = not (most < log2_tol)  # where it is no number, go on
    return acc, out, n, live


@triton.jit
def _forward_kernel(
    Q, K, V, Out, LogRem, Edges, Stop, CuQ, CuK, KeyStart, KeyEnd,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_kl,
    stride_vb, stride_vh, stride_vl, stride_ob, stride_oh, stride_ol,
    stride_rb, stride_rh, stride_rl, superblocks,
    Lq, Lk, offset, current, window, q_heads, group, blocks, c, log2_tol, first_chunk,
    DK: tl.constexpr, DV: tl.constexpr, BDK: tl.constexpr, BDV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, TILES: tl.constexpr,
    SAVE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    # The longest rows come first: what is left for the end is short, and balances.
    block = blocks - 1 - tl.program_id(0) % blocks
    head = tl.program_id(0) // blocks % q_heads
    b = tl.program_id(0) // blocks // q_heads
    q_start, k_start, Lq, Lk, first, last, offset = sequence(
        b, CuQ, CuK, KeyStart, KeyEnd, Lq, Lk, offset
    )
    start = block * BM
    if start < Lq:
        wide_b = b.to(tl.int64)
        row_at = (q_start + start).to(tl.int64)
        k_head = (head // group).to(tl.int64)
        rows = tl.arange(0, BM)
        live_rows = start + rows < Lq
        dk = tl.arange(0, BDK)
        dv = tl.arange(0, BDV)
        Q += wide_b * stride_qb + head.to(tl.int64) * stride_qh + row_at * stride_ql
        K += wide_b * stride_kb + k_head * stride_kh + k_start.to(tl.int64) * stride_kl
        V += wide_b * stride_vb + k_head * stride_vh + k_start.to(tl.int64) * stride_vl
        q = tl.load(
            Q + rows[:, None] * stride_ql + dk[None, :],
            mask=live_rows[:, None] & (dk < DK)[None, :],
            other=0.0,
        )

        # One past the nearest key that the block's first row sees, were all keys valid; the others
        # see one more each.
        top = start + offset + current
        bottom = tl.minimum(start + BM, Lq) - 1 + offset + current
        first_hi = tl.minimum(top, last)
        first_lo = tl.maximum(top - window, first)
        last_hi = tl.minimum(bottom, last)
        last_lo = tl.maximum(bottom - window, first)

        # Tiles n_end - 1, …, n_full_end: diagonal; …, n_full: all seen; …, n_last: far edge.
        n_end = (tl.maximum(last_hi, 0) + BN - 1) // BN
        n_last = tl.where(first_lo < last_hi, first_lo // BN, n_end)
        n_full_end = tl.minimum(tl.maximum(tl.maximum(first_hi, 0) // BN, n_last), n_end)
        n_full = tl.minimum(tl.maximum((last_lo + BN - 1) // BN, n_last), n_full_end)

        acc = tl.zeros([BM], dtype=tl.float32)
        out = tl.zeros([BM, BDV], dtype=tl.float32)
        row_index = wide_b * stride_rb + head.to(tl.int64) * stride_rh + row_at * stride_rl
        Scratch = LogRem + row_index  # this program's own until it writes the result there
        row_index += rows * stride_rl
        edge_row = row_index * superblocks
        n = n_end - 1
        live = n >= n_last
        if SAVE:
            superblock = n // TILES
            if live:
                tl.store(Edges + edge_row + superblock, acc, mask=live_rows)
        acc, out, n, live = _walk(
            acc, out, n, live, q, n_full_end, K, stride_kl, V, stride_vl, top, window,
            first, last, live_rows, c, log2_tol, Scratch, Edges, edge_row, TILES,
            DK=DK, DV=DV, BN=BN, TILES=TILES, MASKED=True, SAVE=SAVE, UPCAST=UPCAST,
        )  # fmt: skip
        acc, out, n, live = _walk(
            acc, out, n, live, q, n_full, K, stride_kl, V, stride_vl, top, window,
            first, last, live_rows, c, log2_tol, Scratch, Edges, edge_row, first_chunk,
            DK=DK, DV=DV, BN=BN, TILES=TILES, MASKED=False, SAVE=SAVE, UPCAST=UPCAST,
        )  # fmt: skip
        acc, out, n, live = _walk(
            acc, out, n, live, q, n_last, K, stride_kl, V, stride_vl, top, window,
            first, last, live_rows, c, log2_tol, Scratch, Edges, edge_row, TILES,
            DK=DK, DV=DV, BN=BN, TILES=TILES, MASKED=True, SAVE=SAVE, UPCAST=UPCAST,
        )  # fmt: skip

        Out += wide_b * stride_ob + head.to(tl.int64) * stride_oh + row_at * stride_ol
        tl.store(
            Out + rows[:, None] * stride_ol + dv[None, :],
            out.to(Out.dtype.element_ty),
            mask=live_rows[:, None] & (dv < DV)[None, :],
        )
        tl.store(LogRem + row_index, acc * 0.6931471805599453, mask=live_rows)
        if SAVE:
            tl.store(Stop + (wide_b * q_heads + head) * blocks + block, (n + 1) * BN)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    attend_current: bool = False,
    kv_offset: int | None = None,
    key_start: Tensor | None = None,
    key_end: Tensor | None = None,
    window: int | None = None,
    log2_tol: float = -24.0,
    save: bool = False,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    config: ForwardConfig | None = None,
) -> Forward:
    """Stick-breaking attention of `q [B, Hq, Lq, Dk]` over `k [B, Hkv, Lk, Dk]` and `v`.

    Args:
        q, k, v: float16, bfloat16 or float32; any strides with a contiguous last dimension; each
            key-value head serves `Hq // Hkv` query heads. Packed sequences, with the arguments
            `cu_seqlens_*` and `max_seqlen_*`: `[total, heads, head size]`.
        scale: factor of the logits `q k`.
        attend_current: whether a query sees the key of its own position.
        kv_offset: position of the first query among the keys; `Lk - Lq` by default.
        key_start, key_end: `[B]` int32, the interval of valid keys of each batch row.
        window: positions that a query looks back, or None for all.
        log2_tol: stop when less than `2^log2_tol` of every stick of a block of rows is left, which
            changes no output by more than that times the largest value; -inf: never.
        save: whether to save what the backward needs.
        config: tile sizes; by default chosen for the device and the head size.

    Raises:
        ValueError: an argument does not fit; nothing has run then.
    """
    layout = describe(
        q,
        k,
        v,
        attend_current=attend_current,
        kv_offset=kv_offset,
        key_start=key_start,
        key_end=key_end,
        window=window,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
    )
    if math.isnan(log2_tol) or log2_tol >= 0:
        raise ValueError(f"log2_tol must be negative (-inf: never stop early), got {log2_tol}")
    if config is None:
        head_dim = max(layout.key_dim, layout.value_dim)
        config = forward_config(head_dim, q.dtype, device_capability(q), layout.max_k)
    result = _allocate(q, v, layout, config, save=save)
    blocks = triton.cdiv(layout.max_q, config.block_q)
    programs = blocks * layout.q_heads * layout.batch
    if programs:
        _forward_kernel[(programs,)](
            q, k, v, result.out, result.log_rem, result.edges, result.stop,
            layout.cu_q, layout.cu_k, layout.key_start, layout.key_end,
            *layout.strides(q), *layout.strides(k), *layout.strides(v),
            *layout.strides(result.out), *layout.strides(result.log_rem),
            result.edges.shape[-1],
            layout.max_q, layout.max_k, layout.offset, int(attend_current), layout.window,
            layout.q_heads, layout.group, blocks, scale * math.log2(math.e), log2_tol,
            # Without an early exit there is no reason to look for one soon.
            1 if log2_tol > -math.inf else config.superblock // config.block_k,
            DK=layout.key_dim, DV=layout.value_dim,
            BDK=max(16, triton.next_power_of_2(layout.key_dim)),
            BDV=max(16, triton.next_power_of_2(layout.value_dim)),
            BM=config.block_q, BN=config.block_k, TILES=config.superblock // config.block_k,
            SAVE=save, UPCAST=interpreting(),
            num_warps=config.warps, num_stages=config.stages, maxnreg=config.registers,
        )  # fmt: skip
    return result


def _allocate(
    q: Tensor, v: Tensor, layout: Layout, config: ForwardConfig, *, save: bool
) -> Forward:
    rows = q.shape[:-1]
    superblocks = triton.cdiv(layout.max_k, config.superblock) if save else 0
    blocks = triton.cdiv(layout.max_q, config.block_q) if save else 0
    return Forward(
        out=q.new_empty(*rows, v.shape[-1]),
        log_rem=q.new_empty(rows, dtype=torch.float32),
        edges=q.new_full((*rows, superblocks), -math.inf, dtype=torch.float32),
        stop=q.new_zeros((layout.batch, layout.q_heads, blocks), dtype=torch.int32),
    )
