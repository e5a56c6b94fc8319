"""Stock transformers models, random and tiny, with stick-breaking attention registered."""

import warnings

import pytest
import torch

from sbattn import naive
from sbattn.errors import InvalidInputError, UnsupportedError
from sbattn.visibility import Visibility

transformers = pytest.importorskip("transformers")

from sbattn.integrations.forward import Settings, attend  # noqa: E402, after the check above
from sbattn.integrations.transformers import (  # noqa: E402, likewise
    applies_rotary,
    convert,
    register,
    without_rotary,
)

VOCAB = 64
MODELS = {
    "SmolLM3": (transformers.SmolLM3Config, transformers.SmolLM3ForCausalLM),
    "Llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "Qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
}
register("stickbreaking")
register("stickbreaking-value", remainder="value")
register("stickbreaking-current", attend_current=True)


def make_config(kind="SmolLM3", **changes):
    size = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.2,
    }
    return without_rotary(MODELS[kind][0](**{**size, **changes}))


def make_model(kind="SmolLM3", implementation="stickbreaking", seed=0, **changes):
    torch.manual_seed(seed)
    config = make_config(kind, **changes)
    return MODELS[kind][1]._from_config(config, attn_implementation=implementation).eval()


def tokens(*shape, seed=0):
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def logits(model, ids, **kwargs):
    with torch.no_grad():
        return model(ids, **kwargs).logits


def loop_logits(model, ids, cache, first=5):
    """Logits of a prefill of `first` tokens, a chunk of two, and then one token at a time."""
    steps = [slice(0, first), slice(first, first + 2)]
    steps += [slice(t, t + 1) for t in range(first + 2, ids.shape[1])]
    with torch.no_grad():
        return torch.cat(
            [model(ids[:, step], past_key_values=cache).logits for step in steps], dim=1
        )


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture
def record(monkeypatch):
    """A registration of the real function that keeps what goes in and comes out."""
    calls = []

    def make(name, settings):
        def recorded(module, query, key, value, mask, **kwargs):
            out, none = attend(module, query, key, value, mask, settings=settings, **kwargs)
            calls.append((module, query, key, value, out))
            return out, none

        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

        AttentionInterface.register(name, recorded)
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS["stickbreaking"])
        return calls

    return make


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("attend_current", [False, True])
@pytest.mark.parametrize("remainder", ["none", "value"])
def test_layers_compute_the_definition_on_the_models_own_projections(
    record, kind, attend_current, remainder
):
    name = f"recorded-{kind}-{attend_current}-{remainder}"
    calls = record(name, Settings(attend_current, remainder))
    logits(make_model(kind, name).float(), tokens(2, 19))
    assert len(calls) == 2
    for module, query, key, value, out in calls:
        q, k, v = (x.double() for x in (query, key, value))
        want, log_rem = naive.naive_attention(
            q, k, v, scale=module.scaling, visibility=Visibility(0, attend_current)
        )
        if remainder == "value":
            want = want + log_rem.exp()[..., None] * v.repeat_interleave(2, dim=1)
        assert out.shape == (2, 19, 4, 8)
        torch.testing.assert_close(out.double(), want.transpose(1, 2), atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("kind", ["SmolLM3", "Llama"])
def test_queries_and_keys_reach_the_attention_unrotated(record, kind):
    calls = record(f"unrotated-{kind}", Settings())
    model = make_model(kind, f"unrotated-{kind}")
    seen = {}
    for name in ("q_proj", "k_proj"):
        model.model.layers[0].self_attn.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, out, name=name: seen.update({name: out})
        )
    positions = torch.arange(1000, 1019)[None]
    with torch.no_grad():
        model.model(inputs_embeds=torch.randn(1, 19, 32), position_ids=positions, use_cache=True)
    _, query, key, _, _ = calls[0]
    assert torch.equal(query.transpose(1, 2).flatten(2), seen["q_proj"])
    assert torch.equal(key.transpose(1, 2).flatten(2), seen["k_proj"])


