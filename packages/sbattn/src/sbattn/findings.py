"""What the runs say about each claim.

A run is what `sbattn.experiment.run` returns, with `purpose` and `rate`. Each seed gives one number
per claim; intervals are Student's t over seeds, and infinite for one seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from decapod.claims import Evidence
from sbattn.certificates import LOGITS, TOLERANCE
from sbattn.errors import InvalidInputError
from sbattn.evaluation import between

NAMES: Final = {
    "stickbreaking": "stick-breaking",
    "rope": "RoPE",
    "alibi": "ALiBi",
    "nope": "no position",
    "swa": "sliding window",
    "fox": "forgetting",
}
FAR_LENGTH: Final = 512
"""Eight times the training length of the recall task."""

NEAR: Final = (128, 256)
FAR: Final = (1024, 2048)
"""Positions in the context (end excluded) whose losses are compared."""

Runs = list[Mapping[str, Any]]
Floats = np.ndarray[Any, np.dtype[np.float64]]


def by_arm(runs: Sequence[Mapping[str, Any]], purpose: str) -> dict[str, Runs]:
    """Runs of a purpose by arm, in the order of `NAMES` and, within an arm, of seeds and rates.

    Raises:
        InvalidInputError: an arm twice with the same seed and rate.
    """
    found: dict[str, Runs] = {
        arm: sorted(
            (r for r in runs if r["purpose"] == purpose and r["attn"] == arm),
            key=lambda r: (r["seed"], r["rate"]),
        )
        for arm in NAMES
    }
    found = {arm: of for arm, of in found.items() if of}
    seeds = {arm: [(r["seed"], r["rate"]) for r in of] for arm, of in found.items()}
    if any(len(set(s)) < len(s) for s in seeds.values()):
        raise InvalidInputError(
            f"runs: expected each arm once with each seed and rate, got {seeds}"
        )
    return found


def accuracy(run: Mapping[str, Any], length: int) -> float:
    """Share of right answers in sequences of a length."""
    (found,) = (r["accuracy"] for r in run["recall"] if r["length"] == length)
    return float(found)


def best_rate(tuned: Runs) -> float:
    """The learning rate with the lowest loss at the training length, mean over the seeds."""
    losses: dict[float, list[float]] = {}
    for run in tuned:
        losses.setdefault(run["rate"], []).append(run["recall"][0]["loss"])
    return min(losses, key=lambda rate: float(np.mean(losses[rate])))


def rise(run: Mapping[str, Any]) -> float:
    """Loss at positions `FAR` minus loss at positions `NEAR`, in nats per byte."""
    far, near = (between(run["by_position"], run["block"], *where) for where in (FAR, NEAR))
    return far - near


def gradients(errors: dict[str, list[float]]) -> Evidence:
    """Of `saturated_gradients`."""
    right = {form: sum(e <= TOLERANCE for e in found) for form, found in errors.items()}
    count = float(right["exclusive"])
    return Evidence(
        count, count, count, len(LOGITS), "logits", {k: float(v) for k, v in right.items()},
        f"Largest relative error {max(errors['exclusive']):.1e}; subtracting from the sum that "
        f"includes the key itself, {max(errors['inclusive']):.1e}.",
    )  # fmt: skip


def exits(found: list[dict[str, float]]) -> Evidence:
    """Of `exit_errors`, one entry per seed."""
    rows, inside = (int(sum(f[name] for f in found)) for name in ("rows", "inside"))
    share = inside / rows if rows else 0.0
    return Evidence(
        share, share, share, rows, "rows that stopped early",
        detail=f"{inside} inside; the largest error is {max(f['worst'] for f in found):.3f} of its "
        "bound. 8 heads × 1024 positions, tolerances 2^−24 to 1/4, values chosen against the exit.",
    )  # fmt: skip


def extrapolates(recall: dict[str, Runs]) -> Evidence:
    """Accuracy of stick-breaking at `FAR_LENGTH`; the interval is the range over seeds."""
    reached = [accuracy(r, FAR_LENGTH) for r in recall["stickbreaking"]]
    mean = float(np.mean(reached))
    return Evidence(
        mean, min(reached), max(reached), len(reached), "seeds", {"stick-breaking": mean},
        f"Worst of {len(reached)} seeds {min(reached):.4f}; the interval is their range.",
    )  # fmt: skip


def beats_rope(recall: dict[str, Runs]) -> Evidence:
    """Accuracy of stick-breaking minus RoPE at `FAR_LENGTH`, paired by seed."""
    reached = {
        NAMES[arm]: np.array([accuracy(run, FAR_LENGTH) for run in recall[arm]])
        for arm in ("stickbreaking", "rope")
    }
    gain = reached[NAMES["stickbreaking"]] - reached[NAMES["rope"]]
    return _over_seeds(gain, _means(reached), "Paired by seed.")


def changes(text: dict[str, Runs], arm: str) -> Evidence:
    """`rise` of an arm over its seeds."""
    found = {NAMES[arm]: np.array([rise(run) for run in text[arm]])}
    return _over_seeds(
        found[NAMES[arm]],
        _means(found),
        f"Mean loss at positions {FAR[0]}–{FAR[1] - 1} minus {NEAR[0]}–{NEAR[1] - 1} of the "
        "context, on the same held-out bytes.",
    )


def live(runs: Runs) -> dict[str, Evidence]:
    """The two claims about the tiles that trained heads visit."""
    how = "Held-out contexts of 2048 bytes."
    coarse, fine = _visited(runs, "64"), _visited(runs, "8")
    return {
        "live-half": _over_seeds(coarse["trained"], _means(coarse), how),
        "live-grows": _over_seeds(fine["trained"] - fine["untrained"], _means(fine), how),
    }


def _visited(runs: Runs, tile: str) -> dict[str, Floats]:
    """Share of tiles, mean over layers and heads, of every run."""
    return {
        arm: np.array([np.mean(run["live"][tile][when]) for run in runs])
        for arm, when in (("untrained", "before"), ("trained", "after"))
    }


def _means(arms: Mapping[str, Floats]) -> dict[str, float]:
    return {arm: float(values.mean()) for arm, values in arms.items()}


def _over_seeds(values: Floats, arms: dict[str, float], detail: str) -> Evidence:
    from decapod.stats import aggregate

    estimate = aggregate(values, "mean")
    how = (
        f"95 % interval: Student's t over {len(values)} seeds."
        if len(values) > 1
        else "One seed, which nothing bounds."
    )
    return Evidence(
        estimate.value, estimate.low, estimate.high, len(values), "seeds", arms, f"{detail} {how}"
    )
