"""What every engine that runs in this process must hold; the same tests for each of them."""

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from decapod.lm import (
    GenerationEngine,
    LogprobsError,
    Request,
    RequestError,
    SamplingParams,
    TransformersEngine,
    build_model,
    build_tokenizer,
    sample_requests,
)

EOS = 2
MAX_LENGTH = 96
ENGINES = [
    "transformers",
    pytest.param(
        "vllm",
        marks=[
            pytest.mark.vllm,
            pytest.mark.skipif(
                importlib.util.find_spec("vllm") is None, reason="vllm is not installed"
            ),
        ],
    ),
]


@dataclass
class Subject:
    engine: GenerationEngine
    load_weights: Callable[[dict[str, torch.Tensor]], None]
    model: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerFast


@pytest.fixture(scope="module", params=ENGINES)
def subject(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Subject]:
    tokenizer = build_tokenizer(["abcdefghijklmnopqrstuvwxyz 0123456789"])
    model = build_model(len(tokenizer), heads=2, max_positions=MAX_LENGTH, init_std=0.1)
    if request.param == "transformers":
        # A copy, so that new weights for the engine leave the reference alone.
        own = build_model(len(tokenizer), heads=2, max_positions=MAX_LENGTH, init_std=0.1)
        engine = TransformersEngine(own, tokenizer)
        yield Subject(engine, engine.load_weights, model, tokenizer)
        return
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        on_vllm = start_vllm(folder)
        yield Subject(on_vllm, on_vllm.load_weights, model, tokenizer)


def start_vllm(folder: Path):
    from vllm import LLM

    from decapod.lm import VLLMEngine

    return VLLMEngine(
        LLM(str(folder), dtype="float32", max_model_len=MAX_LENGTH, enforce_eager=True)
    )


