"""Which weights generate which round, and how long a run takes, known before it starts.

A *round* of N minibatches is generated with one version of the weights and then trained on for T
epochs, one optimizer step a minibatch; the actor may be D rounds ahead of the learner. Everything
about staleness follows from (N, T, D) alone, see :class:`RoundSchedule`; how long it takes follows
from the seconds that each stage needs, see :func:`simulate`.

Two closed forms hold when these are constant. With `total` and `slowest` the sum and the largest
of the stages, which are (g, r+t+w) where the learner scores and (g, r, t+w) where a process of its
own does::

    seconds a round in steady state = max(slowest, total / (D+1))
    seconds of R rounds = total + (R-1) slowest + ((R-1) // (D+1)) max(0, total - (D+1) slowest)

They are the longest path through the rounds: it goes on at the slowest stage, or returns from a
publication to the actor, D+1 rounds later. With D=0 this is R (g+r+t+w). So asynchrony gains at
most as many times as there are stages, and at most D+1 times: three stages need D=2 for that.

With D=1 and scoring on the learner a round takes max(g, r+t+w): the actor goes on generating while
the learner publishes. Where publishing stops the actor as well (a broadcast, or time to load the
weights), that time is part of g, and a round takes max(g+w, r+t+w) = max(g, r+t) + w.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Literal, NamedTuple, get_args

from asyncrlhf.errors import InvalidInputError
from asyncrlhf.staleness import StalenessGate

__all__ = [
    "Event",
    "RoundSchedule",
    "Speedup",
    "StalenessGate",
    "Step",
    "Timeline",
    "predicted_makespan",
    "predicted_round_time",
    "simulate",
]

Stage = Literal["actor", "scorer", "learner"]
Kind = Literal["generate", "score", "train", "publish"]
Layout = Literal["learner", "process"]
Durations = float | Sequence[float]


class Step(NamedTuple):
    """Where in a run an optimizer step is; all three count from 0."""

    round: int
    epoch: int
    minibatch: int


@dataclass(frozen=True)
class RoundSchedule:
    """N, T and D, and all that follows from them about which weights generate what.

    Step u = kNT + eN + j trains on minibatch j of round k in epoch e. Round k is generated with
    version g(k) = max(0, k-D) NT, the weights after that many steps, so step u is s(u) = u - g(k)
    steps stale: it starts from version u. Source: arXiv 2410.18252, which has D=0 (synchronous)
    and D=1.

    Attributes:
        minibatches: N, in a round.
        epochs: T, over a round.
        ahead: D, rounds that the actor may be ahead; 0 is synchronous.

    Raises:
        InvalidInputError: N or T below 1, or D below 0.
    """

    minibatches: int = 1
    epochs: int = 1
    ahead: int = 1

    def __post_init__(self) -> None:
        _check_integer("minibatches", self.minibatches, 1, "N, the minibatches of a round")
        _check_integer("epochs", self.epochs, 1, "T, how often a round is trained on")
        _check_integer("ahead", self.ahead, 0, "D, rounds that the actor may be ahead; 0 for none")

    @property
    def steps_per_round(self) -> int:
        """NT, optimizer steps in a round."""
        return self.minibatches * self.epochs

    def generation_version(self, round: int) -> int:
        """g(k): version of the weights, in optimizer steps, that generate round k."""
        _check_integer("round", round, 0, "rounds count from 0")
        return max(0, round - self.ahead) * self.steps_per_round

    def step_of(self, round: int, epoch: int, minibatch: int) -> int:
        """The optimizer step u that trains on this minibatch in this epoch; inverts `locate`.

        Raises:
            InvalidInputError: there is no such round, epoch or minibatch.
        """
        _check_integer("round", round, 0, "rounds count from 0")
        for name, value, end in (
            ("epoch", epoch, self.epochs),
            ("minibatch", minibatch, self.minibatches),
        ):
            if not 0 <= value < end:
                raise InvalidInputError(f"{name}: expected 0 to {end - 1}, got {value}")
        return round * self.steps_per_round + epoch * self.minibatches + minibatch

    def locate(self, step: int) -> Step:
        """Round, epoch and minibatch of optimizer step u.

        Raises:
            InvalidInputError: the step is negative.
        """
        _check_integer("step", step, 0, "optimizer steps count from 0")
        round, rest = divmod(step, self.steps_per_round)
        return Step(round, *divmod(rest, self.minibatches))

    def staleness(self, step: int) -> int:
        """s(u): steps between the version that generated what step u trains on, and version u."""
        return step - self.generation_version(self.locate(step).round)

    @property
    def max_staleness(self) -> int:
        """(D+1)NT - 1: the last step of a round, from round D on."""
        return (self.ahead + 1) * self.steps_per_round - 1

    @property
    def mean_staleness(self) -> float:
        """D NT + (NT-1)/2: over the steps of a round, from round D on."""
        return self.ahead * self.steps_per_round + (self.steps_per_round - 1) / 2

    def histogram(self, rounds: int) -> dict[int, int]:
        """How many steps of the first `rounds` rounds have each staleness, smallest first."""
        _check_integer("rounds", rounds, 0, "how many to count")
        steps = range(rounds * self.steps_per_round)
        return dict(sorted(Counter(map(self.staleness, steps)).items()))

    def with_max_staleness(self, limit: int) -> RoundSchedule:
        """The same schedule, as far ahead as it may be for no step to be staler than `limit`.

        Never further ahead than this one is.

        Raises:
            InvalidInputError: a synchronous schedule is staler, which only N and T can change.
        """
        fits = (limit + 1) // self.steps_per_round - 1
        if fits < 0:
            least = self.steps_per_round - 1
            raise InvalidInputError(
                f"limit of the staleness: expected at least {least}, got {limit}; the last step of "
                f"a round of N={self.minibatches} minibatches and T={self.epochs} epochs is "
                f"N*T-1={least} steps stale even at D=0 (here, D={self.ahead}). Lower N or T, or "
                "raise the limit"
            )
        return replace(self, ahead=min(self.ahead, fits))


class Event(NamedTuple):
    """A stage worked on a round from `start` to `end`, in seconds since the run began.

    `version` is of the weights: those that generate, also at scoring; those that the first step of
    training starts from; those that are published.
    """

    round: int
    stage: Stage
    kind: Kind
    start: float
    end: float
    version: int


class Speedup(NamedTuple):
    """What "faster" can mean: 1.5 times the speed is a third less time."""

    ratio: float
    """T_other / T_this."""
    time_reduction: float
    """1 - T_this / T_other."""


@dataclass(frozen=True)
class Timeline:
    """Who did what when, as :func:`simulate` predicts it.

    Attributes:
        schedule: which weights generate which round.
        layout: who scores, the ``"learner"`` or a ``"process"`` of its own.
        events: in the order of rounds, and within one in the order of time.
    """

    schedule: RoundSchedule
    layout: Layout
    events: tuple[Event, ...] = field(repr=False)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Those that work at the same time."""
        return ("actor", "scorer", "learner") if self.layout == "process" else ("actor", "learner")

    def of_kind(self, kind: Kind) -> tuple[Event, ...]:
        """One event per round."""
        return tuple(event for event in self.events if event.kind == kind)

    @property
    def round_ends(self) -> tuple[float, ...]:
        """Seconds at which the weights of each round were published."""
        return tuple(event.end for event in self.of_kind("publish"))

    @property
    def round_times(self) -> tuple[float, ...]:
        """Seconds between one publication and the next; the first counts from the start."""
        ends = self.round_ends
        return tuple(b - a for a, b in zip((0.0, *ends), ends, strict=False))

    @property
    def makespan(self) -> float:
        """Seconds from the start to the last publication."""
        return self.round_ends[-1]

    @property
    def round_time(self) -> float:
        """Seconds a round in steady state: the mean without the filling of the pipeline."""
        rounds, times = self._steady_rounds(), self.round_times
        return math.fsum(times[k] for k in rounds) / len(rounds)

    @property
    def staleness(self) -> tuple[int, ...]:
        """Of every optimizer step: its version minus the one that generated its round."""
        steps = self.schedule.steps_per_round
        return tuple(
            step - generated.version
            for generated, trained in zip(
                self.of_kind("generate"), self.of_kind("train"), strict=True
            )
            for step in range(trained.version, trained.version + steps)
        )

    def share(self, kind: Kind, *, steady: bool = False) -> float:
        """Fraction of the time that goes into work of this kind; `steady` as in :meth:`idle`.

        1 - share("train") is the time without training, which :meth:`idle` counts only in part.
        """
        seconds = [event.end - event.start for event in self.of_kind(kind)]
        if not steady:
            return math.fsum(seconds) / self.makespan if self.makespan else 0.0
        rounds = self._steady_rounds()
        mean = math.fsum(seconds[k] for k in rounds) / len(rounds)
        return mean / self.round_time if self.round_time else 0.0

    def idle(self, stage: Stage, *, steady: bool = False) -> float:
        """Fraction of the time that a stage stands still; scoring and publishing are work.

        Args:
            stage: one of `stages`.
            steady: leave out how the pipeline fills and empties: 1 - seconds of work a round /
                seconds a round. Otherwise of the whole makespan.
        """
        _check_choice("stage", stage, self.stages)
        kinds = {event.kind for event in self.events if event.stage == stage}
        # What is worked ahead of a short stretch of uneven rounds can exceed its length.
        return max(0.0, 1 - math.fsum(self.share(kind, steady=steady) for kind in kinds))

    def waits(self, stage: Stage) -> tuple[float, ...]:
        """Seconds that a stage stood still for each round; the learner's first fills the pipeline.

        Args:
            stage: one of `stages`.
        """
        _check_choice("stage", stage, self.stages)
        waited = [0.0] * len(self.round_ends)
        free = 0.0
        for event in self.events:
            if event.stage == stage:
                waited[event.round] += event.start - free
                free = event.end
        return tuple(waited)

    def speedup_over(self, other: Timeline, *, steady: bool = False) -> Speedup:
        """How much less time than `other` this takes, as the ratio and as the reduction.

        Args:
            other: as many optimizer steps, such as the same with ``ahead=0``.
            steady: compare seconds a step in steady state, else makespans.

        Raises:
            InvalidInputError: another number of steps, or either takes no time.
        """
        mine, theirs = len(self.staleness), len(other.staleness)
        if mine != theirs:
            raise InvalidInputError(
                f"other: expected as many optimizer steps as this timeline has, {mine}, got "
                f"{theirs}; simulate it with rounds = {mine} / (minibatches * epochs)"
            )
        if steady:
            this = self.round_time / self.schedule.steps_per_round
            that = other.round_time / other.schedule.steps_per_round
        else:
            this, that = self.makespan, other.makespan
        if not (this and that):
            raise InvalidInputError(
                f"other: expected timelines that take time, got {this:g} s against {that:g} s"
            )
        return Speedup(that / this, 1 - this / that)

    def _steady_rounds(self) -> range:
        return whole_periods(len(self.round_ends), self.schedule.ahead + 1)


