import math
from contextlib import contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sbattn import chunked_layout
from sbattn.chunked import chunked_backward, chunked_forward
from sbattn.naive import naive_attention
from sbattn.visibility import Visibility

NEVER = -math.inf
EXACT = {torch.float32: -24.0, torch.float64: -53.0}


class Chunked(torch.autograd.Function):
    """The two functions joined, as the custom operator joins them."""

    @staticmethod
    def forward(ctx, q, k, v, scale, visibility, log2_tol):
        out, log_rem, edges, stop = chunked_forward(
            q, k, v, scale=scale, visibility=visibility, log2_tol=log2_tol, save=True
        )
        ctx.save_for_backward(q, k, v, edges, stop)
        ctx.rest = {"scale": scale, "visibility": visibility, "log2_tol": log2_tol}
        return out, log_rem

    @staticmethod
    def backward(ctx, d_out, d_log_rem):
        return (*chunked_backward(d_out, d_log_rem, *ctx.saved_tensors, **ctx.rest), *[None] * 3)


def chunked(q, k, v, *, scale, visibility, log2_tol=NEVER):
    return Chunked.apply(q, k, v, scale, visibility, log2_tol)


@contextmanager
def tiles_of(rows, keys, superblock=2, row_step=4):
    """Small tiles, so that short sequences have many."""
    sizes = {"_ROWS": rows, "_KEYS": keys, "_SUPERBLOCK_TILES": superblock, "_ROW_STEP": row_step}
    with patch.multiple(chunked_layout, **sizes):
        yield


@dataclass
class Shape:
    batch: int = 1
    kv_heads: int = 1
    group: int = 1
    queries: int = 24
    keys: int = 24
    dk: int = 8
    dv: int = 8

    def inputs(self, dtype=torch.float64, bias=0.0, seed=0):
        """Queries, keys and values whose logits (of scale 1/√dk) have mean `-bias²·√dk`."""
        gen = torch.Generator().manual_seed(seed)
        heads = self.kv_heads * self.group

        def draw(*size):
            return torch.randn(*size, generator=gen, dtype=torch.float64)

        q = draw(self.batch, heads, self.queries, self.dk) + bias
        k = draw(self.batch, self.kv_heads, self.keys, self.dk) - bias
        v = draw(self.batch, self.kv_heads, self.keys, self.dv)
        return [x.to(dtype).requires_grad_() for x in (q, k, v)]


def scale_of(q):
    return 1 / math.sqrt(q.shape[-1])


def results(attention, inputs, visibility, *, through_remainder=True, seed=1, **rest):
    """Outputs, log remainders, and the gradients of a random functional of `out` and `rem`."""
    out, log_rem = attention(*inputs, scale=scale_of(inputs[0]), visibility=visibility, **rest)
    gen = torch.Generator().manual_seed(seed)
    d_out = torch.randn(out.shape, generator=gen, dtype=torch.float64).to(out.dtype)
    d_rem = torch.randn(log_rem.shape, generator=gen, dtype=torch.float64).to(log_rem.dtype)
    total = (out * d_out).sum()
    if through_remainder:
        total = total + (log_rem.exp() * d_rem).sum()
    return out, log_rem, *torch.autograd.grad(total, inputs)


def doubled(inputs):
    return [x.detach().double().requires_grad_() for x in inputs]


def error(got, wanted):
    """Largest error of a last-dimension row, relative to the largest row's norm."""
    if wanted.numel() == 0:
        return 0.0
    off = (got.double() - wanted).norm(dim=-1).max()
    return float(off / wanted.norm(dim=-1).max().clamp(min=1e-300))


def assert_same(got, wanted, tol, *, after_exit=False):
    """Compare results; after an exit the remainders, whose error is absolute, not their logs."""
    names = ("out", "dq", "dk", "dv")
    got, wanted = ([x.detach() for x in xs] for xs in (got, wanted))
    (log_rem, log_wanted), got, wanted = (
        (got[1], wanted[1]),
        got[:1] + got[2:],
        wanted[:1] + wanted[2:],
    )
    errors = {name: error(a, b) for name, a, b in zip(names, got, wanted, strict=True)}
    if after_exit:
        torch.testing.assert_close(log_rem.exp().to(log_wanted), log_wanted.exp(), rtol=0, atol=tol)
    else:
        errors["log_rem"] = error(log_rem, log_wanted)
    assert all(value <= tol for value in errors.values()), errors


