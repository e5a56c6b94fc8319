"""The operator as PyTorch knows it: `sbattn::dense` and `sbattn::varlen`, and their gradients.

Registered with shapes for tracing and with formulas for autograd, so that `torch.compile`,
`torch.export` and `torch.library.opcheck` see one opaque operation where eager mode runs tensor
code or Triton kernels. Only tensors and numbers cross the border: what the backward pass needs is
the pair `edges`, `stop`, whose meaning is each backend's own.

The content of integer tensors (`sbattn.checks`) is examined here, where they have values even in a
compiled program.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sbattn import checks, on_chunked, on_triton
from sbattn.errors import UnsupportedError
from sbattn.packed import Packing
from sbattn.visibility import Visibility

_BACKENDS: dict[str, ModuleType] = {"chunked": on_chunked, "triton": on_triton}


@torch.library.custom_op("sbattn::dense", mutates_args=())
def dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding: Tensor | None,
    scale: float,
    kv_offset: int,
    attend_current: bool,
    window: int | None,
    tolerance: float,
    save: bool,
    validate: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Outputs, log remainders and what backward needs (empty unless `save`).

    `q` `[B, Hq, Lq, Dk]`, `k` `[B, Hkv, Lk, Dk]`, `v` `[B, Hkv, Lk, Dv]`; `key_padding` as in
    `stickbreaking_attention`; `tolerance` is a number, 0 for no skipping.
    """
    if key_padding is not None and (validate or q.device.type == "cpu"):
        checks.check_padding(key_padding, k.shape[2])
    with torch.autocast(q.device.type, enabled=False):
        out, log_rem, edges, stop = _BACKENDS[backend].dense_forward(
            q,
            k,
            v,
            scale=scale,
            visibility=_visibility(key_padding, kv_offset, attend_current, window),
            log2_tol=log2_of(tolerance),
            save=save,
        )
    return out, log_rem, edges, stop


