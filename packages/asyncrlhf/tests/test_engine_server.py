"""The client of vLLM's server: the same contract against a fake and the real one, then faults."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch import Tensor

pytest.importorskip("decapod")
pytest.importorskip("transformers")

from asyncrlhf.engines import GenerationEngine, Replicas, VersionSpan, VLLMServer
from asyncrlhf.errors import InvalidInputError, WaitTimeoutError, WeightUpdateError
from asyncrlhf.transport import SafetensorsDir, SharedMemory, VLLMTransfer
from asyncrlhf.transport.on_vllm import TensorSource
from asyncrlhf.transport.routes import SyncClient
from asyncrlhf.transport.vllm_folder import ReloadFolder, VLLMFolder
from decapod.lm import (
    EngineError,
    Request,
    RequestError,
    SamplingParams,
    TransformersEngine,
    build_model,
    build_tokenizer,
    sample_requests,
)

PROMPTS = [[1, 5, 9], [1, 20], [1, *range(4, 30)], [7]]
GREEDY = SamplingParams(12, 0.0, ignore_eos=True, logprobs_of="sampler")
DRAWN = SamplingParams(12, 0.7, logprobs_of="sampler")
START_S = 300
KINDS = [
    "fake",
    pytest.param(
        "real",
        marks=[
            pytest.mark.vllm,
            pytest.mark.skipif(
                importlib.util.find_spec("vllm") is None, reason="vllm is not installed"
            ),
        ],
    ),
]


@dataclass
class Server:
    """A running server; ``fake`` is what it is behind its address, if it is no real one."""

    url: str
    fake: Any = None

    def engine(self, **options: Any) -> VLLMServer:
        return VLLMServer(self.url, "tiny", **{"retries": 1, "concurrency": 8, **options})


@pytest.fixture(scope="module")
def models() -> list[Any]:
    """Three models of one shape with different weights."""
    return [tiny(seed) for seed in range(3)]


def tiny(seed: int) -> Any:
    return build_model(
        45, layers=1, heads=2, intermediate=64, max_positions=256, init_std=0.1, seed=seed
    )


@pytest.fixture(scope="module")
def folder(models: list[Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the servers start with: the first model."""
    path = tmp_path_factory.mktemp("model")
    texts = ["what is 12 and 34? abcdefghijklmnopqrstuvwxyz 0123456789"]
    tokenizer = build_tokenizer(texts, chat=True, add_bos=True)
    assert len(tokenizer) == models[0].config.vocab_size
    models[0].save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def fake_module() -> Any:
    name = "fake_vllm_server"
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def start_fake(fake_module: Any, folder: Path) -> Iterator[Callable[[], Server]]:
    running: list[tuple[Any, threading.Thread]] = []

    def start() -> Server:
        server = fake_module.FakeVLLMServer(folder)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        running.append((server, thread))
        return Server(server.url, server)

    yield start
    for server, thread in running:
        server.running.set()
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def fake(start_fake: Callable[[], Server]) -> Server:
    return start_fake()


@pytest.fixture(scope="module")
def real_url(folder: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = {
        "--model": folder,
        "--served-model-name": "tiny",
        "--dtype": "float32",
        "--max-model-len": 256,
        "--host": "127.0.0.1",
        "--port": port,
        "--logprobs-mode": "processed_logprobs",
        "--weight-transfer-config": '{"backend": "ipc"}',
    }
    log = folder / "server.log"
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager",
        "--enable-scale-out", "--no-enable-chunked-prefill",
        *(str(word) for pair in words.items() for word in pair),
    ]  # fmt: skip
    settings = {"VLLM_SERVER_DEV_MODE": "1", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=stream, env={**os.environ, **settings}
        )
        try:
            url = f"http://127.0.0.1:{port}"
            deadline = time.monotonic() + START_S
            while not answers(f"{url}/health"):
                assert process.poll() is None, log.read_text()[-5000:]
                assert time.monotonic() < deadline, log.read_text()[-5000:]
                time.sleep(0.5)
            yield url
        finally:
            process.terminate()
            process.wait(60)


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2).status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture(params=KINDS)
def server(request: pytest.FixtureRequest, folder: Path) -> Iterator[Server]:
    if request.param == "fake":
        yield request.getfixturevalue("start_fake")()
        return
    url = request.getfixturevalue("real_url")
    yield Server(url)
    reload = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
    for path, body in (
        ("collective_rpc", reload),
        ("reset_prefix_cache", None),
        ("update_weight_version", {"new_version": "default"}),
        ("resume", None),
    ):
        httpx.post(f"{url}/{path}", json=body, timeout=60).raise_for_status()


