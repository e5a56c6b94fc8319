"""A decoding step: the newest queries of every sequence against its cache of keys and values."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from sbattn import checks, functional, ops
from sbattn.decode_tiles import decode_tiles, reader
from sbattn.errors import InvalidInputError, UnsupportedError
from sbattn.naive import naive_attention
from sbattn.visibility import Visibility


def stickbreaking_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_seqlens: Tensor | int,
    block_table: Tensor | None = None,
    scale: float | None = None,
    attend_current: bool = False,
    window: int | None = None,
    skip_tol: float | Literal["exact"] = "exact",
    backend: functional.Backend = "auto",
    validate: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attend from the last `Lq` tokens of each sequence to its cache, for inference.

    The names and layouts are those of `flash_attn_with_kvcache`. The cache holds the keys and
    values of the `Lq` tokens already: query `t` stands at position `cache_seqlens - Lq + t`. It is
    read from the newest key to the oldest, and only until the stick is used up.

    Args:
        q: `[B, Lq, Hq, Dk]`, float16, bfloat16, float32 or float64.
        k_cache: `[B, Lmax, Hkv, Dk]`, or with a block table `[pages, page_size, Hkv, Dk]`, in the
            dtype of `q`. Fewer heads than `q`'s are shared (`Hq % Hkv == 0`).
        v_cache: the same with `Dv`.
        cache_seqlens: `[B]` int32 or int64, tokens in each sequence's cache, the `Lq` newest
            included; or one number for all. 0 is an empty sequence: output 0, log remainder 0.
        block_table: `[B, pages per sequence]` int32 or int64: the pages of each sequence, oldest
            first. Entries behind its last token are not read.
        scale: factor of the logits; None is `1 / sqrt(Dk)`.
        attend_current: whether a query sees the key of its own position, which is in the cache.
        window: how many positions back a query sees; None is all.
        skip_tol: what may be left of a row's stick when its search ends, as in
            `stickbreaking_attention`.
        backend: "triton" (CUDA, or Triton's interpreter; never waits for the device), "chunked"
            (any device, memory of one tile; waits for the device to learn the lengths), "naive"
            (the definition, one sequence after the other; likewise) or "auto".
        validate: check lengths and page numbers on an accelerator, too, which waits for it. On a
            CPU they are always checked. (Unchecked, wrong page numbers read wrong memory.)

    Returns:
        Outputs `[B, Lq, Hq, Dv]` in `q`'s dtype, and natural logs of the remainders `[B, Lq, Hq]`
        in float32 (float64 for float64 inputs). Results over neighbouring stretches of a cache
        are put together by `merge_segments`.

    Raises:
        InvalidInputError: an argument does not fit; nothing has been computed.
        UnsupportedError: an input requires gradients, or the named backend cannot do this.
        MissingExtraError: backend "triton" where the extra is not installed.
    """
    checks.check_options(scale, window, skip_tol)
    if isinstance(cache_seqlens, int) and isinstance(q, Tensor) and q.ndim == 4:
        cache_seqlens = torch.full((q.shape[0],), cache_seqlens, device=q.device)
    _check_form(q, k_cache, v_cache, cache_seqlens, block_table)
    inputs = (q, k_cache, v_cache)
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    if wanted or functional.has_tangent(*inputs):
        raise UnsupportedError(
            "q, k_cache, v_cache: decoding has no gradients; call it under torch.no_grad(), or "
            "train with stickbreaking_attention"
        )
    out, log_rem = decode_step(
        q,
        k_cache,
        v_cache,
        cache_seqlens,
        block_table,
        1 / math.sqrt(q.shape[-1]) if scale is None else float(scale),
        attend_current,
        window,
        functional.skip_threshold(skip_tol, q.dtype),
        validate,
        functional.choose_backend(backend, q, k_cache, v_cache),
    )
    return out, log_rem


