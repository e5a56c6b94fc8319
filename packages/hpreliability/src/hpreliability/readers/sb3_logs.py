"""Logs of Stable-Baselines3: `evaluations.npz` and `monitor.csv`."""

from __future__ import annotations

import json
import zipfile
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hpreliability.errors import EmptyInputError, SourceFormatError
from hpreliability.readers.files import parse_csv
from hpreliability.readers.layouts import Layout, run_folders
from hpreliability.table import Table, from_frame

Log = Literal["evaluations", "monitor"]


def from_sb3(
    runs: str | PathLike[str],
    *,
    layout: str,
    log: Log = "evaluations",
    hyperparameter: str | None = None,
) -> Table:
    """Learning curves of Stable-Baselines3 runs; `table.reduce()` makes one score per run of them.

    Args:
        runs: a folder, or a pattern with wildcards; every folder at or below it with such a log is
            a run.
        layout: how a run folder's path ends, with columns in braces, for example
            `"{hyperparameter}={value}/{env}/{seed}"`; see `Layout`.
        log: `"evaluations"`, what `EvalCallback` writes: the score is the mean return over the
            episodes of an evaluation, the step its time step. Or `"monitor"`, what `Monitor`
            writes: the score is the return of each training episode, the step the number of
            environment steps by its end; several monitors of one folder are merged by wall-clock
            time, as SB3 does.
        hyperparameter: its name, where the layout does not tell.

    A run without any evaluation or episode is a failed run: one point NaN at step 0, with a note.

    Raises:
        EmptyInputError: no log, or an empty file.
        SourceFormatError: a log that SB3 did not write, or a torn one; a folder that does not fit
            the layout.
        ValueError: unknown `log`; see `Layout`.
    """
    if log not in get_args(Log):
        raise ValueError(f"log must be one of {get_args(Log)}, got {log!r}")
    columns = Layout(layout, hyperparameter)
    names = ["evaluations.npz"] if log == "evaluations" else ["monitor.csv", "*.monitor.csv"]
    parts, silent = [], []
    for folder in run_folders(runs, names):
        labels = columns.columns(folder)
        if log == "evaluations":
            points = _evaluations(folder / names[0])
        else:
            points = _episodes(sorted({file for name in names for file in folder.glob(name)}))
        if points.empty:
            silent.append(str(folder))
            points = pd.DataFrame({"step": [0], "score": [float("nan")]})
        parts.append(points.assign(**labels))
    table = from_frame(pd.concat(parts, ignore_index=True), context=columns.contexts, step="step")
    if not silent:
        return table
    note = f"{len(silent)} runs logged nothing and count as failed, first {silent[0]}"
    return replace(table, notes=(note,))


def _evaluations(file: Path) -> pd.DataFrame:
    if file.stat().st_size == 0:
        raise EmptyInputError(f"{file} is empty")
    try:
        with np.load(file, allow_pickle=False) as arrays:
            steps: NDArray[Any] = arrays["timesteps"]
            returns: NDArray[Any] = arrays["results"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise SourceFormatError(f"{file} is not what EvalCallback writes: {error}") from error
    if returns.ndim != 2 or len(returns) != len(steps):
        raise SourceFormatError(
            f"{file}: expected results (evaluations, episodes) for {len(steps)} time steps, got "
            f"shape {returns.shape}"
        )
    return pd.DataFrame({"step": steps, "score": returns.mean(axis=1)})


def _episodes(files: list[Path]) -> pd.DataFrame:
    episodes = pd.concat([_monitor(file) for file in files], ignore_index=True)
    episodes = episodes.sort_values("end", kind="stable")
    return pd.DataFrame({"step": episodes["l"].cumsum(), "score": episodes["r"]})


def _monitor(file: Path) -> pd.DataFrame:
    """Return `r`, length `l` and end (s since the epoch) of every episode of one monitor."""
    text = file.read_text(encoding="utf-8")
    if not text:
        raise EmptyInputError(f"{file} is empty")
    first, _, rest = text.partition("\n")
    try:
        start = float(json.loads(first.removeprefix("#"))["t_start"])
    except (ValueError, KeyError, TypeError) as error:
        raise SourceFormatError(
            f"{file}, line 1: expected # and a JSON object with t_start, got {first[:60]!r}"
        ) from error
    frame = parse_csv(rest, file, first_line=2)
    if not {"r", "l", "t"} <= set(frame.columns):
        raise SourceFormatError(f"{file}, line 2: expected columns r, l, t, got {[*frame.columns]}")
    try:
        numbers = frame[["r", "l", "t"]].astype(float)
    except (ValueError, TypeError) as error:
        raise SourceFormatError(f"{file}: not a number among r, l, t ({error})") from error
    return numbers.assign(end=start + numbers["t"])
