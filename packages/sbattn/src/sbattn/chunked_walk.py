"""A walk of one block of queries over the key tiles, for one chunk of heads."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from sbattn.chunked_layout import PackedKeys, Tiling, VisibleRows, longest
from sbattn.chunked_tiles import LOG2E, TileArithmetic, TileBuffer
from sbattn.visibility import Visibility


class HeadChunk:
    """Pairs of batch row and key head that share tiles, and the block of queries under way.

    Attributes:
        at: the slices of batch rows and key heads.
        query_heads: the slices of batch rows and query heads, one for each query head of a
            group, so that keys need no repeating.
        pairs: how many pairs.
        keys: packed keys.
        visible: who sees which tile.
        arithmetic: that of these tiles.
        queries: the block's queries `[pairs, rows, Dk]`, times `scale · log2 e`.
        stick: log2 of what is left of each row's stick, `[pairs, rows]`.
        live: rows before this one may have some stick left; those from it on have none.
    """

    def __init__(
        self,
        at: tuple[slice, slice],
        k: Tensor,
        group: int,
        visible: VisibleRows,
        tiling: Tiling,
        dtype: torch.dtype,
        scale: float,
        log2_tol: float,
    ) -> None:
        heads = at[1]
        self.at = at
        self.query_heads = [
            (at[0], slice(heads.start * group + member, heads.stop * group, group))
            for member in range(group)
        ]
        self.keys = PackedKeys(k[at], tiling, dtype)
        self._split = k[at].shape[:2]
        self.pairs = math.prod(self._split)
        self.visible = visible
        self._tiling, self._scale, self._log2_tol = tiling, scale * LOG2E, log2_tol
        self._stick = k.new_empty((self.pairs, tiling.rows), dtype=dtype)
        self.arithmetic = TileArithmetic(self.pairs, tiling, self._stick)

    def buffer(self) -> TileBuffer:
        """Memory for one tile."""
        return TileBuffer(self.pairs, self._tiling, self._stick)

    def load(self, q: Tensor, rows: range) -> None:
        """Begin a block: its queries `[b, h, rows, Dk]`, whole sticks."""
        self._rows = rows
        scaled = q.to(self._stick.dtype) * self._scale
        self.queries = scaled.reshape(self.pairs, len(rows), q.shape[3]).contiguous()
        self._longest = longest(self.queries)
        self._stick.fill_(-math.inf)
        self.stick = self._stick[:, : len(rows)]
        self.stick.zero_()
        self.live = len(rows)

    def resume(self, stick: Tensor) -> None:
        """Set the sticks of the block to what they were at a tile's right edge."""
        self.stick.copy_(stick.reshape(self.stick.shape))
        self.live = len(self._rows)
        self._drop_spent_rows()

    def weigh(
        self, tile: int, odds: TileBuffer, weights: TileBuffer, scratch: TileBuffer
    ) -> tuple[int, int]:
        """Compute the weights of one tile, and use up the sticks. Returns the rows taken.

        Rows `[lo, hi)` are those that see the tile and may have some stick left; none if
        `lo >= hi`. For the buffers see `TileArithmetic.weigh`.
        """
        lo, hi = self.visible.rows(tile, self._rows)
        hi = min(hi, self.live)
        if lo >= hi:
            return lo, hi
        logits = weights.views(hi - lo)[0]
        torch.bmm(self.keys[tile], self.queries[:, lo:hi].transpose(1, 2), out=logits)
        self.visible.hide(
            logits.view(*self._split, *logits.shape[1:]),
            tile,
            self._rows.start + lo,
            self._rows.start + hi,
        )
        bound = self._longest * self.keys.longest(tile)
        self.arithmetic.weigh(
            odds,
            weights,
            scratch,
            self.stick[:, lo:hi],
            saturated=not bound <= self.arithmetic.limit,
        )
        self._drop_spent_rows()
        return lo, hi

    def _drop_spent_rows(self) -> None:
        if self._log2_tol == -math.inf:
            return
        step = self._tiling.row_step
        left = self._stick.view(self.pairs, -1, step).amax((0, 2)).tolist()
        steps = math.ceil(self.live / step)
        while steps and left[steps - 1] < self._log2_tol:
            steps -= 1
        self.live = min(self.live, steps * step)


def head_chunks(
    q: Tensor,
    k: Tensor,
    tiling: Tiling,
    dtype: torch.dtype,
    scale: float,
    visibility: Visibility,
    log2_tol: float,
) -> Iterator[HeadChunk]:
    """Chunks of at most `tiling.heads` pairs of batch row and key head, computing in `dtype`."""
    batch, heads, keys, _ = k.shape
    starts, ends = visibility.intervals(q.shape[2], keys, q.device)
    shared = VisibleRows(starts, ends, tiling) if starts.shape[0] == 1 else None
    heads_each = min(heads, tiling.heads)
    rows_each = max(1, tiling.heads // max(heads, 1))
    for b in range(0, batch, rows_each):
        bs = slice(b, min(batch, b + rows_each))
        visible = shared or VisibleRows(starts[bs], ends[bs], tiling)
        for h in range(0, heads, heads_each):
            at = bs, slice(h, min(heads, h + heads_each))
            yield HeadChunk(at, k, q.shape[1] // heads, visible, tiling, dtype, scale, log2_tol)
