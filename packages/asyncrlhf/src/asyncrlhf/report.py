"""What a run says about itself: times against the prediction, staleness, sample size."""

from __future__ import annotations

from collections import Counter
from math import isnan
from statistics import fmean, median
from typing import TYPE_CHECKING

from asyncrlhf.measured import Comparison, RoundTimes, compare, remaining_time
from asyncrlhf.schedule import RoundSchedule, simulate

if TYPE_CHECKING:
    from asyncrlhf.learner import Step
    from asyncrlhf.rounds import Round
    from asyncrlhf.settings import Scoring

_RECENT = 16  # rounds that the prediction of the end looks back on


class Report:
    """Tables of a run; ``str(report)`` is for people.

    Args:
        schedule: N, T, D.
        scoring: where rewards are computed.
    """

    def __init__(self, schedule: RoundSchedule, scoring: Scoring) -> None:
        self.schedule = schedule
        self.scoring = scoring
        self.times: list[RoundTimes] = []
        """Measured seconds of every round."""
        self.staleness: Counter[int] = Counter()
        """Optimizer steps by their staleness."""
        self.dropped = 0
        """Minibatches that were left out as too stale."""
        self.restarts = 0
        """How often an actor was started again."""
        self.regenerated = 0
        """Rounds that were generated again because an actor died."""
        self.sample_sizes: list[float] = []
        """Effective sample size of every step, as a share."""

    def add(self, times: RoundTimes) -> None:
        """A round is done."""
        self.times.append(times)

    def step(self, step: Step) -> None:
        """A step is done."""
        self.staleness[step.staleness] += 1
        self.dropped += step.dropped
        if "ess" in step.metrics:
            self.sample_sizes.append(step.metrics["ess"])

    def remaining(self, rounds_left: int) -> float:
        """Seconds until the end, as the timing model predicts from the last rounds."""
        return remaining_time(
            self.times[-_RECENT:], rounds_left, ahead=self.schedule.ahead, stages=self.scoring
        )

    def waiting(self) -> str:
        """Which side stands still longer: "learner" or "actor"."""
        recent = self.times[-_RECENT:]
        learner = fmean(times.wait_for_rollout for times in recent)
        actor = fmean(times.actor_wait for times in recent)
        return "learner" if learner > actor else "actor"

    def comparison(self) -> Comparison:
        """All rounds against the simulation at their median seconds."""
        seconds = {
            name: median(getattr(times, field) for times in self.times)
            for name, field in (
                ("g", "generate"),
                ("r", "score"),
                ("t", "train"),
                ("w", "publish"),
            )
        }
        predicted = simulate(
            rounds=len(self.times),
            ahead=self.schedule.ahead,
            minibatches=self.schedule.minibatches,
            epochs=self.schedule.epochs,
            stages=self.scoring,
            **seconds,
        )
        return compare(predicted, self.times)

    def __str__(self) -> str:
        if not self.times:
            return "no round is done yet"
        total = sum(self.staleness.values())
        rows = [f"{s:>6}  {n:>6}  {n / total:.1%}" for s, n in sorted(self.staleness.items())]
        lines = [
            f"{len(self.times)} rounds, {self.schedule.ahead} ahead",
            str(self.comparison()),
            "",
            " stale   steps",
            *rows,
        ]
        if self.dropped:
            lines.append(f"{self.dropped} minibatches were dropped as too stale")
        if self.restarts:
            lines.append(
                f"actors were started again {self.restarts} times; {self.regenerated} rounds were "
                "generated again"
            )
        if self.sample_sizes:
            lines.append(
                f"effective sample size: median {median(self.sample_sizes):.1%}, smallest "
                f"{min(self.sample_sizes):.1%} of the completions"
            )
        return "\n".join(lines)


def round_metrics(done: Round) -> dict[str, float]:
    """Means over the completions of a scored round, under the names of TRL's logs."""
    assert done.rewards is not None
    each = {
        f"rewards/{name}/mean": fmean(value for value in values if not isnan(value))
        for name, values in done.rewards.table.items()
        if not all(map(isnan, values))
    }
    kept = [float(s) for s, ok in zip(done.rewards.scores, done.rewards.valid, strict=True) if ok]
    lengths = [len(completion.ids) for completion in done.completions]
    ended = [completion.finish_reason == "stop" for completion in done.completions]
    mean = fmean(kept) if kept else 0.0
    return {
        **done.rewards.metrics,
        **each,
        "reward": mean,
        "reward_std": fmean((s - mean) ** 2 for s in kept) ** 0.5 if kept else 0.0,
        "reward/failed": float(len(lengths) - len(kept)),
        "completions/mean_length": fmean(lengths),
        "completions/max_length": float(max(lengths)),
        "completions/ended": fmean(ended),
        "time/generate": done.generate,
        "time/score": done.score,
        "time/actor_wait": done.actor_wait,
    }
