from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sbattn.errors import UnsupportedError
from sbattn.functional import (
    stickbreaking_attention,
    stickbreaking_attention_varlen,
    stickbreaking_weights,
)


def with_gradients(inputs: list[Tensor], **options: Any) -> dict[str, Tensor]:
    """Outputs, remainders and the gradients of a sum over both with fixed weights."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out, rem = stickbreaking_attention(*leaves, **options)
    waves = [torch.arange(x.numel(), device=x.device).view(x.shape).cos() for x in (out, rem)]
    loss = (out * waves[0]).sum() + (rem * waves[1]).sum()
    dq, dk, dv = torch.autograd.grad(loss, leaves)
    return {"out": out.detach(), "rem": rem.detach(), "dq": dq, "dk": dk, "dv": dv}


def all_close(backend: Any, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        backend.close(found[name], value)


SUMS = {
    False: {
        "out": 5.563403977313,
        "rem": 4.044653944251,
        "dq": 164.761112142143,
        "dk": 146.344676601699,
        "dv": 524.942559375557,
        "one output": -0.391368895642,
        "one remainder": 9.622394480331e-4,
    },
    True: {
        "out": 3.509925667079,
        "rem": 1.984865844870,
        "dq": 164.360678209640,
        "dk": 146.872751090797,
        "dv": 534.494727002978,
        "one output": 0.241646708736,
        "one remainder": 5.135503334910e-4,
    },
}


@pytest.mark.parametrize("attend_current", [False, True])
def test_the_published_numbers_come_out(backend: Any, attend_current: bool) -> None:
    """Computed in float64 by a program of its own, from the definition."""
    n = torch.arange(2 * 64 * 16, dtype=torch.float64).view(1, 2, 64, 16)
    q, k, v, d_out = (
        torch.sin(a * n + b).to(backend.device, backend.dtype)
        for a, b in ((0.7, 0.1), (1.1, 0.2), (0.3, 0.5), (0.9, 0.4))
    )
    d_rem = torch.arange(2 * 64, dtype=torch.float64).cos().view(1, 2, 64)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, rem = stickbreaking_attention(
        *leaves, scale=0.25, attend_current=attend_current, backend=backend.name
    )
    gradients = torch.autograd.grad((out, rem), leaves, (d_out, d_rem.to(rem)))
    found = {
        "out": out.sum(),
        "rem": rem.sum(),
        **{name: g.abs().sum() for name, g in zip(("dq", "dk", "dv"), gradients, strict=True)},
        "one output": out[0, 1, 63, 5],
        "one remainder": rem[0, 0, 10],
    }
    tolerance = 1e-9 if backend.dtype == torch.float64 else 2e-5
    for name, expected in SUMS[attend_current].items():
        assert found[name].item() == pytest.approx(expected, rel=tolerance, abs=0), name


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attend_current": True},
        {"window": 5},
        {"kv_offset": 3},
        {"kv_offset": -2},
        {"kv_offset": 90},
        {"scale": 0.9, "attend_current": True, "window": 40},
        {"skip_tol": 0},
    ],
    ids=str,
)
def test_every_backend_gives_results_and_gradients_of_the_definition(
    backend: Any, options: dict[str, Any]
) -> None:
    q, k, v = (
        backend.randn(1, h, n, d, seed=d) for h, n, d in ((2, 37, 6), (1, 45, 6), (1, 45, 3))
    )
    found = with_gradients([q, k, v], enable_gqa=True, backend=backend.name, **options)
    oracle = [x.double().cpu() for x in (q, k, v)]
    expected = with_gradients(oracle, enable_gqa=True, backend="naive", **options)
    all_close(backend, {n: x.cpu() for n, x in found.items()}, expected)


@settings(deadline=None, max_examples=40)
@given(
    heads=st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1)]),
    lengths=st.tuples(st.integers(0, 40), st.integers(0, 40)),
    dims=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    attend_current=st.booleans(),
    window=st.none() | st.integers(1, 50),
    offset=st.none() | st.integers(-45, 45),
    run=st.tuples(st.integers(0, 40), st.integers(0, 40)),
    shift=st.floats(-6, 6),
    seed=st.integers(0, 10),
)
def test_chunked_is_the_definition_for_any_shape_and_visibility(
    heads: tuple[int, int],
    lengths: tuple[int, int],
    dims: tuple[int, int],
    attend_current: bool,
    window: int | None,
    offset: int | None,
    run: tuple[int, int],
    shift: float,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(2, h, n, d, generator=generator, dtype=torch.float64)
        for h, n, d in (
            (heads[0], lengths[0], dims[0]),
            (heads[1], lengths[1], dims[0]),
            (heads[1], lengths[1], dims[1]),
        )
    )
    q[..., 0], k[..., 0] = 1, shift
    start, end = sorted(min(x, lengths[1]) for x in run)
    options: dict[str, Any] = {
        "enable_gqa": True,
        "attend_current": attend_current,
        "window": window,
        "kv_offset": offset,
        "key_padding": torch.tensor([[start, end], [0, lengths[1]]]),
    }
    found = with_gradients([q, k, v], backend="chunked", **options)
    expected = with_gradients([q, k, v], backend="naive", **options)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-10)


def test_weights_and_remainder_of_a_row_add_up_to_one_and_make_the_output(backend: Any) -> None:
    q, k, v = (backend.randn(2, 2, 20, 8, seed=s) for s in range(3))
    weights, rem = stickbreaking_weights(q.double(), k.double())
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(-1) + rem, torch.ones_like(rem), rtol=0, atol=1e-12)
    assert not weights.triu().any()
    out, found = stickbreaking_attention(q, k, v, backend=backend.name)
    backend.close(out, weights @ v.double())
    backend.close(found, rem)


def test_equal_logits_make_geometric_weights(backend: Any) -> None:
    logit, length = 0.7, 12
    q = backend.randn(1, 1, length, 1) * 0 + 1
    v = torch.eye(length, device=backend.device, dtype=backend.dtype)[None, None]
    out, rem = stickbreaking_attention(q, logit * q, v, scale=1.0, backend=backend.name)
    beta = torch.tensor(logit, dtype=torch.float64).sigmoid()
    seen = torch.arange(length, dtype=torch.float64)
    distance = seen[:, None] - seen
    weights = (beta * (1 - beta) ** (distance - 1)).where(distance > 0, 0)
    backend.close(out[0, 0].cpu(), weights)
    backend.close(rem[0, 0].cpu(), (1 - beta) ** seen)


@pytest.mark.parametrize("z", [-30.0, -12.0, 0.0, 11.0, 15.0, 20.0, 30.0])
def test_a_single_keys_gradient_is_right_however_saturated(backend: Any, z: float) -> None:
    """One visible key: out = σ(z) v and dz = σ(z) σ(-z) (g - d_rem), without cancellation."""
    q, k, v = (
        torch.tensor([[[[x]]]], device=backend.device, dtype=torch.float32) for x in (z, 1.0, 1.5)
    )
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, rem = stickbreaking_attention(
        *leaves, scale=1.0, attend_current=True, skip_tol=0, backend=backend.name
    )
    (2.0 * out + 0.25 * rem).sum().backward()
    exact = torch.tensor(z, dtype=torch.float64)
    beta, rest = exact.sigmoid(), (-exact).sigmoid()
    assert out.item() == pytest.approx(1.5 * beta.item(), rel=1e-5)
    assert rem.item() == pytest.approx(rest.item(), rel=1e-4)
    assert v.grad is not None
    assert v.grad.item() == pytest.approx(2 * beta.item(), rel=1e-5)
    if backend.name == "naive":
        return  # autograd through the definition cancels in float32: the oracle is for float64
    assert q.grad is not None
    assert q.grad.item() == pytest.approx((beta * rest).item() * (3.0 - 0.25), rel=1e-4, abs=0)


def test_an_overwhelming_logit_takes_what_is_left_of_the_stick(backend: Any) -> None:
    """The nearest such key wins, and keys before it get nothing: the most recent match."""
    q = backend.randn(1, 1, 9, 1) * 0 + 1
    k = torch.full_like(q, -60.0)
    k[:, :, [2, 5]] = 60.0
    v = torch.arange(9, device=q.device, dtype=q.dtype).view(1, 1, 9, 1)
    out, rem = stickbreaking_attention(q, k, v, scale=1.0, backend=backend.name)
    backend.close(out.flatten().cpu(), torch.tensor([0, 0, 0, 2, 2, 2, 5, 5, 5]))
    backend.close(rem.flatten().cpu(), torch.tensor([1, 1, 1, 0, 0, 0, 0, 0, 0]))


@pytest.mark.parametrize("attend_current", [False, True])
def test_a_key_changes_no_row_before_it(backend: Any, attend_current: bool) -> None:
    q, k, v = (backend.randn(1, 2, 24, 8, seed=s) for s in range(3))
    options = {"attend_current": attend_current, "backend": backend.name}
    before = stickbreaking_attention(q, k, v, **options)
    position = 11
    k[:, :, position], v[:, :, position] = 5.0, 1e4
    after = stickbreaking_attention(q, k, v, **options)
    first = position + (not attend_current)
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a[:, :, :first], b[:, :, :first])
        assert not torch.equal(a[:, :, first], b[:, :, first])


def test_attending_to_oneself_is_attending_from_one_position_later(backend: Any) -> None:
    q, k, v = (backend.randn(1, 2, 20, 8, seed=s) for s in range(3))
    itself = stickbreaking_attention(q, k, v, attend_current=True, backend=backend.name)
    later = stickbreaking_attention(q, k, v, kv_offset=1, backend=backend.name)
    for a, b in zip(itself, later, strict=True):
        assert torch.equal(a, b)


def test_shared_heads_give_what_repeated_heads_give(backend: Any) -> None:
    q = backend.randn(1, 4, 20, 8)
    k, v = (backend.randn(1, 2, 20, 8, seed=s) for s in (1, 2))
    shared = with_gradients([q, k, v], enable_gqa=True, backend=backend.name)
    repeated = with_gradients(
        [q, *(x.repeat_interleave(2, dim=1) for x in (k, v))], backend=backend.name
    )
    for name in ("dk", "dv"):
        repeated[name] = repeated[name].unflatten(1, (2, 2)).sum(2)
    all_close(backend, shared, repeated)


def test_fewer_queries_than_keys_are_the_last_rows(backend: Any) -> None:
    q, k, v = (backend.randn(1, 2, 40, 8, seed=s) for s in range(3))
    whole = stickbreaking_attention(q, k, v, backend=backend.name)
    for rows in (1, 7):
        last = stickbreaking_attention(q[:, :, -rows:], k, v, backend=backend.name)
        for a, b in zip(last, whole, strict=True):
            backend.close(a, b[:, :, -rows:])


def test_padding_leaves_each_row_as_if_it_were_alone(backend: Any) -> None:
    """Left padding, right padding, none, and a row of nothing but padding."""
    runs = [(5, 20), (0, 13), (0, 20), (4, 4)]
    q, k, v = (backend.randn(4, 2, 20, 8, seed=s) for s in range(3))
    intervals = torch.tensor(runs, device=q.device)
    keys = torch.arange(20, device=q.device)
    mask = (keys >= intervals[:, :1]) & (keys < intervals[:, 1:])
    found = with_gradients([q, k, v], key_padding=intervals, backend=backend.name)
    all_close(backend, with_gradients([q, k, v], key_padding=mask, backend=backend.name), found)
    for row, (start, end) in enumerate(runs):
        valid = slice(start, end)
        alone = stickbreaking_attention(
            q[row : row + 1, :, valid],
            k[row : row + 1, :, valid],
            v[row : row + 1, :, valid],
            backend=backend.name,
        )
        for a, b in zip((found["out"], found["rem"]), alone, strict=True):
            backend.close(a[row : row + 1, :, valid], b)
        assert not found["dk"][row, :, ~mask[row]].any()
        assert not found["dv"][row, :, ~mask[row]].any()


def test_padded_keys_are_never_looked_at(backend: Any) -> None:
    q, k, v = (backend.randn(1, 1, 40, 8, seed=s) for s in range(3))
    padding = torch.tensor([[6, 33]], device=q.device)
    clean = stickbreaking_attention(q, k, v, key_padding=padding, backend=backend.name)
    k[:, :, :6], k[:, :, 33:] = 1e3, -1e3
    v[:, :, :6] = v[:, :, 33:] = 1e6
    dirty = stickbreaking_attention(q, k, v, key_padding=padding, backend=backend.name)
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b)


def test_a_window_as_long_as_the_sequence_changes_nothing(backend: Any) -> None:
    q, k, v = (backend.randn(1, 1, 20, 8, seed=s) for s in range(3))
    free = stickbreaking_attention(q, k, v, backend=backend.name)
    for a, b in zip(
        stickbreaking_attention(q, k, v, window=20, backend=backend.name), free, strict=True
    ):
        assert torch.equal(a, b)


def test_keys_that_break_off_nothing_may_be_put_in_front_but_order_matters(backend: Any) -> None:
    q, k, v = (backend.randn(1, 1, 12, 4, seed=s) for s in range(3))
    q[..., 0] = 1.0
    out, rem = stickbreaking_attention(q, k, v, backend=backend.name)
    silent = torch.zeros_like(k[:, :, :5])
    silent[..., 0] = -1e4
    for a, b in zip(
        stickbreaking_attention(
            q,
            torch.cat((silent, k), 2),
            torch.cat((v[:, :, :5] + 9, v), 2),
            backend=backend.name,
        ),
        (out, rem),
        strict=True,
    ):
        backend.close(a, b)
    swapped = torch.arange(12, device=q.device)
    swapped[[3, 4]] = swapped[[4, 3]]
    other, _ = stickbreaking_attention(q, k[:, :, swapped], v[:, :, swapped], backend=backend.name)
    assert not torch.allclose(other[:, :, 5:], out[:, :, 5:], atol=1e-3)


@pytest.mark.parametrize("name", ["chunked", "triton"])
@pytest.mark.parametrize("tolerance", [2.0**-3, 2.0**-8, 2.0**-24])
def test_skipping_stays_within_its_bound_on_adversarial_values(
    request: pytest.FixtureRequest, name: str, tolerance: float
) -> None:
    """Values are small near and huge far away, where an early end is worst."""
    if name == "triton":
        pytest.importorskip("decapod_kernels")
        pytest.importorskip("triton")
    device = "cuda" if name == "triton" and torch.cuda.is_available() else "cpu"
    length = 160
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 1, length, 8, generator=generator) for _ in range(3))
    q[..., 0], k[..., 0] = 1.0, -3.0
    v *= torch.linspace(8, -8, length).exp()[:, None]
    q, k, v = (x.to(device) for x in (q, k, v))
    exact = stickbreaking_attention(q.double().cpu(), k.double().cpu(), v.double().cpu())
    out, rem = stickbreaking_attention(q, k, v, skip_tol=tolerance, backend=name)
    rounding = 3e-5 * v.abs().max().item()
    assert ((out.cpu() - exact[0]).abs() <= tolerance * v.abs().max().item() + rounding).all()
    beyond = rem.cpu() - exact[1]
    assert (beyond <= tolerance + 1e-6).all()
    assert (beyond >= -1e-6).all()


@pytest.mark.parametrize("name", ["chunked", "triton"])
def test_two_runs_give_the_same_bits(name: str) -> None:
    if name == "triton":
        pytest.importorskip("decapod_kernels")
        pytest.importorskip("triton")
    device = "cuda" if name == "triton" and torch.cuda.is_available() else "cpu"
    inputs = [torch.randn(1, 2, 70, 16).to(device) for _ in range(3)]
    first = with_gradients(inputs, backend=name)
    second = with_gradients(inputs, backend=name)
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


def test_the_log_remainder_survives_where_the_remainder_underflows(backend: Any) -> None:
    q = backend.randn(1, 1, 30, 1) * 0 + 1
    options = {"scale": 1.0, "skip_tol": 0, "backend": backend.name}
    _, log_rem = stickbreaking_attention(q, 40 * q, q, return_log_remainder=True, **options)
    _, rem = stickbreaking_attention(q, 40 * q, q, **options)
    assert rem[0, 0, -1] == 0
    backend.close(log_rem[0, 0].cpu(), -40.0 * torch.arange(30))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_dtype_and_a_float32_remainder(
    backend: Any, dtype: torch.dtype
) -> None:
    inputs = [backend.randn(1, 2, 20, 16, seed=s).to(dtype) for s in range(3)]
    found = with_gradients(inputs, backend=backend.name)
    exact = with_gradients([x.double().cpu() for x in inputs], backend="naive")
    assert found["rem"].dtype == torch.float32
    for name, value in exact.items():
        if name != "rem":
            assert found[name].dtype == dtype
        torch.testing.assert_close(found[name].double().cpu(), value, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("shape", [(0, 2, 5, 5), (2, 2, 0, 5), (2, 2, 5, 0)], ids=str)
def test_nothing_to_attend_to_or_from_is_no_special_case(
    backend: Any, shape: tuple[int, int, int, int]
) -> None:
    batch, heads, queries, keys = shape
    q = backend.randn(batch, heads, queries, 4)
    k, v = backend.randn(batch, heads, keys, 4), backend.randn(batch, heads, keys, 3)
    found = with_gradients([q, k, v], backend=backend.name)
    assert found["out"].shape == (batch, heads, queries, 3)
    assert not found["out"].any()
    assert (found["rem"] == 1).all()
    assert not found["dq"].any()


def test_transposed_and_expanded_inputs_are_read_as_they_lie(backend: Any) -> None:
    q, k, v = (backend.randn(1, 20, 2, 8, seed=s).transpose(1, 2) for s in range(3))
    v = v[:, :1].expand(-1, 2, -1, -1)
    found = with_gradients([q, k, v], backend=backend.name)
    plain = with_gradients([x.contiguous() for x in (q, k, v)], backend=backend.name)
    all_close(backend, found, plain)


def test_auto_on_a_cpu_is_chunked() -> None:
    inputs = [torch.randn(1, 1, 20, 8) for _ in range(3)]
    auto = with_gradients(inputs)
    for key, value in with_gradients(inputs, backend="chunked").items():
        assert torch.equal(auto[key], value)


def test_a_window_that_ends_behind_the_last_key_leaves_the_stick_whole(backend: Any) -> None:
    """As for a far segment of a long sequence, in training."""
    inputs = [torch.randn(1, 2, length, 16, device=backend.device) for length in (3, 40, 40)]
    found = with_gradients(
        [x.to(backend.dtype) for x in inputs], window=5, kv_offset=10_000, backend=backend.name
    )
    assert float(found.pop("rem").min()) == 1
    assert all(float(x.abs().max()) == 0 for x in found.values())


# torch's own rules of forward mode are scripted when they are first used.
FORWARD_MODE = pytest.mark.filterwarnings("ignore:`torch.jit.script` is:DeprecationWarning")


@FORWARD_MODE
def test_tangents_are_refused_rather_than_lost() -> None:
    x, offsets = torch.randn(1, 2, 5, 4), torch.tensor([0, 5], dtype=torch.int32)

    def dense(q: Tensor) -> Tensor:
        return stickbreaking_attention(q, x, x)[0]

    def packed(q: Tensor) -> Tensor:
        q, k = q[0].transpose(0, 1), x[0].transpose(0, 1)
        return stickbreaking_attention_varlen(q, k, k, offsets, offsets, 5, 5)[0]

    for call in (dense, packed):
        with pytest.raises(UnsupportedError, match=r'forward-mode .* backend="naive"'):
            torch.func.jvp(call, (x,), (x,))


@FORWARD_MODE
def test_the_naive_backend_has_forward_mode_derivatives() -> None:
    x, direction = torch.randn(2, 1, 2, 5, 4, dtype=torch.float64)

    def total(q: Tensor, **options: Any) -> Tensor:
        return stickbreaking_attention(q, x, x, **options)[0].sum()

    _, tangent = torch.func.jvp(lambda q: total(q, backend="naive"), (x,), (direction,))
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(total(leaf), leaf)
    torch.testing.assert_close(tangent, (gradient * direction).sum())


def test_the_definition_has_shapes_where_there_is_no_memory() -> None:
    x = torch.randn(1, 2, 5, 4, device="meta")
    out, rem = stickbreaking_attention(x, x, x, backend="naive")
    weights, _ = stickbreaking_weights(x, x)
    assert [tuple(y.shape) for y in (out, rem, weights)] == [(1, 2, 5, 4), (1, 2, 5), (1, 2, 5, 5)]


def test_the_naive_backend_can_be_differentiated_twice() -> None:
    leaves = [torch.randn(1, 1, 4, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradgradcheck(
        lambda *x: stickbreaking_attention(*x, backend="naive"), leaves
    )


def test_chunked_gradients_pass_gradcheck_remainder_included() -> None:
    leaves = [torch.randn(1, 1, 5, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(
        lambda *x: stickbreaking_attention(*x, backend="chunked"), leaves
    )
