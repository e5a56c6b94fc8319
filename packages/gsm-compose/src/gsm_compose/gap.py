"""The reasoning gap of arXiv 2410.01748 (eq. 1) with intervals, and what it is made of.

With a = mean(c1), b = mean(cf | c1) and l = mean(cf and not c1), the gap Δ = S_comp − S1·S2 is

    Δ = (a − S1)·S2  +  a·(b − S2)  +  l
        distraction     second hop     lucky

exactly. The middle term is computed as mean(cf and c1) − a·S2, so that it exists where c1 is never
true and b does not. Items of more than two questions: S1 and S2 are those of the first and the last
alone, and what is lost in between counts in the second hop.

The paper's Δ takes the two questions of an item as independent. Where a model that solves the one
tends to solve the other, S_comp may exceed S1·S2 without any skill at composing; `delta_paired`
compares with mean(q1 and q2) of the same items instead.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from gsm_compose.clusters import label_codes
from gsm_compose.errors import StatisticsError
from gsm_compose.outcomes import CATEGORIES, Category, Outcomes, classify
from gsm_compose.stats import (
    Array,
    Columns,
    Interval,
    McNemar,
    clustered_bootstrap,
    clustered_rate,
    mcnemar,
    multiway_estimates,
)

__all__ = ["Category", "GapReport", "Leakage", "Method", "Outcomes", "classify", "gap_report"]

Method = Literal["multiway", "bootstrap"]


@dataclass(frozen=True)
class Leakage:
    """Original against modified last questions: a large difference hints at memorised originals.

    Attributes:
        original: accuracy on the last questions as published.
        difference: that less S2.
        test: exact test over rows (items of one row are one observation).
    """

    original: Interval
    difference: Interval
    test: McNemar


@dataclass(frozen=True)
class GapReport:
    """Δ and its parts. A field is None where a condition was not asked, or see `notes`.

    Attributes:
        n: number of items.
        s1: first questions alone.
        s2: modified last questions alone.
        s_comp: compositions.
        delta: S_comp − S1·S2 (equation 1 of the paper).
        delta_paired: S_comp − mean(q1 and q2).
        relative: Δ / (S1·S2).
        c1: first question right within the composition (a).
        cf_given_c1: final answer right where the first is (b).
        distraction: a − S1 (Figure 10).
        second_hop: b − S2 (Figure 11).
        distraction_term: (a − S1)·S2.
        second_hop_term: a·(b − S2).
        lucky: final answer right though the first is not (l); the third term.
        taxonomy: share of each kind of answer to the compositions.
        unparsable: share of answers without a number, by condition, over all items asked. They
            count as wrong above.
        n_parsable: items whose answers under all three conditions of Δ could be read.
        delta_parsable: Δ over those items. They are not a random part of all, so a difference to
            `delta` shows that format matters, not by how much.
        leakage: original against modified last questions.
        independent_context: last question after an unrelated one, less S2 (Figure 12).
        code: accuracy of code on the compositions.
        code_gain: that less S_comp.
        code_relative: code gain / S_comp (Figure 8).
        without_excluded: the report without the excluded items.
        excluded: number of those.
        level: of all intervals.
        method: by which they were made.
        notes: why a field is None.
    """

    n: int
    s1: Interval
    s2: Interval
    s_comp: Interval
    delta: Interval
    delta_paired: Interval
    relative: Interval | None
    c1: Interval
    cf_given_c1: Interval | None
    distraction: Interval
    second_hop: Interval | None
    distraction_term: Interval
    second_hop_term: Interval
    lucky: Interval
    taxonomy: dict[Category, float]
    unparsable: dict[str, float]
    n_parsable: int | None
    delta_parsable: Interval | None
    leakage: Leakage | None
    independent_context: Interval | None
    code: Interval | None
    code_gain: Interval | None
    code_relative: Interval | None
    without_excluded: GapReport | None
    excluded: int
    level: float
    method: Method
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return dataclasses.asdict(self)

    def summary(self) -> str:
        """The report as a plain-text table."""
        lines = [f"{self.n} items, {self.level:.0%} intervals ({self.method})"]
        for name, label in _ROWS.items():
            lines += _row(label, getattr(self, name))
        if self.leakage is not None:
            lines += _row("original Q2 alone", self.leakage.original)
            lines += _row("  less S2 (leakage)", self.leakage.difference)
            lines += [f"  McNemar mid-p {self.leakage.test.p_mid:.3g}"]
        lines += ["", "answers to the compositions"]
        lines += [f"  {name:<31}{share:7.1%}" for name, share in self.taxonomy.items() if share]
        if self.unparsable:
            lines += ["", "answers without a number (counted as wrong above)"]
            lines += [f"  {name:<31}{share:7.1%}" for name, share in self.unparsable.items()]
        lines += [f"note: {note}" for note in self.notes]
        if self.without_excluded is not None:
            lines += [
                "",
                f"without {self.excluded} excluded items",
                self.without_excluded.summary(),
            ]
        return "\n".join(lines)


_ROWS = {
    "s1": "S1, first question alone",
    "s2": "S2, modified question alone",
    "s_comp": "S_comp, composition",
    "delta": "Δ = S_comp − S1·S2",
    "distraction_term": "  distraction (a − S1)·S2",
    "second_hop_term": "  second hop a·(b − S2)",
    "lucky": "  lucky l",
    "delta_paired": "Δ paired by item",
    "relative": "Δ / (S1·S2)",
    "delta_parsable": "Δ, parsable items only",
    "c1": "a, Q1 right in composition",
    "cf_given_c1": "b, final right given Q1",
    "distraction": "a − S1",
    "second_hop": "b − S2",
    "independent_context": "after unrelated question, less S2",
    "code": "composition in code",
    "code_gain": "  less S_comp",
    "code_relative": "  relative gain",
}


def _row(label: str, interval: Interval | None) -> list[str]:
    if interval is None:
        return []
    return [f"{label:<33}{interval.value:8.3f}  [{interval.low:6.3f}, {interval.high:6.3f}]"]


def gap_report(
    outcomes: Outcomes,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    *,
    method: Method = "multiway",
    exclude: Collection[str] = (),
) -> GapReport:
    """Estimate the gap.

    Args:
        outcomes: of one model.
        level: of the intervals.
        resamples: of the bootstrap; "multiway" draws no samples.
        seed: of the bootstrap.
        method: "multiway" allows for rows that several items share in any role, by linearisation
            (score intervals for rates); it covers best in our simulations. "bootstrap" resamples
            groups of items that share a question in the same role, and takes percentiles.
        exclude: ids of items, or of rows whose labels are in doubt; `without_excluded` then has the
            report without items that are, or use, one of them. Others are of no account.

    Raises:
        StatisticsError: a bad level or method, no item left, or too few groups for the bootstrap.
    """
    if method not in get_args(Method):
        raise StatisticsError(f"method: expected 'multiway' or 'bootstrap', got {method!r}.")
    ids = list(exclude)
    dropped = np.logical_or.reduce(
        [np.isin(labels, ids) for labels in (outcomes.item_ids, *outcomes.clusters)]
    )
    kept = None
    if ids:
        if dropped.all():
            raise StatisticsError("exclude: expected some item to be left, all are excluded.")
        kept = gap_report(outcomes.take(~dropped), level, resamples, seed, method=method)

    def intervals(of: Outcomes) -> dict[str, Interval | None]:
        clusters = label_codes(of.clusters, len(of))  # numbers compare faster than words
        if method == "bootstrap":
            columns = _columns(of)
            return clustered_bootstrap(columns, _both, clusters, level, resamples, seed)
        found: dict[str, Interval | None] = {
            name: clustered_rate(right, clusters, level) for name, right in _right(of).items()
        }
        if of.c1.any():
            given = [labels[of.c1] for labels in clusters]
            found["cf_given_c1"] = clustered_rate(of.cf[of.c1], given, level)
        for name, estimate in multiway_estimates(_columns(of), _gaps, clusters).items():
            found[name] = None if estimate is None else _within(name, estimate.interval(level))
        return found

    every = intervals(outcomes)
    readable = outcomes.parsable
    return GapReport(
        n=len(outcomes),
        **{name: _present(every, name) for name in _ALWAYS},
        relative=every["relative"],
        cf_given_c1=every.get("cf_given_c1"),
        second_hop=every["second_hop"],
        independent_context=every.get("independent_context"),
        code=every.get("code"),
        code_gain=every.get("code_gain"),
        code_relative=every.get("code_relative"),
        taxonomy={name: float((outcomes.category == name).mean()) for name in CATEGORIES},
        unparsable=dict(outcomes.unparsable),
        n_parsable=None if readable is None else int(readable.sum()),
        delta_parsable=(
            None
            if readable is None or not readable.any()
            else intervals(outcomes.take(readable))["delta"]
        ),
        leakage=_leakage(outcomes, every),
        without_excluded=kept,
        excluded=int(dropped.sum()),
        level=level,
        method=method,
        notes=tuple(_notes(outcomes, every)),
    )


_ALWAYS = (
    "s1", "s2", "s_comp", "delta", "delta_paired", "c1", "distraction", "distraction_term",
    "second_hop_term", "lucky",
)  # fmt: skip


def _right(of: Outcomes) -> dict[str, Any]:
    """Rates: means of arrays (n,) of booleans, by name in the report."""
    rates = {"s1": of.q1, "s2": of.q2, "s_comp": of.cf, "c1": of.c1, "lucky": of.cf & ~of.c1}
    asked = {"code": of.code, "original": of.original_q2}
    return rates | {name: right for name, right in asked.items() if right is not None}


def _columns(of: Outcomes) -> dict[str, Array]:
    """What the gaps are functions of the means of."""
    columns = {
        "q1": of.q1,
        "q2": of.q2,
        "both": of.q1 & of.q2,
        "c1": of.c1,
        "cf": of.cf,
        "right": of.c1 & of.cf,
        "independent": of.independent,
        "original": of.original_q2,
        "code": of.code,
    }
    return {name: column.astype(float) for name, column in columns.items() if column is not None}


def _gaps(m: Columns) -> dict[str, Any]:
    """Everything in the report that is not a rate, from means."""
    expected = m["q1"] * m["q2"]
    found = {
        "delta": m["cf"] - expected,
        "delta_paired": m["cf"] - m["both"],
        "relative": m["cf"] / expected - 1,
        "distraction": m["c1"] - m["q1"],
        "second_hop": m["right"] / m["c1"] - m["q2"],
        "distraction_term": (m["c1"] - m["q1"]) * m["q2"],
        "second_hop_term": m["right"] - m["c1"] * m["q2"],
    }
    if "independent" in m:
        found["independent_context"] = m["independent"] - m["q2"]
    if "original" in m:
        found["leakage"] = m["original"] - m["q2"]
    if "code" in m:
        found["code_gain"] = m["code"] - m["cf"]
        found["code_relative"] = m["code"] / m["cf"] - 1
    return found


def _both(m: Columns) -> dict[str, Any]:
    """Rates and gaps from means, for the bootstrap."""
    rates = {
        "s1": m["q1"],
        "s2": m["q2"],
        "s_comp": m["cf"],
        "c1": m["c1"],
        "cf_given_c1": m["right"] / m["c1"],
        "lucky": m["cf"] - m["right"],
    }
    return rates | {name: m[name] for name in ("code", "original") if name in m} | _gaps(m)


def _within(name: str, interval: Interval) -> Interval:
    """The interval without what no benchmark can show: differences of rates lie within ±1."""
    highest = np.inf if name in ("relative", "code_relative") else 1.0
    return Interval(interval.value, max(interval.low, -1.0), min(interval.high, highest))


def _present(found: Mapping[str, Interval | None], name: str) -> Interval:
    interval = found[name]
    if interval is None:
        raise AssertionError(f"{name} is a polynomial of means, and so always defined")
    return interval


def _leakage(of: Outcomes, found: Mapping[str, Interval | None]) -> Leakage | None:
    if of.original_q2 is None:
        return None
    test = mcnemar(of.original_q2, of.q2, of.q2_ids)
    return Leakage(_present(found, "original"), _present(found, "leakage"), test)


def _notes(of: Outcomes, found: Mapping[str, Interval | None]) -> list[str]:
    reasons = {
        "relative": "S1·S2 is zero: there is no relative gap",
        "second_hop": "no first answer is right within a composition: b is undefined",
        "code_relative": "S_comp is zero: there is no relative gain of code",
    }
    notes = [reason for name, reason in reasons.items() if name in found and found[name] is None]
    if of.parsable is not None and not of.parsable.any():
        notes.append("no item has answers that could be read under all three conditions")
    return notes
