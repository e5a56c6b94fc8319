"""Decoding in tensor code: tiles of the cache from the newest key back, until the stick ends.

All sequences of a batch step back from their ends together, so that a column of a tile means the
same distance from the end in each of them, and with it the same visibility. Sequences that are
through leave the batch. Keys and values are read where they lie: nothing of the cache is copied
but what half precision or pages make necessary, one tile at a time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_FIRST_TILE = 128
_LARGEST_TILE = 1024

Reader = Callable[[Tensor, int, int, int], Tensor]


def decode_tiles(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    *,
    scale: float,
    attend_current: bool,
    window: int | None,
    log_tol: float,
) -> tuple[Tensor, Tensor]:
    """Outputs `[B, Lq, Hq, Dv]` and log remainders `[B, Lq, Hq]`, from checked arguments.

    `log_tol` is the natural log of what may be left of a row's stick when its search ends.
    """
    queries, heads = q.shape[1:3]
    kv_heads, value_dim = v_cache.shape[2:]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if q.numel() == 0:
        return q.new_zeros((*q.shape[:3], value_dim)), q.new_zeros(q.shape[:3], dtype=dtype)
    lengths = cache_seqlens.tolist()
    read = reader(block_table)

    # Rows of a kv head: queries, and in each the query heads that share it.
    rows = q.to(dtype).mul(scale).unflatten(2, (kv_heads, -1)).transpose(1, 2).flatten(2, 3)
    out = rows.new_zeros((*rows.shape[:3], value_dim))
    log_rem = rows.new_zeros(rows.shape[:3])
    # A query sees the distances from `nearest` on: how far from the end its first key stands.
    nearest = torch.arange(queries, 0, -1, device=q.device) - int(attend_current)
    nearest = nearest.repeat_interleave(heads // kv_heads)[:, None]

    # How far from the end anything is seen.
    reach = max(lengths) if window is None else queries - int(attend_current) + window
    ends = [min(length, reach) for length in lengths]
    live = [b for b, end in enumerate(ends) if end]
    distance = 0
    while live:
        size = min(max(distance, _FIRST_TILE), _LARGEST_TILE)
        size = min(size, max(ends[b] for b in live) - distance)
        spans = [(b, max(lengths[b] - distance - size, 0), lengths[b] - distance) for b in live]

        z = rows.new_zeros((len(live), *rows.shape[1:3], size))
        for tile, (b, left, right) in zip(z, spans, strict=True):
            keys = read(k_cache, b, left, right).to(dtype)
            torch.bmm(rows[b], keys.permute(1, 2, 0), out=tile[..., size - (right - left) :])

        away = distance + torch.arange(size, 0, -1, device=q.device)  # 1: the last token
        seen = away > nearest
        if window is not None:
            seen &= away <= nearest + window
        first = torch.tensor([[size - (right - left)] for _, left, right in spans])
        exists = torch.arange(size, device=q.device) >= first.to(q.device)
        hidden = ~(seen & exists[:, None, None])
        rest = F.logsigmoid(-z).masked_fill_(hidden, 0.0)  # log(1 - beta)
        stick = rest.flip(-1).cumsum(-1).flip(-1) + log_rem[live][..., None]
        weights = z.add_(stick).exp_().masked_fill_(hidden, 0.0)

        for tile, (b, left, right) in zip(weights, spans, strict=True):
            values = read(v_cache, b, left, right).to(dtype)
            out[b].baddbmm_(tile[..., size - (right - left) :], values.transpose(0, 1))
        log_rem[live] = stick[..., 0]
        spent = (stick[..., 0] < log_tol).flatten(1).all(1).tolist()
        distance += size
        live = [b for b, done in zip(live, spent, strict=True) if not done and distance < ends[b]]

    return _by_query(out, queries).to(q.dtype), _by_query(log_rem, queries)


def reader(block_table: Tensor | None) -> Reader:
    """How to read positions `[left, right)` of sequence `b` from a cache: `[keys, heads, D]`."""
    if block_table is None:
        return lambda cache, b, left, right: cache[b, left:right]

    def read(cache: Tensor, b: int, left: int, right: int) -> Tensor:
        size = cache.shape[1]
        first = left // size
        pages = cache.index_select(0, block_table[b, first : -(-right // size)])
        return pages.flatten(0, 1)[left - first * size : right - first * size]

    return read


def _by_query(x: Tensor, queries: int) -> Tensor:
    """`[B, Hkv, Lq · group, ...]` to `[B, Lq, Hq, ...]`."""
    return x.unflatten(2, (queries, -1)).transpose(1, 2).flatten(2, 3).contiguous()