@pytest.mark.parametrize("kind", MODELS)
def test_switching_the_rotation_off_in_a_model_is_the_same_as_in_its_configuration(kind):
    config = MODELS[kind][0](**make_config(kind).to_dict())
    rotating = MODELS[kind][0]().rope_parameters
    config.rope_parameters, config.no_rope_layers = dict(rotating), [1, 1]
    assert applies_rotary(config)
    model = MODELS[kind][1]._from_config(config, attn_implementation="sdpa").eval()
    rotated = logits(model, tokens(1, 9))
    without_rotary(model)
    assert not applies_rotary(model.config)
    fresh = MODELS[kind][1]._from_config(make_config(kind), attn_implementation="sdpa").eval()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(logits(model, tokens(1, 9)), logits(fresh, tokens(1, 9)))
    assert (logits(model, tokens(1, 9)) - rotated).abs().max() > 1e-3


def test_partial_and_per_layer_rotations_are_switched_off_too():
    size = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
    }  # fmt: skip
    partial = transformers.StableLmConfig(**size)
    nested = transformers.Gemma3TextConfig(**size)
    for config in (partial, nested):
        assert applies_rotary(config)
        model = transformers.AutoModelForCausalLM.from_config(config)
        without_rotary(model)
        assert not applies_rotary(config)
        frequencies = [
            buffer for name, buffer in model.named_buffers() if name.endswith("inv_freq")
        ]
        assert frequencies
        assert all(buffer.abs().max() < 1e-37 for buffer in frequencies)


def test_a_rotating_model_is_warned_about_and_one_without_is_not(recwarn):
    config = MODELS["Llama"][0](**{**make_config("Llama").to_dict(), "rope_parameters": None})
    rotating = MODELS["Llama"][1]._from_config(config, attn_implementation="stickbreaking")
    with pytest.warns(UserWarning, match="applies rotary position embedding"):
        logits(rotating, tokens(1, 4))
    recwarn.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits(make_model("Llama"), tokens(1, 4))


