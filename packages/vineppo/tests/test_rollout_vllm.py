"""Rollouts with vLLM: in this process, and by several servers; the latter also without vLLM."""

from __future__ import annotations

import copy
import importlib.util
import itertools
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("decapod")
pytest.importorskip("transformers")

import httpx
from safetensors.torch import load_file

from decapod.lm import (
    EngineError,
    Request,
    SamplingParams,
    ServerError,
    TransformersEngine,
    build_model,
    build_tokenizer,
)
from vineppo.backend import Usage
from vineppo.episodes import Rollout
from vineppo.errors import InvalidInputError, MissingExtraError, NotFiniteError
from vineppo.rollout import TransformersBackend, merged
from vineppo.rollout_vllm import ServersBackend, VLLMBackend, make_llm

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
INSTALLED = importlib.util.find_spec("vllm") is not None
TEXTS = ["what is 12 and 34? abcdefghijklmnopqrstuvwxyz 0123456789"]
BLOCK = 32  # a CPU takes multiples of it
GREEDY = SamplingParams(12, 0.0)
DRAWN = SamplingParams(12, 0.9)
START_S = 240


def needs_vllm(test: Any) -> Any:
    skip = pytest.mark.skipif(not INSTALLED, reason="vllm is not installed")
    return pytest.mark.vllm(skip(test))


@pytest.fixture(scope="module", autouse=True)
def one_numeric_thread() -> None:
    torch.set_num_threads(1)


def tiny(seed: int = 0) -> Any:
    return build_model(45, layers=2, heads=2, max_positions=256, seed=seed, init_std=0.1)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny()


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    build_tokenizer(TEXTS, chat=True, add_bos=True).save_pretrained(path)
    return path


def states() -> list[list[int]]:
    """Successive states of two trajectories of one problem."""
    rng = np.random.default_rng(0)
    prompt = rng.integers(5, 45, 40).tolist()
    tails = [rng.integers(5, 45, 30).tolist() for _ in range(2)]
    return [prompt + tail[:end] for end in (0, 3, 11, 30) for tail in tails]


def seeds_of(prompts: Any) -> list[int]:
    return [31 * i for i in range(len(prompts))]


def ids(rollouts: list[list[Rollout]]) -> list[list[tuple[int, ...]]]:
    return [[rollout.token_ids for rollout in some] for some in rollouts]


def with_lora(model: Any) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(4)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    return peft.get_peft_model(copy.deepcopy(model), config)


def generates_as(backend: Any, model: Any) -> None:
    """Greedy rollouts and the log-probabilities of drawn ones are those of a model."""
    prompts = states()
    found = backend.generate(prompts, 2, GREEDY, seeds_of(prompts))
    expected = TransformersBackend(model).generate(prompts, 2, GREEDY, seeds_of(prompts))
    assert ids(found) == ids(expected)
    assert [[r.finished for r in some] for some in found] == [
        [r.finished for r in some] for some in expected
    ]
    drawn = backend.generate(prompts, 2, DRAWN, seeds_of(prompts))
    for prompt, some in zip(prompts, drawn, strict=True):
        for rollout in some:
            whole = torch.tensor([[*prompt, *rollout.token_ids]])
            with torch.no_grad():
                logps = model(whole).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            logps = logps.gather(-1, torch.tensor(rollout.token_ids)[:, None])[:, 0]
            np.testing.assert_allclose(rollout.logprobs, logps.numpy(), rtol=0, atol=1e-4)


# --- in this process ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llm(folder: Path) -> Any:
    return make_llm(
        folder, dtype="float32", max_model_len=256, enforce_eager=True, block_size=BLOCK
    )


@pytest.fixture
def backend(llm: Any, model: Any) -> Iterator[VLLMBackend]:
    """A new one around it, with the first weights and nothing cached."""
    backend = VLLMBackend(llm)
    yield backend
    backend.load_weights(model)


@pytest.mark.skipif(INSTALLED, reason="vllm is installed")
def test_without_vllm_the_error_names_the_extra(folder: Path) -> None:
    for make in (lambda: make_llm(folder), lambda: VLLMBackend(None)):
        with pytest.raises(MissingExtraError, match=r'pip install "vineppo\[vllm\]"'):
            make()


