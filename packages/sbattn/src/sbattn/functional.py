"""The operator's public face: checks first, then the backend that fits.

    A_ij = σ(z_ij) · Π_{l visible, l > j} (1 - σ(z_il)),   z = scale · q kᵀ
    out_i = Σ_j A_ij v_j,   rem_i = Π_{l visible} (1 - σ(z_il)) = 1 - Σ_j A_ij

(arXiv 2410.17980.) The nearest key breaks the stick first, so order and recency need no position
embedding. What a row leaves of its stick is the second result; a model may use it or not.
"""

from __future__ import annotations

import math
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

from sbattn import checks, on_triton, ops
from sbattn.errors import InvalidInputError, UnsupportedError
from sbattn.naive import naive_attention, naive_weights
from sbattn.packed import Packing, naive_varlen
from sbattn.visibility import Visibility

Backend = Literal["auto", "triton", "chunked", "naive"]

_BACKENDS = ("auto", "triton", "chunked", "naive")


def stickbreaking_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    attend_current: bool = False,
    enable_gqa: bool = False,
    kv_offset: int | None = None,
    key_padding: Tensor | None = None,
    window: int | None = None,
    skip_tol: float | Literal["exact"] = "exact",
    return_log_remainder: bool = False,
    backend: Backend = "auto",
    validate: bool = False,
) -> tuple[Tensor, Tensor]:
    """Stick-breaking attention over dense batches, in the layout of PyTorch's SDPA.

    Args:
        query: `[B, Hq, Lq, Dk]`, float16, bfloat16, float32 or float64. Under `torch.autocast`
            all three inputs are cast to the autocast dtype, unless they are float64.
        key: `[B, Hkv, Lk, Dk]`.
        value: `[B, Hkv, Lk, Dv]`.
        scale: factor of the logits; None is `1 / sqrt(Dk)`.
        attend_current: whether a query sees the key of its own position. If not, the first query
            of a sequence sees nothing: output 0, remainder 1.
        enable_gqa: allow fewer key heads than query heads (`Hq % Hkv == 0`; nothing is repeated
            in memory).
        kv_offset: position of the first query among the keys, also before or behind them all
            (between -2^30 and 2^30). None is `Lk - Lq`: the last query is the last key's token.
        key_padding: which keys are valid: intervals `[start, end)`, integers `[B, 2]`, or a bool
            mask `[B, Lk]` (True: valid) whose valid keys are one contiguous run per row. Keys and
            values must be finite where they are not valid, too: they are multiplied by 0.
        window: how many positions back a query sees; None is all. What is not spent on them
            stays in the remainder.
        skip_tol: what may be left of a row's stick when its search ends. "exact" is the unit
            roundoff (2^-24; 2^-53 for float64); 0 never ends a search early; a larger value
            changes each output by at most `skip_tol · max|value|`, each remainder by `skip_tol`.
        return_log_remainder: return the remainder's natural logarithm, which does not underflow.
            Where keys were skipped, it and its gradient are those of the visited keys, and no bound
            says how far the whole one is: pass `skip_tol=0` for that.
        backend: "triton" (CUDA, or Triton's interpreter), "chunked" (any device, linear memory),
            "naive" (the definition; quadratic memory; no skipping) or "auto": Triton where it is
            installed and fits, chunked elsewhere.
        validate: check the content of `key_padding` on an accelerator, too, which waits for the
            device. On a CPU it is always checked. (Unchecked, holes in a mask are filled.)

    Returns:
        Outputs `[B, Hq, Lq, Dv]` in the inputs' dtype, and remainders `[B, Hq, Lq]` in float32
        (float64 for float64 inputs). Both differentiable, once; any number of times with "naive".

    Raises:
        InvalidInputError: an argument does not fit; nothing has been computed.
        UnsupportedError: the named backend cannot do this; a second or a forward-mode derivative
            was asked for.
        MissingExtraError: backend "triton" where the extra is not installed.
    """
    query, key, value = autocast_inputs(query, key, value)
    checks.check_dense(
        query,
        key,
        value,
        enable_gqa=enable_gqa,
        kv_offset=kv_offset,
        key_padding=key_padding,
    )
    checks.check_options(scale, window, skip_tol)
    backend = choose_backend(backend, query, key, value)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
    kv_offset = key.shape[2] - query.shape[2] if kv_offset is None else kv_offset
    if backend == "naive":
        visibility = _visibility(key, kv_offset, attend_current, window, key_padding, validate)
        with _no_autocast(query.device):
            out, log_rem = naive_attention(query, key, value, scale=scale, visibility=visibility)
    else:
        _refuse_tangents(query, key, value)
        out, log_rem, _, _ = ops.dense(
            query,
            key,
            value,
            key_padding,
            scale,
            kv_offset,
            attend_current,
            window,
            skip_threshold(skip_tol, query.dtype),
            _needs_gradient(query, key, value),
            validate,
            backend,
        )
    return out, log_rem if return_log_remainder else log_rem.exp()


