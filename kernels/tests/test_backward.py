"""Gradients of the kernels against autograd of the definition in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import oracle
from decapod_kernels.stickbreaking.backward import backward
from decapod_kernels.stickbreaking.backward_plan import BackwardConfig
from decapod_kernels.stickbreaking.configs import ForwardConfig
from decapod_kernels.stickbreaking.forward import Forward, forward

NEVER = -float("inf")
TILES = BackwardConfig(
    ForwardConfig(block_q=32, block_k=32, superblock=64, warps=4, stages=1),
    rows_block=32,
    keys_block=32,
    block_k=32,
    rows_warps=4,
    rows_stages=1,
    keys_warps=4,
    keys_stages=1,
)
ONE_SUPERBLOCK = replace(TILES, forward=replace(TILES.forward, superblock=256))


def inputs(
    batch: int = 1,
    q_heads: int = 1,
    kv_heads: int = 1,
    queries: int = 96,
    keys: int = 96,
    dk: int = 16,
    dv: int = 16,
    *,
    mean: float = -3.0,
    device: torch.device,
) -> tuple[Tensor, ...]:
    """q, k, v, d_out, d_log_rem, such that logits have the mean given at scale dk**-0.5.

    A negative mean lets sticks last: far tiles matter.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    q, k = normal(batch, q_heads, queries, dk), normal(batch, kv_heads, keys, dk)
    q[..., 0] = 1.0
    k[..., 0] = mean * dk**0.5
    v, d_out = normal(batch, kv_heads, keys, dv), normal(batch, q_heads, queries, dv)
    return tuple(x.to(device) for x in (q, k, v, d_out, normal(batch, q_heads, queries)))


def kernel_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    d_out: Tensor,
    d_log_rem: Tensor | None,
    *,
    config: BackwardConfig = TILES,
    scale: float | None = None,
    **options: object,
) -> tuple[Forward, tuple[Tensor, ...]]:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    saved = forward(q, k, v, scale=scale, save=True, config=config.forward, **options)
    grads = backward(
        q, k, v, d_out, d_log_rem, saved.edges, saved.stop, scale=scale, config=config, **options
    )
    for x, grad in zip((q, k, v), grads, strict=True):
        assert grad.shape == x.shape
        assert grad.dtype == x.dtype
    return saved, grads


def true_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    d_out: Tensor,
    d_log_rem: Tensor | None,
    *,
    scale: float | None = None,
    **visibility: object,
) -> tuple[Tensor, ...]:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    leaves = [x.detach().cpu().double().requires_grad_() for x in (q, k, v)]
    out, log_rem = oracle.attention(*leaves, scale=scale, **visibility)
    if d_log_rem is None:
        d_log_rem = torch.zeros_like(log_rem)
    return torch.autograd.grad(
        (out, log_rem), leaves, (d_out.cpu().double(), d_log_rem.cpu().double())
    )


def assert_close(grads: tuple[Tensor, ...], true: tuple[Tensor, ...], rtol: float = 1e-5) -> None:
    for name, grad, expected in zip(("dq", "dk", "dv"), grads, true, strict=True):
        grad = grad.cpu().double()
        assert torch.isfinite(grad).all(), name
        error = (grad - expected).norm() / expected.norm()
        assert error <= rtol, (name, error)
        # Row by row, too, or a broken row would hide behind the others.
        largest = expected.norm(dim=-1).amax(dim=-1, keepdim=True)
        rows = (grad - expected).norm(dim=-1) / (expected.norm(dim=-1) + 1e-2 * largest + 1e-30)
        assert rows.max() <= 10 * rtol, (name, rows.max())


@pytest.mark.parametrize("attend_current", [False, True])
def test_gradients_equal_those_of_the_definition(
    attend_current: bool, device: torch.device
) -> None:
    call = inputs(queries=160, keys=160, device=device)
    _, grads = kernel_gradients(*call, attend_current=attend_current, log2_tol=NEVER)
    assert_close(grads, true_gradients(*call, attend_current=attend_current))