VARIANTS = {
    "plain": (Shape(), Visibility(0)),
    "current": (Shape(), Visibility(0, attend_current=True)),
    "grouped": (Shape(2, 2, 3, dv=5), Visibility(0)),
    "many heads in a tile": (Shape(3, 2, 2), Visibility(0)),
    "prefix": (Shape(queries=9, keys=40, dk=5), Visibility(31)),
    "queries before keys": (Shape(queries=30, keys=17), Visibility(-8, attend_current=True)),
    "window": (Shape(queries=20, keys=40), Visibility(20, window=13)),
    "padding": (
        Shape(2, keys=40, queries=40),
        Visibility(0, key_start=torch.tensor([0, 7]), key_end=torch.tensor([33, 40])),
    ),
    "padding without keys": (
        Shape(2),
        Visibility(0, key_start=torch.tensor([9, 0]), key_end=torch.tensor([9, 24])),
    ),
    "window and padding": (
        Shape(2, 2, 2, queries=21, keys=50),
        Visibility(
            29,
            attend_current=True,
            window=17,
            key_start=torch.tensor([3, 30]),
            key_end=torch.tensor([50, 41]),
        ),
    ),
    "one query": (Shape(2, 2, 2, queries=1, keys=37), Visibility(36)),
    "one key": (Shape(queries=3, keys=1), Visibility(-2, attend_current=True)),
}


