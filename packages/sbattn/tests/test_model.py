"""The language model, the same properties for every arm."""

import copy
import dataclasses
import io
import pickle

import pytest
import torch
import torch.nn.functional as F

from sbattn.attention import StickBreakingAttention
from sbattn.errors import InvalidInputError, UnsupportedError
from sbattn.model import CausalLM, ModelConfig

VOCAB = 13
ARMS = {
    "stickbreaking": {},
    "rope": {"attn": "rope"},
    "alibi": {"attn": "alibi"},
    "nope": {"attn": "nope"},
    "swa": {"attn": "swa", "window": 5},
    "fox": {"attn": "fox"},
}
VARIANTS = {
    **ARMS,
    "value": {"remainder": "value"},
    "bias, head norm": {"remainder": "bias", "head_norm": True},
    "attend current": {"attend_current": True},
    "stick-breaking with rope": {"add_rope": True},
    "stick-breaking in a window": {"window": 4},
    "tied": {"tie_embeddings": True, "head_dim": 6, "mlp_size": 20},
}
each_arm = pytest.mark.parametrize("options", ARMS.values(), ids=ARMS)
each_variant = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)


def make(options, dtype=torch.float64, **more):
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "num_heads": 4, "num_kv_heads": 2}
    model = CausalLM(ModelConfig(**(sizes | options | more)))
    for parameter in model.parameters():  # gains, biases and gates away from where they start
        with torch.no_grad():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.to(dtype)


def ids(*shape, seed=0):
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def steps(model, tokens, sizes, **options):
    """Logits of `tokens` read through a cache, `sizes` at a time."""
    cache = model.new_cache(tokens.shape[0], tokens.shape[1])
    found = []
    with torch.no_grad():
        for part in tokens.split(sizes, dim=1):
            found.append(model(part, cache=cache, **options))
            options = {}
    return torch.cat(found, dim=1)


# --- the arms compare like with like


def test_all_arms_have_the_same_number_of_parameters_but_for_the_gates_of_fox():
    counts = {name: make(options).num_parameters() for name, options in ARMS.items()}
    gates = 2 * (32 * 4 + 4)
    assert counts.pop("fox") == counts["rope"] + gates
    assert len(set(counts.values())) == 1


def test_parameters_are_those_of_the_formula():
    config = ModelConfig(vocab_size=VOCAB, hidden_size=24, num_heads=3, head_dim=6, mlp_size=40)
    attention, mlp, norms = 4 * 24 * 18, 3 * 24 * 40, 2 * 24
    expected = 2 * VOCAB * 24 + 2 * (attention + mlp + norms) + 24
    assert CausalLM(config).num_parameters() == expected
    tied = dataclasses.replace(config, tie_embeddings=True)
    assert CausalLM(tied).num_parameters() == expected - VOCAB * 24
    given = dataclasses.replace(config, remainder="bias", head_norm=True)
    assert CausalLM(given).num_parameters() == expected + 2 * 3 * 18


def test_arms_start_from_the_same_weights():
    def fresh(options):
        torch.manual_seed(3)
        return CausalLM(ModelConfig(vocab_size=VOCAB, **options)).state_dict()

    first = fresh(ARMS["stickbreaking"])
    for name in ("rope", "alibi", "nope", "swa"):
        other = fresh(ARMS[name])
        assert other.keys() == first.keys()
        assert all(torch.equal(other[key], first[key]) for key in first)


@each_arm
def test_an_untrained_model_is_nearly_undecided(options):
    torch.manual_seed(0)
    model = CausalLM(ModelConfig(vocab_size=VOCAB, **options))
    tokens = ids(8, 33)
    loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    assert abs(loss.item() - torch.tensor(VOCAB).log().item()) < 0.5


def test_the_residual_stream_does_not_grow_with_depth():
    def final_scale(num_layers):
        torch.manual_seed(0)
        model = CausalLM(ModelConfig(vocab_size=VOCAB, num_layers=num_layers))
        seen = []
        model.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        model(ids(4, 32))
        return seen[0].square().mean().sqrt().item()

    assert final_scale(16) < 1.2 * final_scale(2)


# --- who sees whom


@each_variant
def test_logits_depend_on_no_later_token(options):
    model = make(options)
    tokens = ids(2, 14)
    before = model(tokens)
    for changed in (0, 6, 13):
        other = tokens.clone()
        other[:, changed] = (other[:, changed] + 1) % VOCAB
        after = model(other)
        assert torch.equal(before[:, :changed], after[:, :changed])
        assert not torch.equal(before[:, changed], after[:, changed])