def test_without_a_gradient_of_the_remainder(device: torch.device) -> None:
    *call, _ = inputs(device=device)
    _, grads = kernel_gradients(*call, None, log2_tol=NEVER)
    assert_close(grads, true_gradients(*call, None))


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ({"q_heads": 2, "queries": 50, "keys": 81, "dk": 24, "dv": 40}, {}),
        ({"queries": 70, "keys": 100}, {"kv_offset": 3}),
        ({"queries": 70, "keys": 40}, {"kv_offset": 60, "attend_current": True}),
        ({"queries": 90, "keys": 60}, {}),
        ({"queries": 100, "keys": 100}, {"window": 37}),
        ({"queries": 130, "keys": 130}, {"window": 1, "attend_current": True}),
        ({"batch": 2, "queries": 70, "keys": 70}, {"key_start": [3, 0], "key_end": [70, 45]}),
        ({"batch": 2, "queries": 70, "keys": 70}, {"key_start": [66, 40], "key_end": [70, 20]}),
    ],
    ids=[
        "odd-sizes",
        "offset",
        "beyond-the-keys",
        "before-the-keys",
        "window",
        "window-of-1",
        "padding",
        "nothing-valid",
    ],
)
def test_variants(shape: dict[str, int], options: dict[str, object], device: torch.device) -> None:
    call = inputs(**shape, device=device)
    for name in ("key_start", "key_end"):
        if name in options:
            options = options | {name: torch.tensor(options[name], dtype=torch.int32)}
    on_device = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}
    _, grads = kernel_gradients(*call, log2_tol=NEVER, **on_device)
    assert_close(grads, true_gradients(*call, **options))


def test_a_group_of_heads_gives_the_sum_of_repeated_heads(device: torch.device) -> None:
    q, k, v, d_out, d_log_rem = inputs(q_heads=4, kv_heads=2, device=device)
    _, grads = kernel_gradients(q, k, v, d_out, d_log_rem, log2_tol=NEVER)
    repeated = [x.repeat_interleave(2, dim=1) for x in (k, v)]
    _, (dq, dk, dv) = kernel_gradients(q, *repeated, d_out, d_log_rem, log2_tol=NEVER)
    assert torch.equal(grads[0], dq)
    for grad, each in zip(grads[1:], (dk, dv), strict=True):
        torch.testing.assert_close(grad, each.unflatten(1, (2, 2)).sum(2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "workspace"),
    [(TILES, 26_000), (TILES, 8_000), (ONE_SUPERBLOCK, 8_000)],
    ids=["heads", "passes", "passes-of-one-superblock"],
)
def test_chunks_change_no_bit(config: BackwardConfig, workspace: int, device: torch.device) -> None:
    call = inputs(batch=2, q_heads=2, kv_heads=2, queries=64, keys=90, device=device)
    _, expected = kernel_gradients(*call, config=replace(config, workspace=2**40), log2_tol=NEVER)
    _, grads = kernel_gradients(*call, config=replace(config, workspace=workspace), log2_tol=NEVER)
    for grad, one in zip(grads, expected, strict=True):
        assert torch.equal(grad, one)


def test_superblocks_change_rounding_only(device: torch.device) -> None:
    call = inputs(queries=100, keys=130, device=device)
    _, expected = kernel_gradients(*call, config=ONE_SUPERBLOCK, log2_tol=NEVER)
    for superblock in (32, 64):
        config = replace(TILES, forward=replace(TILES.forward, superblock=superblock))
        _, grads = kernel_gradients(*call, config=config, log2_tol=NEVER)
        assert_close(grads, tuple(x.cpu().double() for x in expected), rtol=1e-6)


