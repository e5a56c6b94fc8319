"""vLLM in this process: weights that change, updates that fail, and vLLM's own transfer."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("decapod")
pytest.importorskip("transformers")

from asyncrlhf.engines import GenerationEngine, VersionSpan, VLLMInProcess
from asyncrlhf.errors import (
    InvalidInputError,
    MissingExtraError,
    WaitTimeoutError,
    WeightUpdateError,
)
from asyncrlhf.transport import SafetensorsDir, SharedMemory, VLLMTransfer
from asyncrlhf.transport.on_vllm import TensorSource, _Labelled
from asyncrlhf.transport.routes import SyncClient
from decapod.lm import (
    Request,
    RequestError,
    SamplingParams,
    TransformersEngine,
    build_model,
    build_tokenizer,
    sample_requests,
)

INSTALLED = importlib.util.find_spec("vllm") is not None
PROMPTS = [[1, 5, 9], [1, 20], [1, *range(4, 30)], [7]]
GREEDY = SamplingParams(12, 0.0, ignore_eos=True, logprobs_of="sampler")
DRAWN = SamplingParams(12, 0.7, logprobs_of="sampler")
OPTIONS: dict[str, Any] = {"dtype": "float32", "max_model_len": 256, "enforce_eager": True}


def needs_vllm(test: Any) -> Any:
    skip = pytest.mark.skipif(not INSTALLED, reason="vllm is not installed")
    return pytest.mark.vllm(skip(test))


def tiny(seed: int) -> Any:
    return build_model(
        45, layers=2, heads=2, intermediate=64, max_positions=256, init_std=0.1, seed=seed
    )


@pytest.fixture(scope="module")
def models() -> list[Any]:
    """Three models of one shape with different weights."""
    return [tiny(seed) for seed in range(3)]


@pytest.fixture(scope="module")
def folder(models: list[Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    texts = ["what is 12 and 34? abcdefghijklmnopqrstuvwxyz 0123456789"]
    models[0].save_pretrained(path)
    build_tokenizer(texts, chat=True, add_bos=True).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def llm(folder: Path) -> Any:
    """One for most tests, made by the engine itself."""
    made = VLLMInProcess(model=folder, **OPTIONS)
    list(made.generate(sample_requests(PROMPTS, GREEDY)))
    return made._llm


@pytest.fixture
def engine(llm: Any, models: list[Any]) -> Iterator[VLLMInProcess]:
    """A new engine around it, with the weights of the first model."""
    yield VLLMInProcess(llm)
    llm.collective_rpc(
        "reload_weights", kwargs={"weights_iterator": list(models[0].named_parameters())}
    )
    llm.reset_prefix_cache()


@pytest.fixture
def shared() -> Iterator[SharedMemory]:
    with SharedMemory() as memory:
        yield memory


def generated_by(engine: VLLMInProcess, model: Any, version: int) -> None:
    """Tokens, log-probabilities and version are those of a model."""
    greedy = sample_requests(PROMPTS, GREEDY)
    answers = TransformersEngine(model).generate(greedy)
    for ours, theirs in zip(engine.generate(greedy), answers, strict=True):
        assert ours.ids == theirs.token_ids
        assert ours.version_spans == (VersionSpan(0, 12, version),)
    drawn = sample_requests(PROMPTS, DRAWN, seed=version, n=4)
    for request, ours in zip(drawn, engine.generate(drawn), strict=True):
        assert ours.id == request.id
        whole = torch.tensor([[*request.prompt, *ours.ids]])
        with torch.no_grad():
            logits = model(whole).logits[0, len(request.prompt) - 1 : -1].double()
        logps = (logits / 0.7).log_softmax(-1).gather(-1, torch.tensor(ours.ids)[:, None])[:, 0]
        np.testing.assert_allclose(ours.logprobs, logps.numpy(), atol=1e-4, rtol=0)


# --- weights --------------------------------------------------------------------------------------


@needs_vllm
def test_generate_load_generate_uses_and_tags_the_weights_that_were_loaded(
    engine: VLLMInProcess, models: list[Any], shared: SharedMemory, tmp_path: Path
) -> None:
    assert isinstance(engine, GenerationEngine)
    generated_by(engine, models[0], 0)
    engine.load_weights(shared.publish(models[1].named_parameters(), 3), 3)
    generated_by(engine, models[1], 3)
    with SafetensorsDir(tmp_path) as published:
        engine.load_weights(published.publish(models[2].named_parameters(), 8), 8)
    assert (engine.version, engine.health()) == (8, "")
    generated_by(engine, models[2], 8)


@needs_vllm
def test_weights_that_do_not_learn_are_those_that_the_model_began_with(
    engine: VLLMInProcess, models: list[Any], shared: SharedMemory
) -> None:
    learning = {n: p for n, p in models[1].named_parameters() if "q_proj" in n or "norm" in n}
    mixed = tiny(0)
    mixed.load_state_dict({**models[0].state_dict(), **learning})
    engine.load_weights(list(models[2].named_parameters()), 1)
    engine.load_weights(shared.publish(learning.items(), 2), 2)
    generated_by(engine, mixed, 2)


@needs_vllm
@pytest.mark.parametrize("damage", ["unknown", "shape", "raises"])
def test_weights_that_do_not_fit_are_refused_before_vllm_hears_of_them(
    engine: VLLMInProcess, models: list[Any], damage: str
) -> None:
    def source() -> Iterator[tuple[str, torch.Tensor]]:
        weights = list(models[1].named_parameters())
        if damage == "unknown":
            weights.append(("value_head.weight", torch.zeros(1)))
        elif damage == "shape":
            weights[3] = (weights[3][0], torch.zeros(3))
        else:
            yield weights[0]
            raise OSError("the disk is gone")
        yield from weights

    words = {"unknown": "value_head", "shape": r"got \(3,\)", "raises": "the disk is gone"}
    with pytest.raises(WeightUpdateError, match=words[damage]):
        engine.load_weights(source(), 5)
    assert (engine.version, engine.health()) == (0, "")
    generated_by(engine, models[0], 0)


def half_way(llm: Any, times: int) -> Callable[..., Any]:
    """vLLM's own call, which really fails between two layers for some times."""
    real, left = llm.collective_rpc, [times]

    def call(method: Any, *args: Any, **kwargs: Any) -> Any:
        if method == "reload_weights" and left[0]:
            left[0] -= 1
            weights = list(kwargs["kwargs"]["weights_iterator"])
            middle = next(i for i, (name, _) in enumerate(weights) if "layers.1" in name)
            weights[middle] = (weights[middle][0], torch.zeros(3, 5))
            kwargs = {"kwargs": {"weights_iterator": weights}}
        return real(method, *args, **kwargs)

    return call


