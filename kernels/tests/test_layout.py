"""What does not fit is refused by name before any kernel runs; what fits is described."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from decapod_kernels.stickbreaking.layout import check_cu_seqlens, describe


def dense(*, q_heads: int = 4, kv_heads: int = 2, queries: int = 5, keys: int = 7) -> list[Tensor]:
    return [
        torch.zeros(2, q_heads, queries, 16),
        torch.zeros(2, kv_heads, keys, 16),
        torch.zeros(2, kv_heads, keys, 8),
    ]


def packed() -> list[Tensor]:
    return [torch.zeros(6, 4, 16), torch.zeros(9, 2, 16), torch.zeros(9, 2, 8)]


def starts(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_the_last_query_stands_at_the_last_key_unless_told() -> None:
    assert describe(*dense()).offset == 2
    assert describe(*dense(), kv_offset=-3).offset == -3


def test_dense_and_packed_tensors_are_described_alike() -> None:
    q, k, v = packed()
    layout = describe(
        q,
        k,
        v,
        cu_seqlens_q=starts(0, 2, 2, 6),
        cu_seqlens_k=starts(0, 3, 3, 9),
        max_seqlen_q=4,
        max_seqlen_k=6,
    )
    assert (layout.batch, layout.max_q, layout.max_k, layout.group) == (3, 4, 6, 2)
    assert layout.strides(q) == (0, 16, 64)
    q, k, v = dense()
    assert describe(q, k, v).strides(k) == (2 * 7 * 16, 7 * 16, 16)


def test_views_with_a_contiguous_last_dimension_are_taken_as_they_are() -> None:
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in dense())
    assert describe(q, k, v).strides(q) == q.stride()[:3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q[0], k, v), r"q must be \[B, H, L, D\]"),
        (lambda q, k, v: (q, k.half(), v), "k must have q's dtype torch.float32"),
        (lambda q, k, v: (q.double(), k.double(), v.double()), "q must be float16, bfloat16 or"),
        (lambda q, k, v: (q.int(), k.int(), v.int()), "q must be float16, bfloat16 or float32"),
        (lambda q, k, v: (q, k.to("meta"), v), "k must be on q's device cpu, got meta"),
        (lambda q, k, v: (q, k[..., :8], v), "k must have q's head size 16, got 8"),
        (lambda q, k, v: (q, k, v[:, :, :3]), "v must have k's shape"),
        (lambda q, k, v: (q[:, :3], k, v), "multiple of k's heads .*got 3 and 2"),
        (lambda q, k, v: (q[:1], k, v), "k must have q's batch size 1, got 2"),
        (lambda q, k, v: (q[..., ::2], k[..., ::2], v), r"pass q\.contiguous\(\)"),
        (lambda q, k, v: (q.repeat(1, 1, 1, 17), k, v), "head size of 1 to 256, got 272"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        describe(*change(*dense()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 0}, "window must be at least 1"),
        ({"max_seqlen_q": 4}, "need cu_seqlens_q"),
        ({"kv_offset": 2**30}, "positions must stay below"),
        ({"key_start": torch.zeros(2)}, r"key_start must be .* of int32"),
        ({"key_end": starts(1)}, r"key_end must be a contiguous vector \[2\]"),
    ],
)
def test_dense_arguments_that_do_not_fit_are_refused(arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        describe(*dense(), **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cu_seqlens_q": starts(1, 6)}, "cu_seqlens_q must start at 0, got 1"),
        ({"cu_seqlens_q": starts(0, 4, 2, 6)}, "cu_seqlens_q and cu_seqlens_k must describe as"),
        ({"cu_seqlens_q": starts(0, 5)}, "cu_seqlens_q must end at .* 6, got 5"),
        ({"cu_seqlens_k": starts(0, 9).long()}, r"cu_seqlens_k must be int32.*\.int\(\)"),
        ({"max_seqlen_k": 8}, "max_seqlen_k must be at least .*, 9, got 8"),
        ({"cu_seqlens_k": None}, "need both cu_seqlens"),
        ({"max_seqlen_q": None}, "need both max_seqlen"),
        ({"kv_offset": 0}, "are for dense tensors"),
    ],
)
def test_packed_arguments_that_do_not_fit_are_refused(arguments, message: str) -> None:
    right = {
        "cu_seqlens_q": starts(0, 6),
        "cu_seqlens_k": starts(0, 9),
        "max_seqlen_q": 6,
        "max_seqlen_k": 9,
    }
    describe(*packed(), **right)
    with pytest.raises(ValueError, match=message):
        describe(*packed(), **(right | arguments))


def test_starts_of_sequences_must_not_decrease() -> None:
    bad = starts(0, 4, 2, 6)
    with pytest.raises(ValueError, match=r"must not decrease, got \[0, 4, 2, 6\]"):
        check_cu_seqlens("cu_seqlens_q", bad, total=6, longest=6, validate=True)
    # Values on a device are not waited for.
    check_cu_seqlens("cu_seqlens_q", bad, total=6, longest=6, validate=False)
