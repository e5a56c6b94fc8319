"""Backward: deterministic, and linear in memory.

The gradient of a logit needs the stick from the near end and F from the far end of its row
(`backward_tile`). The forward saved `acc` at the right edges of super-blocks. These are taken from
left to right, so that F and dq are carried on, never subtracted from, and within each one

1. the row owner walks each row block from right to left for `acc` at every tile's edge, then from
   left to right for F and dq (`backward_rows`): 1 + 3 matmuls per tile;
2. the key owner has now both edges of every tile, and sums dk and dv of its tile over all rows in
   registers, in one order (`backward_keys`): 4 matmuls per tile.

No two programs write to one place, and no order depends on the device's timing: gradients are the
same bits in every run. `backward_plan` keeps the edges of one chunk of heads at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from decapod_kernels.stickbreaking.backward_keys import keys_kernel
from decapod_kernels.stickbreaking.backward_plan import (
    BackwardConfig,
    BackwardPlan,
    Sizes,
    backward_config,
    plan_backward,
)
from decapod_kernels.stickbreaking.backward_rows import rows_kernel
from decapod_kernels.stickbreaking.configs import forward_config
from decapod_kernels.stickbreaking.layout import Layout, describe, device_capability
from decapod_kernels.stickbreaking.maths import interpreting

_LOG2E = math.log2(math.e)


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    d_out: Tensor,
    d_log_rem: Tensor | None,
    edges: Tensor,
    stop: Tensor,
    *,
    scale: float,
    attend_current: bool = False,
    kv_offset: int | None = None,
    key_start: Tensor | None = None,
    key_end: Tensor | None = None,
    window: int | None = None,
    log2_tol: float = -24.0,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    config: BackwardConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `forward(..., save=True)` with the same arguments.

    They are those of the function that was computed: after an early exit, over the visited keys.

    Args:
        q, k, v: as in `forward`.
        d_out: gradient of `out`, in q's dtype.
        d_log_rem: gradient of `log_rem`, float32, or None for 0.
        edges, stop: from `forward`.
        scale, attend_current, kv_offset, key_start, key_end, window, log2_tol, cu_seqlens_q,
            cu_seqlens_k, max_seqlen_q, max_seqlen_k: as in `forward`.
        config: tiles and workspace; its field `forward` must be the forward's configuration.

    Returns:
        dq, dk and dv in the shapes and dtype of q, k and v.

    Raises:
        ValueError: an argument does not fit; nothing has run then.
    """
    layout = describe(
        q,
        k,
        v,
        attend_current=attend_current,
        kv_offset=kv_offset,
        key_start=key_start,
        key_end=key_end,
        window=window,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
    )
    config = config or _choose(q, layout)
    _check(q, v, d_out, d_log_rem, edges, stop, layout, config)
    dq = torch.zeros_like(q)
    dk = torch.zeros_like(k)
    dv = torch.zeros_like(v)
    if q.numel() == 0 or k.numel() == 0:
        return dq, dk, dv
    if d_out.stride(-1) != 1:  # autograd expands gradients of sums
        d_out = d_out.contiguous()
    packed = layout.packed
    plan = plan_backward(_sizes(q, k, layout), config)
    space = _Workspace.allocate(q, layout, plan, config)
    # A packed tensor is one batch row here.
    q, d_out, dq_view, edges, k, v, dk_view, dv_view = (
        _heads_first(x, packed) for x in (q, d_out, dq, edges, k, v, dk, dv)
    )
    if d_log_rem is not None:
        d_log_rem = _heads_first(d_log_rem, packed)
    with torch.cuda.device_of(q):
        for b in range(0, q.shape[0], plan.batch):
            rows = slice(b, b + plan.batch)
            for h in range(0, layout.kv_heads, plan.kv_heads):
                kv = (rows, slice(h, h + plan.kv_heads))
                heads = (rows, slice(h * layout.group, (h + plan.kv_heads) * layout.group))
                _backward_chunk(
                    q[heads],
                    d_out[heads],
                    dq_view[heads],
                    edges[heads],
                    None if d_log_rem is None else d_log_rem[heads],
                    k[kv],
                    v[kv],
                    dk_view[kv],
                    dv_view[kv],
                    stop[:, heads[1]] if packed else stop[heads],
                    layout if packed else _rows_of(layout, rows),
                    space,
                    plan,
                    config,
                    scale,
                    skip=log2_tol > -math.inf,
                )
    return dq, dk, dv


