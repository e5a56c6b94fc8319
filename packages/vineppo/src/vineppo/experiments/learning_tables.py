"""Tables of the learning bench and of the value bench on its last policies."""

from __future__ import annotations

import math
from collections.abc import Sequence

from decapod.claims import Cell, DataTable
from vineppo.experiments.drawing import Floats
from vineppo.experiments.learning_findings import (
    Groups,
    Judged,
    Run,
    by_method,
    curves,
    ends,
    judged_values,
    level,
    mean,
    said,
    scores,
    truth_rollouts,
)


def tables(runs: Sequence[Run]) -> list[DataTable]:
    """All tables that the runs have something for.

    Args:
        runs: as of :func:`vineppo.experiments.learning_exhibits.figures`.

    Raises:
        InvalidInputError: no runs, an unknown method, or runs of a method that do not fit together.
    """
    of = by_method(runs)
    judged = judged_values(of)
    return [_summary(of), *([_value_table(judged)] if judged else [])]


def _summary(of: Groups) -> DataTable:
    rows: list[list[Cell]] = [
        [
            method,
            runs[0]["rate"],
            len(runs),
            round(float(curves(runs, "accuracy")[:, 0].mean()), 3),
            _interval(ends(runs, "greedy")),
            round(float(ends(runs, "sampled").mean()), 3),
            round(float(ends(runs, "divergence").mean()), 3),
            round(float(curves(runs, "steps")[:, -1].mean())),
            round(float(curves(runs, "tokens")[:, -1].mean()) / 1000),
            round(float(curves(runs, "seconds")[:, -1].mean())),
        ]
        for method, runs in of.items()
    ]
    return DataTable(
        "Learning: where training ends",
        [
            "Method", "Rate", "Seeds", "Start", "Greedy", "Sampled", "Divergence",
            "Steps", "Tokens, k", "Seconds",
        ],
        rows,
        "Means over seeds, with 95 % intervals where there are several. Rate: of learning. "
        "Accuracy on test prompts: before training and after it, of greedy and of sampled answers. "
        "Divergence from the start in nats per answer. Steps: of the gradient. Tokens: thousands "
        "generated in training, rollouts from intermediate states included. Seconds: of the "
        "trainer's processor.",
    )  # fmt: skip


def _value_table(judged: Judged) -> DataTable:
    rows: list[list[Cell]] = [
        [
            policy,
            predictor,
            len(reports),
            *(_cell(mean(scores(reports, name)))
              for name in ("mae", "within", "top1", "chance", "pairwise")),
        ]
        for policy, by in judged.items()
        for predictor, reports in by.items()
    ]  # fmt: skip
    first = next(iter(next(iter(judged.values())).values()))[0]
    floors = ", ".join(
        f"{said(level(by, 'mae'))} on that of {policy}" for policy, by in judged.items()
    )
    return DataTable(
        "Values of intermediate states",
        [
            "Policy", "Predictor", "Seeds", "Mean absolute error",
            f"Within {first['tolerance']:g}", "Top-1", "Chance", "Pairs in order",
        ],
        rows,
        "Means over seeds, on states of the last policy. The truth is the mean of "
        f"{truth_rollouts(judged)} rollouts of its own; by its noise alone exact values would have "
        f"an error of {floors}. Top-1: of up to five next steps. Chance: top-1 of a random pick. "
        "Pairs: equal predictions count one half.",
    )  # fmt: skip


def _interval(shares: Floats) -> str:
    """Mean and interval over seeds; what shares cannot be is cut off."""
    from decapod.stats import aggregate

    found = aggregate(shares, "mean")
    if found.n == 1:
        return f"{found.value:.3f}"
    return f"{found.value:.3f} [{max(found.low, 0):.3f}, {min(found.high, 1):.3f}]"


def _cell(value: float, digits: int = 3) -> Cell:
    return None if math.isnan(value) else round(value, digits)