@pytest.fixture
def shared() -> Iterator[SharedMemory]:
    with SharedMemory() as memory:
        yield memory


def forced(model: Any, request: Request, ids: tuple[int, ...]) -> np.ndarray:
    """Log-probabilities of a completion by one forward pass over all of it."""
    whole = torch.tensor([[*request.prompt, *ids]])
    with torch.no_grad():
        logits = model(whole).logits[0, len(request.prompt) - 1 : -1].double()
    logps = (logits / (request.params.temperature or 1.0)).log_softmax(-1)
    return logps.gather(-1, torch.tensor(ids)[:, None])[:, 0].numpy()


def generated_by(engine: VLLMServer, model: Any, version: int) -> None:
    """Tokens, log-probabilities and version are those of a model."""
    greedy = sample_requests(PROMPTS, GREEDY)
    for request, ours, theirs in zip(
        greedy, engine.generate(greedy), TransformersEngine(model).generate(greedy), strict=True
    ):
        assert ours.ids == theirs.token_ids
        assert ours.version_spans == (VersionSpan(0, 12, version),)
        np.testing.assert_allclose(
            ours.logprobs, forced(model, request, ours.ids), atol=1e-4, rtol=0
        )
    drawn = sample_requests(PROMPTS, DRAWN, seed=version, n=2)
    for request, ours in zip(drawn, engine.generate(drawn), strict=True):
        assert ours.id == request.id
        np.testing.assert_allclose(
            ours.logprobs, forced(model, request, ours.ids), atol=1e-4, rtol=0
        )


def greedy_by(engine: GenerationEngine, model: Any, version: int) -> None:
    """The quick form of the same: tokens and version are those of a model."""
    requests = sample_requests(PROMPTS[:2], SamplingParams(5, 0.0, ignore_eos=True))
    expected = [answer.token_ids for answer in TransformersEngine(model).generate(requests)]
    found = list(engine.generate(requests))
    assert [completion.ids for completion in found] == expected
    assert {completion.oldest_version for completion in found} == {version}


# --- the contract: fake and real ------------------------------------------------------------------


@pytest.mark.parametrize("endpoint", ["completions", "generate"])
def test_generate_load_generate_uses_and_tags_the_weights_that_were_loaded(
    server: Server, models: list[Any], shared: SharedMemory, tmp_path: Path, endpoint: Any
) -> None:
    engine = server.engine(weights=tmp_path, endpoint=endpoint)
    assert isinstance(engine, GenerationEngine)
    assert engine.version == 0
    generated_by(engine, models[0], 0)
    for version in (3, 8):
        snapshot = shared.publish(models[version % 2 + 1].named_parameters(), version)
        engine.load_weights(snapshot, version)
        assert engine.version == version
        assert engine.health() == ""
        generated_by(engine, models[version % 2 + 1], version)
    assert len(list(tmp_path.iterdir())) == 2
    engine.close()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_was_published_for_others_is_loaded_from_where_it_lies(
    server: Server, models: list[Any], tmp_path: Path
) -> None:
    with SafetensorsDir(tmp_path / "published") as published:
        engine = server.engine(weights=tmp_path / "own")
        engine.load_weights(published.publish(models[1].named_parameters(), 2), 2)
        generated_by(engine, models[1], 2)
    assert not (tmp_path / "own").exists()


