"""An actor of Ray as a process for an engine, and weights that reach it through the object store.

This module is imported in the actors, which need torch only if their engine does.
"""

from __future__ import annotations

import os
import pickle
import sys
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray

from asyncrlhf.errors import ActorError, WaitTimeoutError, WeightUpdateError
from asyncrlhf.messages import described, rebuilt
from asyncrlhf.processes import ProcessDiedError

if TYPE_CHECKING:
    from torch import Tensor


class RayProcess:
    """An actor that makes an object and calls its methods, one call at a time.

    Args:
        code: the packed factory of the object, in the object store.
        options: of the actor, as Ray takes them.
        what: the actor in words, for messages.
        threads: numeric threads.
        start_timeout: seconds until the object must be there.
    """

    def __init__(
        self, code: Any, options: dict[str, Any], what: str, threads: int, start_timeout: float
    ) -> None:
        self.starts = 0
        """How often it was started."""
        self.pid: int | None = None
        """Process id on its machine."""
        self.node = ""
        """Id of its node."""
        self._code, self._options, self._what = code, options, what
        self._threads = threads
        self._start_timeout = start_timeout
        self._actor: Any = None
        self._begun: Any = None
        self._closed = False
        self._lock = threading.Lock()  # of what changes when it starts or closes

    @property
    def alive(self) -> bool:
        """Whether it was started and, as far as one knows, has not ended."""
        return self._actor is not None

    def start(self) -> None:
        """Place the actor, ending an earlier one, and wait until its object is there.

        Raises:
            ActorError: the factory raised, or the actor was lost before the object was there.
            WaitTimeoutError: it took longer than ``start_timeout``.
        """
        self.begin()
        self.wait()

    def begin(self) -> None:
        """The first half of :meth:`start`, which does not wait."""
        with self._lock:
            if self._closed:
                raise ActorError(f"{self._what} was closed")
            self._kill()
            self._actor = ray.remote(_Actor).options(**self._options).remote()
            self._begun = self._actor.begin.remote(self._code, self._threads)
            self.starts += 1

    def wait(self) -> None:
        """The second half of :meth:`start`."""
        try:
            self.node, self.pid = self._answer(
                self._begun, self._start_timeout, f"{self._what} to start"
            )
        except ProcessDiedError as error:
            raise ActorError(f"{self._what} did not start: {error}") from error
        except ActorError:
            self._kill()
            raise

    def call(self, method: str, *args: object, timeout: float) -> Any:
        """Call a method of the object.

        Raises:
            ProcessDiedError: the actor was lost before it answered.
            ActorError: it was closed.
            WaitTimeoutError: no answer in time; the actor is ended.
            Exception: what the method raised, where its class is one of this library or of
                decapod; otherwise an ActorError with its traceback.
        """
        actor = self._actor
        if self._closed:
            raise ActorError(f"{self._what} was closed")
        if actor is None:
            raise ProcessDiedError(f"{self._what} is not running")
        reference = actor.call.remote(method, *args)
        return self._answer(reference, timeout, f"{self._what} to finish {method}")

    def close(self) -> None:
        """End the actor; can be called twice, from any thread."""
        with self._lock:
            self._closed = True
            self._kill()

    def _answer(self, reference: Any, timeout: float, what: str) -> Any:
        try:
            kind, value = ray.get(reference, timeout=timeout)
        except ray.exceptions.GetTimeoutError as error:
            self._kill()
            raise WaitTimeoutError(
                what, timeout, "give it more time, or look at its log"
            ) from error
        except ray.exceptions.RayTaskError as error:  # our own code was not even reached
            raise ActorError(f"{self._what} failed: {error}") from error
        except ray.exceptions.RayError as error:
            self._kill()
            if self._closed:
                raise ActorError(f"{self._what} was closed") from error
            said = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise ProcessDiedError(f"{self._what} was lost ({said})") from error
        except KeyboardInterrupt:
            self._kill()
            raise
        if kind == "error":
            raise rebuilt(self._what, *value)
        return value

    def _kill(self) -> None:
        actor, self._actor, self.pid = self._actor, None, None
        if actor is not None and ray.is_initialized():
            ray.kill(actor)


class _Actor:
    """What runs in the cluster. It answers instead of raising, as a supervised process does."""

    def __init__(self) -> None:
        self._engine: Any = None

    def begin(self, code: bytes, threads: int) -> tuple[str, Any]:
        try:
            self._engine = pickle.loads(code)()  # noqa: S301 - made by our own driver
            if "torch" in sys.modules:
                import torch

                torch.set_num_threads(threads)
        except Exception as error:  # noqa: BLE001 - a factory may raise anything; the caller is told
            return "error", described(error)
        return "value", (ray.get_runtime_context().get_node_id(), os.getpid())

    def call(self, method: str, *args: object) -> tuple[str, Any]:
        try:
            return "value", getattr(self._engine, method)(*args)
        except Exception as error:  # noqa: BLE001 - an engine may raise anything; the caller is told
            return "error", described(error)


# --- weights in the object store ------------------------------------------------------------------


@dataclass(frozen=True)
class StoredSnapshot:
    """A snapshot in Ray's object store; stays there as long as this object."""

    reference: Any
    version: int
    timeout: float

    @property
    def checksum(self) -> str:
        """Of names and values."""
        from asyncrlhf.transport.snapshot import checksum

        return checksum(self)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Names and copies of the values.

        Raises:
            WeightUpdateError: they did not arrive.
        """
        import torch

        try:
            pieces = ray.get(self.reference, timeout=self.timeout)
        except ray.exceptions.RayError as error:
            raise WeightUpdateError(
                f"weights of version {self.version} did not arrive: {type(error).__name__}: {error}"
            ) from error
        for name, dtype, shape, data in pieces:
            # A copy: torch warns of memory that, as the store's, cannot be written.
            value = torch.empty(shape, dtype=dtype)
            value.reshape(-1).view(torch.uint8).numpy()[:] = data
            yield name, value


def stored(source: Iterable[tuple[str, Tensor]], version: int, timeout: float) -> StoredSnapshot:
    """Put weights into the object store.

    Raises:
        WeightUpdateError: there is no room for them.
    """
    import torch

    # Bytes in arrays: these go into the store, and are read there, without another copy.
    pieces = []
    for name, value in source:
        flat = value.detach().to("cpu").contiguous().reshape(-1)
        pieces.append((name, value.dtype, tuple(value.shape), flat.view(torch.uint8).numpy()))
    try:
        return StoredSnapshot(ray.put(pieces), version, timeout)
    except ray.exceptions.RayError as error:
        raise WeightUpdateError(
            f"weights of version {version} do not fit into Ray's object store: {error}"
        ) from error
