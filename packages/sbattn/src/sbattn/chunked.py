"""Stick-breaking attention in linear memory, in plain torch: what a CPU runs.

One pair of batch row and key head at a time (several while tiles are small), one block of queries
after another. Forward walks the key tiles from the diagonal to the first key and stops where
no row of the block has any stick left to speak of; rows at the block's end, which have seen the
most keys, are dropped before that. Backward takes one super-block of tiles after another, from the
first key to the diagonal: it rebuilds the weights from right to left, beginning with the edge that
forward saved, keeps these tiles, and visits them again from left to right with the exclusive sums
`F`. That is five matrix products per tile, memory for one super-block of one row block, and a
fixed order of every sum.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sbattn.chunked_layout import PackedKeys, Tiling, unpack_keys
from sbattn.chunked_tiles import LN2
from sbattn.chunked_walk import head_chunks
from sbattn.visibility import Visibility


def chunked_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    visibility: Visibility,
    log2_tol: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Outputs and log remainders, and what backward needs.

    Args:
        q: queries `[B, Hq, Lq, Dk]`, any strides, any floating dtype.
        k: keys `[B, Hkv, Lk, Dk]`; `Hkv` divides `Hq`.
        v: values `[B, Hkv, Lk, Dv]`.
        scale: factor of the logits.
        visibility: which keys a query sees.
        log2_tol: a row is done once log2 of what is left of its stick is below this (−inf:
            never). Its output is then off by at most `2^log2_tol` times the largest `|v|` that it
            has not seen, and its remainder by at most `2^log2_tol`.
        save: whether backward will follow.

    Returns:
        Outputs `[B, Hq, Lq, Dv]` in `q`'s dtype; log remainders `[B, Hq, Lq]` in float32 (float64
        for float64); log2 of the stick at the right edge of every super-block,
        `[B, Hq, Lq, superblocks]`; the first visited key of every block of queries,
        `[B, Hq, blocks]` int32, `Lk` if none. The last two are empty unless `save`.
    """
    q, k, v = q.detach(), k.detach(), v.detach()
    batch, heads, queries, _ = q.shape
    tiling = Tiling.of(queries, k.shape[2])
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = q.new_empty((batch, heads, queries, v.shape[3]))
    log_rem = q.new_empty((batch, heads, queries), dtype=dtype)
    edges = log_rem.new_full(
        (batch, heads, queries, tiling.superblocks) if save else (0,), -math.inf
    )
    blocks = math.ceil(queries / tiling.rows)
    stop = log_rem.new_full((batch, heads, blocks) if save else (0,), k.shape[2], dtype=torch.int32)
    for chunk in head_chunks(q, k, tiling, dtype, scale, visibility, log2_tol):
        scratch, weights = chunk.buffer(), chunk.buffer()
        values = PackedKeys(v[chunk.at], tiling, dtype)
        for head in chunk.query_heads:
            for block, rows in enumerate(tiling.row_blocks(queries)):
                at = (*head, slice(rows.start, rows.stop))
                chunk.load(q[at], rows)
                total = log_rem.new_zeros((chunk.pairs, len(rows), v.shape[3]))
                last, superblock = None, None
                for tile in reversed(chunk.visible.tiles(rows)):
                    if save and superblock != tile // tiling.superblock:
                        superblock = tile // tiling.superblock
                        edges[*at, superblock] = chunk.stick.view_as(log_rem[at])
                    if chunk.live == 0:
                        break
                    lo, hi = chunk.weigh(tile, scratch, weights, scratch)
                    if lo < hi:
                        last = tile
                        weight = weights.views(hi - lo)[0]
                        total[:, lo:hi].baddbmm_(weight.transpose(1, 2), values[tile])
                out[at] = total.view_as(out[at])
                log_rem[at] = (chunk.stick * LN2).view_as(log_rem[at])
                if save and last is not None:
                    stop[*head, block] = last * tiling.keys
    return out, log_rem, edges, stop


def chunked_backward(
    d_out: Tensor,
    d_log_rem: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    edges: Tensor,
    stop: Tensor,
    *,
    scale: float,
    visibility: Visibility,
    log2_tol: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values, each in its tensor's dtype.

    They are those of the function that forward computed, without the keys that it skipped.

    Args:
        d_out: gradient of the outputs, `[B, Hq, Lq, Dv]`.
        d_log_rem: gradient of the log remainders, `[B, Hq, Lq]`; None for zero.
        q: as in forward, and so are `k`, `v`, `scale`, `visibility` and `log2_tol`.
        k: as in forward.
        v: as in forward.
        edges: what forward saved.
        stop: what forward saved.
        scale: as in forward.
        visibility: as in forward.
        log2_tol: as in forward.
    """
    q, k, v, d_out = q.detach(), k.detach(), v.detach(), d_out.detach()
    queries = q.shape[2]
    tiling = Tiling.of(queries, k.shape[2])
    dtype = edges.dtype
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    slots = min(tiling.superblock, tiling.tiles)
    for chunk in head_chunks(q, k, tiling, dtype, scale, visibility, log2_tol):
        odds = [chunk.buffer() for _ in range(slots)]
        weights = [chunk.buffer() for _ in range(slots)]
        pulls = chunk.buffer()
        values = PackedKeys(v[chunk.at], tiling, dtype)
        dk_tiles, dv_tiles = chunk.keys.zeros(), values.zeros()
        for head in chunk.query_heads:
            for block, rows in enumerate(tiling.row_blocks(queries)):
                at = (*head, slice(rows.start, rows.stop))
                chunk.load(q[at], rows)
                do = d_out[at].to(dtype).reshape(chunk.pairs, len(rows), v.shape[3]).contiguous()
                dq_rows = torch.zeros_like(chunk.queries)
                if d_log_rem is None:
                    farther = do.new_zeros(do.shape[:2])
                else:
                    farther = d_log_rem[at].detach().to(dtype, copy=True).reshape(do.shape[:2])
                seen = chunk.visible.tiles(rows)
                first = max(seen.start, int(stop[*head, block].min()) // tiling.keys)
                for superblock in range(
                    first // tiling.superblock, math.ceil(seen.stop / tiling.superblock)
                ):
                    left = superblock * tiling.superblock
                    right = min(seen.stop, left + tiling.superblock)
                    chunk.resume(edges[*at, superblock])
                    visited = []
                    for slot, tile in enumerate(reversed(range(max(first, left), right))):
                        lo, hi = chunk.weigh(tile, odds[slot], weights[slot], pulls)
                        if lo < hi:
                            visited.append((slot, tile, lo, hi))
                    for slot, tile, lo, hi in reversed(visited):
                        do_rows = do[:, lo:hi]
                        dz = pulls.views(hi - lo)[0]
                        dv_tiles[tile].baddbmm_(weights[slot].views(hi - lo)[0], do_rows)
                        torch.bmm(values[tile], do_rows.transpose(1, 2), out=dz)
                        chunk.arithmetic.differentiate(
                            pulls, odds[slot], weights[slot], farther[:, lo:hi]
                        )
                        dk_tiles[tile].baddbmm_(dz, chunk.queries[:, lo:hi])
                        dq_rows[:, lo:hi].baddbmm_(dz.transpose(1, 2), chunk.keys[tile])
                dq[at] = dq_rows.mul_(scale).view_as(dq[at])
        # The packed queries carry the factor scale · log2 e.
        unpack_keys(dk_tiles.mul_(LN2), dk[chunk.at], tiling)
        unpack_keys(dv_tiles, dv[chunk.at], tiling)
    return dq, dk, dv
