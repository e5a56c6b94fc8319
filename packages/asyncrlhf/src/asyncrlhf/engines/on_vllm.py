"""vLLM in this process behind the engine protocol."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from asyncrlhf.engines.protocol import Completion, VersionSpan
from asyncrlhf.engines.updates import LoadedWeights
from asyncrlhf.errors import (
    InvalidInputError,
    MissingExtraError,
    WaitTimeoutError,
    WeightUpdateError,
)
from asyncrlhf.settings import positive
from asyncrlhf.transport.model_folder import ModelFolder, read
from asyncrlhf.transport.on_vllm import VLLMTransfer
from asyncrlhf.transport.routes import Receiver, SyncClient, Update, Weights, verify

if TYPE_CHECKING:
    from decapod.lm import Request, VLLMEngine

_IN_PROCESS = "VLLM_ENABLE_V1_MULTIPROCESSING"
_MODE = "processed_logprobs"


class VLLMInProcess:
    """Generates with a ``vllm.LLM`` of this process, which gets weights through memory.

    The model is made when it is first needed. An update that fails is undone, by loading the
    version before once more; where that fails too, :meth:`generate` raises until an update
    succeeds, because vLLM would end the process. What is read again must be a snapshot: weights
    given as live parameters cannot be gone back to.

    vLLM's calls cannot be interrupted, so :meth:`generate` has no limit of its own.

    Args:
        llm: made with ``logprobs_mode="processed_logprobs"``, on a CPU with
            ``enable_chunked_prefill=False``, and with ``VLLM_ENABLE_V1_MULTIPROCESSING=0`` in the
            environment; or give ``model``.
        model: folder or name, from which an LLM is made.
        weight_transfer: sends weights by vLLM's own transfer. Needs GPUs, and was never run here
            with its real backends.
        pause_timeout: seconds that calls wait for :meth:`resume`, or for each other.
        options: of ``vllm.LLM``, with ``model``.

    Raises:
        InvalidInputError: both or none of ``llm`` and ``model``; options for a given LLM; or it
            gives log-probabilities of another kind.
    """

    def __init__(
        self,
        llm: Any = None,
        *,
        model: str | Path | None = None,
        weight_transfer: VLLMTransfer | None = None,
        pause_timeout: float = 600.0,
        **options: Any,
    ) -> None:
        if (llm is None) == (model is None):
            raise InvalidInputError("llm, model: expected exactly one of the two")
        if llm is not None and options:
            raise InvalidInputError(
                f"{', '.join(options)}: options are for an LLM that is made here; give them to the "
                "vllm.LLM that you pass"
            )
        if options.setdefault("logprobs_mode", _MODE) != _MODE:
            raise InvalidInputError(
                f"logprobs_mode: expected {_MODE!r}, because ratios need log-probabilities of what "
                f"was drawn from, got {options['logprobs_mode']!r}; leave it away"
            )
        positive("pause_timeout", pause_timeout)
        self._llm = llm
        self._model = model
        self._options = options
        self._transfer = weight_transfer
        self._engine: VLLMEngine | None = None
        self._loaded: LoadedWeights | None = None
        self._start: ModelFolder | None = None
        self._busy = threading.Lock()
        self._running = threading.Event()
        self._running.set()
        self._pause_timeout = pause_timeout
        self._closed = False
        if llm is not None:
            self._made()

    @property
    def version(self) -> int:
        """Version of the weights in use; 0 before any were loaded."""
        return 0 if self._loaded is None else self._loaded.version

    def generate(self, requests: Sequence[Request]) -> Iterator[Completion]:
        """Completions in the order of the requests; returns when all are there.

        Raises:
            decapod.lm.RequestError: a request cannot be served; nothing was generated.
            decapod.lm.EngineError: generation failed.
            WaitTimeoutError: the engine stayed paused or busy too long.
            WeightUpdateError: weights are broken since an update failed.
        """
        if not self._running.wait(self._pause_timeout):
            raise WaitTimeoutError("the paused engine to be resumed", self._pause_timeout)
        with self._alone() as (engine, loaded):
            loaded.refuse_if_broken()
            answers = engine.generate(requests)
            version = loaded.version
        return iter(
            [
                Completion(
                    given.token_ids,
                    given.logprobs,
                    (VersionSpan(0, len(given.token_ids), version),),
                    given.finish_reason,
                    given.id,
                )
                for given in answers
            ]
        )

    def load_weights(self, source: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Use these weights from now on; those not given are as the model began.

        Raises:
            WeightUpdateError: they do not fit, or loading failed; the old version stays.
            WaitTimeoutError: an earlier call did not end.
        """
        with self._alone() as (_, loaded):
            update: Update
            if self._transfer is None:
                update = _InMemory(source, self._start)
            else:
                update = self._transfer.prepare(source, version, self._start)
            loaded.replace(update, version)

    def pause(self) -> None:
        """Hold back further requests."""
        self._running.clear()

    def resume(self) -> None:
        """Take requests again."""
        self._running.set()

    def health(self) -> str:
        """Empty when the engine can serve, else what is wrong."""
        if self._closed:
            return "closed"
        return "" if self._loaded is None else self._loaded.problem

    def close(self) -> None:
        """Let the model go; can be called twice."""
        self._closed = True
        self._running.set()
        if self._transfer is not None:
            self._transfer.close()
        self._llm = self._engine = self._loaded = None

    @contextmanager
    def _alone(self) -> Iterator[tuple[VLLMEngine, LoadedWeights]]:
        if not self._busy.acquire(timeout=self._pause_timeout):
            raise WaitTimeoutError("vLLM to finish an earlier call", self._pause_timeout)
        try:
            yield self._made()
        finally:
            self._busy.release()

    def _made(self) -> tuple[VLLMEngine, LoadedWeights]:
        if self._closed:
            raise InvalidInputError("engine: it was closed; make a new one")
        if self._engine is None or self._loaded is None:
            llm = self._new() if self._llm is None else self._llm
            from decapod.lm import VLLMEngine  # needs vLLM: only now is it known to be there

            engine = VLLMEngine(llm)
            if engine.logprobs_of != "sampler":
                raise InvalidInputError(
                    f"llm: expected logprobs_mode={_MODE!r}, because ratios need log-probabilities "
                    "of what was drawn from; make vllm.LLM with it"
                )
            self._llm, self._engine = llm, engine
            self._start = _folder_of(str(llm.llm_engine.model_config.model))
            start = None if self._start is None else _InMemory(self._start, None)
            self._loaded = LoadedWeights(_Holder(llm), start, "vLLM in this process")
        return self._engine, self._loaded

    def _new(self) -> Any:
        try:
            from vllm import LLM
        except ModuleNotFoundError as error:
            raise MissingExtraError("vllm", "vllm") from error
        options = dict(self._options)
        if _on_cpu():
            # A prompt computed in parts makes vLLM rewind its request's generator, which torch's
            # generators on a CPU cannot do: vLLM 0.32 ends when a request has a seed.
            options.setdefault("enable_chunked_prefill", False)
        if self._transfer is not None:
            from vllm.config import WeightTransferConfig

            options["weight_transfer_config"] = WeightTransferConfig(backend=self._transfer.backend)
        before = os.environ.get(_IN_PROCESS)
        os.environ[_IN_PROCESS] = "0"
        try:
            return LLM(str(self._model), **options)
        finally:
            del os.environ[_IN_PROCESS]
            if before is not None:
                os.environ[_IN_PROCESS] = before


