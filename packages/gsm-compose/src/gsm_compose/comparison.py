"""Is one model's gap larger than another's, on the same items?"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gsm_compose.errors import StatisticsError
from gsm_compose.outcomes import Outcomes
from gsm_compose.stats import Array, Columns, Interval, holm, multiway_estimates


@dataclass(frozen=True)
class Comparison:
    """The first model less the second, item by item.

    Attributes:
        names: of the two models.
        n: number of items, the same for both.
        s_comp: difference of S_comp.
        delta: difference of Δ.
        delta_paired: difference of paired Δ.
        p: two-sided p-value of equal Δ.
        p_holm: the same adjusted for all comparisons made together (Holm 1979).
    """

    names: tuple[str, str]
    n: int
    s_comp: Interval
    delta: Interval
    delta_paired: Interval
    p: float
    p_holm: float


def compare(
    first: Outcomes,
    second: Outcomes,
    level: float = 0.95,
    names: tuple[str, str] = ("first", "second"),
) -> Comparison:
    """Difference of two models' gaps, with intervals that use that the items are the same.

    Args:
        first: of one model.
        second: of the other on the same items, in any order.
        level: of the intervals.
        names: of the models.

    Raises:
        StatisticsError: the items, or the rows they use, are not the same.
    """
    second = _aligned(first, second, names)
    columns = {
        f"{side}{name}": column
        for side, outcomes in zip("ab", (first, second), strict=True)
        for name, column in _columns(outcomes).items()
    }
    found = multiway_estimates(columns, _differences, first.clusters)
    defined = {name: estimate for name, estimate in found.items() if estimate is not None}
    p = defined["delta"].p_value()
    intervals = {name: estimate.interval(level) for name, estimate in defined.items()}
    return Comparison(names, len(first), p=p, p_holm=p, **intervals)


def compare_all(outcomes: Mapping[str, Outcomes], level: float = 0.95) -> tuple[Comparison, ...]:
    """Every pair of models, p-values adjusted for their number.

    Args:
        outcomes: by name of the model, at least two.
        level: of the intervals, which are not adjusted.

    Raises:
        StatisticsError: as `compare`, or fewer than two models.
    """
    if len(outcomes) < 2:
        raise StatisticsError(f"outcomes: expected at least two models, got {len(outcomes)}.")
    found = [
        compare(outcomes[a], outcomes[b], level, (a, b))
        for a, b in itertools.combinations(outcomes, 2)
    ]
    adjusted = holm([comparison.p for comparison in found])
    return tuple(
        replace(comparison, p_holm=float(p)) for comparison, p in zip(found, adjusted, strict=True)
    )


def _aligned(first: Outcomes, second: Outcomes, names: tuple[str, str]) -> Outcomes:
    """The second in the order of the first."""
    if set(first.item_ids.tolist()) != set(second.item_ids.tolist()):
        raise StatisticsError(
            f"item_ids: expected {names[1]} to have answered the items of {names[0]}, got other "
            "items. Keep those that both have with Outcomes.take."
        )
    place = {item: position for position, item in enumerate(second.item_ids.tolist())}
    second = second.take(np.array([place[item] for item in first.item_ids.tolist()]))
    if any((a != b).any() for a, b in zip(first.clusters, second.clusters, strict=True)):
        raise StatisticsError(
            f"q1_ids, q2_ids: expected the same rows for the same items, those of {names[0]} and "
            f"{names[1]} differ."
        )
    return second


def _columns(of: Outcomes) -> dict[str, Array]:
    columns = {"q1": of.q1, "q2": of.q2, "both": of.q1 & of.q2, "cf": of.cf}
    return {name: column.astype(float) for name, column in columns.items()}


def _differences(m: Columns) -> dict[str, Any]:
    return {
        "s_comp": m["acf"] - m["bcf"],
        "delta": (m["acf"] - m["aq1"] * m["aq2"]) - (m["bcf"] - m["bq1"] * m["bq2"]),
        "delta_paired": (m["acf"] - m["aboth"]) - (m["bcf"] - m["bboth"]),
    }