def test_weights_that_do_not_learn_are_those_that_the_server_began_with(
    server: Server, models: list[Any], shared: SharedMemory, tmp_path: Path
) -> None:
    # A part of what vLLM fuses: alone, it would leave the rest of the matrix without values.
    learning = {n: p for n, p in models[1].named_parameters() if "q_proj" in n or "norm" in n}
    mixed = tiny(0)
    mixed.load_state_dict({**models[0].state_dict(), **learning})
    engine = server.engine(weights=tmp_path)
    engine.load_weights(list(models[2].named_parameters()), 1)
    engine.load_weights(shared.publish(learning.items(), 2), 2)
    generated_by(engine, mixed, 2)


@pytest.mark.parametrize("damage", ["unknown", "shape", "twice", "none", "raises"])
def test_weights_that_do_not_fit_are_refused_before_the_server_hears_of_them(
    server: Server, models: list[Any], tmp_path: Path, damage: str
) -> None:
    def source() -> Iterator[tuple[str, Tensor]]:
        weights = list(models[1].named_parameters())
        match damage:
            case "unknown":
                weights.append(("value_head.weight", torch.zeros(1)))
            case "shape":
                weights[3] = (weights[3][0], torch.zeros(3))
            case "twice":
                weights.append(weights[0])
            case "none":
                return
            case "raises":
                yield weights[0]
                raise OSError("the disk is gone")
        yield from weights

    words = {
        "unknown": "value_head",
        "shape": r"expected shape .*got \(3,\)",
        "twice": "twice",
        "none": "at least one",
        "raises": "the disk is gone",
    }[damage]
    engine = server.engine(weights=tmp_path)
    with pytest.raises(WeightUpdateError, match=words):
        engine.load_weights(source(), 5)
    assert (engine.version, engine.health()) == (0, "")
    if server.fake:
        assert "pause" not in server.fake.paths()
        assert not list(tmp_path.iterdir())
    generated_by(engine, models[0], 0)


