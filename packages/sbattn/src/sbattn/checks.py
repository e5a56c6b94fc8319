"""What the operator refuses, before any work starts.

Two kinds of checks. Those of *form* look at types, shapes, dtypes and devices: they cost
microseconds, touch no data, and are made on every call. Those of *content* read integer tensors
(offsets, intervals, masks): on a CPU they are always made, also inside a compiled program; on an
accelerator reading means waiting for the device, so they are made only with `validate=True`.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from sbattn.errors import InvalidInputError

DENSE = ("batch", "heads", "length", "head_dim")
PACKED = ("total", "heads", "head_dim")
_INTEGERS = (torch.int32, torch.int64)
_FARTHEST = 2**30  # positions are computed in 32 bits
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    enable_gqa: bool,
    kv_offset: int | None,
    key_padding: Tensor | None,
) -> None:
    """Form of `query` `[B, Hq, Lq, Dk]`, `key`, `value` `[B, Hkv, Lk, D]` and their padding.

    Raises `InvalidInputError` naming the argument.
    """
    _check_same_kind(query, key, value, DENSE)
    if not query.shape[0] == key.shape[0] == value.shape[0]:
        raise InvalidInputError(
            "query, key and value: expected the same batch size, "
            f"got {query.shape[0]}, {key.shape[0]} and {value.shape[0]}; expand the smaller ones"
        )
    _check_heads(query.shape[1], key.shape[1], enable_gqa)
    if kv_offset is not None:
        _check_integer("kv_offset", kv_offset, "None or an integer, the first query's position")
        if not -_FARTHEST < kv_offset < _FARTHEST:
            raise InvalidInputError(
                f"kv_offset: expected between -2^30 and 2^30, got {kv_offset}; what a query sees "
                "depends on its distance from the keys only, so count positions from nearer by"
            )
    if key_padding is not None:
        _check_padding_form(key_padding, query.shape[0], key.shape[2], query.device)


def check_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
) -> None:
    """Form of packed `q` `[total_q, Hq, Dk]`, `k`, `v` `[total_k, Hkv, D]` and their offsets.

    Raises `InvalidInputError` naming the argument.
    """
    _check_same_kind(q, k, v, PACKED)
    _check_heads(q.shape[1], k.shape[1], enable_gqa=True)
    for name, offsets in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        check_offsets_form(name, offsets, "q", q.device)
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise InvalidInputError(
            "cu_seqlens_q and cu_seqlens_k: expected offsets of the same number of sequences, "
            f"got {cu_seqlens_q.shape[0] - 1} and {cu_seqlens_k.shape[0] - 1}"
        )
    for name, longest in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        _check_integer(name, longest, "an integer, the length of the longest sequence")
        if longest < 0:
            raise InvalidInputError(f"{name}: expected at least 0, got {longest}")


def check_offsets_form(name: str, offsets: Tensor, beside: str, device: torch.device) -> None:
    """Form of `cu_seqlens`, which must be on the device of the argument called `beside`."""
    if not isinstance(offsets, Tensor) or offsets.ndim != 1 or offsets.shape[0] < 1:
        raise InvalidInputError(
            f"{name}: expected a tensor of N + 1 offsets for N sequences, got {_describe(offsets)}"
        )
    if offsets.dtype != torch.int32:
        raise InvalidInputError(
            f"{name}: expected dtype int32, got {_dtype(offsets)}; pass {name}.to(torch.int32)"
        )
    if offsets.device != device:
        raise InvalidInputError(
            f"{name}: expected on the device of {beside}, {device}, got {offsets.device}"
        )


def check_options(scale: float | None, window: int | None, skip_tol: object) -> None:
    """The options that every form of the operator shares; raises `InvalidInputError`."""
    if scale is not None and (
        isinstance(scale, bool) or not isinstance(scale, (int, float, torch.SymFloat))
    ):
        raise InvalidInputError(
            "scale: expected None (1/sqrt(head_dim)) or a number, "
            f"got {_describe(scale)}; multiply the query by a tensor instead"
        )
    # (Comparing a symbol would tie a traced program to its value.)
    if isinstance(scale, (int, float)) and not abs(scale) <= sys.float_info.max:
        raise InvalidInputError(f"scale: expected None or a finite number, got {scale}")
    if window is not None:
        _check_integer("window", window, "None or a positive integer, how many positions back")
        if window < 1:
            raise InvalidInputError(
                f"window: expected None or a positive integer, got {window}; None sees everything"
            )
    if isinstance(skip_tol, str):
        fits = skip_tol == "exact"
    else:
        fits = (
            isinstance(skip_tol, (int, float))
            and not isinstance(skip_tol, bool)
            and 0 <= skip_tol < 1
        )
    if not fits:
        raise InvalidInputError(
            'skip_tol: expected "exact", 0 (never skip) or the share of the stick that may be '
            f"left unbroken, below 1, got {skip_tol!r}"
        )


def check_offsets(name: str, offsets: Tensor, total: int, longest: int) -> None:
    """Content of `cu_seqlens`: from 0 up to the total, no sequence longer than `max_seqlen`.

    Reads the tensor, so on an accelerator it waits for the device.
    """
    values = offsets.tolist()
    if values[0] != 0:
        raise InvalidInputError(
            f"cu_seqlens_{name}: expected the first offset to be 0, got {values[0]}; "
            "offsets are [0, n_1, n_1 + n_2, …], with the leading zero"
        )
    lengths = [end - start for start, end in pairwise(values)]
    for n, length in enumerate(lengths):
        if length < 0:
            raise InvalidInputError(
                f"cu_seqlens_{name}: expected offsets that never decrease, got {values[n]} and "
                f"then {values[n + 1]} at index {n + 1}; use the cumulative sum of the lengths"
            )
    if values[-1] != total:
        raise InvalidInputError(
            f"cu_seqlens_{name}: expected the last offset to be the number of packed tokens, "
            f"{total}, got {values[-1]}"
        )
    if max(lengths, default=0) > longest:
        raise InvalidInputError(
            f"max_seqlen_{name}: expected at least the longest sequence's length, "
            f"{max(lengths)}, got {longest}"
        )


def check_padding(key_padding: Tensor, keys: int) -> None:
    """Content of `key_padding`: one run of valid keys per row, inside the keys there are.

    Reads the tensor, so on an accelerator it waits for the device.
    """
    if key_padding.dtype == torch.bool:
        starts_of_runs = key_padding.int().diff(dim=1, prepend=key_padding[:, :1].int() * 0) > 0
        for row, runs in enumerate(starts_of_runs.sum(1).tolist()):
            if runs > 1:
                raise InvalidInputError(
                    f"key_padding: expected one contiguous run of valid keys per row, got {runs} "
                    f"runs in row {row}; pad on the left or right only, or pack the sequences"
                )
        return
    for row, (start, end) in enumerate(key_padding.tolist()):
        if not 0 <= start <= end <= keys:
            raise InvalidInputError(
                f"key_padding: expected 0 <= start <= end <= {keys} keys in every row, "
                f"got [{start}, {end}) in row {row}"
            )


def _check_same_kind(q: Tensor, k: Tensor, v: Tensor, axes: tuple[str, ...]) -> None:
    """Rank, dtype and device of the three, and the dimensions that they share."""
    packed = axes is PACKED
    names = ("q", "k", "v") if packed else ("query", "key", "value")
    form = f"[{', '.join(axes)}]"
    for name, x in zip(names, (q, k, v), strict=True):
        if not isinstance(x, Tensor):
            raise InvalidInputError(f"{name}: expected a tensor {form}, got {_describe(x)}")
        if x.ndim != len(axes):
            raise InvalidInputError(
                f"{name}: expected {len(axes)} dimensions {form}, got shape {tuple(x.shape)}"
            )
        if x.dtype not in FLOATS:
            raise InvalidInputError(
                f"{name}: expected dtype float16, bfloat16, float32 or float64, got {_dtype(x)}; "
                f"pass {name}.float()"
            )
        if x.device != q.device:
            raise InvalidInputError(
                f"{name}: expected on the device of {names[0]}, {q.device}, got {x.device}"
            )
        if x.dtype != q.dtype:
            raise InvalidInputError(
                f"{name}: expected the dtype of {names[0]}, {_dtype(q)}, got {_dtype(x)}; "
                "cast it, or call under torch.autocast"
            )
    length = 0 if packed else 2
    if k.shape[length] != v.shape[length]:
        raise InvalidInputError(
            f"{names[2]}: expected as many positions as {names[1]}, {k.shape[length]}, "
            f"got {v.shape[length]}"
        )
    if k.shape[1] != v.shape[1]:
        raise InvalidInputError(
            f"{names[2]}: expected as many heads as {names[1]}, {k.shape[1]}, got {v.shape[1]}"
        )
    if q.shape[-1] != k.shape[-1]:
        raise InvalidInputError(
            f"{names[1]}: expected the head dimension of {names[0]}, {q.shape[-1]}, "
            f"got {k.shape[-1]} (only the values' may differ)"
        )
    if q.shape[-1] < 1 or v.shape[-1] < 1:
        raise InvalidInputError(
            f"{names[0]} and {names[2]}: expected a head dimension of at least 1, "
            f"got {q.shape[-1]} and {v.shape[-1]}"
        )


def _check_heads(query_heads: int, key_heads: int, enable_gqa: bool) -> None:
    if query_heads < 1 or key_heads < 1:
        raise InvalidInputError(
            f"heads: expected at least one query head and one key head, got {query_heads} and "
            f"{key_heads}"
        )
    if query_heads == key_heads:
        return
    if query_heads % key_heads != 0:
        raise InvalidInputError(
            "heads: expected the number of query heads to be a multiple of the number of key "
            f"heads, got {query_heads} and {key_heads}"
        )
    if not enable_gqa:
        raise InvalidInputError(
            f"heads: expected as many key heads as query heads, {query_heads}, got {key_heads}; "
            "pass enable_gqa=True to share each key head among several query heads"
        )


def _check_padding_form(padding: Tensor, batch: int, keys: int, device: torch.device) -> None:
    if not isinstance(padding, Tensor):
        raise InvalidInputError(f"key_padding: expected a tensor, got {_describe(padding)}")
    mask = padding.dtype == torch.bool
    if not mask and padding.dtype not in _INTEGERS:
        raise InvalidInputError(
            "key_padding: expected a bool mask [batch, keys] (True: valid) or integer intervals "
            f"[batch, 2] (start, end), got dtype {_dtype(padding)}; pass key_padding.bool()"
        )
    width = keys if mask else 2
    if padding.ndim != 2 or padding.shape[0] != batch or padding.shape[1] != width:
        form = f"a mask [{batch}, {keys}]" if mask else f"intervals [{batch}, 2]"
        raise InvalidInputError(
            f"key_padding: expected {form} for dtype {_dtype(padding)}, "
            f"got shape {tuple(padding.shape)}"
        )
    if padding.device != device:
        raise InvalidInputError(
            f"key_padding: expected on the device of query, {device}, got {padding.device}"
        )


def _check_integer(name: str, value: object, expected: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise InvalidInputError(f"{name}: expected {expected}, got {_describe(value)}")


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and dtype {_dtype(value)}"
    return f"{value!r} of type {type(value).__name__}"