def simulate(
    *,
    g: Durations,
    t: Durations,
    r: Durations = 0.0,
    w: Durations = 0.0,
    rounds: int,
    ahead: int = 1,
    minibatches: int = 1,
    epochs: int = 1,
    stages: Layout = "learner",
) -> Timeline:
    """Run the schedule without running it: each stage takes the seconds that it is given.

    A stage works on the rounds in order, one at a time. The actor starts round k when it is free
    and version g(k) was published; the learner scores (or waits for the scorer), trains and
    publishes. Nothing else is waited for.

    Args:
        g: seconds to generate a round, and to load its weights where that stops the actor; one
            number, or one per round, such as measured or random ones.
        t: seconds to train on it, all epochs.
        r: seconds to score it, with rewards and reference.
        w: seconds of the learner to publish the weights after it.
        rounds: R.
        ahead: D, rounds that the actor may be ahead.
        minibatches: N, in a round.
        epochs: T, over a round.
        stages: two, where the ``"learner"`` scores, or three, where a ``"process"`` of its own
            does while the learner trains on the round before.

    Raises:
        InvalidInputError: a duration is negative or not finite, or there are not R of them; R, N
            or T below 1, D below 0.
    """
    schedule = RoundSchedule(minibatches, epochs, ahead)
    _check_integer("rounds", rounds, 1, "how many to simulate")
    _check_choice("stages", stages, get_args(Layout))
    durations = [
        _per_round(name, value, rounds) for name, value in (("g", g), ("r", r), ("t", t), ("w", w))
    ]
    free: dict[Stage, float] = {"actor": 0.0, "scorer": 0.0, "learner": 0.0}
    events: list[Event] = []

    def work(stage: Stage, kind: Kind, version: int, ready: float, seconds: float) -> float:
        start = max(free[stage], ready)
        free[stage] = start + seconds
        events.append(Event(k, stage, kind, start, free[stage], version))
        return free[stage]

    scorer: Stage = "scorer" if stages == "process" else "learner"
    version = 0
    published = {version: 0.0}
    for k, (generate, score, train, publish) in enumerate(zip(*durations, strict=True)):
        behind = schedule.generation_version(k)
        generated = work("actor", "generate", behind, published[behind], generate)
        scored = work(scorer, "score", behind, generated, score)
        trained = work("learner", "train", version, scored, train)
        version += schedule.steps_per_round
        published[version] = work("learner", "publish", version, trained, publish)
    return Timeline(schedule, stages, tuple(events))