def test_split_rows_give_the_same_sums(device: torch.device) -> None:
    call = inputs(q_heads=2, kv_heads=1, queries=150, keys=150, device=device)
    split = replace(TILES, programs=6, workspace=2**40)
    _, grads = kernel_gradients(*call, config=split, log2_tol=NEVER)
    assert_close(grads, true_gradients(*call))


def test_runs_repeat_bit_by_bit(device: torch.device) -> None:
    call = inputs(q_heads=2, kv_heads=1, device=device)
    _, first = kernel_gradients(*call)
    for _ in range(2):
        _, again = kernel_gradients(*call)
        for one, other in zip(first, again, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_visible_key_has_the_right_gradient_however_saturated(
    dtype: torch.dtype, device: torch.device
) -> None:
    """dz = beta (1 - beta) (g - dr), each row by itself: other forms are 0 from z = 20 on."""
    z = torch.tensor([-30.0, -20.0, -10.0, -3.0, 0.0, 1.0, 5.0, 11.0, 15.0, 20.0, 25.0, 30.0])
    rows = len(z)
    q = torch.zeros(rows, 1, 1, 16)
    q[..., 0] = z[:, None, None]
    k = torch.zeros(rows, 1, 1, 16)
    k[..., 0] = 1.0
    v, d_out = torch.full((rows, 1, 1, 16), 0.5), torch.full((rows, 1, 1, 16), 0.25)
    dr = 0.75  # of the remainder itself
    beta, rest = torch.sigmoid(z.double()), torch.sigmoid(-z.double())
    d_log_rem = (dr * rest).float()[:, None, None]
    call = [x.to(dtype).to(device) for x in (q, k, v, d_out)]

    _, (dq, dk, _) = kernel_gradients(
        *call, d_log_rem.to(device), scale=1.0, attend_current=True, log2_tol=NEVER
    )

    g = 16 * 0.5 * 0.25
    dz = beta * rest * (g - dr)
    rtol = 1e-4 if dtype == torch.float32 else 2.0**-6
    torch.testing.assert_close(dq[:, 0, 0, 0].cpu().double(), dz, rtol=rtol, atol=0)
    torch.testing.assert_close(dk[:, 0, 0, 0].cpu().double(), dz * z, rtol=rtol, atol=0)


@pytest.mark.parametrize("logit", [14.0, 27.0])
def test_saturated_keys_within_long_rows(logit: float, device: torch.device) -> None:
    """A key that takes the whole stick, in mid-tile, between keys that take next to nothing."""
    q, k, v, d_out, d_log_rem = inputs(queries=128, keys=128, mean=-6.0, device=device)
    k[:, :, 40, 0] = 4 * 9.0
    k[:, :, 77, 0] = 4 * logit
    call = (q, k, v, d_out, d_log_rem)
    saved, grads = kernel_gradients(*call, log2_tol=NEVER)
    true = true_gradients(*call)
    assert_close(grads, true)
    # The gradient of the saturated logit alone: exclusive sums keep it, differences do not.
    error = (grads[1][0, 0, 77].cpu() - true[1][0, 0, 77]).norm() / true[1][0, 0, 77].norm()
    assert error <= 1e-4
    assert saved.log_rem.min() < -13


def truncated_gradients(call: tuple[Tensor, ...], stop: Tensor, block_q: int) -> tuple[Tensor, ...]:
    """Of the definition, over the keys that were visited."""
    q, k, v, d_out, d_log_rem = (x.cpu().double() for x in call)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    z = q.shape[-1] ** -0.5 * leaves[0] @ leaves[1].mT
    first = stop.cpu().repeat_interleave(block_q, dim=-1)[..., : q.shape[2], None]
    keys, rows = torch.arange(k.shape[2]), torch.arange(q.shape[2])
    visible = (keys < rows[:, None]) & (keys >= first)
    rest = torch.nn.functional.logsigmoid(-z).masked_fill(~visible, 0.0)
    stick = rest.flip(-1).cumsum(-1).flip(-1)
    weights = (z + stick).exp().masked_fill(~visible, 0.0)
    outputs = (weights @ leaves[2], rest.sum(-1))
    return torch.autograd.grad(outputs, leaves, (d_out, d_log_rem))


@pytest.mark.parametrize("log2_tol", [-6.0, -24.0])
def test_an_early_exit_is_differentiated_as_it_was_computed(
    log2_tol: float, device: torch.device
) -> None:
    call = inputs(q_heads=2, kv_heads=2, queries=160, keys=160, mean=0.0, device=device)
    saved, grads = kernel_gradients(*call, log2_tol=log2_tol)
    assert saved.stop.max() > 0  # something was skipped
    assert_close(grads, truncated_gradients(call, saved.stop, TILES.forward.block_q))


def test_row_blocks_may_be_longer_than_those_that_stopped(device: torch.device) -> None:
    """The forward's blocks of 32 rows stop each at their own key; the backward's have 64."""
    call = inputs(queries=160, keys=160, mean=-1.0, device=device)
    longer = replace(TILES, rows_block=64, keys_block=64)
    saved, grads = kernel_gradients(*call, config=longer, log2_tol=-6.0)
    assert len(saved.stop.unique()) > 2
    assert_close(grads, truncated_gradients(call, saved.stop, block_q=32))


def test_an_exact_early_exit_changes_gradients_by_rounding_only(device: torch.device) -> None:
    call = inputs(queries=160, keys=160, mean=0.0, device=device)
    *call, d_rem = call
    # As of the remainder itself: what is left after an exact exit has no weight in anything.
    saved = forward(*call[:3], scale=0.25, config=TILES.forward)
    call = (*call, d_rem * saved.log_rem.exp())
    exited, grads = kernel_gradients(*call, log2_tol=-24.0)
    _, full = kernel_gradients(*call, log2_tol=NEVER)
    assert exited.stop.max() > 0
    assert_close(grads, tuple(x.cpu().double() for x in full), rtol=1e-6)


def test_packed_sequences_are_each_their_own(device: torch.device) -> None:
    lengths = [(33, 33), (0, 0), (20, 70), (0, 5), (64, 64), (1, 1)]
    parts = [
        inputs(q_heads=2, kv_heads=1, queries=a, keys=b, dv=24, device=device) for a, b in lengths
    ]
    packed = [torch.cat([x[0].transpose(0, 1) for x in xs]) for xs in zip(*parts, strict=True)]
    starts = [
        torch.tensor([0, *each], dtype=torch.int32).cumsum(0).int().to(device)
        for each in zip(*lengths, strict=True)
    ]
    _, grads = kernel_gradients(
        *packed,
        cu_seqlens_q=starts[0],
        cu_seqlens_k=starts[1],
        max_seqlen_q=64,
        max_seqlen_k=70,
        log2_tol=NEVER,
    )
    for n, (call, (a, b)) in enumerate(zip(parts, lengths, strict=True)):
        here = [
            grad[start[n] : start[n + 1]].transpose(0, 1)[None]
            for grad, start in zip(grads, (starts[0], starts[1], starts[1]), strict=True)
        ]
        if a == 0 or b <= 1:
            assert all((x == 0).all() for x in here)
            continue
        assert_close(tuple(here), true_gradients(*call))


def test_rows_that_see_nothing_have_no_gradient(device: torch.device) -> None:
    call = inputs(queries=70, keys=40, device=device)
    _, (dq, _, _) = kernel_gradients(*call)
    assert (dq[:, :, :31] == 0).all()
    empty = inputs(queries=70, keys=0, device=device)
    _, (dq, dk, dv) = kernel_gradients(*empty)
    assert (dq == 0).all()
    assert dk.numel() == dv.numel() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gradients(dtype: torch.dtype, device: torch.device) -> None:
    *call, d_log_rem = inputs(q_heads=2, queries=128, keys=128, dk=32, dv=32, device=device)
    call = [x.to(dtype) for x in call]
    _, grads = kernel_gradients(*call, d_log_rem, log2_tol=NEVER)
    tolerance = 8e-3 if dtype == torch.bfloat16 else 1e-3
    assert_close(grads, true_gradients(*call, d_log_rem), rtol=tolerance)


def test_any_strides(device: torch.device) -> None:
    call = inputs(batch=2, q_heads=2, kv_heads=2, queries=40, keys=40, device=device)
    _, expected = kernel_gradients(*call)
    rows_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in call]
    _, grads = kernel_gradients(*rows_first)
    for grad, one in zip(grads, expected, strict=True):
        assert torch.equal(grad, one)
    # As autograd gives it for a sum: no strides at all.
    q, k, v, d_out, _ = call
    ones = torch.ones((), device=device).expand(d_out.shape)
    _, grads = kernel_gradients(q, k, v, ones, None)
    assert_close(grads, true_gradients(q, k, v, ones, None))


