"""Weights come into vLLM by its own transfer: start, update, finish."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from asyncrlhf.errors import (
    InvalidInputError,
    MissingExtraError,
    WaitTimeoutError,
    WeightUpdateError,
)
from asyncrlhf.settings import one_of, positive
from asyncrlhf.transport.model_folder import ModelFolder, read
from asyncrlhf.transport.routes import Receiver, SyncClient, Update, Weights, verify


class VLLMTransfer:
    """Sends weights by vLLM's own transfer: start, update, finish, after joining a group once.

    The trainer's end is vLLM's ``WeightTransferTrainerFactory``. Its backends ``"nccl"``, which
    broadcasts between GPUs, and ``"ipc"``, which shares the memory of one GPU, need a GPU at both
    ends; they were never run here, only held against vLLM's interfaces.

    Args:
        backend: the name under which vLLM knows it; one of the two above, or with
            ``trainer_init`` one that was registered with vLLM.
        master_address: of the trainer, as the workers reach it (nccl).
        master_port: a free port there (nccl).
        world_size: workers and trainer together; None asks the receiver (nccl).
        packed: send many tensors in one message.
        device: where tensors must be to be sent.
        timeout: seconds that joining, and each sending, may take.
        client: the receiving end, such as vLLM's ``RayVLLMWeightSyncClient``; None asks the engine
            for one.
        trainer_init: makes the trainer's end, an object with ``send_weights()`` and
            ``shutdown()``, from a :class:`SyncClient` and what is to be sent; None is vLLM's.

    Raises:
        InvalidInputError: a backend for which ``trainer_init`` is needed, or a number out of range.
    """

    def __init__(
        self,
        backend: str = "nccl",
        *,
        master_address: str = "127.0.0.1",
        master_port: int = 29_600,
        world_size: int | None = None,
        packed: bool = True,
        device: str | torch.device = "cuda",
        timeout: float = 600.0,
        client: SyncClient | None = None,
        trainer_init: Callable[[SyncClient, TensorSource], Any] | None = None,
    ) -> None:
        if trainer_init is None:
            one_of("backend", backend, ("nccl", "ipc"))
        positive("timeout", timeout)
        if world_size is not None and world_size < 2:
            raise InvalidInputError(
                f"world_size: expected at least 2, a trainer and a worker, got {world_size}"
            )
        self.backend = backend
        self.timeout = timeout
        self.device = torch.device(device)
        self._address = (master_address, master_port)
        self._world_size = world_size
        self._packed = packed
        self._client = client
        self._trainer_init = trainer_init
        self._weights = TensorSource()
        self._joined: tuple[_Labelled, Any] | None = None

    def prepare(self, source: Weights, version: int, start: ModelFolder | None) -> Update:  # noqa: ARG002 - the label is known when it is sent
        """See :class:`Route`."""
        return _Transfer(self, source, start)

    def send(self, weights: Sequence[tuple[str, Tensor]], receiver: Receiver, version: int) -> None:
        """Run the phases, and join the group before the first time.

        Raises:
            WeightUpdateError: a phase failed; the message names it.
            WaitTimeoutError: it took too long.
        """
        self._weights.pairs = [(name, value.to(self.device)) for name, value in weights]
        try:
            if self._joined is None:
                client = _Labelled(self._client or receiver.sync_client(self.timeout))
                trainer = self._limited(client, lambda: self._join(client, receiver))
                self._joined = (client, trainer)
            client, trainer = self._joined
            client.version = str(version)
            self._limited(client, trainer.send_weights)
        except BaseException as error:
            # What is left of the group cannot be trusted: the next sending joins a new one.
            left, self._joined = self._joined, None
            # After a timeout, leaving it could hang as well.
            if left is not None and not isinstance(error, WaitTimeoutError):
                with suppress(WeightUpdateError, WaitTimeoutError):
                    self._limited(left[0], left[1].shutdown)
            raise
        finally:
            self._weights.pairs = []

    def close(self) -> None:
        """Leave the group; can be called twice."""
        left, self._joined = self._joined, None
        if left is not None:
            left[1].shutdown()

    def _join(self, client: SyncClient, receiver: Receiver) -> Any:
        if self._trainer_init is not None:
            return self._trainer_init(client, self._weights)
        try:
            from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
            from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
            from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
        except ModuleNotFoundError as error:
            raise MissingExtraError("vllm", "vllm") from error
        info: Any
        if self.backend == "ipc":
            info = IPCTrainerInitInfo(packed=self._packed, rank=0)
        else:
            address, port = self._address
            info = NCCLTrainerInitInfo(
                master_address=address,
                master_port=port,
                world_size=self._world_size or receiver.world_size() + 1,
                packed=self._packed,
                rank=0,
            )
        return WeightTransferTrainerFactory.trainer_init(info, client=client, source=self._weights)

    def _limited(self, client: _Labelled, work: Callable[[], Any]) -> Any:
        """The result of `work`, which a broken peer could keep waiting for ever."""
        done: dict[str, Any] = {}

        def run() -> None:
            try:
                done["result"] = work()
            except BaseException as error:  # noqa: BLE001 - raised by the caller's thread
                done["error"] = error

        thread = threading.Thread(target=run, name="asyncrlhf-transfer", daemon=True)
        thread.start()
        thread.join(self.timeout)
        if thread.is_alive():
            raise WaitTimeoutError(
                f"the phase {client.phase} of the weight transfer",
                self.timeout,
                "the workers, or the connection to them, hang; look at vLLM's log",
            )
        error = done.get("error")
        if isinstance(error, MissingExtraError):
            raise error
        if error is not None:
            raise WeightUpdateError(
                f"the phase {client.phase} of the weight transfer failed: "
                f"{type(error).__name__}: {error}"
            ) from error
        return done["result"]


class _Transfer:
    """Weights of a source, read again whenever they are sent."""

    def __init__(self, transfer: VLLMTransfer, source: Weights, start: ModelFolder | None) -> None:
        self._transfer = transfer
        self._source = source
        self._start = start
        self.repeatable = hasattr(source, "checksum")
        self._read_now: list[tuple[str, Tensor]] | None = self._read()  # refuse before sending

    def _read(self) -> list[tuple[str, Tensor]]:
        return read(self._source) if self._start is None else self._start.complete(self._source)

    def send(self, receiver: Receiver, version: int) -> None:
        """See :class:`Update`."""
        weights, self._read_now = self._read_now or self._read(), None
        self._transfer.send(weights, receiver, version)
        verify(self._source)


class TensorMeta(NamedTuple):
    """One tensor without its values, as vLLM's trainers describe it to the workers."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class TensorSource:
    """What vLLM's trainers read: the same tensors in the same order, as often as they like."""

    def __init__(self) -> None:
        self.pairs: list[tuple[str, Tensor]] = []

    def metadata(self) -> list[TensorMeta]:
        """What iterating will give."""
        return [TensorMeta(name, value.dtype, tuple(value.shape)) for name, value in self.pairs]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Names and values."""
        return iter(self.pairs)


class _Labelled:
    """Knows which phase a client is in, and gives it the label that vLLM's trainers leave out."""

    def __init__(self, inner: SyncClient) -> None:
        self._inner = inner
        self.phase = "init_weight_transfer_engine"
        self.version: str | None = None

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._inner.init_weight_transfer_engine(init_info)

    def start_weight_update(self) -> None:
        self.phase = "start_weight_update"
        self._inner.start_weight_update()

    def update_weights(self, update_info: Any) -> None:
        self.phase = "update_weights"
        self._inner.update_weights(update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.phase = "finish_weight_update"
        self._inner.finish_weight_update(weight_version or self.version)
