"""An object in a process of its own, called by name, watched, and started again when it dies.

The child is a fresh interpreter with two pipes: it does not import the caller's main script, so
that notebooks and scripts without a guard work. Its output goes to standard error. It ends itself
when the caller is gone, ignores Ctrl-C (the caller decides what stops), and says every second that
it is alive.
"""

from __future__ import annotations

import json
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from asyncrlhf.errors import ActorError, InvalidInputError, WaitTimeoutError
from asyncrlhf.messages import described, read_message, rebuilt, write_message

_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv.pop()); "
    "from asyncrlhf.processes import serve; serve()"
)
_BEAT_SECONDS = 1.0
_GOODBYE_SECONDS = 2.0
_GOODBYE, _BEAT = b"", b"beat"  # every other message is a pickle


class ProcessDiedError(RuntimeError):
    """The process ended, or gave no sign of life, before it answered."""


class SupervisedProcess:
    """Builds an object in a child process and calls its methods there, one call at a time.

    Args:
        factory: makes the object; carried by cloudpickle, so that closures and lambdas work.
        what: the process in words, for messages ("the actor").
        threads: numeric threads of the child.
        cores: CPU cores that it is pinned to; None leaves that to the system.
        start_timeout: seconds until the object must be there.
        silence_timeout: seconds without a sign of life after which it counts as dead.

    Raises:
        InvalidInputError: ``factory`` cannot be pickled, or a number is out of range.
    """

    def __init__(
        self,
        factory: Callable[[], object],
        *,
        what: str,
        threads: int = 1,
        cores: Sequence[int] | None = None,
        start_timeout: float = 180.0,
        silence_timeout: float = 60.0,
    ) -> None:
        if threads < 1:
            raise InvalidInputError(f"threads: expected at least 1, got {threads}")
        for name, seconds in (
            ("start_timeout", start_timeout),
            ("silence_timeout", silence_timeout),
        ):
            if not seconds > 0:
                raise InvalidInputError(f"{name}: expected seconds above 0, got {seconds}")
        self.what = what
        self.starts = 0
        self._order = (packed(factory, what), threads, None if cores is None else list(cores))
        self._start_timeout = start_timeout
        self._silence_timeout = silence_timeout
        self._child: _Child | None = None
        self._closed = False
        self._lock = threading.Lock()  # of what changes when it starts or closes

    @property
    def pid(self) -> int | None:
        """Process id of the child; None when there is none."""
        child = self._child
        return None if child is None else child.pid

    @property
    def alive(self) -> bool:
        """Whether the child runs."""
        return self._child is not None and self._child.running

    def start(self) -> None:
        """Start the child, ending an earlier one, and wait until its object is there.

        Raises:
            ActorError: the factory raised, or the process ended before the object was there.
            WaitTimeoutError: it took longer than ``start_timeout``.
        """
        with self._lock:
            if self._closed:
                raise ActorError(f"{self.what} was closed")
            if self._child is not None:
                self._child.kill()
            self._child = child = _Child(self._order[1])
            self.starts += 1
        try:
            child.send(pickle.dumps(self._order), self._silence_timeout)
            self._answer(child, 0, self._start_timeout, f"{self.what} to start")
        except BaseException as error:
            child.kill()
            if isinstance(error, ProcessDiedError):
                raise ActorError(f"{self.what} did not start: {error}") from error
            raise

    def call(self, method: str, *args: object, timeout: float) -> Any:
        """Call a method of the object.

        Args:
            method: its name.
            args: anything that can be pickled.
            timeout: seconds until the answer must be there.

        Raises:
            ProcessDiedError: the process ended, or went silent, before it answered.
            ActorError: it was closed.
            WaitTimeoutError: no answer in time; the process is ended.
            Exception: what the method raised, where its class is one of this library or of
                decapod; otherwise an ActorError with its traceback.
        """
        child = self._child
        if self._closed:
            raise ActorError(f"{self.what} was closed")
        if child is None:
            raise ProcessDiedError(f"{self.what} is not running")
        try:
            number = child.send_call(method, args, self._silence_timeout)
            return self._answer(child, number, timeout, f"{self.what} to finish {method}")
        except BaseException as error:
            if isinstance(error, WaitTimeoutError | ProcessDiedError | KeyboardInterrupt):
                child.kill()
            if self._child is None and isinstance(error, ProcessDiedError):  # closed meanwhile
                raise ActorError(f"{self.what} was closed") from error
            raise

    def close(self) -> None:
        """End the child; it is asked first if it is idle. Can be called twice, from any thread."""
        with self._lock:
            self._closed = True
            child, self._child = self._child, None
        if child is not None:
            child.end()

    def _answer(self, child: _Child, number: int, timeout: float, what: str) -> Any:
        deadline = time.monotonic() + timeout
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise WaitTimeoutError(what, timeout, "give it more time, or look at its output")
            message = child.receive(min(left, 0.5))
            if message is None:
                if child.silent_for() > self._silence_timeout:
                    raise ProcessDiedError(
                        f"{self.what} gave no sign of life for {self._silence_timeout:g} s"
                    )
                continue
            kind, got, value = message
            if kind == "ended":
                raise ProcessDiedError(f"{self.what} {child.ending()}")
            if got != number:  # an answer to a call that was given up
                continue
            if kind == "error":
                raise rebuilt(self.what, *value)
            return value


