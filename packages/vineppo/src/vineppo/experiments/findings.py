"""Evidence for each claim out of the results of the jobs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from vineppo.experiments.exact import ratios

if TYPE_CHECKING:
    from decapod.claims import Evidence

Floats = npt.NDArray[np.float64]
Run = Mapping[str, Any]

UNBIASED: Final = (
    "vine_token_1", "vine_token_3", "vine_token_9", "vine_step_1", "vine_step_3", "vine_step_9",
    "vine_after_9",
)  # fmt: skip
TOP: Final = "VinePPO K=9"


# --- exact bench ----------------------------------------------------------------------------------


def exact(cells: Sequence[Run]) -> dict[str, Evidence]:
    """Evidence of the claims on token trees."""
    from decapod.claims import Evidence

    def bias(*arms: str) -> Floats:
        return np.array([cell["arms"][arm]["bias"] for arm in arms for cell in cells])

    trees = len(cells)
    largest = float(bias(*UNBIASED).max())
    least = {
        "critic-biased": ("ppo_0", "PPO, λ = 0"),
        "newline-starts-biased": ("vine_before_9", "VinePPO, K = 9, mark starts a step"),
    }
    found = {
        "vine-unbiased": Evidence(
            largest, largest, largest, trees, "trees",
            {"VinePPO": largest},
            "Largest over trees, segmentations and K; sums over all outcomes, no sampling.",
        )
    }  # fmt: skip
    for claim, (arm, name) in least.items():
        value = float(bias(arm).min())
        found[claim] = Evidence(
            value, value, value, trees, "trees", {name: value},
            "Smallest over trees; sums over all outcomes, no sampling.",
        )  # fmt: skip
    for claim, budget in (("vine-variance", "responses"), ("vine-variance-tokens", "tokens")):
        logs = np.log(ratios(cells, "vine_step_9", "rloo", budget))  # type: ignore[arg-type]
        found[claim] = _over(
            logs, {}, "trees", "Mean over trees of the logarithm of the ratio; exact on each tree."
        )
    return found


# --- learning bench -------------------------------------------------------------------------------


def of_method(runs: Sequence[Run], method: str) -> list[Run]:
    """Runs of a method by seed."""
    return sorted((r for r in runs if r["method"] == method), key=lambda r: int(r["seed"]))


def along(run: Run) -> float:
    """Mean test accuracy over a run, as its measurements are equally spaced in gradient steps.

    The first one, before training, is the same for all methods and is left out.
    """
    return float(np.mean([row["accuracy"] for row in run["curve"][1:]]))


def accuracy_at(run: Run, axis: str, limit: float) -> float:
    """Test accuracy at a number of tokens or seconds, on straight lines between measurements."""
    curve = run["curve"]
    if limit > curve[-1][axis]:
        raise ValueError(f"limit: expected at most {curve[-1][axis]:g} {axis}, got {limit:g}")
    return float(np.interp(limit, [row[axis] for row in curve], [row["accuracy"] for row in curve]))


def learning(runs: Sequence[Run]) -> dict[str, Evidence]:
    """Evidence of the claims on the learning bench."""
    found = {
        f"vine-{name}": _between(runs, TOP, other, along, "Mean test accuracy along the run.")
        for name, other in (("ppo", "PPO"), ("rloo", "RLOO"), ("grpo", "GRPO"))
    }
    for claim, more, fewer in (
        ("k3-k1", "VinePPO K=3", "VinePPO K=1"),
        ("k9-k3", TOP, "VinePPO K=3"),
        ("k9-k1", TOP, "VinePPO K=1"),
    ):
        found[claim] = _between(runs, more, fewer, along, "Mean test accuracy along the run.")
    for claim, axis, other in (
        ("vine-tokens", "tokens", "RLOO"),
        ("vine-seconds", "seconds", "PPO"),
    ):
        found[claim] = _at_equal(runs, axis, TOP, other)
    return found


def _between(runs: Sequence[Run], one: str, other: str, measure: Any, detail: str) -> Evidence:
    arms = {
        name: np.array([measure(run) for run in of_method(runs, name)]) for name in (one, other)
    }
    return _over(
        arms[one] - arms[other], {name: float(x.mean()) for name, x in arms.items()}, "seeds",
        f"{detail} Paired by seed.",
    )  # fmt: skip


def _at_equal(runs: Sequence[Run], axis: str, one: str, other: str) -> Evidence:
    """Accuracy where the cheaper of two runs ends."""
    pairs = []
    for a, b in zip(of_method(runs, one), of_method(runs, other), strict=True):
        limit = min(a["curve"][-1][axis], b["curve"][-1][axis])
        pairs.append((accuracy_at(a, axis, limit), accuracy_at(b, axis, limit)))
    values = np.array(pairs)
    return _over(
        values[:, 0] - values[:, 1],
        {one: float(values[:, 0].mean()), other: float(values[:, 1].mean())}, "seeds",
        "At the end of the run that ends first; straight lines between measurements; paired by "
        "seed.",
    )  # fmt: skip


# --- value bench ----------------------------------------------------------------------------------


def values(runs: Sequence[Run]) -> dict[str, Evidence]:
    """Evidence of the claims on values of PPO's last policy, judged on the same states."""
    reports = [run["values"] for run in of_method(runs, "PPO") if "values" in run]
    found = {}
    for claim, measure, detail in (
        ("values-error", "mae", "Mean absolute error."),
        ("values-top1", "top1", "Share of states whose best next step is named."),
    ):
        arms = {
            name: np.array([report[name][measure]["value"] for report in reports])
            for name in ("rollouts, K=9", "critic")
        }
        found[claim] = _over(
            arms["rollouts, K=9"] - arms["critic"],
            {name: float(x.mean()) for name, x in arms.items()}, "seeds",
            f"{detail} Truth: 256 rollouts of their own; paired by seed.",
        )  # fmt: skip
    return found


# --- intervals ------------------------------------------------------------------------------------


def _over(differences: Floats, arms: dict[str, float], unit: str, detail: str) -> Evidence:
    from decapod.claims import Evidence
    from decapod.stats import aggregate

    estimate = aggregate(differences, "mean")
    number = len(differences)
    how = (
        f"95 % interval: Student's t over {number} {unit}."
        if number > 1 and math.isfinite(estimate.low)
        else f"One of {unit}, which nothing bounds."
    )
    return Evidence(
        estimate.value, estimate.low, estimate.high, number, unit, arms, f"{detail} {how}"
    )
