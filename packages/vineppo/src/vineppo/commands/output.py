"""What commands say: results on standard output, news and complaints on standard error."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.table import Table

_WIDTH_OF_FILES = 120
_SECONDS_IN_FILES = 10.0  # between lines of a bar


def speaks() -> bool:
    """Whether this process talks: the first one of those that accelerate starts."""
    return os.environ.get("RANK", "0") == "0"


def say(text: object) -> None:
    """A result."""
    if speaks():
        print(text, flush=True)  # noqa: T201 - this is what it is for


def tell(news: str) -> None:
    """What is done next."""
    if speaks():
        print(f"vineppo: {news}", file=sys.stderr, flush=True)  # noqa: T201


def show(table: Table) -> None:
    """A table, as wide as the terminal, or as most screens where there is none."""
    if speaks():
        Console(width=None if sys.stdout.isatty() else _WIDTH_OF_FILES).print(table)


@contextmanager
def bar(what: str, total: int, unit: str) -> Iterator[Any]:
    """A bar of tqdm with the time that is left."""
    from tqdm import tqdm

    with tqdm(
        total=total,
        desc=what,
        unit=unit,
        dynamic_ncols=True,
        leave=False,
        mininterval=0.1 if sys.stderr.isatty() else _SECONDS_IN_FILES,
        disable=not speaks(),
    ) as shown:
        yield shown
