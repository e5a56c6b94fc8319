"""What the transformers engine does beyond the common contract."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from decapod.lm import (
    Request,
    RequestError,
    SamplingParams,
    TransformersEngine,
    build_model,
    sample_requests,
)
from decapod.lm.waves import batches, share_prefixes

VOCAB = 40


@pytest.fixture(scope="module")
def model() -> transformers.LlamaForCausalLM:
    return build_model(VOCAB, max_positions=128, init_std=0.1)


@contextmanager
def forward_shapes(model: torch.nn.Module) -> Iterator[list[tuple[int, int]]]:
    """(rows, tokens) of each forward pass."""
    shapes: list[tuple[int, int]] = []

    def note(_module, _args, kwargs) -> None:
        shapes.append(tuple(kwargs["input_ids"].shape))

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    yield shapes
    handle.remove()


def random_prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(3, VOCAB, length).tolist())


def token_ids(answers: list) -> list[tuple[int, ...]]:
    return [answer.token_ids for answer in answers]


# --- sharing --------------------------------------------------------------------------------------


def test_samples_of_one_prompt_pay_for_it_once_even_over_several_batches(model) -> None:
    params = SamplingParams(5, ignore_eos=True)
    requests = sample_requests([random_prompt(60)], params, n=16)
    engine = TransformersEngine(model, max_batch_size=4)
    with forward_shapes(model) as shapes:
        engine.generate(requests)
    assert shapes == [(1, 59), *[(4, 1)] * 20]


def test_states_along_a_trajectory_are_computed_with_their_longest(model) -> None:
    trajectory = random_prompt(50)
    states = [trajectory[:end] for end in (1, 9, 17, 30, 31, 50)]
    requests = sample_requests(states, SamplingParams(6, ignore_eos=True), seed=4, n=3)
    engine = TransformersEngine(model)
    with forward_shapes(model) as shapes:
        together = engine.generate(requests)
    assert shapes == [(1, 49), *[(18, 1)] * 6]
    separate = [engine.generate([request])[0] for request in requests]
    assert token_ids(together) == token_ids(separate)
    for a, b in zip(together, separate, strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


@pytest.mark.parametrize("rows", [2, 64])
def test_tokens_that_need_no_computation_are_counted(model, rows) -> None:
    # Contexts, without the last token: 4 twice, 9 twice and 6 once, beside 9; computed are 9 and 6.
    shared, other = random_prompt(10), random_prompt(7, seed=1)
    assert other[0] != shared[0]
    engine = TransformersEngine(model, max_batch_size=rows)
    params = SamplingParams(3, ignore_eos=True)
    requests = sample_requests([shared[:5], shared], params, n=2) + sample_requests([other], params)
    engine.generate(requests)
    assert engine.cached_prompt_tokens == (4 + 4 + 9 + 9 + 6) - (9 + 6)
    engine.generate(sample_requests([other, (5,)], params))  # nothing to share
    assert engine.cached_prompt_tokens == 17


def test_prompts_of_one_token_need_no_prefill(model) -> None:
    with forward_shapes(model) as shapes:
        TransformersEngine(model).generate(
            sample_requests([[5], [6]], SamplingParams(3, ignore_eos=True))
        )
    assert shapes == [(2, 1)] * 3


@given(st.lists(st.lists(st.integers(0, 2), max_size=5).map(tuple), max_size=15))
def test_every_context_is_a_prefix_of_its_root_and_no_root_of_another(contexts) -> None:
    shared = share_prefixes(contexts)
    assert sorted(i for _, users in shared for i in users) == list(range(len(contexts)))
    for root, users in shared:
        assert all(root[: len(contexts[i])] == contexts[i] for i in users)
    roots = [root for root, _ in shared]
    for i, a in enumerate(roots):
        assert not any(b[: len(a)] == a for j, b in enumerate(roots) if j != i)


# --- batches --------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(0, 50), max_size=30).map(sorted),
    st.integers(1, 8),
    st.integers(1, 200),
)
def test_runs_keep_the_order_and_both_limits(lengths, max_rows, max_tokens) -> None:
    runs = batches(lengths, max_rows, max_tokens)
    assert [i for run in runs for i in run] == list(range(len(lengths)))
    for run in runs:
        assert 1 <= len(run) <= max_rows
        assert len(run) == 1 or len(run) * max(lengths[i] for i in run) <= max_tokens


def test_answers_do_not_depend_on_the_limits_of_a_batch(model) -> None:
    prompts = [random_prompt(length, seed=length) for length in range(1, 40, 3)]
    requests = sample_requests(prompts, SamplingParams(12, top_p=0.9), n=3)
    wide = TransformersEngine(model).generate(requests)
    for limits in ({"max_batch_size": 5}, {"max_batch_tokens": 120}, {"max_batch_tokens": 1}):
        assert token_ids(TransformersEngine(model, **limits).generate(requests)) == token_ids(wide)


def test_no_forward_pass_is_larger_than_the_limits(model) -> None:
    prompts = [random_prompt(length, seed=length) for length in range(1, 40, 3)]
    requests = sample_requests(prompts, SamplingParams(12, ignore_eos=True), n=3)
    with forward_shapes(model) as shapes:
        TransformersEngine(model, max_batch_size=8, max_batch_tokens=200).generate(requests)
    assert max(rows for rows, _ in shapes) <= 8
    assert max(rows * tokens for rows, tokens in shapes) <= 200


def test_rows_that_have_ended_leave_the_batch(model) -> None:
    requests = [
        Request(random_prompt(8, seed=i), SamplingParams(2 if i < 6 else 30, ignore_eos=True), i)
        for i in range(8)
    ]
    with forward_shapes(model) as shapes:
        together = TransformersEngine(model).generate(requests)
    assert shapes[1:] == [*[(8, 1)] * 2, *[(2, 1)] * 28]
    separate = [TransformersEngine(model).generate([request])[0] for request in requests]
    assert token_ids(together) == token_ids(separate)


@pytest.mark.parametrize("name", ["max_batch_size", "max_batch_tokens", "max_length"])
def test_a_limit_that_is_not_positive_is_refused(model, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
        TransformersEngine(model, **{name: 0})


# --- models ---------------------------------------------------------------------------------------

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FEW = {"num_key_value_heads": 2}
ARCHITECTURES = {
    "gpt2": transformers.GPT2Config(
        vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.1,
        bos_token_id=1, eos_token_id=2,
    ),
    "gpt_neox": transformers.GPTNeoXConfig(**SIZES),
    "qwen2": transformers.Qwen2Config(**SIZES, **FEW),
    "sliding window": transformers.MistralConfig(**SIZES, **FEW, sliding_window=6),
    "soft caps and sliding window": transformers.Gemma2Config(
        **SIZES, **FEW, head_dim=8, sliding_window=6
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_ragged_batches_equal_a_teacher_forced_forward_in_other_architectures(name: str) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(ARCHITECTURES[name]).eval()
    prompts = [random_prompt(length, seed=length) for length in (1, 2, 9, 20, 33)]
    prompts.append(prompts[3][:7])
    params = SamplingParams(20, ignore_eos=True)
    requests = sample_requests(prompts, params, n=2)
    # One row ends early, so that it runs beyond its own positions beside the others.
    requests.append(Request(random_prompt(60), SamplingParams(4), seed=1))
    for request, answer in zip(requests, TransformersEngine(model).generate(requests), strict=True):
        ids = torch.tensor([[*request.prompt, *answer.token_ids]])
        with torch.no_grad():
            forced = model(ids).logits.log_softmax(-1)[0, len(request.prompt) - 1 : -1]
        expected = forced.gather(-1, torch.tensor(answer.token_ids)[:, None])[:, 0]
        np.testing.assert_allclose(answer.logprobs, expected.numpy(), atol=1e-5, rtol=0)


def test_logprobs_of_the_sampler_stand_beside_those_of_the_model_in_one_batch(model) -> None:
    requests = [
        Request(random_prompt(5 + i, seed=i), SamplingParams(20, *how, logprobs_of=of), i, f"{i}")
        for i, how in enumerate([(0.0,), (1.0,), (0.7,), (1.0, 0.9), (1.3, 1.0, 9), (0.8, 0.9, 12)])
        for of in ("model", "sampler")
    ]
    answers = TransformersEngine(model).generate(requests)
    for of_model, of_sampler in zip(answers[::2], answers[1::2], strict=True):
        assert of_model.token_ids == of_sampler.token_ids
    for request, answer in zip(requests, answers, strict=True):
        ids = torch.tensor([[*request.prompt, *answer.token_ids]])
        with torch.no_grad():
            logits = model(ids).logits[0, len(request.prompt) - 1 : -1].double()
        params = request.params
        if params.logprobs_of == "sampler" and params.temperature:
            logits /= params.temperature
            if params.top_k:
                logits[logits < logits.topk(params.top_k).values[:, -1:]] = -torch.inf
            if params.top_p < 1:
                ordered, order = logits.sort(descending=True)
                before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
                logits.scatter_(-1, order, ordered.masked_fill(before >= params.top_p, -torch.inf))
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(answer.token_ids)[:, None])
        np.testing.assert_allclose(answer.logprobs, expected[:, 0].numpy(), atol=1e-5, rtol=0)


def test_greedy_answers_equal_those_of_transformers_generate(model) -> None:
    prompts = [random_prompt(length, seed=length) for length in (3, 8, 21)]
    answers = TransformersEngine(model).generate(sample_requests(prompts, SamplingParams(24, 0.0)))
    for prompt, answer in zip(prompts, answers, strict=True):
        whole = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=24,
            do_sample=False,
        )
        assert answer.token_ids == tuple(whole[0, len(prompt) :].tolist())


def test_models_without_keys_and_values_per_position_are_refused() -> None:
    mamba = transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1)
    )
    with pytest.raises(TypeError, match="recurrent state"):
        TransformersEngine(mamba)
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=VOCAB, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8
        )
    )
    with pytest.raises(TypeError, match="decoder-only"):
        TransformersEngine(t5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")
def test_answers_on_an_accelerator_are_those_on_the_cpu(model) -> None:
    prompts = [random_prompt(length, seed=length) for length in (1, 2, 9, 20, 33)]
    on_device = build_model(VOCAB, max_positions=128, init_std=0.1).to("cuda")
    for params in (SamplingParams(40, 0.0), SamplingParams(40, 0.9, top_p=0.9, top_k=20)):
        requests = sample_requests([*prompts, prompts[3][:7]], params, n=4)
        here = TransformersEngine(model).generate(requests)
        there = TransformersEngine(on_device, max_batch_size=9).generate(requests)
        assert token_ids(there) == token_ids(here)
        for a, b in zip(here, there, strict=True):
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


def test_a_model_in_half_precision_gives_logprobs_near_those_of_its_forward(model) -> None:
    half = build_model(VOCAB, max_positions=128, init_std=0.1).to(torch.bfloat16)
    request = Request(random_prompt(20), SamplingParams(20), seed=1)
    answer = TransformersEngine(half).generate([request])[0]
    with torch.no_grad():
        logits = half(torch.tensor([[*request.prompt, *answer.token_ids]])).logits.float()
    forced = logits.log_softmax(-1)[0, 19:-1]
    expected = forced.gather(-1, torch.tensor(answer.token_ids)[:, None])[:, 0]
    np.testing.assert_allclose(answer.logprobs, expected.numpy(), atol=0.05)


# --- the caller's model ---------------------------------------------------------------------------


def test_generation_leaves_modes_gradients_and_random_state_as_they_were(model) -> None:
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_positions=64, n_embd=16, n_layer=1, n_head=2, bos_token_id=1,
        eos_token_id=2, resid_pdrop=0.5,
    )  # fmt: skip
    training = transformers.GPT2LMHeadModel(config).train()
    training.transformer.h[0].eval()
    modes = [module.training for module in training.modules()]
    state = torch.get_rng_state()
    requests = sample_requests([random_prompt(9)], SamplingParams(9, ignore_eos=True))
    engine = TransformersEngine(training)
    first = engine.generate(requests)
    assert [module.training for module in training.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert token_ids(engine.generate(requests)) == token_ids(first)  # no dropout
    training(torch.tensor([[5, 6]]), labels=torch.tensor([[5, 6]])).loss.backward()
    assert training.transformer.wte.weight.grad is not None


def test_answers_that_come_batch_by_batch_are_those_of_one_call(model) -> None:
    prompts = [random_prompt(length, seed=length) for length in (30, 4, 17, 9)]
    requests = sample_requests(prompts, SamplingParams(8), n=3)
    engine = TransformersEngine(model, max_batch_size=5)
    with forward_shapes(model) as shapes:
        answers = engine.iterate(requests)
        assert shapes == []
        first = next(answers)
        begun = len(shapes)
        found = dict([first, *answers])
        assert begun < len(shapes)
    assert [found[i] for i in range(len(requests))] == engine.generate(requests)


def test_between_two_answers_the_model_can_be_trained(model) -> None:
    engine = TransformersEngine(model.train(), max_batch_size=1)
    try:
        for _ in engine.iterate(sample_requests([[5, 6], [7]], SamplingParams(3), n=2)):
            assert model.training
            assert torch.is_grad_enabled()
    finally:
        model.eval()


def test_requests_that_come_batch_by_batch_are_refused_by_the_call(model) -> None:
    requests = [Request((5,), SamplingParams(4)), Request((), SamplingParams(4))]
    with pytest.raises(RequestError, match="at least one token"):
        TransformersEngine(model).iterate(requests)


def test_weights_changed_in_place_are_those_that_generate() -> None:
    own, other = build_model(VOCAB, init_std=0.1), build_model(VOCAB, seed=1, init_std=0.1)
    engine = TransformersEngine(own)
    requests = sample_requests([random_prompt(9)], SamplingParams(20, 0.0))
    with torch.no_grad():
        for mine, new in zip(own.parameters(), other.parameters(), strict=True):
            mine.copy_(new)
    assert engine.generate(requests) == TransformersEngine(other).generate(requests)


@pytest.mark.parametrize("damage", ["missing", "unknown", "shape"])
def test_weights_that_do_not_fit_are_refused_whole(damage: str) -> None:
    model = build_model(VOCAB)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = dict(build_model(VOCAB, seed=1).state_dict())
    if damage == "missing":
        del weights["model.norm.weight"]
    elif damage == "unknown":
        weights["value_head"] = torch.zeros(1)
    else:
        weights["model.norm.weight"] = torch.zeros(3)
    with pytest.raises(ValueError, match="weights") as caught:
        TransformersEngine(model).load_weights(weights)
    assert ("value_head" if damage == "unknown" else "model.norm.weight") in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_stop_texts_without_a_tokenizer_are_refused(model) -> None:
    requests = [Request((5,), SamplingParams(4)), Request((5,), SamplingParams(4, stop=("Q:",)))]
    with pytest.raises(RequestError, match="tokenizer") as caught:
        TransformersEngine(model).generate(requests)
    assert caught.value.index == 1


def test_end_of_sequence_tokens_come_from_the_generation_config_or_the_caller(model) -> None:
    request = Request(random_prompt(5), SamplingParams(30), seed=2)
    first = TransformersEngine(model, eos_token_ids=()).generate([request])[0]
    assert first.finish_reason == "length"
    token = first.token_ids[5]
    cut = TransformersEngine(model, eos_token_ids=[token]).generate([request])[0]
    assert cut.token_ids == first.token_ids[: first.token_ids.index(token) + 1]
    other = build_model(VOCAB, max_positions=128, init_std=0.1)
    other.generation_config.eos_token_id = [token, 2]
    assert TransformersEngine(other).eos_token_ids == {token, 2}
