"""Hydra multirun folders."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import pandas as pd

from hpreliability.errors import (
    EmptyInputError,
    MissingColumnError,
    MissingExtraError,
    SourceFormatError,
)
from hpreliability.readers.designs import Binning, Design, entries, flattened, from_runs
from hpreliability.readers.files import read_frame
from hpreliability.table import Table


def from_hydra(
    directory: str | PathLike[str],
    *,
    score: str,
    metrics: str = "metrics.json",
    params: Sequence[str] | None = None,
    context: Sequence[str] = ("env",),
    seed: str | None = "seed",
    design: Design = "grid",
    default: Mapping[str, object] | None = None,
    step: str | None = None,
    bins: int = 4,
    binning: Binning = "quantile",
    min_count: int = 3,
) -> Table:
    """A table from the jobs of one or several `--multirun` sweeps.

    Args:
        directory: a folder at or above the sweep's; every folder below it with
            `.hydra/overrides.yaml` is a job.
        score: the metric's name in the metrics file.
        metrics: the file that each job wrote into its folder: one JSON object (`.json`), or CSV or
            JSON lines, of which the last row counts, or every row with `step`.
        params: the hyper-parameters, by config key (`optim.lr`); default: every key that some job
            overrides, other than contexts and seed.
        context: config keys that are contexts.
        seed: config key of the seed; None: each job is a run of its own.
        design, default, bins, binning, min_count: see `from_runs`.
        step: column of the metrics file, for learning curves.

    Values are those of the resolved `.hydra/config.yaml`, so a job that does not override a key has
    its default. A job without the metrics file is a failed run, with a note.

    Raises:
        EmptyInputError: no job, or no key was overridden.
        MissingColumnError: no job wrote the score; a config lacks a name.
        SourceFormatError: a file that cannot be read.
        MissingExtraError: PyYAML is not installed.
        HPReliabilityError: as `from_runs`.
    """
    try:
        import yaml
    except ImportError as error:
        raise MissingExtraError("PyYAML", "hydra") from error
    folder = Path(directory)
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}")
    jobs = sorted(file.parent.parent for file in folder.rglob(".hydra/overrides.yaml"))
    if not jobs:
        raise EmptyInputError(f"no Hydra job (a folder with .hydra/overrides.yaml) in {folder}")
    contexts = (context,) if isinstance(context, str) else tuple(context)
    fixed = {*contexts, *([seed] if seed else [])}
    configs, overridden = {}, []
    for job in jobs:
        try:
            config = yaml.safe_load((job / ".hydra/config.yaml").read_text(encoding="utf-8"))
            overrides = yaml.safe_load((job / ".hydra/overrides.yaml").read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise SourceFormatError(f"{job}/.hydra cannot be read: {error}") from error
        configs[job] = flattened(config or {})
        overridden += [str(entry).lstrip("+~").partition("=")[0] for entry in overrides or []]
    names = tuple(params or (key for key in dict.fromkeys(overridden) if key not in fixed))
    if not names:
        raise EmptyInputError(f"no job in {folder} overrides a key besides {sorted(fixed)}")
    rows, failed = [], []
    for job, config in configs.items():
        labels = entries(config, (*names, *fixed), str(job)) | {"job": str(job)}
        points = _points(job / metrics, score, step)
        if not points:
            failed.append(str(job))
            points = [{score: float("nan")} | ({step: 0} if step else {})]
        rows += [labels | point for point in points]
    if len(failed) == len(jobs):
        raise MissingColumnError(f"none of {len(jobs)} jobs in {folder} wrote {metrics}")
    # dtype=object: integers and floats of a mixed column keep their spelling.
    table = from_runs(
        pd.DataFrame(rows, dtype=object),
        params=names,
        design=design,
        default=default,
        context=contexts,
        seed=seed or "job",
        score=score,
        step=step,
        bins=bins,
        binning=binning,
        min_count=min_count,
    )
    if not failed:
        return table
    note = f"{len(failed)} of {len(jobs)} jobs wrote no {metrics} and count as failed: {failed[0]}"
    return replace(table, notes=(note, *table.notes))


def _points(file: Path, score: str, step: str | None) -> list[dict[str, Any]]:
    """Score, and step, of every wanted row of a metrics file; none if it is not there."""
    if not file.exists():
        return []
    if file.suffix == ".json":
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise SourceFormatError(f"{file} is not JSON: {error}") from error
        rows = [content]
    else:
        rows = read_frame(file).to_dict("records")
    wanted = (score, *([step] if step else []))
    for row in rows:
        if not isinstance(row, dict) or any(key not in row for key in wanted):
            raise MissingColumnError(f"{file} lacks one of {list(wanted)}: {str(row)[:80]}")
    rows = rows if step else rows[-1:]
    return [{key: row[key] for key in wanted} for row in rows]