@dataclass(frozen=True)
class _Workspace:
    """Buffers that all chunks use in turn, float32.

    Attributes:
        far: F of each row, `[batch, heads, rows]`.
        dq: `[batch, heads, rows, Dk]`, or None where dq itself can be added to.
        edges: acc and F at tile edges, `[2, batch, heads, tiles, rows of a pass]`.
        dk, dv: `[splits, batch, kv heads, keys of a super-block, head size]`, or None where one
            pass gives all.
    """

    far: Tensor
    dq: Tensor | None
    edges: Tensor
    dk: Tensor | None
    dv: Tensor | None

    @staticmethod
    def allocate(
        q: Tensor, layout: Layout, plan: BackwardPlan, config: BackwardConfig
    ) -> _Workspace:
        """Buffers for the largest chunk."""
        heads = plan.kv_heads * layout.group
        queries = q.shape[0] if layout.packed else layout.max_q
        far = q.new_empty((plan.batch, heads, queries), dtype=torch.float32)
        partial = (plan.splits, plan.batch, plan.kv_heads, plan.tiles * config.block_k)
        return _Workspace(
            far=far,
            dq=far.new_empty((*far.shape, layout.key_dim)) if plan.carry_dq else None,
            edges=far.new_empty((2, plan.batch, heads, plan.tiles, plan.rows)),
            dk=far.new_empty((*partial, layout.key_dim)) if plan.partial else None,
            dv=far.new_empty((*partial, layout.value_dim)) if plan.partial else None,
        )


def _backward_chunk(
    q: Tensor,
    d_out: Tensor,
    dq: Tensor,
    edges: Tensor,
    d_log_rem: Tensor | None,
    k: Tensor,
    v: Tensor,
    dk: Tensor,
    dv: Tensor,
    stop: Tensor,
    layout: Layout,
    space: _Workspace,
    plan: BackwardPlan,
    config: BackwardConfig,
    scale: float,
    *,
    skip: bool,
) -> None:
    """Fill in dq, dk and dv of some batch rows and heads; all tensors are `[B, H, L, ...]`."""
    batch, heads = q.shape[:2]
    kv_heads = k.shape[1]
    sequences = layout.batch
    far = space.far[:batch, :heads]
    if d_log_rem is None:
        far.zero_()
    else:
        far.copy_(d_log_rem)
    dq_sum = dq if space.dq is None else space.dq[:batch, :heads].zero_()
    edge_acc, edge_far = space.edges[:, :batch, :heads]

    def strides(x: Tensor) -> tuple[int, int, int]:
        # A packed tensor is one batch row; the kernels find its sequences by their starts.
        return 0 if layout.packed else x.stride(0), x.stride(1), x.stride(2)

    shape = {
        "GROUP": layout.group,
        "ATTEND_CURRENT": int(layout.attend_current),
        "DK": layout.key_dim,
        "DV": layout.value_dim,
        "BDK": max(16, triton.next_power_of_2(layout.key_dim)),
        "BDV": max(16, triton.next_power_of_2(layout.value_dim)),
        "BN": config.block_k,
        "TILES": config.forward.superblock // config.block_k,
        "STOP_ROWS": config.forward.block_q,
        "UPCAST": interpreting(),
    }
    inputs = (layout.cu_q, layout.cu_k, layout.key_start, layout.key_end)
    common = (layout.max_q, layout.max_k, layout.offset, layout.window)
    stop_strides = (stop.stride(0), stop.stride(1))
    for superblock in range(plan.superblocks):
        size = config.forward.superblock
        keys = slice(superblock * size, (superblock + 1) * size)
        first_row, end_row = _rows_that_see(keys.start, keys.stop, q.shape[2], layout, config)
        if space.dk is not None and space.dv is not None:
            dk_sum = space.dk[:, :batch, :kv_heads].zero_()
            dv_sum = space.dv[:, :batch, :kv_heads].zero_()
        else:
            dk_sum, dv_sum = dk[None], dv[None]
        for begin in range(first_row, max(end_row, first_row + 1), plan.rows):
            end = min(begin + plan.rows, end_row)
            if begin < end:
                rows_kernel[(sequences * heads, triton.cdiv(end - begin, config.rows_block))](
                    q, k, v, d_out, dq_sum, far, edges, stop, edge_acc, edge_far, *inputs,
                    *strides(q), *strides(k), *strides(v), *strides(d_out), *strides(dq_sum),
                    *strides(far), *strides(edges), *stop_strides, *strides(edge_acc),
                    heads, *common, begin, end, superblock, scale, scale * _LOG2E,
                    BM=config.rows_block, num_warps=config.rows_warps,
                    num_stages=config.rows_stages, **shape,
                )  # fmt: skip
            keys_kernel[(sequences * kv_heads, plan.tiles, plan.splits)](
                q, k, v, d_out, dk_sum, dv_sum, stop, edge_acc, edge_far, *inputs,
                *strides(q), *strides(k), *strides(v), *strides(d_out),
                *strides(dk_sum[0]), *strides(dv_sum[0]), dk_sum.stride(0), dv_sum.stride(0),
                *stop_strides, *strides(edge_acc), kv_heads, *common, begin, end, superblock,
                stop.shape[-1], scale, scale * _LOG2E, BM=config.keys_block, BS=64, SKIP=skip,
                PARTIAL=plan.partial, num_warps=config.keys_warps, num_stages=config.keys_stages,
                **shape,
            )  # fmt: skip
        if plan.partial:
            here = min(keys.stop, layout.max_k) - keys.start
            dk[:, :, keys].copy_(dk_sum.sum(0).mul_(scale)[:, :, :here])
            dv[:, :, keys].copy_(dv_sum.sum(0)[:, :, :here])
    if dq_sum is not dq:
        dq.copy_(dq_sum)


