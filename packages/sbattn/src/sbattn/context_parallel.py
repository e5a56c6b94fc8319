"""One long sequence on several processes: shards of keys travel, results merge.

Rank r holds a contiguous shard of the sequence: queries, keys and values of the same positions.
The attention of its queries is the merge of segments, one per shard at or before its own, nearest
first (`sbattn.segments`):

    out = Σ_s e^{P_s} out_s,   log r = Σ_s ρ_s,   P_s = Σ_{t < s} ρ_t      (s = 0: its own shard)

Forward, shards move to the right: at step s rank r holds the shard of rank r - s. Where no row on
any rank has anything left of its stick the ranks stop together, so that both the work and the
traffic follow how far the model looks back, not how long the sequence is.

Backward, in the order of the operator's own backward pass: from the farthest segment to the
nearest, with only sums, never differences, of what the far segments contribute,

    d out_s = e^{P_s} d out,   d ρ_s = d log r + Σ_{t > s} e^{P_t} <d out, out_t>

Shards now move to the left, and the gradients of their keys and values with them: after the last
step each has arrived where it belongs.

A process holds its own shard, one visiting shard and one number per row and step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from sbattn.checks import check_dense, check_options
from sbattn.errors import InvalidInputError
from sbattn.functional import (
    Backend,
    autocast_inputs,
    skip_threshold,
    stickbreaking_attention,
)
from sbattn.segments import merge_segments

_ALIKE = ("batch", "query heads", "key heads", "head_dim of keys", "head_dim of values")


def context_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: Any = None,
    scale: float | None = None,
    attend_current: bool = False,
    enable_gqa: bool = False,
    window: int | None = None,
    skip_tol: float | Literal["exact"] = "exact",
    return_log_remainder: bool = False,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Stick-breaking attention over a sequence that is sharded across the ranks of a group.

    Rank r holds the r-th contiguous shard; shards may differ in length. Every rank of the group
    must call this, with the same options, and every rank must run the backward pass if one does.

    Args:
        q: `[B, Hq, L_r, Dk]`, this rank's queries.
        k: `[B, Hkv, L_r, Dk]`, keys of the same positions.
        v: `[B, Hkv, L_r, Dv]`, values of the same positions.
        group: the process group; None is the default group.
        scale: factor of the logits; None is `1 / sqrt(Dk)`.
        attend_current: whether a query sees the key of its own position.
        enable_gqa: allow fewer key heads than query heads.
        window: how many positions back a query sees; None is all.
        skip_tol: what may be left of a row's stick before its search ends. Also between shards:
            with 0 every shard visits every later rank, otherwise the ranks ask each other before
            each step (one reduction of one number) and stop when none needs more.
        return_log_remainder: return the log of the remainder instead of the remainder.
        backend: as in `stickbreaking_attention`.

    Returns:
        Outputs `[B, Hq, L_r, Dv]` of this rank's queries and remainders `[B, Hq, L_r]`, as
        `stickbreaking_attention` over the whole sequence gives them.

    Raises:
        InvalidInputError: bad arguments; shards that do not fit each other, on every rank.

    The load is uneven, as later ranks see more keys; the sooner the sticks are used up, the less.
    """
    # Here, not once more in the backward pass, which is run outside the autocast region.
    q, k, v = autocast_inputs(q, k, v)
    check_dense(q, k, v, enable_gqa=enable_gqa, kv_offset=None, key_padding=None)
    check_options(scale, window, skip_tol)
    if q.shape[2] != k.shape[2] or q.shape[2] < 1:
        raise InvalidInputError(
            "q and k: expected queries and keys of the same positions, at least one, "
            f"got {q.shape[2]} queries and {k.shape[2]} keys"
        )
    ring = _Ring.join(group, q, k, v)
    options = {
        "scale": scale,
        "attend_current": attend_current,
        "enable_gqa": enable_gqa,
        "window": window,
        "skip_tol": skip_tol,
        "backend": backend,
    }
    out, log_rem = _ContextParallel.apply(q, k, v, ring, options)
    return out, log_rem if return_log_remainder else log_rem.exp()


@dataclass(frozen=True)
class _Ring:
    """Who holds what: `starts[j]` is the first position of rank j's shard, and one past the end."""

    group: Any
    rank: int
    size: int
    starts: tuple[int, ...]

    @staticmethod
    def join(group: Any, q: Tensor, k: Tensor, v: Tensor) -> _Ring:
        """Exchange the shards' shapes, so that a misfit is an error everywhere, not a deadlock."""
        size = dist.get_world_size(group)
        shape = (q.shape[0], q.shape[1], k.shape[1], q.shape[3], v.shape[3], q.shape[2])
        mine = torch.tensor(shape, dtype=torch.int64, device=q.device)
        gathered = [torch.empty_like(mine) for _ in range(size)]
        dist.all_gather(gathered, mine, group=group)
        shapes = torch.stack(gathered).tolist()
        for what, sizes in zip(_ALIKE, zip(*shapes, strict=True), strict=False):
            if len(set(sizes)) > 1:
                raise InvalidInputError(
                    f"shards: expected the same {what} on every rank, got {list(sizes)}"
                )
        starts = [0]
        for *_, length in shapes:
            starts.append(starts[-1] + length)
        return _Ring(group, dist.get_rank(group), size, tuple(starts))

    def offset(self, owner: int) -> int:
        """Position of this rank's first query among the keys of the owner's shard."""
        return self.starts[self.rank] - self.starts[owner]

    def like(self, tensor: Tensor, owner: int, dtype: torch.dtype | None = None) -> Tensor:
        """Room for a tensor `[B, H, L, D]` of the owner's shard."""
        length = self.starts[owner + 1] - self.starts[owner]
        shape = (*tensor.shape[:2], length, tensor.shape[3])
        return torch.zeros(shape, dtype=dtype or tensor.dtype, device=tensor.device)

    def exchange(self, sends: Sequence[tuple[Tensor, int]], receives: _Parcels) -> None:
        """Send and receive tensors, each with the rank of the other end, and wait for all."""
        work = [
            dist.P2POp(act, tensor, group=self.group, group_peer=peer)
            for act, parcels in ((dist.isend, sends), (dist.irecv, receives))
            for tensor, peer in parcels
        ]
        for request in dist.batch_isend_irecv(work) if work else ():
            request.wait()

    def any(self, flag: Tensor) -> bool:
        """Whether a flag is set on any rank."""
        flag = flag.to(torch.int32)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.group)
        return bool(flag.item())


