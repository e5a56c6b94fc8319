"""The sandbox's own interpreter: confines itself once, then forks a child for every program.

It is started as a fresh process with an empty environment and no inherited files, so there is
nothing of the parent in its memory to find. Requests come on standard input and replies go to
standard output as fixed headers plus bytes (`REQUEST`, `REPLY`). The children that run programs
hold neither end; a program's source is read by its child, so one program never finds another's.

This module imports the standard library only; POSIX.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import struct
import sys
import time
from typing import NoReturn

from gsm_compose.sandbox import child, kernel

if sys.platform != "win32":
    import resource

# wall seconds, CPU seconds, bytes of memory, bytes of output, bytes of source, bytes of calls
REQUEST = struct.Struct("!dIQQII")
# how it ended (`ENDED`), exit code or minus the signal, CPU seconds, bytes of the child's lines
REPLY = struct.Struct("!BidI")
ENDED = ("by itself", "wall time", "output")
HELLO = struct.Struct("!I")  # bytes of the reason why it cannot serve, 0 if it can

_MAX_LINES = 1 << 16  # bytes of a child's lines
_STDIN, _STDOUT, _STDERR, _REPORT = 0, 1, 2, 3


def main(isolation: str) -> NoReturn:
    """Serve until standard input is closed.

    Args:
        isolation: ``"namespaces"``, ``"seccomp"``, ``"restricted"`` or ``"none"``.
    """
    # Programs and their reports go elsewhere; nothing but replies may reach our own output.
    replies = os.dup(_STDOUT)
    os.dup2(os.open(os.devnull, os.O_RDWR), _STDOUT)
    child.preload()
    try:
        kernel.give_up_root()
        if isolation == "namespaces":
            kernel.enter_namespaces()
            _go_on_in_a_child()
            kernel.empty_root()
        if isolation in ("namespaces", "seccomp"):
            _try_the_filter()
    except OSError as error:
        reason = str(error).encode()
        os.write(replies, HELLO.pack(len(reason)) + reason)
        os._exit(1)
    os.write(replies, HELLO.pack(0))
    while (header := _read(REQUEST.size)) is not None:
        _write(replies, _serve(header, isolation))
    os._exit(0)


def _go_on_in_a_child() -> None:
    """Return in the first process of a new process namespace; stay behind until it ends."""
    pid = os.fork()
    if pid == 0:
        kernel.die_with_parent()
        return
    os.close(_STDIN)
    _, status = os.waitpid(pid, 0)
    os._exit(0 if status == 0 else 1)


def _try_the_filter() -> None:
    """Raise OSError here, rather than in every program, if the kernel will not filter."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            kernel.filter_system_calls()
        except OSError as error:
            os.write(writing, str(error).encode())
        os._exit(0)
    os.close(writing)
    reason = os.read(reading, 4096)
    os.close(reading)
    os.waitpid(pid, 0)
    if reason:
        raise OSError(reason.decode())


def _serve(header: bytes, isolation: str) -> bytes:
    wall, cpu, memory, output, *sizes = REQUEST.unpack(header)
    deadline = time.monotonic() + wall
    report, report_end = os.pipe()
    printed, printed_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        _run_program(report_end, printed_end, (cpu, memory), sizes, isolation)
    os.close(report_end)
    os.close(printed_end)
    try:
        return _watch(pid, report, printed, deadline, output)
    finally:
        os.close(report)
        os.close(printed)


def _run_program(
    report: int, printed: int, limits: tuple[int, int], sizes: list[int], isolation: str
) -> NoReturn:
    """What the child does: take its request, shut itself in, run, and end."""
    source, calls = (_read(size) or b"" for size in sizes)
    # Ours are above these: the first four have been in use since the start.
    os.dup2(_STDOUT, _STDIN)  # the null device
    os.dup2(printed, _STDOUT)
    os.dup2(printed, _STDERR)
    os.dup2(report, _REPORT)
    os.closerange(_REPORT + 1, 64)  # a dozen at most
    os.setsid()
    cpu, memory = limits
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_FSIZE, 0)
    _limit(resource.RLIMIT_NOFILE, 16)
    _limit(resource.RLIMIT_NPROC, 0)
    _limit(resource.RLIMIT_AS, memory)
    # A program may ignore the signal at the first limit, but not the one a second later.
    _limit(resource.RLIMIT_CPU, cpu, cpu + 1)
    if sys.platform == "linux":
        kernel.die_with_parent()
    if isolation in ("namespaces", "seccomp"):
        kernel.filter_system_calls()
    status = 1
    try:
        is_restricted = isolation == "restricted"
        child.run(source.decode(), calls.decode().split(","), is_restricted, _REPORT)
        status = 0
    except MemoryError:
        status = child.OUT_OF_MEMORY
    finally:
        os._exit(status)  # whatever happens, a child never goes on as the server


def _limit(kind: int, soft: int, hard: int | None = None) -> None:
    _, ceiling = resource.getrlimit(kind)
    hard = soft if hard is None else hard
    if ceiling != resource.RLIM_INFINITY:
        soft, hard = min(soft, ceiling), min(hard, ceiling)
    # macOS has a limit on memory that it does not let anybody set.
    with contextlib.suppress(*(() if sys.platform == "linux" else (ValueError, OSError))):
        resource.setrlimit(kind, (soft, hard))


def _watch(pid: int, report: int, printed: int, deadline: float, output: int) -> bytes:
    """Read what the child writes until it ends, or has to be ended; the reply."""
    poll = select.poll()
    poll.register(report, select.POLLIN)
    poll.register(printed, select.POLLIN)
    poll.register(_STDIN, 0)  # hangs up when nobody waits for the reply any more
    open_pipes = {report, printed}
    room = {report: _MAX_LINES, printed: output}
    lines = b""
    ended = "by itself"
    code, cpu = 0, 0.0
    running = True
    while running or open_pipes:
        left = deadline - time.monotonic()
        if left <= 0 and not running:
            break
        # With both pipes closed nothing wakes us but the clock.
        pause = 20 if open_pipes else 1
        for descriptor, event in poll.poll(max(0, min(left * 1000, pause))):
            if descriptor == _STDIN:
                if event & (select.POLLHUP | select.POLLERR):
                    _kill(pid)
                    os._exit(0)
                continue
            data = os.read(descriptor, 1 << 16)
            if not data:
                poll.unregister(descriptor)
                open_pipes.discard(descriptor)
            room[descriptor] -= len(data)
            if room[descriptor] < 0:
                ended = "output"
            elif descriptor == report:
                lines += data
        if not running:
            continue
        if left <= 0 and ended == "by itself":
            ended = "wall time"
        if ended != "by itself":
            _kill(pid)
        reaped, status, usage = os.wait4(pid, os.WNOHANG if ended == "by itself" else 0)
        if reaped:
            running = False
            code, cpu = os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime
            # Without isolation it may have left others behind, who hold the pipes open.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)
            deadline = time.monotonic() + 0.1
    return REPLY.pack(ENDED.index(ended), code, cpu, len(lines)) + lines


def _kill(pid: int) -> None:
    """End a child that has not been waited for, and its process group."""
    for end in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            end(pid, signal.SIGKILL)


def _read(size: int) -> bytes | None:
    """Exactly `size` bytes of the request; None at its end."""
    data = b""
    while len(data) < size:
        part = os.read(_STDIN, size - len(data))
        if not part:
            return None
        data += part
    return data


def _write(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
