"""What a program may use, and what comes back from it."""

from __future__ import annotations

import math
import re
import signal
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, get_args

from gsm_compose.numerals import parse_number
from gsm_compose.sandbox.child import MAX_DIGITS, OUT_OF_MEMORY
from gsm_compose.sandbox.server import ENDED

Layer = Literal["namespaces", "seccomp", "restricted", "none"]
Isolation = Literal["auto", "namespaces", "seccomp", "restricted", "none"]
CodeError = Literal[
    "timeout",
    "memory",
    "output",
    "exception",
    "killed",
    "refused",
    "no function",
    "bad value",
]

_VALUE = re.compile(rf"value\t(\w+)\t(-?\d{{1,{MAX_DIGITS}}})/(\d{{1,{MAX_DIGITS}}})", re.ASCII)
_TEXT = re.compile(r"text\t(\w+)\t([ -~]{0,4096})", re.ASCII)
_ERROR = re.compile(
    r"error\t(exception|memory|refused|no function|bad value)\t(\w+|-)\t([ -~]{0,4096})", re.ASCII
)


@dataclass(frozen=True)
class Limits:
    """What one program may use.

    There is no number of processes to set: a program may not start any.

    Attributes:
        wall_seconds: time from its start to its end, all calls together.
        cpu_seconds: processor time, all calls together. A whole number, as the kernel counts.
        memory_bytes: address space, the interpreter's own 30 to 60 MB included. Not kept by macOS,
            which has no such limit.
        output_bytes: what it may print. It is counted and thrown away.
    """

    wall_seconds: float = 10.0
    cpu_seconds: int = 5
    memory_bytes: int = 512 * 2**20
    output_bytes: int = 2**20

    def __post_init__(self) -> None:
        """Refuse limits that mean nothing, or under which no program could start."""
        if not (math.isfinite(self.wall_seconds) and 0 < self.wall_seconds <= 86400):
            raise ValueError(f"wall_seconds is in (0, 86400], got {self.wall_seconds!r}")
        for name, low, high in (
            ("cpu_seconds", 1, 86400),
            ("memory_bytes", 128 * 2**20, 2**50),
            ("output_bytes", 0, 2**40),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise ValueError(f"{name} is a whole number in [{low}, {high}], got {value!r}")


@dataclass(frozen=True)
class CodeResult:
    """What came of one program.

    Attributes:
        values: for every function that was asked for, the number it returned, or None. A function
            may have its value although a later one failed. Floats are taken for the decimal they
            print as (0.1 is 1/10); a returned text counts if it is a number as a whole ("$18").
        error: the first thing that went wrong, or None.

            - ``"timeout"``: the wall or processor time was used up.
            - ``"memory"``: so was the memory.
            - ``"output"``: it printed more than it may.
            - ``"exception"``: it raised; or the syntax is wrong; or the system refused what it
              tried, which Python turns into `PermissionError`.
            - ``"killed"``: it ended itself or crashed before it answered.
            - ``"refused"``: it is too long, or outside the restricted language; it has not run.
            - ``"no function"``: it does not define what was asked for.
            - ``"bad value"``: a function returned something else than a finite number of at most
              600 digits.
        detail: one line about the error: printable ASCII, but written by the program.
        isolation: what the program ran under.
    """

    values: dict[str, Fraction | None]
    error: CodeError | None
    detail: str
    isolation: Layer


def read_reply(
    call: tuple[str, ...],
    layer: Layer,
    limits: Limits,
    ended: int,
    code: int,
    cpu: float,
    lines: bytes,
) -> CodeResult:
    """The result of a reply whose `lines` are untrusted."""
    values: dict[str, Fraction | None] = dict.fromkeys(call)
    problems: list[tuple[CodeError, str]] = []
    finished = False
    for line in lines.decode("ascii", errors="replace").splitlines():
        if line == "end":
            finished = True
        elif match := _VALUE.fullmatch(line):
            name, top, bottom = match.groups()
            if name in values and int(bottom):
                values[name] = Fraction(int(top), int(bottom))
        elif match := _TEXT.fullmatch(line):
            name, text = match.groups()
            number = parse_number(text)
            if name in values and number is not None:
                values[name] = number
            else:
                problems.append(("bad value", f"{name}: the text {text!r} is not a number"))
        elif match := _ERROR.fullmatch(line):
            kind, name, text = match.groups()
            parts = [part for part in (name.replace("-", ""), text) if part]
            problems.append((_KINDS[kind], ": ".join(parts)))
    if not problems and not (finished and ENDED[ended] == "by itself"):
        problems.append(_untimely_end(limits, ended, code, cpu))
    if not problems and None in values.values():
        problems.append(("bad value", "an answer is missing or not a number"))
    error, detail = problems[0] if problems else (None, "")
    return CodeResult(values, error, detail, layer)


_KINDS: dict[str, CodeError] = {kind: kind for kind in get_args(CodeError)}


def _untimely_end(limits: Limits, ended: int, code: int, cpu: float) -> tuple[CodeError, str]:
    match ENDED[ended]:
        case "wall time":
            return "timeout", f"more than {limits.wall_seconds:g} s passed"
        case "output":
            return "output", f"more than {limits.output_bytes} bytes were printed"
        case _ if cpu >= limits.cpu_seconds or code == -signal.SIGXCPU:
            return "timeout", f"more than {limits.cpu_seconds} s of processor time were used"
        case _ if code == OUT_OF_MEMORY:
            return "memory", f"more than {limits.memory_bytes} bytes were asked for"
        case _ if code < 0:
            return "killed", f"ended by signal {-code} before it answered"
        case _:
            return "killed", f"ended with status {code} before it answered"
