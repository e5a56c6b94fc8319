"""How far a list of jobs has come, on standard error."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

_SECONDS_BETWEEN_LINES = 10.0
_SHARE_BETWEEN_LINES = 0.05


class Progress(Protocol):
    """Told once about every job that ends."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def advance(self, *, failed: bool) -> None:
        """One more job has ended."""
        ...


def make_progress(title: str, total: int, *, shown: bool, stream: TextIO | None = None) -> Progress:
    """A bar on a terminal, plain lines elsewhere, nothing if not ``shown`` or nothing to do.

    Args:
        title: short name of the list.
        total: number of jobs that will run.
        shown: False for silence.
        stream: standard error if None.
    """
    stream = sys.stderr if stream is None else stream
    if not shown or total == 0:
        return _Silence()
    if stream.isatty():
        return _Bar(title, total, stream)
    return _Lines(title, total, stream)


class _Silence:
    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None

    def advance(self, *, failed: bool) -> None:
        del failed


class _Bar:
    def __init__(self, title: str, total: int, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as RichProgress

        self._failed = 0
        self._progress: RichProgress = RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("elapsed"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[failures]}", style="red"),
            console=Console(file=stream),
        )
        self._task: TaskID = self._progress.add_task(title, total=total, failures="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def advance(self, *, failed: bool) -> None:
        self._failed += failed
        note = f"{self._failed} failed" if self._failed else ""
        self._progress.update(self._task, advance=1, failures=note)


class _Lines:
    """At most one line every 10 seconds, and only when 5 % more is done; always the last one."""

    def __init__(self, title: str, total: int, stream: TextIO) -> None:
        self._title, self._total, self._stream = title, total, stream
        self._ended = self._failed = self._told = 0
        self._begin = self._last = time.monotonic()

    def __enter__(self) -> Self:
        self._begin = self._last = time.monotonic()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._told < self._ended:
            self._tell()

    def advance(self, *, failed: bool) -> None:
        self._ended += 1
        self._failed += failed
        if (
            time.monotonic() - self._last >= _SECONDS_BETWEEN_LINES
            and self._ended - self._told >= _SHARE_BETWEEN_LINES * self._total
        ):
            self._tell()

    def _tell(self) -> None:
        self._last, self._told = time.monotonic(), self._ended
        elapsed = self._last - self._begin
        line = f"{self._title}: {self._ended}/{self._total}, {clock(elapsed)} elapsed"
        if self._ended < self._total:
            line += f", {clock(elapsed / self._ended * (self._total - self._ended))} left"
        if self._failed:
            line += f", {self._failed} failed"
        self._stream.write(line + "\n")
        self._stream.flush()


def clock(seconds: float) -> str:
    """Seconds as ``h:mm:ss``."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
