"""How the chunked path cuts its tensors: tiles, groups of keys, chunks of heads, visible rows."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Chosen by measuring forward plus backward on one AVX-512 core with 1 MiB of second-level cache,
# among rows 128 … 1024, keys 64 … 256, groups of 4 … 32.
_ROWS = 512
_KEYS = 128
_GROUP = 4
_ROW_STEP = 32
_EDGES = 16
_SUPERBLOCK_TILES = 16
_HIDDEN = 1e30


@dataclass(frozen=True)
class Tiling:
    """Sizes of the tiles of one call.

    A tile holds its logits transposed, keys by rows of queries, and its keys are stored in
    groups of `group` neighbours: first the 0th key of every group, then the 1st of every group,
    and so on. A running sum over keys is then `group` additions of contiguous memory, and a small
    triangular product over the groups' totals. That is several times cheaper than a cumulative
    sum or than a triangular product over single keys.

    Attributes:
        rows: queries of a row block. Two fp32 buffers of `rows × keys` take at most 512 KiB and
            so stay in a usual second-level cache.
        keys: keys of a tile, a multiple of `group`.
        tiles: tiles that cover all keys.
        group: neighbouring keys that share one entry of the triangular product.
        row_step: rows are taken and dropped by this many, so that few tile shapes occur.
        superblock: tiles between two edges that forward saves for backward. Backward holds that
            many tiles at a time.
        heads: pairs of batch row and key head that share a tile; more than one if tiles are small.
    """

    rows: int
    keys: int
    tiles: int
    group: int
    row_step: int
    superblock: int
    heads: int

    @classmethod
    def of(cls, queries: int, keys: int) -> Tiling:
        """Nearly equal tiles, at most 512 × 128, for sequences of these lengths."""
        group, threads = _GROUP, torch.get_num_threads()
        tiles = math.ceil(keys / _KEYS)
        per_tile = math.ceil(math.ceil(keys / max(tiles, 1)) / group) * group
        row_step = max(1, min(_ROW_STEP, queries))
        per_block = math.ceil(queries / max(1, math.ceil(queries / _ROWS)) / row_step) * row_step
        return cls(
            rows=max(per_block, 1),
            keys=max(per_tile, group),
            tiles=tiles,
            group=group,
            row_step=row_step,
            # A bounded number of edges per row keeps memory linear in the length.
            superblock=max(_SUPERBLOCK_TILES, math.ceil(tiles / _EDGES)),
            # torch gives a thread at least 2^15 elements of an elementwise operator.
            heads=max(1, 2**15 * max(2, threads) // (max(per_block, 1) * max(per_tile, group))),
        )

    def row_blocks(self, queries: int) -> Iterator[range]:
        """The blocks of queries."""
        for start in range(0, queries, self.rows):
            yield range(start, min(queries, start + self.rows))

    @property
    def superblocks(self) -> int:
        """Edges per row."""
        return math.ceil(self.tiles / self.superblock)


class PackedKeys:
    """Keys or values `[b, h, Lk, D]` as tiles `[b·h, keys, D]` in the grouped order.

    A tile is packed, and brought to the dtype of the computation, when it is first asked for: keys
    that nobody visits cost nothing. The last tile is filled up with zeros.
    """

    def __init__(self, x: Tensor, tiling: Tiling, dtype: torch.dtype) -> None:
        b, h, _, dim = x.shape
        self._x, self._tiling = x, tiling
        self._tiles = x.new_empty((tiling.tiles, b * h, tiling.keys, dim), dtype=dtype)
        self._longest: dict[int, float] = {}

    def zeros(self) -> Tensor:
        """Room for a sum in this layout, `[tiles, b·h, keys, D]`."""
        return torch.zeros_like(self._tiles)

    def __getitem__(self, index: int) -> Tensor:
        """The tile `[b·h, keys, D]`."""
        if index not in self._longest:
            tile = self._tiles[index]
            x = self._x[:, :, index * self._tiling.keys : (index + 1) * self._tiling.keys]
            if x.shape[2] < self._tiling.keys:
                tile.zero_()
            for to, part in _members(tile, x, self._tiling):
                to.copy_(part)
            self._longest[index] = longest(tile)
        return self._tiles[index]

    def longest(self, index: int) -> float:
        """The largest Euclidean norm of this tile, once it has been asked for."""
        return self._longest[index]


def unpack_keys(tiles: Tensor, x: Tensor, tiling: Tiling) -> None:
    """Write tiles `[tiles, b·h, keys, D]` into `x` `[b, h, Lk, D]`, in `x`'s dtype."""
    for index, tile in enumerate(tiles):
        part = x[:, :, index * tiling.keys : (index + 1) * tiling.keys]
        for packed, plain in _members(tile, part, tiling):
            plain.copy_(packed)


