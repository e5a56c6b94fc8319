"""Which keys a query sees: always an interval of positions.

Query `i` stands at position `p = i + kv_offset` among the keys. It sees the keys before it, and
its own if `attend_current`; at most the nearest `window` positions; and only valid keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Visibility:
    """The rule of who sees whom.

    Attributes:
        kv_offset: position of the first query among the keys: `Lk - Lq` when the last query is
            the last key's token.
        attend_current: whether a query sees the key of its own position.
        window: how many positions back a query sees (None: all).
        key_start: `[B]` integers, the first valid key of each batch row (None: 0).
        key_end: `[B]` integers, one past the last valid key of each batch row (None: all).
    """

    kv_offset: int
    attend_current: bool = False
    window: int | None = None
    key_start: Tensor | None = None
    key_end: Tensor | None = None

    def intervals(
        self, queries: int, keys: int, device: torch.device | None = None
    ) -> tuple[Tensor, Tensor]:
        """First visible key, and one past the last, of every query: `[B or 1, Lq]` integers.

        Both are within the keys. Where nothing is visible, the end is not larger than the start.
        """
        positions = torch.arange(queries, device=device) + self.kv_offset
        ends = (positions + int(self.attend_current)).clamp(0, keys)[None]
        starts = torch.zeros_like(ends)
        if self.window is not None:
            starts = (positions + int(self.attend_current) - self.window).clamp(0, keys)[None]
        if self.key_start is not None:
            starts = torch.maximum(starts, self.key_start.to(starts)[:, None])
        if self.key_end is not None:
            ends = torch.minimum(ends, self.key_end.to(ends)[:, None])
        return starts, ends
