"""Where the parts of a small forest plot lie: the rule's threshold is always in the middle."""

from __future__ import annotations

import math
from dataclasses import dataclass

from decapod.claims import Evidence
from decapod.reproductions import Decided


@dataclass(frozen=True)
class Glyph:
    """Positions in per cent of the width, and the numbers that ``edges`` stand for.

    ``band`` is the stretch where the rule says "shown", ``open_low`` and ``open_high`` mark an end
    of the interval that is infinite.
    """

    effect: float
    low: float
    high: float
    open_low: bool
    open_high: bool
    band: tuple[float, float] | None
    edges: tuple[tuple[float, float], ...]


def glyph(claim: Decided) -> Glyph | None:
    """The forest-plot glyph of a claim; None where there is no evidence."""
    if claim.evidence is None:
        return None
    edges = [edge for edge in claim.region or () if math.isfinite(edge)]
    middle = sum(edges) / len(edges) if edges else 0.0
    span = _span(claim.evidence, edges, middle)

    def position(x: float) -> float:
        return round(min(max(50 + 50 * (x - middle) / span, 0.0), 100.0), 2)

    evidence = claim.evidence
    return Glyph(
        effect=position(evidence.effect),
        low=position(evidence.low),
        high=position(evidence.high),
        open_low=math.isinf(evidence.low),
        open_high=math.isinf(evidence.high),
        band=(position(claim.region[0]), position(claim.region[1])) if claim.region else None,
        edges=tuple((position(edge), edge) for edge in sorted(set(edges) or {0.0})),
    )


def _span(evidence: Evidence, edges: list[float], middle: float) -> float:
    shown = [evidence.effect, evidence.low, evidence.high, *edges]
    reach = max((abs(x - middle) for x in shown if math.isfinite(x)), default=0.0)
    # Some air, so that no cap touches the edge.
    return reach * 1.15 if reach > 0 else 1.0
