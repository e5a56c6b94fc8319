"""The definition, written out: the oracle that everything else is held against.

It keeps the whole `Lq × Lk` matrix, and autograd differentiates it. Give it float64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sbattn.visibility import Visibility


def naive_weights(
    q: Tensor, k: Tensor, *, scale: float, visibility: Visibility
) -> tuple[Tensor, Tensor]:
    """Weights `A` `[B, Hq, Lq, Lk]` and the log of what is left of the stick `[B, Hq, Lq]`.

    `q` is `[B, Hq, Lq, Dk]`, `k` is `[B, Hkv, Lk, Dk]`. With `z = scale · q k` and
    `softplus(z) = -log(1 - sigmoid(z))`:

        log A_ij = log sigmoid(z_ij) - Σ_{l visible, l > j} softplus(z_il)
        log r_i  = -Σ_{l visible} softplus(z_il)
    """
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    z = scale * (q @ k.transpose(-1, -2))
    starts, ends = visibility.intervals(q.shape[2], k.shape[2], q.device)
    keys = torch.arange(k.shape[2], device=q.device)
    visible = ((keys >= starts[..., None]) & (keys < ends[..., None]))[:, None]
    log_rest = F.logsigmoid(-z).masked_fill(~visible, 0.0)  # log(1 - beta)
    nearer = log_rest.flip(-1).cumsum(-1).flip(-1) - log_rest
    weights = (F.logsigmoid(z) + nearer).exp().masked_fill(~visible, 0.0)
    return weights, log_rest.sum(-1)


def naive_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, visibility: Visibility
) -> tuple[Tensor, Tensor]:
    """Outputs `[B, Hq, Lq, Dv]` in `q`'s dtype and log remainders `[B, Hq, Lq]`.

    Computed in float64 if the inputs are, else in float32, in which the remainders come, too.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    weights, log_rem = naive_weights(q.to(dtype), k.to(dtype), scale=scale, visibility=visibility)
    values = v.to(dtype).repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    return (weights @ values).to(q.dtype), log_rem
