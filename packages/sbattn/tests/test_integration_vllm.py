"""The plug-in in vLLM's own engine, in a process of its own, and what it refuses."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch

from sbattn.errors import MissingExtraError, UnsupportedError
from sbattn.integrations import vllm as plugin

HAS_VLLM = importlib.util.find_spec("vllm") is not None
without_vllm = pytest.mark.skipif(HAS_VLLM, reason="vllm is installed")


def with_vllm(test):
    needed = pytest.mark.skipif(not HAS_VLLM, reason="vllm is not installed")
    return pytest.mark.vllm(needed(test))


@without_vllm
def test_without_vllm_only_use_says_that_it_is_missing():
    with pytest.raises(MissingExtraError, match=r"sbattn\[vllm\]"):
        plugin.register()
    with pytest.raises(MissingExtraError, match=r"sbattn\[vllm\]"):
        _ = plugin.StickBreakingBackend


def test_other_names_are_not_there():
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = plugin.Nothing


# The engine

VOCAB = 64
PROMPT_LENGTHS = (5, 40, 17, 1, 33)
NEW_TOKENS = 40
ENGINE = """
import json, sys
from vllm import LLM, SamplingParams

folder, options, prompts, new_tokens = json.loads(sys.argv[1])
llm = LLM(folder, skip_tokenizer_init=True, dtype="float32", max_model_len=128,
          attention_backend="CUSTOM", disable_log_stats=True, **options)
sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
rounds = [
    [list(answer.outputs[0].token_ids) for answer in llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)]
    for _ in range(2)  # the second finds prefixes of its prompts in the cache
]
layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
print("RESULT", json.dumps([rounds, [type(layer.impl).__name__ for layer in layers]]))
"""


def generate_in_vllm(folder, prompts, *, on_cpu="1", **options):
    """Greedy tokens of two rounds over the prompts, and the layers' implementations."""
    done = subprocess.run(
        [sys.executable, "-c", ENGINE, json.dumps([str(folder), options, prompts, NEW_TOKENS])],
        env={
            **os.environ,
            plugin.CPU_VARIABLE: on_cpu,
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
        },
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    results = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert results, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(results[0].removeprefix("RESULT "))


def make_model(kind, **settings):
    import transformers

    from sbattn.integrations.transformers import convert

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    return convert(model, name=f"stickbreaking-in-vllm-{len(settings)}", **settings).eval()


def prompts():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in PROMPT_LENGTHS]


def generate_in_transformers(model):
    return [
        model.generate(
            torch.tensor([prompt]),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        for prompt in prompts()
    ]


@with_vllm
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "settings", "options"),
    [
        # Prompts in chunks of at most 24 tokens, beside requests that are decoding.
        ("Llama", {}, {"max_num_batched_tokens": 24, "enforce_eager": True}),
        ("Llama", {"remainder": "value"}, {"enforce_eager": False}),
        # A layer of vLLM inside the model of transformers.
        ("SmolLM3", {"remainder": "value"}, {"max_num_batched_tokens": 24, "enforce_eager": True}),
        (
            "Qwen3",
            {"attend_current": True, "remainder": "value"},
            {"enforce_eager": True, "enable_prefix_caching": False},
        ),
    ],
)
def test_vllm_and_transformers_generate_the_same_tokens(tmp_path, kind, settings, options):
    model = make_model(kind, **settings)
    model.save_pretrained(tmp_path)
    rounds, layers = generate_in_vllm(tmp_path, prompts(), block_size=16, **options)
    assert set(layers) == {"StickBreakingImpl"}
    want = generate_in_transformers(model)
    assert rounds[0] == want
    assert rounds[1] == want


@with_vllm
@pytest.mark.slow
def test_on_a_cpu_vllm_keeps_its_own_attention_unless_told(tmp_path):
    model = make_model("Llama")
    model.save_pretrained(tmp_path)
    rounds, layers = generate_in_vllm(tmp_path, prompts(), on_cpu="0", enforce_eager=True)
    assert set(layers) == {"CPUAttentionBackendImpl"}
    assert rounds[0] != generate_in_transformers(model)