@dense.register_fake
def _dense_fake(
    q: Tensor, k: Tensor, v: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, save, _validate, backend = options
    edges, stop = _BACKENDS[backend].dense_state(q, k, v, save=save)
    rows = q.shape[:3]
    return (
        q.new_empty((*rows, v.shape[3])),
        q.new_empty(rows, dtype=remainder_dtype(q.dtype)),
        edges,
        stop,
    )


@torch.library.custom_op("sbattn::dense_backward", mutates_args=())
def dense_backward(
    d_out: Tensor,
    d_log_rem: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    edges: Tensor,
    stop: Tensor,
    key_padding: Tensor | None,
    scale: float,
    kv_offset: int,
    attend_current: bool,
    window: int | None,
    tolerance: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `q`, `k`, `v`, each in its input's dtype."""
    with torch.autocast(q.device.type, enabled=False):
        d_q, d_k, d_v = _BACKENDS[backend].dense_backward(
            d_out,
            d_log_rem,
            q,
            k,
            v,
            edges,
            stop,
            scale=scale,
            visibility=_visibility(key_padding, kv_offset, attend_current, window),
            log2_tol=log2_of(tolerance),
        )
    return d_q, d_k, d_v


@torch.library.custom_op("sbattn::varlen", mutates_args=())
def varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    attend_current: bool,
    window: int | None,
    tolerance: float,
    save: bool,
    validate: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same for packed sequences: `q` `[total_q, Hq, Dk]`, `k`, `v` `[total_k, Hkv, D]`."""
    if validate or q.device.type == "cpu":
        checks.check_offsets("q", cu_seqlens_q, q.shape[0], max_seqlen_q)
        checks.check_offsets("k", cu_seqlens_k, k.shape[0], max_seqlen_k)
    with torch.autocast(q.device.type, enabled=False):
        out, log_rem, edges, stop = _BACKENDS[backend].varlen_forward(
            q,
            k,
            v,
            Packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k),
            scale=scale,
            attend_current=attend_current,
            window=window,
            log2_tol=log2_of(tolerance),
            save=save,
        )
    return out, log_rem, edges, stop


@varlen.register_fake
def _varlen_fake(
    q: Tensor, k: Tensor, v: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    packing = Packing(*options[:4])
    *_, save, _validate, backend = options
    edges, stop = _BACKENDS[backend].varlen_state(q, k, v, packing, save=save)
    rows = q.shape[:2]
    return (
        q.new_empty((*rows, v.shape[2])),
        q.new_empty(rows, dtype=remainder_dtype(q.dtype)),
        edges,
        stop,
    )


@torch.library.custom_op("sbattn::varlen_backward", mutates_args=())
def varlen_backward(
    d_out: Tensor,
    d_log_rem: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    edges: Tensor,
    stop: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    attend_current: bool,
    window: int | None,
    tolerance: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of packed `q`, `k`, `v`, each in its input's dtype."""
    with torch.autocast(q.device.type, enabled=False):
        d_q, d_k, d_v = _BACKENDS[backend].varlen_backward(
            d_out,
            d_log_rem,
            q,
            k,
            v,
            edges,
            stop,
            Packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k),
            scale=scale,
            attend_current=attend_current,
            window=window,
            log2_tol=log2_of(tolerance),
        )
    return d_q, d_k, d_v


@dense_backward.register_fake
@varlen_backward.register_fake
def _backward_fake(
    _d_out: Tensor, _d_log_rem: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def remainder_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of remainders for inputs of the given one: never less than float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def log2_of(tolerance: float) -> float:
    """The base-2 logarithm of a tolerance; of 0, "never skip", minus infinity."""
    return math.log2(tolerance) if tolerance > 0 else -math.inf


def _visibility(
    key_padding: Tensor | None, kv_offset: int, attend_current: bool, window: int | None
) -> Visibility:
    start = end = None
    if key_padding is not None:
        start, end = intervals_of(key_padding).unbind(1)
    return Visibility(kv_offset, attend_current, window, start, end)


def intervals_of(key_padding: Tensor) -> Tensor:
    """Intervals `[B, 2]` of valid keys, from such intervals or from a mask `[B, Lk]`.

    A row without valid keys has the interval [0, 0). If a mask has holes, they are filled.
    """
    if key_padding.dtype != torch.bool:
        return key_padding
    invalid = (~key_padding).int()
    before = invalid.cumprod(1).sum(1)
    after = invalid.flip(1).cumprod(1).sum(1)
    ends = key_padding.shape[1] - after
    return torch.stack((torch.minimum(before, ends), ends), 1)


def _keep(ctx: Any, tensors: tuple[Tensor | None, ...], saved: bool) -> None:
    ctx.save_for_backward(*tensors)
    ctx.mark_non_differentiable(tensors[-2], tensors[-1])  # edges, stop
    ctx.set_materialize_grads(False)
    ctx.saved = saved


def _output_gradient(ctx: Any, d_out: Tensor | None, q: Tensor, v: Tensor) -> Tensor:
    if not ctx.saved:
        raise UnsupportedError(
            "save: the forward pass kept nothing for this backward pass; call "
            "stickbreaking_attention, which decides, or the operator with save=True"
        )
    return q.new_zeros((*q.shape[:-1], v.shape[-1])) if d_out is None else d_out


def _dense_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, key_padding, *numbers, tolerance, save, _, backend = inputs
    _keep(ctx, (q, k, v, key_padding, *output[2:]), save)
    ctx.options = (*numbers, tolerance, backend)


def _dense_gradients(ctx: Any, d_out: Tensor | None, d_log_rem: Tensor | None, *_: Any) -> Any:
    q, k, v, key_padding, edges, stop = ctx.saved_tensors
    d_out = _output_gradient(ctx, d_out, q, v)
    gradients = dense_backward(d_out, d_log_rem, q, k, v, edges, stop, key_padding, *ctx.options)
    return _wanted(ctx, gradients)


def _varlen_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, offsets_q, offsets_k, *numbers, tolerance, save, _, backend = inputs
    _keep(ctx, (q, k, v, offsets_q, offsets_k, *output[2:]), save)
    ctx.options = (*numbers, tolerance, backend)


def _varlen_gradients(ctx: Any, d_out: Tensor | None, d_log_rem: Tensor | None, *_: Any) -> Any:
    q, k, v, offsets_q, offsets_k, edges, stop = ctx.saved_tensors
    d_out = _output_gradient(ctx, d_out, q, v)
    gradients = varlen_backward(
        d_out, d_log_rem, q, k, v, edges, stop, offsets_q, offsets_k, *ctx.options
    )
    return _wanted(ctx, gradients)


def _wanted(ctx: Any, gradients: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    """One entry per input of the operator: of q, k, v as asked for, of the rest none."""
    needed = ctx.needs_input_grad
    found = [g if need else None for g, need in zip(gradients, needed, strict=False)]
    return (*found, *(None for _ in needed[3:]))


def _refuse_second_derivative(_ctx: Any, *_: Any) -> None:
    raise UnsupportedError(
        "double backward: this backend has first derivatives only; "
        'pass backend="naive", which autograd differentiates as often as you like'
    )


dense.register_autograd(_dense_gradients, setup_context=_dense_setup)
varlen.register_autograd(_varlen_gradients, setup_context=_varlen_setup)
dense_backward.register_autograd(_refuse_second_derivative)
varlen_backward.register_autograd(_refuse_second_derivative)