@pytest.mark.parametrize(
    ("attend_current", "sums"),
    [
        (False, (164.761112142143, 146.344676601699, 524.942559375557)),
        (True, (164.360678209640, 146.872751090797, 534.494727002978)),
    ],
)
def test_fixed_numbers(attend_current: bool, sums: tuple[float, ...], device: torch.device) -> None:
    """Sums of absolute gradients, computed once in float64 from the definition."""
    shape = (1, 2, 64, 16)
    n = torch.arange(2 * 64 * 16, dtype=torch.float64).reshape(shape)
    waves = ((0.7, 0.1), (1.1, 0.2), (0.3, 0.5), (0.9, 0.4))
    q, k, v, d_out = ((a * n + b).sin().float().to(device) for a, b in waves)
    d_rem = torch.arange(2 * 64, dtype=torch.float64).reshape(1, 2, 64).cos()
    _, log_rem = oracle.attention(
        q.cpu(), k.cpu(), v.cpu(), scale=0.25, attend_current=attend_current
    )
    d_log_rem = (d_rem * log_rem.exp()).float().to(device)
    _, grads = kernel_gradients(
        q, k, v, d_out, d_log_rem, scale=0.25, attend_current=attend_current, log2_tol=NEVER
    )
    for grad, total in zip(grads, sums, strict=True):
        assert grad.abs().double().sum().item() == pytest.approx(total, rel=1e-5)


