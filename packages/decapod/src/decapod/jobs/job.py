"""What a job is, what it is known by, and what comes back from it."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

from decapod.jsonl import JSON, dumps, to_json

Status = Literal["done", "failed", "killed"]
STATUSES: tuple[Status, ...] = ("done", "failed", "killed")

# Status, value, error, seconds: what a worker knows of a job that has ended.
Outcome = tuple[Status, JSON, str | None, float]


def function_name(function: Callable[..., Any]) -> str:
    """``module:qualname`` of a function, the same in every process and for every way to start it.

    A function of the main script is named by the script (``train:run`` in ``train.py``), whether
    it was started as ``python train.py``, ``python -m train`` or imported.

    Raises:
        TypeError: the callable has no name of its own (``functools.partial``, an object with
            ``__call__``).
    """
    qualname = getattr(function, "__qualname__", None)
    module = getattr(function, "__module__", None)
    if not isinstance(qualname, str) or not isinstance(module, str):
        raise TypeError(
            f"function: expected a function with a name, got {function!r}; wrap it in a def and "
            "pass what varies in the job's arguments"
        )
    if module == "__main__":
        module = _main_name()
    return f"{module}:{qualname}"


def _main_name() -> str:
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    if spec is not None:
        return cast(str, spec.name)
    file = getattr(main, "__file__", None)
    return Path(file).stem if file else "__main__"


@dataclass(frozen=True)
class Job:
    """One call ``function(**arguments)`` in a worker process.

    Two jobs are the same job, and share one stored result, if their function's name, arguments
    and version are equal. Nothing else is hashed: not the function's code, and not what a closure
    captures. Put what varies in ``arguments`` and raise ``version`` when the same arguments are to
    give another result.

    Attributes:
        function: any callable with a name that cloudpickle can carry; returns a JSON value.
        arguments: keyword arguments, JSON values only (tuples are turned into lists, numpy
            scalars into numbers). The integer 1 and the float 1.0 are different arguments.
        label: for people; not hashed.
        version: hashed.

    Raises:
        TypeError: ``function`` has no name, or ``arguments`` holds something that is not JSON.
        ValueError: ``arguments`` uses a reserved key.
    """

    function: Callable[..., Any]
    arguments: Mapping[str, Any]
    label: str = ""
    version: str = ""

    def __post_init__(self) -> None:
        function_name(self.function)
        if not isinstance(self.arguments, Mapping):
            raise TypeError(
                f"arguments: expected a mapping of names to JSON values, got "
                f"{type(self.arguments).__name__}"
            )
        # A copy, so that the key cannot change under the job when the caller edits his dict.
        object.__setattr__(self, "arguments", to_json(self.arguments, "arguments"))

    @cached_property
    def key(self) -> str:
        """32 hexadecimal digits of the SHA-256 of function name, arguments and version."""
        identity = {
            "function": function_name(self.function),
            "arguments": self.arguments,
            "version": self.version,
        }
        return hashlib.sha256(dumps(identity, sort_keys=True).encode("ascii")).hexdigest()[:32]


@dataclass(frozen=True)
class JobResult:
    """What became of a job.

    Attributes:
        key: :attr:`Job.key`.
        label: :attr:`Job.label`.
        arguments: :attr:`Job.arguments`.
        status: ``done`` (it returned), ``failed`` (it raised, or returned something that is not
            JSON) or ``killed`` (its process ended under it, or ran out of time).
        value: what the function returned, as plain JSON; None unless done.
        error: the traceback, or how the process ended; None if done.
        seconds: wall-clock time in the worker.
    """

    key: str
    label: str
    arguments: Mapping[str, Any]
    status: Status
    value: JSON = None
    error: str | None = None
    seconds: float = field(default=0.0, compare=False)

    @property
    def done(self) -> bool:
        """Whether the job returned a value."""
        return self.status == "done"


def require_count(n_jobs: object) -> None:
    """Refuses a number of workers that is none.

    Raises:
        ValueError: not a whole number of at least 1.
    """
    if isinstance(n_jobs, bool) or not isinstance(n_jobs, int) or n_jobs < 1:
        raise ValueError(
            f"n_jobs: expected a whole number of at least 1, got {n_jobs!r}; os.cpu_count() is a "
            "good choice"
        )


def result_of(job: Job, outcome: Outcome) -> JobResult:
    """The result of this job with this outcome."""
    status, value, error, seconds = outcome
    return JobResult(job.key, job.label, job.arguments, status, value, error, seconds)