@pytest.mark.parametrize("tiles", [(8, 8), (16, 32), (256, 256)], ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_equals_the_definition_in_float64(name, tiles):
    shape, visibility = VARIANTS[name]
    inputs = shape.inputs(bias=0.4)
    with tiles_of(*tiles):
        got = results(chunked, inputs, visibility)
    assert_same(got, results(naive_attention, inputs, visibility), 1e-12)


@pytest.mark.parametrize("name", VARIANTS)
def test_backward_is_the_derivative_of_forward_for_every_variant(name):
    shape, visibility = VARIANTS[name]
    inputs = shape.inputs(bias=0.3)

    def attention(q, k, v):
        return chunked(q, k, v, scale=0.5, visibility=visibility)

    with tiles_of(8, 8):
        assert torch.autograd.gradcheck(attention, inputs, fast_mode=True)


def test_backward_is_the_derivative_of_forward_element_by_element():
    inputs = Shape(1, 1, 2, queries=7, keys=10, dk=3, dv=2).inputs()
    visibility = Visibility(3)

    def attention(q, k, v):
        return chunked(q, k, v, scale=0.7, visibility=visibility)

    with tiles_of(4, 8, superblock=1):
        assert torch.autograd.gradcheck(attention, inputs)


def test_the_definition_itself_passes_gradcheck():
    inputs = Shape(queries=6, keys=8, dk=3, dv=2).inputs()

    def attention(q, k, v):
        return naive_attention(q, k, v, scale=0.7, visibility=Visibility(2, attend_current=True))

    assert torch.autograd.gradcheck(attention, inputs)


def test_backward_after_an_exit_is_the_derivative_of_what_was_computed():
    inputs = Shape(1, 2, 1, queries=40, keys=40).inputs()

    def attention(q, k, v):
        return chunked(q, k, v, scale=0.5, visibility=Visibility(0), log2_tol=-4.0)

    with tiles_of(8, 8):
        *_, stop = chunked_forward(
            *inputs, scale=0.5, visibility=Visibility(0), log2_tol=-4.0, save=True
        )
        assert (stop > 0).any()
        assert torch.autograd.gradcheck(attention, inputs, fast_mode=True)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_any_shape_and_any_interval_equals_the_definition(data):
    def whole(low, high):
        return data.draw(st.integers(low, high))

    shape = Shape(
        batch=whole(1, 3),
        kv_heads=whole(1, 2),
        group=whole(1, 3),
        queries=whole(1, 45),
        keys=whole(1, 75),
        dk=whole(1, 20),
        dv=whole(1, 20),
    )
    ranged = data.draw(st.booleans())
    bounds = [sorted((whole(0, shape.keys), whole(0, shape.keys))) for _ in range(shape.batch)]
    visibility = Visibility(
        kv_offset=whole(-10, shape.keys),
        attend_current=data.draw(st.booleans()),
        window=data.draw(st.none() | st.integers(1, 60)),
        key_start=torch.tensor(bounds)[:, 0] if ranged else None,
        key_end=torch.tensor(bounds)[:, 1] if ranged else None,
    )
    inputs = shape.inputs(bias=data.draw(st.sampled_from([0.0, 0.5])), seed=whole(0, 1000))
    with tiles_of(whole(1, 40), 8 * whole(1, 5), whole(1, 3), whole(1, 16)):
        got = results(chunked, inputs, visibility)
        exact = results(chunked, inputs, visibility, log2_tol=-53.0)
    wanted = results(naive_attention, inputs, visibility)
    assert_same(got, wanted, 1e-11)
    # The log remainder is that of the keys visited, so it is the remainder itself that agrees.
    assert_same(exact, wanted, 1e-11, after_exit=True)


@pytest.mark.parametrize("bias", [0.0, 0.35])
def test_float32_is_right_to_rounding_with_several_real_tiles(bias):
    inputs = Shape(1, 1, 2, queries=700, keys=1100, dk=16, dv=24).inputs(torch.float32, bias)
    visibility = Visibility(400)
    wanted = results(naive_attention, doubled(inputs), visibility)
    assert_same(results(chunked, inputs, visibility), wanted, 2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_costs_only_the_rounding_of_the_results(dtype):
    inputs = Shape(2, 1, 2, queries=90, keys=90).inputs(dtype)
    got = results(chunked, inputs, Visibility(0), log2_tol=-24.0)
    wanted = results(naive_attention, doubled(inputs), Visibility(0))
    assert [x.dtype for x in got] == [dtype, torch.float32, dtype, dtype, dtype]
    assert_same(got, wanted, 6e-3, after_exit=True)


def test_any_strides_are_read_as_they_are():
    q, k, v = (x.detach() for x in Shape(2, 2, 2, 40, 40).inputs())
    d_out = torch.ones(1, dtype=torch.float64).expand(q.shape)
    apart = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    apart[1] = apart[1].transpose(-1, -2).contiguous().transpose(-1, -2)
    rest = {"scale": 0.4, "visibility": Visibility(0), "log2_tol": NEVER}
    with tiles_of(16, 16):
        *wanted, edges, stop = chunked_forward(q, k, v, **rest, save=True)
        wanted += chunked_backward(d_out.contiguous(), None, q, k, v, edges, stop, **rest)
        *got, edges, stop = chunked_forward(*apart, **rest, save=True)
        got += chunked_backward(d_out, None, *apart, edges, stop, **rest)
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "shape",
    [Shape(queries=0), Shape(keys=0), Shape(batch=0), Shape(queries=0, keys=0)],
    ids=["no queries", "no keys", "no batch", "nothing"],
)
def test_empty_inputs_give_empty_sums(shape):
    inputs = shape.inputs()
    out, log_rem, *grads = results(chunked, inputs, Visibility(0), log2_tol=-24.0)
    assert not out.any()
    assert not log_rem.any()
    for x, grad in zip(inputs, grads, strict=True):
        assert grad.shape == x.shape
        assert not grad.any()


def test_nothing_is_saved_when_no_gradient_will_be_asked_for():
    q, k, v = Shape().inputs()
    rest = {"scale": 1.0, "visibility": Visibility(0), "log2_tol": -24.0}
    out, log_rem, edges, stop = chunked_forward(q, k, v, **rest, save=False)
    assert edges.numel() == stop.numel() == 0
    saved = chunked_forward(q, k, v, **rest, save=True)
    assert torch.equal(out, saved[0])
    assert torch.equal(log_rem, saved[1])


def test_autocast_leaves_the_arithmetic_alone():
    inputs = Shape(1, 2, 1, queries=90, keys=90).inputs(torch.float32)
    wanted = results(chunked, inputs, Visibility(0))
    with torch.autocast("cpu", torch.bfloat16):
        got = results(chunked, inputs, Visibility(0))
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)


