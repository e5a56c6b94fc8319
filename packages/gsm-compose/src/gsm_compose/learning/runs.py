"""The results of several runs, sorted by arm and seed, and their learning curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gsm_compose.errors import LearningError
from gsm_compose.learning.experiment import ARMS

Result = Mapping[str, Any]  # as `experiment.train_and_measure` returns it


def by_arm(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Results by arm, in the order of their seeds.

    Raises:
        LearningError: an arm twice with the same seed, or arms with different seeds.
    """
    every: dict[str, list[Result]] = {
        arm: sorted((r for r in results if r["arm"] == arm), key=lambda r: int(r["seed"]))
        for arm in ARMS
    }
    runs = {arm: found for arm, found in every.items() if found}
    seeds = {arm: [r["seed"] for r in found] for arm, found in runs.items()}
    if not runs or any(
        len(set(s)) < len(s) or s != next(iter(seeds.values())) for s in seeds.values()
    ):
        raise LearningError(
            f"results: expected each arm once with each seed, the same ones for all; got {seeds}"
        )
    return runs


def learning_curves(results: Sequence[Result]) -> dict[str, dict[str, Any]]:
    """Figure data: rates along training, by arm.

    Returns:
        By arm: ``step`` (list of checkpoints), ``half`` (the step at which the arms part), and for
        each rate of `experiment.rates` and ``loss`` a list per checkpoint of the values of all
        seeds, in the order of the seeds.

    Raises:
        LearningError: as `by_arm`.
    """
    found: dict[str, dict[str, Any]] = {}
    for arm, runs in by_arm(results).items():
        curves = [run["curve"] for run in runs]
        names = [name for name in curves[0][0] if name != "step"]
        found[arm] = {"step": [point["step"] for point in curves[0]], "half": runs[0]["steps"]}
        found[arm] |= {
            name: [[point[name] for point in points] for points in zip(*curves, strict=True)]
            for name in names
        }
    return found
