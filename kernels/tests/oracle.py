"""The definition in float64, written out for tests: one dense batch, all keys at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def intervals(
    queries: int,
    keys: int,
    *,
    attend_current: bool = False,
    kv_offset: int | None = None,
    key_start: Tensor | None = None,
    key_end: Tensor | None = None,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """First visible key of every query and one past the last, `[B or 1, Lq]`."""
    offset = keys - queries if kv_offset is None else kv_offset
    ends = (torch.arange(queries) + offset + int(attend_current))[None]
    starts = torch.zeros_like(ends) if window is None else ends - window
    if key_start is not None:
        starts = torch.maximum(starts, key_start[:, None].long())
    if key_end is not None:
        ends = torch.minimum(ends, key_end[:, None].long())
    return starts.clamp(min=0), ends.clamp(0, keys)


def logits_and_visible(
    q: Tensor, k: Tensor, *, scale: float, **visibility: object
) -> tuple[Tensor, Tensor]:
    """Logits z `[B, Hq, Lq, Lk]` in float64 and who sees whom, `[B or 1, 1, Lq, Lk]`."""
    k = k.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    z = scale * (q.double() @ k.transpose(-1, -2))
    starts, ends = intervals(q.shape[2], k.shape[2], **visibility)
    keys = torch.arange(k.shape[2])
    return z, ((keys >= starts[..., None]) & (keys < ends[..., None]))[:, None]


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, **visibility: object
) -> tuple[Tensor, Tensor]:
    """Outputs `[B, Hq, Lq, Dv]` and log remainders `[B, Hq, Lq]`, in float64."""
    z, visible = logits_and_visible(q, k, scale=scale, **visibility)
    rest = F.logsigmoid(-z).masked_fill(~visible, 0.0)
    stick = rest.flip(-1).cumsum(-1).flip(-1)  # what is left after key j, nearest keys first
    weights = (z + stick).exp().masked_fill(~visible, 0.0)
    values = v.double().repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    return weights @ values, rest.sum(-1)
