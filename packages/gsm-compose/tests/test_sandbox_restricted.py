"""The restricted language: what it refuses, and that what it leaves has no way out."""

from __future__ import annotations

import ast
import builtins

import pytest

from gsm_compose.sandbox import restricted


def refusal(source: str) -> str | None:
    try:
        restricted.check(ast.parse(source))
    except restricted.RefusedError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    "source",
    [
        # Names of the interpreter.
        "open('x')",
        "eval('1')",
        "exec('1')",
        "compile('1', '', 'exec')",
        "__import__('os')",
        "__builtins__",
        "getattr(1, 'real')",
        "setattr(print, 'x', 1)",
        "globals()",
        "locals()",
        "vars()",
        "dir()",
        "type(1)",
        "object()",
        "super()",
        "breakpoint()",
        "input()",
        "help()",
        "memoryview(b'')",
        "x = open",
        "f = [eval]",
        "print(1, file=open)",
        "def f(x=eval): pass",
        "f'{open}'",
        "x: eval = 1",
        # Attributes.
        "().__class__.__base__.__subclasses__()",
        "''.__class__",
        "(lambda: 0).__globals__",
        "(lambda: 0).__code__",
        "(x for x in ()).gi_frame",
        "print.__self__",
        "'{0.__class__}'.format(1)",
        "''.format_map({})",
        "try:\n    1 / 0\nexcept ZeroDivisionError as e:\n    e.__traceback__.tb_frame",
        "try:\n    1 / 0\nexcept ZeroDivisionError as e:\n    e.with_traceback(None)",
        "f'{().__class__}'",
        "import math\nmath.__loader__",
        "import math\nmath.pi = 3",
        "import math\ndel math.pi",
        "for print.real in (1,): pass",
        "x._private",
        # Imports.
        "import os",
        "import sys",
        "import os.path",
        "import math, os",
        "import os as math",
        "from os import system",
        "from math import *",
        "from . import x",
        "from .math import pi",
        "from fractions import sys",
        "from statistics import sys",
        "from collections import namedtuple",
        "from functools import wraps",
        "import operator",
        "import builtins",
        "import math as __builtins__",
        # Syntax.
        "class A: pass",
        "@print\ndef f(): pass",
        "async def f(): pass",
        "with x: pass",
        "def f():\n    yield 1",
        "match 1:\n    case 1: pass",
        "try:\n    pass\nexcept* ValueError:\n    pass",
        "def __getattr__(x): pass",
        "def f(__builtins__): pass",
        "__builtins__ = {}",
        "for __builtins__ in (): pass",
        "lambda __x: 0",
        "try:\n    pass\nexcept ValueError as __builtins__:\n    pass",
        "x = [" + "1, " * restricted.MAX_NODES + "]",
        # Other spellings of the same names.
        "ｏｐｅｎ('x')",
        "().__ｃlass__",
    ],
)
def test_a_way_out_is_refused_by_name(source: str) -> None:
    reason = refusal(source)
    assert reason is not None
    assert reason.startswith("line ") or "parts" in reason


@pytest.mark.parametrize(
    "source",
    [
        "def solution():\n    return 2 * (3 + 4) // 5 % 6 - 7 ** 2",
        "x = 5\nx += 1\nassert x == 6 and not x < 3, 'no'",
        "total = sum(n for n in range(10) if n % 2)\nprint(f'{total:.2f}')",
        "import math as m\nprint(m.ceil(2.1), m.pi)",
        "from datetime import date, timedelta\nprint((date(2024, 1, 31) + timedelta(days=1)).day)",
        "from typing import Dict, List\ndef f(x: List[int]) -> Dict[str, int]:\n    return {}",
        "a, *b = [1, 2, 3]\nb.sort(key=lambda n: -n)\nprint(b[::-1], 'x'.join(['1']))",
        "open = 3\nprint(open + 1)",
        "for _ in range(3):\n    pass\nwhile True:\n    break\nelse:\n    pass",
        "if (n := 3) > 2:\n    pass\nelif n:\n    raise ValueError('x')",
        "def f(*args, **kw):\n    global g\n    g = kw\n    return args",
    ],
)
def test_programs_as_models_write_them_are_accepted(source: str) -> None:
    assert refusal(source) is None


def test_no_listed_name_gives_access_to_the_system() -> None:
    dangerous = {
        *("open", "eval", "exec", "compile", "getattr", "setattr", "delattr", "vars", "dir"),
        *("globals", "locals", "type", "object", "super", "input", "__import__", "memoryview"),
        *("breakpoint", "help", "classmethod", "staticmethod", "property", "__build_class__"),
    }
    assert not restricted.BUILTINS & dangerous
    assert all(hasattr(builtins, name) for name in restricted.BUILTINS)
    assert not any(name.startswith("_") for name in restricted.ATTRIBUTES)
    # Attributes by which one object leads to code, frames, formats or other modules.
    assert not restricted.ATTRIBUTES & {
        *("format", "format_map", "mro", "gi_frame", "gi_code", "cr_frame", "f_globals", "func"),
        *("f_builtins", "f_back", "tb_frame", "tb_next", "with_traceback", "obj", "name", "args"),
        *("read", "write", "open", "sys", "os", "modules", "attrgetter", "methodcaller"),
    }


def test_listed_modules_are_stand_ins_without_anything_else() -> None:
    names = restricted.builtins_of()
    fetch = names["__import__"]
    for module, listed in restricted.MODULES.items():
        stand_in = fetch(module)
        assert set(vars(stand_in)) <= listed
        assert not any(type(value).__name__ == "module" for value in vars(stand_in).values())
    with pytest.raises(ImportError, match="not allowed"):
        fetch("os")
    assert set(names) == restricted.BUILTINS | {"__import__"}
