"""One self-contained HTML page about one or several models, in the look of decapod's reports.

Needs the extra `report`. `report_markdown` and `report_json` have the same numbers and need none.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Final

from gsm_compose._version import __version__
from gsm_compose.comparison import Comparison, compare_all
from gsm_compose.errors import EvaluationError, MissingExtraError
from gsm_compose.exports import composition_text
from gsm_compose.gap import GapReport
from gsm_compose.items import Item
from gsm_compose.outcomes import CATEGORIES, Category, classify
from gsm_compose.results import Response, Results
from gsm_compose.tables import (
    TextTable,
    comparison_table,
    conditions_table,
    gap_table,
    parts_table,
    percent,
    points,
    preamble_table,
    taxonomy_table,
    unparsable_table,
)
from gsm_compose.writing import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

    from decapod.claims import DataTable, Figure
    from decapod.report import Section

_TITLE: Final = "The reasoning gap"
_EXAMPLES: Final = 2  # of every kind of answer
_LONGEST: Final = 1200  # characters of a model's answer that are shown
_BARS: Final = 6  # models whose kinds of answers one figure can tell apart
_CONTROL: Final = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")

READING_GUIDE: Final = (
    "A composition asks two questions at once: the answer to Q1 takes the place of a number of Q2. "
    "If solving one had no influence on solving the other, compositions would be solved as often "
    "as S1·S2, the accuracies on both kinds of question alone multiplied. The gap Δ is what is "
    "missing (below zero) or what comes on top (above).",
    "A model that solves the easy items of both kinds can exceed S1·S2 without any skill at "
    "composing. The paired Δ compares with the items whose two questions were both solved alone. "
    "It does not have this flaw, and is the one to look at where the two disagree.",
    "An interval that holds zero does not show that there is no gap, only that these items do not "
    "tell. Items that share a question are not independent, and the intervals allow for that.",
)
_KINDS: Final[Mapping[Category, str]] = {
    "lucky": "The end is right, the answer to Q1 is wrong or not stated.",
    "wrong X": "Q1 was not solved, and the end is wrong.",
    "wrong Q2": "Q1 was solved, the end is wrong.",
    "X ignored": "The answer is that of Q2 with its published number.",
    "answered X": "The answer to Q1 was given as the final one.",
    "swapped": "The two answers are right, in each other's place.",
    "unparsable": "No number could be read.",
    "execution error": "The program did not run to its end.",
}


def write_report(
    results: Mapping[str, Results],
    path: str | PathLike[str],
    *,
    level: float = 0.95,
    exclude: Collection[str] = (),
    title: str = _TITLE,
) -> None:
    """Write a page with gaps, parts, kinds of answers, comparisons and examples.

    Args:
        results: by name of the model; "original", "modified" and "compositional" were asked.
        path: the HTML file; written whole or not at all.
        level: of all intervals.
        exclude: ids of items or rows; rows of the tables then also show the gap without them.
        title: heading of the page.

    Raises:
        MissingExtraError: decapod or matplotlib is not installed.
        EvaluationError: no results, or a condition of the gap was not asked.
        StatisticsError: see `gsm_compose.gap_report`.
        OSError: the file cannot be written.
    """
    try:
        from decapod.report import render_page
    except ImportError as error:
        raise MissingExtraError("decapod", "report") from error
    page = _Page(results, level, tuple(exclude))
    html = render_page(_clean(title), page.lead, page.sections(), kicker="gsm-compose")
    write_text(Path(path), html)


def report_markdown(
    results: Mapping[str, Results],
    *,
    level: float = 0.95,
    exclude: Collection[str] = (),
    title: str = _TITLE,
) -> str:
    """The tables of the page as Markdown; arguments and errors as for `write_report`."""
    page = _Page(results, level, tuple(exclude))
    parts = [f"# {_clean(title)}\n\n{page.lead}\n"]
    parts += [table.to_markdown() for table in page.tables()]
    parts.append("\n".join(f"- {note}" for note in page.notes()) + "\n")
    return "\n".join(parts)


def report_json(
    results: Mapping[str, Results], *, level: float = 0.95, exclude: Collection[str] = ()
) -> str:
    """All numbers of the page as JSON; arguments and errors as for `write_report`."""
    page = _Page(results, level, tuple(exclude))
    content = {
        "gsm_compose": __version__,
        "models": {
            name: {
                "split": page.results[name].benchmark.split,
                "spec": dataclasses.asdict(page.results[name].spec),
                "report": report.to_dict(),
            }
            for name, report in page.reports.items()
        },
        "comparisons": [dataclasses.asdict(one) for one in page.comparisons],
    }
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


@dataclass(frozen=True)
class _Page:
    given: Mapping[str, Results]
    level: float
    exclude: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.given:
            raise EvaluationError("results: expected those of at least one model, got none.")

    @cached_property
    def results(self) -> dict[str, Results]:
        return {_clean(name) or "model": results for name, results in self.given.items()}

    @cached_property
    def reports(self) -> dict[str, GapReport]:
        return {
            name: results.gap(self.level, exclude=self.exclude)
            for name, results in self.results.items()
        }

    @cached_property
    def comparisons(self) -> tuple[Comparison, ...]:
        """Of all pairs; of none where they did not answer the same items."""
        items = {frozenset(item.id for item in r.benchmark) for r in self.results.values()}
        if len(self.results) < 2 or len(items) > 1:
            return ()
        outcomes = {name: results.outcomes() for name, results in self.results.items()}
        return compare_all(outcomes, self.level)

    @property
    def lead(self) -> str:
        counts = sorted({report.n for report in self.reports.values()})
        splits = sorted({results.benchmark.split for results in self.results.values()})
        models = "One model" if len(self.reports) == 1 else f"{len(self.reports)} models"
        items = " or ".join(f"{count:,}" for count in counts)
        below = [name for name, report in self.reports.items() if report.delta.high < 0]
        if len(self.reports) == 1:
            ((_, report),) = self.reports.items()
            said = (
                f"It solves {percent(report.s_comp)} % of them, which is "
                f"{points(report.delta)} points from what its accuracies on the single questions "
                "promise."
            )
        else:
            said = f"Δ is below zero, interval and all, for {len(below) or 'none'} of them."
        return (
            f"{models} on {items} compositions of questions from the {' and '.join(splits)} split "
            f"of GSM8K. {said}"
        )

    def tables(self) -> list[TextTable]:
        found = [
            gap_table(self.reports),
            parts_table(self.reports),
            taxonomy_table(self.reports),
            unparsable_table(self.reports),
            conditions_table(self.reports),
            comparison_table(self.comparisons) if self.comparisons else None,
            preamble_table(self.results),
        ]
        return [table for table in found if table is not None]

    def sections(self) -> list[Section]:
        from decapod.report import Section

        of_title = {table.title: _data_table(table) for table in self.tables()}
        titles = list(of_title)

        def section(heading: str, which: int, *figures: Figure) -> Section:
            return Section(heading, figures=figures, tables=[of_title.pop(titles[which])])

        gap = section("The gap", 0, *self.gap_figures())
        parts = section("Where it is lost", 1, *self.decompositions())
        kinds = section("Kinds of answers", 2, *self.taxonomies())
        further = Section(
            "Format, other conditions, comparisons",
            figures=self.leakages(),
            tables=list(of_title.values()),
        )
        found = [
            gap,
            Section("How to read it", text=READING_GUIDE),
            parts,
            kinds,
            further,
            *self.examples(),
            Section("Notes", text=self.notes()),
        ]
        return [part for part in found if part.text or part.figures or part.tables]

    def gap_figures(self) -> list[Figure]:
        from gsm_compose import plot

        return [
            _figure(
                plot.plot_gap(self.reports),
                "Gap of every model",
                "Bars and dots: Δ. Diamonds: paired Δ. Lines: intervals.",
                "Gaps with intervals; the table below has the same numbers.",
            ),
            _figure(
                plot.plot_expected(self.reports),
                "Expected against measured",
                "Below the line, compositions are solved less often than the accuracies on the "
                "single questions promise; the pale line is Δ.",
                "S1·S2 against S_comp of every model; the table below has the same numbers.",
            ),
        ]

    def decompositions(self) -> list[Figure]:
        from gsm_compose import plot

        return [
            _figure(
                plot.plot_decomposition(report),
                name,
                "From S1·S2, term by term, to S_comp. The axis does not begin at zero.",
                f"Terms of the gap of {name}; the table below has the same numbers.",
            )
            for name, report in self.reports.items()
        ]

    def taxonomies(self) -> list[Figure]:
        from gsm_compose import plot

        names = list(self.reports)
        groups = [names[start : start + _BARS] for start in range(0, len(names), _BARS)]
        return [
            _figure(
                plot.plot_taxonomy({name: self.reports[name] for name in group}),
                "Answers that are not correct",
                "Percent of all answers to compositions, by kind.",
                "Kinds of answers; the table below has the same numbers.",
            )
            for group in groups
        ]

    def leakages(self) -> list[Figure]:
        from gsm_compose import plot

        if all(report.leakage is None for report in self.reports.values()):
            return []
        return [
            _figure(
                plot.plot_leakage(self.reports),
                "Published against new numbers",
                "Last questions alone. Far above the line, the published ones may be memorised.",
                "S2 against the accuracy on the published questions; the table has the numbers.",
            )
        ]

    def examples(self) -> list[Section]:
        from decapod.report import Section

        shown: dict[Category, list[str]] = {}
        for name, results in self.results.items():
            for category, item, response in _answers(results):
                texts = shown.setdefault(category, [])
                if category in _KINDS and len(texts) < _EXAMPLES:
                    texts.append(_example(name, item, response))
        return [
            Section(f"Example: {category}", text=(_KINDS[category], *shown[category]))
            for category in CATEGORIES
            if category in _KINDS and shown.get(category)
        ]

    def notes(self) -> list[str]:
        found = []
        for name, results in self.results.items():
            spec, report = results.spec, self.reports[name]
            found.append(
                f"{name}: {report.n} items, {', '.join(results.conditions)}; style {spec.style}, "
                f"{spec.shots} shots, {'with' if spec.preamble else 'without'} preamble, "
                f"{'chat messages' if spec.chat else 'plain text'}; built with "
                f"{json.dumps(dict(results.benchmark.settings), ensure_ascii=False)}."
            )
            found += [f"{name}: {note}." for note in report.notes]
        if len(self.results) > 1 and not self.comparisons:
            found.append("The models answered different items, so they are not compared in pairs.")
        found.append(f"gsm-compose {__version__}, intervals by the multiway method.")
        return [_clean(note) for note in found]


def _answers(results: Results) -> Iterator[tuple[Category, Item, Response]]:
    for item, response in zip(results.benchmark, results.of("compositional"), strict=True):
        yield classify(item, response.q1, response.final, response.error), item, response


def _example(name: str, item: Item, response: Response) -> str:
    """One paragraph: a page's prose has no other structure."""
    q1 = "no answer to Q1" if response.q1 is None else f"{response.q1} to Q1"
    final = "no final answer" if response.final is None else f"{response.final} at the end"
    failed = "" if response.error is None else f" The program failed: {response.error}."
    question = " ".join(composition_text(item).split())
    return _clean(
        f"Item {item.id}. {question} ▸ Right: {item.x} to Q1, {item.gold} at the end "
        f"({item.ignored} if X is ignored). ▸ {name} gave {q1} and {final}.{failed} It wrote: "
        f"“{_excerpt(response.text)}”"
    )


def _excerpt(text: str) -> str:
    """A model's text in one line, its middle left out where it is long."""
    line = " ⏎ ".join(part.strip() for part in text.strip().splitlines() if part.strip())
    if len(line) > _LONGEST:
        half = _LONGEST // 2
        line = f"{line[:half]} … {line[-half:]}"
    return line


def _clean(text: str) -> str:
    """Without what has no place in a page: control characters and halves of surrogate pairs."""
    return _CONTROL.sub("\ufffd", text.encode("utf-8", "replace").decode())


def _data_table(table: TextTable) -> DataTable:
    from decapod.claims import DataTable

    return DataTable(table.title, table.columns, table.rows, table.caption)


def _figure(drawing: Drawing, title: str, caption: str, alt: str) -> Figure:
    from decapod.claims import Figure
    from decapod.report import svg_from_matplotlib

    return Figure(title=title, svg=svg_from_matplotlib(drawing), caption=caption, alt=alt)