def some_prompts(n: int = 12, seed: int = 0) -> list[list[int]]:
    """Prompts of many lengths, some equal, some prefixes of others."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(3, 40, rng.integers(1, 30)).tolist() for _ in range(n)]
    return [*prompts, prompts[0], prompts[1][:4], prompts[2][:1]]


def alone(engine: GenerationEngine, requests: list[Request]) -> list:
    return [engine.generate([request])[0] for request in requests]


def tokens(completions: list) -> list[tuple[int, ...]]:
    return [completion.token_ids for completion in completions]


PARAMS = [
    SamplingParams(max_new_tokens=20, temperature=0.0),
    SamplingParams(max_new_tokens=20, temperature=1.0),
    SamplingParams(max_new_tokens=20, temperature=0.8, top_k=12, top_p=0.9),
]


@pytest.mark.parametrize("params", PARAMS, ids=["greedy", "sampled", "cut"])
def test_answers_in_a_batch_are_those_of_requests_one_by_one(
    subject: Subject, params: SamplingParams
) -> None:
    requests = sample_requests(some_prompts(), params, seed=3, n=2)
    together = subject.engine.generate(requests)
    separate = alone(subject.engine, requests)
    assert tokens(together) == tokens(separate)
    assert [c.finish_reason for c in together] == [c.finish_reason for c in separate]
    for a, b in zip(together, separate, strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


def test_requests_with_different_params_do_not_disturb_each_other(subject: Subject) -> None:
    mixed = [
        Request(request.prompt, params, request.seed, f"{i}")
        for params in PARAMS
        for i, request in enumerate(sample_requests(some_prompts(4), params))
    ]
    assert tokens(subject.engine.generate(mixed)) == tokens(alone(subject.engine, mixed))


def test_order_of_requests_changes_the_order_of_answers_only(subject: Subject) -> None:
    requests = sample_requests(some_prompts(), PARAMS[1])
    order = np.random.default_rng(5).permutation(len(requests))
    shuffled = subject.engine.generate([requests[i] for i in order])
    straight = subject.engine.generate(requests)
    assert tokens(shuffled) == [straight[i].token_ids for i in order]
    assert [completion.id for completion in shuffled] == order.tolist()


@pytest.mark.parametrize("params", PARAMS, ids=["greedy", "sampled", "cut"])
def test_logprobs_are_those_of_a_teacher_forced_forward_before_temperature_and_cuts(
    subject: Subject, params: SamplingParams
) -> None:
    requests = sample_requests(some_prompts(), params)
    for request, answer in zip(requests, subject.engine.generate(requests), strict=True):
        ids = torch.tensor([[*request.prompt, *answer.token_ids]])
        with torch.no_grad():
            forced = subject.model(ids).logits.log_softmax(-1)[0, len(request.prompt) - 1 : -1]
        expected = forced.gather(-1, torch.tensor(answer.token_ids)[:, None])[:, 0]
        np.testing.assert_allclose(answer.logprobs, expected.numpy(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("params", PARAMS[:2], ids=["greedy", "sampled"])
def test_logprobs_of_sampler_and_model_are_equal_where_nothing_is_reshaped(
    subject: Subject, params: SamplingParams
) -> None:
    of_sampler = replace(params, logprobs_of="sampler")
    answers = subject.engine.generate(sample_requests(some_prompts(), params))
    assert subject.engine.generate(sample_requests(some_prompts(), of_sampler)) == answers


def test_greedy_tokens_are_the_most_probable_ones(subject: Subject) -> None:
    request = Request(tuple(some_prompts()[0]), SamplingParams(12, 0.0, ignore_eos=True))
    answer = subject.engine.generate([request])[0]
    ids = list(request.prompt)
    for token in answer.token_ids:
        with torch.no_grad():
            assert token == int(subject.model(torch.tensor([ids])).logits[0, -1].argmax())
        ids.append(token)


def test_eos_ends_an_answer_and_is_its_last_token(subject: Subject) -> None:
    params = SamplingParams(max_new_tokens=40)
    answers = subject.engine.generate(sample_requests(some_prompts(4), params, n=8))
    assert {answer.finish_reason for answer in answers} == {"stop", "length"}
    for answer in answers:
        assert len(answer.logprobs) == len(answer.token_ids)
        assert EOS not in answer.token_ids[:-1]
        assert (answer.token_ids[-1] == EOS) == (answer.finish_reason == "stop")
        assert answer.finish_reason == "stop" or len(answer.token_ids) == 40


def test_ignored_eos_does_not_end_an_answer(subject: Subject) -> None:
    params = SamplingParams(max_new_tokens=40, ignore_eos=True)
    answers = subject.engine.generate(sample_requests(some_prompts(4), params, n=8))
    assert {(len(a.token_ids), a.finish_reason) for a in answers} == {(40, "length")}
    assert any(EOS in answer.token_ids for answer in answers)


def test_a_stop_token_ends_an_answer_where_it_first_appears(subject: Subject) -> None:
    free = SamplingParams(max_new_tokens=30, ignore_eos=True)
    request = Request(tuple(some_prompts()[3]), free, seed=8)
    whole = subject.engine.generate([request])[0].token_ids
    stop = SamplingParams(max_new_tokens=30, ignore_eos=True, stop_token_ids=(whole[9],))
    answer = subject.engine.generate([Request(request.prompt, stop, seed=8)])[0]
    assert answer.token_ids == whole[: whole.index(whole[9]) + 1]
    assert answer.finish_reason == "stop"


def test_a_stop_text_ends_an_answer_with_the_token_that_completes_it(subject: Subject) -> None:
    free = SamplingParams(max_new_tokens=30, ignore_eos=True)
    request = Request(tuple(some_prompts()[3]), free, seed=11)
    whole = subject.engine.generate([request])[0].token_ids
    text = subject.tokenizer.decode(list(whole), skip_special_tokens=True)
    wanted = text[6:9]
    stop = SamplingParams(max_new_tokens=30, ignore_eos=True, stop=(wanted, "never there"))
    answer = subject.engine.generate([Request(request.prompt, stop, seed=11)])[0]
    assert answer.finish_reason == "stop"
    assert answer.token_ids == whole[: len(answer.token_ids)]
    shorter, longer = (
        subject.tokenizer.decode(list(ids), skip_special_tokens=True)
        for ids in (answer.token_ids[:-1], answer.token_ids)
    )
    assert wanted in longer
    assert wanted not in shorter


def test_equal_seeds_give_equal_and_other_seeds_other_answers(subject: Subject) -> None:
    params = SamplingParams(max_new_tokens=20, ignore_eos=True)
    requests = [Request((5, 6, 7), params, seed) for seed in (1, 2**62, 1, 2**63 - 1, 2)]
    answers = tokens(subject.engine.generate(requests))
    assert answers[0] == answers[2]
    assert len(set(answers)) == 4


@pytest.mark.parametrize(
    ("params", "name"),
    [
        (SamplingParams(1, 1.0), "whole"),
        (SamplingParams(1, 0.7), "tempered"),
        (SamplingParams(1, 1.3, top_k=9), "top_k"),
        (SamplingParams(1, 1.0, top_p=0.6), "top_p"),
        (SamplingParams(1, 0.9, top_k=12, top_p=0.8), "both"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_first_tokens_have_the_frequencies_of_the_distribution(
    subject: Subject, params: SamplingParams, name: str
) -> None:
    n = 3000
    answers = subject.engine.generate(sample_requests([[5, 9, 20]], params, seed=17, n=n))
    with torch.no_grad():
        logits = subject.model(torch.tensor([[5, 9, 20]])).logits[0, -1].double().numpy()
    expected = reference_distribution(logits, params)
    counts = np.bincount([answer.token_ids[0] for answer in answers], minlength=len(logits))
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    assert chisquare(counts[kept], n * expected[kept]).pvalue > 1e-3


def reference_distribution(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Temperature, top-k, top-p, in plain loops."""
    weights = np.exp((logits - logits.max()) / params.temperature)
    order = sorted(range(len(weights)), key=lambda i: -weights[i])
    if params.top_k:
        order = order[: params.top_k]
    total = sum(weights[i] for i in order)
    kept, mass = [], 0.0
    for i in order:
        if mass >= params.top_p:
            break
        kept.append(i)
        mass += weights[i] / total
    result = np.zeros_like(weights)
    result[kept] = weights[kept] / weights[kept].sum()
    return result