class _Child:
    """The caller's side of one process."""

    def __init__(self, threads: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _BOOT, json.dumps([str(entry) for entry in sys.path])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env={**os.environ, **numeric_threads(threads)},
            start_new_session=True,  # Ctrl-C at the terminal reaches the caller alone
        )
        self.pid = self._process.pid
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)
        self._calls = 0
        self._messages: queue.SimpleQueue[tuple[str, int, Any]] = queue.SimpleQueue()
        self._heard = time.monotonic()
        self._reader = threading.Thread(target=self._read, daemon=True, name="asyncrlhf-reader")
        self._reader.start()

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def silent_for(self) -> float:
        return time.monotonic() - self._heard

    def send(self, message: bytes, patience: float) -> None:
        assert self._process.stdin is not None
        try:
            write_message(self._process.stdin.fileno(), message, patience)
        except WaitTimeoutError as error:
            raise ProcessDiedError(f"the process took nothing for {patience:g} s") from error
        except (OSError, ValueError) as error:  # closed, or the process is gone
            raise ProcessDiedError(f"the process {self.ending()}") from error

    def send_call(self, method: str, args: tuple[object, ...], patience: float) -> int:
        self.send(pickle.dumps((method, args)), patience)
        self._calls += 1
        return self._calls

    def receive(self, seconds: float) -> tuple[str, int, Any] | None:
        try:
            return self._messages.get(timeout=seconds)
        except queue.Empty:
            return None

    def end(self) -> None:
        with suppress(ProcessDiedError):  # then there is nobody to ask
            self.send(_GOODBYE, _GOODBYE_SECONDS)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_GOODBYE_SECONDS)
        self.kill()

    def kill(self) -> None:
        with suppress(ProcessLookupError, PermissionError):  # nobody is left in the group
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join(_GOODBYE_SECONDS)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def ending(self) -> str:
        try:
            code = self._process.wait(_GOODBYE_SECONDS)
        except subprocess.TimeoutExpired:
            return "closed its pipe"
        if code >= 0:
            return f"ended with exit code {code}"
        try:
            return f"was killed by {signal.Signals(-code).name}"
        except ValueError:
            return f"was killed by signal {-code}"

    def _read(self) -> None:
        assert self._process.stdout is not None
        with suppress(EOFError, OSError, ValueError):  # the process has ended; said below
            while True:
                packed_message = read_message(self._process.stdout.fileno())
                self._heard = time.monotonic()
                if packed_message != _BEAT:
                    self._messages.put(_unpacked(packed_message, self._calls))
        self._messages.put(("ended", -1, None))


def _unpacked(message: bytearray, number: int) -> tuple[str, int, Any]:
    try:
        return pickle.loads(message)  # type: ignore[no-any-return]  # noqa: S301 - our own child
    except Exception as error:  # noqa: BLE001 - unpickling may raise anything; the caller is told
        return "error", number, described(error)


def numeric_threads(count: int) -> dict[str, str]:
    """Environment in which numeric libraries start with so many threads."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    return dict.fromkeys(names, str(count))


def packed(value: object, what: str) -> bytes:
    """``value`` as bytes for another process; classes and functions of scripts travel as code.

    Raises:
        InvalidInputError: it cannot be pickled; the message says what and why.
    """
    from decapod.jobs.callables import pack

    try:
        return pack(value)  # type: ignore[arg-type]  # any object that knows its module
    except Exception as error:
        raise InvalidInputError(
            f"{what}: cannot be sent to another process ({type(error).__name__}: {error}); define "
            "it at the top of a module, without open files, locks or connections, or keep it in "
            "this process"
        ) from error


# --- in the child ---------------------------------------------------------------------------------


def serve() -> None:
    """The main loop of a child: the object's factory first, then calls."""
    import faulthandler

    from decapod.jobs.worker import take_standard_streams

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.enable()
    inbox, outbox = take_standard_streams()
    calls: queue.SimpleQueue[bytearray] = queue.SimpleQueue()
    lock = threading.Lock()
    # Reading in a thread of its own tells at once when the caller is gone, even in mid-call.
    threading.Thread(target=_listen, args=(inbox, calls), daemon=True).start()
    threading.Thread(target=_beat, args=(outbox, lock), daemon=True).start()
    made: list[Any] = []
    number = 0
    # No call is named: what it brings, such as weights, must not stay until the next one comes.
    while _answered(outbox, lock, number, calls.get(), made):
        number += 1
    close = getattr(made[0] if made else None, "close", None)
    if close is not None:
        close()


def _answered(
    outbox: int, lock: threading.Lock, number: int, order: bytearray, made: list[Any]
) -> bool:
    if order == _GOODBYE:
        return False
    try:
        value = None
        if made:
            value = _call(made[0], order)
        else:
            made.append(_make(order))
        message = pickle.dumps(("value", number, value))
    except Exception as error:  # noqa: BLE001 - a method may raise anything; the caller is told
        message = pickle.dumps(("error", number, described(error)))
    _send(outbox, lock, message)
    return True


def _make(order: bytearray) -> Any:
    factory, threads, cores = pickle.loads(order)  # noqa: S301 - made by our own caller
    if cores is not None:
        os.sched_setaffinity(0, cores)
    made = pickle.loads(factory)()  # noqa: S301 - the same
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(threads)  # the environment alone gives at most one per core
    return made


def _call(target: Any, order: bytearray) -> Any:
    method, args = pickle.loads(order)  # noqa: S301 - made by our own caller
    return getattr(target, method)(*args)


def _send(outbox: int, lock: threading.Lock, message: bytes) -> None:
    with lock:
        write_message(outbox, message)


def _beat(outbox: int, lock: threading.Lock) -> None:
    with suppress(OSError):  # the caller is gone; _listen ends this process
        while True:
            time.sleep(_BEAT_SECONDS)
            _send(outbox, lock, _BEAT)


def _listen(inbox: int, calls: queue.SimpleQueue[bytearray]) -> None:
    try:
        while True:
            calls.put(read_message(inbox))
    except (EOFError, OSError):
        os.killpg(0, signal.SIGKILL)
