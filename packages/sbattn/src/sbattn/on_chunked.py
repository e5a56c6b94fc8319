"""The chunked path as a backend of the operator; packed sequences are visited one at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sbattn.chunked import chunked_backward, chunked_forward
from sbattn.chunked_layout import Tiling
from sbattn.packed import Packing, as_dense, sequence_visibility, spans
from sbattn.saved_sizes import saved_size, unknown_size

dense_forward = chunked_forward
dense_backward = chunked_backward


def dense_state(q: Tensor, k: Tensor, _v: Tensor, *, save: bool) -> tuple[Tensor, Tensor]:
    """Tensors like the `edges` and `stop` that `dense_forward` returns."""
    if not save:
        return _state(q, (0,), (0,))
    lengths = q.shape[2], k.shape[2]
    edges = (*q.shape[:3], saved_size(_edges_per_row, *lengths))
    return _state(q, edges, (*q.shape[:2], saved_size(_row_blocks, *lengths)))


def varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packing: Packing,
    *,
    scale: float,
    attend_current: bool,
    window: int | None,
    log2_tol: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `dense_forward`, for `[total, H, D]`; edges and stop of all sequences in a row."""
    out = q.new_empty((*q.shape[:2], v.shape[2]))
    edges, stop = _state(q, (0,), (0,))
    log_rem = edges.new_empty(q.shape[:2])
    all_edges, all_stop = [edges], [stop]
    for rows, keys in spans(packing):
        found = chunked_forward(
            as_dense(q, rows),
            as_dense(k, keys),
            as_dense(v, keys),
            scale=scale,
            visibility=sequence_visibility(rows, keys, attend_current, window),
            log2_tol=log2_tol,
            save=save,
        )
        as_dense(out, rows).copy_(found[0])
        as_dense(log_rem, rows).copy_(found[1])
        all_edges.append(found[2].flatten())
        all_stop.append(found[3].flatten())
    return out, log_rem, torch.cat(all_edges), torch.cat(all_stop)


def varlen_state(
    q: Tensor, _k: Tensor, _v: Tensor, _packing: Packing, *, save: bool
) -> tuple[Tensor, Tensor]:
    """Tensors like the `edges` and `stop` that `varlen_forward` returns.

    Their sizes depend on every sequence's length, which only the run itself knows.
    """
    if not save:
        return _state(q, (0,), (0,))
    return _state(q, (unknown_size(),), (unknown_size(),))


def varlen_backward(
    d_out: Tensor,
    d_log_rem: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    edges: Tensor,
    stop: Tensor,
    packing: Packing,
    *,
    scale: float,
    attend_current: bool,
    window: int | None,
    log2_tol: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of packed `q`, `k`, `v`."""
    gradients = (torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v))
    edge, block = 0, 0
    for rows, keys in spans(packing):
        heads, queries = q.shape[1], rows.stop - rows.start
        lengths = queries, keys.stop - keys.start
        superblocks, blocks = _edges_per_row(*lengths), _row_blocks(*lengths)
        next_edge = edge + heads * queries * superblocks
        next_block = block + heads * blocks
        parts = chunked_backward(
            as_dense(d_out, rows),
            None if d_log_rem is None else as_dense(d_log_rem, rows),
            as_dense(q, rows),
            as_dense(k, keys),
            as_dense(v, keys),
            edges[edge:next_edge].view(1, heads, queries, superblocks),
            stop[block:next_block].view(1, heads, blocks),
            scale=scale,
            visibility=sequence_visibility(rows, keys, attend_current, window),
            log2_tol=log2_tol,
        )
        for total, part, span in zip(gradients, parts, (rows, keys, keys), strict=True):
            as_dense(total, span).copy_(part)
        edge, block = next_edge, next_block
    return gradients


def _edges_per_row(queries: int, keys: int) -> int:
    return Tiling.of(queries, keys).superblocks


def _row_blocks(queries: int, keys: int) -> int:
    return math.ceil(queries / Tiling.of(queries, keys).rows)


def _state(q: Tensor, edges: tuple[int, ...], stop: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(edges, dtype=dtype), q.new_empty(stop, dtype=torch.int32)
