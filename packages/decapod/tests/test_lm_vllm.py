"""The client against vLLM's own server, and what its engine in this process must refuse."""

import importlib.util
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from decapod.lm import (
    Request,
    RequestError,
    SamplingParams,
    ServerEngine,
    ServerError,
    ServerTextGenerator,
    TextGenerator,
    TransformersEngine,
    build_model,
    build_tokenizer,
    sample_requests,
)
from decapod.lm.sampling import sampler_logprobs

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
]
TEXTS = ["what is 12 and 34? abcdefghijklmnopqrstuvwxyz 0123456789"]
PROMPTS = [[1, 5, 9], [1, 20], [1, *range(4, 30)], [7]]
DEADLINE_S = 300


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(TEXTS, chat=True, add_bos=True)


@pytest.fixture(scope="module")
def reference(tokenizer) -> TransformersEngine:
    return TransformersEngine(build_model(len(tokenizer), heads=2, init_std=0.1), tokenizer)


@pytest.fixture(scope="module")
def folder(tokenizer, reference, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    reference.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[ServerEngine]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = {
        "--model": str(folder),
        "--served-model-name": "tiny",
        "--dtype": "float32",
        "--max-model-len": "96",
        "--host": "127.0.0.1",
        "--port": str(port),
    }
    log = folder / "server.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [
                sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager",
                *(word for pair in arguments.items() for word in pair),
            ],
            stdout=stream, stderr=stream, env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        try:
            wait_for(f"http://127.0.0.1:{port}/health", process, log)
            yield ServerEngine(f"http://127.0.0.1:{port}/v1", "tiny", retries=1)
        finally:
            process.terminate()
            process.wait(60)


