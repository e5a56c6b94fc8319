"""Run programs in the sandbox: the parent's side."""

from __future__ import annotations

import functools
import queue
import selectors
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Self, get_args

from gsm_compose.errors import IsolationError
from gsm_compose.sandbox import server
from gsm_compose.sandbox.results import (
    CodeError,
    CodeResult,
    Isolation,
    Layer,
    Limits,
    read_reply,
)

MAX_SOURCE = 1 << 20  # bytes
_START = 60.0  # seconds until a fresh interpreter must be ready, on a very busy machine
_GRACE = 10.0  # seconds beyond the wall limit until we no longer trust the sandbox to keep it
# Replaces environment and start-up files of the parent. The hash seed makes a program that goes
# through a set of strings give the same answer every time.
_ENVIRONMENT = {"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"}
# Stand-ins for our two packages, so that importing the server does not run their `__init__`.
_BOOT = """\
import sys, types
for name, path in (("gsm_compose", sys.argv[1]), ("gsm_compose.sandbox", sys.argv[1] + "/sandbox")):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [path]
from gsm_compose.sandbox.server import main
main(sys.argv[2])
"""


class IsolationWarning(UserWarning):
    """Model-written code runs without isolation."""


@dataclass
class Sandbox:
    """An interpreter of its own that runs programs one after another, each in a fresh process.

    Starting it takes about 0.1 s, a program after that a few milliseconds. Use it as a context
    manager, from one thread at a time.

    Attributes:
        isolation: see the package; ``"auto"`` is the strongest that works here.

    Raises:
        IsolationError: on entering: the isolation that was asked for does not work here.
    """

    isolation: Isolation = "auto"
    _layer: Layer = field(init=False, repr=False)
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        """Settle what "auto" means; warn of "none"."""
        if self.isolation not in get_args(Isolation):
            raise ValueError(f"isolation is one of {get_args(Isolation)}, got {self.isolation!r}")
        self._layer = strongest() if self.isolation == "auto" else self.isolation
        if self._layer == "none":
            warnings.warn(
                "model-written code runs with limits but WITHOUT ISOLATION: it can read and "
                "change what you can, and use the network. Do this only where losing the whole "
                "machine would not matter.",
                IsolationWarning,
                stacklevel=3,
            )

    def __enter__(self) -> Self:
        """Start the interpreter."""
        self._start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End it."""
        self.close()

    def close(self) -> None:
        """End the interpreter and whatever runs in it; it starts again with the next program."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()  # it takes this for the sign to end, even while a program runs
        process.stdout.close()
        try:
            process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            process.kill()  # the kernel ends its children with it
            process.wait()

    def run(
        self, source: str, call: tuple[str, ...] = ("solution",), limits: Limits | None = None
    ) -> CodeResult:
        """Run one program and call its functions, in order and without arguments.

        Args:
            source: Python source text.
            call: names of the functions.
            limits: what it may use; `Limits()` if not given.
        """
        limits = limits or Limits()
        if not call or not all(name.isidentifier() and name.isascii() for name in call):
            raise ValueError(f"call is a tuple of names of functions, got {call!r}")
        text = source.encode(errors="replace")
        if len(text) > MAX_SOURCE:
            detail = f"the program has {len(text)} bytes, more than {MAX_SOURCE}"
            return CodeResult(dict.fromkeys(call), "refused", detail, self._layer)
        names = ",".join(call).encode()
        header = server.REQUEST.pack(
            limits.wall_seconds,
            limits.cpu_seconds,
            limits.memory_bytes,
            limits.output_bytes,
            len(text),
            len(names),
        )
        deadline = time.monotonic() + limits.wall_seconds + _GRACE
        if self._process is None:
            self._start()
        try:
            reply = self._exchange(header + text + names, deadline)
        finally:
            # A program without isolation may have changed the interpreter that comes after it.
            if self._layer == "none":
                self.close()
        if reply is None:
            late = time.monotonic() >= deadline
            self.close()
            detail = "the sandbox itself " + ("did not answer in time" if late else "was ended")
            kind: CodeError = "timeout" if late else "killed"
            return CodeResult(dict.fromkeys(call), kind, detail, self._layer)
        return read_reply(call, self._layer, limits, *reply)

    def _start(self) -> None:
        if sys.platform == "win32" or not sys.executable:
            raise IsolationError(
                "running model-written code needs a POSIX system (fork and resource limits) and "
                "a Python that knows its executable; on Windows use the Subsystem for Linux"
            )
        folder = Path(__file__).resolve().parent.parent
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-s", "-S", "-B", "-c", _BOOT, str(folder), self._layer],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=_ENVIRONMENT,
            cwd="/",
            bufsize=0,
            start_new_session=True,  # an interrupt from the keyboard is the parent's business
        )
        hello = self._receive(server.HELLO.size, time.monotonic() + _START)
        if hello is None:
            reason = "its interpreter did not start; see standard error"
        else:
            (size,) = server.HELLO.unpack(hello)
            if size == 0:
                return
            reason = (self._receive(size, time.monotonic() + _START) or b"").decode()
        self.close()
        raise IsolationError(
            f"isolation {self._layer!r} does not work here: {reason}. "
            f"Use isolation='auto' for the strongest that does."
        )

    def _exchange(self, request: bytes, deadline: float) -> tuple[int, int, float, bytes] | None:
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(request)
        except BrokenPipeError:
            return None
        header = self._receive(server.REPLY.size, deadline)
        if header is None:
            return None
        ended, code, cpu, size = server.REPLY.unpack(header)
        lines = self._receive(size, deadline)
        return None if lines is None else (ended, code, cpu, lines)

    def _receive(self, size: int, deadline: float) -> bytes | None:
        """Exactly `size` bytes from the sandbox, or None if it ends or the time is up."""
        assert self._process is not None
        assert self._process.stdout is not None
        data = b""
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while len(data) < size:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    return None
                part = self._process.stdout.read(size - len(data))
                if not part:
                    return None
                data += part
        return data


