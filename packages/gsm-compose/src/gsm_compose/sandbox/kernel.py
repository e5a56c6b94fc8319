"""What the Linux kernel can refuse for us: namespaces, an empty root folder, a system-call filter.

This module runs inside the sandbox's own interpreter (see `gsm_compose.sandbox.server`) and imports
the standard library only. Two layers, each of which would do on its own:

- `filter_system_calls` leaves a process the handful of calls that arithmetic needs. Every module
  that a program may import is loaded before, so not even opening a file for reading is among them;
  nor is starting a process or a thread, making a socket, or sending a signal.
- `enter_namespaces` takes away what those calls could act on: the process gets its own user, mount,
  process, network, IPC and host-name namespaces, and a root folder that is empty and read-only.

Both work for any user. Numbers of system calls differ by machine; we list two.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import signal
import struct
from pathlib import Path

NOBODY = 65534

# <linux/sched.h>, <linux/mount.h>, <linux/prctl.h>, <linux/capability.h>
_CLONE_NEW = {
    "mount": 0x00020000,
    "host name": 0x04000000,
    "ipc": 0x08000000,
    "user": 0x10000000,
    "process": 0x20000000,
    "network": 0x40000000,
}
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REMOUNT = 1, 2, 4, 8, 32
_MS_REC, _MS_PRIVATE = 0x4000, 0x40000
_MNT_DETACH = 2
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
_SECCOMP_MODE_FILTER = 2
_CAPABILITY_VERSION_3 = 0x20080522

# Audit architecture, pivot_root, capset, and the calls that arithmetic needs, by machine.
_CALLS: dict[str, tuple[int, int, int, dict[str, int]]] = {
    "x86_64": (
        0xC000003E,
        155,
        126,
        {
            "read": 0,
            "write": 1,
            "close": 3,
            "mmap": 9,
            "mprotect": 10,
            "munmap": 11,
            "brk": 12,
            "rt_sigprocmask": 14,
            "rt_sigreturn": 15,
            "sched_yield": 24,
            "mremap": 25,
            "madvise": 28,
            "nanosleep": 35,
            "getpid": 39,
            "exit": 60,
            "gettimeofday": 96,
            "getrusage": 98,
            "times": 100,
            "sigaltstack": 131,
            "gettid": 186,
            "time": 201,
            "futex": 202,
            "restart_syscall": 219,
            "clock_gettime": 228,
            "clock_getres": 229,
            "clock_nanosleep": 230,
            "exit_group": 231,
            "getrandom": 318,
        },
    ),
    "aarch64": (
        0xC00000B7,
        41,
        91,
        {
            "close": 57,
            "read": 63,
            "write": 64,
            "exit": 93,
            "exit_group": 94,
            "futex": 98,
            "nanosleep": 101,
            "clock_gettime": 113,
            "clock_getres": 114,
            "clock_nanosleep": 115,
            "sched_yield": 124,
            "restart_syscall": 128,
            "sigaltstack": 132,
            "rt_sigprocmask": 135,
            "rt_sigreturn": 139,
            "times": 153,
            "getrusage": 165,
            "gettimeofday": 169,
            "getpid": 172,
            "gettid": 178,
            "brk": 214,
            "munmap": 215,
            "mremap": 216,
            "mmap": 222,
            "mprotect": 226,
            "madvise": 233,
            "getrandom": 278,
        },
    ),
}


class _Program(ctypes.Structure):
    """``struct sock_fprog``: a filter's length in instructions, and the instructions."""

    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _prctl(
    option: int, first: int | ctypes.c_void_p, second: ctypes.c_void_p | None = None
) -> None:
    # The C function is variadic and reads machine words, so plain Python integers would not do.
    words = [ctypes.c_ulong(first) if isinstance(first, int) else first]
    words += [second or ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0)]
    _check(_libc().prctl(ctypes.c_int(option), *words), f"prctl {option}")


def _machine() -> tuple[int, int, int, dict[str, int]]:
    name = platform.machine()
    # A 32-bit interpreter on a 64-bit kernel makes other calls than the machine's name says.
    if name not in _CALLS or struct.calcsize("P") != 8:
        raise OSError(f"no table of system calls for {name!r} ({8 * struct.calcsize('P')} bits)")
    return _CALLS[name]