@needs_vllm
def test_greedy_rollouts_and_logprobs_are_those_of_the_model(backend: Any, model: Any) -> None:
    generates_as(backend, model)


@needs_vllm
def test_a_rollout_of_vllm_depends_on_its_state_seed_and_number_alone(backend: Any) -> None:
    prompts = states()
    whole = backend.generate(prompts, 4, DRAWN, seeds_of(prompts))
    assert len({r.token_ids for some in whole for r in some}) == 4 * len(prompts)
    order = [5, 0, 3, 3, 7]
    counts = [1, 4, 2, 3, 0]
    again = backend.generate(
        [prompts[i] for i in order], counts, DRAWN, [seeds_of(prompts)[i] for i in order]
    )
    assert ids(again) == [ids(whole)[i][:count] for i, count in zip(order, counts, strict=True)]


@needs_vllm
def test_requests_are_ids_in_an_order_that_keeps_trajectories_together(
    backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[list[int]] = []
    generate = backend.llm.generate

    def recorded(prompts: Any, *args: Any, **options: Any) -> Any:
        sent.extend(prompt["prompt_token_ids"] for prompt in prompts)
        assert all(set(prompt) == {"prompt_token_ids"} for prompt in prompts)
        return generate(prompts, *args, **options)

    monkeypatch.setattr(backend.llm, "generate", recorded)
    prompts = states()
    backend.generate(prompts, 3, GREEDY, seeds_of(prompts))
    assert sent == sorted(prompt for prompt in prompts for _ in range(3))
    for before, after in itertools.pairwise(sent):
        # Within a trajectory each state begins with the one before it.
        assert after[: len(before)] == before or len(after) <= 43 < len(before)


@needs_vllm
def test_reused_tokens_are_the_blocks_that_vllm_had(backend: Any, model: Any) -> None:
    backend.load_weights(model)  # nothing is cached
    prompt = states()[-1]
    backend.generate([prompt], 1, GREEDY, [1])
    assert backend.usage.reused_tokens == 0
    backend.generate([prompt], 1, GREEDY, [1])
    assert len(prompt) == 70
    assert backend.usage.reused_tokens == 64
    assert (backend.usage.prompt_tokens, backend.usage.requests) == (140, 2)
    before = backend.usage
    backend.load_weights(model)
    backend.generate([prompt], 1, GREEDY, [1])
    assert (backend.usage - before).reused_tokens == 0


@needs_vllm
def test_nine_samples_of_states_of_a_trajectory_find_their_prefix(backend: Any, model: Any) -> None:
    backend.load_weights(model)
    prompts = states()
    backend.generate(prompts, 9, SamplingParams(2, ignore_eos=True), seeds_of(prompts))
    assert backend.usage.generated_tokens == 2 * 9 * len(prompts)
    assert backend.usage.hit_rate > 0.7


@needs_vllm
@pytest.mark.parametrize("adapters", [False, True])
def test_loaded_weights_are_in_use_and_old_prefixes_forgotten(backend: Any, adapters: bool) -> None:
    prompts = states()
    backend.generate(prompts, 1, GREEDY, seeds_of(prompts))
    other = with_lora(tiny(1)) if adapters else tiny(1)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    backend.load_weights(other)
    generates_as(backend, other)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


@needs_vllm
def test_bad_arguments_are_refused_before_vllm_begins(backend: Any) -> None:
    for changes, message in (
        ({"n": 0}, r"^n: expected at least 1"),
        ({"seeds": []}, r"^seeds: expected one per prompt, 1, got 0"),
        ({"prompts": [[]]}, r"^prompts\[0\]: expected at least one token"),
        ({"prompts": [[5] * 250]}, r"^prompts\[0\]: 250 tokens and max_new_tokens=12"),
        (
            {"params": SamplingParams(4, 0.5, logprobs_of="sampler")},
            r"^params.logprobs_of: this vllm.LLM gives those of the model.*prompts\[0\]",
        ),
    ):
        call = {"prompts": [[5]], "n": 1, "params": DRAWN, "seeds": [1], **changes}
        with pytest.raises(InvalidInputError, match=message):
            backend.generate(**call)
    assert backend.usage == Usage()
    with pytest.raises(InvalidInputError, match=r"^llm: expected an end-of-sequence token"):
        _without_eos(backend).generate([[5]], 1, DRAWN, [1])


def _without_eos(backend: VLLMBackend) -> VLLMBackend:
    class Endless(VLLMBackend):
        def _has_eos(self) -> bool:
            assert super()._has_eos()
            return False

    return Endless(backend.llm)


@needs_vllm
def test_weights_that_are_not_numbers_are_an_error_not_a_rollout(backend: Any) -> None:
    broken = tiny()
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    backend.load_weights(broken)
    with pytest.raises(NotFiniteError, match=r"^logprobs of rollouts: .*NaN"):
        backend.generate([[5, 6, 7]], 1, DRAWN, [1])


# --- several servers ------------------------------------------------------------------------------


class Loopback(ThreadingHTTPServer):
    """The routes of vLLM's server that the backend uses, around a transformers model."""

    daemon_threads = True

    def __init__(self, model: Any) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.engine = TransformersEngine(copy.deepcopy(model))
        self.label: str | None = "default"  # None: it knows no labels
        self.cached = 0
        self.calls: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.faults: dict[str, int] = {}
        self.nan = False
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Loopback

    def log_message(self, *args: object) -> None:
        """Silence."""

    def do_GET(self) -> None:
        self.respond({})

    def do_POST(self) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        self.respond(json.loads(self.rfile.read(size)) if size else {})

    def respond(self, body: dict[str, Any]) -> None:
        server, path = self.server, self.path
        with server.lock:
            server.calls.append(path)
            if path in server.faults:
                status, content = server.faults[path], {"error": "made to fail"}
            else:
                status, content = 200, self.content(path, body)
            if content is None:
                status = 404
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def content(self, path: str, body: dict[str, Any]) -> Any:
        server = self.server
        match path:
            case "/v1/completions":
                return self.completion(body)
            case "/v1/models":
                return {"data": [{"id": "tiny", "max_model_len": 256}]}
            case "/pause?mode=abort" | "/resume":
                return {}
            case "/reset_prefix_cache":
                return {"success": True}
            case "/weight_info" if server.label is not None:
                return {"weight_version": server.label}
            case "/update_weight_version" if server.label is not None:
                server.label = body["new_version"]
                return {"success": True}
            case "/collective_rpc":
                assert body["method"] == "reload_weights"
                weights = load_file(Path(body["kwargs"]["weights_path"]) / "model.safetensors")
                server.engine.load_weights(weights)
                return {"results": [None]}
        return None

    def completion(self, body: dict[str, Any]) -> Any:
        server = self.server
        server.bodies.append(body)
        params = SamplingParams(body["max_tokens"], body["temperature"], body["top_p"])
        [done] = server.engine.generate([Request(body["prompt"], params, body["seed"])])
        logprobs = [float("nan")] * len(done.logprobs) if server.nan else done.logprobs
        choice = {
            "finish_reason": done.finish_reason,
            "token_ids": done.token_ids,
            "logprobs": {"token_logprobs": logprobs},
        }
        details = {"cached_tokens": server.cached}
        return {"choices": [choice], "usage": {"prompt_tokens_details": details}}


@pytest.fixture
def servers(model: Any) -> Iterator[list[Loopback]]:
    found = [Loopback(model) for _ in range(3)]
    threads = [threading.Thread(target=s.serve_forever, args=(0.02,)) for s in found]
    for thread in threads:
        thread.start()
    yield found
    for server, thread in zip(found, threads, strict=True):
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def several(servers: list[Loopback], tmp_path: Path) -> ServersBackend:
    return ServersBackend(
        [server.url for server in servers], "tiny", weights_folder=tmp_path / "w", retries=0
    )


def greedy_as(backend: Any, model: Any) -> None:
    """A few tokens from three states, so that each server is asked."""
    prompts, params = states()[:3], SamplingParams(4, 0.0)
    found = backend.generate(prompts, 1, params, [1, 2, 3])
    expected = TransformersBackend(model).generate(prompts, 1, params, [1, 2, 3])
    assert ids(found) == ids(expected)


def test_several_servers_give_the_rollouts_of_one(
    several: Any, servers: list[Loopback], model: Any
) -> None:
    prompts = states()
    found = several.generate(prompts, 3, DRAWN, seeds_of(prompts))
    expected = TransformersBackend(model).generate(prompts, 3, DRAWN, seeds_of(prompts))
    assert ids(found) == ids(expected)
    for some, others in zip(found, expected, strict=True):
        for mine, its in zip(some, others, strict=True):
            np.testing.assert_allclose(mine.logprobs, its.logprobs, rtol=0, atol=1e-4)
    assert [len(server.bodies) for server in servers] == [8, 8, 8]


def test_servers_get_ids_alone_and_each_a_run_of_states_that_begin_alike(
    several: Any, servers: list[Loopback]
) -> None:
    prompts = states()
    brief = SamplingParams(1)
    several.generate(prompts, 3, brief, seeds_of(prompts))
    shares = [[body["prompt"] for body in server.bodies] for server in servers]
    # Threads send a share out of order.
    assert [p for share in shares for p in sorted(share)] == sorted(prompts * 3)
    assert several.usage.reused_tokens == 0
    for server in servers:
        server.cached = 5
    several.generate(prompts, 1, brief, seeds_of(prompts))
    assert several.usage.reused_tokens == 5 * len(prompts)
    assert several.usage.prompt_tokens == 4 * sum(map(len, prompts))


def test_one_prompt_and_none_are_enough(several: Any) -> None:
    assert several.generate([], 1, DRAWN, []) == []
    assert len(several.generate([[5, 6]], 1, DRAWN, [3])[0]) == 1


@pytest.mark.parametrize("adapters", [False, True])
def test_all_servers_have_loaded_the_weights_and_files_are_gone(
    several: Any, servers: list[Loopback], tmp_path: Path, adapters: bool
) -> None:
    other = with_lora(tiny(1)) if adapters else tiny(1)
    several.load_weights(other)
    greedy_as(several, merged(other))
    for server in servers:
        steering = [call for call in server.calls if not call.startswith("/v1/")]
        assert steering[:5] == [
            "/pause?mode=abort", "/collective_rpc", "/reset_prefix_cache",
            "/update_weight_version", "/resume",
        ]  # fmt: skip
    assert list((tmp_path / "w").iterdir()) == []


@pytest.mark.parametrize(
    "path", ["/pause?mode=abort", "/collective_rpc", "/reset_prefix_cache", "/resume"]
)
def test_an_update_that_does_not_reach_all_keeps_everybody_from_generating(
    several: Any, servers: list[Loopback], tmp_path: Path, path: str
) -> None:
    servers[1].faults[path] = 500
    with pytest.raises(EngineError, match=r"status 500: .*made to fail"):
        several.load_weights(tiny(1))
    asked = len(servers[0].bodies)
    with pytest.raises(EngineError, match=r"did not reach all.*call load_weights again"):
        several.generate([[5]], 1, DRAWN, [1])
    assert len(servers[0].bodies) == asked
    assert list((tmp_path / "w").iterdir()) == []
    servers[1].faults.clear()
    several.load_weights(tiny(1))
    greedy_as(several, tiny(1))


def test_a_server_that_was_started_again_is_noticed_by_its_label(
    several: Any, servers: list[Loopback]
) -> None:
    several.load_weights(tiny(1))
    several.generate([[5]], 1, DRAWN, [1])
    servers[2].label = "default"
    with pytest.raises(EngineError, match=r"'default' in place of those that were loaded"):
        several.generate([[5]], 1, DRAWN, [1])
    several.load_weights(tiny(1))
    several.generate([[5]], 1, DRAWN, [1])


def test_servers_without_labels_are_believed(several: Any, servers: list[Loopback]) -> None:
    for server in servers:
        server.label = None
    several.load_weights(tiny(1))
    greedy_as(several, tiny(1))


def test_a_server_without_control_routes_says_how_to_start_it(
    several: Any, servers: list[Loopback]
) -> None:
    servers[0].faults["/pause?mode=abort"] = 404
    with pytest.raises(EngineError, match=r"status 404.*VLLM_SERVER_DEV_MODE=1"):
        several.load_weights(tiny(1))


def test_a_server_that_fails_for_good_is_an_error(several: Any, servers: list[Loopback]) -> None:
    servers[1].faults["/v1/completions"] = 500
    prompts = states()
    with pytest.raises(ServerError, match="status 500"):
        several.generate(prompts, 1, DRAWN, seeds_of(prompts))


def test_servers_that_give_nan_are_an_error(several: Any, servers: list[Loopback]) -> None:
    servers[0].nan = True
    with pytest.raises(NotFiniteError, match=r"^logprobs of rollouts"):
        several.generate([[5]], 1, DRAWN, [1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"urls": []}, r"^urls: expected a list of at least one address"),
        ({"urls": "http://one"}, r"^urls: expected a list"),
        ({"urls": ["ftp://one"]}, r"^urls: base_url: expected an address that begins with http"),
        ({"urls": ["http://one", "http://one/"]}, r"^urls: expected different addresses"),
        ({"concurrency": 0}, r"^concurrency: expected at least 1, got 0"),
        ({"retries": -1}, r"^retries: expected at least 0"),
        ({"timeout": 0.0}, r"^timeout: expected a number above 0"),
    ],
)
def test_bad_options_of_servers_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        ServersBackend(**{"urls": ["http://one/v1"], "model": "tiny", **options})


