"""TensorBoard event files."""

from __future__ import annotations

from dataclasses import replace
from os import PathLike

import pandas as pd

from hpreliability.errors import MissingColumnError, MissingExtraError
from hpreliability.readers.layouts import Layout, run_folders
from hpreliability.table import Table, from_frame


def from_tensorboard(
    runs: str | PathLike[str],
    *,
    tag: str,
    layout: str,
    hyperparameter: str | None = None,
) -> Table:
    """Learning curves of one scalar; `table.reduce()` makes one score per run of them.

    Args:
        runs: a folder, or a pattern such as `"runs/**"`; every folder at or below it that holds an
            event file is a run.
        tag: name of the scalar.
        layout: how a run folder's path ends, with columns in braces, for example
            `"{hyperparameter}={value}/{env}/{seed}"`; see `Layout`.
        hyperparameter: its name, where the layout does not tell.

    A run that never logged the tag while others did is a failed run: one point NaN at step 0, with
    a note.

    Raises:
        EmptyInputError: no event file.
        MissingColumnError: no run has the tag; the message lists those there are.
        SourceFormatError: a run folder that does not fit the layout.
        MissingExtraError: TensorBoard is not installed.
        DuplicateKeyError: a tag has two points at one step.
        ValueError: see `Layout`.
    """
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError as error:
        raise MissingExtraError("tensorboard", "tensorboard") from error
    columns = Layout(layout, hyperparameter)
    parts, silent, known = [], [], set()
    for folder in run_folders(runs, ["events.out.tfevents.*"]):
        labels = columns.columns(folder)
        # 0 keeps every point; the default thins curves out at random.
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
        events.Reload()
        tags = events.Tags()["scalars"]
        known.update(tags)
        if tag in tags:
            points = [(event.step, event.value) for event in events.Scalars(tag)]
        else:
            silent.append(str(folder))
            points = [(0, float("nan"))]
        parts.append(pd.DataFrame(points, columns=["step", "score"]).assign(**labels))
    if len(silent) == len(parts):
        there = ", ".join(map(repr, sorted(known))) or "none"
        raise MissingColumnError(f"no run has the scalar {tag!r}; there are: {there}")
    table = from_frame(pd.concat(parts, ignore_index=True), context=columns.contexts, step="step")
    if not silent:
        return table
    note = f"{len(silent)} runs never logged {tag!r} and count as failed, first {silent[0]}"
    return replace(table, notes=(note,))