# Caches


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("implementation", ["stickbreaking", "stickbreaking-value"])
@pytest.mark.parametrize("static", [False, True])
def test_cached_logits_equal_uncached_ones(kind, implementation, static):
    model = make_model(kind, implementation)
    ids = tokens(2, 23)
    cache = (
        transformers.StaticCache(config=model.config, max_cache_len=40)
        if static
        else transformers.DynamicCache(config=model.config)
    )
    cached = loop_logits(model, ids, cache)
    torch.testing.assert_close(cached, logits(model, ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["stickbreaking-value", "stickbreaking-current"])
def test_left_padding_changes_nothing_with_either_cache(implementation):
    model = make_model(implementation=implementation)
    ids, pads = tokens(2, 17), (0, 6)
    alone = [logits(model, ids[row : row + 1, pad:]) for row, pad in enumerate(pads)]
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    for cache in (
        transformers.DynamicCache(config=model.config),
        transformers.StaticCache(config=model.config, max_cache_len=30),
    ):
        steps = [slice(0, 9), *(slice(t, t + 1) for t in range(9, 17))]
        with torch.no_grad():
            together = torch.cat(
                [
                    model(
                        ids[:, step], attention_mask=mask[:, : step.stop], past_key_values=cache
                    ).logits
                    for step in steps
                ],
                dim=1,
            )
        for row, pad in enumerate(pads):
            torch.testing.assert_close(together[row, pad:], alone[row][0], atol=1e-5, rtol=1e-5)


def test_right_padding_changes_nothing(model):
    ids = tokens(2, 17)
    mask = torch.ones_like(ids)
    mask[1, 11:] = 0
    together = logits(model, ids, attention_mask=mask)
    torch.testing.assert_close(together[1, :11], logits(model, ids[1:, :11])[0])
    torch.testing.assert_close(together[:1], logits(model, ids[:1]))


@pytest.mark.parametrize("static", [False, True])
def test_a_sliding_window_sees_as_far_with_its_short_cache_as_without(static):
    config = without_rotary(
        transformers.MistralConfig(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, sliding_window=6, initializer_range=0.2,
        )
    )  # fmt: skip
    model = transformers.MistralForCausalLM._from_config(
        config, attn_implementation="stickbreaking"
    ).eval()
    ids = tokens(2, 23)
    whole = logits(model, ids)
    cache = (
        transformers.StaticCache(config=config, max_cache_len=30)
        if static
        else transformers.DynamicCache(config=config)
    )
    torch.testing.assert_close(loop_logits(model, ids, cache, 4), whole, atol=1e-5, rtol=1e-5)
    # Two layers reach 2 · (6 - 1) tokens back, and no farther.
    changed = ids.clone()
    changed[:, 11] = (ids[:, 11] + 7) % VOCAB
    moved = (logits(model, changed) - whole).abs().amax(-1)
    assert (moved[:, 11:22] > 0).all()
    assert torch.equal(moved[:, 22], torch.zeros(2))


# Generation


def test_greedy_generation_is_the_argmax_of_uncached_logits(model):
    ids = tokens(1, 5)
    got = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)
    for _ in range(12):
        ids = torch.cat([ids, logits(model, ids)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(got, ids)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("implementation", ["stickbreaking", "stickbreaking-value"])
def test_a_left_padded_batch_generates_what_each_prompt_generates_alone(static, implementation):
    model = make_model(implementation=implementation)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    if static:
        options |= {"cache_implementation": "static", "disable_compile": True}
    prompts = [tokens(1, n, seed=n) for n in (3, 9, 6)]
    alone = [model.generate(prompt, **options)[0, prompt.shape[1] :] for prompt in prompts]
    ids = torch.zeros(3, 9, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, -prompt.shape[1] :], mask[row, -prompt.shape[1] :] = prompt[0], 1
    together = model.generate(ids, attention_mask=mask, **options)[:, 9:]
    assert torch.equal(together, torch.stack(alone))


def test_sampling_draws_the_same_tokens_with_and_without_a_cache(model):
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        drawn.append(
            model.generate(
                tokens(2, 5), max_new_tokens=10, do_sample=True, top_k=8, use_cache=use_cache
            )
        )
    assert torch.equal(*drawn)


def test_beam_search_finds_the_same_with_and_without_a_cache(model):
    found = [
        model.generate(
            tokens(2, 5),
            max_new_tokens=8,
            do_sample=False,
            num_beams=3,
            eos_token_id=None,
            use_cache=use_cache,
        )
        for use_cache in (True, False)
    ]
    assert torch.equal(*found)


# Packing


@pytest.mark.parametrize("implementation", ["stickbreaking", "stickbreaking-value"])
def test_packed_sequences_are_as_if_apart(implementation):
    model = make_model(implementation=implementation)
    rows = [[4, 1, 8], [6, 7]]
    ids = tokens(2, 13)
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])
    packed = logits(model, ids, position_ids=positions, use_cache=False)
    for row, lengths in enumerate(rows):
        start = 0
        for n in lengths:
            apart = logits(model, ids[row : row + 1, start : start + n])
            torch.testing.assert_close(packed[row, start : start + n], apart[0])
            start += n


def test_the_flattening_collator_packs(model):
    collate = transformers.DataCollatorWithFlattening(
        return_flash_attn_kwargs=True, return_tensors="pt"
    )
    sequences = [tokens(n, seed=n).tolist() for n in (4, 9, 2)]
    batch = dict(collate([{"input_ids": ids} for ids in sequences]))
    with torch.no_grad():
        packed = model(**batch, use_cache=False)
        losses = torch.stack(
            [
                model(torch.tensor([ids]), labels=torch.tensor([ids])).loss * (len(ids) - 1)
                for ids in sequences
            ]
        )
    torch.testing.assert_close(packed.loss, losses.sum() / sum(len(s) - 1 for s in sequences))
    start = 0
    for ids in sequences:
        apart = logits(model, torch.tensor([ids]))
        torch.testing.assert_close(packed.logits[:, start : start + len(ids)], apart)
        start += len(ids)


