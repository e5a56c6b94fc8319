"""What commands say: results on standard output, progress and complaints on standard error."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

_WIDTH_OF_FILES = 120


def say(result: str | Path) -> None:
    """A line or a text."""
    sys.stdout.write(f"{result}\n")
    sys.stdout.flush()


def show(table: Table) -> None:
    """A table, as wide as the terminal or, in a file or pipe, as wide as most screens."""
    width = None if sys.stdout.isatty() else _WIDTH_OF_FILES
    Console(width=width).print(table)


def tell(news: str) -> None:
    """What is done next, or what went wrong."""
    sys.stderr.write(f"asyncrlhf: {news}\n")
    sys.stderr.flush()
