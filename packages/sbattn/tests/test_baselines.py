"""Every baseline against its definition, written out in float64."""

import math

import pytest
import torch

from sbattn.attention import StickBreakingAttention
from sbattn.baselines import ForgettingAttention, SoftmaxAttention
from sbattn.cache import LayerCache
from sbattn.errors import InvalidInputError
from sbattn.positions import alibi_slopes

SIZES = {"hidden_size": 24, "num_heads": 6, "num_kv_heads": 2, "head_dim": 4}
LAYERS = {
    "rope": lambda **o: SoftmaxAttention(**SIZES, position="rope", rope_theta=50.0, **o),
    "alibi": lambda **o: SoftmaxAttention(**SIZES, position="alibi", **o),
    "nope": lambda **o: SoftmaxAttention(**SIZES, position="none", **o),
    "window": lambda **o: SoftmaxAttention(
        **SIZES, position="rope", rope_theta=50.0, window=3, **o
    ),
    "window of one": lambda **o: SoftmaxAttention(**SIZES, position="none", window=1, **o),
    "fox": lambda **o: ForgettingAttention(**SIZES, **o),
}
each = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


def spread(made, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = made.double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return made


def tokens(length=9, batch=2, seed=1):
    return torch.randn(
        batch, length, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )


def turned(vector, position, theta):
    """Pairs `(n, n + D/2)` as complex numbers, turned by `position · theta^(-2n/D)`."""
    half = len(vector) // 2
    numbers = torch.complex(vector[:half], vector[half:])
    exponents = -torch.arange(half, dtype=torch.float64) / half
    numbers = numbers * torch.exp(1j * position * theta**exponents)
    return torch.cat([numbers.real, numbers.imag])


def written_out(made, x):
    """Outputs of a layer for one row `[L, C]`: one softmax at a time."""
    size, group = made.head_dim, made.num_heads // made.num_kv_heads
    q = made.q_proj(x).unflatten(-1, (-1, size))
    k, v = (p(x).unflatten(-1, (-1, size)) for p in (made.k_proj, made.v_proj))
    fox = isinstance(made, ForgettingAttention)
    gates = torch.sigmoid(made.gate(x)) if fox else None
    rows = []
    for i in range(len(x)):
        heads = []
        for head in range(made.num_heads):
            window = None if fox else made.window
            seen = range(0 if window is None else max(0, i - window + 1), i + 1)
            logits = []
            for j in seen:
                one, other = q[i, head], k[j, head // group]
                if made.rope_theta is not None:
                    one, other = (turned(one, i, 50.0), turned(other, j, 50.0))
                logit = one @ other / math.sqrt(size)
                if not fox and made.position == "alibi":
                    logit = logit - (i - j) * alibi_slopes(made.num_heads)[head]
                if fox:
                    logit = logit + gates[j + 1 : i + 1, head].prod().log()
                logits.append(logit)
            weights = torch.stack(logits).softmax(0)
            heads.append(weights @ v[list(seen), head // group])
        rows.append(torch.cat(heads))
    return made.o_proj(torch.stack(rows))


@each
@pytest.mark.parametrize("bias", [False, True])
def test_the_layer_is_its_definition(make, bias):
    made, x = spread(make(bias=bias)), tokens()
    expected = torch.stack([written_out(made, row) for row in x])
    torch.testing.assert_close(made(x), expected, rtol=0, atol=1e-12)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_is_near_the_definition(make, dtype):
    made, x = spread(make()), tokens()
    expected = made(x)
    found = made.to(dtype)(x.to(dtype))
    assert found.dtype == dtype
    error = (found.double() - expected).norm() / expected.norm()
    assert error < {torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]


@each
def test_a_padded_batch_is_each_row_alone(make):
    made, x = spread(make()), tokens(batch=3)
    padding = torch.tensor([[0, 9], [4, 9], [2, 5]])
    found = made(x, key_padding=padding)
    assert found.isfinite().all()
    for row, (start, end) in enumerate(padding.tolist()):
        alone = made(x[row : row + 1, start:end])[0]
        torch.testing.assert_close(found[row, start:end], alone, rtol=0, atol=1e-12)


@each
@pytest.mark.parametrize("parts", [[1] * 9, [4, 1, 3, 1], [9]])
def test_cached_decoding_is_uncached(make, parts):
    made, x, cache = spread(make()), tokens(), LayerCache(9)
    with torch.no_grad():
        found = torch.cat([made(part, cache=cache) for part in x.split(parts, dim=1)], dim=1)
    torch.testing.assert_close(found, made(x), rtol=0, atol=1e-12)


@each
def test_packed_is_separate(make):
    made, x, lengths = spread(make()), tokens(batch=1), [3, 0, 5, 1]
    bounds = torch.tensor([0, 3, 3, 8, 9], dtype=torch.int32)
    alone = torch.cat([made(part) for part in x.split(lengths, dim=1) if part.shape[1]], dim=1)
    torch.testing.assert_close(made(x, cu_seqlens=bounds), alone, rtol=0, atol=1e-12)


@each
def test_a_token_sees_itself(make):
    made, x = spread(make()), tokens()
    first = made.v_proj(x[:, 0]).unflatten(-1, (2, 4)).repeat_interleave(3, dim=1).flatten(1)
    torch.testing.assert_close(made(x)[:, 0], made.o_proj(first), rtol=0, atol=1e-12)


@each
def test_layers_are_called_like_stickbreaking(make):
    ours, theirs = StickBreakingAttention(**SIZES), make()
    assert type(ours).forward is type(theirs).forward
    assert {"q_proj", "k_proj", "v_proj", "o_proj"} <= dict(theirs.named_children()).keys()


@pytest.mark.parametrize("count", [1, 2, 4, 8, 16, 32])
def test_alibi_slopes_of_powers_of_two_are_geometric(count):
    assert alibi_slopes(count) == [2 ** (-8 * h / count) for h in range(1, count + 1)]


def test_alibi_slopes_of_eight_heads():
    assert alibi_slopes(8) == [2.0**-h for h in range(1, 9)]


@pytest.mark.parametrize("count", range(1, 40))
def test_alibi_slopes_are_distinct_for_any_count(count):
    slopes = alibi_slopes(count)
    assert len(set(slopes)) == len(slopes) == count
    assert all(2.0**-8 <= slope < 1 for slope in slopes)


def test_alibi_slopes_of_twelve_heads_interleave_those_of_sixteen():
    extra = [2 ** (-8 * h / 16) for h in (1, 3, 5, 7)]
    assert alibi_slopes(12) == pytest.approx(alibi_slopes(8) + extra, rel=1e-15)


@pytest.mark.parametrize("name", ["rope", "alibi", "nope", "window", "fox"])
def test_only_distance_counts(name):
    """Outputs of a text do not change when hidden tokens stand before it."""
    made, x = spread(LAYERS[name]()), tokens(30)
    shifted = made(x, key_padding=torch.tensor([[21, 30]] * 2))[:, 21:]
    torch.testing.assert_close(shifted, made(x[:, 21:]), rtol=0, atol=1e-12)


def test_without_position_only_the_set_of_earlier_tokens_counts():
    x = tokens()
    shuffled = x[:, [3, 0, 6, 1, 5, 2, 4, 7, 8]]
    for name, same in {"nope": True, "rope": False, "alibi": False, "fox": False}.items():
        made = spread(LAYERS[name]())
        assert torch.allclose(made(x)[:, 8], made(shuffled)[:, 8], atol=1e-9) == same


def test_forgetting_with_open_gates_is_softmax_without_position():
    fox, nope, x = spread(LAYERS["fox"]()), spread(LAYERS["nope"]()), tokens()
    nope.load_state_dict(
        {name: value for name, value in fox.state_dict().items() if "gate" not in name}
    )
    with torch.no_grad():
        fox.gate.weight.zero_()
        fox.gate.bias.fill_(80.0)
    torch.testing.assert_close(fox(x), nope(x), rtol=0, atol=1e-12)


def test_forgetting_with_shut_gates_keeps_the_own_token_only():
    fox, own, x = spread(LAYERS["fox"]()), spread(LAYERS["window of one"]()), tokens()
    own.load_state_dict(
        {name: value for name, value in fox.state_dict().items() if "gate" not in name}
    )
    with torch.no_grad():
        fox.gate.weight.zero_()
        fox.gate.bias.fill_(-80.0)
    torch.testing.assert_close(fox(x), own(x), rtol=0, atol=1e-12)


def test_forgetting_with_one_constant_gate_is_alibi_with_its_slope():
    fox, alibi, x = spread(LAYERS["fox"]()), spread(LAYERS["alibi"]()), tokens()
    alibi.load_state_dict(
        {name: value for name, value in fox.state_dict().items() if "gate" not in name}
    )
    keep = torch.exp(-torch.tensor(alibi_slopes(6), dtype=torch.float64))
    with torch.no_grad():
        fox.gate.weight.zero_()
        fox.gate.bias.copy_(torch.logit(keep))
    torch.testing.assert_close(fox(x), alibi(x), rtol=0, atol=1e-12)


def test_gates_learn_where_their_keys_are_seen():
    fox = spread(LAYERS["fox"]())
    fox(tokens()).square().sum().backward()
    assert fox.gate.weight.grad.abs().min() > 0


def test_what_is_not_known_is_refused():
    with pytest.raises(InvalidInputError, match="position: expected one of rope, alibi, none"):
        SoftmaxAttention(16, 2, position="learned")
    with pytest.raises(InvalidInputError, match="window"):
        SoftmaxAttention(16, 2, window=-1)
