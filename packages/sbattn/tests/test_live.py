"""Counts of what is read, against a walk tile by tile in plain Python."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sbattn.attention import StickBreakingAttention
from sbattn.chunked import chunked_forward
from sbattn.chunked_layout import Tiling
from sbattn.errors import InvalidInputError
from sbattn.live import live_keys, live_tile_fraction, model_live_fractions
from sbattn.model import CausalLM, ModelConfig
from sbattn.visibility import Visibility


def heads(queries, keys=None, *, batch=1, q_heads=2, kv_heads=1, size=4, sharp=2.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, q_heads, queries, size), (batch, kv_heads, keys or queries, size)
    return tuple(
        sharp * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes
    )


def log_rests(query, key, scale):
    """`log(1 - sigmoid(z))` of one head as nested lists."""
    z = scale * (query @ key.T)
    return torch.nn.functional.logsigmoid(-z).tolist()


def seen(i, offset, keys, attend_current, window):
    high = min(i + offset + attend_current, keys)
    low = 0 if window is None else max(0, i + offset + attend_current - window)
    return low, high


def walked(query, key, *, scale, tile, tol, attend_current=False, window=None):
    """Visited and causal tiles of one head."""
    rests, queries, keys = log_rests(query, key, scale), len(query), len(key)
    visited = causal = 0
    for begin in range(0, queries, tile[0]):
        rows = range(begin, min(begin + tile[0], queries))
        bounds = {i: seen(i, keys - queries, keys, attend_current, window) for i in rows}
        low, high = min(b[0] for b in bounds.values()), max(b[1] for b in bounds.values())
        if high <= low:
            continue
        left = dict.fromkeys(rows, 0.0)
        for number in range(math.ceil(high / tile[1]) - 1, low // tile[1] - 1, -1):
            causal += 1
            if tol > 0 and max(left.values()) < math.log(tol):
                continue
            visited += 1
            for i in rows:
                for j in range(number * tile[1], min((number + 1) * tile[1], keys)):
                    if bounds[i][0] <= j < bounds[i][1]:
                        left[i] += rests[i][j]
    return visited, causal


CASES = [
    {"tile": (8, 4), "tol": 1e-3},
    {"tile": (4, 8), "tol": 1e-3},
    {"tile": (16, 16), "tol": 2.0**-53},
    {"tile": (5, 3), "tol": 0.3, "attend_current": True},
    {"tile": (8, 4), "tol": 1e-2, "window": 9},
    {"tile": (3, 5), "tol": 0.05, "window": 1},
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("queries", "keys"), [(37, 37), (6, 37), (1, 37), (16, 16)])
def test_fractions_are_those_of_a_walk_tile_by_tile(case, queries, keys):
    query, key = heads(queries, keys, batch=2, q_heads=4, kv_heads=2)
    options = dict(case)
    tol = options.pop("tol")
    found = live_tile_fraction(query, key, scale=0.5, skip_tol=tol, **options)
    for b in range(2):
        for h in range(4):
            visited, causal = walked(query[b, h], key[b, h // 2], scale=0.5, **case)
            assert found[b, h].item() == pytest.approx(visited / causal, abs=1e-15)


@settings(max_examples=30, deadline=None)
@given(
    queries=st.integers(1, 20),
    extra=st.integers(0, 20),
    rows=st.integers(1, 9),
    keys=st.integers(1, 9),
    tol=st.floats(1e-6, 0.9),
    current=st.booleans(),
    window=st.none() | st.integers(1, 30),
    seed=st.integers(0, 999),
)
def test_any_shape_is_counted_as_walked(queries, extra, rows, keys, tol, current, window, seed):
    query, key = heads(queries, queries + extra, q_heads=1, seed=seed)
    options = {"attend_current": current, "window": window, "tile": (rows, keys), "scale": 0.5}
    visited, causal = walked(query[0, 0], key[0, 0], tol=tol, **options)
    found = live_tile_fraction(query, key, skip_tol=tol, **options).item()
    assert found == pytest.approx(visited / max(causal, 1), abs=1e-15)


def test_long_rows_are_counted_in_pieces(monkeypatch):
    query, key = heads(60, 90)
    whole = live_tile_fraction(query, key, tile=(8, 4), skip_tol=1e-8)
    keys = live_keys(query, key, skip_tol=1e-8)
    monkeypatch.setattr("sbattn.live._LOGITS", 8 * 4 * 3)
    assert torch.equal(live_tile_fraction(query, key, tile=(8, 4), skip_tol=1e-8), whole)
    assert torch.equal(live_keys(query, key, skip_tol=1e-8), keys)


@pytest.mark.parametrize("attend_current", [False, True])
@pytest.mark.parametrize("sharp", [0.5, 3.0])
def test_the_chunked_path_visits_as_many_tiles_as_are_counted(attend_current, sharp):
    queries, tol = 1100, 1e-4
    query, key = heads(queries, q_heads=1, sharp=sharp)
    visibility = Visibility(kv_offset=0, attend_current=attend_current)
    stop = chunked_forward(
        query, key, key, scale=0.5, visibility=visibility, log2_tol=math.log2(tol), save=True
    )[3][0, 0].tolist()
    tiling = Tiling.of(queries, queries)
    visited = causal = 0
    for begin, first in zip(range(0, queries, tiling.rows), stop, strict=True):
        high = min(begin + tiling.rows, queries) - 1 + attend_current
        causal += math.ceil(high / tiling.keys)
        visited += math.ceil(high / tiling.keys) - first // tiling.keys
    found = live_tile_fraction(
        query,
        key,
        scale=0.5,
        attend_current=attend_current,
        tile=(tiling.rows, tiling.keys),
        skip_tol=tol,
    )
    assert 0 < visited < causal
    assert found.item() == pytest.approx(visited / causal, abs=1e-15)


def test_zero_never_skips():
    query, key = heads(50, sharp=5.0)
    assert (live_tile_fraction(query, key, tile=(8, 8), skip_tol=0) == 1).all()
    assert torch.equal(live_keys(query, key, skip_tol=0)[0, 0], torch.arange(50))


def test_constant_logits_live_for_the_number_of_halvings():
    key = torch.zeros(1, 1, 100, 4)
    for tol, expected in ((2.0**-10, 11), ("exact", 25), (0.75, 1)):
        counts = live_keys(key, key, skip_tol=tol)
        assert counts[0, 0].tolist() == [min(i, expected) for i in range(100)]


def test_float64_is_exact_to_its_own_rounding():
    key = torch.zeros(1, 1, 100, 4, dtype=torch.float64)
    assert live_keys(key, key)[0, 0, -1] == 54


def test_keys_that_take_nothing_keep_everything_alive():
    query, key = torch.ones(1, 1, 64, 1), torch.full((1, 1, 64, 1), -50.0)
    assert live_tile_fraction(query, key, tile=(8, 8)).item() == 1
    key[:, :, 40] = 50.0  # this one takes the whole stick
    assert live_keys(query, key, scale=1.0)[0, 0].tolist()[39:] == [39, 40, *range(1, 24)]


def test_looser_tolerances_read_no_more():
    query, key = heads(80, q_heads=4, sharp=1.0)
    tolerances = (0.0, 1e-12, 1e-6, 1e-2, 0.5)
    fractions = [live_tile_fraction(query, key, tile=(8, 8), skip_tol=t) for t in tolerances]
    for more, less in pairwise(fractions):
        assert (less <= more).all()
    assert (fractions[-1] < fractions[0]).all()


def test_a_window_bounds_what_is_read():
    query, key = heads(60, sharp=0.1)
    counts = live_keys(query, key, window=7, skip_tol=0)
    assert torch.equal(counts[0, 1], torch.arange(60).clamp(max=7))


def test_nothing_to_see_is_nothing_to_read():
    query, key = heads(1)
    assert live_tile_fraction(query, key).tolist() == [[0, 0]]
    assert live_keys(query, key).tolist() == [[[0], [0]]]


def test_half_precision_is_counted_in_float32():
    query, key = heads(200)
    found = live_tile_fraction(query.bfloat16(), key.bfloat16(), tile=(16, 16))
    expected = live_tile_fraction(query.bfloat16().float(), key.bfloat16().float(), tile=(16, 16))
    assert found.dtype == torch.float64
    assert torch.equal(found, expected)


@pytest.mark.parametrize("options", [{}, {"add_rope": True, "num_kv_heads": 1}, {"window": 9}])
def test_a_models_fractions_are_those_of_its_heads(options):
    torch.manual_seed(0)
    model = CausalLM(ModelConfig(vocab_size=11, num_layers=3, skip_tol=1e-3, **options))
    tokens = torch.randint(11, (2, 70))
    seen_by = []
    for block in model.blocks:
        block.attention.register_forward_pre_hook(
            lambda _, inputs, __: seen_by.append(inputs[0]), with_kwargs=True
        )
    found = model_live_fractions(model, tokens, tile=(8, 8))
    assert found.shape == (3, 2)
    for layer, x in enumerate(seen_by):
        attention = model.blocks[layer].attention
        q, k, _ = attention.heads(x, torch.arange(70))
        expected = live_tile_fraction(
            q, k, window=attention.window, tile=(8, 8), skip_tol=1e-3
        ).mean(0)
        torch.testing.assert_close(found[layer], expected)
    assert (model_live_fractions(model, tokens, tile=(8, 8), skip_tol=0) == 1).all()


def test_asking_a_model_leaves_no_trace():
    model = CausalLM(ModelConfig(vocab_size=11))
    tokens = torch.randint(11, (1, 20))
    before = model(tokens)
    model_live_fractions(model, tokens)
    assert all(not part._forward_pre_hooks for part in model.modules())
    assert torch.equal(model(tokens), before)


def test_layers_of_any_model_are_found():
    model = torch.nn.Sequential(StickBreakingAttention(16, 4), StickBreakingAttention(16, 4))
    assert model_live_fractions(model, torch.randn(2, 30, 16), tile=(4, 4)).shape == (2, 4)


def test_what_cannot_be_counted_is_refused():
    query, key = heads(4)
    with pytest.raises(InvalidInputError, match="tile"):
        live_tile_fraction(query, key, tile=(0, 8))
    with pytest.raises(InvalidInputError, match=r"tile: expected two integers.* got 64"):
        live_tile_fraction(query, key, tile=64)
    with pytest.raises(InvalidInputError, match="skip_tol"):
        live_tile_fraction(query, key, skip_tol=2.0)
    with pytest.raises(InvalidInputError, match="window"):
        live_keys(query, key, window=0)
    with pytest.raises(InvalidInputError, match="multiple"):
        live_keys(query, heads(4, kv_heads=3)[1])
    rope = CausalLM(ModelConfig(vocab_size=5, attn="rope"))
    with pytest.raises(InvalidInputError, match="only stick-breaking skips"):
        model_live_fractions(rope, torch.zeros(1, 3, dtype=torch.int64))