def wait_for(url: str, process: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + DEADLINE_S
    while time.monotonic() < end and process.poll() is None:
        try:
            if httpx.get(url, timeout=2).status_code == 200:
                return
        except httpx.TransportError:
            pass  # not listening yet
        time.sleep(0.5)
    raise AssertionError(f"vLLM's server did not start:\n{log.read_text()[-5000:]}")


def test_greedy_tokens_and_logprobs_equal_those_of_the_transformers_engine(
    server, reference
) -> None:
    requests = sample_requests(PROMPTS, SamplingParams(32, 0.0, ignore_eos=True))
    for ours, theirs in zip(reference.generate(requests), server.generate(requests), strict=True):
        assert theirs.token_ids == ours.token_ids
        assert (theirs.finish_reason, theirs.id) == ("length", ours.id)
        np.testing.assert_allclose(theirs.logprobs, ours.logprobs, atol=1e-5)


def test_logprobs_of_drawn_tokens_are_those_of_the_model_before_temperature_and_cuts(
    server, reference
) -> None:
    import torch

    requests = sample_requests(PROMPTS, SamplingParams(16, 0.7, top_k=12, top_p=0.9))
    for request, answer in zip(requests, server.generate(requests), strict=True):
        ids = torch.tensor([[*request.prompt, *answer.token_ids]])
        with torch.no_grad():
            forced = reference.model(ids).logits.log_softmax(-1)[0, len(request.prompt) - 1 : -1]
        expected = forced.gather(-1, torch.tensor(answer.token_ids)[:, None])[:, 0]
        np.testing.assert_allclose(answer.logprobs, expected.numpy(), atol=1e-5)


def test_seeded_answers_do_not_depend_on_what_is_asked_at_the_same_time(server) -> None:
    requests = sample_requests(PROMPTS, SamplingParams(24), seed=5, n=4)
    together = server.generate(requests)
    separate = [server.generate([request])[0] for request in reversed(requests)]
    assert [a.token_ids for a in together] == [a.token_ids for a in reversed(separate)]
    assert len({answer.token_ids for answer in together}) == len(requests)


def test_eos_and_stop_tokens_end_an_answer_and_are_its_last_token(server) -> None:
    params = SamplingParams(60, stop_token_ids=(9, 10))
    answers = server.generate(sample_requests(PROMPTS, params, n=4))
    assert "stop" in {answer.finish_reason for answer in answers}
    for answer in answers:
        assert len(answer.logprobs) == len(answer.token_ids)
        assert not {2, 9, 10} & set(answer.token_ids[:-1])
        assert (answer.token_ids[-1] in (2, 9, 10)) == (answer.finish_reason == "stop")


def test_greedy_texts_and_chats_equal_those_of_the_text_generator(
    server, reference, tokenizer
) -> None:
    prompts = ["what is 12", [{"role": "user", "content": "and 34"}], "abc"]
    params = SamplingParams(24, 0.0)
    ours = TextGenerator(reference, tokenizer, params)(prompts)
    assert ServerTextGenerator(server, params)(prompts) == ours
    stop = SamplingParams(24, 0.0, stop=tuple(text[3:5] for text in ours if len(text) > 5))
    assert stop.stop
    assert ServerTextGenerator(server, stop)(prompts) == TextGenerator(reference, tokenizer, stop)(
        prompts
    )


def test_a_prompt_that_is_too_long_is_refused_with_what_the_server_says(server) -> None:
    with pytest.raises(ServerError, match="status 400") as caught:
        server.generate(sample_requests([[5] * 120], SamplingParams(4)))
    assert "96" in str(caught.value)


@pytest.fixture(scope="module")
def processed(folder: Path):
    from vllm import LLM

    from decapod.lm import VLLMEngine

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        yield VLLMEngine(
            LLM(
                str(folder), dtype="float32", max_model_len=96, enforce_eager=True,
                logprobs_mode="processed_logprobs", block_size=32,
            )
        )  # fmt: skip


@pytest.mark.parametrize("how", [(0.0,), (1.0,), (0.7,), (1.3, 1.0, 9), (0.8, 0.9, 12)])
def test_logprobs_of_the_sampler_are_those_of_the_tempered_and_cut_distribution(
    processed, reference, how
) -> None:
    import torch

    params = SamplingParams(16, *how, logprobs_of="sampler")
    requests = sample_requests(PROMPTS, params, seed=3, n=2)
    for request, answer in zip(requests, processed.generate(requests), strict=True):
        ids = torch.tensor([[*request.prompt, *answer.token_ids]])
        with torch.no_grad():
            forced = reference.model(ids).logits.log_softmax(-1)[0, len(request.prompt) - 1 : -1]
        rows = torch.ones(len(forced))
        expected = sampler_logprobs(
            forced, rows.double() * params.temperature, rows.long() * params.top_k,
            rows.double() * params.top_p,
        ).gather(-1, torch.tensor(answer.token_ids)[:, None])[:, 0]  # fmt: skip
        np.testing.assert_allclose(answer.logprobs, expected.numpy(), atol=1e-5, rtol=0)


def test_tokens_that_vllm_had_in_its_prefix_cache_are_counted(processed) -> None:
    request = Request((1, *[7, 8, 9, 10] * 16), SamplingParams(2, 0.0))
    assert processed.llm.reset_prefix_cache()
    before = processed.cached_prompt_tokens
    processed.generate([request])
    assert processed.cached_prompt_tokens == before
    processed.generate([request])
    assert processed.cached_prompt_tokens == before + 64  # two blocks of the 65 tokens


def test_logprobs_that_the_llm_does_not_give_are_refused_with_the_remedy(processed) -> None:
    of_model, of_sampler = (
        Request((1, 5), SamplingParams(4, 0.7, logprobs_of=of), id=of)
        for of in ("model", "sampler")
    )
    with pytest.raises(RequestError, match=r"logprobs_of.*'raw_logprobs'") as caught:
        processed.generate([of_sampler, of_model])
    assert caught.value.id == "model"
    for equal in (SamplingParams(4, 0.0), SamplingParams(4, 1.0)):
        assert processed.generate([Request((1, 5), equal)])


def test_an_llm_that_gives_logits_is_refused(processed, monkeypatch) -> None:
    from decapod.lm import VLLMEngine

    config = processed.llm.llm_engine.model_config
    monkeypatch.setattr(config, "logprobs_mode", "raw_logits")
    with pytest.raises(ValueError, match="'raw_logits'; make"):
        VLLMEngine(processed.llm)