class To:
    """A way of sending weights that leads to one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def prepare(self, *_: Any) -> ReloadFolder:
        return ReloadFolder(self.folder)


def test_an_update_that_the_server_cannot_load_is_undone(
    server: Server, models: list[Any], shared: SharedMemory, tmp_path: Path
) -> None:
    nowhere = server.engine(weights=To(tmp_path / "nowhere"))
    with pytest.raises(WeightUpdateError, match=r"status 500.*version 0 is in use as before"):
        nowhere.load_weights([], 4)
    assert (nowhere.version, nowhere.health()) == (0, "")
    generated_by(nowhere, models[0], 0)

    engine = server.engine(weights=VLLMFolder(tmp_path / "versions"))
    engine.load_weights(shared.publish(models[1].named_parameters(), 4), 4)
    engine._route = To(tmp_path / "nowhere")
    with pytest.raises(WeightUpdateError, match="version 4 is in use as before"):
        engine.load_weights([], 8)
    generated_by(engine, models[1], 4)


def test_a_transfer_that_fails_half_way_is_undone_and_names_its_phase(
    server: Server, models: list[Any], shared: SharedMemory
) -> None:
    transfer = VLLMTransfer("broken", trainer_init=Half, client=Phases(server.url), device="cpu")
    engine = server.engine(weights=transfer)
    with pytest.raises(WeightUpdateError, match=r"(?s)phase update_weights.*500.*in use as before"):
        engine.load_weights(shared.publish(models[1].named_parameters(), 4), 4)
    assert (engine.version, engine.health()) == (0, "")
    generated_by(engine, models[0], 0)


def test_a_label_that_nobody_here_has_set_means_other_weights(
    server: Server, models: list[Any], tmp_path: Path
) -> None:
    engine = server.engine(weights=tmp_path)
    generated_by(engine, models[0], 0)
    httpx.post(f"{server.url}/update_weight_version", json={"new_version": "77"}, timeout=30)
    with pytest.raises(WeightUpdateError, match=r"weights are '77'.*load weights again"):
        engine.generate(sample_requests(PROMPTS, GREEDY))
    engine.load_weights(list(models[1].named_parameters()), 1)
    generated_by(engine, models[1], 1)


def test_a_paused_engine_holds_requests_back_until_it_is_resumed(
    server: Server, models: list[Any], tmp_path: Path
) -> None:
    engine = server.engine(weights=tmp_path)
    for mode in ("keep", "wait", "abort"):
        engine.pause(mode)
        assert httpx.get(f"{server.url}/is_paused", timeout=30).json() == {"is_paused": True}
    engine.load_weights(list(models[1].named_parameters()), 1)
    assert httpx.get(f"{server.url}/is_paused", timeout=30).json() == {"is_paused": True}
    found: list[Any] = []
    requests = sample_requests(PROMPTS, GREEDY)
    thread = threading.Thread(target=lambda: found.extend(engine.generate(requests)))
    thread.start()
    thread.join(0.2)
    assert not found
    engine.resume()
    thread.join(30)
    assert [completion.oldest_version for completion in found] == [1] * 4


@pytest.mark.parametrize("endpoint", ["completions", "generate"])
def test_a_request_that_the_server_refuses_is_an_error_with_its_words(
    server: Server, endpoint: Any
) -> None:
    engine = server.engine(endpoint=endpoint)
    with pytest.raises(EngineError, match=r"status 400.*256"):
        engine.generate([Request((5,) * 300, GREEDY)])
    with pytest.raises(RequestError, match="at least one token"):
        engine.generate([Request((5,), GREEDY), Request((), GREEDY)])


def test_eos_and_stop_tokens_end_a_completion(server: Server) -> None:
    params = SamplingParams(60, stop_token_ids=(9, 10), logprobs_of="sampler")
    for endpoint in ("completions", "generate"):
        engine = server.engine(endpoint=endpoint)
        found = list(engine.generate(sample_requests(PROMPTS, params, n=4)))
        assert "stop" in {completion.finish_reason for completion in found}
        for completion in found:
            assert not {2, 9, 10} & set(completion.ids[:-1])
            assert (completion.ids[-1] in (2, 9, 10)) == (completion.finish_reason == "stop")


def test_a_server_that_does_not_know_the_model_says_what_it_knows(server: Server) -> None:
    engine = VLLMServer(server.url, "large")
    with pytest.raises(InvalidInputError, match=r"knows \['tiny'\], not 'large'"):
        engine.generate(sample_requests(PROMPTS, GREEDY))


@pytest.mark.vllm
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")
def test_weights_that_are_swapped_in_flight_are_told_apart_token_by_token(
    real_url: str, models: list[Any], tmp_path: Path
) -> None:
    """The real server keeps what it generates, and goes on with the new weights."""
    engine = Server(real_url).engine(
        weights=tmp_path, endpoint="generate", in_flight="keep", concurrency=24
    )
    params = SamplingParams(240, 0.7, ignore_eos=True, logprobs_of="sampler")
    requests = sample_requests([[5, 6, 7]], params, n=24)
    used = {7: models[0], 9: models[1]}
    for delay in (0.1, 0.2, 0.4, 0.8, 1.6):  # until the swap falls into the generation
        engine.load_weights(list(models[0].named_parameters()), 7)
        found: list[Any] = []
        thread = threading.Thread(target=lambda out: out.extend(engine.generate(requests)),
                                  args=(found,))  # fmt: skip
        thread.start()
        time.sleep(delay)
        engine.load_weights(list(models[1].named_parameters()), 9)
        thread.join(60)
        for request, completion in zip(requests, found, strict=True):
            logps = {v: forced(model, request, completion.ids) for v, model in used.items()}
            for start, end, version in completion.version_spans:
                np.testing.assert_allclose(
                    completion.logprobs[start:end], logps[version][start:end], atol=1e-4, rtol=0
                )
        spans = [[span.version for span in completion.version_spans] for completion in found]
        if [7, 9] in spans:
            return
    raise AssertionError(f"no completion saw the swap: {spans}")


# --- the transfer in four phases, against the fake ------------------------------------------------


class Phases:
    """The receiving end over HTTP, with the four methods that vLLM's own client has."""

    def __init__(self, url: str) -> None:
        self.url = url

    def post(self, path: str, body: Any = None) -> None:
        httpx.post(f"{self.url}/{path}", json=body, timeout=10).raise_for_status()

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.post("init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        self.post("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        self.post("update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.post("finish_weight_update", {"weight_version": weight_version})


class Half:
    """A trainer's end whose update is empty, which every back-end refuses."""

    def __init__(self, client: SyncClient, _weights: TensorSource) -> None:
        self.client = client

    def send_weights(self) -> None:
        self.client.start_weight_update()
        self.client.update_weights({})

    def shutdown(self) -> None:
        pass


class Trainer(Half):
    """A trainer's end that sends values in the messages themselves, of which there are two."""

    def __init__(self, client: SyncClient, weights: TensorSource) -> None:
        super().__init__(client, weights)
        self.weights, self.shut_down = weights, 0
        client.init_weight_transfer_engine({})

    def send_weights(self) -> None:
        self.client.start_weight_update()
        pairs = list(self.weights)
        assert [(m.name, m.shape) for m in self.weights.metadata()] == [
            (name, tuple(value.shape)) for name, value in pairs
        ]
        for part in (pairs[:5], pairs[5:]):
            content = save({name: value.detach() for name, value in part})
            self.client.update_weights({"safetensors": b64encode(content).decode()})
        self.client.finish_weight_update()

    def shutdown(self) -> None:
        self.shut_down += 1


@pytest.fixture
def transfer(fake: Server) -> tuple[VLLMTransfer, list[Trainer]]:
    made: list[Trainer] = []

    def init(client: SyncClient, weights: TensorSource) -> Trainer:
        made.append(Trainer(client, weights))
        return made[-1]

    sender = VLLMTransfer(
        "messages", trainer_init=init, client=Phases(fake.url), device="cpu", timeout=20
    )
    return sender, made


def test_the_phases_come_in_order_and_the_last_has_the_version_as_label(
    fake: Server, transfer: tuple[VLLMTransfer, list[Trainer]], models: list[Any],
    shared: SharedMemory,
) -> None:  # fmt: skip
    assert isinstance(Phases(""), SyncClient)
    sender, made = transfer
    engine = fake.engine(weights=sender)
    engine.load_weights(shared.publish(models[1].named_parameters(), 4), 4)
    steering = ["pause", "init_weight_transfer_engine", "start_weight_update", "update_weights",
                "update_weights", "finish_weight_update", "reset_prefix_cache",
                "update_weight_version", "resume"]  # fmt: skip
    assert [path for path in fake.fake.paths() if path in steering] == steering
    assert fake.fake.calls[-4][1] == {"weight_version": "4"}
    greedy_by(engine, models[1], 4)
    engine.load_weights(shared.publish(models[2].named_parameters(), 8), 8)
    greedy_by(engine, models[2], 8)
    assert fake.fake.paths().count("init_weight_transfer_engine") == 1
    engine.close()
    assert [trainer.shut_down for trainer in made] == [1]


@pytest.mark.parametrize(
    "phase",
    ["init_weight_transfer_engine", "start_weight_update", "update_weights",
     "finish_weight_update"],
)  # fmt: skip
@pytest.mark.parametrize("fault", [500, "lost"])
def test_a_failure_in_any_phase_keeps_the_version_and_brings_its_weights_back(
    fake: Server, transfer: tuple[VLLMTransfer, list[Trainer]], models: list[Any],
    shared: SharedMemory, phase: str, fault: Any,
) -> None:  # fmt: skip
    sender, _ = transfer
    engine = fake.engine(weights=sender)
    if phase != "init_weight_transfer_engine":
        engine.load_weights(shared.publish(models[1].named_parameters(), 4), 4)
    before = engine.version
    fake.fake.faults = {phase: [fault]}
    with pytest.raises(WeightUpdateError, match=f"(?s)phase {phase}.*in use as before"):
        engine.load_weights(shared.publish(models[2].named_parameters(), 8), 8)
    assert engine.version == before
    greedy_by(engine, models[1 if before else 0], before)
    engine.load_weights(shared.snapshot(8), 8)
    greedy_by(engine, models[2], 8)


def test_weights_that_cannot_be_read_again_cannot_be_brought_back(
    fake: Server, transfer: tuple[VLLMTransfer, list[Trainer]], models: list[Any]
) -> None:
    sender, _ = transfer
    engine = fake.engine(weights=sender)
    engine.load_weights(models[1].named_parameters(), 4)  # a generator
    fake.fake.faults = {"update_weights": [500]}
    with pytest.raises(WeightUpdateError, match="not published as a snapshot"):
        engine.load_weights(models[2].named_parameters(), 8)
    kept_away(fake, engine)
    engine.load_weights(models[2].named_parameters(), 8)
    greedy_by(engine, models[2], 8)


def test_a_peer_that_hangs_is_given_up_and_the_group_is_joined_anew(
    fake: Server, models: list[Any], shared: SharedMemory
) -> None:
    hanging = threading.Event()

    class Hanging(Trainer):
        def send_weights(self) -> None:
            if hanging.is_set():
                super().send_weights()
            else:
                self.client.start_weight_update()
                hanging.wait(30)

    sender = VLLMTransfer(
        "messages", trainer_init=Hanging, client=Phases(fake.url), device="cpu", timeout=0.3
    )
    engine = fake.engine(weights=sender)
    with pytest.raises(WeightUpdateError, match=r"waited 0.3 s for the phase start_weight_update"):
        engine.load_weights(shared.publish(models[1].named_parameters(), 4), 4)
    hanging.set()
    sender.timeout = 20
    engine.load_weights(shared.snapshot(4), 4)
    greedy_by(engine, models[1], 4)
    assert fake.fake.paths().count("init_weight_transfer_engine") == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"backend": "carrier pigeon"}, "backend: expected one of nccl, ipc"),
        ({"world_size": 1}, "world_size: expected at least 2"),
        ({"timeout": 0}, "timeout"),
    ],
)
def test_bad_options_of_a_transfer_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInputError, match=words):
        VLLMTransfer(**options)


