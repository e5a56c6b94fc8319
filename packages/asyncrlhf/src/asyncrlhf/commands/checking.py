"""Values from files against the types that Python code declares: names, kinds, nearest names."""

from __future__ import annotations

import difflib
import enum
import inspect
import types
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from asyncrlhf.errors import InvalidInputError

T = TypeVar("T")
_WORDS: Mapping[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    Path: "a path",
    type(None): "null",
}


def refuse_unknown(where: str, given: Iterable[str], known: Collection[str]) -> None:
    """Refuse a name that is not known, and name the nearest that is.

    Args:
        where: put before the name, such as ``"engine."``.
        given: names.
        known: all that there are.

    Raises:
        InvalidInputError: with the first unknown name.
    """
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=1)
            few = f"; known: {', '.join(sorted(known))}" if len(known) <= 20 else ""
            hint = f"; did you mean {near[0]!r}?" if near else few
            raise InvalidInputError(f"{where}{name}: there is no such key{hint}")


def check_type(name: str, value: Any, hint: Any) -> None:
    """Refuse a value that is not of the declared type; whole numbers are numbers, too.

    Args:
        name: for messages.
        value: as YAML gives it.
        hint: a type; of those that YAML cannot give, none fits.

    Raises:
        InvalidInputError: it does not fit.
    """
    parts = _parts(hint)
    for choice in parts:
        if isinstance(choice, type) and issubclass(choice, enum.Enum) and isinstance(value, str):
            allowed = [member.value for member in choice]
            if value not in allowed:
                raise InvalidInputError(
                    f"{name}: expected one of {', '.join(map(str, allowed))}, got {value!r}"
                )
            return
    if not any(_fits(value, part) for part in parts):
        told = " or ".join(dict.fromkeys(filter(None, map(_described, parts))))
        raise InvalidInputError(f"{name}: expected {told}, got {value!r}")


def made(cls: type[T], mapping: Mapping[str, Any], where: str) -> T:
    """A dataclass out of a mapping; lists become tuples.

    Raises:
        InvalidInputError: an unknown or missing name, or a value that does not fit.
    """
    hints = get_type_hints(cls)
    known = [field.name for field in fields(cls)]  # type: ignore[arg-type]
    refuse_unknown(where, mapping, known)
    for name, value in mapping.items():
        check_type(f"{where}{name}", value, hints[name])
    plain = {k: tuple(v) if isinstance(v, list) else v for k, v in mapping.items()}
    try:
        return cls(**plain)
    except TypeError as error:
        missing = str(error).rpartition(": ")[2]
        raise InvalidInputError(f"{where.rstrip('.')}: needs {missing}") from error


def check_arguments(
    where: str, cls: type, given: Mapping[str, Any], ours: Collection[str] = ()
) -> None:
    """Refuse keyword arguments that a class does not take, or not with such values.

    Args:
        where: put before names.
        cls: whose constructor counts.
        given: arguments from a file.
        ours: arguments that are not for files.

    Raises:
        InvalidInputError: with the name.
    """
    taken = inspect.signature(cls).parameters
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    known = [name for name, p in taken.items() if name not in ours and p.kind in named]
    if not any(parameter.kind == parameter.VAR_KEYWORD for parameter in taken.values()):
        refuse_unknown(where, given, known)
    hints = _hints(cls)
    for name in given:
        if name in ours:
            raise InvalidInputError(f"{where}{name}: cannot be given in a recipe")
        if name in known:
            check_type(f"{where}{name}", given[name], hints.get(name, Any))
    for name in known:
        if taken[name].default is inspect.Parameter.empty and name not in given:
            raise InvalidInputError(f"{where}{name}: expected a value, got none")


def _hints(cls: type) -> dict[str, Any]:
    # The fields of a dataclass may come from several modules, each with names of its own.
    subject: Any = cls if is_dataclass(cls) else cls.__init__  # type: ignore[misc]
    try:
        return get_type_hints(subject)
    except NameError:  # of something that is imported for type checkers alone
        return {}


def _parts(hint: Any) -> tuple[Any, ...]:
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(part for choice in get_args(hint) for part in _parts(choice))
    return (hint,)


def _fits(value: Any, hint: Any) -> bool:
    if hint is Any:
        return True
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return value in inner
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is Path:
        return isinstance(value, str)
    container = hint if origin is None else origin
    if not isinstance(container, type):
        return False
    if issubclass(container, Mapping):
        return isinstance(value, Mapping)
    if issubclass(container, Collection) and container is not str:
        kinds = [part for part in inner if part is not Ellipsis]
        return isinstance(value, list | tuple) and all(
            any(_fits(x, part) for kind in kinds for part in _parts(kind)) or not kinds
            for x in value
        )
    if getattr(container, "_is_protocol", False):
        return False
    return isinstance(value, container)


def _described(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if hint in _WORDS:
        return _WORDS[hint]
    container = get_origin(hint) or hint
    if isinstance(container, type) and issubclass(container, Mapping):
        return "keys with values"
    if isinstance(container, type) and issubclass(container, Sequence | Collection):
        return "a list"
    return ""