def _rows_that_see(
    begin: int, end: int, queries: int, layout: Layout, config: BackwardConfig
) -> tuple[int, int]:
    """Bounds of the query rows that may see keys `begin <= j < end`, from a block on.

    Of `queries` rows; packed, of those of the longest sequence, which may have been overstated.
    """
    if layout.packed:
        return 0, min(layout.max_q, queries)
    current = int(layout.attend_current)
    first = max(0, begin - layout.offset - current + 1)
    last = min(layout.max_q, end + layout.window - layout.offset - current)
    align = max(config.rows_block, config.keys_block)
    return min(first // align * align, layout.max_q), last


def _heads_first(x: Tensor, packed: bool) -> Tensor:
    """`[1, H, total, ...]` of a packed `[total, H, ...]`."""
    return x.transpose(0, 1)[None] if packed else x


def _rows_of(layout: Layout, rows: slice) -> Layout:
    """The layout of some batch rows of dense tensors."""
    start, end = (
        None if bound is None else bound[rows] for bound in (layout.key_start, layout.key_end)
    )
    batch = len(range(layout.batch)[rows])
    return replace(layout, batch=batch, key_start=start, key_end=end)


def _sizes(q: Tensor, k: Tensor, layout: Layout) -> Sizes:
    return Sizes(
        batch=1 if layout.packed else layout.batch,
        q_heads=layout.q_heads,
        kv_heads=layout.kv_heads,
        queries=q.shape[0] if layout.packed else layout.max_q,
        keys=k.shape[0] if layout.packed else layout.max_k,
        max_k=layout.max_k,
        key_dim=layout.key_dim,
        value_dim=layout.value_dim,
        itemsize=q.itemsize,
        packed=layout.packed,
    )


def _choose(q: Tensor, layout: Layout) -> BackwardConfig:
    head_dim = max(layout.key_dim, layout.value_dim)
    capability = device_capability(q)
    processors = 1
    if capability is not None:
        processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    forward = forward_config(head_dim, q.dtype, capability, layout.max_k)
    return backward_config(head_dim, q.dtype, capability, forward, processors=processors)


def _check(
    q: Tensor,
    v: Tensor,
    d_out: Tensor,
    d_log_rem: Tensor | None,
    edges: Tensor,
    stop: Tensor,
    layout: Layout,
    config: BackwardConfig,
) -> None:
    """Refuse what does not belong to the forward of these inputs."""
    rows = q.shape[:-1]
    superblocks = triton.cdiv(layout.max_k, config.forward.superblock)
    blocks = triton.cdiv(layout.max_q, config.forward.block_q)
    expected = (
        ("d_out", d_out, (*rows, v.shape[-1]), q.dtype),
        ("d_log_rem", d_log_rem, rows, torch.float32),
        ("edges", edges, (*rows, superblocks), torch.float32),
        ("stop", stop, (layout.batch, layout.q_heads, blocks), torch.int32),
    )
    for name, x, shape, dtype in expected:
        if x is None:
            continue
        if tuple(x.shape) != tuple(shape) or x.dtype != dtype or x.device != q.device:
            raise ValueError(
                f"{name} must be {dtype} {tuple(shape)} on {q.device}, got {x.dtype} "
                f"{tuple(x.shape)} on {x.device}; edges and stop come from "
                "forward(..., save=True) with the same arguments and configuration"
            )