def predicted_makespan(
    *,
    g: float,
    t: float,
    r: float = 0.0,
    w: float = 0.0,
    rounds: int,
    ahead: int = 1,
    stages: Layout = "learner",
) -> float:
    """Seconds of R rounds of constant durations: the closed form that :func:`simulate` gives.

    Args and errors as there. At w=0 and D=1, it is g + (R-1) max(g, r+t) + r + t.
    """
    _check_integer("rounds", rounds, 1, "how many to predict")
    seconds = _seconds_of_stages(g, r, t, w, ahead, stages)
    total, slowest = math.fsum(seconds), max(seconds)
    excess = max(0.0, total - (ahead + 1) * slowest)
    return total + (rounds - 1) * slowest + (rounds - 1) // (ahead + 1) * excess


def predicted_round_time(
    *,
    g: float,
    t: float,
    r: float = 0.0,
    w: float = 0.0,
    ahead: int = 1,
    stages: Layout = "learner",
) -> float:
    """Seconds a round in steady state, at constant durations; arguments as in :func:`simulate`."""
    seconds = _seconds_of_stages(g, r, t, w, ahead, stages)
    return max(*seconds, math.fsum(seconds) / (ahead + 1))


def whole_periods(rounds: int, period: int) -> range:
    # Publications repeat their pattern every D+1 rounds; after the first, it holds at once.
    first = (rounds - 1) % period if rounds > period else 0
    return range(min(first + 1, rounds - 1), rounds)


