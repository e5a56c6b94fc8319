"""A paper's claim as data, with the rule that gives its verdict.

A claim is written down with its decision rule *before* the first job runs. The jobs make numbers,
the library condenses them to an :class:`Evidence` per claim, and the rule, which looks at the
interval and never at the eye, gives the verdict. :mod:`decapod.reproductions` does that.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, get_args

from decapod.jobs import Job, JobResult

Verdict = Literal["shown", "not shown", "reversed"]
Profile = Literal["quick", "standard", "full"]
PROFILES: tuple[Profile, ...] = get_args(Profile)

Cell = str | float | int | bool | None
_SLUG = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*")
_NAME = re.compile(r"[A-Za-z0-9]+(?:[-_][A-Za-z0-9]+)*")


@dataclass(frozen=True)
class Paper:
    """The paper whose claims are tested; ``url`` is where a reader finds it, "" if nowhere."""

    title: str
    authors: str
    venue: str
    year: int
    url: str


@dataclass(frozen=True)
class Evidence:
    """What the runs say about one claim.

    ``effect`` is the estimate of the claim's metric, ``low`` and ``high`` its interval (infinite
    where nothing bounds it, equal to the effect where it is exact), ``n`` how many ``unit`` it
    rests on ("seeds", "cells"), ``arms`` the metric of each arm by the claim's arm names, and
    ``detail`` a sentence on how the interval was made.

    Raises:
        ValueError: a NaN, an interval upside down, or a negative ``n``.
    """

    effect: float
    low: float
    high: float
    n: int
    unit: str
    arms: Mapping[str, float] = field(default_factory=dict)
    detail: str = ""

    def __post_init__(self) -> None:
        for name in ("effect", "low", "high"):
            if math.isnan(getattr(self, name)):
                raise ValueError(
                    f"Evidence.{name}: expected a number, got NaN. A measurement that failed is "
                    "an error of the run, not evidence; use -inf and inf for an unknown interval."
                )
        if self.low > self.high:
            raise ValueError(
                f"Evidence: expected low <= high, got low={self.low!r} > high={self.high!r}."
            )
        if self.n < 0:
            raise ValueError(f"Evidence.n: expected a count >= 0, got {self.n!r}.")


class Rule(Protocol):
    """A decision rule: reads the evidence, gives the verdict; the same evidence, the same verdict.

    ``text`` says the rule in plain words. Write rules as frozen dataclasses: their fields are part
    of the claim's fingerprint.
    """

    @property
    def text(self) -> str:
        """The rule in plain words."""
        ...

    def decide(self, evidence: Evidence) -> Verdict:
        """The verdict that follows from the evidence."""
        ...


def _plain(threshold: float) -> str:
    return f"{threshold:.12g}".replace("-", "\N{MINUS SIGN}")


@dataclass(frozen=True)
class Above:
    """Shown if the whole interval lies above ``threshold``, reversed if it lies wholly below."""

    threshold: float = 0.0

    @property
    def text(self) -> str:
        """The rule in plain words."""
        t = _plain(self.threshold)
        return (
            f"Shown if the whole interval lies above {t}; "
            f"reversed if it lies wholly below {t}; otherwise not shown."
        )

    def decide(self, evidence: Evidence) -> Verdict:
        """The verdict that follows from the evidence."""
        if evidence.low > self.threshold:
            return "shown"
        return "reversed" if evidence.high < self.threshold else "not shown"


@dataclass(frozen=True)
class Below:
    """Shown if the whole interval lies below ``threshold``, reversed if it lies wholly above."""

    threshold: float = 0.0

    @property
    def text(self) -> str:
        """The rule in plain words."""
        t = _plain(self.threshold)
        return (
            f"Shown if the whole interval lies below {t}; "
            f"reversed if it lies wholly above {t}; otherwise not shown."
        )

    def decide(self, evidence: Evidence) -> Verdict:
        """The verdict that follows from the evidence."""
        if evidence.high < self.threshold:
            return "shown"
        return "reversed" if evidence.low > self.threshold else "not shown"


@dataclass(frozen=True)
class Exactly:
    """Shown only if effect and interval equal ``target``: for recomputed counts."""

    target: float

    @property
    def text(self) -> str:
        """The rule in plain words."""
        return f"Shown only if the result is exactly {_plain(self.target)}; otherwise not shown."

    def decide(self, evidence: Evidence) -> Verdict:
        """The verdict that follows from the evidence."""
        exact = evidence.effect == evidence.low == evidence.high == self.target
        return "shown" if exact else "not shown"


@dataclass(frozen=True)
class Within:
    """Shown if the whole interval lies in [``low``, ``high``], reversed if it lies wholly outside.

    Raises:
        ValueError: ``low`` above ``high``.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if not self.low <= self.high:
            raise ValueError(f"Within: expected low <= high, got {self.low!r} and {self.high!r}.")

    @property
    def text(self) -> str:
        """The rule in plain words."""
        band = f"between {_plain(self.low)} and {_plain(self.high)}"
        return (
            f"Shown if the whole interval lies {band}; "
            "reversed if it lies wholly outside; otherwise not shown."
        )

    def decide(self, evidence: Evidence) -> Verdict:
        """The verdict that follows from the evidence."""
        if self.low <= evidence.low and evidence.high <= self.high:
            return "shown"
        outside = evidence.high < self.low or evidence.low > self.high
        return "reversed" if outside else "not shown"


