"""`asyncrlhf sweep`: every combination of some values of a recipe, resumed where it stopped."""

from __future__ import annotations

import csv
import io
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from asyncrlhf.commands.recipe import Recipe, override
from asyncrlhf.errors import InvalidInputError
from asyncrlhf.writing import whole_file

RESULTS: Final = "results.csv"
_JOBS: Final = "jobs"


@dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    Attributes:
        values: text by key.
        recipe: with these values, in a folder of its own.
    """

    values: Mapping[str, str]
    recipe: Recipe

    @property
    def label(self) -> str:
        """For people."""
        return ", ".join(f"{name}={value}" for name, value in self.values.items())


def axes(over: Sequence[str]) -> dict[str, list[str]]:
    """Keys with their values, from words such as ``loss=online_dpo,ppo``.

    Raises:
        InvalidInputError: a word without values, or a key or value that comes twice.
    """
    found: dict[str, list[str]] = {}
    for word in over:
        name, sign, listed = word.partition("=")
        values = listed.split(",")
        if not (name and sign and all(values)):
            raise InvalidInputError(f"over: expected key=value,value, got {word!r}")
        if name in found or len(set(values)) < len(values):
            raise InvalidInputError(f"over: {word!r} names a key or a value twice")
        found[name] = values
    if not found:
        raise InvalidInputError("over: expected at least one key=value,value, got none")
    return found


def cells(content: Mapping[str, Any], grid: Mapping[str, Sequence[str]], out: Path) -> list[Cell]:
    """All combinations, every one of them checked.

    Args:
        content: of the recipe, expanded.
        grid: see :func:`axes`.
        out: folder of all runs.

    Raises:
        InvalidInputError: a combination does not fit; with its values.
    """
    found = []
    for combination in itertools.product(*grid.values()):
        values = dict(zip(grid, combination, strict=True))
        changed = dict(content)
        try:
            for name, text in values.items():
                changed = override(changed, name, text)
            recipe = Recipe.of(changed).in_folder(out / _folder_name(values))
            recipe.settings(on_cpu=True)
            recipe.check_parts()
        except InvalidInputError as error:
            told = ", ".join(f"{name}={value}" for name, value in values.items())
            raise InvalidInputError(f"{error} (in {told})") from error
        found.append(Cell(values, recipe))
    return found


def run_cell(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """One run of a sweep, in a process of its own: goes on where it stopped."""
    from asyncrlhf.commands.running import train

    found = train(Recipe.of(recipe), resume=True)
    plain = {name: value for name, value in found.items() if name not in ("policy", "reference")}
    return {**plain, **found.get("policy", {})}


def sweep(
    wanted: Sequence[Cell], out: Path, *, jobs: int
) -> tuple[list[dict[str, Any]], list[str]]:
    """Run what is missing, and write all results into one table.

    Args:
        wanted: of :func:`cells`.
        out: folder of all runs.
        jobs: how many run at the same time; each has an actor beside it.

    Returns:
        A row per run that is done, with its values and its numbers; and what failed, one line each.

    Raises:
        KeyboardInterrupt: what is done is kept.
    """
    from decapod.jobs import Job, run_jobs

    listed = [Job(run_cell, {"recipe": cell.recipe.content()}, cell.label) for cell in wanted]
    report = run_jobs(listed, out / _JOBS, n_jobs=jobs, title="sweep")
    values = {job.key: cell.values for job, cell in zip(listed, wanted, strict=True)}
    rows = []
    for result in report.results:
        assert isinstance(result.value, dict)
        rows.append({**values[result.key], **result.value})
    if rows:
        _write_table(rows, out / RESULTS)
    failed = [
        f"{result.label}: {((result.error or '').strip().splitlines() or ['no reason given'])[-1]}"
        for result in report.failures
    ]
    return rows, failed


def _folder_name(values: Mapping[str, str]) -> str:
    name = "__".join(f"{key}-{value}" for key, value in values.items())
    return re.sub(r"[^A-Za-z0-9._-]", "_", name)


def _write_table(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with whole_file(path) as file:
        file.write(text.getvalue().encode())