# --- faults of the server -------------------------------------------------------------------------


def kept_away(server: Server, engine: VLLMServer) -> None:
    """Nobody gets to generate with broken weights, which would end the server."""
    assert server.fake.broken
    assert not server.fake.running.is_set()
    with pytest.raises(WeightUpdateError, match="until weights are loaded again"):
        engine.generate(sample_requests(PROMPTS, GREEDY))
    with pytest.raises(WeightUpdateError):
        engine.resume()
    assert "brought back" in engine.health()
    assert not server.fake.dead


STEPS = ["pause", "collective_rpc", "reset_prefix_cache", "update_weight_version", "resume"]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("fault", [500, "lost", 0.6])
def test_a_failure_at_any_step_keeps_the_version_and_its_weights(
    fake: Server, models: list[Any], shared: SharedMemory, tmp_path: Path, step: str, fault: Any
) -> None:
    engine = fake.engine(weights=tmp_path, retries=0, update_timeout=0.4)
    engine.load_weights(shared.publish(models[1].named_parameters(), 4), 4)
    fake.fake.faults = {step: [fault]}
    with pytest.raises(WeightUpdateError, match=step) as caught:
        engine.load_weights(shared.publish(models[2].named_parameters(), 8), 8)
    assert "waited 0.4 s" in str(caught.value) or fault != 0.6
    assert engine.version == 4
    greedy_by(engine, models[1], 4)
    engine.load_weights(shared.snapshot(8), 8)
    greedy_by(engine, models[2], 8)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("fault", [503, "lost"])
