"""Ray Tune experiments, from the result grid in memory or from the experiment's folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import pandas as pd

from hpreliability.errors import EmptyInputError, MissingColumnError, SourceFormatError
from hpreliability.readers.designs import Binning, Design, entries, flattened, from_runs
from hpreliability.readers.files import read_json_lines
from hpreliability.table import Table

Reports = list[dict[str, Any]]


def from_ray_results(
    source: Any,
    *,
    params: Sequence[str],
    score: str,
    context: Sequence[str] = ("env",),
    seed: str | None = "seed",
    design: Design = "grid",
    default: Mapping[str, object] | None = None,
    step: str | None = None,
    bins: int = 4,
    binning: Binning = "quantile",
    min_count: int = 3,
) -> Table:
    """A table from the trials of `ray.tune`.

    Args:
        source: the folder of an experiment, which holds one folder per trial with `params.json` and
            `result.json`, or a `ray.tune.ResultGrid` whose storage is a local folder. Reading does
            not need Ray.
        params: the hyper-parameters, by config key; nested keys are `outer/inner`.
        score: the reported metric; nested ones are `outer/inner`.
        context: config keys that are contexts.
        seed: config key of the seed; None: each trial is a run of its own.
        design, default, bins, binning, min_count: see `from_runs`.
        step: a reported metric such as `"training_iteration"` for learning curves; None: the last
            report of each trial.

    Trials that ended with an error or not at all, and trials that never reported, are failed runs:
    their last score is NaN, with a note.

    Raises:
        FileNotFoundError: no such folder.
        EmptyInputError: no trial.
        MissingColumnError: no trial reported the score; a trial's config lacks a name.
        SourceFormatError: not an experiment; a file that is not JSON, with its line.
        HPReliabilityError: as `from_runs`.
    """
    if not isinstance(source, (str, PathLike)) and not hasattr(source, "experiment_path"):
        raise SourceFormatError(f"expected a ResultGrid or a folder, got {type(source).__name__}")
    trials = _trials(Path(getattr(source, "experiment_path", source)))
    contexts = (context,) if isinstance(context, str) else tuple(context)
    wanted = (*params, *contexts, *([seed] if seed else []))
    rows, failed = [], []
    for name, config, reports, error in trials:
        labels = entries(config, wanted, f"trial {name}") | {"trial": name}
        kept = [report for report in reports if score in report]
        kept = kept if step else kept[-1:]
        points = [{score: r[score]} | ({step: r.get(step)} if step else {}) for r in kept]
        if error or not points:
            failed.append(name)
            # The place of the failure is the last point, so that every reduction sees it.
            last = points.pop() if points else {step: 0} if step else {}
            points.append(last | {score: float("nan")})
        rows += [labels | point for point in points]
    if not rows:
        raise EmptyInputError(f"no trial in {source}")
    # dtype=object: integers and floats of a mixed column keep their spelling.
    frame = pd.DataFrame(rows, dtype=object)
    if not any(score in report for _, _, reports, _ in trials for report in reports):
        there = sorted({key for _, _, reports, _ in trials for r in reports for key in r})
        raise MissingColumnError(f"no trial reported {score!r}; reported are: {there}")
    table = from_runs(
        frame,
        params=params,
        design=design,
        default=default,
        context=contexts,
        seed=seed or "trial",
        score=score,
        step=step,
        bins=bins,
        binning=binning,
        min_count=min_count,
    )
    if not failed:
        return table
    note = f"{len(failed)} of {len(trials)} trials failed, first {failed[0]}"
    return replace(table, notes=(note, *table.notes))


def _trials(folder: Path) -> list[tuple[str, dict[str, Any], Reports, bool]]:
    """Name, config, reports and whether it failed, for every trial in an experiment's folder."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}")
    status = _statuses(folder)
    trials = []
    for file in sorted(folder.glob("*/params.json")):
        config = flattened(_json(file), "/")
        name = file.parent.name
        log = file.parent / "result.json"
        # Ray creates the log before the first report.
        reports = read_json_lines(log) if log.exists() else []
        known = [trial for trial in status if f"_{trial}" in name]
        trial = reports[-1].get("trial_id") if reports else next(iter(known), None)
        # A trial that was retried and then ended well has an error file too.
        failed = status.get(str(trial), "ERROR" if _errors(file.parent) else "TERMINATED")
        reports = [flattened(report, "/") for report in reports]
        trials.append((name, config, reports, failed != "TERMINATED"))
    if not trials:
        raise EmptyInputError(f"no trial (a folder with params.json) in {folder}")
    return trials


def _errors(folder: Path) -> bool:
    return (folder / "error.txt").exists()


def _statuses(folder: Path) -> dict[str, str]:
    """Status by trial id, from the newest state file that Ray left, if any."""
    files = sorted(folder.glob("experiment_state-*.json"))
    if not files:
        return {}
    try:
        states = [json.loads(trial[0]) for trial in _json(files[-1])["trial_data"]]
        return {state["trial_id"]: state["status"] for state in states}
    except (KeyError, TypeError, IndexError, json.JSONDecodeError) as error:
        raise SourceFormatError(f"{files[-1]} is not an experiment state: {error!r}") from error


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise SourceFormatError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise SourceFormatError(f"{file}: expected an object, got {type(content).__name__}")
    return content
