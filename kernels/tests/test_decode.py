"""Decoding kernels: a few queries per sequence against contiguous and paged caches."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import oracle
from decapod_kernels.stickbreaking.decode import decode
from decapod_kernels.stickbreaking.decode_plan import (
    DecodeConfig,
    Wave,
    decode_config,
    plan_waves,
)

# Small enough that short caches have several tiles, segments and waves.
SMALL = DecodeConfig(
    block_q=16, block_k=16, step=1, segment=16, first_wave=32, growth=2, programs=12
)
STEPS = DecodeConfig(
    block_q=16, block_k=16, step=2, segment=32, first_wave=64, growth=3, programs=4
)
WHOLE = DecodeConfig(
    block_q=16, block_k=32, step=4, segment=128, first_wave=4096, growth=2, programs=1
)
NEVER = -math.inf


def problem(
    lengths: list[int],
    *,
    queries: int = 1,
    heads: tuple[int, int] = (2, 2),
    dims: tuple[int, int] = (16, 16),
    capacity: int = 112,
    mean: float = 0.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random q, caches and lengths; logits at `scale=0.5` have that mean and spread 1.

    What a cache holds beyond a sequence's length is NaN: it must not be read.
    """
    generator = torch.Generator().manual_seed(seed)
    batch = len(lengths)
    q = torch.randn(batch, queries, heads[0], dims[0], generator=generator)
    k = torch.randn(batch, capacity, heads[1], dims[0], generator=generator)
    k *= 2 / math.sqrt(dims[0])
    v = torch.randn(batch, capacity, heads[1], dims[1], generator=generator)
    q[..., 0], k[..., 0] = 1.0, 2 * mean
    for b, length in enumerate(lengths):
        k[b, length:] = v[b, length:] = torch.nan
    return q, k, v, torch.tensor(lengths, dtype=torch.int32)


def run(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, device: torch.device, **options: object
) -> tuple[Tensor, Tensor]:
    options = {"scale": 0.5, "config": SMALL} | options
    table = options.pop("block_table", None)
    out, log_rem = decode(
        q.to(device),
        k.to(device),
        v.to(device),
        cache_seqlens=lengths.to(device),
        block_table=None if table is None else table.to(device),
        **options,
    )
    return out.cpu(), log_rem.cpu()


def expected(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, **options: object
) -> tuple[Tensor, Tensor]:
    """The definition, one sequence after the other, in float64."""
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=torch.float64)
    log_rem = torch.zeros(q.shape[:3], dtype=torch.float64)
    for b, length in enumerate(lengths.tolist()):
        if length:
            one = (x.transpose(1, 2) for x in (q[b : b + 1], k[b : b + 1, :length]))
            values = v[b : b + 1, :length].transpose(1, 2)
            found = oracle.attention(*one, values, scale=0.5, **options)
            out[b], log_rem[b] = (x[0].transpose(0, 1) for x in found)
    return out, log_rem