def test_bad_arguments_reach_no_server(several: Any, servers: list[Loopback]) -> None:
    with pytest.raises(InvalidInputError, match=r"^n: expected at least 1"):
        several.generate([[5]], 0, DRAWN, [1])
    with pytest.raises(InvalidInputError, match=r"^prompts\[1\]: expected at least one token"):
        several.generate([[5], []], 1, DRAWN, [1, 2])
    assert [server.calls for server in servers] == [[], [], []]
    with pytest.raises(InvalidInputError, match=r"^prompts\[0\]: 250 tokens and max_new_tokens=12"):
        several.generate([[5] * 250], 1, DRAWN, [1])
    with pytest.raises(
        InvalidInputError, match=r"^model: expected a name .*\['tiny'\], got 'huge'"
    ):
        ServersBackend([servers[0].url], "huge").generate([[5]], 1, DRAWN, [1])
    unsent = ServersBackend([servers[0].url], "tiny")
    with pytest.raises(InvalidInputError, match=r"^weights_folder: expected a folder"):
        unsent.load_weights(tiny(1))
    assert {call for server in servers for call in server.calls} == {"/v1/models"}


# --- vLLM's own server ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_url(folder: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = {
        "--model": str(folder), "--served-model-name": "tiny", "--dtype": "float32",
        "--max-model-len": "256", "--host": "127.0.0.1", "--port": str(port),
        "--block-size": str(BLOCK),
    }  # fmt: skip
    log = folder / "server.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [
                sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager",
                "--no-enable-chunked-prefill", "--enable-prompt-tokens-details",
                *(word for pair in arguments.items() for word in pair),
            ],
            stdout=stream, stderr=stream,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_SERVER_DEV_MODE": "1"},
        )  # fmt: skip
        try:
            end = time.monotonic() + START_S
            while not _answers(f"http://127.0.0.1:{port}/health"):
                if process.poll() is not None or time.monotonic() > end:
                    raise AssertionError(f"the server did not start:\n{log.read_text()[-5000:]}")
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            process.wait(60)


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2).status_code == 200
    except httpx.TransportError:
        return False  # not listening yet


@needs_vllm
def test_vllms_own_server_generates_reuses_and_takes_weights(
    real_url: str, model: Any, tmp_path: Path
) -> None:
    backend = ServersBackend([real_url], "tiny", weights_folder=tmp_path, retries=1)
    generates_as(backend, model)
    prompts = states()
    whole = backend.generate(prompts, 4, DRAWN, seeds_of(prompts))
    again = backend.generate(prompts[::-1], 2, DRAWN, seeds_of(prompts)[::-1])
    assert ids(again)[::-1] == [some[:2] for some in ids(whole)]
    assert backend.usage.hit_rate > 0.5
    backend.load_weights(tiny(1))
    generates_as(backend, tiny(1))
    assert backend._labels[0].startswith("weights-")
    with pytest.raises(InvalidInputError, match=r"^prompts\[0\]: 250 tokens and max_new_tokens=12"):
        backend.generate([[5] * 250], 1, DRAWN, [1])
