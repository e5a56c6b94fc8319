"""What is known of stick-breaking attention without computing it by our code."""

import math

import pytest
import torch

from sbattn.chunked import chunked_backward, chunked_forward
from sbattn.naive import naive_attention, naive_weights
from sbattn.visibility import Visibility

# Independent float64 evaluation of the definition and of its derivative at closed-form inputs.
NUMBERS = {
    False: {
        "out": 5.563403977313,
        "rem": 4.044653944251,
        "dq": 164.761112142143,
        "dk": 146.344676601699,
        "dv": 524.942559375557,
        "an output": -0.391368895642,
        "a remainder": 9.622394480331e-4,
    },
    True: {
        "out": 3.509925667079,
        "rem": 1.984865844870,
        "dq": 164.360678209640,
        "dk": 146.872751090797,
        "dv": 534.494727002978,
        "an output": 0.241646708736,
        "a remainder": 5.135503334910e-4,
    },
}


def naive(q, k, v, *, scale, visibility, d_out, d_rem):
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out, log_rem = naive_attention(q, k, v, scale=scale, visibility=visibility)
    rem = log_rem.exp()
    grads = torch.autograd.grad((out * d_out).sum() + (rem * d_rem).sum(), (q, k, v))
    return out.detach(), rem.detach(), *grads


def chunked(q, k, v, *, scale, visibility, d_out, d_rem):
    rest = {"scale": scale, "visibility": visibility, "log2_tol": -math.inf}
    out, log_rem, edges, stop = chunked_forward(q, k, v, **rest, save=True)
    rem = log_rem.exp()
    return out, rem, *chunked_backward(d_out, d_rem * rem, q, k, v, edges, stop, **rest)


BACKENDS = pytest.mark.parametrize("backend", [naive, chunked], ids=["naive", "chunked"])
SELF = pytest.mark.parametrize("attend_current", [False, True], ids=["strict", "current"])


def wave(frequency, phase, *shape):
    n = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(frequency * n + phase).view(shape)


@BACKENDS
@SELF
def test_fixed_numbers_to_nine_digits(backend, attend_current):
    shape = 1, 2, 64, 16
    q, k, v = wave(0.7, 0.1, *shape), wave(1.1, 0.2, *shape), wave(0.3, 0.5, *shape)
    out, rem, dq, dk, dv = backend(
        q,
        k,
        v,
        scale=0.25,
        visibility=Visibility(0, attend_current),
        d_out=wave(0.9, 0.4, *shape),
        d_rem=torch.cos(torch.arange(128, dtype=torch.float64)).view(1, 2, 64),
    )
    found = {
        "out": out.sum(),
        "rem": rem.sum(),
        "dq": dq.abs().sum(),
        "dk": dk.abs().sum(),
        "dv": dv.abs().sum(),
        "an output": out[0, 1, 63, 5],
        "a remainder": rem[0, 0, 10],
    }
    for name, value in NUMBERS[attend_current].items():
        assert float(found[name]) == pytest.approx(value, rel=1e-9, abs=1e-12), name


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(backend, q, k, v, visibility, *, scale=0.5):
    """Outputs and remainders; the gradients are of no interest."""
    zero = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype)
    return backend(q, k, v, scale=scale, visibility=visibility, d_out=zero, d_rem=zero[..., 0])[:2]


@BACKENDS
@pytest.mark.parametrize("c", [-3.0, 0.0, 1.5])
def test_constant_logits_break_a_geometric_stick(backend, c):
    keys = 300
    q = torch.full((1, 1, 1, 1), c, dtype=torch.float64)
    k = torch.ones(1, 1, keys, 1, dtype=torch.float64)
    v = torch.eye(keys, dtype=torch.float64)[None, None]
    weights, rem = run(backend, q, k, v, Visibility(keys), scale=1.0)
    beta = 1 / (1 + math.exp(-c))
    distance = torch.arange(keys, 0, -1, dtype=torch.float64)
    torch.testing.assert_close(
        weights[0, 0, 0], beta * (1 - beta) ** (distance - 1), rtol=1e-10, atol=0
    )
    assert float(rem) == pytest.approx((1 - beta) ** keys, rel=1e-10)


@BACKENDS
@SELF
def test_weights_and_remainder_are_the_whole_stick(backend, attend_current):
    q, k = draw(2, 4, 70, 8), draw(2, 2, 70, 8, seed=1)
    ones = torch.ones(2, 2, 70, 1, dtype=torch.float64)
    spent, rem = run(backend, q, k, ones, Visibility(0, attend_current))
    torch.testing.assert_close(spent[..., 0] + rem, torch.ones_like(rem), rtol=0, atol=1e-14)
    assert (spent >= 0).all()