@torch.library.custom_op("sbattn::decode", mutates_args=())
def decode_step(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    scale: float,
    attend_current: bool,
    window: int | None,
    tolerance: float,
    validate: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The step as PyTorch knows it; `tolerance` is a number, 0 for no skipping."""
    if validate or q.device.type == "cpu":
        _check_content(q, k_cache, cache_seqlens, block_table)
    if backend == "triton":
        from decapod_kernels.stickbreaking.decode import decode

        out, log_rem = decode(
            q,
            k_cache,
            v_cache,
            cache_seqlens=cache_seqlens.int(),
            block_table=None if block_table is None else block_table.int(),
            scale=scale,
            attend_current=attend_current,
            window=window,
            log2_tol=ops.log2_of(tolerance),
        )
        return out, log_rem
    with torch.autocast(q.device.type, enabled=False):
        if backend == "naive":
            return _naive(
                q,
                k_cache,
                v_cache,
                cache_seqlens,
                block_table,
                scale=scale,
                attend_current=attend_current,
                window=window,
            )
        return decode_tiles(
            q,
            k_cache,
            v_cache,
            cache_seqlens,
            block_table,
            scale=scale,
            attend_current=attend_current,
            window=window,
            log_tol=math.log(tolerance) if tolerance > 0 else -math.inf,
        )


@decode_step.register_fake
def _decode_fake(q: Tensor, _k_cache: Tensor, v_cache: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    rows = q.shape[:3]
    return (
        q.new_empty((*rows, v_cache.shape[3])),
        q.new_empty(rows, dtype=ops.remainder_dtype(q.dtype)),
    )


def _naive(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    *,
    scale: float,
    attend_current: bool,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """One sequence after the other, all of its cache at once."""
    read = reader(block_table)
    out = q.new_zeros((*q.shape[:3], v_cache.shape[3]))
    log_rem = q.new_zeros(q.shape[:3], dtype=ops.remainder_dtype(q.dtype))
    for b, length in enumerate(cache_seqlens.tolist()):
        if length == 0:
            continue
        visibility = Visibility(length - q.shape[1], attend_current, window)
        k, v = (read(x, b, 0, length)[None].transpose(1, 2) for x in (k_cache, v_cache))
        found = naive_attention(
            q[b : b + 1].transpose(1, 2), k, v, scale=scale, visibility=visibility
        )
        out[b], log_rem[b] = (x[0].transpose(0, 1) for x in found)
    return out, log_rem


def _check_form(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
) -> None:
    cache_form = "batch, length" if block_table is None else "pages, page_size"
    for name, x, form in (
        ("q", q, "batch, length, heads, head_dim"),
        ("k_cache", k_cache, f"{cache_form}, heads, head_dim"),
        ("v_cache", v_cache, f"{cache_form}, heads, head_dim"),
    ):
        if not isinstance(x, Tensor) or x.ndim != 4:
            got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise InvalidInputError(f"{name}: expected a tensor [{form}], got {got}")
        if x.dtype not in checks.FLOATS or x.dtype != q.dtype:
            raise InvalidInputError(
                f"{name}: expected float16, bfloat16, float32 or float64, and the same for q, "
                f"k_cache and v_cache, got {x.dtype} (q: {q.dtype}); cast the query to the cache's"
            )
        if x.device != q.device:
            raise InvalidInputError(
                f"{name}: expected on the device of q, {q.device}, got {x.device}"
            )
        if x.shape[3] < 1:
            raise InvalidInputError(f"{name}: expected a head dimension of at least 1, got 0")
    if k_cache.shape[:3] != v_cache.shape[:3]:
        raise InvalidInputError(
            "v_cache: expected k_cache's shape but for the head dimension, "
            f"{tuple(k_cache.shape[:3])}, got {tuple(v_cache.shape[:3])}"
        )
    if k_cache.shape[3] != q.shape[3]:
        raise InvalidInputError(
            f"k_cache: expected the head dimension of q, {q.shape[3]}, got {k_cache.shape[3]} "
            "(only the values' may differ)"
        )
    if k_cache.shape[2] < 1 or q.shape[2] < 1 or q.shape[2] % k_cache.shape[2]:
        raise InvalidInputError(
            "heads: expected the number of query heads to be a multiple of the number of key "
            f"heads, got {q.shape[2]} and {k_cache.shape[2]}"
        )
    if block_table is None and k_cache.shape[0] != q.shape[0]:
        raise InvalidInputError(
            f"k_cache: expected q's batch size, {q.shape[0]}, got {k_cache.shape[0]}; for a cache "
            "of pages, pass block_table"
        )
    _check_integers("cache_seqlens", cache_seqlens, q, "[batch]")
    if block_table is not None:
        _check_integers("block_table", block_table, q, "[batch, pages per sequence]")


def _check_integers(name: str, x: Tensor, q: Tensor, form: str) -> None:
    if not isinstance(x, Tensor) or x.dtype not in (torch.int32, torch.int64):
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise InvalidInputError(f"{name}: expected a tensor of int32 or int64 {form}, got {got}")
    if x.ndim != form.count(",") + 1 or x.shape[0] != q.shape[0]:
        raise InvalidInputError(
            f"{name}: expected {form} for a batch of {q.shape[0]}, got shape {tuple(x.shape)}"
        )
    if x.device != q.device:
        raise InvalidInputError(f"{name}: expected on the device of q, {q.device}, got {x.device}")


def _check_content(
    q: Tensor, k_cache: Tensor, cache_seqlens: Tensor, block_table: Tensor | None
) -> None:
    """Lengths and page numbers; reads them, so on an accelerator it waits for the device."""
    size, queries = k_cache.shape[1], q.shape[1]
    capacity = size if block_table is None else size * block_table.shape[1]
    for b, length in enumerate(cache_seqlens.tolist()):
        if not 0 <= length <= capacity:
            raise InvalidInputError(
                f"cache_seqlens: expected 0 to {capacity}, what the cache holds of a sequence, "
                f"got {length} for sequence {b}"
            )
        if 0 < length < queries:
            raise InvalidInputError(
                f"cache_seqlens: expected at least the {queries} newest tokens, which q has and "
                f"the cache must have too (or 0: no sequence), got {length} for sequence {b}"
            )
        if block_table is None or length == 0:
            continue
        pages = block_table[b, : -(-length // size)]
        if int(pages.min()) < 0 or int(pages.max()) >= k_cache.shape[0]:
            raise InvalidInputError(
                f"block_table: expected pages 0 to {k_cache.shape[0] - 1}, got "
                f"{int(pages.min())} to {int(pages.max())} among the {len(pages)} pages of "
                f"sequence {b}"
            )