def stickbreaking_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    scale: float | None = None,
    attend_current: bool = False,
    window: int | None = None,
    skip_tol: float | Literal["exact"] = "exact",
    return_log_remainder: bool = False,
    backend: Backend = "auto",
    validate: bool = False,
) -> tuple[Tensor, Tensor]:
    """Stick-breaking attention over packed sequences; arguments as in FlashAttention.

    Args:
        q: `[total_q, Hq, Dk]`, the queries of all sequences, one after the other.
        k: `[total_k, Hkv, Dk]`; fewer heads than `q`'s are shared (`Hq % Hkv == 0`).
        v: `[total_k, Hkv, Dv]`.
        cu_seqlens_q: `[N + 1]` int32 offsets `[0, n_1, n_1 + n_2, …, total_q]` of the N sequences
            in `q`. Sequences may be empty.
        cu_seqlens_k: the same for `k` and `v`. The last query of a sequence is its last key's
            token.
        max_seqlen_q: at least the longest sequence's number of queries.
        max_seqlen_k: at least the longest sequence's number of keys.
        scale: as in `stickbreaking_attention`, like all that follow.
        attend_current: whether a query sees the key of its own position.
        window: how many positions back a query sees; None is all.
        skip_tol: what may be left of a row's stick when its search ends.
        return_log_remainder: return the remainder's natural logarithm; see there for skipping.
        backend: as in `stickbreaking_attention`. On an accelerator "chunked" and "naive" wait for
            the device to learn the offsets.
        validate: check the content of the offsets on an accelerator, too, which waits for it. On
            a CPU it is always checked.

    Returns:
        Outputs `[total_q, Hq, Dv]` and remainders `[total_q, Hq]`; dtypes and derivatives as in
        `stickbreaking_attention`.

    Raises:
        InvalidInputError: an argument does not fit; nothing has been computed.
        UnsupportedError: the named backend cannot do this; a second derivative was asked for.
        MissingExtraError: backend "triton" where the extra is not installed.
    """
    q, k, v = autocast_inputs(q, k, v)
    checks.check_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    checks.check_options(scale, window, skip_tol)
    backend = choose_backend(backend, q, k, v)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    if backend == "naive":
        checks.check_offsets("q", cu_seqlens_q, q.shape[0], max_seqlen_q)
        checks.check_offsets("k", cu_seqlens_k, k.shape[0], max_seqlen_k)
        with _no_autocast(q.device):
            out, log_rem = naive_varlen(
                q,
                k,
                v,
                Packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k),
                scale=scale,
                attend_current=attend_current,
                window=window,
            )
    else:
        _refuse_tangents(q, k, v)
        out, log_rem, _, _ = ops.varlen(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            scale,
            attend_current,
            window,
            skip_threshold(skip_tol, q.dtype),
            _needs_gradient(q, k, v),
            validate,
            backend,
        )
    return out, log_rem if return_log_remainder else log_rem.exp()


