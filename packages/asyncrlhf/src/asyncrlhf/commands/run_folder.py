"""What `asyncrlhf train` leaves in a folder; read and written without torch.

=================  ================================================================================
``recipe.yaml``    the recipe with all overrides and defaults; ``asyncrlhf train`` takes it again
``run.json``       what the result depends on; command, commit, machine and versions of packages
``metrics.jsonl``  one line per log
``timing.json``    seconds of every round, staleness, sample sizes; one entry per attempt
``result.json``    when the run is done: what the policy scores, and how far it moved
``checkpoint-…``   of the trainer
``model``          the policy at the end, for ``from_pretrained``
=================  ================================================================================
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from asyncrlhf.errors import InvalidInputError
from asyncrlhf.measured import RoundTimes
from asyncrlhf.report import Report
from asyncrlhf.schedule import RoundSchedule
from asyncrlhf.writing import whole_file

RECIPE: Final = "recipe.yaml"
METRICS: Final = "metrics.jsonl"
TIMING: Final = "timing.json"
RESULT: Final = "result.json"
MODEL: Final = "model"


def write(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    with whole_file(path) as file:
        file.write((json.dumps(value, indent=1) + "\n").encode())


def read(path: Path) -> Any:
    """Read JSON; None where there is no such file.

    Raises:
        InvalidInputError: it is damaged.
    """
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidInputError(f"{path}: expected JSON, got a damaged file ({error})") from error


def attempt_of(report: Report) -> dict[str, Any]:
    """A report as JSON values."""
    schedule = report.schedule
    return {
        "minibatches": schedule.minibatches,
        "epochs": schedule.epochs,
        "ahead": schedule.ahead,
        "scoring": report.scoring,
        "fields": RoundTimes._fields,
        "rounds": [list(times) for times in report.times],
        "staleness": {str(s): n for s, n in sorted(report.staleness.items())},
        "dropped": report.dropped,
        "restarts": report.restarts,
        "regenerated": report.regenerated,
        "sample_sizes": report.sample_sizes,
    }


def report_of(attempt: Mapping[str, Any]) -> Report:
    """The report that :func:`attempt_of` was made of.

    Raises:
        InvalidInputError: it is none.
    """
    try:
        schedule = RoundSchedule(attempt["minibatches"], attempt["epochs"], attempt["ahead"])
        report = Report(schedule, attempt["scoring"])
        report.times = [RoundTimes(*times) for times in attempt["rounds"]]
        report.staleness = Counter({int(s): n for s, n in attempt["staleness"].items()})
        report.dropped, report.restarts = attempt["dropped"], attempt["restarts"]
        report.regenerated = attempt["regenerated"]
        report.sample_sizes = attempt["sample_sizes"]
    except (KeyError, TypeError) as error:
        raise InvalidInputError(f"{TIMING}: written by another version: {error!r}") from error
    return report


def read_curve(folder: Path) -> list[dict[str, Any]]:
    """Logged metrics by step; where a run was resumed, what it logged last for a step.

    Raises:
        InvalidInputError: there is no run in the folder.
    """
    path = folder / METRICS
    if not path.is_file():
        raise InvalidInputError(
            f"folder: expected one that `asyncrlhf train` wrote, but {folder} has no {METRICS}"
        )
    by_step: dict[int, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # the end of a line that was being written when the run was killed
        # Evaluations come beside the log of their step.
        by_step.setdefault(row["step"], {}).update(row)
    return [by_step[step] for step in sorted(by_step)]
