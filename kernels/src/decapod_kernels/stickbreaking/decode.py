"""Decoding: a few queries per sequence against a long cache, contiguous or paged.

One program cannot read 128k keys at the speed of the memory, so the cache is cut into segments, of
which each gives a partial result `(o, ρ)`: its own output, and the log2 of the stick that it
leaves. Partial results compose, near ⊕ far = `(o_near + 2^ρ_near · o_far, ρ_near + ρ_far)`.

The segments go in waves, nearest first and growing. Programs of one wave run side by side and know
nothing of each other; those of the next wave begin with what the nearer waves left, and return at
once where that is below the tolerance. A wave costs a launch even if none of its programs has work,
so that the time follows the live keys down to a floor of a few launches. Nothing here depends on
the order in which programs run, or on the number of processors.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from decapod_kernels.stickbreaking.decode_layout import check_decode
from decapod_kernels.stickbreaking.decode_plan import DecodeConfig, decode_config, plan_waves
from decapod_kernels.stickbreaking.maths import dot, interpreting, softplus2, suffix_sum

_LOG2E = math.log2(math.e)
_FAR = 2**30  # a window that ends nowhere
_CHUNK = 32  # segments whose remainders are read at once

# The merge drops what lies behind a prefix below the tolerance. A segment that stops must be
# certain that the merge will agree, though it adds the same numbers up in another order.
_MARGIN = 2.0**-8


@triton.jit(do_not_specialize=["rows", "flat", "capacity", "window", "first", "start", "length"])
def segment_kernel(
    Q,
    K,
    V,
    TABLE,
    LENGTHS,
    RHO,
    PART,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kp,
    stride_ks,
    stride_kh,
    stride_vp,
    stride_vs,
    stride_vh,
    table_row,
    page_size,
    queries,
    kv_heads,
    group,
    rows,
    flat,
    capacity,
    window,
    first,
    start,
    length,
    scale,
    stop,
    ATTEND_CURRENT: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BDK: tl.constexpr,
    BDV: tl.constexpr,
    BS: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One segment for the queries that share a kv head: the rows of a block are (query, head)."""
    blocks = tl.cdiv(rows, BM)
    pair = tl.program_id(0) // blocks
    batch = (pair // kv_heads).to(tl.int64)
    kv_head = (pair % kv_heads).to(tl.int64)
    row = (tl.program_id(0) % blocks) * BM + tl.arange(0, BM)
    real = row < rows
    query = row // group
    head = kv_head * group + row % group
    at = (batch * queries + query) * (kv_heads * group) + head  # among the rows of the output

    tokens = tl.minimum(tl.load(LENGTHS + batch), capacity)
    right = tokens - start - tl.program_id(1) * length
    left = tl.maximum(right - length, 0)
    high = tokens - queries + query + ATTEND_CURRENT
    low = tl.maximum(high - window, 0)

    # Summed with the sign turned: Triton 3.6 rewrites a loop that adds, and fails over its result.
    spent = tl.zeros([BM], tl.float32)
    for chunk in range(0, first, BS):
        nearer = chunk + tl.arange(0, BS)
        rho = tl.load(
            RHO + nearer.to(tl.int64)[None, :] * flat + at[:, None],
            mask=real[:, None] & (nearer < first)[None, :],
            other=0.0,
        )
        spent -= tl.sum(rho, axis=1)
    prior = -spent

    # Written so that a row of NaN counts as open, and its NaN comes out.
    waiting = real & ~(prior < stop) & (low < right)
    needed = (right > left) & (tl.max(waiting.to(tl.int32), axis=0) > 0)
    segment = (first + tl.program_id(1)).to(tl.int64)
    acc = tl.zeros([BM], tl.float32)
    if needed:
        dk = tl.arange(0, BDK)
        dv = tl.arange(0, BDV)
        q_at = batch * stride_qb + query.to(tl.int64) * stride_qt + head * stride_qh
        q = tl.load(
            Q + q_at[:, None] + dk[None, :], mask=real[:, None] & (dk < DK)[None, :], other=0.0
        )
        out = tl.zeros([BM, BDV], tl.float32)
        # Named last of what the loop carries: Triton 3.6 breaks down over one named before tensors.
        live = needed
        while live:
            for tile in tl.range(0, STEP, num_stages=STAGES):
                key = right - (tile + 1) * BN + tl.arange(0, BN)
                inside = key >= left
                if TABLE is not None:
                    page = tl.load(
                        TABLE + batch * table_row + key // page_size, mask=inside, other=0
                    ).to(tl.int64)
                    slot = key % page_size
                else:
                    page = batch
                    slot = key.to(tl.int64)
                k_at = page * stride_kp + slot * stride_ks + kv_head * stride_kh
                v_at = page * stride_vp + slot * stride_vs + kv_head * stride_vh
                k = tl.load(
                    K + k_at[None, :] + dk[:, None],
                    mask=inside[None, :] & (dk < DK)[:, None],
                    other=0.0,
                )
                v = tl.load(
                    V + v_at[:, None] + dv[None, :],
                    mask=inside[:, None] & (dv < DV)[None, :],
                    other=0.0,
                )
                t = dot(q, k, tl.zeros([BM, BN], tl.float32), UPCAST) * scale
                seen = (
                    inside[None, :]
                    & (key[None, :] >= low[:, None])
                    & (key[None, :] < high[:, None])
                )
                sp, _ = softplus2(t)
                sp = tl.where(seen, sp, 0.0)
                taken = suffix_sum(sp)
                weight = tl.where(seen, tl.exp2(t - taken + acc[:, None]), 0.0)
                out = dot(weight.to(v.dtype), v, out, UPCAST)
                acc -= tl.sum(sp, axis=1)
            right -= STEP * BN
            waiting = real & ~(prior + acc < stop) & (low < right)
            live = (right > left) & (tl.max(waiting.to(tl.int32), axis=0) > 0)
        tl.store(
            PART + (segment * flat + at)[:, None] * DV + dv[None, :],
            out,
            mask=real[:, None] & (dv < DV)[None, :],
        )
    tl.store(RHO + segment * flat + at, acc, mask=real)


@triton.jit(do_not_specialize=["flat", "segments"])
def merge_kernel(
    RHO,
    PART,
    OUT,
    REM,
    flat,
    segments,
    tol,
    DV: tl.constexpr,
    BDV: tl.constexpr,
    BS: tl.constexpr,
):
    """One row's segments, nearest first, until the stick is below the tolerance."""
    at = tl.program_id(0).to(tl.int64)
    dv = tl.arange(0, BDV)
    out = tl.zeros([BDV], tl.float32)
    acc = 0.0
    first = 0
    live = first < segments
    while live:
        segment = first + tl.arange(0, BS)
        offset = segment.to(tl.int64) * flat + at
        rho = tl.load(RHO + offset, mask=segment < segments, other=0.0)
        # Read once more, one further on: exclusive sums without a subtraction.
        nearer = tl.load(
            RHO + offset - flat, mask=(segment > first) & (segment < segments), other=0.0
        )
        before = acc + tl.cumsum(nearer, axis=0)
        counts = ~(before < tol)
        weight = tl.where(counts, tl.exp2(before), 0.0)
        # Where nothing was taken from the stick, nothing was given out, nor written.
        part = tl.load(
            PART + offset[:, None] * DV + dv[None, :],
            mask=(counts & (rho != 0.0))[:, None] & (dv < DV)[None, :],
            other=0.0,
        )
        out += tl.sum(weight[:, None] * part, axis=0)
        acc += tl.sum(tl.where(counts, rho, 0.0), axis=0)
        first += BS
        live = (first < segments) & ~(acc < tol)
    tl.store(OUT + at * DV + dv, out.to(OUT.dtype.element_ty), mask=dv < DV)
    tl.store(REM + at, acc * 0.6931471805599453)


def decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_seqlens: Tensor,
    block_table: Tensor | None = None,
    scale: float,
    attend_current: bool = False,
    window: int | None = None,
    log2_tol: float = -24.0,
    config: DecodeConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend from the last `Lq` tokens of each sequence to its cache, which holds them already.

    Query `t` stands at position `cache_seqlens - Lq + t`. Where that is negative it sees nothing:
    its output is 0 and so is its log remainder. Nothing waits for the device: the contents of
    `cache_seqlens` and `block_table` are not looked at here. Lengths beyond the cache count as its
    length, and page numbers are trusted.

    Args:
        q: `[B, Lq, Hq, Dk]`, float32, bfloat16 or float16.
        k_cache: `[B, Lmax, Hkv, Dk]`, or `[pages, page_size, Hkv, Dk]` with a block table. Any
            strides, but the last is 1.
        v_cache: the same with `Dv`.
        cache_seqlens: `[B]` int32, tokens of each sequence in the cache.
        block_table: `[B, pages of a sequence]` int32, its pages from the first token on.
        scale: of the logits.
        attend_current: whether a query sees the key of its own position.
        window: how many positions back a query sees (None: all).
        log2_tol: a row stops when log2 of what is left of its stick is below this; `-inf`: never.
        config: how the cache is cut up (None: `decode_config`).

    Returns:
        `[B, Lq, Hq, Dv]` in the dtype of `q`, and the natural log of the remainders
        `[B, Lq, Hq]` float32, each at the key where the row stopped.

    Raises:
        ValueError: shapes, dtypes, strides or devices do not fit.
    """
    check_decode(q, k_cache, v_cache, cache_seqlens, block_table, window)
    batch, queries, heads, dk = q.shape
    page_size, kv_heads, dv = v_cache.shape[1:]
    capacity = page_size if block_table is None else page_size * block_table.shape[1]
    out = q.new_empty((batch, queries, heads, dv))
    log_rem = q.new_empty((batch, queries, heads), dtype=torch.float32)
    flat = log_rem.numel()
    if flat == 0 or capacity == 0:
        return out.zero_(), log_rem.zero_()

    config = config or decode_config(max(dk, dv), q.dtype)
    group = heads // kv_heads
    rows = group * queries
    block_q = max(16, min(config.block_q, triton.next_power_of_2(rows)))
    groups = batch * kv_heads * triton.cdiv(rows, block_q)
    reach = capacity if window is None else min(capacity, window + queries)
    waves = plan_waves(reach, groups, config, skipping=log2_tol > -math.inf)
    segments = sum(wave.count for wave in waves)
    rho = log_rem.new_empty((segments, flat))
    part = log_rem.new_empty((segments, flat, dv))
    block_dv = max(16, triton.next_power_of_2(dv))
    with torch.cuda.device_of(q):
        first = 0
        for wave in waves:
            segment_kernel[(groups, wave.count)](
                q,
                k_cache,
                v_cache,
                block_table,
                cache_seqlens,
                rho,
                part,
                *q.stride()[:3],
                *k_cache.stride()[:3],
                *v_cache.stride()[:3],
                0 if block_table is None else block_table.stride(0),
                page_size,
                queries,
                kv_heads,
                group,
                rows,
                flat,
                capacity,
                _FAR if window is None else min(window, _FAR),
                first,
                wave.start,
                wave.length,
                scale * _LOG2E,
                log2_tol - _MARGIN,
                ATTEND_CURRENT=int(attend_current),
                DK=dk,
                DV=dv,
                BM=block_q,
                BN=config.block_k,
                BDK=max(16, triton.next_power_of_2(dk)),
                BDV=block_dv,
                BS=_CHUNK,
                STEP=config.step,
                STAGES=config.stages,
                UPCAST=interpreting(),
                num_warps=config.warps,
            )
            first += wave.count
        merge_kernel[(flat,)](
            rho, part, out, log_rem, flat, segments, log2_tol, DV=dv, BDV=block_dv, BS=_CHUNK
        )
    return out, log_rem
