"""What the learning bench and the value bench found, by method and by predictor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from vineppo.errors import InvalidInputError, one_of
from vineppo.experiments.drawing import Floats
from vineppo.experiments.learning import METHODS

Run = Mapping[str, Any]
"""What :func:`vineppo.experiments.learning.learn` returns."""
Groups = dict[str, list[Run]]
"""Runs by method, in the order of ``METHODS``."""
Report = Mapping[str, Any]
"""A ``ValueReport`` as JSON."""
Judged = dict[str, dict[str, list[Report]]]
"""Reports, one for each seed, by the method whose last policy it was and by predictor."""

BASELINES: Final = ("critic", "group mean")
"""Predictors that stand first; all others are rollouts."""


def by_method(runs: Sequence[Run]) -> Groups:
    """Runs by method.

    Raises:
        InvalidInputError: no runs, an unknown method, or runs of a method that do not fit together.
    """
    if not runs:
        raise InvalidInputError("runs: expected at least one run, got none")
    for run in runs:
        one_of("method", run["method"], METHODS)
    of = {name: [run for run in runs if run["method"] == name] for name in METHODS}
    of = {name: found for name, found in of.items() if found}
    for name, found in of.items():
        rates = sorted({run["rate"] for run in found})
        if len(rates) > 1:
            raise InvalidInputError(
                f"runs: expected one learning rate for {name}, got {rates}; leave the others out"
            )
        seeds = [run["seed"] for run in found]
        if len(set(seeds)) < len(seeds):
            raise InvalidInputError(f"runs: expected different seeds for {name}, got {seeds}")
        measured = [[row["iteration"] for row in run["curve"]] for run in found]
        if any(iterations != measured[0] for iterations in measured):
            raise InvalidInputError(
                f"runs: expected measurements of {name} after the same iterations for all seeds, "
                f"got {measured}; run them with one setting"
            )
    return of


def judged_values(of: Groups) -> Judged:
    """What the value bench reports; runs without it are passed over."""
    found: Judged = {}
    for method, runs in of.items():
        for run in runs:
            for predictor, report in (run.get("values") or {}).items():
                found.setdefault(method, {}).setdefault(predictor, []).append(report)
    # Sorting is stable, so that rollouts stay in the order of their K.
    return {
        method: dict(sorted(by.items(), key=lambda item: _rank(item[0])))
        for method, by in found.items()
    }


def _rank(predictor: str) -> int:
    return BASELINES.index(predictor) if predictor in BASELINES else len(BASELINES)


def curves(runs: Sequence[Run], name: str) -> Floats:
    """What was measured along training; [seeds, measurements]."""
    return np.array([[row[name] for row in run["curve"]] for run in runs], dtype=np.float64)


def ends(runs: Sequence[Run], name: str) -> Floats:
    """What was measured after training; [seeds]."""
    return np.array([run["end"][name] for run in runs], dtype=np.float64)


def starts(of: Groups) -> Floats:
    """Accuracy of each seed before training, which all methods share."""
    by_seed = {run["seed"]: run["curve"][0]["accuracy"] for runs in of.values() for run in runs}
    return np.array(list(by_seed.values()), dtype=np.float64)


def train_and_test(runs: Sequence[Run]) -> tuple[Floats, Floats]:
    """Training and test accuracy of about one policy; [seeds, pairs] each.

    What iteration n trains on was sampled by the policy that n - 1 left behind. Its test accuracy
    is taken where it was measured; else that of the policy after n stands for it, which is one of
    many small steps further.
    """
    measured = {row["iteration"]: i for i, row in enumerate(runs[0]["curve"])}
    pairs = [
        (i, measured.get(row["iteration"] - 1, i))
        for i, row in enumerate(runs[0]["curve"])
        if row["iteration"] > 1 and all("train" in run["curve"][i] for run in runs)
    ]
    train = [[run["curve"][i]["train"] for i, _ in pairs] for run in runs]
    test = [[run["curve"][i]["accuracy"] for _, i in pairs] for run in runs]
    return np.array(train, dtype=np.float64), np.array(test, dtype=np.float64)


def scores(reports: Sequence[Report], name: str) -> Floats:
    """A number of each report that has it: reports hold None where nothing could be averaged."""
    found = [report[name] for report in reports]
    found = [x["value"] if isinstance(x, dict) else x for x in found]
    return np.array([x for x in found if x is not None], dtype=np.float64)


def mean(values: Floats) -> float:
    """NaN of nothing."""
    return float(values.mean()) if len(values) else math.nan


def level(by: Mapping[str, Sequence[Report]], score: str) -> float:
    """What a score is worth by itself; the same for all predictors, which see the same states."""
    reports = next(iter(by.values()))
    if score == "pairwise":
        return 0.5
    return mean(scores(reports, {"mae": "mae_floor", "top1": "chance"}[score]))


def errors_by_position(reports: Sequence[Report]) -> dict[float, Floats]:
    """Errors of the seeds by the middle of their bin; a seed without states in it has none."""
    found: dict[float, list[float]] = {}
    for report in reports:
        for one in report["by_position"]:
            if one["error"]["value"] is not None:
                middle = round((one["low"] + one["high"]) / 2, 6)
                found.setdefault(middle, []).append(one["error"]["value"])
    return {middle: np.array(found[middle], dtype=np.float64) for middle in sorted(found)}


def truth_rollouts(judged: Judged) -> str:
    """How many are behind the truth of a state."""
    return f"{next(iter(next(iter(judged.values())).values()))[0]['rollouts']:.0f}"


def said(value: float, digits: int = 3) -> str:
    """A number in words; what nothing is known of is NaN."""
    return "unknown" if math.isnan(value) else f"{value:.{digits}f}"