class _InMemory:
    """Weights of a source, handed over as tensors."""

    def __init__(self, source: Weights, start: ModelFolder | None) -> None:
        self._source = source
        self._start = start
        self.repeatable = hasattr(source, "checksum") or isinstance(source, ModelFolder)
        self._read_now: list[tuple[str, Tensor]] | None = None
        if not isinstance(source, ModelFolder):
            self._read_now = self._read()  # refuse before anything is touched

    def _read(self) -> list[tuple[str, Tensor]]:
        return read(self._source) if self._start is None else self._start.complete(self._source)

    def send(self, receiver: Receiver, version: int) -> None:  # noqa: ARG002 - has no label
        weights, self._read_now = self._read_now or self._read(), None
        assert isinstance(receiver, _Holder)
        receiver.load(weights)
        verify(self._source)


class _Holder:
    """The LLM as a holder of weights."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm

    def hold(self) -> None:
        """Nobody else generates: calls are made one at a time."""

    def load(self, weights: list[tuple[str, Tensor]]) -> None:
        values = [(name, value.detach()) for name, value in weights]
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": values})

    def reload(self, folder: Path) -> None:
        self._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})

    def settle(self, version: int) -> None:  # noqa: ARG002 - labels are for servers
        if not self._llm.reset_prefix_cache():
            raise WeightUpdateError("vLLM did not empty its prefix cache")

    def mend(self) -> None:
        # Values of the failed update that wait in a layer would be loaded before those of the
        # next. Where vLLM's insides have moved, the next update may fail as this one did.
        with suppress(ImportError, AttributeError):
            self._llm.collective_rpc(_forget_half_a_reload)
        # Likewise an update in four phases that was left open; mostly there is none.
        with suppress(Exception):
            self._llm.finish_weight_update()

    def sync_client(self, timeout: float) -> SyncClient:  # noqa: ARG002 - calls in this process
        return _Phases(self._llm)

    def world_size(self) -> int:
        return int(self._llm.llm_engine.vllm_config.parallel_config.world_size)


class _Phases:
    """The LLM as the receiving end of vLLM's weight transfer."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._llm.init_weight_transfer_engine({"init_info": init_info})

    def start_weight_update(self) -> None:
        self._llm.start_weight_update()

    def update_weights(self, update_info: Any) -> None:
        self._llm.update_weights({"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._llm.finish_weight_update(weight_version)


def _forget_half_a_reload(worker: Any) -> None:
    """Put the tensors of layers that wait for values back in place; runs in vLLM's worker."""
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    model = worker.model_runner.get_model()
    for layer in model.modules():
        waiting = get_layerwise_info(layer)
        waiting.loaded_weights.clear()
        waiting.load_numel = 0
    finalize_layerwise_reload(model, worker.model_runner.model_config)


def _on_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def _folder_of(model: str) -> ModelFolder | None:
    """The model's files, where they are at hand."""
    path = Path(model)
    if not path.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            path = Path(snapshot_download(model, local_files_only=True))
        except (LocalEntryNotFoundError, HfHubHTTPError, ValueError):
            return None
    return ModelFolder(path) if any(path.glob("*.safetensors")) else None