@pytest.mark.parametrize(
    ("prompt", "new", "words"),
    [
        ((), 4, ["at least one token", "BOS"]),
        ((5,) * 90, 7, ["90 tokens", "max_new_tokens=7", "96 positions", "shorten"]),
        ((5, 10_000), 4, ["ids in", "10000", "tokenizer"]),
        ((5, -1), 4, ["ids in", "-1", "tokenizer"]),
    ],
    ids=["empty", "too long", "not in the vocabulary", "negative"],
)
def test_a_request_that_cannot_be_served_is_refused_before_any_work(
    subject: Subject, prompt: tuple[int, ...], new: int, words: list[str]
) -> None:
    good = Request((5, 6), SamplingParams(4), id="good")
    bad = Request(prompt, SamplingParams(new), id="bad")
    with pytest.raises(RequestError) as caught:
        subject.engine.generate([good, bad])
    assert (caught.value.index, caught.value.id) == (1, "bad")
    for word in words:
        assert word in str(caught.value)


def test_no_requests_give_no_answers(subject: Subject) -> None:
    assert subject.engine.generate([]) == []


def test_a_request_may_fill_all_positions(subject: Subject) -> None:
    params = SamplingParams(MAX_LENGTH - 3, ignore_eos=True)
    answer = subject.engine.generate([Request((5, 6, 7), params)])[0]
    assert len(answer.token_ids) == MAX_LENGTH - 3


def test_loaded_weights_are_those_that_generate(subject: Subject) -> None:
    before = subject.model.state_dict()
    other = build_model(
        len(subject.tokenizer), heads=2, max_positions=MAX_LENGTH, seed=1, init_std=0.1
    )
    requests = sample_requests(some_prompts(), PARAMS[0])
    first = subject.engine.generate(requests)
    subject.load_weights(other.state_dict())
    try:
        changed = subject.engine.generate(requests)
    finally:
        subject.load_weights(before)
    assert tokens(changed) == tokens(TransformersEngine(other).generate(requests))
    assert tokens(changed) != tokens(first)
    assert tokens(subject.engine.generate(requests)) == tokens(first)


def test_weights_that_are_not_numbers_are_an_error_not_an_answer(subject: Subject) -> None:
    before = subject.model.state_dict()
    broken = {name: tensor.clone() for name, tensor in before.items()}
    broken["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    subject.load_weights(broken)
    try:
        with pytest.raises(LogprobsError, match="NaN"):
            subject.engine.generate([Request((5, 6, 7), SamplingParams(4))])
    finally:
        subject.load_weights(before)
    assert subject.engine.generate([Request((5, 6, 7), SamplingParams(4))])