@each_arm
def test_a_later_token_changes_with_an_earlier_one(options):
    model = make(options)
    tokens = ids(1, 8)
    other = tokens.clone()
    other[:, 5] = (other[:, 5] + 1) % VOCAB
    assert not torch.equal(model(tokens)[:, 7], model(other)[:, 7])


@each_variant
def test_packed_sequences_are_read_as_if_alone(options):
    model = make(options)
    lengths = [5, 1, 0, 9]
    tokens = ids(1, sum(lengths))
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    alone = [model(part) for part in tokens.split(lengths, dim=1) if part.shape[1]]
    for longest in (None, max(lengths)):
        packed = model(tokens, cu_seqlens=bounds, max_seqlen=longest)
        torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=0, atol=1e-12)


@each_variant
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("form", ["interval", "mask"])
def test_padding_changes_nothing(options, side, form):
    model = make(options)
    rows = [ids(1, length, seed=length) for length in (9, 6, 1)]
    starts = [9 - row.shape[1] if side == "left" else 0 for row in rows]
    tokens, mask = ids(3, 9, seed=50), torch.zeros(3, 9, dtype=torch.bool)
    for index, (row, start) in enumerate(zip(rows, starts, strict=True)):
        tokens[index, start : start + row.shape[1]] = row
        mask[index, start : start + row.shape[1]] = True
    interval = torch.stack([mask.int().argmax(1), mask.int().argmax(1) + mask.sum(1)], dim=1)
    logits = model(tokens, key_padding=interval if form == "interval" else mask)
    assert logits.isfinite().all()
    for index, row in enumerate(rows):
        torch.testing.assert_close(logits[index][mask[index]], model(row)[0], rtol=0, atol=1e-12)


@each_arm
def test_padding_gets_no_gradient_from_the_rest(options):
    model = make(options)
    tokens = torch.tensor([[0, 0, 1, 2, 3]])
    model(tokens, key_padding=torch.tensor([[2, 5]]))[:, 2:].square().sum().backward()
    assert model.embedding.weight.grad.isfinite().all()
    assert model.embedding.weight.grad[0].abs().max() < 1e-12  # sums of gates cancel to rounding


# --- decoding


@each_variant
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("sizes", [[12], [1] * 12, [5, 1, 4, 1, 1]], ids=["whole", "ones", "parts"])
def test_cached_decoding_is_uncached(options, dtype, tolerance, sizes):
    model = make(options, dtype)
    tokens = ids(3, 12)
    torch.testing.assert_close(steps(model, tokens, sizes), model(tokens), rtol=0, atol=tolerance)


@each_variant
def test_cached_decoding_with_padding_on_the_left_is_each_row_alone(options):
    model = make(options)
    lengths = [7, 10, 1]
    rows = [ids(1, length, seed=length) for length in lengths]
    tokens = torch.cat([F.pad(row, (10 - row.shape[1], 0)) for row in rows])
    padding = torch.tensor([[10 - length, 10] for length in lengths])
    later = ids(3, 4, seed=99)
    full = torch.cat([tokens, later], dim=1)
    logits = steps(model, full, [10, 1, 2, 1], key_padding=padding)
    for index, row in enumerate(rows):
        expected = model(torch.cat([row, later[index : index + 1]], dim=1))[0]
        torch.testing.assert_close(
            logits[index, 10 - lengths[index] :], expected, rtol=0, atol=1e-12
        )


