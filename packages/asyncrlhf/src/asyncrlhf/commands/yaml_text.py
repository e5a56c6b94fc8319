"""YAML as people write it: 1e-4 is a number, `no` is a word, and a key counts once.

PyYAML follows YAML 1.1, in which they are a text, False, and the later one of two.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from asyncrlhf.errors import InvalidInputError

_TAG = "tag:yaml.org,2002:"
_REPLACED = {f"{_TAG}{name}" for name in ("bool", "int", "float", "timestamp")}
_DIGITS = "-+.0123456789"
# The core schema of YAML 1.2: pattern, and characters that it can begin with.
_KINDS = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?(0|[1-9][0-9]*)", _DIGITS),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
        r"|[-+]?\.inf|\.nan",
        _DIGITS,
    ),
}


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [key for place, key in enumerate(keys) if key in keys[:place]]
        if twice:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {twice[0]!r} is there twice", node.start_mark
            )
        found: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return found


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _name, (_pattern, _first) in _KINDS.items():
    _Loader.add_implicit_resolver(f"{_TAG}{_name}", re.compile(f"^(?:{_pattern})$"), list(_first))


def read_mapping(text: str, name: str) -> dict[str, Any]:
    """The mapping that a text holds.

    Args:
        text: YAML.
        name: where it is from, for messages.

    Raises:
        InvalidInputError: it is no YAML, or no mapping with texts as keys; with the line.
    """
    try:
        found = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise InvalidInputError(f"{name}: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise InvalidInputError(
            f"{name}: expected keys with values, such as 'model: tiny', got {str(found)[:60]!r}"
        )
    return found


def read_value(text: str, name: str) -> Any:
    """One value: a number, a text, null, or a list as ``[1, 2]``.

    Raises:
        InvalidInputError: it is no YAML.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise InvalidInputError(f"{name}: expected a value, got {text!r}") from error


def written(mapping: Mapping[str, Any]) -> str:
    """YAML of plain values, which :func:`read_mapping` and other readers read alike."""
    text: str = yaml.safe_dump(
        dict(mapping), sort_keys=False, allow_unicode=True, default_flow_style=False
    )
    return text
