"""The loop: order, take, learn, publish. Everything else is what happens inside one of the four."""

from __future__ import annotations

import time
from collections.abc import Callable

from asyncrlhf.measured import RoundTimes
from asyncrlhf.rounds import Round
from asyncrlhf.schedule import RoundSchedule


def run_rounds(
    schedule: RoundSchedule,
    rounds: int,
    *,
    order: Callable[[int], None],
    take: Callable[[int], Round],
    learn: Callable[[Round], float],
    publish: Callable[[int], None],
    done: Callable[[int, RoundTimes], bool],
    first: int = 0,
) -> list[RoundTimes]:
    """Run rounds ``first`` to ``rounds``, generation at most ``schedule.ahead`` rounds ahead.

    The weights that rounds ``first`` to ``first + ahead`` are generated with must be published
    before. Round k + 1 + ahead is ordered as soon as the weights after round k are published, so
    that none of the callbacks has a say in staleness.

    Args:
        schedule: N, T and D.
        rounds: how many there are.
        order: has a round generated, by weights ``schedule.generation_version(index)``.
        take: waits for a round.
        learn: scores it if need be and trains on it; returns the seconds that scoring took.
        publish: makes the weights readable under this version; called only if a round needs them.
        done: called after every round; False stops.
        first: the first round, where a run is resumed.

    Returns:
        Measured seconds of every round.
    """
    measured = []
    for index in range(first, min(first + schedule.ahead + 1, rounds)):
        order(index)
    for index in range(first, rounds):
        waiting = time.perf_counter()
        taken = take(index)
        began = time.perf_counter()
        scoring = learn(taken)
        learned = time.perf_counter()
        following = index + 1 + schedule.ahead
        if following < rounds:
            publish((index + 1) * schedule.steps_per_round)
        ended = time.perf_counter()
        if following < rounds:
            order(following)
        times = RoundTimes(
            generate=taken.generate,
            score=taken.score + scoring,
            train=learned - began - scoring,
            publish=ended - learned,
            wait_for_rollout=began - waiting,
            actor_wait=taken.actor_wait,
            started=taken.started,
            ended=ended,
        )
        measured.append(times)
        if not done(index, times):
            break
    return measured
