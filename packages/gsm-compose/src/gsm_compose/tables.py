"""What reports say, as tables of text: the same for pages, Markdown and terminals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from gsm_compose.comparison import Comparison
from gsm_compose.errors import EvaluationError
from gsm_compose.gap import GapReport
from gsm_compose.outcomes import CATEGORIES
from gsm_compose.prompts import CONDITIONS
from gsm_compose.results import Results, best_of
from gsm_compose.stats import Interval

Reports = Mapping[str, GapReport]


@dataclass(frozen=True)
class TextTable:
    """A table whose cells are text.

    Attributes:
        title: what it shows, without a full stop.
        columns: headings; the first column names the rows.
        rows: as many cells as columns each.
        caption: what a reader must know to read it.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""

    def to_text(self) -> str:
        """Columns set apart by spaces, the first to the left and the others to the right."""
        lines = [list(self.columns), *map(list, self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )

    def to_markdown(self) -> str:
        """A heading, the table, and the caption."""
        lines = [
            self.columns,
            ["---", *["---:"] * (len(self.columns) - 1)],
            *([cell.replace("|", "\\|") for cell in row] for row in self.rows),
        ]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return f"## {self.title}\n\n{table}\n" + (f"\n{self.caption}\n" if self.caption else "")


def gap_table(reports: Reports) -> TextTable:
    """S1, S2, S_comp and the gap in its three forms, one model a row."""
    rows = []
    for name, report in reports.items():
        rows.append(_gap_row(name, report))
        if report.without_excluded is not None:
            left = f"{name}, {report.excluded} left out"
            rows.append(_gap_row(left, report.without_excluded))
    columns = ["Model", "Δ", "Δ paired", "Δ / (S1·S2)", "S_comp", "S1·S2", "S1", "S2"]
    caption = (
        f"In percent and percentage points, with {_level(reports)} intervals. Δ = S_comp − "
        "S1·S2; paired Δ compares with the items whose questions were both solved alone. S1: first "
        "questions alone. S2: modified last questions alone. S_comp: compositions."
    )
    return TextTable("The reasoning gap", columns, rows, caption)


def parts_table(reports: Reports) -> TextTable:
    """The three terms of the gap, and the rates they are made of."""
    rows = [
        [
            name,
            points(report.delta),
            points(report.distraction_term),
            points(report.second_hop_term),
            points(report.lucky),
            percent(report.c1),
            percent(report.cf_given_c1),
        ]
        for name, report in reports.items()
    ]
    columns = ["Model", "Δ", "Distraction", "Second hop", "Lucky", "Q1 right", "Then Q2 right"]
    caption = (
        "The three terms add up to Δ exactly. Distraction: (a − S1)·S2, the first question lost "
        "because another follows. Second hop: a·(b − S2), the last one lost after a right first "
        "answer. Lucky: right in the end after a wrong or unstated first answer. a and b are the "
        "last two columns: Q1 right within compositions, and the end right where Q1 is."
    )
    return TextTable("What the gap is made of", columns, rows, caption)


def taxonomy_table(reports: Reports) -> TextTable:
    """Kinds of answers to the compositions, one kind a row."""
    found = [c for c in CATEGORIES if any(r.taxonomy.get(c) for r in reports.values())]
    rows = [
        [category, *(_share(r.taxonomy.get(category, 0.0)) for r in reports.values())]
        for category in found
    ]
    caption = (
        "Percent of all answers to compositions. X ignored: the answer that comes out with the "
        "published number in place of X; it always differs from the right one. Wrong X: Q1 was "
        "not solved. Wrong Q2: it was, the end is wrong."
    )
    return TextTable("Kinds of answers", ["Kind", *reports], rows, caption)


def unparsable_table(reports: Reports) -> TextTable | None:
    """Answers without a number, by condition; None if nobody counted them."""
    asked = [c for c in CONDITIONS if any(c in r.unparsable for r in reports.values())]
    if not asked:
        return None
    rows = [
        [
            name,
            *(_share(report.unparsable.get(condition)) for condition in asked),
            "–" if report.n_parsable is None else str(report.n_parsable),
            points(report.delta_parsable),
        ]
        for name, report in reports.items()
    ]
    caption = (
        "Percent of answers under each condition; they count as wrong elsewhere. On the right, the "
        "items that could be read under all three conditions of Δ, and Δ of these alone. They are "
        "not a random part, so a difference says that format matters, not by how much."
    )
    columns = ["Model", *asked, "Readable items", "Δ of these"]
    return TextTable("Answers without a number", columns, rows, caption)


def conditions_table(reports: Reports) -> TextTable | None:
    """Code, unrelated context and leakage; None if none of them was asked."""
    asked = [
        r.code is not None or r.independent_context is not None or r.leakage is not None
        for r in reports.values()
    ]
    if not any(asked):
        return None
    rows = []
    for name, report in reports.items():
        leakage = report.leakage
        rows.append(
            [
                name,
                percent(report.code),
                points(report.code_gain),
                points(report.independent_context),
                percent(leakage.original if leakage else None),
                points(leakage.difference if leakage else None),
                "–" if leakage is None else f"{leakage.test.p_mid:.3g}",
            ]
        )
    columns = [
        "Model",
        "Code",
        "Less S_comp",
        "After unrelated Q1, less S2",
        "Q2 as published",
        "Less S2",
        "McNemar p",
    ]
    caption = (
        "Code: compositions answered by a program. After an unrelated question: what an additional "
        "question costs that has nothing to do with Q2. Q2 as published: a model that solves it "
        "more often than with new numbers may have seen it; McNemar's mid-p is over rows."
    )
    return TextTable("Other conditions", columns, rows, caption)


def comparison_table(found: Sequence[Comparison]) -> TextTable:
    """Differences of models on the same items, one pair a row."""
    rows = [
        [
            f"{one.names[0]} less {one.names[1]}",
            points(one.s_comp),
            points(one.delta),
            points(one.delta_paired),
            f"{one.p:.3g}",
            f"{one.p_holm:.3g}",
        ]
        for one in found
    ]
    columns = ["Models", "S_comp", "Δ", "Δ paired", "p of equal Δ", "p, Holm"]
    caption = (
        "Item by item on the same items. A positive difference of Δ means that the second model "
        "loses more by composing. The last column is adjusted for the number of pairs."
    )
    return TextTable("Do the gaps differ", columns, rows, caption)


def preamble_table(results: Mapping[str, Results]) -> TextTable | None:
    """Evaluations that differ in the preamble alone, side by side; None if there are none."""
    rows = []
    for (name, one), (_, other) in combinations(results.items(), 2):
        try:
            if one.label != other.label:
                continue
            both = best_of(one, other)
        except EvaluationError:
            continue  # they differ in something else: not a pair
        label = one.label or name
        rows += [
            [label, condition, *map(_share, both.accuracy(condition))]
            for condition in both.preamble.conditions
        ]
        rows.append([label, "Δ", *(_signed(value) for value in both.delta)])
    if not rows:
        return None
    caption = (
        "The paper counts the better of both settings for every accuracy. The larger of two is "
        "biased upwards, so both are shown."
    )
    columns = ["Model", "", "With preamble", "Without", "Larger"]
    return TextTable("With and without the preamble", columns, rows, caption)


def points(interval: Interval | None) -> str:
    """A difference in percentage points with its interval."""
    if interval is None:
        return "–"
    return f"{_signed(interval.value)} [{_signed(interval.low)}, {_signed(interval.high)}]"


def percent(interval: Interval | None) -> str:
    """A rate in percent with its interval."""
    if interval is None:
        return "–"
    low, high = _share(interval.low), _share(interval.high)
    return f"{_share(interval.value)} [{low}, {high}]"


def _gap_row(name: str, report: GapReport) -> list[str]:
    expected = report.s1.value * report.s2.value
    return [
        name,
        points(report.delta),
        points(report.delta_paired),
        points(report.relative),
        percent(report.s_comp),
        _share(expected),
        percent(report.s1),
        percent(report.s2),
    ]


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _signed(value: float) -> str:
    return f"{100 * value:+.1f}".replace("-", "−").replace("+0.0", "0.0").replace("−0.0", "0.0")


def _level(reports: Reports) -> str:
    return f"{next(iter(reports.values())).level * 100:g} %"
