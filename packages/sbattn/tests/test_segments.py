from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sbattn.errors import InvalidInputError
from sbattn.functional import stickbreaking_attention
from sbattn.segments import merge_segments

Segment = tuple[Tensor, Tensor]

shapes = st.lists(st.integers(1, 3), min_size=0, max_size=3).map(tuple)


@st.composite
def segments(draw: st.DrawFn, count: int) -> list[Segment]:
    shape, dim = draw(shapes), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    spent = draw(st.sampled_from([0.0, 0.1, 5.0, 800.0]))
    return [
        (
            torch.randn(*shape, dim, generator=generator, dtype=torch.float64),
            -spent * torch.rand(shape, generator=generator, dtype=torch.float64),
        )
        for _ in range(count)
    ]


def assert_same(a: Segment, b: Segment) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@settings(deadline=None)
@given(segments(3))
def test_merging_is_associative(three: list[Segment]) -> None:
    a, b, c = three
    assert_same(
        merge_segments(merge_segments(a, b), c),
        merge_segments(a, merge_segments(b, c)),
    )


@settings(deadline=None)
@given(segments(1))
def test_nothing_read_and_nothing_spent_is_the_identity(one: list[Segment]) -> None:
    (segment,) = one
    identity = tuple(torch.zeros_like(x) for x in segment)
    for merged in (merge_segments(identity, segment), merge_segments(segment, identity)):
        for x, y in zip(merged, segment, strict=True):
            assert torch.equal(x, y)


def test_a_stick_used_up_nearby_hides_what_is_far() -> None:
    near = torch.ones(2), torch.tensor(-torch.inf)
    far = torch.full((2,), 1e30), torch.tensor(-1.0)
    out, log_rem = merge_segments(near, far)
    assert torch.equal(out, near[0])
    assert log_rem == -torch.inf


@settings(deadline=None, max_examples=25)
@given(
    cuts=st.lists(st.integers(0, 30), max_size=4).map(sorted),
    attend_current=st.booleans(),
    window=st.none() | st.integers(1, 31),
    backend=st.sampled_from(["naive", "chunked"]),
)
def test_segments_of_the_keys_compose_to_the_whole_and_so_do_their_gradients(
    cuts: list[int], attend_current: bool, window: int | None, backend: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, 2, n, 4, generator=generator, dtype=torch.float64) for n in (20, 30, 30)
    )
    # Shifted down, so that sticks reach across the segments.
    q[..., 0], k[..., 0] = 1, -2
    leaves = [x.requires_grad_() for x in (q, k, v)]
    offset = 30 - 20
    options = {
        "attend_current": attend_current,
        "window": window,
        "return_log_remainder": True,
        "backend": backend,
    }
    whole = stickbreaking_attention(*leaves, **options)
    merged = None
    for start, end in reversed(list(pairwise([0, *cuts, 30]))):
        part = stickbreaking_attention(
            q, k[:, :, start:end], v[:, :, start:end], kv_offset=offset - start, **options
        )
        merged = part if merged is None else merge_segments(merged, part)
    assert merged is not None
    gradients = [
        torch.autograd.grad(out.square().sum() + log_rem.sin().sum(), leaves)
        for out, log_rem in (whole, merged)
    ]
    for a, b in zip((*whole, *gradients[0]), (*merged, *gradients[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * max(1.0, b.abs().max().item()))


def test_half_precision_outputs_keep_their_dtype() -> None:
    near, far = ((torch.ones(3, 2).bfloat16(), torch.zeros(3)) for _ in range(2))
    out, log_rem = merge_segments(near, far)
    assert out.dtype == torch.bfloat16
    assert log_rem.dtype == torch.float32
    assert (out == 2).all()


def test_segments_that_do_not_fit_are_refused() -> None:
    segment = torch.ones(3, 2), torch.zeros(3)
    with pytest.raises(InvalidInputError, match=r"far: expected outputs of near's shape, \(3, 2\)"):
        merge_segments(segment, (torch.ones(4, 2), torch.zeros(4)))
    with pytest.raises(InvalidInputError, match=r"near: expected log remainders \(3,\)"):
        merge_segments((torch.ones(3, 2), torch.zeros(3, 1)), segment)
