"""From the outcomes in a folder to report.html, report.md and report.json."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from decapod import jsonl
from decapod._version import __version__
from decapod.claims import Evidence, Figure
from decapod.report.figures import themed_svg
from decapod.report.glyph import Glyph, glyph
from decapod.report.page import interval_decimals, number, render
from decapod.reproductions import Decided, Outcome
from decapod.writing import write_text

VERDICTS: Final = ("shown", "not shown", "reversed", "failed")
_COUNT_WORDS: Final = (
    "no one two three four five six seven eight nine ten eleven twelve".split()  # noqa: SIM905
)


class ReportError(ValueError):
    """There is nothing to make a report of."""


@dataclass(frozen=True)
class ClaimView:
    """A claim as the report shows it; ``verdict`` may also be "failed"."""

    claim: Decided
    verdict: str
    glyph: Glyph | None
    effect: str
    interval: str
    spoken: str


@dataclass(frozen=True)
class PaperView:
    """A library's outcome as the report shows it; ``slug`` is unique on the page."""

    slug: str
    outcome: Outcome
    claims: tuple[ClaimView, ...]
    figures: tuple[Figure, ...]
    broken_figures: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Unreadable:
    """An outcome file that could not be read, and why."""

    name: str
    reason: str


def build(out_dir: Path | str) -> None:
    """Write report.html, report.md and report.json into a folder of outcomes.

    Reads every ``OUT/*/outcome.json``. One that cannot be read is named in the report and does not
    hide the others.

    Raises:
        ReportError: the folder holds no outcome.
        OSError: the folder cannot be read or written.
    """
    out = Path(out_dir)
    papers: list[PaperView] = []
    unreadable: list[Unreadable] = []
    for path in sorted(out.glob("*/outcome.json")):
        try:
            outcome = Outcome.load(path)
        except ValueError as error:
            unreadable.append(Unreadable(path.parent.name, str(error)))
        else:
            papers.append(_paper(f"p{len(papers) + 1}", outcome))
    if not papers and not unreadable:
        raise ReportError(
            f"{out}: expected outcomes (*/outcome.json), found none. "
            "Run `decapod reproduce` into this folder first."
        )
    context = _context(papers, unreadable)
    write_text(out / "report.html", render("report.html.j2", **context))
    write_text(out / "report.md", render("report.md.j2", **context).strip() + "\n")
    write_text(out / "report.json", _json(papers, unreadable, context["counts"]))


def _context(papers: Sequence[PaperView], unreadable: Sequence[Unreadable]) -> dict[str, Any]:
    tally = Counter(view.verdict for paper in papers for view in paper.claims)
    counts = {verdict: tally[verdict] for verdict in VERDICTS}
    return {
        "papers": papers,
        "unreadable": unreadable,
        "counts": counts,
        "headline": headline(counts),
        "seconds": sum(paper.outcome.seconds for paper in papers),
        "finished": max((paper.outcome.finished for paper in papers), default="")[:10],
        "profiles": sorted({paper.outcome.profile for paper in papers}),
    }


def headline(counts: dict[str, int]) -> str:
    """The result in a line, such as "Three of four claims shown"."""
    total, shown = sum(counts.values()), counts["shown"]
    if total == 0:
        return "No claim tested"
    noun = "claim" if total == 1 else "claims"
    if shown == total:
        line = "The claim is shown" if total == 1 else f"All {_count(total)} {noun} shown"
    else:
        line = f"{_count(shown)} of {_count(total)} {noun} shown"
    return line[0].upper() + line[1:]


def _count(n: int) -> str:
    return _COUNT_WORDS[n] if n < len(_COUNT_WORDS) else str(n)


def _paper(slug: str, outcome: Outcome) -> PaperView:
    figures: list[Figure] = []
    broken: list[tuple[str, str]] = []
    for figure in outcome.figures:
        try:
            themed_svg(figure.svg)
        except ValueError as error:
            broken.append((figure.title, str(error)))
        else:
            figures.append(figure)
    claims = tuple(_claim(claim) for claim in outcome.claims)
    return PaperView(slug, outcome, claims, tuple(figures), tuple(broken))


def _claim(claim: Decided) -> ClaimView:
    evidence = claim.evidence
    verdict = claim.verdict or "failed"
    if evidence is None:
        return ClaimView(claim, verdict, None, "–", "", "no result")
    effect, interval = _effect_and_interval(evidence, claim.region)
    return ClaimView(claim, verdict, glyph(claim), effect, interval, f"{effect}, {interval}")


def effect_text(claim: Decided) -> str:
    """Effect and interval in a line, such as "0.78 [0.66, 0.86]"."""
    if claim.evidence is None:
        return "–"
    return " ".join(_effect_and_interval(claim.evidence, claim.region))


def _effect_and_interval(evidence: Evidence, region: tuple[float, float] | None) -> tuple[str, str]:
    # Runs that happen to agree also have an interval without width, but are not exact.
    if region and region[0] == region[1] and evidence.low == evidence.high:
        return number(evidence.effect), "exact"
    decimals = interval_decimals(evidence.low, evidence.high)
    low, high = number(evidence.low, decimals), number(evidence.high, decimals)
    return number(evidence.effect, decimals), f"[{low}, {high}]"


def _json(
    papers: Sequence[PaperView], unreadable: Sequence[Unreadable], counts: dict[str, int]
) -> str:
    outcomes = [dataclasses.asdict(paper.outcome) for paper in papers]
    for outcome in outcomes:
        # Pictures stay in outcome.json and report.html; this file is for numbers.
        outcome["figures"] = [
            {key: value for key, value in figure.items() if key != "svg"}
            for figure in outcome["figures"]
        ]
    content = {
        "decapod": __version__,
        "counts": counts,
        "unreadable": {entry.name: entry.reason for entry in unreadable},
        "outcomes": outcomes,
    }
    return json.dumps(json.loads(jsonl.dumps(content)), indent=1, ensure_ascii=False) + "\n"
