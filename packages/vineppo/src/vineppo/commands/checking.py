"""Values from files, held against the types that Python code declares."""

from __future__ import annotations

import difflib
import inspect
import types
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import fields
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from vineppo.errors import InvalidInputError

T = TypeVar("T")
_NAMES: Mapping[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    type(None): "null",
}


def refuse_unknown(where: str, given: Iterable[str], known: Collection[str]) -> None:
    """Refuse a name that is not known.

    Args:
        where: put before the name, such as ``"training."``.
        given: names.
        known: all that there are.

    Raises:
        InvalidInputError: with the first unknown name, the nearest known one, and all of them.
    """
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            meant = f"did you mean {near[0]!r}? " if near else ""
            raise InvalidInputError(
                f"{where}{name}: there is no such name; {meant}allowed: {', '.join(known)}"
            )


def check_value(name: str, value: Any, hint: Any) -> None:
    """Refuse a value that is not of the declared type; a whole number is a number, too.

    Args:
        name: for the message.
        value: as YAML gives it.
        hint: the type.

    Raises:
        InvalidInputError: it does not fit.
    """
    if not _fits(value, hint):
        raise InvalidInputError(f"{name}: expected {_told(hint)}, got {value!r}")


def made(cls: Callable[..., T], mapping: Mapping[str, Any], section: str) -> T:
    """An object of a dataclass from a section of a file; lists become tuples.

    Args:
        cls: the dataclass.
        mapping: its fields by name.
        section: the name of the section.

    Raises:
        InvalidInputError: an unknown or missing name, or a value that does not fit.
    """
    hints = get_type_hints(cls)
    refuse_unknown(f"{section}.", mapping, [field.name for field in fields(cls)])  # type: ignore[arg-type]
    for name, value in mapping.items():
        check_value(f"{section}.{name}", value, hints[name])
    for name, parameter in inspect.signature(cls).parameters.items():
        if parameter.default is inspect.Parameter.empty and name not in mapping:
            raise InvalidInputError(f"{section}.{name}: expected a value, got none")
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in mapping.items()}
    with named(section):
        return cls(**given)


class named:  # noqa: N801 - used like a function
    """Puts the section's name before errors that a class raises about its own arguments."""

    def __init__(self, section: str) -> None:
        self._section = section

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: object) -> None:
        if isinstance(error, InvalidInputError):
            text = str(error)
            if text.startswith(f"{self._section}."):
                return
            raise InvalidInputError(f"{self._section}.{text}") from error


def check_arguments(
    section: str,
    function: Callable[..., Any],
    given: Mapping[str, Any],
    ours: Collection[str] = (),
) -> None:
    """Refuse options that a function does not take, or not with such values.

    Args:
        section: the name of the section.
        function: or a class.
        given: options.
        ours: arguments that other sections or the trainer give.

    Raises:
        InvalidInputError: with the name.
    """
    taken = {n: p for n, p in inspect.signature(function).parameters.items() if n != "self"}
    by_name = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    known = [n for n, p in taken.items() if p.kind in by_name and n not in ours]
    refuse_unknown(f"{section}.", given, known)
    hints = _hints(function)
    for name, value in given.items():
        check_value(f"{section}.{name}", value, hints.get(name, Any))
    for name in known:
        if taken[name].default is inspect.Parameter.empty and name not in given:
            raise InvalidInputError(f"{section}.{name}: expected a value, got none")


def _hints(function: Any) -> dict[str, Any]:
    subject = getattr(function, "__init__") if isinstance(function, type) else function  # noqa: B009
    unknown: dict[str, Any] = {}
    while True:
        try:
            return get_type_hints(subject, localns=unknown)
        except NameError as error:  # of a type that is imported for checkers alone
            if error.name is None or error.name in unknown:
                raise
            unknown[error.name] = Any


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, choice) for choice in inner)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in inner)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    kind = origin or hint
    if not isinstance(kind, type):
        return True  # Any and the like, about which nothing is said
    if issubclass(kind, Mapping):
        return isinstance(value, Mapping)
    if issubclass(kind, Collection) and not issubclass(kind, str):
        if not isinstance(value, list | tuple):
            return False
        if kind is tuple and inner and inner[-1] is not Ellipsis:
            return len(value) == len(inner) and all(map(_fits, value, inner))
        return all(_fits(member, part) for member in value for part in inner[:1])
    return isinstance(value, kind)


def _told(hint: Any) -> str:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_told(choice) for choice in inner))
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if hint in _NAMES:
        return _NAMES[hint]
    kind = origin or hint
    if isinstance(kind, type) and issubclass(kind, Mapping):
        return "names with values"
    if isinstance(kind, type) and issubclass(kind, Collection):
        size = f" of {len(inner)}" if kind is tuple and inner and inner[-1] is not Ellipsis else ""
        return f"a list{size}"
    return getattr(kind, "__name__", str(kind))