def test_a_passing_fault_is_tried_again_since_every_step_can_be_made_twice(
    fake: Server, models: list[Any], shared: SharedMemory, tmp_path: Path, step: str, fault: Any
) -> None:
    engine = fake.engine(weights=tmp_path, retries=1)
    fake.fake.faults = {step: [fault]}
    engine.load_weights(shared.publish(models[2].named_parameters(), 8), 8)
    assert fake.fake.paths().count(step) == 2
    greedy_by(engine, models[2], 8)


def test_when_the_way_back_fails_too_the_server_stays_paused_until_weights_are_loaded(
    fake: Server, models: list[Any], shared: SharedMemory, tmp_path: Path
) -> None:
    engine = fake.engine(weights=tmp_path, retries=0)
    engine.load_weights(shared.publish(models[1].named_parameters(), 4), 4)
    fake.fake.broken = True  # as a load that stopped half-way leaves it
    fake.fake.faults = {"collective_rpc": [500, 500]}
    with pytest.raises(WeightUpdateError, match="nor could version 4 be brought back"):
        engine.load_weights(shared.publish(models[2].named_parameters(), 8), 8)
    assert engine.version == 4
    kept_away(fake, engine)
    engine.load_weights(shared.snapshot(8), 8)
    assert engine.health() == ""
    greedy_by(engine, models[2], 8)