def test_forward_and_backward_choose_tiles_that_fit(device: torch.device) -> None:
    call = inputs(queries=80, keys=80, device=device)
    q, k, v, d_out, d_log_rem = call
    saved = forward(q, k, v, scale=0.25, save=True)
    grads = backward(q, k, v, d_out, d_log_rem, saved.edges, saved.stop, scale=0.25)
    assert_close(grads, true_gradients(*call))


def test_what_another_forward_saved_is_refused(device: torch.device) -> None:
    q, k, v, d_out, d_log_rem = inputs(device=device)
    saved = forward(q, k, v, scale=0.25, save=True, config=TILES.forward)
    good = {"scale": 0.25, "config": TILES}
    with pytest.raises(ValueError, match=r"edges must be torch.float32 \(1, 1, 96, 1\)"):
        backward(
            q, k, v, d_out, d_log_rem, saved.edges, saved.stop, scale=0.25, config=ONE_SUPERBLOCK
        )
    with pytest.raises(ValueError, match="stop must be"):
        backward(q, k, v, d_out, d_log_rem, saved.edges, saved.stop[..., :1], **good)
    with pytest.raises(ValueError, match="d_out must be"):
        backward(q, k, v, d_out.double(), d_log_rem, saved.edges, saved.stop, **good)
    with pytest.raises(ValueError, match="block_k must divide the forward's superblock, 64"):
        replace(TILES, block_k=128)
