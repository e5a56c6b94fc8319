"""Experiment B: do the estimators find what simulated reasoners were given?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from gsm_compose.gap import gap_report
from gsm_compose.simulate import Pairing, SimulatedReasoner

ITEMS: Final = 1200
ROWS: Final = 1319

# From a reasoner without a gap to a weak one with every way to fail; in the last two, questions
# differ in difficulty, so that items which share a question go wrong together.
REASONERS: Final[Mapping[str, SimulatedReasoner]] = {
    "no gap": SimulatedReasoner(e1=0.15, e2=0.25),
    "distracted": SimulatedReasoner(e1=0.15, e2=0.25, distraction=0.15, lucky=0.05),
    "loses the second hop": SimulatedReasoner(
        e1=0.1, e2=0.15, second_hop=0.2, ignore_x=0.05, difficulty=0.8
    ),
    "weak": SimulatedReasoner(
        e1=0.6, e2=0.7, distraction=0.2, second_hop=0.3, ignore_x=0.1, lucky=0.05, difficulty=0.8
    ),
}
QUANTITIES: Final = ("delta", "delta_paired", "distraction_term", "second_hop_term", "lucky")


def recover(reasoner: str, first: int, draws: int) -> dict[str, Any]:
    """Job: estimate the gap of a reasoner of known parameters, again and again.

    The design is the paper's: 1200 items from 1319 rows, every first question once, every last one
    twice.

    Args:
        reasoner: one of `REASONERS`.
        first: number of the first draw; draws with other numbers are independent.
        draws: how many.

    Returns:
        JSON values: for each of `QUANTITIES` the analytic value, the estimates and the ends of
        their 95 % intervals, draw by draw.
    """
    subject = REASONERS[reasoner]
    pairing = Pairing.reused(ITEMS, rows=ROWS)
    found: dict[str, dict[str, list[float]]] = {
        name: {"estimates": [], "low": [], "high": []} for name in QUANTITIES
    }
    for draw in range(first, first + draws):
        report = gap_report(subject.outcomes(pairing, draw), level=0.95)
        for name, columns in found.items():
            interval = getattr(report, name)
            columns["estimates"].append(interval.value)
            columns["low"].append(interval.low)
            columns["high"].append(interval.high)
    truth = subject.expected()
    return {
        "reasoner": reasoner,
        "quantities": {name: {"truth": truth[name], **found[name]} for name in QUANTITIES},
    }
