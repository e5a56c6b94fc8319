"""One program: run it, call its functions, and say on a pipe what numbers they gave.

This module runs inside the sandbox's own interpreter and imports the standard library only. What it
writes can be forged by the program, which runs in the same process; a forger can claim a number,
which an honest program can as well, and nothing else (`gsm_compose.sandbox.running` reads the lines
as untrusted text). Lines, in the order of the calls::

    value <function> <numerator>/<denominator>
    text <function> <the returned string, escaped>
    error <kind> <function or -> <detail, escaped>
    end
"""

from __future__ import annotations

import ast
import builtins
import codecs
import importlib
import os
import sys
import traceback
import types
import warnings
from decimal import Decimal
from fractions import Fraction
from typing import Any

from gsm_compose.sandbox import restricted

MAX_DIGITS = 600  # of a numerator or denominator; no limit that a user sets on `int` is below 640
MAX_TEXT = 400  # characters of a detail or of a returned string
OUT_OF_MEMORY = 86  # exit status of a program that left no room to say so

# Loaded before the file system is out of reach, so that programs can import them. `_strptime` is
# what the standard library imports only when it first reads a date.
PRELOADED = """
    math cmath fractions decimal datetime itertools functools collections statistics operator
    random re string typing dataclasses calendar time json heapq bisect copy numbers abc enum
    textwrap _strptime locale
"""


def preload() -> None:
    """Import all that a program, or the report about it, may need."""
    for name in PRELOADED.split():
        importlib.import_module(name)
    for name in ("unicode_escape", "ascii", "latin-1"):
        codecs.lookup(name)
    restricted.builtins_of()  # once, instead of in every child
    warnings.simplefilter("ignore")  # about the program's syntax, which nobody would read
    # Loads what the first report of an error needs.
    traceback.format_exception_only(SyntaxError("x", ("x", 1, 1, "x", 1, 2)))


def run(source: str, calls: list[str], is_restricted: bool, report: int) -> None:
    """Run `source`, then each of the functions named in `calls` without arguments.

    Args:
        source: Python source text.
        calls: names of functions that it should define.
        is_restricted: check it by `restricted.check`, and give it those built-ins only.
        report: file descriptor for the lines.
    """
    module = types.ModuleType("program")
    # Classes of the standard library look a program's module up by its name.
    sys.modules["program"] = module
    namespace = module.__dict__
    try:
        tree = ast.parse(source)
        if is_restricted:
            restricted.check(tree)
        namespace["__builtins__"] = restricted.builtins_of() if is_restricted else builtins
        exec(compile(tree, "<program>", "exec"), namespace)  # noqa: S102 - what a sandbox is for
    except restricted.RefusedError as refusal:
        _write(report, "error", "refused", "-", _escape(str(refusal)))
    except BaseException as error:  # noqa: BLE001 - a program may raise anything, SystemExit included
        _write(report, "error", *_describe(error, "-"))
    else:
        for name in calls:
            function = namespace.get(name)
            if not callable(function):
                _write(report, "error", "no function", name, "")
                continue
            try:
                line = _value(name, function())
            except BaseException as error:  # noqa: BLE001 - as above
                line = ("error", *_describe(error, name))
            _write(report, *line)
    _write(report, "end")


def _value(name: str, value: Any) -> tuple[str, ...]:
    match value:
        case bool():
            number = None
        case int():
            number = Fraction(int(value))
        case Fraction():
            number = value
        case float():
            # The shortest decimal that means this float is what its author meant: 0.1 is 1/10.
            number = Fraction(repr(value)) if value - value == 0 else None
        case Decimal():
            # A large exponent would be a number of that many digits.
            usable = value.is_finite() and abs(value.adjusted()) < MAX_DIGITS
            number = Fraction(value) if usable else None
        case str() if len(value) <= MAX_TEXT:
            return "text", name, _escape(value)
        case _:
            number = None
    if number is None:
        return "error", "bad value", name, f"{type(value).__name__} is not a finite number"
    if max(abs(number.numerator), number.denominator) >= 10**MAX_DIGITS:
        return "error", "bad value", name, f"the number has more than {MAX_DIGITS} digits"
    return "value", name, f"{number.numerator}/{number.denominator}"


def _describe(error: BaseException, name: str) -> tuple[str, str, str]:
    if isinstance(error, MemoryError):
        return "memory", name, "MemoryError"
    # Not `str(error)`: that may run the program's code, and that may raise in turn.
    lines = traceback.format_exception_only(error)
    return "exception", name, _escape(lines[-1].strip())


def _escape(text: str) -> str:
    return text[:MAX_TEXT].encode("unicode_escape").decode("ascii")


def _write(report: int, *parts: str) -> None:
    os.write(report, ("\t".join(parts) + "\n").encode())
