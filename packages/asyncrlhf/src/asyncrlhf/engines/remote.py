"""An engine in a process of its own, which may be killed at any moment: no result changes."""

from __future__ import annotations

import inspect
import logging
import pickle
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from asyncrlhf.engines.protocol import Completion, GenerationEngine
from asyncrlhf.errors import ActorError, WaitTimeoutError
from asyncrlhf.processes import ProcessDiedError, SupervisedProcess, packed

if TYPE_CHECKING:
    from torch import Tensor

    from decapod.lm import Request

_LOG = logging.getLogger(__name__)


class Process(Protocol):
    """Where an engine runs: a :class:`~asyncrlhf.processes.SupervisedProcess`, or one elsewhere."""

    @property
    def pid(self) -> int | None:
        """Process id, on the machine where it runs; None when there is none."""
        ...

    @property
    def starts(self) -> int:
        """How often it was started."""
        ...

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        ...

    def start(self) -> None:
        """Start it, anew if it ran before."""
        ...

    def call(self, method: str, *args: object, timeout: float) -> Any:
        """What a method of the engine gives; ProcessDiedError when there is nobody to call."""
        ...

    def close(self) -> None:
        """End it; can be called twice, and while another thread waits for it."""
        ...


class SupervisedEngine:
    """An engine in a process that is started again when it dies.

    It then gets the weights it had, and generates the lost requests once more: with a
    deterministic engine the completions are those it would have given.

    Args:
        process: runs a :class:`Served` engine.
        what: the engine in words, for messages.
        max_restarts: deaths in a row, without a finished call between them, after which it is
            given up.
        timeout: seconds that one call of :meth:`generate` or :meth:`load_weights` may take.
    """

    def __init__(
        self, process: Process, *, what: str, max_restarts: int = 3, timeout: float = 1800.0
    ) -> None:
        self._process = process
        self._what = what
        self._max_restarts = max_restarts
        self._timeout = timeout
        self._version = 0
        self._source: Any = None  # of the weights that count
        self._holds_them = True  # whether the process does
        self._busy = threading.Lock()  # the process takes one call at a time
        # Kept on this side: a process that waits to be resumed could not be told to.
        self._running = threading.Event()
        self._running.set()
        self.restarts = 0
        """How often the process was started again."""
        self.regenerated = 0
        """How many calls of :meth:`generate` were made again because the process died."""

    @property
    def pid(self) -> int | None:
        """Process id; None when there is none."""
        return self._process.pid

    @property
    def version(self) -> int:
        """Version of the weights in use."""
        return self._version

    def start(self) -> None:
        """Start the process now, with the weights it had, rather than at the next call.

        Raises:
            ActorError: it did not start, or died again.
            WaitTimeoutError: it took too long.
        """
        with self._turn():
            if not self._process.alive:
                try:
                    self._begin()
                    self._restore()
                except ProcessDiedError as error:
                    raise ActorError(f"{self._what} did not start: {error}") from error

    def generate(self, requests: Sequence[Request]) -> Iterator[Completion]:
        """Completions in the order of the requests.

        Raises:
            ActorError: the process died more often than it may be started again.
            WaitTimeoutError: no answer within ``timeout``, or it stayed paused as long.
            Exception: what the engine raised.
        """
        requests = list(requests)
        if not self._running.wait(self._timeout):
            raise WaitTimeoutError(f"{self._what}, which is paused, to be resumed", self._timeout)
        yield from self._surely("generate", requests)

    def load_weights(self, source: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Use these weights from now on; a snapshot travels as a handle, anything else as values.

        Raises:
            WeightUpdateError: they do not fit; the old version stays.
            ActorError: as for :meth:`generate`.
        """
        portable: Any = source
        # Looked for without asking: a checksum may have to be computed.
        if inspect.getattr_static(source, "checksum", None) is None:
            # Copies: a process that is started again needs them as they are now.
            portable = [(name, value.detach().to("cpu", copy=True)) for name, value in source]
        self._surely("load_weights", portable, version)
        self._source, self._version, self._holds_them = portable, version, True

    def pause(self) -> None:
        """Hold back further requests."""
        self._running.clear()

    def resume(self) -> None:
        """Take requests again."""
        self._running.set()

    def health(self) -> str:
        """Empty when the process runs and its engine, unless it is at work, says nothing else."""
        if not self._process.alive:
            return f"{self._what} does not run"
        if not self._busy.acquire(blocking=False):
            return ""
        try:
            return str(self._process.call("health", timeout=self._timeout))
        except (ProcessDiedError, WaitTimeoutError) as error:
            return str(error)
        finally:
            self._busy.release()

    def close(self) -> None:
        """End the process; can be called twice, and while another thread waits for it."""
        self._process.close()
        self._running.set()

    @contextmanager
    def _turn(self) -> Iterator[None]:
        if not self._busy.acquire(timeout=self._timeout):
            raise WaitTimeoutError(f"{self._what} to finish an earlier call", self._timeout)
        try:
            yield
        finally:
            self._busy.release()

    def _surely(self, method: str, *args: object) -> Any:
        with self._turn():
            for attempt in range(self._max_restarts + 1):
                try:
                    if not self._process.alive:
                        self._begin()
                    if method == "generate":
                        self._restore()
                    return self._process.call(method, *args, timeout=self._timeout)
                except ProcessDiedError as error:
                    if attempt == self._max_restarts:
                        raise ActorError(
                            f"{self._what} died {attempt + 1} times in a row: {error}; its "
                            "standard error says why, or memory ran out"
                        ) from error
                    _LOG.warning("%s; starting it again", error)
                    self.regenerated += method == "generate"
        raise AssertionError("unreachable")

    def _begin(self) -> None:
        again = self._process.starts > 0
        self._process.start()
        self.restarts += again
        self._holds_them = self._source is None

    def _restore(self) -> None:
        # Only for tokens, and not before an update: by then the snapshot may be overwritten.
        if not self._holds_them:
            self._process.call("load_weights", self._source, self._version, timeout=self._timeout)
            self._holds_them = True


class RemoteEngine(SupervisedEngine):
    """Runs any engine in a supervised process of this machine.

    Args:
        factory: makes the engine, in the process.
        what: the engine in words, for messages.
        threads: numeric threads of the process.
        cores: CPU cores that it is pinned to.
        max_restarts: deaths in a row, without a finished call between them, after which it is
            given up.
        timeout: seconds that one call of :meth:`generate` or :meth:`load_weights` may take.
        start_timeout: seconds until the engine must be there.
        silence_timeout: seconds without a sign of life after which the process counts as dead.
    """

    def __init__(
        self,
        factory: Callable[[], GenerationEngine],
        *,
        what: str = "the actor",
        threads: int = 1,
        cores: Sequence[int] | None = None,
        max_restarts: int = 3,
        timeout: float = 1800.0,
        start_timeout: float = 180.0,
        silence_timeout: float = 60.0,
    ) -> None:
        process = SupervisedProcess(
            served(factory, what),
            what=what,
            threads=threads,
            cores=cores,
            start_timeout=start_timeout,
            silence_timeout=silence_timeout,
        )
        super().__init__(process, what=what, max_restarts=max_restarts, timeout=timeout)


def served(factory: Callable[[], GenerationEngine], what: str) -> Callable[[], Served]:
    """The factory of an engine's process.

    Raises:
        InvalidInputError: ``factory`` cannot be pickled.
    """
    # Packed on its own, and not as part of a function of this module: only then does the code of a
    # module that the process cannot import travel along.
    code = packed(factory, what)
    return lambda: Served(pickle.loads(code)())  # noqa: S301 - packed here


class Served:
    """The engine as its process serves it: answers that can be sent as a whole."""

    def __init__(self, engine: GenerationEngine) -> None:
        self._engine = engine

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """All completions."""
        return list(self._engine.generate(requests))

    def load_weights(self, source: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See the protocol."""
        self._engine.load_weights(source, version)

    def health(self) -> str:
        """See the protocol."""
        return self._engine.health()

    def close(self) -> None:
        """See the protocol."""
        self._engine.close()