def _seconds_of_stages(
    g: float, r: float, t: float, w: float, ahead: int, stages: Layout
) -> tuple[float, ...]:
    _check_integer("ahead", ahead, 0, "D, rounds that the actor may be ahead; 0 for none")
    _check_choice("stages", stages, get_args(Layout))
    for name, value in (("g", g), ("r", r), ("t", t), ("w", w)):
        _per_round(name, value, 1)
    return (g, r, t + w) if stages == "process" else (g, r + t + w)


def _per_round(name: str, value: Durations, rounds: int) -> list[float]:
    if isinstance(value, (float, Real)):
        seconds = [float(value)] * rounds
    else:
        seconds = [float(x) for x in value]
    if len(seconds) != rounds:
        raise InvalidInputError(
            f"{name}: expected one duration for all rounds or one for each of {rounds}, got "
            f"{len(seconds)}"
        )
    for k, x in enumerate(seconds):
        if not (math.isfinite(x) and x >= 0):
            raise InvalidInputError(f"{name}: expected seconds >= 0, got {x} in round {k}")
    return seconds


def _check_integer(name: str, value: object, least: int, what: str) -> None:
    if not isinstance(value, int) or value < least:
        raise InvalidInputError(
            f"{name}: expected an integer of at least {least} ({what}), got {value!r}"
        )


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise InvalidInputError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