@needs_vllm
def test_an_update_that_fails_inside_vllm_is_undone(
    engine: VLLMInProcess, models: list[Any], shared: SharedMemory, monkeypatch: Any
) -> None:
    for version, before in ((0, models[0]), (4, models[1])):
        if version:
            engine.load_weights(shared.publish(before.named_parameters(), version), version)
        with monkeypatch.context() as patch:
            patch.setattr(engine._llm, "collective_rpc", half_way(engine._llm, 1))
            with pytest.raises(WeightUpdateError, match=f"version {version} is in use as before"):
                engine.load_weights(list(models[2].named_parameters()), 8)
        assert (engine.version, engine.health()) == (version, "")
        generated_by(engine, before, version)


@needs_vllm
def test_when_the_way_back_fails_too_nothing_is_generated_until_weights_are_loaded(
    engine: VLLMInProcess, models: list[Any], shared: SharedMemory, monkeypatch: Any
) -> None:
    engine.load_weights(shared.publish(models[1].named_parameters(), 4), 4)
    with monkeypatch.context() as patch:
        patch.setattr(engine._llm, "collective_rpc", half_way(engine._llm, 2))
        with pytest.raises(WeightUpdateError, match="nor could version 4 be brought back"):
            engine.load_weights(shared.publish(models[2].named_parameters(), 8), 8)
    assert "brought back" in engine.health()
    with pytest.raises(WeightUpdateError, match="until weights are loaded again"):
        engine.generate(sample_requests(PROMPTS, GREEDY))
    engine.load_weights(shared.snapshot(8), 8)
    assert (engine.version, engine.health()) == (8, "")
    generated_by(engine, models[2], 8)


@needs_vllm
def test_a_snapshot_that_is_overwritten_while_it_is_loaded_is_not_taken_for_its_version(
    engine: VLLMInProcess, models: list[Any], shared: SharedMemory, monkeypatch: Any
) -> None:
    real = engine._llm.collective_rpc
    newer = iter(range(5, 100))

    def slow(method: Any, *args: Any, **kwargs: Any) -> Any:
        if method == "reload_weights":
            for _ in range(2):
                shared.publish(models[2].named_parameters(), next(newer))
        return real(method, *args, **kwargs)

    old = shared.publish(models[1].named_parameters(), 4)
    with monkeypatch.context() as patch:
        patch.setattr(engine._llm, "collective_rpc", slow)
        with pytest.raises(WeightUpdateError, match=r"overwritten.*version 0 is in use as before"):
            engine.load_weights(old, 4)
    generated_by(engine, models[0], 0)


