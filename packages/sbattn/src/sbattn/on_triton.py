"""The kernels of `decapod-kernels` as a backend of the operator.

They are loaded when they are first run, so that the package works without Triton.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from sbattn.errors import MissingExtraError
from sbattn.packed import Packing
from sbattn.saved_sizes import saved_size
from sbattn.visibility import Visibility

LARGEST_HEAD = 256
INSTALLED = find_spec("decapod_kernels") is not None and find_spec("triton") is not None


def require() -> None:
    """Raise `MissingExtraError` if the kernels are not installed."""
    if not INSTALLED:
        raise MissingExtraError("decapod-kernels", "triton")


def dense_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    visibility: Visibility,
    log2_tol: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Outputs, log remainders, edges and stop, for `[B, H, L, D]`."""
    from decapod_kernels.stickbreaking.forward import forward

    found = forward(
        q, k, v, scale=scale, log2_tol=log2_tol, save=save, **_dense_options(visibility)
    )
    return found.out, found.log_rem, found.edges, found.stop


def dense_state(q: Tensor, k: Tensor, v: Tensor, *, save: bool) -> tuple[Tensor, Tensor]:
    """Tensors like the `edges` and `stop` that `dense_forward` returns."""
    return _state(q, v, (q.shape[0], q.shape[2], k.shape[2]), save=save)


def dense_backward(
    d_out: Tensor,
    d_log_rem: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    edges: Tensor,
    stop: Tensor,
    *,
    scale: float,
    visibility: Visibility,
    log2_tol: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `q`, `k`, `v`."""
    return _backward(
        d_out,
        d_log_rem,
        (q, k, v, edges, stop),
        scale=scale,
        log2_tol=log2_tol,
        **_dense_options(visibility),
    )


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
    """Outputs, log remainders, edges and stop, for `[total, H, D]`."""
    from decapod_kernels.stickbreaking.forward import forward

    found = forward(
        q,
        k,
        v,
        scale=scale,
        attend_current=attend_current,
        window=window,
        log2_tol=log2_tol,
        save=save,
        **vars(packing),
    )
    return found.out, found.log_rem, found.edges, found.stop


def varlen_state(
    q: Tensor, _k: Tensor, v: Tensor, packing: Packing, *, save: bool
) -> tuple[Tensor, Tensor]:
    """Tensors like the `edges` and `stop` that `varlen_forward` returns."""
    sequences = packing.cu_seqlens_q.shape[0] - 1
    return _state(q, v, (sequences, packing.max_seqlen_q, packing.max_seqlen_k), save=save)


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
    return _backward(
        d_out,
        d_log_rem,
        (q, k, v, edges, stop),
        scale=scale,
        attend_current=attend_current,
        window=window,
        log2_tol=log2_tol,
        **vars(packing),
    )


def _backward(
    d_out: Tensor, d_log_rem: Tensor | None, saved: tuple[Tensor, ...], **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    from decapod_kernels.stickbreaking.backward import backward

    q, k, v, edges, stop = saved
    d_q, d_k, d_v = backward(q, k, v, d_out, d_log_rem, edges, stop, **options)
    return d_q, d_k, d_v


def _dense_options(visibility: Visibility) -> dict[str, Any]:
    bounds = {"key_start": visibility.key_start, "key_end": visibility.key_end}
    return {
        "attend_current": visibility.attend_current,
        "kv_offset": visibility.kv_offset,
        "window": visibility.window,
        **{
            name: None if bound is None else bound.to(torch.int32).contiguous()
            for name, bound in bounds.items()
        },
    }


def _state(
    q: Tensor, v: Tensor, sizes: tuple[int, int, int], *, save: bool
) -> tuple[Tensor, Tensor]:
    from decapod_kernels.stickbreaking.configs import forward_config

    batch, queries, keys = sizes
    # As the kernels' `device_capability`, whose module needs Triton.
    capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else None
    kind = (max(int(q.shape[-1]), int(v.shape[-1])), q.dtype, capability)
    superblocks = blocks = 0
    if save:
        superblocks = saved_size(lambda n: -(-n // forward_config(*kind, n).superblock), keys)
        blocks = saved_size(lambda n: -(-n // forward_config(*kind, 1).block_q), queries)
    return (
        q.new_empty((*q.shape[:-1], superblocks), dtype=torch.float32),
        q.new_empty((batch, q.shape[1], blocks), dtype=torch.int32),
    )