def works(isolation: Layer) -> bool:
    """Whether a program runs, and is confined, under `isolation` on this machine.

    Really tried: a program starts, attempts what it must not, and answers. Remembered for the
    life of the process.
    """
    return _why_not(isolation) is None


@functools.cache
def _why_not(isolation: Layer) -> str | None:
    if isolation == "none":
        return None
    try:
        with Sandbox(isolation) as box:
            plain = box.run("def solution():\n    return 6 * 7\n")
            escape = box.run(_ESCAPE)
    except IsolationError as error:
        return str(error)
    if plain.error is not None:
        return f"a program that multiplies gave {plain.error}: {plain.detail}"
    if isolation == "restricted":
        return None if escape.error == "refused" else "a program that imports os was not refused"
    if escape.values != {"solution": Fraction(0)}:
        return f"a program that should be confined gave {escape}"
    return None


# Counts what it gets away with: opening a folder, starting a process, signalling another.
_ESCAPE = """\
import os
def solution():
    done = 0
    for attempt in (
        lambda: os.open("/", 0),
        lambda: os.fork() or os._exit(0),
        lambda: os.kill(os.getppid(), 0),
    ):
        try:
            attempt()
            done += 1
        except PermissionError:
            pass
    return done
"""


def strongest() -> Layer:
    """What ``"auto"`` stands for here: the first of namespaces, seccomp, restricted that works.

    Raises:
        IsolationError: none does.
    """
    reasons = []
    for isolation in ("namespaces", "seccomp", "restricted"):
        layer: Layer = isolation
        if works(layer):
            return layer
        reasons.append(_why_not(layer))
    raise IsolationError("no isolation works here: " + "; ".join(map(str, reasons)))


def run_code(
    source: str,
    call: tuple[str, ...] = ("solution",),
    limits: Limits | None = None,
    isolation: Isolation = "auto",
) -> CodeResult:
    """Run one program in a sandbox of its own and call its functions.

    Starts an interpreter, about 0.1 s; for several programs use `run_many` or `Sandbox`.

    Args:
        source: Python source text, not trusted.
        call: names of the functions to call, in order and without arguments.
        limits: what it may use; `Limits()` if not given.
        isolation: see the package.

    Raises:
        IsolationError: the isolation that was asked for does not work here.
    """
    with Sandbox(isolation) as box:
        return box.run(source, call, limits)


def run_many(
    sources: Iterable[str],
    call: tuple[str, ...] = ("solution",),
    limits: Limits | None = None,
    isolation: Isolation = "auto",
    workers: int = 2,
) -> list[CodeResult]:
    """Run programs side by side; the results are in the order of `sources`.

    Args:
        sources: Python source texts, not trusted.
        call: names of the functions to call in each, in order and without arguments.
        limits: what each may use; `Limits()` if not given.
        isolation: see the package.
        workers: programs that run at the same time, at least 1.

    Raises:
        IsolationError: the isolation that was asked for does not work here.
    """
    if workers < 1:
        raise ValueError(f"workers is at least 1, got {workers!r}")
    texts: Sequence[str] = list(sources)
    boxes = [Sandbox(isolation) for _ in range(min(workers, len(texts)))]
    results: dict[int, CodeResult] = {}
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for place in range(len(texts)):
        waiting.put(place)
    failures: list[BaseException] = []
    stop = threading.Event()

    def work(box: Sandbox) -> None:
        try:
            with box:
                while not stop.is_set():
                    try:
                        place = waiting.get_nowait()
                    except queue.Empty:
                        return
                    results[place] = box.run(texts[place], call, limits)
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            failures.append(error)
            stop.set()

    threads = [threading.Thread(target=work, args=(box,)) for box in boxes]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    finally:
        stop.set()  # after an interrupt: no thread begins another program
    if failures:
        raise failures[0]
    return [results[place] for place in range(len(texts))]
