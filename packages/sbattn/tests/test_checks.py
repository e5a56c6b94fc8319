"""Bad input is named before anything runs: nothing here gets as far as a backend."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sbattn.checks import check_offsets, check_padding
from sbattn.errors import InvalidInputError, UnsupportedError
from sbattn.functional import (
    stickbreaking_attention,
    stickbreaking_attention_varlen,
    stickbreaking_weights,
)


def dense(**changes: Any) -> dict[str, Any]:
    inputs = {
        "query": torch.randn(2, 4, 6, 8),
        "key": torch.randn(2, 4, 6, 8),
        "value": torch.randn(2, 4, 6, 8),
    }
    return inputs | changes


def packed(**changes: Any) -> dict[str, Any]:
    inputs = {
        "q": torch.randn(6, 4, 8),
        "k": torch.randn(6, 2, 8),
        "v": torch.randn(6, 2, 8),
        "cu_seqlens_q": offsets(0, 2, 6),
        "cu_seqlens_k": offsets(0, 2, 6),
        "max_seqlen_q": 4,
        "max_seqlen_k": 4,
    }
    return inputs | changes


def offsets(*values: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def mask_with(*holes: int) -> Tensor:
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, list(holes)] = False
    return mask


DENSE = {
    "integer query": (
        {"query": torch.ones(2, 4, 6, 8, dtype=torch.long)},
        r"query: expected dtype float16, .* got int64; pass query.float\(\)",
    ),
    "list for a key": (
        {"key": [1.0]},
        r"key: expected a tensor \[batch, heads, length, head_dim\]",
    ),
    "rank of query": (
        {"query": torch.randn(4, 6, 8)},
        r"query: expected 4 dimensions .* got shape \(4, 6, 8\)",
    ),
    "rank of value": ({"value": torch.randn(2, 4, 6)}, "value: expected 4 dimensions"),
    "mixed dtypes": (
        {"value": torch.randn(2, 4, 6, 8).half()},
        "value: expected the dtype of query, float32, got float16; cast it, or call under",
    ),
    "mixed devices": (
        {"key": torch.randn(2, 4, 6, 8, device="meta")},
        "key: expected on the device of query, cpu, got meta",
    ),
    "batch": ({"key": torch.randn(1, 4, 6, 8)}, "expected the same batch size, got 2, 1 and 2"),
    "head dim of keys": (
        {"key": torch.randn(2, 4, 6, 7)},
        "key: expected the head dimension of query, 8, got 7",
    ),
    "no head dim": (
        {"value": torch.randn(2, 4, 6, 0)},
        "expected a head dimension of at least 1, got 8 and 0",
    ),
    "length of values": (
        {"value": torch.randn(2, 4, 5, 8)},
        "value: expected as many positions as key, 6, got 5",
    ),
    "heads of values": (
        {"value": torch.randn(2, 2, 6, 8)},
        "value: expected as many heads as key, 4, got 2",
    ),
    "heads that do not divide": (
        {"key": torch.randn(2, 3, 6, 8), "value": torch.randn(2, 3, 6, 8), "enable_gqa": True},
        "heads: expected the number of query heads to be a multiple .* got 4 and 3",
    ),
    "grouped heads unasked for": (
        {"key": torch.randn(2, 2, 6, 8), "value": torch.randn(2, 2, 6, 8)},
        "heads: expected as many key heads as query heads, 4, got 2; pass enable_gqa=True",
    ),
    "float offset": ({"kv_offset": 1.0}, r"kv_offset: expected None or an integer.* got 1\.0"),
    "far offset": (
        {"kv_offset": 2**30},
        r"kv_offset: expected between -2\^30 and 2\^30, got 1073741824",
    ),
    "no heads": (
        {name: torch.randn(2, 0, 6, 8) for name in ("query", "key", "value")},
        "heads: expected at least one query head and one key head, got 0 and 0",
    ),
    "no query heads": (
        {"query": torch.randn(2, 0, 6, 8), "enable_gqa": True},
        "heads: expected at least one query head and one key head, got 0 and 4",
    ),
    "scale that is no number": ({"scale": math.nan}, "scale: expected .* finite number, got nan"),
    "endless scale": ({"scale": -math.inf}, "scale: expected .* finite number, got -inf"),
    "window of nothing": ({"window": 0}, "window: expected None or a positive integer, got 0"),
    "boolean window": ({"window": True}, "window: expected None or a positive integer"),
    "tolerance of one": ({"skip_tol": 1.0}, r'skip_tol: expected "exact", 0 .* got 1\.0'),
    "negative tolerance": ({"skip_tol": -0.1}, r"skip_tol: .* got -0\.1"),
    "unknown tolerance": ({"skip_tol": "fast"}, "skip_tol: .* got 'fast'"),
    "tensor scale": ({"scale": torch.ones(1)}, "scale: expected None .* or a number"),
    "unknown backend": ({"backend": "flash"}, "backend: expected one of .* got 'flash'"),
    "padding as floats": (
        {"key_padding": torch.ones(2, 6)},
        r"key_padding: expected a bool mask .* got dtype float32; pass key_padding.bool\(\)",
    ),
    "padding as a list": ({"key_padding": [True]}, "key_padding: expected a tensor"),
    "shape of a mask": (
        {"key_padding": torch.ones(2, 5, dtype=torch.bool)},
        r"key_padding: expected a mask \[2, 6\] .* got shape \(2, 5\)",
    ),
    "shape of intervals": (
        {"key_padding": torch.ones(2, 6, dtype=torch.long)},
        r"key_padding: expected intervals \[2, 2\] .* got shape \(2, 6\)",
    ),
    "device of a mask": (
        {"key_padding": torch.ones(2, 6, dtype=torch.bool, device="meta")},
        "key_padding: expected on the device of query, cpu, got meta",
    ),
    "mask with a hole": (
        {"key_padding": mask_with(3)},
        "key_padding: expected one contiguous run of valid keys per row, got 2 runs in row 1",
    ),
    "interval beyond the keys": (
        {"key_padding": torch.tensor([[0, 6], [0, 7]])},
        r"key_padding: expected 0 <= start <= end <= 6 .* got \[0, 7\) in row 1",
    ),
    "interval backwards": (
        {"key_padding": torch.tensor([[4, 2], [0, 6]])},
        r"got \[4, 2\) in row 0",
    ),
}

PACKED = {
    "no leading zero": (
        {"cu_seqlens_q": offsets(2, 4, 6)},
        r"cu_seqlens_q: expected the first offset to be 0, got 2; .* with the leading zero",
    ),
    "decreasing offsets": (
        {"cu_seqlens_k": offsets(0, 7, 6)},
        "cu_seqlens_k: expected offsets that never decrease, got 7 and then 6 at index 2",
    ),
    "tokens left over": (
        {"cu_seqlens_q": offsets(0, 2, 5)},
        "cu_seqlens_q: expected the last offset to be the number of packed tokens, 6, got 5",
    ),
    "int64 offsets": (
        {"cu_seqlens_k": offsets(0, 2, 6, dtype=torch.int64)},
        r"cu_seqlens_k: expected dtype int32, got int64; pass cu_seqlens_k.to\(torch.int32\)",
    ),
    "offsets as a list": (
        {"cu_seqlens_q": [0, 2, 6]},
        r"cu_seqlens_q: expected a tensor of N \+ 1",
    ),
    "offsets in a matrix": (
        {"cu_seqlens_q": offsets(0, 6)[None]},
        r"cu_seqlens_q: expected a tensor of N \+ 1 offsets .* got a tensor of shape \(1, 2\)",
    ),
    "offsets elsewhere": (
        {"cu_seqlens_q": offsets(0, 2, 6).to("meta")},
        "cu_seqlens_q: expected on the device of q, cpu, got meta",
    ),
    "different numbers of sequences": (
        {"cu_seqlens_k": offsets(0, 6)},
        "expected offsets of the same number of sequences, got 2 and 1",
    ),
    "longest too short": (
        {"max_seqlen_k": 3},
        "max_seqlen_k: expected at least the longest sequence's length, 4, got 3",
    ),
    "longest as a tensor": (
        {"max_seqlen_q": torch.tensor(4)},
        "max_seqlen_q: expected an integer, the length of the longest sequence, got a tensor",
    ),
    "negative longest": ({"max_seqlen_q": -1}, "max_seqlen_q: expected at least 0, got -1"),
    "dense query": (
        {"q": torch.randn(1, 4, 6, 8)},
        r"q: expected 3 dimensions \[total, heads, head_dim\], got shape \(1, 4, 6, 8\)",
    ),
    "keys and values": (
        {"v": torch.randn(5, 2, 8)},
        "v: expected as many positions as k, 6, got 5",
    ),
    "heads": (
        {"k": torch.randn(6, 3, 8), "v": torch.randn(6, 3, 8)},
        "heads: expected the number of query heads to be a multiple .* got 4 and 3",
    ),
    "mixed devices": (
        {"v": torch.randn(6, 2, 8, device="meta")},
        "v: expected on the device of q, cpu, got meta",
    ),
    "window": ({"window": -3}, "window: expected None or a positive integer, got -3"),
}


@pytest.mark.parametrize("name", ["auto", "naive", "triton"])
@pytest.mark.parametrize("case", list(DENSE))
def test_a_bad_dense_call_is_refused_by_the_name_of_the_argument(case: str, name: str) -> None:
    changes, message = DENSE[case]
    if name == "triton":
        pytest.importorskip("decapod_kernels")
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("the kernels do not run on these CPU tensors")
    with pytest.raises(InvalidInputError, match=message):
        stickbreaking_attention(**dense(**{"backend": name, **changes}))


@pytest.mark.parametrize("name", ["auto", "naive", "triton"])
@pytest.mark.parametrize("case", list(PACKED))
def test_a_bad_packed_call_is_refused_by_the_name_of_the_argument(case: str, name: str) -> None:
    changes, message = PACKED[case]
    if name == "triton":
        pytest.importorskip("decapod_kernels")
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("the kernels do not run on these CPU tensors")
    with pytest.raises(InvalidInputError, match=message):
        stickbreaking_attention_varlen(**packed(**{"backend": name, **changes}))


def test_the_calls_that_the_bad_ones_are_made_from_are_good() -> None:
    stickbreaking_attention(**dense())
    stickbreaking_attention(**dense(key_padding=mask_with(0, 1, 5)))
    stickbreaking_attention_varlen(**packed())


def test_inspection_of_weights_makes_the_same_checks() -> None:
    query, key = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 7)
    with pytest.raises(InvalidInputError, match="key: expected the head dimension of query"):
        stickbreaking_weights(query, key)


@pytest.mark.parametrize("call", [stickbreaking_attention, stickbreaking_attention_varlen])
@pytest.mark.parametrize(
    ("dtype", "head_dim", "reason"),
    [(torch.float64, 8, "computes in float32 at most"), (torch.float32, 257, "up to 256")],
)
def test_what_the_kernels_cannot_do_is_refused_if_they_are_asked_for(
    call: Callable[..., Any], dtype: torch.dtype, head_dim: int, reason: str
) -> None:
    pytest.importorskip("decapod_kernels")
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if call is stickbreaking_attention:
        inputs = [torch.randn(1, 1, 2, head_dim, dtype=dtype, device=device)] * 3
    else:
        x = torch.randn(2, 1, head_dim, dtype=dtype, device=device)
        inputs = [x, x, x, offsets(0, 2).to(device), offsets(0, 2).to(device), 2, 2]
    with pytest.raises(UnsupportedError, match=reason):
        call(*inputs, backend="triton")
    call(*inputs)


def test_content_is_read_from_what_it_is_given() -> None:
    """The checks of content alone, as `validate=True` makes them on an accelerator."""
    check_offsets("q", offsets(0, 2, 2, 6), total=6, longest=4)
    check_offsets("q", offsets(0), total=0, longest=0)
    check_padding(mask_with(0, 1, 2, 3, 4, 5), keys=6)
    check_padding(torch.zeros(2, 0, dtype=torch.bool), keys=0)
    with pytest.raises(InvalidInputError, match="2 runs in row 1"):
        check_padding(mask_with(1), keys=6)