def pages_of(cache: Tensor, page_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """The cache in pages in random order, some of which belong to nobody, and the table."""
    batch, capacity = cache.shape[:2]
    count = -(-capacity // page_size)
    padded = torch.full((batch, count * page_size, *cache.shape[2:]), torch.nan)
    padded[:, :capacity] = cache
    order = torch.randperm(batch * count + 3, generator=torch.Generator().manual_seed(seed))
    table = order[: batch * count].view(batch, count).int()
    pages = torch.full((len(order), page_size, *cache.shape[2:]), torch.nan)
    pages[table.long()] = padded.unflatten(1, (count, page_size))
    return pages, table


@pytest.mark.parametrize("config", [SMALL, STEPS])
@pytest.mark.parametrize(
    ("queries", "heads", "dims", "options"),
    [
        (1, (2, 2), (16, 16), {}),
        (1, (4, 2), (20, 12), {"attend_current": True}),
        (3, (2, 1), (17, 33), {}),
        (3, (2, 2), (16, 16), {"attend_current": True, "window": 21}),
        (2, (2, 1), (16, 16), {"window": 5}),
    ],
)
def test_decode_equals_definition(
    queries: int,
    heads: tuple[int, int],
    dims: tuple[int, int],
    options: dict[str, object],
    config: DecodeConfig,
    device: torch.device,
) -> None:
    inputs = problem([100, 33, 0, 1], queries=queries, heads=heads, dims=dims, mean=-3.0)
    out, log_rem = run(*inputs, device, config=config, **options)
    true_out, true_log = expected(*inputs, **options)
    torch.testing.assert_close(out.double(), true_out, rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(log_rem.double(), true_log, rtol=2e-6, atol=2e-6)
    assert log_rem[2].count_nonzero() == 0
    assert out[2].count_nonzero() == 0


def test_decode_loop_equals_prefill_row_by_row(device: torch.device) -> None:
    q, k, v, _ = problem([14], queries=14, capacity=14, mean=-1.0)
    whole, whole_log = expected(q, k, v, torch.tensor([14]))
    for t in range(14):
        step = q[:, t : t + 1], k, v, torch.tensor([t + 1], dtype=torch.int32)
        out, log_rem = run(*step, device)
        torch.testing.assert_close(out[:, 0].double(), whole[:, t], rtol=2e-5, atol=2e-6)
        torch.testing.assert_close(log_rem[:, 0].double(), whole_log[:, t], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("page_size", [16, 13])
def test_pages_in_any_order_equal_a_contiguous_cache_bitwise(
    page_size: int, device: torch.device
) -> None:
    q, k, v, lengths = problem([97, 40], queries=2, heads=(2, 1), mean=-3.0)
    contiguous = run(q, k, v, lengths, device)
    k_pages, table = pages_of(k, page_size, seed=1)
    v_pages, same_table = pages_of(v, page_size, seed=1)
    assert torch.equal(table, same_table)
    used = torch.arange(table.shape[1]) * page_size < lengths[:, None]
    table[~used] = -1  # what a sequence has no page for is not looked up
    paged = run(q, k_pages, v_pages, lengths, device, block_table=table)
    assert torch.equal(contiguous[0], paged[0])
    assert torch.equal(contiguous[1], paged[1])


def test_several_waves_equal_one_segment(device: torch.device) -> None:
    inputs = problem([112, 70], queries=2, heads=(2, 1), mean=-3.0)
    for tol in (-24.0, NEVER):
        waves = run(*inputs, device, log2_tol=tol)
        whole = run(*inputs, device, log2_tol=tol, config=WHOLE)
        torch.testing.assert_close(waves[0], whole[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(waves[1], whole[1], rtol=1e-6, atol=1e-6)


def test_keys_behind_the_end_of_the_stick_are_not_read(device: torch.device) -> None:
    q, k, v, lengths = problem([112, 112], heads=(2, 1), mean=2.0)
    out, log_rem = run(q, k, v, lengths, device)
    assert log_rem.max() < -24 * math.log(2)
    for config in (SMALL, WHOLE):  # in waves that return at once; inside a segment
        k[:, : 112 - 64], v[:, : 112 - 64] = torch.nan, torch.nan
        if config is WHOLE:
            config = DecodeConfig(
                block_q=16, block_k=16, step=2, segment=128, first_wave=128, programs=1
            )
        again, _ = run(q, k, v, lengths, device, config=config)
        torch.testing.assert_close(again, out, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("log2_tol", [-24.0, -10.0, -3.0])
def test_early_exit_stays_inside_its_bound_on_adversarial_values(
    log2_tol: float, device: torch.device
) -> None:
    q, k, v, lengths = problem([112, 90], queries=2, mean=-0.5)
    ends = torch.arange(112)[None, :, None, None] < (lengths - 24)[:, None, None, None]
    v = torch.where(ends & ~v.isnan(), 1e6, v)  # all of one sign: nothing cancels
    largest = v.nan_to_num(0.0).abs().max().item()
    out, log_rem = run(q, k, v, lengths, device, log2_tol=log2_tol)
    true_out, true_log = expected(q, k, v, lengths)
    rest = log_rem.double().exp()
    error = (out.double() - true_out).abs().amax(-1)
    rounding = 2e-6 * largest
    assert (error <= rest * largest + rounding).all()
    assert (log_rem >= true_log - 1e-4).all()
    stopped = log_rem > true_log + 1e-3
    assert (rest[stopped] < 2.0**log2_tol).all()
    if log2_tol == -3.0:
        assert stopped.any()
        assert (error > rounding).any()


def test_segments_behind_one_that_stopped_add_nothing(device: torch.device) -> None:
    # Two segments of one wave: the nearer one stops half-way, before keys that would have taken all
    # that is left. Were the farther one given it instead, the error would be twice the bound.
    z = torch.tensor([30.0] * 32 + [30.0] * 16 + [-1.64] * 16)
    values = torch.tensor([1e6] * 32 + [-1e6] * 16 + [0.0] * 16)
    q = torch.zeros(1, 1, 1, 16)
    k = torch.zeros(1, 64, 1, 16)
    q[..., 0], k[0, :, 0, 0] = 2.0, z
    v = values[None, :, None, None].repeat(1, 1, 1, 16)
    config = DecodeConfig(block_q=16, block_k=16, step=1, segment=32, first_wave=64, programs=2)
    out, log_rem = run(
        q,
        k,
        v,
        torch.tensor([64], dtype=torch.int32),
        device,
        attend_current=True,
        log2_tol=-4.0,
        config=config,
    )
    rest = 16 * -math.log1p(math.exp(-1.64))
    assert log_rem.item() == pytest.approx(rest, rel=1e-5)
    assert out.abs().max() == 0


def test_exact_tolerance_equals_no_skipping_to_rounding(device: torch.device) -> None:
    inputs = problem([112, 64], heads=(2, 1), mean=0.0)
    exact, _ = run(*inputs, device)
    full, log_rem = run(*inputs, device, log2_tol=NEVER)
    torch.testing.assert_close(exact, full, rtol=1e-6, atol=1e-6)
    true_log = expected(*inputs)[1]
    torch.testing.assert_close(log_rem.double(), true_log, rtol=2e-6, atol=0)


def test_shared_heads_equal_repeated_heads(device: torch.device) -> None:
    q, k, v, lengths = problem([75, 20], queries=2, heads=(6, 2), mean=-3.0)
    shared = run(q, k, v, lengths, device)
    k, v = (x.repeat_interleave(3, dim=2) for x in (k, v))
    repeated = run(q, k, v, lengths, device)
    for a, b in zip(shared, repeated, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_rows_beyond_one_block_are_computed_too(device: torch.device) -> None:
    inputs = problem([40], queries=5, heads=(7, 1), capacity=48, mean=-3.0)
    out, log_rem = run(*inputs, device)
    true_out, true_log = expected(*inputs)
    torch.testing.assert_close(out.double(), true_out, rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(log_rem.double(), true_log, rtol=2e-6, atol=2e-6)


def test_own_key_counts_only_with_attend_current(device: torch.device) -> None:
    q, k, v, lengths = problem([50], mean=-3.0)
    other_k, other_v = k.clone(), v.clone()
    other_k[:, 49] += 1.0
    other_v[:, 49] -= 1.0
    for attend_current in (False, True):
        a = run(q, k, v, lengths, device, attend_current=attend_current)
        b = run(q, other_k, other_v, lengths, device, attend_current=attend_current)
        assert torch.equal(a[0], b[0]) is not attend_current
        assert torch.equal(a[1], b[1]) is not attend_current


def test_results_repeat_bitwise_and_do_not_depend_on_the_batch(device: torch.device) -> None:
    q, k, v, lengths = problem([100, 31, 77], queries=2, mean=-3.0)
    one_group = DecodeConfig(block_q=16, block_k=16, step=1, segment=16, first_wave=32, programs=1)
    first = run(q, k, v, lengths, device, config=one_group)
    again = run(q, k, v, lengths, device, config=one_group)
    alone = run(q[1:2], k[1:2], v[1:2], lengths[1:2], device, config=one_group)
    for a, b, c in zip(first, again, alone, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a[1:2], c)


def test_half_precision_is_rounded_once(device: torch.device) -> None:
    q, k, v, lengths = problem([100, 60], mean=-3.0)
    q, k, v = (x.half() for x in (q, k, v))
    out, log_rem = run(q, k, v, lengths, device)
    assert out.dtype == torch.float16
    assert log_rem.dtype == torch.float32
    true_out, true_log = expected(q, k, v, lengths)
    torch.testing.assert_close(out.double(), true_out, rtol=2e-3, atol=1e-3)
    torch.testing.assert_close(log_rem.double(), true_log, rtol=1e-5, atol=1e-5)


def test_bfloat16_products_are_right(device: torch.device) -> None:
    q, k, v, lengths = problem([100, 60], mean=-3.0)
    q, k, v = (x.bfloat16() for x in (q, k, v))
    out, _ = run(q, k, v, lengths, device)
    true_out, _ = expected(q, k, v, lengths)
    torch.testing.assert_close(out.double(), true_out, rtol=1e-2, atol=1e-2)


def test_caches_are_read_through_their_strides(device: torch.device) -> None:
    q, k, v, lengths = problem([60, 90], heads=(4, 2), mean=-3.0)
    straight = run(q, k, v, lengths, device)
    k_heads_first = k.transpose(1, 2).contiguous().transpose(1, 2)
    both = torch.stack([v, v], dim=-2).flatten(2, 3)[:, :, ::2]
    wide = torch.cat([q, q], dim=-1)[..., : q.shape[-1]]
    strided = run(wide, k_heads_first, both, lengths, device)
    assert not any(x.is_contiguous() for x in (wide, k_heads_first, both))
    assert torch.equal(straight[0], strided[0])
    assert torch.equal(straight[1], strided[1])


def test_nan_comes_out_of_the_rows_that_hold_it_and_of_no_others(device: torch.device) -> None:
    q, k, v, lengths = problem([60, 60], heads=(2, 2), mean=2.0)
    clean, _ = run(q, k, v, lengths, device)
    q[0, 0, 1] = torch.nan
    out, log_rem = run(q, k, v, lengths, device)
    assert out[0, 0, 1].isnan().all()
    assert log_rem[0, 0, 1].isnan()
    assert torch.equal(out[0, 0, 0], clean[0, 0, 0])
    assert torch.equal(out[1], clean[1])


def test_nothing_to_decode_is_no_error(device: torch.device) -> None:
    q, k, v, lengths = problem([4, 4], capacity=8)
    out, log_rem = run(q[:0], k[:0], v[:0], lengths[:0], device)
    assert out.shape == (0, 1, 2, 16)
    assert log_rem.shape == (0, 1, 2)
    out, log_rem = run(q, k[:, :0], v[:, :0], 0 * lengths, device)
    assert out.count_nonzero() == log_rem.count_nonzero() == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 2, 16)}, "q must have 4 dimensions"),
        ({"q": torch.zeros(2, 1, 2, 16, dtype=torch.float64)}, "must all be float16"),
        ({"k": torch.zeros(2, 8, 2, 16, dtype=torch.float16)}, "float16 for k_cache"),
        ({"k": torch.zeros(2, 8, 16, 2).transpose(2, 3)}, "k_cache must be contiguous in its last"),
        ({"v": torch.zeros(2, 8, 2, 257)}, "v_cache must have a head size of 1 to 256, got 257"),
        ({"k": torch.zeros(2, 9, 2, 16)}, "k_cache must have v_cache's shape"),
        ({"q": torch.zeros(2, 1, 3, 16)}, "multiple of k_cache's heads"),
        ({"q": torch.zeros(3, 1, 2, 16)}, "q's batch size 3"),
        ({"lengths": torch.zeros(2, dtype=torch.int64)}, "cache_seqlens must be int32"),
        ({"lengths": torch.zeros(2, 1, dtype=torch.int32)}, "cache_seqlens must have 1 dim"),
        ({"block_table": torch.zeros(3, 1, dtype=torch.int32)}, "block_table must have 2 dim"),
        ({"window": 0}, "window must be at least 1"),
    ],
)
def test_bad_input_is_refused_by_name(
    change: dict[str, object], message: str, device: torch.device
) -> None:
    given_ = {
        "q": torch.zeros(2, 1, 2, 16),
        "k": torch.zeros(2, 8, 2, 16),
        "v": torch.zeros(2, 8, 2, 16),
        "lengths": torch.zeros(2, dtype=torch.int32),
    } | change
    positional = [given_.pop(name) for name in ("q", "k", "v", "lengths")]
    with pytest.raises(ValueError, match=message):
        run(*positional, device, **given_)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_k": 24}, "block_k must be a power of two"),
        ({"segment": 200}, "segment must be a multiple of step"),
        ({"first_wave": 100}, "first_wave must be at least segment=256, got 100"),
        ({"growth": 1}, "growth must be at least 2, got 1"),
        ({"programs": 0}, "programs must be at least 1, got 0"),
    ],
)
def test_bad_config_is_refused_by_name(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecodeConfig(**change)


@given(
    reach=st.integers(1, 200_000),
    groups=st.integers(1, 2000),
    growth=st.integers(2, 16),
    skipping=st.booleans(),
)
def test_waves_cover_each_distance_once_and_grow(
    reach: int, groups: int, growth: int, skipping: bool
) -> None:
    config = DecodeConfig(growth=growth)
    waves = plan_waves(reach, groups, config, skipping=skipping)
    at = 0
    for wave in waves:
        assert wave.start == at
        assert wave.length % (config.step * config.block_k) == 0
        assert wave.count * groups <= max(config.programs, groups)
        assert wave.start + wave.length * (wave.count - 1) < reach  # no segment is empty
        at = wave.end
    assert at >= reach
    assert all(b.end <= 2 * growth * a.end for a, b in pairwise(waves))
    if not skipping:
        assert len(waves) == 1


def test_waves_of_a_long_cache_are_few() -> None:
    waves = plan_waves(131_072, 8, DecodeConfig(), skipping=True)
    assert waves == [
        Wave(0, 256, 2),
        Wave(512, 256, 14),
        Wave(4096, 640, 45),
        Wave(32896, 2048, 48),
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dims", [(128, 128), (64, 64), (100, 72), (256, 256)])
def test_long_paged_decode_on_a_gpu(dtype: torch.dtype, dims: tuple[int, int]) -> None:
    device = torch.device("cuda")
    lengths = [9000, 257, 4096]
    q, k, v, n = problem(lengths, heads=(8, 2), dims=dims, capacity=9008, mean=-7.0)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    true_out, true_log = expected(q, k, v, n)
    k_pages, table = pages_of(k.float(), 16, seed=2)
    v_pages, _ = pages_of(v.float(), 16, seed=2)
    paged = run(q, k_pages.to(dtype), v_pages.to(dtype), n, device, block_table=table, config=None)
    for _ in range(3):
        out, log_rem = run(q, k, v, n, device, config=None)
        assert torch.equal(out, paged[0])
        assert torch.equal(log_rem, paged[1])
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out.double(), true_out, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(log_rem.double(), true_log, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_default_tiles_suit_every_head_size(dtype: torch.dtype) -> None:
    for head_dim in range(1, 257):
        config = decode_config(head_dim, dtype)
        assert config.block_k * head_dim * dtype.itemsize <= 16384 or config.block_k == 16
