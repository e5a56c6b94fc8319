"""What a run took, held against what was predicted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal, NamedTuple, get_args

from asyncrlhf.errors import InvalidInputError
from asyncrlhf.schedule import Kind, Layout, Timeline, predicted_round_time

_WAITING = 0.05  # a side that stands still for less of a run does not count as waiting


class RoundTimes(NamedTuple):
    """Measured seconds of one round.

    The actor's work, the work of whoever scores, the learner's, and how long each side stood still
    before it could start on the round; then, on any one clock, when generation started and when
    the weights were published.
    """

    generate: float
    score: float
    train: float
    publish: float
    wait_for_rollout: float
    actor_wait: float
    started: float
    ended: float


def remaining_time(
    measured: Sequence[RoundTimes], rounds_left: int, *, ahead: int, stages: Layout = "learner"
) -> float:
    """Seconds that a run still takes, from the medians so far: for a progress bar.

    Args:
        measured: the rounds that are done, or the last few of them.
        rounds_left: those not yet published.
        ahead: D.
        stages: as in :func:`simulate`.

    Raises:
        InvalidInputError: no round was measured.
    """
    _check_measured(measured)
    g, r, t, w = (median(getattr(x, name) for x in measured) for name in RoundTimes._fields[:4])
    return rounds_left * predicted_round_time(g=g, r=r, t=t, w=w, ahead=ahead, stages=stages)


class ComparisonRow(NamedTuple):
    """One quantity, in seconds, or as a fraction of the makespan where `unit` is empty.

    `relative_error` is measured / predicted - 1; None for waits and fractions, which can be near 0,
    and for work that was predicted to take no time.
    """

    quantity: str
    unit: Literal["s", ""]
    predicted: float
    measured: float
    relative_error: float | None


@dataclass(frozen=True)
class Comparison:
    """How well a prediction held; printed as a table, indexed by the names of its rows.

    ``generate``, ``score``, ``train`` and ``publish`` are the medians of that work; ``round`` is a
    round in steady state, as the median over stretches of D+1 rounds, which one slow round on a
    shared machine does not move; ``makespan`` is all rounds. ``actor waits`` and ``learner waits``
    are what they stood still for after the first round, ``actor idle`` and ``learner idle`` their
    idle fractions of the makespan.

    Attributes:
        waiting: who stands still for more than 5 % of the measured makespan, so that the other one
            is the bottleneck. In a synchronous run both are.
    """

    waiting: Literal["actor", "learner", "both", "neither"]
    _rows: tuple[ComparisonRow, ...]

    def rows(self) -> tuple[ComparisonRow, ...]:
        """All quantities."""
        return self._rows

    def __getitem__(self, quantity: str) -> ComparisonRow:
        return {row.quantity: row for row in self._rows}[quantity]

    def __str__(self) -> str:
        cells = [("", "predicted", "measured", "error")]
        for name, unit, predicted, measured, error in self._rows:
            form = "{:.3f} s" if unit else "{:.1%}"
            shown = "" if error is None else f"{error:+.1%}"
            cells.append((name, form.format(predicted), form.format(measured), shown))
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join([name.ljust(widths[0]), *map(str.rjust, rest, widths[1:])]).rstrip()
            for name, *rest in cells
        ]
        return "\n".join([*lines, f"waiting: {self.waiting}"])


def compare(predicted: Timeline, measured: Sequence[RoundTimes]) -> Comparison:
    """Hold a prediction against what a run took.

    Args:
        predicted: of :func:`simulate`, for the same schedule and as many rounds. Given the measured
            durations of each round it shows what the model leaves out; given their medians, or
            those of a pilot, how well a run can be foreseen.
        measured: all rounds of the run, in order.

    Raises:
        InvalidInputError: not one measured round per predicted round.
    """
    _check_measured(measured)
    if len(measured) != len(predicted.round_ends):
        raise InvalidInputError(
            f"measured: expected the {len(predicted.round_ends)} rounds that were predicted, got "
            f"{len(measured)}; simulate with rounds={len(measured)}"
        )
    start = min(x.started for x in measured)
    ends = [x.ended - start for x in measured]
    makespan = max(ends)
    period = predicted.schedule.ahead + 1
    waits = {
        "actor": math.fsum(x.actor_wait for x in measured[1:]),
        "learner": math.fsum(x.wait_for_rollout for x in measured[1:]),
    }
    on_learner = predicted.layout == "learner"
    work = {
        "actor": math.fsum(x.generate for x in measured),
        "learner": math.fsum(x.train + x.publish + on_learner * x.score for x in measured),
    }

    kinds: tuple[Kind, ...] = get_args(Kind)
    sides: tuple[Literal["actor", "learner"], ...] = ("actor", "learner")
    rows = [
        _timed(
            kind,
            median(event.end - event.start for event in predicted.of_kind(kind)),
            median(getattr(x, kind) for x in measured),
        )
        for kind in kinds
    ]
    rows += [
        _timed("round", _median_round(predicted.round_ends, period), _median_round(ends, period)),
        _timed("makespan", predicted.makespan, makespan),
    ]
    for side in sides:
        foreseen = math.fsum(predicted.waits(side)[1:])
        rows.append(ComparisonRow(f"{side} waits", "s", foreseen, waits[side], None))
    for side in sides:
        idle = max(0.0, 1 - work[side] / makespan) if makespan else 0.0
        rows.append(ComparisonRow(f"{side} idle", "", predicted.idle(side), idle, None))
    waiting = [side for side in sides if waits[side] > _WAITING * makespan]
    both = len(waiting) == len(sides)
    return Comparison("both" if both else waiting[0] if waiting else "neither", tuple(rows))


def _timed(quantity: str, predicted: float, measured: float) -> ComparisonRow:
    error = measured / predicted - 1 if predicted else None
    return ComparisonRow(quantity, "s", predicted, measured, error)


def _median_round(ends: Sequence[float], period: int) -> float:
    period = min(period, len(ends) - 1)
    if period == 0:
        return ends[0]
    return median((b - a) / period for a, b in zip(ends, ends[period:], strict=False))


def _check_measured(measured: Sequence[RoundTimes]) -> None:
    if not measured:
        raise InvalidInputError(
            "measured: expected the times of one round at least, got none; wait for the first"
        )
