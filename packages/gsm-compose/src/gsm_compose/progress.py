"""How far an evaluation has come, on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

_SECONDS_BETWEEN_LINES = 10.0

Advance = Callable[[int], None]


@contextmanager
def progress(
    title: str, total: int, *, shown: bool = True, stream: TextIO | None = None
) -> Iterator[Advance]:
    """Give a function to tell how many more have ended.

    A bar with the time left on a terminal; elsewhere plain lines, one every 10 seconds at most and
    one at the end; nothing if not `shown` or if there is nothing to do.

    Args:
        title: what is being done.
        total: how many there are to do.
        shown: False for silence.
        stream: standard error if None.
    """
    stream = sys.stderr if stream is None else stream
    if not shown or total == 0:
        yield lambda _count: None
    elif stream.isatty():
        with _bar(title, total, stream) as advance:
            yield advance
    else:
        with _lines(title, total, stream) as advance:
            yield advance


@contextmanager
def _bar(title: str, total: int, stream: TextIO) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("elapsed"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(file=stream),
    ) as bar:
        task = bar.add_task(title, total=total)
        yield lambda count: bar.update(task, advance=count)


@contextmanager
def _lines(title: str, total: int, stream: TextIO) -> Iterator[Advance]:
    begin = last = time.monotonic()
    ended = told = 0

    def tell() -> None:
        nonlocal last, told
        last, told = time.monotonic(), ended
        line = f"{title}: {ended}/{total}, {_clock(last - begin)} elapsed"
        if 0 < ended < total:
            line += f", {_clock((last - begin) / ended * (total - ended))} left"
        stream.write(line + "\n")
        stream.flush()

    def advance(count: int) -> None:
        nonlocal ended
        ended += count
        if time.monotonic() - last >= _SECONDS_BETWEEN_LINES:
            tell()

    try:
        yield advance
    finally:
        if told < ended:
            tell()


def _clock(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
