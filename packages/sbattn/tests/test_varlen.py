from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sbattn.functional import stickbreaking_attention, stickbreaking_attention_varlen

# Lengths of queries and keys of each sequence: plain, empty, no queries, prefix, one token.
LENGTHS = [(13, 13), (0, 0), (0, 4), (5, 40), (1, 1), (33, 33)]


def offsets(lengths: list[int], device: str) -> Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)


def pack(backend: Any, lengths: list[tuple[int, int]], heads: int = 2) -> tuple[Any, ...]:
    queries, keys = ([pair[side] for pair in lengths] for side in (0, 1))
    q = backend.randn(sum(queries), 2, 8)
    k, v = (backend.randn(sum(keys), heads, d, seed=d) for d in (8, 5))
    cu_q, cu_k = offsets(queries, backend.device), offsets(keys, backend.device)
    return q, k, v, cu_q, cu_k, max(queries, default=0), max(keys, default=0)


def one_by_one(arguments: tuple[Any, ...], **options: Any) -> tuple[Tensor, Tensor]:
    q, k, v, cu_q, cu_k, _, _ = arguments
    outs, rems = [], []
    for n in range(len(cu_q) - 1):
        rows, keys = slice(cu_q[n], cu_q[n + 1]), slice(cu_k[n], cu_k[n + 1])
        dense = (x[s].transpose(0, 1)[None] for x, s in ((q, rows), (k, keys), (v, keys)))
        out, rem = stickbreaking_attention(*dense, enable_gqa=True, backend="naive", **options)
        outs.append(out[0].transpose(0, 1))
        rems.append(rem[0].transpose(0, 1))
    return torch.cat(outs), torch.cat(rems)


@pytest.mark.parametrize(
    "options", [{}, {"attend_current": True, "window": 6}, {"skip_tol": 0}], ids=str
)
@pytest.mark.parametrize("heads", [2, 1], ids=["equal heads", "shared heads"])
def test_packed_sequences_give_what_each_gives_alone(
    backend: Any, options: dict[str, Any], heads: int
) -> None:
    arguments = pack(backend, LENGTHS, heads)
    leaves = [x.requires_grad_() for x in arguments[:3]]
    found = stickbreaking_attention_varlen(*arguments, backend=backend.name, **options)
    expected = one_by_one(arguments, **options)
    waves = [torch.arange(x.numel(), device=x.device).view(x.shape).cos() for x in expected]
    gradients = [
        torch.autograd.grad((out * waves[0]).sum() + (rem * waves[1]).sum(), leaves)
        for out, rem in (found, expected)
    ]
    for a, b in zip((*found, *gradients[0]), (*expected, *gradients[1]), strict=True):
        assert a.shape == b.shape
        backend.close(a, b)


def test_a_token_never_sees_another_sequence(backend: Any) -> None:
    q, k, v, *packing = pack(backend, [(12, 12), (9, 9), (14, 14)])
    before = stickbreaking_attention_varlen(q, k, v, *packing, backend=backend.name)
    k[12:21], v[12:21] = 7.0, 1e4
    after = stickbreaking_attention_varlen(q, k, v, *packing, backend=backend.name)
    others = torch.cat((torch.arange(12), torch.arange(21, 35))).to(q.device)
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a[others], b[others])


def test_the_longest_length_may_be_overstated(backend: Any) -> None:
    q, k, v, cu_q, cu_k, longest_q, longest_k = pack(backend, [(12, 12), (9, 20)])
    leaves = [x.requires_grad_() for x in (q, k, v)]
    tight = stickbreaking_attention_varlen(
        *leaves, cu_q, cu_k, longest_q, longest_k, backend=backend.name
    )
    loose = stickbreaking_attention_varlen(*leaves, cu_q, cu_k, 64, 99, backend=backend.name)
    for a, b in zip(tight, loose, strict=True):
        assert torch.equal(a, b)
    gradients = [torch.autograd.grad(out.sum() + rem.sum(), leaves) for out, rem in (tight, loose)]
    for a, b in zip(*gradients, strict=True):
        backend.close(a, b)


@pytest.mark.parametrize("lengths", [[], [(0, 0)], [(0, 3), (0, 0)]], ids=str)
def test_no_rows_at_all_give_no_rows(backend: Any, lengths: list[tuple[int, int]]) -> None:
    arguments = pack(backend, lengths)
    leaves = [x.requires_grad_() for x in arguments[:3]]
    out, rem = stickbreaking_attention_varlen(*arguments, backend=backend.name)
    assert out.shape == (0, 2, 5)
    assert rem.shape == (0, 2)
    gradients = torch.autograd.grad(out.sum() + rem.sum(), leaves, allow_unused=True)
    assert not any(g.any() for g in gradients if g is not None)


def test_remainders_are_logarithms_on_request(backend: Any) -> None:
    arguments = pack(backend, [(12, 12), (3, 9)])
    _, rem = stickbreaking_attention_varlen(*arguments, backend=backend.name)
    _, log_rem = stickbreaking_attention_varlen(
        *arguments, return_log_remainder=True, backend=backend.name
    )
    assert torch.equal(log_rem.exp(), rem)
