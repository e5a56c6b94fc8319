"""What is found out about a value function, to print, to keep and to draw."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vineppo.diagnostics.intervals import Interval, mean_interval
from vineppo.diagnostics.reliability import Calibration
from vineppo.errors import InvalidInputError


@dataclass(frozen=True)
class PositionBin:
    """States from ``low`` to ``high`` of their trajectory.

    Attributes:
        low: lower edge of the normalised step position, inside.
        high: upper edge, outside but for the last bin.
        error: mean absolute error.
    """

    low: float
    high: float
    error: Interval


@dataclass(frozen=True)
class Points:
    """The single states behind a report; (S,) each, in the order in which they were given.

    Attributes:
        predictions: by the value function.
        truth: true values.
        clusters: numbers of the clusters.
        positions: in the trajectory; None where they were not given.
    """

    predictions: tuple[float, ...]
    truth: tuple[float, ...]
    clusters: tuple[int, ...]
    positions: tuple[float, ...] | None


@dataclass(frozen=True)
class ValueReport:
    """How good a value function is (Sec. 7 of arXiv 2410.01679), with intervals over clusters.

    Truths have noise of their own, of the standard error that they were given with. It adds to
    ``mae`` and takes from ``within`` and all scores of order, for every value function alike;
    ``mse`` is free of it.

    Attributes:
        name: of the value function.
        level: confidence of the intervals.
        tolerance: of ``within``.
        rollouts: mean number behind a truth; 0 where truths are exact.
        mae: mean |prediction - truth|.
        mae_floor: what ``mae`` would be for exact values, by the noise of the truth alone, taken as
            normal: √(2/π) times its mean standard error.
        bias: mean (prediction - truth).
        mse: mean squared error without the truth's own variance: mean ((prediction - truth)² -
            (standard error)²), unbiased for the error against exact values, so it may fall
            below 0 by chance.
        within: share of states with |prediction - truth| up to ``tolerance``.
        top1: how often the candidate predicted best is truly a best one; equal predictions count
            as one of them picked at random. Sets of truly equal candidates are left out. None:
            no candidates were given.
        chance: ``top1`` of a random pick, 1/m for m candidates, more where several are best; NaN
            where no set has a best.
        pairwise: share of the pairs of candidates of different truth that are predicted in order;
            equal predictions count one half.
        pairwise_strict: share of all pairs whose differences have a product above 0, so that every
            tie counts as wrong; what the reference code reports.
        by_position: mean absolute error by normalised step position, for the bins with a state;
            empty where positions were not given.
        calibration: mean truth by prediction.
        points: what all this was made from.
    """

    name: str
    level: float
    tolerance: float
    rollouts: float
    mae: Interval
    mae_floor: float
    bias: Interval
    mse: Interval
    within: Interval
    top1: Interval | None
    chance: float | None
    pairwise: Interval | None
    pairwise_strict: Interval | None
    by_position: tuple[PositionBin, ...]
    calibration: Calibration
    points: Points

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary that ``json.dumps`` takes; numbers that are not finite are None."""
        data: dict[str, Any] = {}
        for name in ("name", "level", "tolerance", "rollouts", "mae_floor"):
            data[name] = getattr(self, name)
        for name in _INTERVALS:
            interval: Interval | None = getattr(self, name)
            data[name] = None if interval is None else interval.to_json()
        data["chance"] = (
            None if self.chance is None or math.isnan(self.chance) else float(self.chance)
        )
        data["by_position"] = [
            {"low": b.low, "high": b.high, "error": b.error.to_json()} for b in self.by_position
        ]
        data["calibration"] = self.calibration.to_json()
        points = self.points
        data["points"] = {
            "predictions": list(points.predictions),
            "truth": list(points.truth),
            "clusters": list(points.clusters),
            "positions": None if points.positions is None else list(points.positions),
        }
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ValueReport:
        """The report that :meth:`to_json` wrote.

        Raises:
            InvalidInputError: a part of it is missing.
        """
        try:
            intervals = {
                name: None if data[name] is None else Interval.from_json(data[name])
                for name in _INTERVALS
            }
            points = data["points"]
            positions = points["positions"]
            chance = data["chance"]
            if chance is None and intervals["top1"] is not None:
                chance = math.nan
            return cls(
                name=data["name"],
                level=data["level"],
                tolerance=data["tolerance"],
                rollouts=data["rollouts"],
                mae_floor=data["mae_floor"],
                chance=chance,
                by_position=tuple(
                    PositionBin(b["low"], b["high"], Interval.from_json(b["error"]))
                    for b in data["by_position"]
                ),
                calibration=Calibration.from_json(data["calibration"]),
                points=Points(
                    tuple(points["predictions"]),
                    tuple(points["truth"]),
                    tuple(points["clusters"]),
                    None if positions is None else tuple(positions),
                ),
                **intervals,  # type: ignore[arg-type]
            )
        except (KeyError, TypeError) as error:
            raise InvalidInputError(
                f"data: expected what ValueReport.to_json wrote, got something else ({error!r})"
            ) from error

    def __str__(self) -> str:
        truth = f"truth of {self.rollouts:.0f} rollouts" if self.rollouts else "exact truth"
        rows = [("", "value", f"{self.level:.0%} interval", "n")]
        rows += [_row(label, interval) for label, interval in self._lines()]
        if self.chance is not None:
            rows.insert(_place(rows, "top-1"), ("  by chance", f"{self.chance:.3f}", "", ""))
        if self.rollouts:
            rows.insert(2, ("  of exact values", f"{self.mae_floor:.3f}", "", ""))
        head = f"{self.name}: {self.mae.n} states in {self.mae.clusters} clusters, {truth}"
        return "\n".join([head, *_aligned(rows)])

    def _lines(self) -> list[tuple[str, Interval]]:
        lines = [
            ("mean absolute error", self.mae),
            ("bias", self.bias),
            ("mean squared error", self.mse),
            (f"within {self.tolerance:g}", self.within),
        ]
        ranked = {
            "top-1": self.top1,
            "pairwise": self.pairwise,
            "pairwise, strict": self.pairwise_strict,
        }
        lines += [(label, found) for label, found in ranked.items() if found is not None]
        return lines + [
            (f"error at {b.low:.0%} to {b.high:.0%}", b.error) for b in self.by_position
        ]


