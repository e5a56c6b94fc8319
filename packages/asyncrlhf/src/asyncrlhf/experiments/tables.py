"""The numbers behind the figures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from asyncrlhf.experiments.findings import (
    FRESH,
    NAMES,
    STALE,
    Cells,
    Floats,
    Run,
    last,
    losses_of,
    lost,
    round_seconds,
)
from asyncrlhf.experiments.robustness import RATES
from asyncrlhf.experiments.speed import ARMS, BALANCES
from decapod.claims import Cell, DataTable


def tables(
    cells: Cells, races: Sequence[Run], epochs: Sequence[Run], samples: Sequence[Run]
) -> list[DataTable]:
    """All tables; arguments: runs of R1 by cell, of R2, and of both knobs of R3."""
    return [_lost(cells), _cells(cells), _rounds(races), _knobs(epochs, samples)]


def _lost(cells: Cells) -> DataTable:
    return DataTable(
        f"Gold lost from N = {FRESH} to N = {STALE}",
        ["Loss", "Seeds", *(f"Learning rate {rate:g}" for rate in RATES)],
        [
            [
                NAMES[loss],
                len(cells[loss, RATES[0], FRESH]),
                *(interval(lost(cells, loss, rate)) for rate in RATES),
            ]
            for loss in losses_of(cells)
        ],
        "Means with 95 % intervals over seeds, paired by seed. What is lost less is more robust.",
    )


def _cells(cells: Cells) -> DataTable:
    rows: list[list[Cell]] = []
    for rate in RATES:
        for loss in losses_of(cells):
            for n in sorted({n for of, at, n in cells if (of, at) == (loss, rate)}):
                runs = cells[loss, rate, n]
                rows.append(
                    [
                        rate,
                        NAMES[loss],
                        n,
                        round(float(np.mean([run["staleness"] for run in runs])), 2),
                        interval(last(runs)),
                        round(float(last(runs, "kl").mean()), 2),
                        round(float(last(runs, "ppl").mean()), 2),
                    ]
                )
    start = np.array([run["curve"][0]["gold"] for run in next(iter(cells.values()))])
    updates = int(next(iter(cells.values()))[0]["curve"][-1]["step"])
    return DataTable(
        "Robustness: all cells",
        ["Learning rate", "Loss", "N", "Mean staleness", "Gold", "KL, nats", "Perplexity"],
        rows,
        f"After {updates} updates; gold with 95 % intervals over seeds. The fine-tuned models that "
        f"all start from have {interval(start)}. Perplexity is that of the answers under the "
        "fine-tuned model.",
    )


def _rounds(races: Sequence[Run]) -> DataTable:
    rows: list[list[Cell]] = []
    for balance in BALANCES:
        of = [race for race in races if race["balance"] == balance]
        for arm in ARMS if of else ():
            seconds = {
                name: 1000 * float(np.mean([race["arms"][arm]["seconds"][name] for race in of]))
                for name in ("g", "r", "t", "w")
            }
            took = np.array([1000 * round_seconds(race, arm) for race in of])
            found = {
                name: float(np.mean([race["arms"][arm][name] for race in of]))
                for name in ("predicted", "foreseen", "actor_idle", "learner_idle")
            }
            ratio = float(
                np.mean([round_seconds(race, "sync") / round_seconds(race, arm) for race in of])
            )
            rows.append(
                [
                    balance,
                    arm,
                    *(round(seconds[name], 1) for name in ("g", "r", "t", "w")),
                    interval(took, 1),
                    round(1000 * found["predicted"], 1),
                    round(1000 * found["foreseen"], 1),
                    round(ratio, 2),
                    f"{1 - 1 / ratio:.0%}",
                    f"{found['actor_idle']:.0%}",
                    f"{found['learner_idle']:.0%}",
                ]
            )
    return DataTable(
        "Speed: milliseconds a round",
        [
            "Balance", "Arm", "g", "r", "t", "w", "Round", "Predicted", "From its own stages",
            "Times sync", "Less time", "Actor idle", "Learner idle",
        ],
        rows,
        "Medians of a run, means over seeds. Predicted: from the stages of the synchronous run on "
        "two cores, before this one. Idle: of the whole run, its start included.",
    )  # fmt: skip


def _knobs(epochs: Sequence[Run], samples: Sequence[Run]) -> DataTable:
    rows: list[list[Cell]] = []
    for case, runs in (("generation-bound", epochs), ("training-bound", samples)):
        for turns, k in sorted({(run["epochs"], run["samples"]) for run in runs}):
            of = [run for run in runs if (run["epochs"], run["samples"]) == (turns, k)]
            seconds = {
                name: 1000 * float(np.mean([run["seconds"][name] for run in of]))
                for name in ("g", "r", "t", "w")
            }
            rows.append(
                [
                    case,
                    turns,
                    k,
                    *(round(seconds[name], 1) for name in ("g", "r", "t", "w")),
                    round(float(last(of, "clock").mean()), 2),
                    interval(last(of)),
                    interval(last(of, "kl"), 2),
                ]
            )
    return DataTable(
        "Knobs: gold and divergence at the end",
        ["Case", "T", "K", "g", "r", "t", "w", "Seconds, predicted", "Gold", "KL, nats"],
        rows,
        "g, r, t, w in milliseconds a round, medians of a run; means over seeds, with 95 % "
        f"intervals. All runs have the same {runs[0]['rounds']} rounds.",
    )


def interval(values: Floats, digits: int = 3) -> str:
    """Mean with its interval, in words of a table."""
    from decapod.stats import aggregate

    found = aggregate(values, "mean")
    text = f"{found.value:.{digits}f}"
    if found.n > 1:
        text += f" [{found.low:.{digits}f}, {found.high:.{digits}f}]"
    return text.replace("-", "\N{MINUS SIGN}")