# --- requests -------------------------------------------------------------------------------------


@needs_vllm
def test_requests_are_checked_and_seeds_decide_alone(engine: VLLMInProcess) -> None:
    with pytest.raises(RequestError, match="256 positions"):
        engine.generate([Request((5,), GREEDY), Request((5,) * 250, GREEDY)])
    requests = sample_requests(PROMPTS, DRAWN, n=3)
    together = list(engine.generate(requests))
    alone = [next(engine.generate([request])) for request in reversed(requests)]
    assert [c.ids for c in together] == [c.ids for c in reversed(alone)]


@needs_vllm
def test_more_seeded_tokens_than_fit_into_one_step_are_served(engine: VLLMInProcess) -> None:
    """On a CPU, vLLM ends when it computes a prompt of a seeded request in parts."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 45, 200).tolist() for _ in range(40)]
    limit = engine._llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens
    assert limit < 40 * 200
    assert len(list(engine.generate(sample_requests(prompts, DRAWN)))) == 40


@needs_vllm
def test_log_probabilities_before_temperature_are_refused_twice(
    llm: Any, engine: VLLMInProcess, monkeypatch: Any
) -> None:
    before = SamplingParams(4, 0.7)
    with pytest.raises(RequestError, match="logprobs_mode='raw_logprobs'"):
        engine.generate([Request((5,), before)])
    monkeypatch.setattr(llm.llm_engine.model_config, "logprobs_mode", "raw_logprobs")
    with pytest.raises(InvalidInputError, match="logprobs_mode='processed_logprobs'"):
        VLLMInProcess(llm)


@needs_vllm
def test_a_paused_or_closed_engine_does_not_generate(llm: Any) -> None:
    engine = VLLMInProcess(llm, pause_timeout=0.05)
    engine.pause()
    with pytest.raises(WaitTimeoutError, match="the paused engine to be resumed"):
        engine.generate(sample_requests(PROMPTS, GREEDY))
    engine.resume()
    engine.close()
    engine.close()
    assert engine.health() == "closed"
    with pytest.raises(InvalidInputError, match="closed"):
        engine.generate(sample_requests(PROMPTS, GREEDY))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "exactly one of the two"),
        ({"llm": object(), "model": "m"}, "exactly one of the two"),
        ({"llm": object(), "max_model_len": 9}, "max_model_len: options are for an LLM"),
        ({"model": "m", "logprobs_mode": "raw_logprobs"}, "expected 'processed_logprobs'"),
        ({"model": "m", "pause_timeout": 0}, "pause_timeout"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInputError, match=words):
        VLLMInProcess(**options)


@pytest.mark.skipif(INSTALLED, reason="vllm is installed")
def test_without_vllm_the_extra_is_named_when_it_is_needed(tmp_path: Path) -> None:
    engine = VLLMInProcess(model=tmp_path)
    assert (engine.version, engine.health()) == (0, "")
    with pytest.raises(MissingExtraError, match=r"asyncrlhf\[vllm\]"):
        engine.generate(sample_requests(PROMPTS, GREEDY))


# --- vLLM's own transfer --------------------------------------------------------------------------


class ByReference:
    """A trainer's end for a worker of the same process: messages hold the tensors themselves."""

    def __init__(self, client: SyncClient, weights: TensorSource) -> None:
        self.client, self.weights = client, weights
        client.init_weight_transfer_engine({})

    def send_weights(self) -> None:
        self.client.start_weight_update()
        pairs = list(self.weights)
        for part in (pairs[:7], pairs[7:]):
            self.client.update_weights({"pairs": part})
        self.client.finish_weight_update()

    def shutdown(self) -> None:
        pass


def register_by_reference() -> None:
    """The worker's end, after the pattern of vLLM's own engines."""
    from dataclasses import dataclass

    from vllm.distributed.weight_transfer import WeightTransferEngine, WeightTransferEngineFactory
    from vllm.distributed.weight_transfer.base import (
        WeightTransferInitInfo,
        WeightTransferUpdateInfo,
    )
    from vllm.model_executor.model_loader.reload import (
        finalize_layerwise_reload,
        initialize_layerwise_reload,
    )

    @dataclass
    class Init(WeightTransferInitInfo):
        pass

    @dataclass
    class Update(WeightTransferUpdateInfo):
        pairs: list[tuple[str, torch.Tensor]]

    class Worker(WeightTransferEngine):
        init_info_cls = Init
        update_info_cls = Update

        def init_transfer_engine(self, init_info: Init) -> None:
            pass

        def start_weight_update(self) -> None:
            initialize_layerwise_reload(self.model)

        def receive_weights(self, update_info: Update) -> None:
            self.model.load_weights(update_info.pairs)

        def finish_weight_update(self) -> None:
            finalize_layerwise_reload(self.model, self.model_config)

        def shutdown(self) -> None:
            pass

    WeightTransferEngineFactory.register_engine("by_reference", Worker)