@each_arm
def test_greedy_generation_takes_the_likeliest_token_each_time(options):
    model = make(options)
    prompt = ids(2, 4)
    tokens = prompt
    for _ in range(6):
        tokens = torch.cat([tokens, model(tokens)[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(model.generate(prompt, 6), tokens)


def test_generation_from_padded_prompts_is_that_of_each_alone():
    model = make({})
    prompts = [ids(1, 3), ids(1, 6)]
    padded = torch.cat([F.pad(prompts[0], (3, 0)), prompts[1]])
    found = model.generate(padded, 5, key_padding=torch.tensor([[3, 6], [0, 6]]))
    for row, prompt in zip(found, prompts, strict=True):
        assert torch.equal(row[6:], model.generate(prompt, 5)[0, prompt.shape[1] :])


def test_sampling_repeats_with_the_generator_and_follows_the_model():
    model = make({})

    def sample(seed):
        generator = torch.Generator().manual_seed(seed)
        return model.generate(ids(1, 4).expand(4000, 4), 1, temperature=1.5, generator=generator)

    assert torch.equal(sample(1), sample(1))
    shares = torch.bincount(sample(1)[:, -1], minlength=VOCAB) / 4000
    expected = torch.softmax(model(ids(1, 4))[0, -1] / 1.5, dim=-1)
    assert (shares - expected).abs().max() < 0.04


def test_a_cache_can_be_used_again_after_a_reset():
    model = make({})
    cache = model.new_cache(2, 6)
    with torch.no_grad():
        model(ids(2, 6, seed=8), cache=cache)
        cache.reset()
        again = model(ids(2, 6), cache=cache)
    torch.testing.assert_close(again, model(ids(2, 6)), rtol=0, atol=1e-12)


@each_arm
def test_a_call_that_fails_leaves_the_cache_as_it_was(options):
    """Also the padding that it would have remembered, and when some layers had read already."""
    model, tokens = make(options), ids(2, 6)
    cache = model.new_cache(2, 6)
    with torch.no_grad():
        with pytest.raises(IndexError):
            model(tokens + VOCAB, key_padding=torch.tensor([[2, 6], [0, 6]]), cache=cache)
        with pytest.raises(InvalidInputError, match="max_length is 6"):
            model(ids(2, 7), key_padding=torch.tensor([[2, 7], [0, 7]]), cache=cache)
        model(tokens[:, :4], cache=cache)
        cache.layers[1].max_length = 4
        with pytest.raises(InvalidInputError, match="max_length is 4"):
            model(tokens[:, 4:], cache=cache)
        cache.layers[1].max_length = 6
        assert [layer.length for layer in cache.layers] == [4, 4]
        found = model(tokens[:, 4:], cache=cache)
    torch.testing.assert_close(found, model(tokens)[:, 4:], rtol=0, atol=1e-12)


def test_beams_go_on_from_the_rows_they_were_reordered_to():
    model = make({})
    tokens, rows = ids(3, 6), torch.tensor([2, 0, 0])
    cache = model.new_cache(3, 7)
    with torch.no_grad():
        model(tokens, cache=cache)
        cache.reorder(rows)
        found = model(ids(3, 1), cache=cache)
    expected = model(torch.cat([tokens[rows], ids(3, 1)], dim=1))[:, -1:]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


# --- training


@each_variant
def test_training_lowers_the_loss(options):
    model = make(options, torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    tokens = ids(4, 17)
    losses = []
    for _ in range(15):
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@each_variant
def test_every_parameter_gets_a_gradient(options):
    model = make(options)
    model(ids(2, 9)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@each_variant
def test_bfloat16_runs_and_is_near_float32(options):
    exact, rough = make(options, torch.float32), make(options, torch.bfloat16)
    tokens = ids(2, 20)
    logits = rough(tokens)
    assert logits.dtype == torch.bfloat16
    distance = (logits.float() - exact(tokens)).norm() / exact(tokens).norm()
    assert distance < 0.05


@each_arm
def test_autocast_runs_forward_and_backward(options):
    model = make(options, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(ids(2, 10))
    assert logits.dtype == torch.bfloat16
    logits.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


@each_arm
def test_autocast_decodes_through_a_cache(options):
    model = make(options, torch.float32)
    tokens = ids(2, 10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = steps(model, tokens, [6, 1, 1, 2]), model(tokens)
    assert found.dtype == torch.bfloat16
    assert (found - expected).norm() / expected.norm() < 0.05


@pytest.mark.parametrize(
    ("options", "backend"),
    [({}, "eager"), *((options, "aot_eager") for options in VARIANTS.values())],
    ids=["stickbreaking, not differentiated ahead", *VARIANTS],
)
def test_the_whole_model_is_one_graph(options, backend):
    torch._dynamo.reset()  # or the arms count as recompilations of one model
    model = make(options, torch.float32, num_layers=1)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    tokens = ids(2, 11)
    found, expected = compiled(tokens), model(tokens)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    wanted = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
    gradients = torch.autograd.grad(found.square().sum(), list(model.parameters()))
    for one, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["stickbreaking", "rope", "fox"])
def test_padding_stays_in_the_graph(name):
    torch._dynamo.reset()
    model = make(ARMS[name], torch.float32, num_layers=1)
    padding = torch.tensor([[0, 7], [3, 9]])
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    found = compiled(ids(2, 9), key_padding=padding)
    torch.testing.assert_close(found, model(ids(2, 9), key_padding=padding), rtol=0, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
@each_variant
def test_an_accelerator_gives_the_same_logits(options):
    model, tokens = make(options, torch.float32, head_dim=16), ids(2, 300)
    expected = model(tokens)
    model, tokens = model.cuda(), tokens.cuda()
    with torch.no_grad():
        found = model(tokens)
        cached = steps(model, tokens, [200, 1, 98, 1])
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-3)
    torch.testing.assert_close(cached.cpu(), expected, rtol=0, atol=1e-3)


# --- keeping and sending


@each_variant
def test_saved_weights_make_the_same_model(options):
    model = make(options)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = CausalLM(model.config).double()
    assert not torch.equal(other(ids(1, 9)), model(ids(1, 9)))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(ids(1, 9)), model(ids(1, 9)))


@each_variant
def test_copies_are_equal_and_independent(options):
    model = make(options)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(ids(1, 9)), model(ids(1, 9)))
        with torch.no_grad():
            next(other.parameters()).add_(1.0)
        assert not torch.equal(other(ids(1, 9)), model(ids(1, 9)))


def test_tied_matrices_stay_tied_in_copies():
    other = copy.deepcopy(make({"tie_embeddings": True}))
    assert other.lm_head.weight is other.embedding.weight


# --- what is refused


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"attn": "softmax"}, "attn: expected one of stickbreaking, rope"),
        ({"remainder": "rest"}, "remainder"),
        ({"backend": "cuda"}, "backend"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"num_layers": 0}, "num_layers"),
        ({"mlp_size": 0}, "mlp_size"),
        ({"num_heads": 0}, "num_heads"),
        ({"num_heads": 5}, "hidden_size: expected a multiple of num_heads=5"),
        ({"num_heads": 4, "num_kv_heads": 3}, "num_heads: expected a multiple"),
        ({"attn": "rope", "head_dim": 7}, "even"),
        ({"add_rope": True, "head_dim": 7}, "even"),
        ({"window": 0}, "window"),
        ({"attn": "swa"}, 'window: attn="swa" needs one'),
        ({"attn": "rope", "window": 3}, "window: only"),
        ({"attn": "rope", "remainder": "bias"}, "remainder: only"),
        ({"attn": "fox", "head_norm": True}, "head_norm: only"),
        ({"attn": "alibi", "attend_current": True}, "attend_current: only"),
        ({"attn": "nope", "add_rope": True}, "add_rope: only"),
        ({"rope_theta": 0.0}, "rope_theta"),
        ({"norm_eps": -1e-5}, "norm_eps"),
        ({"norm_eps": float("nan")}, "norm_eps"),
        ({"skip_tol": 1.0}, "skip_tol"),
        ({"skip_tol": "loose"}, "skip_tol"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(options, word):
    with pytest.raises(InvalidInputError, match=word):
        ModelConfig(**({"vocab_size": VOCAB} | options))


def test_configurations_are_frozen_and_reach_the_layers():
    config = ModelConfig(vocab_size=VOCAB, window=7, skip_tol=0.01, backend="naive")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.window = 8
    layer = CausalLM(config).blocks[1].attention
    assert isinstance(layer, StickBreakingAttention)
    assert (layer.window, layer.skip_tol, layer.backend) == (7, 0.01, "naive")


def test_inputs_that_do_not_fit_are_refused():
    model = make({})
    bounds = torch.tensor([0, 3, 6], dtype=torch.int32)
    with pytest.raises(InvalidInputError, match="input_ids"):
        model(ids(6))
    with pytest.raises(InvalidInputError, match="one row, got a batch of 2"):
        model(ids(2, 6), cu_seqlens=bounds)
    with pytest.raises(InvalidInputError, match="no padding"):
        model(ids(1, 6), cu_seqlens=bounds, key_padding=torch.tensor([[0, 6]]))
    with torch.no_grad(), pytest.raises(UnsupportedError, match="packed sequences"):
        model(ids(1, 6), cu_seqlens=bounds, cache=model.new_cache(1, 6))
    with torch.no_grad(), pytest.raises(InvalidInputError, match="batch of 1, got 2"):
        model(ids(2, 6), cache=model.new_cache(1, 6))
    with pytest.raises(UnsupportedError, match="no_grad"):
        model(ids(1, 6), cache=model.new_cache(1, 6))
    with pytest.raises(InvalidInputError, match="input_ids: expected integers"):
        model(ids(1, 6).double())
    with pytest.raises(InvalidInputError, match="input_ids"):
        model.generate(ids(6), 3)
    with pytest.raises(InvalidInputError, match="generate"):
        model.generate(ids(1, 0), 3)
    with pytest.raises(InvalidInputError, match="generate"):
        model.generate(ids(1, 2), 3, temperature=-1.0)
    with pytest.raises(InvalidInputError, match="generate"):
        model.generate(ids(1, 2), 3, temperature=float("nan"))


@each_arm
@pytest.mark.parametrize(
    "padding",
    [torch.ones(2, 5, dtype=torch.bool), torch.tensor([[0, 6]]), torch.ones(2, 2)],
    ids=["short mask", "one row", "floats"],
)
def test_padding_that_does_not_fit_is_refused_by_every_arm(options, padding):
    with pytest.raises(InvalidInputError, match="key_padding"):
        make(options)(ids(2, 6), key_padding=padding)