def test_two_servers_share_a_folder_and_none_generates_before_both_have_its_weights(
    start_fake: Callable[[], Server], models: list[Any], shared: SharedMemory, tmp_path: Path
) -> None:
    first, second = start_fake(), start_fake()
    folder = VLLMFolder(tmp_path)
    engines = [server.engine(weights=folder, retries=0) for server in (first, second)]
    replicas = Replicas(engines)
    replicas.load_weights(shared.publish(models[1].named_parameters(), 4), 4)
    greedy_by(replicas, models[1], 4)
    bodies = [
        body for server in (first, second) for _, body in server.fake.calls if "kwargs" in body
    ]
    assert len({body["kwargs"]["weights_path"] for body in bodies}) == 1
    assert all("v1/completions" in server.fake.paths() for server in (first, second))

    second.fake.faults = {"collective_rpc": [500]}
    with pytest.raises(WeightUpdateError, match="reached 1 of 2 replicas; replica 1"):
        replicas.load_weights(shared.publish(models[2].named_parameters(), 8), 8)
    with pytest.raises(WeightUpdateError, match="hold different weights"):
        replicas.generate(sample_requests(PROMPTS, GREEDY))
    greedy_by(engines[1], models[1], 4)
    replicas.load_weights(shared.snapshot(8), 8)
    greedy_by(replicas, models[2], 8)


def test_a_server_that_was_started_again_is_noticed_by_its_label(
    start_fake: Callable[[], Server], models: list[Any], shared: SharedMemory, tmp_path: Path
) -> None:
    first, second = start_fake(), start_fake()
    engine = first.engine(weights=tmp_path)
    engine.load_weights(shared.publish(models[1].named_parameters(), 4), 4)
    # Whoever listens at the address now has the weights that it began with.
    engine._server._control.url = second.url
    with pytest.raises(WeightUpdateError, match="'default', but version 4"):
        engine.generate(sample_requests(PROMPTS, GREEDY))


def test_a_server_without_labels_is_believed(
    fake: Server, models: list[Any], shared: SharedMemory, tmp_path: Path
) -> None:
    fake.fake.labelled = False
    for endpoint in ("completions", "generate"):
        engine = fake.engine(weights=tmp_path / endpoint, endpoint=endpoint)
        engine.load_weights(list(models[1].named_parameters()), 4)
        greedy_by(engine, models[1], 4)


def test_a_server_whose_label_is_not_the_first_has_no_weights_to_go_back_to(
    fake: Server, models: list[Any], tmp_path: Path
) -> None:
    fake.fake.label = "12"  # of an earlier run
    engine = fake.engine(weights=tmp_path, retries=0)
    fake.fake.faults = {"collective_rpc": [500]}
    with pytest.raises(WeightUpdateError, match="version 0 could not be brought back"):
        engine.load_weights(list(models[1].named_parameters()), 4)


def test_spans_of_a_swap_are_those_that_the_server_tells(
    fake: Server, models: list[Any], tmp_path: Path
) -> None:
    engine = fake.engine(weights=tmp_path, endpoint="generate")
    engine.load_weights(list(models[1].named_parameters()), 4)
    fake.fake.swap_at = (5, "default")
    for completion in engine.generate(sample_requests(PROMPTS, GREEDY)):
        assert completion.version_spans == (VersionSpan(0, 5, 0), VersionSpan(5, 12, 4))
        assert completion.oldest_version == 0
    fake.fake.swap_at = (13, "default")
    with pytest.raises(EngineError, match="12 tokens with the version spans"):
        engine.generate(sample_requests(PROMPTS, GREEDY))
    fake.fake.swap_at = (5, "somebody's")
    with pytest.raises(EngineError, match="nobody loaded here"):
        engine.generate(sample_requests(PROMPTS, GREEDY))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"token_ids": [5, 6]}, "2 token ids and 12 log-probabilities"),
        ({"finish_reason": "abort"}, "ended it early"),
        ({"token_ids": None}, "token"),
    ],
)
def test_an_answer_that_does_not_fit_together_is_an_error(
    fake: Server, change: dict[str, Any], words: str
) -> None:
    for endpoint, path in (
        ("completions", "v1/completions"),
        ("generate", "inference/v1/generate"),
    ):
        fake.fake.faults = {path: [change]}
        with pytest.raises(EngineError, match=words):
            fake.engine(endpoint=endpoint).generate([Request((5, 6), GREEDY)])