_INTERVALS = ("mae", "bias", "mse", "within", "top1", "pairwise", "pairwise_strict")


def mae_difference(
    a: ValueReport, b: ValueReport, *, resamples: int = 1000, seed: int = 0
) -> Interval:
    """Mean absolute error of ``a`` minus that of ``b``, state by state: below 0, ``a`` is better.

    Both err on the same states, so the difference is known better than either.

    Args:
        a: a report.
        b: another one, of the same evaluation.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        InvalidInputError: the reports are about different states, or an option is out of range.
    """
    if (a.points.truth, a.points.clusters) != (b.points.truth, b.points.clusters):
        raise InvalidInputError(
            f"a, b: expected reports about the same states, got {a.name!r} with "
            f"{len(a.points.truth)} and {b.name!r} with {len(b.points.truth)}"
        )
    truth = np.array(a.points.truth)
    errors = (np.abs(np.array(report.points.predictions) - truth) for report in (a, b))
    return mean_interval(
        next(errors) - next(errors),
        a.points.clusters,
        level=a.level,
        resamples=resamples,
        seed=seed,
    )


def comparison_table(reports: Mapping[str, ValueReport]) -> str:
    """Value functions side by side, a line for each; text for people.

    Args:
        reports: of one evaluation.
    """
    shown = ("mae", "within", "top1", "pairwise")
    heads = ("", "mean abs. error", "within", "top-1", "pairwise")
    rows = [heads] + [
        (name, *("" if (x := getattr(report, field)) is None else str(x) for field in shown))
        for name, report in reports.items()
    ]
    return "\n".join(_aligned(rows))


def _row(label: str, interval: Interval) -> tuple[str, str, str, str]:
    ends = f"[{interval.low:.3f}, {interval.high:.3f}]"
    return label, f"{interval.value:.3f}", ends, str(interval.n)


def _place(rows: Sequence[tuple[str, ...]], label: str) -> int:
    return 1 + next(i for i, row in enumerate(rows) if row[0] == label)


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([name.ljust(widths[0]), *map(str.rjust, rest, widths[1:])]).rstrip()
        for name, *rest in rows
    ]