def test_packed_sequences_beside_a_cache_are_refused_instead_of_mixed(model):
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    with pytest.raises(InvalidInputError, match="pass use_cache=False"):
        logits(model, tokens(1, 6), position_ids=positions, use_cache=True)


def test_packed_and_padded_at_once_is_refused(model):
    offsets = torch.tensor([0, 3, 6], dtype=torch.int32)
    mask = torch.tensor([[1, 1, 1, 1, 1, 0]])
    with pytest.raises(UnsupportedError, match="padded or packed, not both"):
        logits(model, tokens(1, 6), attention_mask=mask, cu_seq_lens_q=offsets)


# Training, saving, compiling


def checkpoint(model):
    """Trade activations for computation, under the name that the release has for it."""
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_lowers_the_loss_and_reaches_every_weight(kind, checkpointing):
    model = make_model(kind, initializer_range=0.05).train()
    if checkpointing:
        checkpoint(model)
    ids = tokens(4, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model(ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1


def test_checkpointed_gradients_are_the_same(model):
    ids, grads = tokens(2, 16), []
    for checkpointing in (False, True):
        twin = make_model().train()
        if checkpointing:
            checkpoint(twin)
        twin(ids, labels=ids, use_cache=False).loss.backward()
        grads.append([p.grad for p in twin.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))


def test_a_saved_model_loads_with_its_settings_and_refuses_others(tmp_path):
    model = MODELS["Llama"][1](MODELS["Llama"][0](**make_config("Llama").to_dict())).eval()
    convert(model, name="stickbreaking-value", remainder="value")
    ids = tokens(2, 9)
    before = logits(model, ids)
    model.save_pretrained(tmp_path)

    def load(name):
        return transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name)

    loaded = load("stickbreaking-value")
    assert not applies_rotary(loaded.config)
    assert torch.equal(logits(loaded, ids), before)
    with pytest.raises(InvalidInputError, match=r"config\.stickbreaking: the model is for"):
        logits(load("stickbreaking"), ids)


def test_converting_keeps_the_weights_and_changes_attention_and_rotation():
    config = MODELS["Qwen3"][0](**{**make_config("Qwen3").to_dict(), "rope_parameters": None})
    model = MODELS["Qwen3"][1](config).eval()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    softmax = logits(model, tokens(1, 9))
    assert convert(model) is model
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert (logits(model, tokens(1, 9)) - softmax).abs().max() > 1e-3
    fresh = make_model("Qwen3")
    fresh.load_state_dict(weights)
    assert torch.equal(logits(model, tokens(1, 9)), logits(fresh, tokens(1, 9)))


def test_a_compiled_model_computes_the_same_in_one_graph():
    torch._dynamo.reset()
    model = make_model(num_hidden_layers=1)
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    plain = logits(model, ids, use_cache=False)
    torch.testing.assert_close(logits(compiled, ids, use_cache=False), plain)
    padded = logits(model, ids, attention_mask=mask, use_cache=False)[0, 3:]
    got = logits(compiled, ids, attention_mask=mask, use_cache=False)[0, 3:]
    torch.testing.assert_close(got, padded)


def test_a_compiled_model_fails_on_packed_positions_instead_of_mixing_sequences():
    torch._dynamo.reset()
    model = make_model(num_hidden_layers=1)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    with pytest.raises(RuntimeError, match="cu_seq_lens_q"):
        logits(compiled, tokens(1, 6), position_ids=positions, use_cache=False)


@pytest.mark.parametrize("implementation", ["stickbreaking", "stickbreaking-value"])
def test_mixed_precision_trains_and_decodes_close_to_full_precision(implementation):
    model, ids = make_model(implementation=implementation), tokens(2, 16)
    plain = logits(model, ids)
    with torch.autocast("cpu", torch.bfloat16):
        cache = transformers.DynamicCache(config=model.config)
        assert (loop_logits(model, ids, cache) - plain).norm() < 0.03 * plain.norm()
        loss = model.train()(ids, labels=ids, use_cache=False).loss
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    half = make_model(implementation=implementation).bfloat16()
    assert (logits(half, ids).float() - plain).norm() < 0.03 * plain.norm()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # it reads settings that transformers deprecates
def test_the_trainer_of_trl_fine_tunes(tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{str(n): n for n in range(3, VOCAB)}}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    lengths = (12, 7, 9, 12)  # padded on the right by the trainer
    data = datasets.Dataset.from_dict({"input_ids": [tokens(n, seed=n).tolist() for n in lengths]})
    trainer = trl.SFTTrainer(
        model=make_model(initializer_range=0.05).train(),
        args=trl.SFTConfig(
            str(tmp_path),
            max_steps=10,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            use_cpu=True,
            bf16=False,
            report_to=[],
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=data,
        processing_class=tokenizer,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 1


# Refusals


def test_dropout_is_refused_in_training_and_ignored_in_evaluation():
    model = make_model(attention_dropout=0.1)
    assert logits(model, tokens(1, 4)).isfinite().all()
    with pytest.raises(UnsupportedError, match=r"dropout of attention weights \(0\.1\)"):
        model.train()(tokens(1, 4))


def test_masks_of_ones_own_are_refused(model):
    with pytest.raises(UnsupportedError, match=r"attention_mask of shape \(1, 1, 4, 4\)"):
        logits(model, tokens(1, 4), attention_mask=torch.ones(1, 1, 4, 4, dtype=torch.bool))


def test_padding_between_tokens_is_refused(model):
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 1, 1]])
    with pytest.raises(InvalidInputError, match="row 1 has padding between"):
        logits(model, tokens(2, 5), attention_mask=mask)