def stickbreaking_weights(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None = None,
    attend_current: bool = False,
    enable_gqa: bool = False,
    kv_offset: int | None = None,
    key_padding: Tensor | None = None,
    window: int | None = None,
    return_log_remainder: bool = False,
) -> tuple[Tensor, Tensor]:
    """The attention weights themselves, for inspection: quadratic in memory.

    Arguments as in `stickbreaking_attention`. Returns weights `[B, Hq, Lq, Lk]`, 0 where a key is
    not visible, and remainders `[B, Hq, Lq]`; each row's weights and remainder add up to 1. Both
    in float32, or float64 for float64 inputs.
    """
    query, key = autocast_inputs(query, key)
    checks.check_dense(
        query, key, key, enable_gqa=enable_gqa, kv_offset=kv_offset, key_padding=key_padding
    )
    checks.check_options(scale, window, 0)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
    kv_offset = key.shape[2] - query.shape[2] if kv_offset is None else kv_offset
    visibility = _visibility(key, kv_offset, attend_current, window, key_padding, validate=True)
    dtype = ops.remainder_dtype(query.dtype)
    with _no_autocast(query.device):
        weights, log_rem = naive_weights(
            query.to(dtype), key.to(dtype), scale=scale, visibility=visibility
        )
    return weights, log_rem if return_log_remainder else log_rem.exp()


def skip_threshold(skip_tol: float | Literal["exact"], dtype: torch.dtype) -> float:
    """`skip_tol` as a number: "exact" is the unit roundoff in which `dtype` is accumulated."""
    if isinstance(skip_tol, str):
        return 2.0**-53 if dtype == torch.float64 else 2.0**-24
    return float(skip_tol)


def choose_backend(backend: Backend, q: Tensor, k: Tensor, v: Tensor) -> Backend:
    """The backend to run: the named one if it can, or the fastest that can."""
    if backend not in _BACKENDS:
        raise InvalidInputError(f"backend: expected one of {_BACKENDS}, got {backend!r}")
    if backend == "auto":
        fits = on_triton.INSTALLED and q.device.type == "cuda" and _why_not_triton(q, v) is None
        backend = "triton" if fits else "chunked"
    elif backend == "triton":
        on_triton.require()
        reason = _why_not_triton(q, v)
        if reason is not None:
            raise UnsupportedError(f'backend: "triton" {reason}; use "chunked" or "auto"')
    if backend == "triton":
        # Neither copied in silence nor computed by something slow: it is the caller's to mend.
        for what, x in (("queries", q), ("keys", k), ("values", v)):
            if x.shape[-1] > 1 and x.stride(-1) != 1:
                raise UnsupportedError(
                    f"{what}: the Triton kernels read heads whose features lie side by side, got "
                    f"stride {x.stride(-1)} in the last dimension; call .contiguous()"
                )
    return backend


def _why_not_triton(q: Tensor, v: Tensor) -> str | None:
    if q.device.type != "cuda" and not (q.device.type == "cpu" and _interpreting()):
        return f"needs CUDA tensors (or TRITON_INTERPRET=1 on a CPU), got {q.device}"
    if q.dtype == torch.float64:
        return "computes in float32 at most, got float64"
    if max(q.shape[-1], v.shape[-1]) > on_triton.LARGEST_HEAD:
        return (
            f"has head dimensions up to {on_triton.LARGEST_HEAD}, "
            f"got {q.shape[-1]} and {v.shape[-1]}"
        )
    return None


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def autocast_inputs(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the dtype that autocast prescribes for them, as SDPA takes them."""
    kind = tensors[0].device.type if isinstance(tensors[0], Tensor) else "cpu"
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(
        x.to(dtype)
        if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
        else x
        for x in tensors
    )


def has_tangent(*tensors: Tensor) -> bool:
    """Whether forward-mode derivatives are wanted: custom operators lose them without a word."""
    if torch.compiler.is_compiling():
        return False
    return any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def _refuse_tangents(*tensors: Tensor) -> None:
    if has_tangent(*tensors):
        raise UnsupportedError(
            "forward-mode derivatives (jvp): this backend has reverse-mode derivatives only; "
            'pass backend="naive"'
        )


def _no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Autocast switched off, on devices that have it."""
    off: AbstractContextManager[object] = nullcontext()
    if torch.amp.is_autocast_available(device.type):
        off = torch.autocast(device.type, enabled=False)
    return off


def _needs_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _visibility(
    key: Tensor,
    kv_offset: int,
    attend_current: bool,
    window: int | None,
    key_padding: Tensor | None,
    validate: bool,
) -> Visibility:
    start = end = None
    if key_padding is not None:
        if validate or key.device.type == "cpu":
            checks.check_padding(key_padding, key.shape[2])
        start, end = ops.intervals_of(key_padding).unbind(1)
    return Visibility(kv_offset, attend_current, window, start, end)
