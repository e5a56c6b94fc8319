"""What passes between a process and its children: messages in pipes, and exceptions in messages."""

from __future__ import annotations

import os
import select
import struct
import sys
import traceback
from contextlib import suppress
from typing import Any, Final

from asyncrlhf.errors import ActorError, WaitTimeoutError

_LENGTH: Final = struct.Struct("!Q")  # stands before every message
_PIECE = 1 << 20
_OWN: Final = ("asyncrlhf.", "decapod.")


def write_message(pipe: int, message: bytes, patience: float | None = None) -> None:
    """Write a message whole.

    Args:
        pipe: descriptor; with ``patience`` it must not block.
        message: any bytes.
        patience: seconds in which the other end must take at least some of it; None waits for ever.

    Raises:
        OSError: the other end is gone.
        WaitTimeoutError: it took nothing.
    """
    room = select.poll()
    room.register(pipe, select.POLLOUT)
    for part in (_LENGTH.pack(len(message)), message):
        data = memoryview(part)
        while data:
            if patience is not None and not room.poll(patience * 1000):
                raise WaitTimeoutError("the other process to take a message", patience)
            with suppress(BlockingIOError):
                data = data[os.write(pipe, data) :]


def read_message(pipe: int) -> bytearray:
    """Wait for the next message.

    Raises:
        EOFError: the other end is gone, perhaps in the middle of a message.
        OSError: the pipe is closed.
    """
    (size,) = _LENGTH.unpack(_read_exactly(pipe, _LENGTH.size))
    return _read_exactly(pipe, size)


def _read_exactly(pipe: int, size: int) -> bytearray:
    data = bytearray()
    while len(data) < size:
        part = os.read(pipe, min(size - len(data), _PIECE))
        if not part:
            raise EOFError(f"expected {size} bytes, got {len(data)}")
        data += part
    return data


def described(error: BaseException) -> tuple[str, str, str, dict[str, Any]]:
    """Class, message, traceback and plain attributes: what :func:`rebuilt` makes it of again.

    Exceptions whose arguments are not their message could not be unpickled.
    """
    kind = type(error)
    plain = {k: v for k, v in vars(error).items() if isinstance(v, str | int | float)}
    name = f"{kind.__module__}:{kind.__qualname__}"
    return name, str(error), "".join(traceback.format_exception(error)), plain


def rebuilt(
    what: str, kind: str, message: str, trace: str, attributes: dict[str, Any]
) -> Exception:
    """The exception, if its class is of this library or of decapod; otherwise an ActorError.

    Args:
        what: the process in words.
        kind: as :func:`described` gives it, like what follows.
        message: the same.
        trace: the same; becomes a note, or part of the ActorError's message.
        attributes: the same.
    """
    module, _, name = kind.partition(":")
    if module.startswith(_OWN) and module in sys.modules:
        cls = getattr(sys.modules[module], name)
        error: Exception = cls.__new__(cls)
        Exception.__init__(error, message)
        vars(error).update(attributes)
        error.add_note(trace)
        return error
    return ActorError(f"{what} raised {kind.rpartition(':')[2]}: {message}\n{trace}")