def test_several_heads_in_a_tile_change_nothing_but_rounding():
    inputs = Shape(2, 3, 2, queries=300, keys=300).inputs(bias=0.3)
    wanted = results(chunked, inputs, Visibility(0))
    threads = torch.get_num_threads()
    torch.set_num_threads(16)
    try:
        got = results(chunked, inputs, Visibility(0))
    finally:
        torch.set_num_threads(threads)
    assert_same(got, wanted, 1e-13)


def test_two_runs_give_the_same_bits():
    inputs = Shape(2, 2, 2, queries=300, keys=300, dk=16, dv=16).inputs(torch.float32)
    first, second = (results(chunked, inputs, Visibility(0), log2_tol=-24.0) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


# --- saturation


def single_key_rows(logits, dtype):
    """Row i sees key i only, at logit `logits[i]` (scale 1)."""
    q = torch.zeros(1, 1, len(logits), 4, dtype=dtype)
    q[0, 0, :, 0] = logits
    k = torch.zeros_like(q)
    k[..., 0] = 1
    v = torch.randn(q.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_saturated_logits_keep_their_relative_precision(dtype):
    z = torch.linspace(-30, 30, 481).to(dtype)
    q, k, v = single_key_rows(z, dtype)
    visibility = Visibility(0, attend_current=True, window=1)
    out, log_rem = chunked(q, k, v, scale=1.0, visibility=visibility, log2_tol=-24.0)
    gen = torch.Generator().manual_seed(4)
    d_out = torch.randn(out.shape, generator=gen).to(dtype)
    d_rem = torch.randn(log_rem.shape, generator=gen)
    (dq,) = torch.autograd.grad((out, log_rem), q, (d_out, d_rem * log_rem.exp()))
    z = z.double()
    beta, rest = torch.sigmoid(z), torch.sigmoid(-z)
    pull = (d_out.double() * v.double()).sum(-1)[0, 0]
    dz = beta * rest * (pull - d_rem.double()[0, 0])
    # Relative to the terms that are subtracted; bfloat16 rounds the result by up to 2^-9.
    size = beta * rest * (pull.abs() + d_rem.double()[0, 0].abs())
    worst = ((dq[0, 0, :, 0].double() - dz).abs() / size).max()
    assert worst < {torch.float32: 1e-4, torch.bfloat16: 2**-8}[dtype]


@pytest.mark.parametrize(
    ("highest", "oracle"),
    # Above, the definition's own gradients are lost to cancellation in float64, too: β(1 − β) is
    # 1e-13 at z = 30, and what cancels is of size 1.
    [(18, naive_attention), (30, chunked)],
    ids=["definition", "float64"],
)
def test_rows_with_a_saturated_key_among_others_have_right_gradients_each(highest, oracle):
    q, k, v = Shape(queries=64, keys=64, dk=8).inputs(torch.float32)
    with torch.no_grad():
        q.mul_(0.3)[..., 0] = torch.linspace(2, highest * math.sqrt(8), 64)
        k.mul_(0.3)[..., 0] = -0.01
        k[:, :, ::9, 0] = 1.0  # every ninth key saturates
    visibility = Visibility(0, attend_current=True, window=5)
    got = results(chunked, (q, k, v), visibility)
    wanted = results(oracle, doubled((q, k, v)), visibility)
    off = (got[2].double() - wanted[2]).norm(dim=-1) / wanted[2].norm(dim=-1)
    assert off.max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_beyond_the_exponents_range_stay_finite_and_right(dtype):
    z = torch.tensor([-2e4, -800.0, -95.0, 69.0, 75.0, 88.0, 95.0, 700.0, 2e4], dtype=dtype)
    q, k, v = single_key_rows(z, dtype)
    visibility = Visibility(0, attend_current=True, window=1)
    got = chunked(q, k, v, scale=1.0, visibility=visibility)
    wanted = naive_attention(*doubled((q, k, v)), scale=1.0, visibility=visibility)
    torch.testing.assert_close(got[0].double(), wanted[0], rtol=1e-5, atol=1e-30)
    torch.testing.assert_close(got[1].double(), wanted[1], rtol=1e-5, atol=1e-30)
    grads = torch.autograd.grad(got[0].sum() + got[1].sum(), (q, k, v))
    wide = doubled((q, k, v))
    out, log_rem = naive_attention(*wide, scale=1.0, visibility=visibility)
    for a, b in zip(grads, torch.autograd.grad(out.sum() + log_rem.sum(), wide), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-12)


# --- early exit


@pytest.mark.parametrize("tol", [0.5, 0.05, 1e-3, 2.0**-12, 2.0**-24, 2.0**-53])
@pytest.mark.parametrize("sign", ["one sign", "far keys only", "random"])
def test_an_exit_stays_within_its_bound_for_adversarial_values(tol, sign):
    q, k, v = (x.detach() for x in Shape(1, 4, 1, 160, 160).inputs(bias=0.2))
    if sign == "one sign":
        v.fill_(1.0)
    if sign == "far keys only":
        v.fill_(0.0)[:, :, :40] = 1000.0
    rest = {"scale": 0.5, "visibility": Visibility(0), "save": True}
    with tiles_of(16, 16):
        full, log_rem, *_ = chunked_forward(q, k, v, log2_tol=NEVER, **rest)
        out, reached, _, stop = chunked_forward(q, k, v, log2_tol=math.log2(tol), **rest)
    assert tol < 2.0**-24 or (stop > 0).any()
    rem, left = log_rem.exp(), reached.exp()
    exited = reached - log_rem > 1e-9
    assert (left[exited] < tol).all()
    assert (reached >= log_rem - 1e-9).all()
    assert ((left - rem) <= left).all()
    bound = left[..., None] * v.abs().max() + 1e-12
    assert ((out - full).abs() <= bound).all()
    assert ((out - full).abs()[~exited] <= 1e-12).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_exact_tolerance_changes_nothing_but_rounding(dtype):
    inputs = Shape(1, 2, 1, queries=320, keys=320, dk=16, dv=16).inputs(dtype)
    with tiles_of(32, 32):
        full = results(chunked, inputs, Visibility(0))
        exact = results(chunked, inputs, Visibility(0), log2_tol=EXACT[dtype])
        *_, stop = chunked_forward(
            *inputs, scale=0.25, visibility=Visibility(0), log2_tol=EXACT[dtype], save=True
        )
    assert (stop > 0).any()
    eps = torch.finfo(dtype).eps
    assert_same(exact, full, 8 * eps, after_exit=True)


def test_zero_tolerance_visits_every_visible_key():
    q, k, v = Shape(queries=200, keys=200).inputs()
    with tiles_of(16, 16):
        _, log_rem, _, stop = chunked_forward(
            q, k, v, scale=4.0, visibility=Visibility(0), log2_tol=NEVER, save=True
        )
    assert (stop == 0).all()
    wanted = naive_attention(q, k, v, scale=4.0, visibility=Visibility(0))[1]
    torch.testing.assert_close(log_rem, wanted.detach(), rtol=1e-12, atol=1e-12)


def test_heads_stop_each_at_its_own_place():
    q, k, v = (x.detach() for x in Shape(1, 2, 1, 600, 600).inputs())
    q[:, 1] = 0.05  # logits near −1: this head sees far
    k[:, 1] = -7.0
    *_, stop = chunked_forward(
        q, k, v, scale=1.0, visibility=Visibility(0), log2_tol=-24.0, save=True
    )
    assert stop[0, 0, -1] > stop[0, 1, -1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_that_are_never_visited_are_never_read(dtype):
    q, k, v = (x.detach() for x in Shape(1, 2, 1, 1, 2000).inputs(dtype))
    k[:, :, :500] = v[:, :, :500] = math.nan
    rest = {"scale": 1.0, "visibility": Visibility(2000), "log2_tol": -24.0}
    out, log_rem, edges, stop = chunked_forward(q, k, v, **rest, save=True)
    grads = chunked_backward(out, None, q, k, v, edges, stop, **rest)
    for x in (out, log_rem, *grads):
        assert torch.isfinite(x).all()
    assert (stop >= 500).all()
