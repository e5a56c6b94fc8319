"""The forward kernel against the float64 definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import oracle
from decapod_kernels.stickbreaking.configs import ForwardConfig
from decapod_kernels.stickbreaking.forward import Forward, forward

NEVER = -math.inf
SMALL = ForwardConfig(block_q=32, block_k=32, superblock=64, warps=4, stages=1)
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def inputs(
    device: torch.device,
    *,
    batch: int = 1,
    heads: tuple[int, int] = (2, 1),
    lengths: tuple[int, int] = (80, 80),
    dims: tuple[int, int] = (16, 16),
    dtype: torch.dtype = torch.float32,
    shift: float = 0.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Random q, k, v; `shift` moves all logits (at scale 1), down for long-lived sticks."""
    made = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads[0], lengths[0], dims[0], generator=made)
    k = torch.randn(batch, heads[1], lengths[1], dims[0], generator=made)
    v = torch.randn(batch, heads[1], lengths[1], dims[1], generator=made)
    if shift:
        q[..., 0], k[..., 0] = shift, 1.0
    return tuple(x.to(dtype).to(device) for x in (q, k, v))


def agree(
    result: Forward, q: Tensor, k: Tensor, v: Tensor, *, scale: float, **visibility: object
) -> None:
    """Hold outputs and log remainders to the oracle, on the inputs as they are rounded."""
    on_cpu = {name: x.cpu() if isinstance(x, Tensor) else x for name, x in visibility.items()}
    out, log_rem = oracle.attention(q.cpu(), k.cpu(), v.cpu(), scale=scale, **on_cpu)
    tolerance = TOLERANCE[q.dtype]
    assert result.out.dtype == q.dtype
    torch.testing.assert_close(result.out.cpu().double(), out, rtol=tolerance, atol=tolerance)
    assert result.log_rem.dtype == torch.float32
    torch.testing.assert_close(result.log_rem.cpu().double(), log_rem, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dims", [(16, 16), (40, 24), (64, 64), (80, 80), (8, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_any_head_sizes_give_the_definition(device, dims, dtype) -> None:
    q, k, v = inputs(device, dims=dims, dtype=dtype)
    scale = dims[0] ** -0.5
    agree(forward(q, k, v, scale=scale, log2_tol=NEVER), q, k, v, scale=scale)


@pytest.mark.parametrize(
    "visibility",
    [
        {"attend_current": True},
        {"window": 1},
        {"window": 45},
        {"window": 20, "attend_current": True},
        {"kv_offset": -30},
        {"kv_offset": 500, "attend_current": True},
        {"kv_offset": 90, "window": 33},
        {"key_start": [0, 37], "key_end": [70, 90]},
        {"key_start": [50, 100], "key_end": [51, 20], "window": 30, "attend_current": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("lengths", [(70, 100), (100, 70)], ids=["prefix", "short-keys"])
def test_every_rule_of_who_sees_whom_gives_the_definition(device, visibility, lengths) -> None:
    visibility = {
        name: torch.tensor(x, dtype=torch.int32, device=device) if isinstance(x, list) else x
        for name, x in visibility.items()
    }
    q, k, v = inputs(device, batch=2, lengths=lengths, shift=-1.5)
    agree(forward(q, k, v, scale=0.25, log2_tol=NEVER, **visibility), q, k, v, scale=0.25,
          **visibility)  # fmt: skip


def test_a_row_that_sees_nothing_keeps_its_stick(device) -> None:
    q, k, v = inputs(device, lengths=(40, 40))
    result = forward(q, k, v, scale=1.0, kv_offset=-5)
    assert result.out[:, :, :6].count_nonzero() == 0
    assert result.log_rem[:, :, :6].count_nonzero() == 0
    assert (result.log_rem[:, :, 6:] < 0).all()


def test_no_keys_and_no_queries_are_legal(device) -> None:
    q, k, v = inputs(device, lengths=(3, 0))
    result = forward(q, k, v, scale=1.0, save=True)
    assert result.out.count_nonzero() == 0
    assert result.log_rem.count_nonzero() == 0
    q, k, v = inputs(device, lengths=(0, 3))
    assert forward(q, k, v, scale=1.0, save=True).out.shape == (1, 2, 0, 16)


def test_unseen_keys_may_hold_anything(device) -> None:
    bounds = {
        "key_start": torch.tensor([20], dtype=torch.int32, device=device),
        "key_end": torch.tensor([70], dtype=torch.int32, device=device),
    }
    q, k, v = inputs(device)
    expected = forward(q, k, v, scale=0.25, **bounds)
    for x in (k, v):
        x[:, :, :20] = math.nan
        x[:, :, 70:] = math.inf
    result = forward(q, k, v, scale=0.25, **bounds)
    assert torch.equal(result.out, expected.out)
    assert torch.equal(result.log_rem, expected.log_rem)


def test_query_heads_share_keys_as_if_these_were_repeated(device) -> None:
    q, k, v = inputs(device, heads=(4, 2), lengths=(33, 50))
    shared = forward(q, k, v, scale=0.25)
    repeated = forward(q, k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1), scale=0.25)
    assert torch.equal(shared.out, repeated.out)
    assert torch.equal(shared.log_rem, repeated.log_rem)


def test_views_give_what_contiguous_tensors_give(device) -> None:
    q, k, v = inputs(device, batch=2, heads=(4, 2), lengths=(50, 50), dims=(24, 16))
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    views[1] = torch.cat([views[1], views[1]], dim=-1)[..., : k.shape[-1]]
    assert not any(x.is_contiguous() for x in views)
    for whole, view in zip(forward(q, k, v, scale=0.2), forward(*views, scale=0.2), strict=True):
        assert torch.equal(whole, view)


@pytest.mark.parametrize("attend_current", [False, True])
def test_packed_sequences_give_what_each_gives_alone(device, attend_current) -> None:
    queries, keys = (0, 40, 1, 33, 5), (7, 40, 1, 70, 0)
    cu_q = torch.tensor([0, *queries], device=device).cumsum(0).int()
    cu_k = torch.tensor([0, *keys], device=device).cumsum(0).int()
    q, k, v = (x[0].transpose(0, 1) for x in inputs(device, lengths=(sum(queries), sum(keys))))
    result = forward(
        q, k, v, scale=0.25, attend_current=attend_current, save=True,
        cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=40, max_seqlen_k=70,
    )  # fmt: skip
    assert result.out.shape == (79, 2, 16)
    assert result.log_rem.shape == (79, 2)
    for i in range(len(queries)):
        at_q, at_k = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
        alone = forward(
            *(x[rows].transpose(0, 1)[None] for x, rows in ((q, at_q), (k, at_k), (v, at_k))),
            scale=0.25, attend_current=attend_current, save=True,
        )  # fmt: skip
        assert torch.equal(result.out[at_q], alone.out[0].transpose(0, 1))
        assert torch.equal(result.log_rem[at_q], alone.log_rem[0].transpose(0, 1))
        edges = alone.edges[0].transpose(0, 1)
        assert torch.equal(result.edges[at_q, :, : edges.shape[-1]], edges)
        assert torch.equal(result.stop[i, :, : alone.stop.shape[-1]], alone.stop[0])


@pytest.mark.parametrize(
    ("attend_current", "out_sum", "rem_sum", "one_out", "one_rem"),
    [
        (False, 5.563403977313, 4.044653944251, -0.391368895642, 9.622394480331e-4),
        (True, 3.509925667079, 1.984865844870, 0.241646708736, 5.135503334910e-4),
    ],
)
def test_fixed_numbers(device, attend_current, out_sum, rem_sum, one_out, one_rem) -> None:
    n = torch.arange(2 * 64 * 16, dtype=torch.float64)
    q, k, v = (
        torch.sin(a * n + b).float().reshape(1, 2, 64, 16).to(device)
        for a, b in ((0.7, 0.1), (1.1, 0.2), (0.3, 0.5))
    )
    result = forward(q, k, v, scale=0.25, attend_current=attend_current, log2_tol=NEVER)
    rem = result.log_rem.exp()
    assert float(result.out.double().sum()) == pytest.approx(out_sum, abs=1e-4)
    assert float(rem.double().sum()) == pytest.approx(rem_sum, abs=1e-5)
    assert float(result.out[0, 1, 63, 5]) == pytest.approx(one_out, rel=2e-5)
    assert float(rem[0, 0, 10]) == pytest.approx(one_rem, rel=2e-5)


@pytest.mark.parametrize("height", [30.0, 100.0, -30.0, -100.0])
def test_saturated_logits_give_the_definition(device, height) -> None:
    q, k, v = inputs(device, lengths=(70, 70), heads=(1, 1))
    q[..., 0], k[..., 0] = 1.0, 0.0
    k[:, :, ::9, 0] = height  # some keys only: they stand before, among and after ordinary ones
    agree(forward(q, k, v, scale=1.0, log2_tol=NEVER), q, k, v, scale=1.0)
    # The one key that is there takes or leaves the whole stick.
    weight = 1 / (1 + math.exp(-height))
    one = forward(q[:, :, :1] * 0 + 1, k[:, :, :1] * 0 + height / 16, v[:, :, :1], scale=1.0,
                  attend_current=True, log2_tol=NEVER)  # fmt: skip
    torch.testing.assert_close(one.out, weight * v[:, :, :1], rtol=2e-5, atol=0)


def test_all_keys_saturated_leave_the_log_remainder_right(device) -> None:
    q, k, v = inputs(device, lengths=(70, 70), shift=100.0)
    agree(forward(q, k, v, scale=1.0, log2_tol=NEVER), q, k, v, scale=1.0)


@pytest.mark.parametrize("shift", [-2.0, -12.0, -20.0])
def test_long_rows_of_small_weights_keep_their_log_remainder(device, shift) -> None:
    # 2^-29 each at -20: added to 1, they would be gone.
    q, k, v = inputs(device, lengths=(8, 256), shift=shift)
    q[..., 1:] = 0
    result = forward(q, k, v, scale=1.0, log2_tol=NEVER)
    _, log_rem = oracle.attention(q.cpu(), k.cpu(), v.cpu(), scale=1.0)
    torch.testing.assert_close(result.log_rem.cpu().double(), log_rem, rtol=1e-6, atol=0)


@pytest.mark.parametrize("tol", [0.5, 1e-2, 1e-4, 2.0**-24])
def test_an_early_exit_stays_inside_its_bound(device, tol) -> None:
    """`|Δo| <= R max|v_far|` and `r <= R`, with the largest values where no row looks."""
    q, k, v = inputs(device, lengths=(40, 256), heads=(1, 1), shift=-1.5)
    v[:, :, :100] = 1e6
    log2_tol = math.log2(tol)
    skipped = forward(q, k, v, scale=0.5, log2_tol=log2_tol, save=True)
    out, log_rem = oracle.attention(q.cpu(), k.cpu(), v.cpu(), scale=0.5)
    reached = skipped.log_rem.cpu().double()
    assert (reached >= log_rem - 2e-5 * log_rem.abs()).all()
    stop = skipped.stop.repeat_interleave(32, dim=-1)[..., :40].cpu()
    assert (stop > 0).any(), "this test needs a stop"
    for row in range(40):
        unseen = v[0, 0, : stop[0, 0, row]].cpu().double().abs()
        bound = reached[0, 0, row].exp() * (unseen.max() if len(unseen) else 0.0)
        change = (skipped.out[0, 0, row].cpu() - out[0, 0, row]).abs().max()
        assert change <= bound * (1 + 1e-4) + 2e-5 * (1 + out[0, 0, row].abs().max())
        if len(unseen):
            assert reached[0, 0, row] < math.log(tol)


def test_exact_skipping_changes_nothing_beyond_rounding(device) -> None:
    q, k, v = inputs(device, lengths=(96, 256), dims=(32, 32))
    exact = forward(q, k, v, scale=0.2, save=True)
    whole = forward(q, k, v, scale=0.2, log2_tol=NEVER, save=True)
    assert (exact.stop > whole.stop).any(), "this test needs a stop"
    torch.testing.assert_close(exact.out, whole.out, rtol=0, atol=2.0**-22)
    assert (exact.log_rem >= whole.log_rem).all()


def test_repeats_are_bitwise_equal_and_saving_changes_nothing(device) -> None:
    q, k, v = inputs(device, lengths=(64, 128), shift=-1.0)
    first = forward(q, k, v, scale=0.3, save=True)
    again = forward(q, k, v, scale=0.3, save=True)
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other)
    bare = forward(q, k, v, scale=0.3)
    assert torch.equal(bare.out, first.out)
    assert torch.equal(bare.log_rem, first.log_rem)
    assert bare.edges.numel() == bare.stop.numel() == 0


@pytest.mark.parametrize(
    "visibility",
    [{}, {"window": 70}, {"kv_offset": 100, "attend_current": True}, {"kv_offset": -40}],
    ids=str,
)
@pytest.mark.parametrize("log2_tol", [NEVER, -6.0])
def test_edges_and_stops_say_where_every_row_was(device, visibility, log2_tol) -> None:
    """An edge is log2 of the stick left by the keys from there on; stop begins the last tile."""
    q, k, v = inputs(device, lengths=(90, 230), heads=(1, 1), shift=-2.0)
    result = forward(q, k, v, scale=0.5, log2_tol=log2_tol, save=True, config=SMALL, **visibility)
    z, visible = oracle.logits_and_visible(q.cpu(), k.cpu(), scale=0.5, **visibility)
    rest = torch.nn.functional.logsigmoid(-z).masked_fill(~visible, 0.0)[0, 0] / math.log(2)
    low, high = (x[0] for x in oracle.intervals(90, 230, **visibility))
    assert result.edges.shape == (1, 1, 90, 4)
    assert result.stop.shape == (1, 1, 3)
    for block in range(3):
        rows = slice(32 * block, min(32 * block + 32, 90))
        stop = int(result.stop[0, 0, block])
        assert stop % SMALL.block_k == 0
        last_key, first_key = int(high[rows].max()), int(low[rows].min())
        if last_key <= first_key:
            assert stop >= last_key
            assert (result.edges[0, 0, rows] == -math.inf).all()
            continue
        if log2_tol == NEVER:
            assert stop == first_key // SMALL.block_k * SMALL.block_k
        elif stop > first_key:  # what a program gave up was worth little in each of its rows
            assert (rest[rows, stop:].sum(-1) < log2_tol + 1e-3).all()
        for s in range(4):
            edge = result.edges[0, 0, rows, s].cpu().double()
            if stop < 64 * (s + 1) and 64 * s < last_key:
                expected = rest[rows, 64 * (s + 1) :].sum(-1)
                torch.testing.assert_close(edge, expected, rtol=2e-5, atol=2e-5)
            else:
                assert (edge == -math.inf).all()


def test_tiles_do_not_change_the_result(device) -> None:
    q, k, v = inputs(device, lengths=(100, 150), shift=-1.0)
    for config in (
        ForwardConfig(block_q=16, block_k=64, superblock=128, warps=4, stages=1),
        ForwardConfig(block_q=64, block_k=16, superblock=32, warps=4, stages=1),
        ForwardConfig(block_q=128, block_k=128, superblock=128, warps=4, stages=1),
    ):
        result = forward(q, k, v, scale=0.5, log2_tol=NEVER, config=config, window=90)
        agree(result, q, k, v, scale=0.5, window=90)


@pytest.mark.parametrize("bad", [math.nan, 0.0, 3.0])
def test_a_tolerance_that_is_none_is_refused(device, bad) -> None:
    with pytest.raises(ValueError, match="log2_tol must be negative"):
        forward(*inputs(device), scale=1.0, log2_tol=bad)


@pytest.mark.parametrize(("name", "value"), [("block_q", 48), ("block_k", 8), ("superblock", 48)])
def test_tiles_that_do_not_fit_are_refused(name, value) -> None:
    sizes = {"block_q": 32, "block_k": 32, "superblock": 64, "warps": 4, "stages": 1}
    with pytest.raises(ValueError, match=name):
        ForwardConfig(**(sizes | {name: value}))


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_native_kernels_give_the_definition(device, dim, dtype) -> None:
    q, k, v = inputs(
        device, batch=2, heads=(4, 2), lengths=(700, 1500), dims=(dim, dim), dtype=dtype, shift=-3.0
    )
    for log2_tol in (NEVER, -24.0):
        result = forward(q, k, v, scale=dim**-0.5, log2_tol=log2_tol, save=True)
        out, _ = oracle.attention(q.cpu(), k.cpu(), v.cpu(), scale=dim**-0.5)
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(result.out.cpu().double(), out, rtol=tolerance, atol=tolerance)
    agree(forward(q, k, v, scale=dim**-0.5, log2_tol=NEVER), q, k, v, scale=dim**-0.5)


@pytest.mark.parametrize("where", ["q", "k"])
@pytest.mark.parametrize("at", [0, 30, 31, 47])
def test_rows_that_see_what_is_no_number_are_no_numbers(device, where, at) -> None:
    q, k, v = inputs(device, heads=(1, 1), lengths=(60, 60), shift=-6.0)
    {"q": q, "k": k}[where][0, 0, at, 3] = math.nan
    out, log_rem, _, _ = forward(q, k, v, scale=1.0)
    rows = torch.arange(60, device=device)
    broken = rows > at if where == "k" else (rows == at) & (rows > 0)  # row 0 sees nothing
    assert torch.equal(out[0, 0].isnan().any(-1), broken)
    assert torch.equal(log_rem[0, 0].isnan(), broken)
