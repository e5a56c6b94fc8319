"""How much of the causal square a stick-breaking head really reads.

Once less than `skip_tol` is left of every stick in a block of queries, the keys farther away are
not visited: what they could add is bounded by what is left. The share of the tiles that are
visited follows from queries and keys alone, whichever backend computes the attention; here it is
counted. Logits are made for one block of queries and a few thousand keys at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sbattn.attention import StickBreakingAttention
from sbattn.checks import check_dense, check_options
from sbattn.errors import InvalidInputError
from sbattn.functional import skip_threshold
from sbattn.ops import remainder_dtype
from sbattn.positions import token_positions
from sbattn.visibility import Visibility

# Logits that one head holds at a time.
_LOGITS = 1 << 18


def live_tile_fraction(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None = None,
    attend_current: bool = False,
    window: int | None = None,
    tile: tuple[int, int] = (64, 64),
    skip_tol: float | Literal["exact"] = "exact",
) -> Tensor:
    """Tiles visited, divided by tiles that hold a visible key: `[B, Hq]`, float64.

    A block of queries visits its tiles from the nearest to the farthest, and stops when less than
    `skip_tol` is left of every one of its sticks.

    Args:
        query: `[B, Hq, Lq, D]`.
        key: `[B, Hkv, Lk, D]`; `Hq` is a multiple of `Hkv`. The last query is the last key's token.
        scale: factor of the logits (None: `1 / sqrt(D)`).
        attend_current: whether a query sees the key of its own position.
        window: how many positions back a query sees (None: all).
        tile: queries and keys of a tile; blocks of queries are counted from the first query, tiles
            of keys from key 0.
        skip_tol: what may be left of a stick; "exact" is the unit roundoff, 0 never skips.

    Returns:
        1 where everything is visited, 0 where there is nothing to visit.

    Raises:
        InvalidInputError: if an argument does not fit.
    """
    _check(query, key, scale, window, tile, skip_tol)
    log_tol = _log_tol(skip_tol, query.dtype)
    visited = torch.zeros(query.shape[:2], dtype=torch.float64, device=query.device)
    tiles = 0
    for walk in _walks(query, key, scale, attend_current, window, tile):
        tiles += walk.tiles
        for left, _ in walk.sticks(log_tol):
            visited += (left.amax(2) >= log_tol).sum(-1)
    return visited / max(tiles, 1)


def live_keys(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None = None,
    attend_current: bool = False,
    window: int | None = None,
    skip_tol: float | Literal["exact"] = "exact",
) -> Tensor:
    """How many keys each query reads before less than `skip_tol` of its stick is left.

    The same question as `live_tile_fraction`, asked of every query alone: what a decoding step at
    that position costs. Arguments as there.

    Returns:
        `[B, Hq, Lq]` integers.
    """
    _check(query, key, scale, window, (64, 1), skip_tol)
    log_tol = _log_tol(skip_tol, query.dtype)
    counts = torch.zeros(query.shape[:3], dtype=torch.int64, device=query.device)
    for walk in _walks(query, key, scale, attend_current, window, (64, 1)):
        for left, visible in walk.sticks(log_tol):
            counts[:, :, walk.rows] += ((left >= log_tol) & visible).sum(-1)
    return counts


def model_live_fractions(
    model: nn.Module,
    input_ids: Tensor,
    *,
    tile: tuple[int, int] = (64, 64),
    skip_tol: float | Literal["exact"] | None = None,
) -> Tensor:
    """Live-tile fraction of every stick-breaking head of a model on a batch.

    Args:
        model: called as `model(input_ids)`; its `StickBreakingAttention` layers are asked, in the
            order of `model.modules()`.
        input_ids: `[B, L]`, without padding.
        tile: as in `live_tile_fraction`.
        skip_tol: as there; None: each layer's own.

    Returns:
        `[layers, heads]`, float64, the mean over the batch.

    Raises:
        InvalidInputError: if the model has no stick-breaking layer.
    """
    layers = [part for part in model.modules() if isinstance(part, StickBreakingAttention)]
    if not layers:
        raise InvalidInputError(
            "model: expected StickBreakingAttention layers, found none; only stick-breaking skips"
        )
    fractions: dict[Any, Tensor] = {}

    def ask(layer: StickBreakingAttention, inputs: tuple[Tensor, ...]) -> None:
        (x,) = inputs
        q, k, _ = layer.heads(x, token_positions(x.shape[1], x.device))
        fractions[layer] = live_tile_fraction(
            q,
            k,
            scale=layer.scale,
            attend_current=layer.attend_current,
            window=layer.window,
            tile=tile,
            skip_tol=layer.skip_tol if skip_tol is None else skip_tol,
        ).mean(0)

    hooks = [layer.register_forward_pre_hook(ask) for layer in layers]
    try:
        with torch.no_grad():
            model(input_ids)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack([fractions[layer] for layer in layers])


@dataclass(frozen=True)
class _Walk:
    """One block of queries on its way from the nearest tile to the farthest."""

    rows: slice
    query: Tensor  # [B, Hq, rows, D]
    key: Tensor  # [B, Hkv, Lk, D]
    scale: float
    starts: Tensor  # [rows], first visible key
    ends: Tensor  # [rows], one past the last
    first: int  # tiles first, …, last - 1 hold a key that is visible to some row
    last: int
    width: int  # keys per tile

    @property
    def tiles(self) -> int:
        return self.last - self.first

    def sticks(self, log_tol: float) -> Iterator[tuple[Tensor, Tensor]]:
        """Runs of tiles, nearest first, while some head has a stick left.

        Yields the log of the stick left to each row when it comes to each tile,
        `[B, Hq, rows, tiles]`, and whether the tile holds a key that it sees, `[rows, tiles]`.
        """
        batch, heads, rows, _ = self.query.shape
        groups = heads // self.key.shape[1]
        run = max(1, _LOGITS // (rows * self.width))
        left = self.query.new_zeros(batch, heads, rows, 1)
        for last in range(self.last, self.first, -run):
            first = max(self.first, last - run)
            keys = torch.arange(first * self.width, last * self.width, device=self.key.device)
            keys = keys[: self.key.shape[2] - first * self.width]
            near = self.key[:, :, first * self.width : last * self.width]
            near = near.to(left.dtype).repeat_interleave(groups, dim=1)
            visible = (keys >= self.starts[:, None]) & (keys < self.ends[:, None])
            spent = nn.functional.softplus(self.scale * (self.query @ near.transpose(-1, -2)))
            spent = self._by_tile(spent.masked_fill(~visible, 0.0), last - first).sum(-1)
            after = left - spent.flip(-1).cumsum(-1).flip(-1)
            yield after + spent, self._by_tile(visible, last - first).any(-1)
            left = after[..., :1]
            if bool((left.amax(2) < log_tol).all()):
                return

    def _by_tile(self, x: Tensor, tiles: int) -> Tensor:
        missing = tiles * self.width - x.shape[-1]
        return nn.functional.pad(x, (0, missing)).unflatten(-1, (tiles, self.width))


def _walks(
    query: Tensor,
    key: Tensor,
    scale: float | None,
    attend_current: bool,
    window: int | None,
    tile: tuple[int, int],
) -> Iterator[_Walk]:
    """The blocks of queries that see anything."""
    queries, keys, dtype = query.shape[2], key.shape[2], remainder_dtype(query.dtype)
    visibility = Visibility(kv_offset=keys - queries, attend_current=attend_current, window=window)
    starts, ends = (bound[0] for bound in visibility.intervals(queries, keys, query.device))
    for begin in range(0, queries, tile[0]):
        rows = slice(begin, min(begin + tile[0], queries))
        low, high = int(starts[rows].min()), int(ends[rows].max())
        if high <= low:
            continue
        yield _Walk(
            rows=rows,
            query=query[:, :, rows].detach().to(dtype),
            key=key.detach(),
            scale=1 / math.sqrt(query.shape[-1]) if scale is None else scale,
            starts=starts[rows],
            ends=ends[rows],
            first=low // tile[1],
            last=-(-high // tile[1]),
            width=tile[1],
        )


def _check(
    query: Tensor,
    key: Tensor,
    scale: float | None,
    window: int | None,
    tile: tuple[int, int],
    skip_tol: float | Literal["exact"],
) -> None:
    check_dense(query, key, key, enable_gqa=True, kv_offset=None, key_padding=None)
    check_options(scale, window, skip_tol)
    sizes: Any = tile  # whatever the caller gave
    pair = isinstance(sizes, (tuple, list)) and len(sizes) == 2
    if not pair or not all(isinstance(size, int) and size >= 1 for size in sizes):
        raise InvalidInputError(
            f"tile: expected two integers, at least one query and one key, got {tile!r}"
        )


def _log_tol(skip_tol: float | Literal["exact"], dtype: torch.dtype) -> float:
    """Natural log of the tolerance."""
    tolerance = skip_threshold(skip_tol, dtype)
    return math.log(tolerance) if tolerance else -math.inf