def test_passing_faults_of_generation_change_no_completion(fake: Server, models: list[Any]) -> None:
    fake.fake.faults = {"v1/completions": [500, "drop", 503, "lost"]}
    greedy_by(fake.engine(retries=4), models[0], 0)


def test_a_silent_server_is_given_up_with_what_was_waited_for(fake: Server) -> None:
    fake.fake.faults = {"v1/completions": [1.0]}
    with pytest.raises(WaitTimeoutError, match=r"waited 0.3 s for http.*v1/completions to answer"):
        fake.engine(timeout=0.3, retries=0).generate([Request((5, 6), GREEDY)])
    engine = fake.engine(pause_timeout=0.1)
    engine.pause()
    with pytest.raises(WaitTimeoutError, match="the paused engine to be resumed"):
        engine.generate([Request((5, 6), GREEDY)])


def test_the_health_of_a_server_says_what_is_wrong(fake: Server) -> None:
    engine = fake.engine()
    assert engine.health() == ""
    fake.fake.faults = {"health": [503]}
    assert "status 503" in engine.health()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    assert "no answer" in VLLMServer(url, "tiny").health()
    with pytest.raises(EngineError, match="no answer"):
        VLLMServer(url, "tiny", retries=0).generate([Request((5, 6), GREEDY)])


def test_a_server_that_is_gone_keeps_the_version(
    fake: Server, models: list[Any], shared: SharedMemory, tmp_path: Path
) -> None:
    engine = fake.engine(weights=tmp_path, retries=0)
    engine.load_weights(shared.publish(models[1].named_parameters(), 4), 4)
    fake.fake.faults = {"pause": ["drop"], "resume": ["drop"], "reset_prefix_cache": ["drop"]}
    with pytest.raises(WeightUpdateError, match="nor does it go on with version 4"):
        engine.load_weights(shared.publish(models[2].named_parameters(), 8), 8)
    assert engine.version == 4
    fake.fake.faults = {}
    engine.load_weights(shared.snapshot(8), 8)
    greedy_by(engine, models[2], 8)


def test_updates_need_a_way_and_every_option_is_checked(fake: Server, tmp_path: Path) -> None:
    with pytest.raises(WeightUpdateError, match="without a way of sending them"):
        fake.engine().load_weights([("a", torch.zeros(1))], 1)
    for options, words in (
        ({"base_url": "localhost:8000"}, "base_url: expected an address"),
        ({"endpoint": "chat"}, "endpoint: expected one of completions, generate"),
        ({"in_flight": "drop"}, "in_flight: expected one of wait, keep, abort"),
        ({"concurrency": 0}, "concurrency: expected at least 1"),
        ({"retries": -1}, "retries: expected at least 0"),
        ({"timeout": 0}, "timeout: expected a number above 0"),
        ({"update_timeout": -1}, "update_timeout: expected a number above 0"),
        ({"weights": "relative"}, "path: expected an absolute path"),
    ):
        with pytest.raises(InvalidInputError, match=words):
            VLLMServer(**{"base_url": fake.url, "model": "tiny", **options})
    with pytest.raises(InvalidInputError, match=r"start: .* holds no safetensors files"):
        fake.engine(weights=tmp_path, start=tmp_path).load_weights([], 1)
    with pytest.raises(InvalidInputError, match="mode: expected one of"):
        fake.engine().pause("stop")
