"""What the runs say about each claim.

Each seed gives one number per claim: arms of a seed start from the same model, train on the same
prompts and are measured on the same ones, so differences are taken within seeds. Intervals are
Student's t over seeds, and infinite for one seed, unless the detail says otherwise. Where a profile
leaves out what a claim needs, its evidence is an infinite interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from asyncrlhf.errors import InvalidInputError
from asyncrlhf.experiments.robustness import GENTLE, LARGE
from decapod.claims import Evidence

if TYPE_CHECKING:
    from decapod.stats import Estimate

NAMES: Final = {
    "online_dpo": "online DPO",
    "proximal_rloo": "Proximal RLOO",
    "rloo": "RLOO",
    "copg": "CoPG",
    "best_of_k": "best-of-K",
    "ppo": "PPO",
    "ipo": "IPO",
    "grpo": "GRPO",
}
FRESH, NEXT, STALE = 1, 2, 64
"""Numbers of minibatches a round that claims compare."""

Run = Mapping[str, Any]
Cells = Mapping[tuple[str, float, int], Sequence[Run]]
Floats = np.ndarray[Any, np.dtype[np.float64]]


def by_cell(runs: Sequence[Run]) -> dict[tuple[str, float, int], list[Run]]:
    """Runs of R1 by loss, rate and N, each in the order of seeds.

    Raises:
        InvalidInputError: a cell twice with one seed, or cells of different seeds.
    """
    found: dict[tuple[str, float, int], list[Run]] = {}
    for run in sorted(runs, key=lambda run: int(run["seed"])):
        found.setdefault((run["loss"], run["rate"], run["minibatches"]), []).append(run)
    seeds = {tuple(run["seed"] for run in of) for of in found.values()}
    if len(seeds) > 1 or any(len(set(of)) < len(of) for of in seeds):
        raise InvalidInputError(
            f"runs: expected the same seeds in every cell, each once, got {sorted(seeds)}"
        )
    return found


def last(runs: Sequence[Run], name: str = "gold") -> Floats:
    """What the last evaluation of each run says."""
    return np.array([run["curve"][-1][name] for run in runs], dtype=np.float64)


def lost(cells: Cells, loss: str, rate: float) -> Floats:
    """Gold at the end with N = 1 minus with N = 64, of every seed."""
    return last(cells[loss, rate, FRESH]) - last(cells[loss, rate, STALE])


def losses_of(cells: Cells) -> list[str]:
    """Losses that were run, in the order of `NAMES`."""
    return [loss for loss in NAMES if any(loss == of for of, _, _ in cells)]


# --- R1 -------------------------------------------------------------------------------------------


def robustness(cells: Cells) -> dict[str, Evidence]:
    """Evidence for all claims about staleness."""
    return {
        "dpo-loses-less": _less(cells, GENTLE, "proximal_rloo"),
        "dpo-loses-less-than-ppo": _less(cells, GENTLE, "ppo"),
        "dpo-loses-less-large-rate": _less(cells, LARGE, "proximal_rloo"),
        "dpo-loses-least": _least(cells, GENTLE),
        "two-is-one": _two_is_one(cells),
        "same-frontier": _frontier(cells, "proximal_rloo", GENTLE),
        "same-frontier-large-rate": _frontier(cells, "online_dpo", LARGE),
    }


def _less(cells: Cells, rate: float, other: str) -> Evidence:
    if other not in losses_of(cells):
        return unknown("seeds", f"This profile has no run of {NAMES[other]}.")
    of = {NAMES[loss]: lost(cells, loss, rate) for loss in ("online_dpo", other)}
    margin = of[NAMES[other]] - of["online DPO"]
    return _over_seeds(margin, _means(of), f"Learning rate {rate:g}; paired by seed.")


def _least(cells: Cells, rate: float) -> Evidence:
    """The margin to the closest other loss; shown only if the margins to all of them are."""
    of = {NAMES[loss]: lost(cells, loss, rate) for loss in losses_of(cells)}
    margins = {
        name: _mean(found - of["online DPO"]) for name, found in of.items() if name != "online DPO"
    }
    closest = min(margins, key=lambda name: margins[name].value)
    return Evidence(
        margins[closest].value,
        min(margin.low for margin in margins.values()),
        min(margin.high for margin in margins.values()),
        margins[closest].n, "seeds", _means(of),
        f"Margin to the closest, {closest}; the interval's ends are the smallest of those of all "
        f"{len(margins)} other losses. Learning rate {rate:g}; paired by seed.",
    )  # fmt: skip


def _two_is_one(cells: Cells) -> Evidence:
    losses = [loss for loss in losses_of(cells) if (loss, GENTLE, NEXT) in cells]
    if not losses:
        return unknown("seeds", f"This profile has no run with N = {NEXT}.")
    fresh, later = (
        np.array([last(cells[loss, GENTLE, n]) for loss in losses]).T for n in (FRESH, NEXT)
    )
    return _over_seeds(
        (later - fresh).mean(axis=1),
        {"N = 1": float(fresh.mean()), "N = 2": float(later.mean())},
        f"Mean over {len(losses)} losses at learning rate {GENTLE:g}; paired by seed.",
    )


def _frontier(cells: Cells, loss: str, rate: float) -> Evidence:
    matched = np.array(
        [
            gold_where_both_were(fresh["curve"], stale["curve"])
            for fresh, stale in zip(cells[loss, rate, FRESH], cells[loss, rate, STALE], strict=True)
        ]
    )
    fresh, stale, at = matched.T
    return _over_seeds(
        stale - fresh,
        {"N = 1": float(fresh.mean()), "N = 64": float(stale.mean())},
        f"At the largest divergence that both reach, on average {at.mean():.2f} nats; "
        "straight lines between evaluations; paired by seed.",
    )


def gold_where_both_were(
    fresh: Sequence[Mapping[str, float]], stale: Sequence[Mapping[str, float]]
) -> tuple[float, float, float]:
    """Gold of either curve where it first reaches the largest divergence of both, and that."""
    from asyncrlhf.evaluate import gold_at_matched_kl

    curves = [[(row["kl"], row["gold"]) for row in curve] for curve in (fresh, stale)]
    shared = min(max(kl for kl, _ in curve) for curve in curves)
    found = [gold_at_matched_kl(curve, shared) for curve in curves]
    assert found[0] is not None
    assert found[1] is not None
    return found[0], found[1], shared


# --- R2 -------------------------------------------------------------------------------------------


def speed(races: Sequence[Run]) -> dict[str, Evidence]:
    """Evidence for all claims about time, and that asynchrony changes when and not what."""
    even = [race for race in races if race["balance"] == "balanced"]
    uneven = [race for race in races if race["balance"] != "balanced"]
    return {
        "async-faster": _ratio(even, "Medians of rounds."),
        "gain-shrinks": _ratio(uneven, "Medians of rounds; mean over both balances.")
        if uneven
        else unknown("seeds", "This profile has no unbalanced run."),
        "prediction-holds": _prediction(races),
        "async-same-gold": _same_gold(even),
        "replay-exact": _exact(races),
    }


def round_seconds(race: Run, arm: str) -> float:
    """Median seconds of a round."""
    return float(race["arms"][arm]["seconds"]["round"])


def gain(race: Run) -> float:
    """How many times as fast asynchronous rounds are as synchronous ones on as many cores."""
    return round_seconds(race, "sync") / round_seconds(race, "async")


def prediction_error(race: Run, arm: str = "async") -> float:
    """Measured round / predicted one - 1."""
    return round_seconds(race, arm) / float(race["arms"][arm]["predicted"]) - 1


def _ratio(races: Sequence[Run], how: str) -> Evidence:
    ratios = _by_seed(races, gain).mean(axis=1)
    mean = float(ratios.mean())
    arms = {
        arm: float(np.mean([1000 * round_seconds(race, arm) for race in races]))
        for arm in ("sync", "async")
    }
    return _over_seeds(ratios, arms, f"{how} {1 - 1 / mean:.1%} less time.")


def _prediction(races: Sequence[Run]) -> Evidence:
    worst = _by_seed(races, lambda race: abs(prediction_error(race))).max(axis=1)
    single = ", ".join(
        f"{name} {np.mean(of):+.1%}" for name, of in _by_balance(races, prediction_error).items()
    )
    return Evidence(
        float(worst.mean()), float(worst.min()), float(worst.max()), len(worst), "seeds", {},
        f"Largest of the balances of each seed; the interval is the range over seeds. Mean errors: "
        f"{single}.",
    )  # fmt: skip


def _same_gold(races: Sequence[Run]) -> Evidence:
    gold = {
        arm: np.array([race["arms"][arm]["last"]["gold"] for race in races])
        for arm in ("sync", "async")
    }
    return _over_seeds(gold["async"] - gold["sync"], _means(gold), "Paired by seed.")


def _exact(races: Sequence[Run]) -> Evidence:
    pairs = (("sync", "sync, one core"), ("async", "replay"))
    equal = [
        race["arms"][one]["weights"] == race["arms"][other]["weights"]
        for race in races
        for one, other in pairs
    ]
    share = sum(equal) / len(equal)
    return Evidence(
        share, share, share, len(equal), "pairs of runs",
        detail="SHA-256 of the final weights: asynchronous processes against one process that "
        "delays the weights by a round, and synchronous ones on two cores against one core.",
    )  # fmt: skip


def _by_seed(races: Sequence[Run], value: Callable[[Run], float]) -> Floats:
    """[seeds, balances]."""
    columns = _by_balance(races, value)
    return np.array(list(columns.values())).T


def _by_balance(races: Sequence[Run], value: Callable[[Run], float]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for race in sorted(races, key=lambda race: int(race["seed"])):
        found.setdefault(race["balance"], []).append(value(race))
    return found


# --- R3 -------------------------------------------------------------------------------------------


def knobs(epochs: Sequence[Run], samples: Sequence[Run]) -> dict[str, Evidence]:
    """Evidence for the claims about T, in the generation-bound runs, and K, in the others."""
    once, twice = (_arm(epochs, "epochs", turns) for turns in (1, 2))
    gold = {"T = 1": last(once), "T = 2": last(twice)}
    drift = {"T = 1": last(once, "kl"), "T = 2": last(twice, "kl")}
    longer = _means({"": last(twice, "clock") / last(once, "clock") - 1})[""]
    rounds = f"After the same rounds, by the prediction {longer:+.1%} of time; paired by seed."
    two, four = (_arm(samples, "samples", k) for k in (2, 4))
    pairs = [
        gold_at_same_time(one["curve"], other["curve"])
        for one, other in zip(two, four, strict=True)
    ]
    at = {
        name: np.array(of)
        for name, of in zip(("K = 2", "K = 4"), zip(*pairs, strict=True), strict=True)
    }
    return {
        "epochs-gold": _over_seeds(gold["T = 2"] - gold["T = 1"], _means(gold), rounds),
        "epochs-drift": _over_seeds(drift["T = 2"] - drift["T = 1"], _means(drift), rounds),
        "samples-gold": _over_seeds(
            at["K = 4"] - at["K = 2"], _means(at),
            "At the end of the run that takes less time; straight lines between evaluations; "
            "paired by seed.",
        ),
    }  # fmt: skip


def _arm(runs: Sequence[Run], knob: str, position: int) -> list[Run]:
    return sorted((run for run in runs if run[knob] == position), key=lambda run: int(run["seed"]))


def gold_at_same_time(
    one: Sequence[Mapping[str, float]], other: Sequence[Mapping[str, float]]
) -> tuple[float, float]:
    """Gold of either curve at the predicted time at which the first of them ends."""
    end = min(one[-1]["clock"], other[-1]["clock"])
    return _gold_at(one, end), _gold_at(other, end)


def _gold_at(curve: Sequence[Mapping[str, float]], clock: float) -> float:
    for before, after in pairwise(curve):
        if before["clock"] <= clock <= after["clock"]:
            share = (clock - before["clock"]) / (after["clock"] - before["clock"])
            return before["gold"] + share * (after["gold"] - before["gold"])
    raise InvalidInputError(f"curve: expected it to reach {clock:g} s, got {curve[-1]['clock']:g}")


# --- all of them ----------------------------------------------------------------------------------


def unknown(unit: str, why: str) -> Evidence:
    """Evidence that decides nothing."""
    return Evidence(0.0, -math.inf, math.inf, 0, unit, detail=why)


def _means(arms: Mapping[str, Floats]) -> dict[str, float]:
    return {arm: float(values.mean()) for arm, values in arms.items()}


def _mean(values: Floats) -> Estimate:
    from decapod.stats import aggregate

    return aggregate(values, "mean")


def _over_seeds(values: Floats, arms: dict[str, float], detail: str) -> Evidence:
    estimate = _mean(values)
    how = (
        f"95 % interval: Student's t over {len(values)} seeds."
        if len(values) > 1
        else "One seed, which nothing bounds."
    )
    return Evidence(
        estimate.value, estimate.low, estimate.high, len(values), "seeds", arms, f"{detail} {how}"
    )
