"""The restricted language: arithmetic, calls and control flow, checked before anything runs.

A program is accepted when its syntax tree has only the parts named here. It is an allow-list all
the way: kinds of syntax, names of built-in functions, names of attributes, and names to import.
The classic ways out of a Python program (``().__class__``, ``getattr``, ``"{0.x}".format``, a
traceback's frames, a class of one's own, a decorator) each need something that is not listed.

`check` refuses; `builtins_of` gives the program nothing but the listed functions to run with, so
that what the check might miss is not there either. Modules are stand-ins that hold the listed names
and nothing else.

This module runs inside the sandbox's own interpreter and imports the standard library only.
"""

from __future__ import annotations

import ast
import builtins
import functools
import importlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

MAX_NODES = 20_000


def _names(words: str) -> frozenset[str]:
    return frozenset(words.split())


# Modules and what may be taken from them: numbers, and ways to go through them.
MODULES: dict[str, frozenset[str]] = {
    module: _names(words)
    for module, words in {
        "math": (
            "acos asin atan atan2 ceil comb copysign cos degrees dist e exp fabs factorial floor "
            "fmod frexp fsum gcd hypot inf isclose isfinite isinf isnan isqrt lcm ldexp log log10 "
            "log1p log2 modf nan perm pi pow prod radians remainder sin sqrt sumprod tan tau trunc"
        ),
        "fractions": "Fraction",
        "decimal": (
            "Decimal ROUND_CEILING ROUND_DOWN ROUND_FLOOR ROUND_HALF_DOWN ROUND_HALF_EVEN "
            "ROUND_HALF_UP ROUND_UP"
        ),
        "datetime": "date datetime time timedelta",
        "itertools": (
            "accumulate chain combinations combinations_with_replacement compress count cycle "
            "dropwhile filterfalse groupby islice pairwise permutations product repeat starmap "
            "takewhile zip_longest"
        ),
        "functools": "partial reduce",
        "collections": "Counter OrderedDict defaultdict deque",
        "statistics": (
            "fmean harmonic_mean mean median median_high median_low mode multimode pstdev "
            "pvariance stdev variance"
        ),
        "typing": "Any Callable Dict Iterable List Optional Sequence Set Tuple Union",
    }.items()
}

BUILTINS = _names("""
    abs all any bin bool chr complex dict divmod enumerate filter float format frozenset hex
    int isinstance iter len list map max min next oct ord pow print range repr reversed round
    set slice sorted str sum tuple zip
    ArithmeticError AssertionError Exception IndexError KeyError LookupError
    NotImplementedError OverflowError RuntimeError StopIteration TypeError ValueError
    ZeroDivisionError
""")

# Methods of numbers, strings, containers and dates. `format` and `format_map` are missing because
# they read any attribute that the *text* names.
_METHODS = _names("""
    add append appendleft as_integer_ratio bit_length capitalize casefold clear conjugate
    copy count day days denominator difference discard elements endswith extend find hour
    imag index insert intersection is_integer isalpha isdecimal isdigit isdisjoint
    isnumeric isoweekday isspace issubset issuperset items join keys limit_denominator lower
    lstrip microsecond minute month most_common numerator partition pop popitem popleft
    quantize real remove removeprefix removesuffix replace reverse rfind rindex rotate
    rpartition rsplit rstrip second seconds setdefault sort split splitlines startswith strip
    subtract swapcase symmetric_difference timedelta title to_integral_value today
    total_seconds union update upper values weekday year zfill
""")
ATTRIBUTES = _METHODS.union(*MODULES.values())

