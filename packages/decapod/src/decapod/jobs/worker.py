"""The code that runs inside a worker process."""

from __future__ import annotations

import faulthandler
import os
import pickle
import queue
import signal
import struct
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from decapod.jobs.job import Outcome
from decapod.jsonl import to_json

# One numeric thread per job: n jobs on n cores are faster than n jobs that fight for n² threads,
# and sums do not depend on how many threads happened to be free. The fixed hash seed makes the
# order of a set of strings, and so a result that leans on it, the same in every worker.
ENVIRONMENT: Mapping[str, str] = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "BLIS_NUM_THREADS": "1",
    "NUMEXPR_NUM_THREADS": "1",
    "VECLIB_MAXIMUM_THREADS": "1",
    "PYTHONHASHSEED": "0",
}

_HEADER = struct.Struct("!Q")


def execute(function: bytes, arguments: Mapping[str, Any]) -> Outcome:
    """Runs one job to its end; whatever it raises becomes its outcome.

    Args:
        function: the pickled callable.
        arguments: its keyword arguments.

    Returns:
        status (``done`` or ``failed``), value, traceback, seconds.
    """
    started = time.perf_counter()
    try:
        call = pickle.loads(function)  # noqa: S301 - made by our own parent process
        value = to_json(call(**arguments), "returned value")
    except BaseException as error:  # noqa: BLE001 - a job may raise anything, SystemExit included
        seconds = time.perf_counter() - started
        # Our own frame is of no interest to the reader.
        trace = error.__traceback__.tb_next if error.__traceback__ else None
        text = "".join(traceback.format_exception(type(error), error, trace))
        return "failed", None, text, seconds
    return "done", value, None, time.perf_counter() - started


def send(descriptor: int, message: object) -> None:
    """Writes one length-prefixed message.

    Raises:
        OSError: the other end is gone.
    """
    body = pickle.dumps(message)
    data = memoryview(_HEADER.pack(len(body)) + body)
    while data:
        data = data[os.write(descriptor, data) :]


def receive(descriptor: int) -> Any:
    """Reads one message.

    Raises:
        EOFError: the other end is gone, perhaps in the middle of a message.
    """
    (size,) = _HEADER.unpack(_read_exactly(descriptor, _HEADER.size))
    return pickle.loads(_read_exactly(descriptor, size))  # noqa: S301 - a pipe between parent and child


def _read_exactly(descriptor: int, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        part = os.read(descriptor, min(size - len(parts), 1 << 20))
        if not part:
            raise EOFError(f"expected {size} bytes, got {len(parts)}")
        parts += part
    return bytes(parts)


def serve() -> None:
    """The main loop of a local worker: jobs come on standard input, outcomes leave on output."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.enable()
    inbox_end, outbox_end = take_standard_streams()
    inbox: queue.SimpleQueue[tuple[bytes, Mapping[str, Any]] | None] = queue.SimpleQueue()
    # Reading in a thread of its own tells us at once when the parent is gone, even in mid-job.
    threading.Thread(target=_listen, args=(inbox_end, inbox.put), daemon=True).start()
    send(outbox_end, "ready")
    while (order := inbox.get()) is not None:
        send(outbox_end, execute(*order))


def take_standard_streams() -> tuple[int, int]:
    """Standard input and output as descriptors for messages; prints go to standard error."""
    # Jobs that print, or read standard input, must not get in between the messages.
    inbox, outbox = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return inbox, outbox


def _listen(
    descriptor: int, deliver: Callable[[tuple[bytes, Mapping[str, Any]] | None], None]
) -> None:
    try:
        while True:
            deliver(receive(descriptor))
    except (EOFError, OSError):
        _end_with_children()


def _end_with_children() -> None:
    # The parent was killed: nobody is left to take the result, or to stop what the job started.
    if os.name != "nt" and os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)
