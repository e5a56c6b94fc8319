"""Docstrings on their way to the site: what the site's parser cannot read is spelt out for it.

Two habits of the source are kept out of its way rather than out of the source: roles such as
``:func:`run_jobs``` become plain code, and an entry for several parameters at once
(``lo, hi: bounds``) becomes one entry for each.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`~?([^`]+)`")
_SHARED = re.compile(r"^( +)(\w+(?:,\s+\w+)+):( .*(?:\n(?:\1 +.*|(?=\n\1 )))*)", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Rewrites every docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called once per module, class, function and attribute."""
        if obj.docstring is not None and not obj.is_alias:
            obj.docstring.value = spelt_out(obj.docstring.value)


def spelt_out(text: str) -> str:
    """The docstring without roles and without shared entries outside of `Raises`."""
    head, raises, tail = _ROLE.sub(r"`\1`", text).partition("\nRaises:\n")
    return _SHARED.sub(_one_each, head) + raises + tail


def _one_each(entry: re.Match[str]) -> str:
    indent, names, rest = entry.groups()
    return "\n".join(f"{indent}{name}:{rest}" for name in re.split(r",\s+", names))