@needs_vllm
def test_weights_come_by_vllms_four_phases_and_a_half_done_update_is_undone(
    folder: Path, models: list[Any], shared: SharedMemory, monkeypatch: Any
) -> None:
    register_by_reference()
    transfer = VLLMTransfer("by_reference", trainer_init=ByReference, device="cpu", timeout=60)
    engine = VLLMInProcess(model=folder, weight_transfer=transfer, **OPTIONS)
    generated_by(engine, models[0], 0)
    engine.load_weights(shared.publish(models[1].named_parameters(), 4), 4)
    generated_by(engine, models[1], 4)
    assert engine._llm.get_weight_version() == "4"

    real, calls = ByReference.send_weights, [0]

    def breaks_once(self: ByReference) -> None:
        calls[0] += 1
        if calls[0] > 1:
            return real(self)
        self.client.start_weight_update()
        self.client.update_weights({"pairs": list(self.weights)[:9]})
        raise ConnectionError("the cable was pulled")

    monkeypatch.setattr(ByReference, "send_weights", breaks_once)
    with pytest.raises(WeightUpdateError, match=r"phase update_weights.*cable.*as before"):
        engine.load_weights(shared.publish(models[2].named_parameters(), 8), 8)
    generated_by(engine, models[1], 4)
    assert engine._llm.get_weight_version() == "4"
    engine.load_weights(shared.snapshot(8), 8)
    generated_by(engine, models[2], 8)


@needs_vllm
def test_our_protocols_are_those_of_vllm() -> None:
    from vllm.distributed.weight_transfer import (
        HTTPVLLMWeightSyncClient,
        ModuleSource,
        VLLMWeightSyncClient,
    )
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerWeightTransferEngine

    theirs = HTTPVLLMWeightSyncClient("http://127.0.0.1:1")
    assert isinstance(theirs, SyncClient)
    assert isinstance(_Labelled(theirs), VLLMWeightSyncClient)
    model = tiny(1)
    source = TensorSource()
    source.pairs = list(model.named_parameters())
    described = [(meta.name, meta.dtype, meta.shape) for meta in ModuleSource(model).metadata()]
    assert [tuple(meta) for meta in source.metadata()] == described
    checked = NCCLTrainerWeightTransferEngine._checked_iter(source, source.metadata())
    assert [name for name, _ in checked] == [name for name, _ in source.pairs]


@needs_vllm
@pytest.mark.parametrize("backend", ["nccl", "ipc"])
def test_vllms_factory_gets_what_its_trainers_want(
    backend: str, models: list[Any], monkeypatch: Any
) -> None:
    """Up to the first call that needs a GPU."""
    from vllm.distributed.weight_transfer import WeightTransferTrainerFactory

    seen: dict[str, Any] = {}

    class Trainer:
        @classmethod
        def trainer_init(cls, init_info: Any, *, client: Any, source: Any) -> Trainer:
            seen.update(info=init_info, client=client, source=source)
            return cls()

        def send_weights(self) -> None:
            seen["sent"] = [name for name, _ in seen["source"]]
            seen["client"].finish_weight_update()

        def shutdown(self) -> None:
            seen["left"] = True

    class Client:
        def finish_weight_update(self, weight_version: str | None = None) -> None:
            seen["label"] = weight_version

    class Receiver:
        def sync_client(self, _timeout: float) -> Any:
            return Client()

        def world_size(self) -> int:
            return 3

    monkeypatch.setitem(WeightTransferTrainerFactory._registry, backend, lambda: Trainer)
    transfer = VLLMTransfer(backend, master_address="10.0.0.1", master_port=7, device="cpu")
    transfer.prepare(list(models[1].named_parameters()), 4, None).send(Receiver(), 4)
    transfer.close()
    assert seen["sent"] == [name for name, _ in models[1].named_parameters()]
    assert (seen["label"], seen["left"], seen["info"].is_sender) == ("4", True, True)
    assert seen["info"].backend == backend
    if backend == "nccl":
        info = seen["info"]
        assert (info.master_address, info.master_port, info.world_size) == ("10.0.0.1", 7, 4)
        assert info.packed
