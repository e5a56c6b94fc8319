"""The stick-breaking layer, against its definition written out for one head at a time."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sbattn.attention import StickBreakingAttention
from sbattn.cache import LayerCache
from sbattn.errors import InvalidInputError, UnsupportedError
from sbattn.positions import rotate, token_positions, valid_keys


def layer(seed=0, **options):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 24, "num_heads": 4, "num_kv_heads": 2, "head_dim": 6}
    made = StickBreakingAttention(**(sizes | options)).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made


def tokens(length=11, batch=2, seed=1, width=24):
    return torch.randn(
        batch, length, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )


def written_out(made, x):
    """Outputs of a layer for one row `[L, C]`: loops over heads, queries and keys."""
    q, k, v = (p(x) for p in (made.q_proj, made.k_proj, made.v_proj))
    size, group = made.head_dim, made.num_heads // made.num_kv_heads
    heads = []
    for head in range(made.num_heads):
        at = slice(head * size, (head + 1) * size)
        kv_at = slice(head // group * size, (head // group + 1) * size)
        rows = []
        for i in range(len(x)):
            nearest = i if made.attend_current else i - 1
            farthest = 0 if made.window is None else max(0, nearest + 1 - made.window)
            stick, mixed = 1.0, torch.zeros(size, dtype=torch.float64)
            for j in range(nearest, farthest - 1, -1):
                share = torch.sigmoid(made.scale * (q[i, at] @ k[j, kv_at]))
                mixed = mixed + stick * share * v[j, kv_at]
                stick = stick * (1 - share)
            if made.remainder == "value":
                mixed = mixed + stick * v[i, kv_at]
            if made.remainder == "bias":
                mixed = mixed + stick * made.remainder_bias[head]
            if made.head_norm is not None:
                spread = (mixed - mixed.mean()).square().mean() + made.head_norm.eps
                mixed = (mixed - mixed.mean()) / spread.sqrt()
                mixed = mixed * made.head_norm.weight[at] + made.head_norm.bias[at]
            rows.append(mixed)
        heads.append(torch.stack(rows))
    return made.o_proj(torch.cat(heads, dim=1))


@pytest.mark.parametrize("remainder", ["none", "value", "bias"])
@pytest.mark.parametrize("head_norm", [False, True])
@pytest.mark.parametrize("attend_current", [False, True])
def test_the_layer_is_its_definition(remainder, head_norm, attend_current):
    made = layer(remainder=remainder, head_norm=head_norm, attend_current=attend_current)
    x = tokens()
    expected = torch.stack([written_out(made, row) for row in x])
    torch.testing.assert_close(made(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"window": 3},
        {"window": 1, "attend_current": True},
        {"scale": 0.7},
        {"bias": True},
        {"num_kv_heads": 1},
        {"num_kv_heads": None, "head_dim": None},
    ],
    ids=str,
)
def test_the_options_are_their_definitions(options):
    made = layer(**options)
    x = tokens()
    expected = torch.stack([written_out(made, row) for row in x])
    torch.testing.assert_close(made(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", ["naive", "chunked"])
def test_backends_agree_with_gradients(backend):
    x = tokens(length=40)
    found, expected = (layer(backend=name) for name in (backend, "naive"))
    for made in (found, expected):
        made(x).square().sum().backward()
    torch.testing.assert_close(found(x), expected(x), rtol=0, atol=1e-12)
    for one, other in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-9)


def test_a_loose_tolerance_reaches_the_operator():
    def mixed(skip_tol):
        made = layer(skip_tol=skip_tol, remainder="none", head_norm=False, num_kv_heads=4)
        with torch.no_grad():
            made.k_proj.weight.copy_(-made.q_proj.weight)  # logits near -4: long sticks
            q = made.q_proj(torch.ones(24, dtype=torch.float64)).view(4, 6)
            made.scale = 4 / q.square().sum(1).max().item()
            return made(1 + 0.01 * tokens(length=1100, batch=1))

    exact, loose = mixed("exact"), mixed(0.5)
    torch.testing.assert_close(exact, mixed(0), rtol=0, atol=1e-12)
    assert (exact - loose).abs().max() > 1e-3


def test_without_a_remainder_the_first_token_gets_nothing():
    made = layer(remainder="none", head_norm=False)
    assert not made(tokens())[:, 0].any()


def test_the_remainder_of_the_first_token_is_the_whole_stick():
    made, x = layer(remainder="value", head_norm=False, num_kv_heads=4), tokens()
    torch.testing.assert_close(made(x)[:, 0], made.o_proj(made.v_proj(x[:, 0])), rtol=0, atol=1e-12)


def test_remainder_biases_start_at_zero_and_learn():
    torch.manual_seed(0)
    made = StickBreakingAttention(24, 4, head_norm=False).double()
    assert not made.remainder_bias.any()
    bare = StickBreakingAttention(24, 4, remainder="none", head_norm=False).double()
    bare.load_state_dict(made.state_dict(), strict=False)
    torch.testing.assert_close(made(tokens()), bare(tokens()), rtol=0, atol=0)
    made(tokens()).sum().backward()
    assert made.remainder_bias.grad.abs().min() > 0


def test_head_norm_sees_each_head_and_each_token_alone():
    made, x = layer(remainder="none"), tokens()
    normed = []
    made.o_proj.register_forward_pre_hook(lambda _, inputs: normed.append(inputs[0]))
    with torch.no_grad():
        made.head_norm.weight.fill_(1)
        made.head_norm.bias.zero_()
        made(x)
        made.v_proj.weight[:6] *= 50  # the first key head, hence the first two query heads
        made(x)
    heads = normed[0][:, 1:].unflatten(-1, (4, 6))
    torch.testing.assert_close(heads.mean(-1), torch.zeros_like(heads[..., 0]), rtol=0, atol=1e-9)
    torch.testing.assert_close(normed[1][..., 12:], normed[0][..., 12:], rtol=0, atol=1e-12)
    # Scale does not matter, but for the small number that the norm adds to the variance.
    torch.testing.assert_close(normed[1][:, 1:], normed[0][:, 1:], rtol=0, atol=0.02)


def test_default_is_the_trained_recipe():
    made = StickBreakingAttention(16, 4)
    assert made.remainder == "bias"
    assert isinstance(made.head_norm, torch.nn.GroupNorm)
    assert made.head_norm.num_groups == 4
    assert not made.attend_current
    assert made.rope_theta is None
    assert made.scale == 0.5
    names = {name for name, _ in made.named_parameters()}
    projections = {f"{part}_proj.weight" for part in "qkvo"}
    assert names == projections | {"remainder_bias", "head_norm.weight", "head_norm.bias"}


@settings(max_examples=25, deadline=None)
@given(parts=st.lists(st.integers(1, 6), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_any_way_of_cutting_a_text_decodes_to_the_same(parts, seed):
    made, x = layer(seed), tokens(sum(parts), seed=seed + 1)
    cache = LayerCache(sum(parts))
    with torch.no_grad():
        found = torch.cat([made(part, cache=cache) for part in x.split(parts, dim=1)], dim=1)
    torch.testing.assert_close(found, made(x), rtol=0, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(0, 6), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_packed_is_separate_for_any_lengths(lengths, seed):
    made, x = layer(seed), tokens(sum(lengths), batch=1, seed=seed + 1)
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    alone = torch.cat([made(part) for part in x.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(made(x, cu_seqlens=bounds), alone, rtol=0, atol=1e-12)


def test_rotation_makes_products_depend_on_distance_only():
    q, k = (tokens(1, batch=3, seed=s, width=8)[:, None] for s in (1, 2))

    def product(i, j):
        at = (torch.tensor([i]), torch.tensor([j]))
        return (rotate(q, at[0], 10000.0) * rotate(k, at[1], 10000.0)).sum(-1)

    torch.testing.assert_close(product(17, 5), product(1012, 1000), rtol=0, atol=1e-12)
    assert not torch.allclose(product(17, 5), product(17, 6), atol=1e-3)
    torch.testing.assert_close(product(5, 5), (q * k).sum(-1), rtol=0, atol=1e-12)


def test_rotation_turns_pairs_by_their_angles():
    x = tokens(5, batch=1, width=6)[:, None]
    positions = torch.tensor([0, 1, 2, 7, 300])
    angles = positions[:, None] * 100.0 ** (-torch.arange(3, dtype=torch.float64) / 3)
    turned = torch.complex(*x.chunk(2, dim=-1)) * torch.exp(1j * angles)
    expected = torch.cat([turned.real, turned.imag], dim=-1)
    torch.testing.assert_close(rotate(x, positions, 100.0), expected, rtol=0, atol=1e-12)


def test_rotation_in_float32_is_precise_far_out():
    x, at = tokens(1, batch=1, width=8)[:, None], torch.tensor([1_000_003])
    error = rotate(x.float(), at, 10000.0).double() - rotate(x, at, 10000.0)
    assert error.abs().max() < 1e-6


def test_positions_start_over_in_every_packed_sequence():
    bounds = torch.tensor([0, 3, 3, 5, 6], dtype=torch.int32)
    found = token_positions(6, torch.device("cpu"), cu_seqlens=bounds)
    assert found.tolist() == [0, 1, 2, 0, 1, 0]
    assert token_positions(3, torch.device("cpu"), past=4).tolist() == [4, 5, 6]


def test_masks_and_intervals_name_the_same_keys():
    interval = torch.tensor([[1, 3], [0, 4], [2, 2]])
    mask = valid_keys(interval, 3, 4)
    assert mask.int().tolist() == [[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]]
    assert valid_keys(mask, 3, 4) is mask


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"remainder": "rest"}, "remainder: expected one of none, value, bias"),
        ({"backend": "fast"}, "backend"),
        ({"window": 0}, "window"),
        ({"skip_tol": -0.1}, "skip_tol"),
        ({"num_kv_heads": 3}, "multiple of num_kv_heads=3"),
        ({"num_kv_heads": 0}, "num_kv_heads"),
        ({"head_dim": 0}, "head_dim"),
        ({"hidden_size": 25, "head_dim": None}, "or give head_dim"),
        ({"rope_theta": 10.0, "head_dim": 5}, "even"),
    ],
)
def test_layers_that_do_not_fit_are_refused(options, word):
    with pytest.raises(InvalidInputError, match=word):
        layer(**options)


def test_calls_that_do_not_fit_are_refused():
    made, x = layer(), tokens(4)
    bounds = torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(InvalidInputError, match=r"x: expected shape \[batch, length, 24\]"):
        made(x[..., :20])
    with pytest.raises(InvalidInputError, match=r"x: expected shape"):
        made(x[0])
    with pytest.raises(InvalidInputError, match="one row, got a batch of 2"):
        made(x, cu_seqlens=bounds)
    with pytest.raises(InvalidInputError, match="leave it out"):
        made(x[:1], cu_seqlens=bounds, key_padding=torch.tensor([[0, 4]]))
    with pytest.raises(UnsupportedError, match="packed sequences cannot be decoded"):
        made(x[:1], cu_seqlens=bounds, cache=LayerCache(4))
    with pytest.raises(InvalidInputError, match="cu_seqlens"):
        made(x[:1], cu_seqlens=torch.tensor([1, 4], dtype=torch.int32))


@pytest.mark.parametrize(
    ("bounds", "word"),
    [
        ([0, 11], r"cu_seqlens: expected a tensor of N \+ 1 offsets"),
        (torch.tensor([], dtype=torch.int32), "cu_seqlens: expected a tensor"),
        (torch.tensor([[0, 11]], dtype=torch.int32), "cu_seqlens: expected a tensor"),
        (torch.tensor([0, 11]), "cu_seqlens: expected dtype int32, got int64"),
    ],
)
def test_bounds_of_packed_sequences_are_refused_by_their_name(bounds, word):
    with pytest.raises(InvalidInputError, match=word):
        layer()(tokens(batch=1), cu_seqlens=bounds)


@pytest.mark.parametrize("theta", [0.0, -1.0, math.nan, math.inf])
def test_rotation_needs_a_positive_base(theta):
    with pytest.raises(InvalidInputError, match="rope_theta: expected None or above 0"):
        layer(rope_theta=theta)


def test_a_call_that_fails_leaves_the_cache_as_it_was():
    made, x, cache = layer(), tokens(), LayerCache(11)
    with torch.no_grad():
        made(x[:, :4], cache=cache)
        with pytest.raises(InvalidInputError, match="key_padding"):
            made(x[:, 4:6], cache=cache, key_padding=torch.tensor([[0, 99], [0, 6]]))
        assert cache.length == 4
        torch.testing.assert_close(made(x[:, 4:], cache=cache), made(x)[:, 4:])
