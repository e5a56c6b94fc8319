"""Run Python programs that a model wrote, without trusting them.

**Who is defended against whom.** The program is hostile. It may try to run for ever, fill memory,
print without end, start processes, outlive its time, read files or the environment of other
processes of the same user (keys, tokens, the gold answers), write files, open sockets, or signal or
trace the process that started it. It must not succeed, must not disturb the programs after it, and
what it tried must show in the result. What it may do is return a number of its choice: it shares a
process with the code that reports the number, so it can forge the report, but only its own, and a
forged number is worth no more than a returned one. Not defended against: errors in the kernel's
few remaining calls or in the processor (for those, add a virtual machine), and other programs of
the machine being slowed down within the limits.

**Every program** runs in a process of its own, forked from a fresh interpreter that has an empty
environment, no inherited files, standard library only, and (if started as root) the identity of
`nobody`. Time, processor time, memory, printed bytes, files and processes are limited, and the
result comes back as text that is read with suspicion.

**Isolation** comes on top, the strongest that works on the machine (``"auto"``), found by trying:

``"namespaces"`` (Linux where user namespaces are allowed)
    A system-call filter that leaves memory, clocks and pipes: no file can be opened, no process
    or thread started, no socket made, no signal sent. Behind it, own user, mount, process, network,
    IPC and host-name namespaces with an empty read-only root folder.
``"seccomp"`` (any Linux on x86-64 or ARM64, most containers included)
    The filter alone. It refuses the same things; the namespaces are the second lock.
``"restricted"`` (any POSIX system)
    The program is checked before it runs and refused unless it consists of arithmetic, calls and
    control flow; see `gsm_compose.sandbox.restricted`. Nothing of the system is within reach of the
    language that is left, but no system enforces it.
``"none"``
    Limits only, which is not isolation: an `IsolationWarning` says so each time. It is never
    chosen by itself.

Under the first two, programs may import from the standard library what computes (`math`,
`fractions`, `decimal`, `datetime`, `itertools`, `statistics`, `re`, …); packages such as numpy are
not there. Windows has none of this: `IsolationError`.
"""

from gsm_compose.sandbox.results import CodeError, CodeResult, Isolation, Layer, Limits
from gsm_compose.sandbox.running import (
    IsolationWarning,
    Sandbox,
    run_code,
    run_many,
    strongest,
    works,
)

__all__ = [
    "CodeError",
    "CodeResult",
    "Isolation",
    "IsolationWarning",
    "Layer",
    "Limits",
    "Sandbox",
    "run_code",
    "run_many",
    "strongest",
    "works",
]
