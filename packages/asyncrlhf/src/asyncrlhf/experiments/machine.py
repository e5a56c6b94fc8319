"""Who has the machine's cores: jobs that are timed run alone, all others side by side.

`decapod` runs several jobs of a list at the same time, each in a process of its own, and none of
them knows of the others. So every job of this reproduction asks here first: :func:`shared` for a
job that may run beside others, :func:`alone` for the part of a job that is timed and has all cores
to itself. Both are locks on a file of the user's cache, which the system frees when a process ends,
however it ends.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from asyncrlhf.errors import InvalidInputError


def cache() -> Path:
    """The folder of this user for what can be made again: ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(root) if root else Path.home() / ".cache") / "asyncrlhf"


def kept_models() -> Path:
    """The folder of fine-tuned models; may be deleted at any time."""
    return cache() / "models"


def shared() -> contextlib.AbstractContextManager[None]:
    """Wait until nobody is :func:`alone`; others may come in."""
    return _held(exclusive=False)


def alone() -> contextlib.AbstractContextManager[None]:
    """Wait until all others are out, and keep them out."""
    return _held(exclusive=True)


@contextlib.contextmanager
def _held(*, exclusive: bool) -> Iterator[None]:
    import fcntl  # POSIX alone; nothing else in the library needs it

    folder = cache()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "gate.lock").open("w") as gate, (folder / "cores.lock").open("w") as cores:
        # Who waits for all cores holds the gate meanwhile, so that newcomers cannot starve him.
        fcntl.flock(gate, fcntl.LOCK_EX)
        fcntl.flock(cores, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        fcntl.flock(gate, fcntl.LOCK_UN)
        yield


def two_cores() -> tuple[int, int]:
    """Numbers of two cores that this process may run on, the learner's and the actor's.

    Raises:
        InvalidInputError: there are not two, or the system cannot pin processes.
    """
    if not hasattr(os, "sched_getaffinity"):
        raise InvalidInputError(
            "cores: expected a system that pins processes to cores; run this on Linux"
        )
    usable = sorted(os.sched_getaffinity(0))
    if len(usable) < 2:
        raise InvalidInputError(
            f"cores: expected two, one for the actor and one for the learner, got {len(usable)}"
        )
    return usable[0], usable[1]