_Parcels = Sequence[tuple[Tensor, int]]


class _ContextParallel(torch.autograd.Function):
    """Outputs and log remainders; the backward pass computes each segment again."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, ring: _Ring, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        threshold = skip_threshold(options["skip_tol"], q.dtype)
        keys, values = k.contiguous(), v.contiguous()
        out, log_rem = _segment(q, k, v, 0, options)
        whole = out.to(log_rem.dtype), log_rem  # rounded to q's dtype once, at the end
        before = [torch.zeros_like(whole[1])]  # P_s
        steps = 1
        for step in range(1, ring.size):
            waiting = (whole[1].exp() >= threshold).any() & (ring.rank >= step)
            if threshold > 0 and not ring.any(waiting):
                break
            steps += 1
            keys, values = _to_the_right(ring, step, keys, values)
            if ring.rank >= step and bool(waiting):
                before.append(whole[1])
                part = _segment(q, keys, values, ring.offset(ring.rank - step), options)
                whole = merge_segments(whole, part)
        ctx.save_for_backward(q, k, v, *before)
        ctx.ring, ctx.options, ctx.steps = ring, options, steps
        return whole[0].to(q.dtype), whole[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_log_rem: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *before = ctx.saved_tensors
        ring: _Ring = ctx.ring
        far = d_log_rem  # d ρ of the segment at hand
        d_q = torch.zeros_like(q, dtype=far.dtype)
        visitor: list[Tensor] = []
        for step in reversed(range(ctx.steps)):
            visitor = _to_the_left(ring, step, ctx.steps, k, v, visitor, far.dtype)
            if step >= len(before):  # this rank had no need of it
                continue
            keys, values, d_keys, d_values = visitor
            d_segment = before[step].exp()[..., None] * d_out
            q_, k_, v_ = (x.detach().requires_grad_() for x in (q, keys, values))
            with torch.enable_grad():
                out, log_rem = _segment(q_, k_, v_, ring.offset(ring.rank - step), ctx.options)
            parts = torch.autograd.grad(
                (out, log_rem), (q_, k_, v_), (d_segment.to(out.dtype), far)
            )
            for total, part in zip((d_q, d_keys, d_values), parts, strict=True):
                total += part
            far = far + (d_segment * out.detach()).sum(-1)
        _, _, d_k, d_v = visitor
        return d_q.to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype), None, None


def _segment(
    q: Tensor, k: Tensor, v: Tensor, offset: int, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    return stickbreaking_attention(q, k, v, kv_offset=offset, return_log_remainder=True, **options)


def _to_the_right(ring: _Ring, step: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Hand the shard of `rank - step + 1` on, and take that of `rank - step`."""
    sends = []
    if ring.rank + 1 < ring.size and ring.rank >= step - 1:
        sends = [(keys, ring.rank + 1), (values, ring.rank + 1)]
    receives = []
    if ring.rank >= step:
        taken = [ring.like(x, ring.rank - step) for x in (keys, values)]
        receives = [(x, ring.rank - 1) for x in taken]
        keys, values = taken
    ring.exchange(sends, receives)
    return keys, values


def _to_the_left(
    ring: _Ring,
    step: int,
    steps: int,
    k: Tensor,
    v: Tensor,
    visitor: list[Tensor],
    dtype: torch.dtype,
) -> list[Tensor]:
    """Keys, values and their gradients so far of the shard of `rank - step`.

    They come from the right neighbour, which has just added its part, but for the first step and
    for the last rank, whom nobody precedes: there keys and values come from their owner.
    """
    rank, last, owner = ring.rank, ring.size - 1, ring.rank - step
    first = step == steps - 1
    own = [k.contiguous(), v.contiguous()]
    sends: list[tuple[Tensor, int]] = []
    receives: list[tuple[Tensor, int]] = []
    if not first and rank > 0 and rank > step:
        sends += [(x, rank - 1) for x in visitor]
    debut = rank + step <= last if first else rank + step == last
    if step > 0 and debut:  # some rank meets this rank's shard for the first time
        sends += [(x, rank + step) for x in own]
    if owner >= 0:
        visitor = own if step == 0 else [ring.like(x, owner) for x in own]
        visitor = visitor + [ring.like(x, owner, dtype) for x in own]
        if not first and rank < last:
            # At home keys and values are there already, but what was sent must be received.
            visitor = [ring.like(x, owner, x.dtype) for x in visitor]
            receives += [(x, rank + 1) for x in visitor]
        elif step > 0:
            receives += [(x, owner) for x in visitor[:2]]
    ring.exchange(sends, receives)
    return visitor
