"""The key owner: gradients of the keys and values of one tile, all of whose rows it walks.

It needs `acc` and F at the tile's edges, which the row owner left in `edge_acc` and `edge_far`, and
nothing from any other tile: sums are kept in registers and added in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from decapod_kernels.stickbreaking.backward_tile import (
    block_stop,
    logit_gradient,
    mask_logits,
    tile_weights,
    visible_interval,
)
from decapod_kernels.stickbreaking.layout import sequence
from decapod_kernels.stickbreaking.maths import dot, tile_keys


@triton.jit
def _add_rows(
    dk,
    dv,
    kt,
    vt,
    b,
    h,
    m,
    stop,
    largest_stop,
    Q,
    DO,
    EdgeAcc,
    EdgeFar,
    stride_qb,
    stride_qh,
    stride_ql,
    stride_dob,
    stride_doh,
    stride_dol,
    stride_tilesb,
    stride_tilesh,
    q_start,
    Lq,
    first,
    last,
    offset,
    window,
    row_begin,
    row_end,
    tile_begin,
    scale_log2,
    ATTEND_CURRENT: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BDK: tl.constexpr,
    BDV: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """dk and dv, and what row block m of head h adds to them."""
    key = tile_begin + tile_keys(BN)
    row = m * BM + tl.arange(0, BM)
    lo, hi = visible_interval(row, first, last, offset, window, ATTEND_CURRENT)
    lo = tl.maximum(lo, stop)
    # Whether every row sees the whole tile.
    top = m * BM + offset + ATTEND_CURRENT
    all_lo = tl.maximum(tl.maximum(first, largest_stop), top + (BM - 1) - window)
    all_see = (all_lo <= tile_begin) & (tl.minimum(top, last) >= tile_begin + BN)
    real = (row >= row_begin) & (row < tl.minimum(Lq, row_end))
    # Edges of rows that see nothing of the tile were not written.
    sees = real & (tl.maximum(lo, tile_begin) < tl.minimum(hi, tile_begin + BN))
    at = (q_start + m * BM).to(tl.int64)
    row_in_block = tl.arange(0, BM)
    c = tl.arange(0, BDK)[None, :]
    q = tl.load(
        Q
        + b * stride_qb
        + h * stride_qh
        + at * stride_ql
        + (row_in_block[:, None] * stride_ql + c),
        mask=real[:, None] if DK == BDK else real[:, None] & (c < DK),
        other=0.0,
    )
    e = tl.arange(0, BDV)[None, :]
    do = tl.load(
        DO
        + b * stride_dob
        + h * stride_doh
        + at * stride_dol
        + (row_in_block[:, None] * stride_dol + e),
        mask=real[:, None] if DV == BDV else real[:, None] & (e < DV),
        other=0.0,
    )
    edge = b * stride_tilesb + h * stride_tilesh + (at - row_begin)
    acc = tl.load(EdgeAcc + edge + row_in_block, mask=sees, other=0.0)
    F = tl.load(EdgeFar + edge + row_in_block, mask=sees, other=0.0)
    t = dot(q, kt, None, UPCAST) * scale_log2
    g = dot(do, vt, None, UPCAST)
    if not all_see:
        t = mask_logits(t, key, lo, hi)
    weight, x, rest = tile_weights(t, acc)
    dv = dot(tl.trans(do), weight.to(do.dtype), dv, UPCAST)
    a = weight * g
    dz, _ = logit_gradient(a, x, rest, F)
    dk = dot(tl.trans(q), dz.to(q.dtype), dk, UPCAST)
    return dk, dv


@triton.jit
def keys_kernel(
    Q,
    K,
    V,
    DO,
    DKeys,
    DValues,
    Stop,
    EdgeAcc,
    EdgeFar,
    CuQ,
    CuK,
    KeyStart,
    KeyEnd,
    stride_qb,
    stride_qh,
    stride_ql,
    stride_kb,
    stride_kh,
    stride_kl,
    stride_vb,
    stride_vh,
    stride_vl,
    stride_dob,
    stride_doh,
    stride_dol,
    stride_dkb,
    stride_dkh,
    stride_dkl,
    stride_dvb,
    stride_dvh,
    stride_dvl,
    stride_dks,
    stride_dvs,
    stop_b,
    stop_h,
    stride_tilesb,
    stride_tilesh,
    stride_tilesn,
    kv_heads,
    Lq,
    Lk,
    offset,
    window,
    row_begin,
    row_end,
    superblock_index,
    stop_blocks,
    scale,
    scale_log2,
    GROUP: tl.constexpr,
    ATTEND_CURRENT: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BDK: tl.constexpr,
    BDV: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    TILES: tl.constexpr,
    STOP_ROWS: tl.constexpr,
    BS: tl.constexpr,
    SKIP: tl.constexpr,
    PARTIAL: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One tile of BN keys of one key-value head; program axis 2 shares its row blocks out.

    PARTIAL: add to float32 sums of this super-block, unscaled, instead of writing the gradients.
    """
    b = (tl.program_id(0) // kv_heads).to(tl.int64)
    kv_head = (tl.program_id(0) % kv_heads).to(tl.int64)
    split = tl.program_id(2)
    splits = tl.num_programs(2)
    q_start, k_start, Lq, Lk, first, last, offset = sequence(
        b, CuQ, CuK, KeyStart, KeyEnd, Lq, Lk, offset
    )
    in_block = tl.program_id(1)
    tile_begin = (superblock_index * TILES + in_block) * BN
    if tile_begin < Lk:
        key = tile_begin + tile_keys(BN)
        inside = (key < Lk)[:, None]
        key_row = (k_start + key).to(tl.int64)[:, None]
        c = tl.arange(0, BDK)[None, :]
        k_mask = inside if DK == BDK else inside & (c < DK)
        k = tl.load(
            K + b * stride_kb + kv_head * stride_kh + key_row * stride_kl + c,
            mask=k_mask,
            other=0.0,
        )
        e = tl.arange(0, BDV)[None, :]
        v_mask = inside if DV == BDV else inside & (e < DV)
        v = tl.load(
            V + b * stride_vb + kv_head * stride_vh + key_row * stride_vl + e,
            mask=v_mask,
            other=0.0,
        )
        # Transposed outside the loop, they stay in shared memory.
        kt = tl.trans(k)
        vt = tl.trans(v)
        if PARTIAL:
            sums = (in_block * BN + tile_keys(BN)).to(tl.int64)[:, None]
            sums_dk = tl.load(
                DKeys
                + split * stride_dks
                + b * stride_dkb
                + kv_head * stride_dkh
                + sums * stride_dkl
                + c,
                mask=k_mask,
                other=0.0,
            )
            sums_dv = tl.load(
                DValues
                + split * stride_dvs
                + b * stride_dvb
                + kv_head * stride_dvh
                + sums * stride_dvl
                + e,
                mask=v_mask,
                other=0.0,
            )
            dk = tl.trans(sums_dk)
            dv = tl.trans(sums_dv)
        else:
            dk = tl.zeros([BDK, BN], tl.float32)
            dv = tl.zeros([BDV, BN], tl.float32)
        EdgeAcc += in_block * stride_tilesn
        EdgeFar += in_block * stride_tilesn

        # Rows that can see the tile: from its diagonal down to where the window ends.
        rows_begin = tl.maximum(tile_begin - offset - ATTEND_CURRENT + 1, row_begin)
        rows_end = (tile_begin + BN - offset).to(tl.int64) + window
        rows_end = tl.minimum(tl.minimum(Lq, row_end), rows_end).to(tl.int32)
        if SKIP:
            # ... and down to the last row block that went so far.
            live = 0
            for at in range(0, stop_blocks, BS):
                index = at + tl.arange(0, BS)
                for g in range(GROUP):
                    stop = tl.load(
                        Stop + b * stop_b + (kv_head * GROUP + g) * stop_h + index,
                        mask=index < stop_blocks,
                        other=2147483647,
                    )
                    reaches = stop < tile_begin + BN
                    live = tl.maximum(live, tl.max(tl.where(reaches, index + 1, 0), axis=0))
            rows_end = tl.minimum(rows_end, live * STOP_ROWS)
        m_begin = rows_begin // BM
        m_begin += (split + splits - m_begin % splits) % splits
        m_count = tl.maximum(tl.cdiv(tl.cdiv(rows_end, BM) - m_begin, splits), 0)
        for i in range(m_count * GROUP):
            m = m_begin + (i // GROUP) * splits
            h = kv_head * GROUP + i % GROUP
            stop, least_stop, largest_stop = block_stop(
                Stop + b * stop_b + h * stop_h, m * BM, Lq, BM, STOP_ROWS
            )
            # With skipping a dead row block costs one load, but loads are not pipelined.
            alive = True
            if SKIP:
                alive = least_stop < tile_begin + BN
            if alive:
                dk, dv = _add_rows(
                    dk,
                    dv,
                    kt,
                    vt,
                    b,
                    h,
                    m,
                    stop,
                    largest_stop,
                    Q,
                    DO,
                    EdgeAcc,
                    EdgeFar,
                    stride_qb,
                    stride_qh,
                    stride_ql,
                    stride_dob,
                    stride_doh,
                    stride_dol,
                    stride_tilesb,
                    stride_tilesh,
                    q_start,
                    Lq,
                    first,
                    last,
                    offset,
                    window,
                    row_begin,
                    row_end,
                    tile_begin,
                    scale_log2,
                    ATTEND_CURRENT,
                    DK,
                    DV,
                    BDK,
                    BDV,
                    BM,
                    BN,
                    UPCAST,
                )
        if PARTIAL:
            out_row = (in_block * BN + tile_keys(BN)).to(tl.int64)[:, None]
        else:
            out_row = key_row
            dk = dk * scale
        tl.store(
            DKeys
            + split * stride_dks
            + b * stride_dkb
            + kv_head * stride_dkh
            + out_row * stride_dkl
            + c,
            tl.trans(dk).to(DKeys.dtype.element_ty),
            mask=k_mask,
        )
        tl.store(
            DValues
            + split * stride_dvs
            + b * stride_dvb
            + kv_head * stride_dvh
            + out_row * stride_dvl
            + e,
            tl.trans(dv).to(DValues.dtype.element_ty),
            mask=v_mask,
        )
