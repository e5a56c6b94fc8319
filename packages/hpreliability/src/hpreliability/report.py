"""One self-contained HTML page about a table of scores, in the look of decapod's reports.

Needs the extra `report`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pandas as pd

from hpreliability import plot
from hpreliability.advice import Recommendation, effect_size, recommend_values
from hpreliability.errors import MissingContextError, MissingExtraError
from hpreliability.scoring import THCTable, thc
from hpreliability.table import Missing, ScoreArray, Table
from hpreliability.writing import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

    from decapod.claims import DataTable, Figure
    from decapod.report import Section

_SIGNIFICANT: Final = 0.05
_HEATMAPS: Final = 4  # groups whose ranks are drawn: the least consistent ones
_MOST_CONTEXTS: Final = 40  # beyond this a matrix of contexts cannot be read

READING_GUIDE: Final = (
    "A THC score says how far the values of a hyper-parameter travel in the ranking from context "
    "to context. 0: the ranking never changes, so one choice serves everywhere. 1: every value is "
    "the best somewhere and the worst elsewhere. A THC of .3 means that an average value moves "
    "over 30 % of the ranking, for instance from rank 2 to rank 3.2 of 5. Values whose score "
    "intervals overlap share ranks, so noisy scores keep a score low rather than high.",
    "The score of a hyper-parameter that does nothing at all is not 0: by luck alone some value "
    "wins somewhere and loses elsewhere, more often the more contexts there are. The null shows "
    "what luck gives: the same runs, dealt to the values at random. The calibrated score counts "
    "from there: 0 is chance, 1 is complete inconsistency, and a negative score is a ranking "
    "steadier than chance. Only calibrated scores can be compared between hyper-parameters with "
    "different numbers of values or contexts. With two values a score can only be 0, .5 or 1.",
    "THC does not see how much is at stake. Read it together with the effect size, the share of "
    "the variance of scores within a context that is due to the value, and with the regret of a "
    "choice. Tune first what is both: inconsistent beyond chance, and of large effect.",
)


def write_report(
    table: Table,
    path: str | PathLike[str],
    *,
    result: THCTable | None = None,
    missing: Missing = "raise",
    names: Mapping[str, str] | None = None,
    title: str = "How consistent are these hyper-parameters?",
) -> None:
    """Write a page with scores, nulls, ranks, recommendations and transfer.

    Args:
        table: one finite score per run (`Table.reduce`, `Table.settle` get it there).
        path: the HTML file; written whole or not at all.
        result: from `thc(table, ...)` with a null; default: `thc(table, missing=missing)`.
        missing: rule for values without a run in some context; the one `result` was made with.
        names: printed names of hyper-parameters and other labels.
        title: heading of the page.

    Raises:
        MissingExtraError: decapod or matplotlib is not installed.
        ValueError: `result` was made without a null.
        HPReliabilityError: the table cannot be scored; see `thc`.
        OSError: the file cannot be written.
    """
    try:
        from decapod.report import render_page
    except ImportError as error:
        raise MissingExtraError("decapod", "report") from error
    if result is None:
        result = thc(table, missing=missing)
    if "calibrated" not in result.frame:
        raise ValueError('result: expected scores with a null, got none; use null="permutation"')
    page = _Page(table, result, missing, dict(names or {}))
    html = render_page(title, page.lead(), page.sections(), kicker="hpreliability")
    write_text(Path(path), html)


@dataclass(frozen=True)
class _Page:
    table: Table
    result: THCTable
    missing: Missing
    names: Mapping[str, str]
    cells: Mapping[tuple[str, ...], ScoreArray] = field(init=False)

    def __post_init__(self) -> None:
        keys = self.result.frame[list(self.result.by)].itertuples(index=False, name=None)
        cells = {}
        for key in keys:
            conditions = dict(zip(self.result.by, key, strict=True))
            cells[key] = self.table.scores(
                conditions.pop("hyperparameter"),
                over=self.result.over,
                missing=self.missing,
                **conditions,
            )
        object.__setattr__(self, "cells", cells)

    def lead(self) -> str:
        beyond = [row for row in self.rows() if row["p_value"] <= _SIGNIFICANT]
        worst = (
            f" The least consistent of them is {self.group(beyond[0])}, with a calibrated THC of "
            f"{beyond[0]['calibrated']:.2f}."
            if beyond
            else ""
        )
        return (
            f"{len(self.result.frame)} rankings over {_contexts(self.result)}. {len(beyond)} of "
            f"them change more than chance explains (p ≤ .05).{worst}"
        )

    def sections(self) -> list[Section]:
        from decapod.report import Section

        parts = [
            Section("How to read a THC score", text=READING_GUIDE),
            Section(
                "Which hyper-parameters to tune first",
                text=(
                    "Priority is the calibrated THC, if positive, times the effect size: high "
                    "where the value matters and the best one changes with the context.",
                ),
                figures=[self.bars()],
                tables=[self.ranking()],
            ),
            Section(
                "Where the rankings turn",
                text=("The least consistent ones, context by context.",),
                figures=self.heatmaps(),
            ),
            Section(
                "What to choose",
                text=(
                    "The recommended value has the highest mean share of runs that it beats, "
                    "context by context. A value is safe if it is not separated from the best in "
                    "at least 80 % of the contexts. Regret is what the recommended value loses to "
                    "each context's own best, as a share of the context's range of mean scores; "
                    "where the values do not differ it is luck alone.",
                ),
                tables=[self.recommendations()],
                figures=self.transfers(),
            ),
            Section(
                "Two ways to break ties",
                text=(
                    "The paper's rule lets a wide interval on top hide the ones below it and "
                    "depends on the direction of the score; the symmetric rule counts what lies "
                    "strictly above and below. Where the two disagree, trust neither to a digit.",
                ),
                tables=[self.ties()],
            ),
            Section("Notes", text=self.notes()),
        ]
        return [part for part in parts if part.text or part.figures or part.tables]

    def group(self, row: Mapping[Any, Any]) -> str:
        labels = [str(row[column]) for column in self.shown_columns()]
        return ", ".join(self.names.get(label, label) for label in labels)

    def shown_columns(self) -> list[str]:
        """The grouping columns that tell groups apart."""
        frame = self.result.frame
        rest = [c for c in self.result.by if c != "hyperparameter" and frame[c].nunique() > 1]
        return ["hyperparameter", *rest]

    def rows(self) -> list[dict[Any, Any]]:
        frame = self.result.frame.sort_values("calibrated", ascending=False, kind="stable")
        return frame.to_dict("records")

    def least_consistent(self) -> list[dict[Any, Any]]:
        """Those beyond chance; the top ones whatever their p-value if there are none."""
        rows = self.rows()
        return ([r for r in rows if r["p_value"] <= _SIGNIFICANT] or rows)[:_HEATMAPS]

    def key(self, row: Mapping[Any, Any]) -> tuple[str, ...]:
        return tuple(row[column] for column in self.result.by)

    def bars(self) -> Figure:
        return themed_figure(
            plot.thc_bars(self.result, names=self.names),
            title="THC beside what chance would give",
            caption="Bars: 5th to 95th percentile of the permutation null, with its mean. Dots: "
            "THC, with the interval of its expectation where one was asked for.",
            alt="Scores of all groups with null bands; the table below has the same numbers.",
        )

    def ranking(self) -> DataTable:
        from decapod.claims import DataTable

        rows = []
        for row in self.rows():
            effect = effect_size(self.cells[self.key(row)].scores)
            rows.append(
                [
                    self.group(row),
                    round(max(row["calibrated"], 0.0) * effect, 3),
                    round(row["calibrated"], 3),
                    round(effect, 3),
                    round(row["score"], 3),
                    span(row["low"], row["high"]) if "low" in row else None,
                    span(row["null_low"], row["null_high"]),
                    round(row["p_value"], 3),
                    row["n_values"],
                ]
            )
        rows.sort(key=lambda row: -row[1])
        return DataTable(
            "Tune first",
            [
                "Hyper-parameter",
                "Priority",
                "Calibrated",
                "Effect size",
                "THC",
                "95 % interval",
                "Null 5–95 %",
                "p",
                "Values",
            ],
            rows,
            caption=f"{_contexts(self.result)}, {self.result.frame['n_runs'].sum():,} runs in all. "
            "Effect size: share of a context's variance of scores that is due to the value (ω²). "
            "p-values are not adjusted for the number of rankings.",
        )

    def heatmaps(self) -> list[Figure]:
        if self.result.frame["n_contexts"].max() > _MOST_CONTEXTS:
            return []
        figures = []
        for row in self.least_consistent():
            name = self.group(row)
            group = dict(zip(self.result.by, self.key(row), strict=True))
            figures.append(
                themed_figure(
                    plot.rank_heatmap(self.result, group, title=name),
                    title=name,
                    caption="Rank of each value in each context, 1 (strong colour) is best; ties "
                    "share a rank. A consistent hyper-parameter has rows of even colour.",
                    alt=f"Ranks of the values of {name} by context.",
                )
            )
        return figures

    def recommendations(self) -> DataTable:
        from decapod.claims import DataTable

        rows = []
        for row in self.rows():
            cell = self.cells[self.key(row)]
            advice = recommend_values(
                cell.scores,
                cell.values,
                cell.contexts,
                method=self.result.results[0].method,
            )
            rows.append([self.group(row), *_advice(advice)])
        return DataTable(
            "Recommended values",
            ["Hyper-parameter", "Use", "Safe values", "Mean regret", "Worst regret", "Worst in"],
            rows,
        )

    def transfers(self) -> list[Figure]:
        drawn = []
        columns = [*self.result.over, *(c for c in self.result.by if c != "hyperparameter")]
        for column in columns:
            labels = self.table.frame[column].nunique()
            if not 2 <= labels <= _MOST_CONTEXTS:
                continue
            try:
                drawing = plot.transfer_matrix(self.table, column, names=self.names)
            except MissingContextError:
                # No hyper-parameter was run under two of these labels: there is no transfer.
                continue
            drawn.append(
                themed_figure(
                    drawing,
                    title=f"Transfer between labels of {column}",
                    caption="Regret of taking the best value of the row's context to the column's, "
                    "as a share of the range of scores there, averaged over hyper-parameters. It "
                    "includes the bad luck of choosing from few runs.",
                    alt=f"Matrix of regret for each ordered pair of {column}.",
                )
            )
        return drawn

    def ties(self) -> DataTable:
        from decapod.claims import DataTable

        rows = [
            [
                self.group(row),
                round(row["score"], 4),
                round(row["symmetric"], 4),
                round(row["symmetric"] - row["score"], 4),
            ]
            for row in self.rows()
        ]
        used = self.result.results[0].method.ties
        columns = ["Hyper-parameter", f"THC, {used} ties", "THC, symmetric ties", "Difference"]
        return DataTable("THC under both rules", columns, rows)

    def notes(self) -> list[str]:
        method = self.result.results[0].method
        uncertainty = self.result.frame.get("uncertainty", pd.Series(["none"])).iloc[0]
        null = self.result.results[0].null
        settings = (
            f"Settings: interval {method.interval}, ties {method.ties}, uncertainty {uncertainty}, "
            f"{0 if null is None else len(null.samples)} permutations, seed {method.seed}; "
            f"{len(self.table.frame)} runs."
        )
        dropped = list(dict.fromkeys([*self.table.notes, *self.result.notes]))
        return [settings, *(dropped or ["No run was dropped or replaced."])]


def themed_figure(drawing: Drawing, *, title: str, caption: str, alt: str) -> Figure:
    """A matplotlib figure as a figure of a decapod report."""
    from decapod.claims import Figure
    from decapod.report import svg_from_matplotlib

    return Figure(title=title, svg=svg_from_matplotlib(drawing), caption=caption, alt=alt)


def span(low: float, high: float) -> str:
    """Two bounds as text."""
    return f"{low:.2f} – {high:.2f}"


def _advice(advice: Recommendation) -> list[Any]:
    regret = advice.relative_regret[advice.values.index(advice.best)]
    worst = int(regret.argmax())
    return [
        advice.best,
        ", ".join(advice.safe) or "none",
        round(float(regret.mean()), 3),
        round(float(regret.max()), 3),
        advice.contexts[worst] if regret.max() > 0 else "–",
    ]


def _contexts(result: THCTable) -> str:
    counts = result.frame["n_contexts"]
    many = f"{counts.min()}" if counts.min() == counts.max() else f"{counts.min()}–{counts.max()}"
    return f"{many} contexts ({' × '.join(result.over)})"