def _members(tile: Tensor, x: Tensor, tiling: Tiling) -> Iterator[tuple[Tensor, Tensor]]:
    """The parts of a tile, and the same keys of `x` `[b, h, at most keys, D]`."""
    b, h, length, dim = x.shape
    members = tile.view(b, h, tiling.group, tiling.keys // tiling.group, dim)
    full = length // tiling.group
    whole = x[:, :, : full * tiling.group].unflatten(2, (full, tiling.group))
    yield members[:, :, :, :full].transpose(2, 3), whole
    if length % tiling.group:
        yield members[:, :, : length % tiling.group, full], x[:, :, full * tiling.group :]


def longest(vectors: Tensor) -> float:
    """The largest Euclidean norm."""
    return float(vectors.square().sum(-1).amax().sqrt())


class VisibleRows:
    """Which rows see which tile: both bounds of a row's interval never fall along the rows."""

    def __init__(self, starts: Tensor, ends: Tensor, tiling: Tiling) -> None:
        """Take the first visible key, and one past the last, of every query: `[b, Lq]` each."""
        self._starts, self._ends, self._tiling = starts, ends, tiling
        self._first_start: list[int] = starts.amin(0).tolist()
        self._last_start: list[int] = starts.amax(0).tolist()
        self._first_end: list[int] = ends.amin(0).tolist()
        self._last_end: list[int] = ends.amax(0).tolist()
        groups = tiling.keys // tiling.group
        slots = torch.arange(tiling.keys, device=starts.device)
        self._order = (slots % groups * tiling.group + slots // groups)[:, None]

    def tiles(self, rows: range) -> range:
        """The tiles that some row of this block sees, from left to right."""
        size = self._tiling.keys
        first = self._first_start[rows.start] // size
        return range(first, max(first, math.ceil(self._last_end[rows.stop - 1] / size)))

    def rows(self, tile: int, rows: range) -> tuple[int, int]:
        """The rows of this block that see this tile, `[lo, hi)` within the block."""
        left = tile * self._tiling.keys
        lo = bisect_right(self._last_end, left, rows.start, rows.stop) - rows.start
        hi = (
            bisect_left(self._first_start, left + self._tiling.keys, rows.start, rows.stop)
            - rows.start
        )
        step = self._tiling.row_step
        return lo // step * step, min(len(rows), math.ceil(hi / step) * step)

    def hide(self, logits: Tensor, tile: int, first: int, last: int) -> None:
        """Lower the logits `[b, h, keys, rows]` of what rows `first … last − 1` do not see.

        By so much that `2^t` is 0. Arithmetic on floats costs a tenth of a mask and a fill.
        """
        left = tile * self._tiling.keys
        if self._first_end[first] < left + self._tiling.keys:
            ends = (self._ends[:, None, None, first:last] - left).to(logits)
            logits.sub_((self._order + 1 - ends).clamp_(min=0.0), alpha=_HIDDEN)
        if self._last_start[last - 1] > left:
            starts = (self._starts[:, None, None, first:last] - left).to(logits)
            logits.sub_((starts - self._order).clamp_(min=0.0), alpha=_HIDDEN)