def test_a_mask_of_the_new_tokens_alone_is_refused(model):
    cache = transformers.DynamicCache(config=model.config)
    logits(model, tokens(1, 5), past_key_values=cache)
    with pytest.raises(InvalidInputError, match="each of the 6 tokens so far"):
        logits(model, tokens(1, 1), past_key_values=cache, attention_mask=torch.ones(1, 1))


def test_bidirectional_models_are_refused():
    config = transformers.BertConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4,
    )  # fmt: skip
    model = transformers.BertModel._from_config(config, attn_implementation="stickbreaking")
    with pytest.raises(UnsupportedError, match="a token sees a later one"):
        model(tokens(1, 5))


def test_non_causal_layers_are_refused():
    layer = make_model().model.layers[0].self_attn
    layer.is_causal = False
    q, k = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8)
    with pytest.raises(UnsupportedError, match="SmolLM3Attention is not causal"):
        attend(layer, q, k, k, None, settings=Settings())


def test_capped_logits_and_sinks_are_refused():
    size = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
    }  # fmt: skip
    gemma = without_rotary(transformers.Gemma2Config(**size))
    oss = without_rotary(
        transformers.GptOssConfig(**size, num_local_experts=2, num_experts_per_tok=1)
    )
    for config, argument in ((gemma, "softcap"), (oss, "s_aux")):
        model = transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation="stickbreaking"
        )
        with pytest.raises(UnsupportedError, match=f"passes {argument}"):
            logits(model, tokens(1, 5))


def test_weights_cannot_be_asked_for(model):
    with pytest.raises((UnsupportedError, ValueError), match="output_attentions"):
        logits(model, tokens(1, 5), output_attentions=True)


@pytest.mark.parametrize("name", ["", "a/b", "a|b", "eager", "sdpa", "flash_attention_2"])
def test_names_that_mean_something_else_are_refused(name):
    with pytest.raises(InvalidInputError, match="name"):
        register(name)


def test_a_name_has_one_meaning():
    register("stickbreaking")
    with pytest.raises(InvalidInputError, match="choose another name"):
        register("stickbreaking", attend_current=True)


def test_unknown_remainders_are_refused():
    with pytest.raises(InvalidInputError, match='expected "none" or "value", got \'bias\''):
        register("stickbreaking-bias", remainder="bias")


def test_models_without_a_switchable_rotation_are_refused_untouched():
    config = transformers.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=1, n_head=4)
    with pytest.raises(UnsupportedError, match="no rope_parameters"):
        without_rotary(config)