# Registration and refusals


@pytest.fixture
def registry():
    from vllm.v1.attention.backends import registry

    enum = registry.AttentionBackendEnum
    yield registry
    enum.CUSTOM.clear_override()
    enum.CPU_ATTN.clear_override()


@with_vllm
def test_registering_names_the_backend_and_selects_nothing(registry):
    plugin.register()
    plugin.register()
    enum = registry.AttentionBackendEnum
    assert enum.CUSTOM.get_class() is plugin.StickBreakingBackend
    assert not any(member.is_overridden() for member in enum if member is not enum.CUSTOM)


@with_vllm
def test_on_a_cpu_the_variable_puts_it_in_the_place_of_vllms_own(registry, monkeypatch):
    monkeypatch.setenv(plugin.CPU_VARIABLE, "1")
    plugin.register()
    assert registry.AttentionBackendEnum.CPU_ATTN.get_class() is plugin.StickBreakingBackend


@with_vllm
def test_another_plug_in_keeps_the_backend_that_it_has_taken(registry, caplog):
    registry.register_backend(registry.AttentionBackendEnum.CUSTOM, "another.plugin.Backend")
    plugin.register()
    assert registry.AttentionBackendEnum.CUSTOM.get_path() == "another.plugin.Backend"
    assert "belongs to another.plugin.Backend already" in caplog.text


@with_vllm
@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"alibi_slopes": [0.5, 0.5]}, "ALiBi"),
        ({"sliding_window": 8}, "a sliding window"),
        ({"logits_soft_cap": 30.0}, "a cap on logits"),
        ({"kv_cache_dtype": "fp8"}, "a KV cache of fp8"),
        ({"attn_type": "encoder_only"}, "encoder_only attention"),
        ({"kv_sharing_target_layer_name": "layer.0"}, "a cache shared between layers"),
        ({"sinks": torch.zeros(2)}, "sinks"),
    ],
)
def test_layers_that_want_something_else_are_refused(options, named):
    make = plugin.StickBreakingBackend.get_impl_cls()
    assert make(2, 16, 0.25, 1).num_kv_heads == 1
    with pytest.raises(UnsupportedError, match=named):
        make(2, 16, 0.25, 1, **options)


@with_vllm
def test_vllms_own_check_of_backends_sees_what_is_unsupported():
    plain = {
        "head_size": 64, "dtype": torch.bfloat16, "kv_cache_dtype": "auto", "block_size": 16,
        "use_mla": False, "has_sink": False, "use_sparse": False, "use_mm_prefix": False,
        "use_per_head_quant_scales": False, "device_capability": None, "attn_type": "decoder",
    }  # fmt: skip
    check = plugin.StickBreakingBackend.validate_configuration
    assert check(**plain) == []
    for change in (
        {"has_sliding_window": True},
        {"kv_cache_dtype": "fp8"},
        {"head_size": 512},
        {"attn_type": "encoder"},
        {"has_sink": True},
        {"use_non_causal": True},
    ):
        assert len(check(**{**plain, **change})) == 1, change


@with_vllm
def test_padding_is_written_to_the_page_that_no_request_has():
    layer = plugin.StickBreakingBackend.get_impl_cls()(2, 8, 1.0, 1)
    cache = torch.zeros(4, 1, 16, 16)
    key, value = torch.ones(3, 1, 8), torch.full((3, 1, 8), 2.0)
    layer.do_kv_cache_update(None, key, value, cache, torch.tensor([17, -1, 63]))
    written = {tuple(place) for place in cache[:, 0].any(-1).nonzero().tolist()}
    assert written == {(1, 1), (0, 0), (3, 15)}
    assert torch.equal(cache[1, 0, 1], torch.tensor([1.0] * 8 + [2.0] * 8))
