"""Where a command is and since when, on standard error, for work that cannot be counted."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

Step = Callable[[str], None]


@contextmanager
def steps(stream: TextIO | None = None) -> Iterator[Step]:
    """Give a function to tell what is begun now, which ends what was begun before.

    On a terminal, a spinner with the time since the step began; elsewhere one line a step with the
    seconds since the first, and one at the end.

    Args:
        stream: standard error if None.
    """
    stream = sys.stderr if stream is None else stream
    if stream.isatty():
        with _spinner(stream) as step:
            yield step
        return
    begin = time.monotonic()

    def tell(text: str) -> None:
        stream.write(f"{time.monotonic() - begin:6.1f} s  {text}\n")
        stream.flush()

    yield tell
    tell("done")


@contextmanager
def _spinner(stream: TextIO) -> Iterator[Step]:
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(finished_text="·"),
        TextColumn("{task.description}", markup=False),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(file=stream)) as shown:

        def step(text: str) -> None:
            for task in shown.task_ids:
                shown.update(task, total=1, completed=1)
            shown.add_task(text, total=None)

        yield step
        for task in shown.task_ids:
            shown.update(task, total=1, completed=1)
