"""Decoding against a cache, in tensor code and by the definition, through the public function."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sbattn.decode import decode_step, stickbreaking_decode
from sbattn.errors import InvalidInputError, UnsupportedError
from sbattn.naive import naive_attention
from sbattn.segments import merge_segments
from sbattn.visibility import Visibility

Inputs = dict[str, Any]


def problem(
    lengths: list[int],
    *,
    queries: int = 1,
    heads: tuple[int, int] = (2, 2),
    dims: tuple[int, int] = (16, 16),
    capacity: int = 500,
    mean: float = -4.0,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Inputs:
    """Arguments whose logits have the given mean and spread 1; what is in no sequence is NaN."""
    generator = torch.Generator().manual_seed(seed)
    batch = len(lengths)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q = draw(batch, queries, heads[0], dims[0])
    k = draw(batch, capacity, heads[1], dims[0])
    v = draw(batch, capacity, heads[1], dims[1])
    q[..., 0], k[..., 0] = 1.0, mean * math.sqrt(dims[0])
    for b, length in enumerate(lengths):
        k[b, length:] = v[b, length:] = torch.nan
    q, k, v = (x.to(dtype) for x in (q, k, v))
    cache_seqlens = torch.tensor(lengths, dtype=torch.int32)
    return {"q": q, "k_cache": k, "v_cache": v, "cache_seqlens": cache_seqlens}


def in_pages(inputs: Inputs, page_size: int, seed: int) -> Inputs:
    """The same problem with its caches in pages in random order."""
    batch, capacity = inputs["k_cache"].shape[:2]
    count = -(-capacity // page_size)
    order = torch.randperm(batch * count + 3, generator=torch.Generator().manual_seed(seed))
    table = order[: batch * count].view(batch, count).int()
    paged = {}
    for name in ("k_cache", "v_cache"):
        cache = inputs[name]
        padded = cache.new_full((batch, count * page_size, *cache.shape[2:]), torch.nan)
        padded[:, :capacity] = cache
        paged[name] = cache.new_full((len(order), page_size, *cache.shape[2:]), torch.nan)
        paged[name][table.long()] = padded.unflatten(1, (count, page_size))
    used = torch.arange(count) * page_size < inputs["cache_seqlens"][:, None]
    return inputs | paged | {"block_table": torch.where(used, table, -1)}


def close(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], tolerance: float) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x.double(), y.double(), rtol=tolerance, atol=tolerance)


@settings(deadline=None, max_examples=30)
@given(
    lengths=st.lists(st.sampled_from([0, 3, 4, 100, 127, 128, 129, 300, 500]), min_size=1),
    queries=st.integers(1, 3),
    heads=st.sampled_from([(2, 2), (4, 2), (3, 1)]),
    dims=st.sampled_from([(8, 8), (5, 12)]),
    attend_current=st.booleans(),
    window=st.sampled_from([None, 1, 7, 150]),
    seed=st.integers(0, 99),
)
def test_tiles_equal_definition(
    lengths: list[int],
    queries: int,
    heads: tuple[int, int],
    dims: tuple[int, int],
    attend_current: bool,
    window: int | None,
    seed: int,
) -> None:
    inputs = problem(lengths[:4], queries=queries, heads=heads, dims=dims, seed=seed)
    options = {"attend_current": attend_current, "window": window}
    naive = stickbreaking_decode(**inputs, **options, backend="naive")
    for skip_tol in ("exact", 0):
        found = stickbreaking_decode(**inputs, **options, skip_tol=skip_tol, backend="chunked")
        close(found, naive, 1e-12)
    empty = inputs["cache_seqlens"] == 0
    assert found[0][empty].count_nonzero() == found[1][empty].count_nonzero() == 0


@pytest.mark.parametrize("backend", ["chunked", "naive"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_decode_loop_equals_prefill_row_by_row(
    backend: Any, dtype: torch.dtype, tolerance: float
) -> None:
    inputs = problem([200], queries=200, heads=(4, 2), capacity=200, mean=-3.0)
    q, k, v = inputs["q"], inputs["k_cache"], inputs["v_cache"]
    whole, whole_log = naive_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), scale=0.25, visibility=Visibility(0)
    )
    q, k, v = (x.to(dtype) for x in (q, k, v))
    for t in (0, 1, 2, 60, 127, 128, 129, 199):
        found = stickbreaking_decode(q[:, t : t + 1], k, v, cache_seqlens=t + 1, backend=backend)
        torch.testing.assert_close(
            found[0][:, 0].double(), whole[:, :, t], rtol=tolerance, atol=tolerance
        )
        torch.testing.assert_close(
            found[1][:, 0].double(), whole_log[:, :, t], rtol=tolerance, atol=tolerance
        )


def test_speculative_queries_equal_single_ones() -> None:
    inputs = problem([300, 140], queries=3, heads=(4, 2))
    out, log_rem = stickbreaking_decode(**inputs)
    for t in range(3):
        single = inputs | {
            "q": inputs["q"][:, t : t + 1],
            "cache_seqlens": inputs["cache_seqlens"] - 2 + t,
        }
        close(stickbreaking_decode(**single), (out[:, t : t + 1], log_rem[:, t : t + 1]), 1e-12)


@pytest.mark.parametrize("page_size", [16, 13, 1])
def test_pages_in_any_order_equal_a_contiguous_cache(page_size: int) -> None:
    inputs = problem([450, 0, 129], queries=2, heads=(4, 2))
    contiguous = stickbreaking_decode(**inputs)
    for seed in range(3):
        paged = stickbreaking_decode(**in_pages(inputs, page_size, seed))
        close(paged, contiguous, 1e-13)


def test_shared_heads_equal_repeated_heads() -> None:
    inputs = problem([300, 140], queries=2, heads=(6, 2))
    repeated = {n: inputs[n].repeat_interleave(3, dim=2) for n in ("k_cache", "v_cache")}
    close(stickbreaking_decode(**inputs), stickbreaking_decode(**(inputs | repeated)), 1e-12)


@pytest.mark.parametrize("backend", ["chunked", "naive"])
def test_own_key_counts_only_with_attend_current(backend: Any) -> None:
    inputs = problem([150])
    other = {n: inputs[n].clone() for n in ("k_cache", "v_cache")}
    for cache in other.values():
        cache[:, 149] += 1.0
    for attend_current in (False, True):
        options = {"attend_current": attend_current, "backend": backend}
        a = stickbreaking_decode(**inputs, **options)
        b = stickbreaking_decode(**(inputs | other), **options)
        assert torch.equal(a[0], b[0]) is not attend_current
        assert torch.equal(a[1], b[1]) is not attend_current


def test_keys_behind_the_end_of_the_stick_are_not_read() -> None:
    inputs = problem([500, 450], mean=2.0)
    out, log_rem = stickbreaking_decode(**inputs)
    assert log_rem.max() < math.log(2.0**-53)
    for name in ("k_cache", "v_cache"):
        inputs[name][:, :300] = torch.nan
    again = stickbreaking_decode(**inputs)
    assert torch.equal(again[0], out)
    assert torch.equal(again[1], log_rem)
    assert stickbreaking_decode(**inputs, skip_tol=0)[0].isnan().all()


@pytest.mark.parametrize("skip_tol", [0.1, 1e-3, "exact"])
def test_early_exit_stays_inside_its_bound_on_adversarial_values(
    skip_tol: Any,
) -> None:
    inputs = problem([500, 333], queries=2, heads=(4, 2), mean=-4.0)
    far = torch.arange(500)[None, :] < inputs["cache_seqlens"][:, None] - 130
    inputs["v_cache"][far] = 1e6  # all of one sign: nothing cancels
    out, log_rem = stickbreaking_decode(**inputs, skip_tol=skip_tol)
    true_out, true_log = stickbreaking_decode(**inputs, backend="naive")
    error, rest = (out - true_out).abs().amax(-1), log_rem.exp()
    assert (error <= rest * 1e6 * (1 + 1e-9)).all()
    assert (log_rem >= true_log - 1e-9).all()
    stopped = log_rem > true_log + 1e-6
    limit = 2.0**-53 if skip_tol == "exact" else skip_tol
    assert (rest[stopped] < limit).all()
    if skip_tol == 0.1:
        assert error.max() > 1.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    inputs = problem([400, 90], heads=(4, 2), dtype=dtype)
    out, log_rem = stickbreaking_decode(**inputs)
    assert out.dtype == dtype
    assert log_rem.dtype == torch.float32
    exact = {n: x.double() if x.is_floating_point() else x for n, x in inputs.items()}
    true_out, true_log = stickbreaking_decode(**exact, backend="naive")
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), true_out, rtol=step, atol=1e-5)
    torch.testing.assert_close(log_rem.double(), true_log, rtol=1e-5, atol=1e-5)


def test_results_repeat_bitwise() -> None:
    inputs = problem([500, 77, 300], queries=2, dtype=torch.float32)
    first = stickbreaking_decode(**inputs)
    for _ in range(3):
        again = stickbreaking_decode(**inputs)
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])


@settings(deadline=None, max_examples=20)
@given(cut=st.integers(1, 399), attend_current=st.booleans())
def test_stretches_of_a_cache_merge_to_the_whole(cut: int, attend_current: bool) -> None:
    inputs = problem([400], heads=(4, 2), capacity=400)
    whole = stickbreaking_decode(**inputs, attend_current=attend_current, skip_tol=0)
    near = {n: inputs[n][:, cut:] for n in ("k_cache", "v_cache")} | {"cache_seqlens": 400 - cut}
    far = {n: inputs[n][:, :cut] for n in ("k_cache", "v_cache")} | {"cache_seqlens": cut}
    merged = merge_segments(
        stickbreaking_decode(**(inputs | near), attend_current=attend_current, skip_tol=0),
        stickbreaking_decode(**(inputs | far), attend_current=True, skip_tol=0),
    )
    close(merged, whole, 1e-12)


def test_caches_are_read_through_their_strides() -> None:
    inputs = problem([300, 140], heads=(4, 2))
    heads_first = {
        n: inputs[n].transpose(1, 2).contiguous().transpose(1, 2) for n in ("k_cache", "v_cache")
    }
    assert not heads_first["k_cache"].is_contiguous()
    close(stickbreaking_decode(**(inputs | heads_first)), stickbreaking_decode(**inputs), 1e-13)


def test_nothing_to_decode_is_no_error() -> None:
    inputs = problem([4, 4], capacity=8)
    none = {n: x[:0] for n, x in inputs.items()}
    assert stickbreaking_decode(**none)[0].shape == (0, 1, 2, 16)
    out, log_rem = stickbreaking_decode(**(inputs | {"q": inputs["q"][:, :0]}))
    assert out.shape == (2, 0, 2, 16)
    assert log_rem.shape == (2, 0, 2)


@pytest.mark.parametrize("paged", [False, True])
def test_the_operator_is_registered_soundly(paged: bool) -> None:
    inputs = problem([40, 0], queries=2, heads=(4, 2), capacity=48, dtype=torch.float32)
    inputs = in_pages(inputs, 16, 0) if paged else inputs | {"block_table": None}
    tensors = (inputs[n] for n in ("q", "k_cache", "v_cache", "cache_seqlens", "block_table"))
    torch.library.opcheck(
        decode_step, (*tensors, 0.25, False, None if paged else 9, 1e-6, False, "chunked")
    )


def test_compiled_decode_equals_eager() -> None:
    inputs = problem([300, 140], queries=2, heads=(4, 2), dtype=torch.float32)

    def step(**inputs: Any) -> tuple[Tensor, Tensor]:
        out, log_rem = stickbreaking_decode(**inputs)
        return 2 * out, log_rem.exp()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    close(compiled(**inputs), step(**inputs), 1e-6)


def test_inputs_that_require_gradients_are_refused() -> None:
    inputs = problem([40], capacity=48)
    inputs["k_cache"].requires_grad_()
    with pytest.raises(UnsupportedError, match=r"under torch\.no_grad"):
        stickbreaking_decode(**inputs)
    with torch.no_grad():
        assert stickbreaking_decode(**inputs)[0].isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 2, 16)}, r"q: expected a tensor \[batch, length"),
        ({"q": torch.zeros(2, 1, 2, 16)}, "k_cache: expected float16.*cast the query"),
        ({"k_cache": torch.zeros(2, 8, 2, 16).long()}, "k_cache: expected float16"),
        ({"k_cache": torch.zeros(2, 9, 2, 16).double()}, "v_cache: expected k_cache's shape"),
        ({"q": torch.zeros(2, 1, 2, 8).double()}, "k_cache: expected the head dimension of q, 8"),
        ({"q": torch.zeros(2, 1, 3, 16).double()}, "heads: expected .* got 3 and 2"),
        ({"q": torch.zeros(3, 1, 2, 16).double()}, "k_cache: expected q's batch size, 3.*pages"),
        ({"q": torch.zeros(2, 1, 2, 16, device="meta").double()}, "on the device of q, meta"),
        ({"cache_seqlens": torch.tensor([4.0, 4.0])}, "cache_seqlens: expected .* got torch.fl"),
        ({"cache_seqlens": [4, 4]}, "cache_seqlens: expected .* got list"),
        ({"cache_seqlens": torch.tensor([4])}, r"cache_seqlens: expected \[batch\]"),
        ({"cache_seqlens": torch.tensor([4, 9])}, "0 to 8, .* got 9 for sequence 1"),
        ({"cache_seqlens": torch.tensor([-1, 4])}, "0 to 8, .* got -1 for sequence 0"),
        ({"q": torch.zeros(2, 5, 2, 16).double()}, "at least the 5 newest tokens.* got 4"),
        ({"block_table": torch.zeros(2).int()}, "block_table: expected .batch, pages"),
        ({"block_table": torch.tensor([[0], [2]])}, "pages 0 to 1, got 2 to 2 .* sequence 1"),
        ({"block_table": torch.tensor([[-1], [1]])}, "pages 0 to 1, got -1 to -1"),
        ({"window": 0}, "window: expected"),
        ({"skip_tol": 1.0}, "skip_tol: expected"),
        ({"scale": "1"}, "scale: expected"),
        ({"backend": "cuda"}, "backend: expected one of"),
    ],
)
def test_bad_input_is_refused_by_name(change: Inputs, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        stickbreaking_decode(**(problem([4, 4], capacity=8) | change))
