"""The figures and tables that stand beside the verdicts in the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from decapod.claims import DataTable, Figure
from hpreliability import published
from hpreliability.advice import tune_first
from hpreliability.scoring import THCTable
from hpreliability.table import Table


def figures(public: Table, scored: THCTable, by_axis: pd.DataFrame, own: Table) -> list[Figure]:
    """Figures of the public scores, their THC, both axes, and our own sweep."""
    from hpreliability import plot
    from hpreliability.report import themed_figure
    from hpreliability.transfer import transfer

    names = published.DISPLAY_NAMES | published.AGENT_NAMES
    heatmaps = [
        themed_figure(
            plot.rank_heatmap(
                scored,
                {"agent": agent, "hyperparameter": "gammas"},
                title=f"Discount factor, {names[agent]}",
            ),
            title=f"Ranks of the discount factor by game, {names[agent]}",
            caption="1 is best; values whose intervals overlap share a rank. Left: games that want "
            "a small discount factor; right: games that want a large one.",
            alt="In some games the two small discount factors rank first and the large ones last, "
            "in others it is the other way round.",
        )
        for agent in ("DER", "DrQ_eps")
    ]
    return [
        themed_figure(
            plot.thc_bars(scored, names=names),
            title="THC of every hyper-parameter over 26 games, beside chance",
            caption="Dots: THC, filled where p ≤ .05. Lines: 95 % interval of the expected THC. "
            "Bars: 5th to 95th percentile of the permutation null. Sorted by calibrated THC.",
            alt="Discount factor and update horizon lie far above their null bands for both "
            "agents; target update period and minimum replay history lie inside.",
        ),
        *heatmaps,
        themed_figure(
            plot.dumbbells(by_axis, label="calibrated THC (0: chance)"),
            title="Between games and between agents",
            caption="Calibrated THC of every hyper-parameter that both agents have. Between games: "
            "mean of the two agents. Between agents: games pooled.",
            alt="One row per hyper-parameter with two dots; the table has the numbers.",
        ),
        themed_figure(
            plot.regret(transfer(public, "agent"), names=names),
            title="What it costs to take a setting to the other agent",
            caption="Regret in the overall inter-quartile mean, as a share of the range between "
            "the best and the worst value. 0: the best value of one agent is best for the other.",
            alt="For about half of the hyper-parameters the best value carries over without loss.",
        ),
        themed_figure(
            plot.response(own, "learning_rate"),
            title="Own sweep: DQN's learning rate by task and budget",
            caption="Mean return over seeds, with single runs as dots; budgets in environment "
            "steps.",
            alt="Return against learning rate, a panel for each task and a line for each budget.",
        ),
    ]


def tables(
    cells: pd.DataFrame,
    rebuilt: pd.DataFrame,
    by_axis: pd.DataFrame,
    own_scored: THCTable,
    own: Table,
) -> list[DataTable]:
    """Tables: what to tune first, all cells, the comparison, ties, both axes, our own sweep."""
    return [
        _ranking_table(cells),
        _cells_table(
            "Calibrated ranking of all cells",
            cells,
            {"agent": "Agent", "hyperparameter": "Hyper-parameter"},
        ),
        _comparison_table(rebuilt),
        _ties_table(cells),
        DataTable(
            "Calibrated THC between games and between agents",
            ["Hyper-parameter", "Between games", "Between agents", "Difference"],
            [
                [name, round(games, 3), round(agents, 3), round(games - agents, 3)]
                for name, games, agents in by_axis.sort_values(
                    "between games", ascending=False
                ).itertuples(name=None)
            ],
        ),
        _cells_table(
            "Own sweep: THC over tasks × budgets",
            own_scored.frame,
            {"hyperparameter": "Hyper-parameter"},
        ),
        _own_means_table(own),
    ]


def _ranking_table(cells: pd.DataFrame) -> DataTable:
    groups = cells.groupby("hyperparameter")
    effects = {str(name): float(group["effect_size"].mean()) for name, group in groups}
    order = tune_first(
        {str(name): float(group["calibrated"].mean()) for name, group in groups}, effects
    )
    known = {(row["hyperparameter"], row["agent"]): row for row in cells.to_dict("records")}
    rows = []
    for name, priority in order:
        row: list[Any] = [
            published.DISPLAY_NAMES[name],
            round(priority, 3),
            round(effects[name], 3),
        ]
        for agent in published.AGENT_NAMES:
            cell = known.get((name, agent))
            row += [None, None] if cell is None else [_three(cell, "calibrated"), _p(cell)]
        rows.append(row)
    columns = [
        f"{agent}: {what}"
        for agent in published.AGENT_NAMES.values()
        for what in ("calibrated", "p")
    ]
    return DataTable(
        "Which hyper-parameters to tune first",
        ["Hyper-parameter", "Priority", "Effect size", *columns],
        rows,
        caption="Priority is the calibrated THC (mean of the agents, if positive) times the effect "
        "size (share of a game's variance of scores due to the value, ω²). High: the value matters "
        "and the best one changes from game to game. p-values are not adjusted for the number of "
        "cells.",
    )


def _cells_table(title: str, frame: pd.DataFrame, columns: Mapping[str, str]) -> DataTable:
    """Scores with interval and null, by calibrated score; `columns` name what tells rows apart."""
    from hpreliability.report import span

    names = published.DISPLAY_NAMES | published.AGENT_NAMES
    return DataTable(
        title,
        [*columns.values(), "Calibrated", "THC", "95 % interval", "Null mean", "Null 5–95 %", "p"],
        [
            [
                *(names.get(row[column], row[column]) for column in columns),
                _three(row, "calibrated"),
                _three(row, "score"),
                span(row["low"], row["high"]),
                _three(row, "null_mean"),
                span(row["null_low"], row["null_high"]),
                _p(row),
            ]
            for row in frame.sort_values("calibrated", ascending=False).to_dict("records")
        ],
    )


def _three(row: Mapping[Any, Any], column: str) -> float:
    return round(float(row[column]), 3)


def _p(row: Mapping[Any, Any]) -> float:
    return _three(row, "p_value")


def _comparison_table(rebuilt: pd.DataFrame) -> DataTable:
    return DataTable(
        "Recomputed and published THC, Atari-100k regime",
        ["Agent", "Hyper-parameter", "THC", "Published THC", "Std", "Published std", "Match"],
        [
            [
                published.AGENT_NAMES[row["agent"]],
                row["name"],
                round(row["score"], 6),
                round(row["published_score"], 6),
                round(row["std"], 6),
                round(row["published_std"], 6),
                bool(row["match"]),
            ]
            for row in rebuilt.to_dict("records")
        ],
        caption=f"A cell matches if mean and standard deviation agree to {published.TOLERANCE:g}. "
        "The standard deviation is that over values, not an uncertainty.",
    )


def _ties_table(cells: pd.DataFrame) -> DataTable:
    gap = cells["symmetric"] - cells["score"]
    changed = cells.assign(gap=gap)[gap.abs() > published.TOLERANCE]
    changed = changed.sort_values("gap", key=np.abs, ascending=False, kind="stable")
    return DataTable(
        f"Symmetric ties change {len(changed)} of {len(cells)} cells",
        ["Agent", "Hyper-parameter", "THC, paper's ties", "THC, symmetric ties", "Difference"],
        [
            [
                published.AGENT_NAMES[row["agent"]],
                published.DISPLAY_NAMES[row["hyperparameter"]],
                round(row["score"], 4),
                round(row["symmetric"], 4),
                round(row["gap"], 4),
            ]
            for row in changed.to_dict("records")
        ],
        caption="The paper's rule depends on the direction of the score; the symmetric one does "
        "not. Cells that do not change are left out.",
    )


def _own_means_table(own: Table) -> DataTable:
    array = own.scores("learning_rate", over=("env", "budget"))
    means = array.scores.mean(axis=(1, 3))
    return DataTable(
        "Own sweep: mean return by learning rate",
        ["Learning rate", *(context.replace("/", ", ") + " steps" for context in array.contexts)],
        [
            [value, *(round(float(mean), 1) for mean in row)]
            for value, row in zip(array.values, means, strict=True)
        ],
    )
