"""YAML as its writers mean it: ``1e-6`` is a number, ``no`` a word, and no key counts twice.

PyYAML reads YAML 1.1, where the first is a text, the second False, and the later key wins.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from vineppo.errors import InvalidInputError

_DIGIT = [*"+-.0123456789"]


class _Loader(yaml.SafeLoader):
    """The core schema of YAML 1.2."""

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012 - of PyYAML, filled below

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} comes twice", key_node.start_mark
                )
            seen.add(key)
        made: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return made


for _kind, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", [*"~nN", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", _DIGIT),
    (
        "float",
        r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan",
        _DIGIT,
    ),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_kind}", re.compile(f"(?:{_pattern})\\Z"), _first
    )


def mapping_of(text: str, name: str) -> dict[str, Any]:
    """The mapping that a file holds.

    Args:
        text: YAML.
        name: of the file, for messages.

    Raises:
        InvalidInputError: it is no YAML, or no mapping from texts; with the line.
    """
    found = _loaded(text, name)
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise InvalidInputError(
            f"{name}: expected keys with values, such as 'method: vineppo', got {found!r:.60}"
        )
    return found


def value_of(text: str, name: str) -> Any:
    """One value: a number, a word, ``null``, ``[1, 2]``.

    Raises:
        InvalidInputError: it is no YAML.
    """
    return _loaded(text, name)


def text_of(mapping: Mapping[str, Any]) -> str:
    """YAML of plain values, which :func:`mapping_of` reads as the same."""
    text: str = yaml.safe_dump(_plain(mapping), sort_keys=False, allow_unicode=True)
    return text


def _loaded(text: str, name: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise InvalidInputError(f"{name}: {' '.join(str(error).split())}") from error


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value
