"""The row owner: query gradients, and the two edges of every tile of one super-block.

From right to left it takes each tile's softplus sum from `acc`; from left to right it adds up F and
dq. Both edges of every live tile go to `edge_acc` and `edge_far`, for the key owner.
"""

from __future__ import annotations

import triton
import triton.language as tl

from decapod_kernels.stickbreaking.backward_tile import (
    block_stop,
    logit_gradient,
    mask_logits,
    tile_taken,
    tile_weights,
    visible_interval,
)
from decapod_kernels.stickbreaking.layout import sequence
from decapod_kernels.stickbreaking.maths import dot, tile_keys


@triton.jit
def rows_kernel(
    Q,
    K,
    V,
    DO,
    DQ,
    Far,
    Edges,
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
    stride_dqb,
    stride_dqh,
    stride_dql,
    far_b,
    far_h,
    far_l,
    edges_b,
    edges_h,
    edges_l,
    stop_b,
    stop_h,
    stride_tilesb,
    stride_tilesh,
    stride_tilesn,
    heads,
    Lq,
    Lk,
    offset,
    window,
    row_begin,
    row_end,
    superblock_index,
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
    UPCAST: tl.constexpr,
):
    """One block of BM rows of one head, and the keys of one super-block of TILES tiles."""
    b = (tl.program_id(0) // heads).to(tl.int64)
    h = (tl.program_id(0) % heads).to(tl.int64)
    q_start, k_start, Lq, Lk, first, last, offset = sequence(
        b, CuQ, CuK, KeyStart, KeyEnd, Lq, Lk, offset
    )
    # Last rows first: those at the diagonal have less to do, and fill the gaps.
    block = tl.num_programs(1) - 1 - tl.program_id(1)
    row = row_begin + block * BM + tl.arange(0, BM)
    real = row < tl.minimum(Lq, row_end)
    lo, hi = visible_interval(row, first, last, offset, window, ATTEND_CURRENT)
    stop, _, largest_stop = block_stop(
        Stop + b * stop_b + h * stop_h, row_begin + block * BM, Lq, BM, STOP_ROWS
    )
    left = superblock_index * (TILES * BN)
    right = left + TILES * BN
    lo = tl.maximum(tl.maximum(lo, stop), left)
    sees = real & (lo < tl.minimum(hi, right))
    begin = tl.min(tl.where(sees, lo, right), axis=0)
    end = tl.max(tl.where(sees, tl.minimum(hi, right), left), axis=0)
    if begin < end:
        start = (q_start + row_begin + block * BM).to(tl.int64)
        row_in_block = tl.arange(0, BM)
        dk = tl.arange(0, BDK)[None, :]
        dv = tl.arange(0, BDV)[None, :]
        q_mask = real[:, None] if DK == BDK else real[:, None] & (dk < DK)
        v_mask = real[:, None] if DV == BDV else real[:, None] & (dv < DV)
        q = tl.load(
            Q
            + b * stride_qb
            + h * stride_qh
            + start * stride_ql
            + (row_in_block[:, None] * stride_ql + dk),
            mask=q_mask,
            other=0.0,
        )
        do = tl.load(
            DO
            + b * stride_dob
            + h * stride_doh
            + start * stride_dol
            + (row_in_block[:, None] * stride_dol + dv),
            mask=v_mask,
            other=0.0,
        )
        # What of an address does not change from tile to tile.
        key_in_tile = tile_keys(BN)
        k_in_tile = key_in_tile[:, None] * stride_kl + dk
        v_in_tile = key_in_tile[:, None] * stride_vl + dv
        K += b * stride_kb + (h // GROUP) * stride_kh + k_start.to(tl.int64) * stride_kl
        V += b * stride_vb + (h // GROUP) * stride_vh + k_start.to(tl.int64) * stride_vl
        edge = b * stride_tilesb + h * stride_tilesh + (start - row_begin) + row_in_block
        # A row whose keys end inside the super-block meets it with the whole stick.
        acc = tl.load(
            Edges
            + b * edges_b
            + h * edges_h
            + start * edges_l
            + row_in_block * edges_l
            + superblock_index,
            mask=sees & (hi > right),
            other=0.0,
        )
        tile_begin = begin // BN
        tile_end = tl.cdiv(end, BN)
        # Keys that every row sees: the tiles between need no mask.
        top = row_begin + block * BM + offset + ATTEND_CURRENT
        all_lo = tl.maximum(tl.maximum(first, largest_stop), top + (BM - 1) - window)
        all_hi = tl.minimum(top, last)

        for i in range(tile_end - 1 - tile_begin):
            tile = tile_end - 1 - i
            tl.store(
                EdgeAcc + edge + (tile - superblock_index * TILES) * stride_tilesn, acc, mask=real
            )
            key = tile * BN + key_in_tile
            inside = (key < Lk)[:, None]
            k = tl.load(
                K + (tile * BN).to(tl.int64) * stride_kl + k_in_tile,
                mask=inside if DK == BDK else inside & (dk < DK),
                other=0.0,
            )
            t = dot(q, tl.trans(k), None, UPCAST) * scale_log2
            if (tile * BN < all_lo) | ((tile + 1) * BN > all_hi):
                t = mask_logits(t, key, lo, hi)
            acc -= tile_taken(t)
        tl.store(
            EdgeAcc + edge + (tile_begin - superblock_index * TILES) * stride_tilesn, acc, mask=real
        )
        # Other threads of this program read what was stored here.
        tl.debug_barrier()

        far_at = Far + b * far_b + h * far_h + start * far_l + row_in_block * far_l
        F = tl.load(far_at, mask=real, other=0.0)
        dq = tl.zeros([BM, BDK], tl.float32)
        for i in range(tile_end - tile_begin):
            tile = tile_begin + i
            at = edge + (tile - superblock_index * TILES) * stride_tilesn
            key = tile * BN + key_in_tile
            inside = (key < Lk)[:, None]
            k = tl.load(
                K + (tile * BN).to(tl.int64) * stride_kl + k_in_tile,
                mask=inside if DK == BDK else inside & (dk < DK),
                other=0.0,
            )
            v = tl.load(
                V + (tile * BN).to(tl.int64) * stride_vl + v_in_tile,
                mask=inside if DV == BDV else inside & (dv < DV),
                other=0.0,
            )
            acc = tl.load(EdgeAcc + at, mask=real, other=0.0)
            tl.store(EdgeFar + at, F, mask=real)
            t = dot(q, tl.trans(k), None, UPCAST) * scale_log2
            g = dot(do, tl.trans(v), None, UPCAST)
            if (tile * BN < all_lo) | ((tile + 1) * BN > all_hi):
                t = mask_logits(t, key, lo, hi)
            weight, x, rest = tile_weights(t, acc)
            a = weight * g
            dz, F = logit_gradient(a, x, rest, F)
            dq = dot(dz.to(k.dtype), k, dq, UPCAST)
        tl.store(far_at, F, mask=real)
        dq_at = (
            DQ
            + b * stride_dqb
            + h * stride_dqh
            + start * stride_dql
            + (row_in_block[:, None] * stride_dql + dk)
        )
        dq = dq * scale + tl.load(dq_at, mask=q_mask, other=0.0)
        tl.store(dq_at, dq.to(DQ.dtype.element_ty), mask=q_mask)