def test_weights_of_the_definition_are_not_negative():
    q, k = draw(1, 2, 40, 8), draw(1, 2, 40, 8, seed=1)
    weights, log_rem = naive_weights(q, k, scale=1.0, visibility=Visibility(0))
    assert (weights >= 0).all()
    torch.testing.assert_close(
        weights.sum(-1) + log_rem.exp(), torch.ones_like(log_rem), rtol=0, atol=1e-14
    )


@BACKENDS
@SELF
def test_a_query_does_not_feel_what_comes_later(backend, attend_current):
    q, k, v = draw(1, 1, 50, 8), draw(1, 1, 50, 8, seed=1), draw(1, 1, 50, 8, seed=2)
    visibility = Visibility(0, attend_current)
    before = run(backend, q, k, v, visibility)
    k[:, :, 30], v[:, :, 30] = 5.0, -7.0
    after = run(backend, q, k, v, visibility)
    blind = 30 if attend_current else 31
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a[:, :, :blind], b[:, :, :blind])
        assert (a[:, :, blind] != b[:, :, blind]).any()


@BACKENDS
def test_without_visible_keys_the_output_is_zero_and_the_stick_whole(backend):
    q, k, v = draw(1, 1, 3, 4), draw(1, 1, 3, 4, seed=1), draw(1, 1, 3, 4, seed=2)
    out, rem = run(backend, q, k, v, Visibility(0))
    assert not out[0, 0, 0].any()
    assert rem[0, 0, 0] == 1


@BACKENDS
def test_keys_that_take_nothing_can_be_prepended(backend):
    q, k, v = draw(1, 1, 20, 4), draw(1, 1, 20, 4, seed=1), draw(1, 1, 20, 4, seed=2)
    q[..., 0] = 1.0
    nothing = torch.zeros(1, 1, 9, 4, dtype=torch.float64)
    nothing[..., 0] = -1e4
    wanted = run(backend, q, k, v, Visibility(0))
    got = run(backend, q, torch.cat([nothing, k], 2), torch.cat([nothing + 5, v], 2), Visibility(9))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)


@BACKENDS
def test_the_order_of_keys_matters(backend):
    q, k, v = draw(1, 1, 1, 4), draw(1, 1, 20, 4, seed=1), draw(1, 1, 20, 4, seed=2)
    out, rem = run(backend, q, k, v, Visibility(20))
    other, other_rem = run(backend, q, k.flip(2), v.flip(2), Visibility(20))
    assert (out - other).abs().max() > 0.01
    torch.testing.assert_close(rem, other_rem, rtol=1e-12, atol=0)


@BACKENDS
def test_a_certain_key_takes_all_that_is_left(backend):
    q = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    k = torch.tensor([0.3, 200.0, -1.0, 0.5], dtype=torch.float64).view(1, 1, 4, 1)
    weights, rem = run(
        backend, q, k, torch.eye(4, dtype=torch.float64)[None, None], Visibility(4), scale=1.0
    )
    left = torch.sigmoid(-k[0, 0, 2:, 0]).prod()
    assert float(weights[0, 0, 0, 1]) == pytest.approx(float(left), rel=1e-12)
    assert float(weights[0, 0, 0, 0]) < 1e-80
    assert float(rem) < 1e-80


@BACKENDS
def test_tiny_weights_are_linear_attention(backend):
    q = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    k = draw(1, 1, 40, 1, seed=1) - 25
    v = draw(1, 1, 40, 3, seed=2)
    out, rem = run(backend, q, k, v, Visibility(40), scale=1.0)
    torch.testing.assert_close(
        out[0, 0, 0], (torch.sigmoid(k) * v).sum((0, 1, 2)), rtol=1e-7, atol=0
    )
    assert float(rem) == pytest.approx(1.0, abs=1e-8)


@BACKENDS
def test_seeing_oneself_is_seeing_what_is_before_the_next_position(backend):
    q, k, v = draw(1, 2, 20, 4), draw(1, 2, 20, 4, seed=1), draw(1, 2, 20, 4, seed=2)
    current = run(backend, q, k, v, Visibility(0, attend_current=True))
    moved = run(backend, q, k, v, Visibility(1))
    for a, b in zip(current, moved, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


@BACKENDS
def test_the_last_queries_alone_give_the_last_rows(backend):
    q, k, v = draw(1, 2, 60, 4), draw(1, 2, 60, 4, seed=1), draw(1, 2, 60, 4, seed=2)
    whole = run(backend, q, k, v, Visibility(0))
    last = run(backend, q[:, :, 43:], k, v, Visibility(43))
    for a, b in zip(last, whole, strict=True):
        torch.testing.assert_close(a, b[:, :, 43:], rtol=1e-12, atol=1e-14)


@BACKENDS
def test_grouped_heads_are_repeated_heads(backend):
    q, k, v = draw(2, 6, 30, 4), draw(2, 2, 30, 4, seed=1), draw(2, 2, 30, 5, seed=2)
    grouped = run(backend, q, k, v, Visibility(0))
    repeated = run(backend, q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1), Visibility(0))
    for a, b in zip(grouped, repeated, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