def region(rule: Rule) -> tuple[float, float] | None:
    """The stretch of the effect's axis where ``rule`` says "shown"; None for a rule of one's own.

    The report draws it behind the interval.
    """
    match rule:
        case Above(threshold):
            return threshold, math.inf
        case Below(threshold):
            return -math.inf, threshold
        case Exactly(target):
            return target, target
        case Within(low, high):
            return low, high
    return None


@dataclass(frozen=True)
class Claim:
    """One claim of a paper with the rule that decides it.

    ``id`` is a slug, ``source`` the place in the paper ("Table 2"), ``arms`` the names of what is
    compared, ``metric`` what the effect measures, in words and with its unit.

    Raises:
        ValueError: ``id`` is not a slug, or a text is empty.
    """

    id: str
    statement: str
    source: str
    arms: tuple[str, ...]
    metric: str
    rule: Rule

    def __post_init__(self) -> None:
        if not _SLUG.fullmatch(self.id):
            raise ValueError(
                f"Claim.id: expected a slug of lower-case letters, digits and hyphens, "
                f"got {self.id!r}."
            )
        for name in ("statement", "source", "metric"):
            if not getattr(self, name).strip():
                raise ValueError(f"Claim.{name} of {self.id!r}: expected a text, got an empty one.")

    @property
    def fingerprint(self) -> str:
        """Sha256 (hex) of every field, the rule's type, text and fields included."""
        rule: object = self.rule
        fields: dict[str, str] = {}
        if dataclasses.is_dataclass(rule) and not isinstance(rule, type):
            fields = {f.name: repr(getattr(rule, f.name)) for f in dataclasses.fields(rule)}
        content = {
            "id": self.id,
            "statement": self.statement,
            "source": self.source,
            "arms": list(self.arms),
            "metric": self.metric,
            "rule": {
                "type": f"{type(rule).__module__}:{type(rule).__qualname__}",
                "text": self.rule.text,
                "fields": fields,
            },
        }
        canonical = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


@dataclass(frozen=True)
class Figure:
    """A figure for the report: SVG source, a caption, and ``alt``, what a reader must know of it
    who cannot see it. Make ``svg`` with :func:`decapod.report.svg_from_matplotlib`.
    """

    title: str
    svg: str
    caption: str
    alt: str


@dataclass(frozen=True)
class DataTable:
    """A table for the report; every row is as long as ``columns``.

    Raises:
        ValueError: a row of another length.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""

    def __post_init__(self) -> None:
        for i, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(
                    f"DataTable {self.title!r}: expected {len(self.columns)} cells in every row, "
                    f"got {len(row)} in row {i}."
                )


@dataclass(frozen=True)
class Findings:
    """What a library concludes from its jobs: evidence per claim id, and what to show with it."""

    evidence: Mapping[str, Evidence]
    figures: Sequence[Figure] = ()
    tables: Sequence[DataTable] = ()
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Reproduction:
    """A paper's claims and the way to test them.

    ``jobs(profile)`` lists the work, ``conclude(profile, results)`` gets the results of all those
    jobs in the list's order and condenses them. ``packages`` are the distributions whose versions
    are recorded with the outcome.

    Raises:
        ValueError: a name that is no identifier with hyphens, no claim, or a claim id twice.
    """

    name: str
    paper: Paper
    claims: tuple[Claim, ...]
    jobs: Callable[[Profile], Sequence[Job]]
    conclude: Callable[[Profile, Sequence[JobResult]], Findings]
    packages: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(
                f"Reproduction.name: expected letters and digits with single hyphens or "
                f"underscores, got {self.name!r}."
            )
        if not self.claims:
            raise ValueError(f"Reproduction {self.name!r}: expected at least one claim, got none.")
        ids = [claim.id for claim in self.claims]
        twice = sorted({i for i in ids if ids.count(i) > 1})
        if twice:
            raise ValueError(f"Reproduction {self.name!r}: claim ids used twice: {twice}.")