def give_up_root() -> None:
    """Become `nobody` if the process is root; the kernel does not limit root's processes.

    A container may not have such a user, or not let its root change identity. Then nothing changes,
    and the other layers have to hold, which do not rest on this one.
    """
    if os.geteuid() != 0:
        return
    with contextlib.suppress(OSError):
        os.setgroups([])
    with contextlib.suppress(OSError):
        os.setgid(NOBODY)  # for root these change the saved identity as well
        os.setuid(NOBODY)


def die_with_parent() -> None:
    """Let the kernel kill this process when the one that forked it ends."""
    _prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))


def enter_namespaces() -> None:
    """Move into namespaces of our own. Children of this process, not itself, form the new process
    namespace; call `empty_root` in the first of them.

    Raises:
        OSError: the kernel, or the container around us, does not allow it.
    """
    _machine()
    user, group = os.geteuid(), os.getegid()
    # After a change of identity the files below belong to root until we are "dumpable" again.
    _prctl(_PR_SET_DUMPABLE, 1)
    flags = sum(_CLONE_NEW.values())
    _check(_libc().unshare(ctypes.c_int(flags)), "unshare " + ", ".join(_CLONE_NEW))
    for name, text in (
        ("setgroups", "deny"),
        ("gid_map", f"{NOBODY} {group} 1"),
        ("uid_map", f"{NOBODY} {user} 1"),
    ):
        descriptor = os.open(f"/proc/self/{name}", os.O_WRONLY)
        try:
            os.write(descriptor, text.encode())
        finally:
            os.close(descriptor)


def empty_root() -> None:
    """Make the root folder an empty read-only one, and drop every capability.

    The folder is a file system in memory, mounted where the host keeps its temporary files but seen
    by this namespace alone: nothing is made on the host, so nothing can be left behind.

    Raises:
        OSError: a mount is refused.
    """
    libc = _libc()
    _, pivot_root, capset, _ = _machine()
    sealed = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC

    def mount(kind: bytes | None, where: bytes, flags: int, options: bytes | None) -> None:
        result = libc.mount(b"none", where, kind, ctypes.c_ulong(flags), options)
        _check(result, f"mount on {where.decode()}")

    mount(None, b"/", _MS_REC | _MS_PRIVATE, None)
    place = next(folder for folder in map(Path, ("/tmp", "/var", "/usr", "/")) if folder.is_dir())
    mount(b"tmpfs", bytes(place), sealed, b"size=4k,nr_inodes=2,mode=0555")
    os.chdir(place)
    _check(libc.syscall(ctypes.c_long(pivot_root), b".", b"."), "pivot_root")
    _check(libc.umount2(b".", _MNT_DETACH), "umount of the old root")
    os.chdir("/")
    mount(None, b"/", _MS_REMOUNT | _MS_RDONLY | sealed, None)

    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    _check(libc.syscall(ctypes.c_long(capset), header, bytes(24)), "capset")


def filter_system_calls() -> None:
    """Refuse, for good, every system call but those that arithmetic needs (`EPERM`).

    A call made by another machine's convention (32-bit code on a 64-bit kernel) ends the process.

    Raises:
        OSError: the kernel has no such filters, or there is no table for this machine.
    """
    architecture, _, _, calls = _machine()
    allowed = sorted(calls.values())

    def instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("=HBBI", code, if_true, if_false, value)

    load, jump_if_equal, answer = 0x20, 0x15, 0x06  # <linux/bpf_common.h>
    kill_process, refuse, allow = 0x80000000, 0x00050001, 0x7FFF0000  # <linux/seccomp.h>; EPERM = 1
    program = [
        instruction(load, 4),  # seccomp_data.arch
        instruction(jump_if_equal, architecture, 1, 0),
        instruction(answer, kill_process),
        instruction(load, 0),  # seccomp_data.nr
    ]
    # Each test that holds jumps over the later ones and over the refusal, to the last instruction.
    program += [
        instruction(jump_if_equal, number, len(allowed) - place, 0)
        for place, number in enumerate(allowed)
    ]
    program += [instruction(answer, refuse), instruction(answer, allow)]
    filter_ = _Program(len(program), b"".join(program))
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    pointer = ctypes.cast(ctypes.pointer(filter_), ctypes.c_void_p)
    _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, pointer)
