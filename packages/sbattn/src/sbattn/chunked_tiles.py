"""The arithmetic of one tile: weights from right to left, gradients from left to right.

All tensors here are transposed tiles, `[heads, keys, rows]`, whose keys stand in the grouped order
of `sbattn.chunked_layout.Tiling`. Logits are in base 2: `t = z · log2 e`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sbattn.chunked_layout import Tiling

LOG2E = math.log2(math.e)
LN2 = math.log(2.0)


class TileBuffer:
    """One tile's memory, seen as `[heads, keys, rows]` for any number of rows, and by groups."""

    def __init__(self, heads: int, tiling: Tiling, like: Tensor) -> None:
        self._memory = like.new_empty(heads * tiling.keys * tiling.rows)
        self._heads, self._tiling = heads, tiling
        self._views: dict[int, tuple[Tensor, Tensor, tuple[Tensor, ...]]] = {}

    def views(self, rows: int) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """The tile; the tile as `[heads, member, group, rows]`; and that by members."""
        if rows not in self._views:
            tiling = self._tiling
            used = self._memory[: self._heads * tiling.keys * rows]
            tile = used.view(self._heads, tiling.keys, rows)
            grouped = tile.unflatten(1, (tiling.group, tiling.keys // tiling.group))
            self._views[rows] = tile, grouped, grouped.unbind(1)
        return self._views[rows]


class TileArithmetic:
    """What tiles of one shape share: the triangular matrices, and the saturation limit."""

    def __init__(self, heads: int, tiling: Tiling, like: Tensor) -> None:
        ones = like.new_ones((heads, tiling.keys // tiling.group, tiling.keys // tiling.group))
        self._nearer = ones.triu(1)  # groups to the right of each group
        self._farther = ones.tril(-1)
        # 2^limit is finite, and so is its product with any sensible gradient.
        self.limit = 900.0 if like.dtype == torch.float64 else 100.0

    def weigh(
        self,
        odds: TileBuffer,
        weights: TileBuffer,
        scratch: TileBuffer,
        acc: Tensor,
        *,
        saturated: bool,
    ) -> None:
        """Turn the logits in `weights` into weights; leave `2^t` in `odds`; use up the stick.

        `acc` `[heads, rows]` is log2 of the stick that the tile finds at its right edge, and is
        moved to the left edge. `scratch` may be `odds` if the odds are not needed.
        `saturated` says that logits may exceed `limit`.
        """
        rows = acc.shape[1]
        x, _, _ = odds.views(rows)
        t, _, _ = weights.views(rows)
        spent, grouped, members = scratch.views(rows)
        if saturated:
            excess = (t - self.limit).clamp_(min=0.0)
            torch.sub(t, excess, out=x)
            torch.log1p(x.exp2_(), out=spent)
            spent.add_(excess, alpha=LN2)
        else:
            torch.log1p(torch.exp2(t, out=x), out=spent)
        # spent = softplus(z) = −log(1 − β); now its inclusive sums from the right, off the stick.
        totals = grouped.sum(1)
        # Written to `out`, as all products here: those are left alone by autocast.
        edges = torch.baddbmm(
            acc[:, None], self._nearer, totals, alpha=-LOG2E, out=torch.empty_like(totals)
        )
        left = edges
        for member in reversed(members):
            left = torch.sub(left, member, alpha=LOG2E, out=member)
        acc.copy_(left[:, 0])
        t.add_(spent).exp2_()

    def differentiate(
        self, pull: TileBuffer, odds: TileBuffer, weights: TileBuffer, farther: Tensor
    ) -> None:
        """Turn `pull`, which holds `g = ⟨do, v⟩`, into the gradient of the logits `z`.

        `farther` `[heads, rows]` is `F` at the tile's left edge (the gradient of the log remainder
        plus `Σ A g` over all keys farther than the tile) and is moved to the right edge. With the
        odds `x = β / (1 − β)`, `(1 − β) a − β F = (a − x F) / (1 + x)`, in which nothing
        cancels that does not cancel in exact arithmetic. Uses up `odds` and `weights`.
        """
        rows = farther.shape[1]
        a, a_grouped, a_members = pull.views(rows)
        x, _, _ = odds.views(rows)
        weight, _, _ = weights.views(rows)
        a.mul_(weight)
        totals = a_grouped.sum(1)
        sums, _, sum_members = weights.views(rows)
        torch.baddbmm(farther[:, None], self._farther, totals, out=sum_members[0])
        for index in range(1, len(sum_members)):
            torch.add(sum_members[index - 1], a_members[index - 1], out=sum_members[index])
        torch.add(sum_members[-1][:, -1], a_members[-1][:, -1], out=farther)
        a.addcmul_(x, sums, value=-1.0)
        a.div_(x.add_(1.0))