_SYNTAX: tuple[type[ast.AST], ...] = (
    # The program and its functions. Decorators are refused below.
    *(ast.Module, ast.FunctionDef, ast.arguments, ast.arg, ast.Return, ast.Lambda),
    # Statements.
    *(ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Expr, ast.Pass, ast.Break, ast.Continue),
    *(ast.For, ast.While, ast.If, ast.Try, ast.ExceptHandler, ast.Raise, ast.Assert, ast.Delete),
    *(ast.Global, ast.Nonlocal, ast.Import, ast.ImportFrom, ast.alias),
    # Expressions.
    *(ast.BoolOp, ast.BinOp, ast.UnaryOp, ast.Compare, ast.IfExp, ast.NamedExpr, ast.Constant),
    *(ast.Call, ast.keyword, ast.Name, ast.Attribute, ast.Subscript, ast.Slice, ast.Starred),
    *(ast.Dict, ast.Set, ast.List, ast.Tuple, ast.JoinedStr, ast.FormattedValue),
    *(ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.comprehension),
    *(ast.expr_context, ast.boolop, ast.operator, ast.unaryop, ast.cmpop),
)


class RefusedError(Exception):
    """A program has a part that the restricted language does not; the message names it."""


def check(tree: ast.Module) -> None:
    """Refuse a program that has anything but the listed parts.

    Raises:
        RefusedError: with the line and the part.
    """
    nodes = list(_walk(tree))
    bound = {name for node in nodes for name in _binds(node)}
    for node in nodes:
        fault = _fault(node, bound)
        if fault is not None:
            raise RefusedError(f"line {getattr(node, 'lineno', 1)}: {fault}")


def _walk(tree: ast.Module) -> Iterator[ast.AST]:
    for count, node in enumerate(ast.walk(tree)):
        if count >= MAX_NODES:
            raise RefusedError(f"the program has more than {MAX_NODES} parts")
        yield node


def _binds(node: ast.AST) -> Iterator[str]:
    """Names that the program itself gives a meaning to."""
    match node:
        case ast.Name(id=name, ctx=ast.Store()):
            yield name
        case ast.FunctionDef(name=name) | ast.arg(arg=name):
            yield name
        case ast.ExceptHandler(name=str(name)):
            yield name
        case ast.alias(name=name, asname=asname):
            yield asname or name


def _fault(node: ast.AST, bound: set[str]) -> str | None:
    if not isinstance(node, _SYNTAX):
        return f"{type(node).__name__} is not in the restricted language"
    match node:
        case ast.FunctionDef(decorator_list=[_, *_]):
            return "decorators are not in the restricted language"
        case ast.Name(id=name) if name not in BUILTINS and name not in bound:
            if hasattr(builtins, name):
                return f"the built-in name {name!r} is not allowed"
        case ast.Attribute(attr=name, ctx=context):
            if name not in ATTRIBUTES:
                return f"the attribute {name!r} is not allowed"
            if not isinstance(context, ast.Load):
                return "an attribute may be read only"
        case ast.Import(names=aliases):
            for alias in aliases:
                if alias.name not in MODULES:
                    return f"the module {alias.name!r} is not allowed"
        case ast.ImportFrom(module=module, names=aliases, level=level):
            if level or module not in MODULES:
                return f"the module {module!r} is not allowed"
            for alias in aliases:
                if alias.name not in MODULES[module]:
                    return f"{alias.name!r} of the module {module!r} is not allowed"
    for name in _binds(node):
        if name.startswith("__"):
            return f"the name {name!r} is not allowed"
    if isinstance(node, ast.Name) and node.id.startswith("__"):
        return f"the name {node.id!r} is not allowed"
    return None


@functools.cache
def builtins_of() -> dict[str, Any]:
    """The built-in names a restricted program runs with, and `__import__` for listed modules."""
    stand_ins = {
        module: SimpleNamespace(
            **{
                name: getattr(importlib.import_module(module), name)
                for name in names
                # Some came with a later Python than the oldest that we support.
                if hasattr(importlib.import_module(module), name)
            }
        )
        for module, names in MODULES.items()
    }

    def import_listed(name: str, *_: object) -> SimpleNamespace:
        if name not in stand_ins:
            raise ImportError(f"the module {name!r} is not allowed")
        return stand_ins[name]

    allowed = {name: getattr(builtins, name) for name in BUILTINS}
    return allowed | {"__import__": import_listed}
