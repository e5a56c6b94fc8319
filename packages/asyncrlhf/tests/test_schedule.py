from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from statistics import fmean
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrlhf import schedule
from asyncrlhf.errors import InvalidInputError
from asyncrlhf.measured import RoundTimes, compare, remaining_time
from asyncrlhf.schedule import (
    Layout,
    RoundSchedule,
    Timeline,
    predicted_makespan,
    predicted_round_time,
    simulate,
)

GRID = list(itertools.product((1, 2, 5), (1, 2), (0, 1, 2, 3)))
LAYOUTS: tuple[Layout, ...] = ("learner", "process")
seconds = st.floats(0.01, 10)
layouts = st.sampled_from(LAYOUTS)


def closed_form(n: int, t: int, d: int, rounds: int) -> list[int]:
    """Staleness written out round by round: the first D+1 all come from version 0."""
    within = [e * n + j for e in range(t) for j in range(n)]
    return [min(k, d) * n * t + s for k in range(rounds) for s in within]


# --- which weights generate what ---


@pytest.mark.parametrize(("n", "t", "d"), GRID)
def test_staleness_of_every_step_equals_the_closed_form(n: int, t: int, d: int) -> None:
    rounds = 9
    expected = closed_form(n, t, d, rounds)
    plan = RoundSchedule(minibatches=n, epochs=t, ahead=d)
    assert [plan.staleness(u) for u in range(rounds * n * t)] == expected
    for stages in LAYOUTS:
        simulated = simulate(
            g=1.0, r=0.5, t=2.0, rounds=rounds, ahead=d, minibatches=n, epochs=t, stages=stages
        )
        assert list(simulated.staleness) == expected


@pytest.mark.parametrize(("n", "t", "d"), GRID)
def test_maximum_mean_and_histogram_are_those_of_the_steps(n: int, t: int, d: int) -> None:
    rounds = 9
    plan = RoundSchedule(minibatches=n, epochs=t, ahead=d)
    every = closed_form(n, t, d, rounds)
    assert plan.max_staleness == max(every)
    assert plan.mean_staleness == fmean(every[d * n * t :])
    assert plan.histogram(rounds) == Counter(every)
    assert list(plan.histogram(rounds)) == sorted(set(every))


def test_one_minibatch_synchronous_is_never_stale_and_asynchronous_is_by_one() -> None:
    assert simulate(g=1, t=1, rounds=5, ahead=0).staleness == (0, 0, 0, 0, 0)
    assert simulate(g=1, t=1, rounds=5, ahead=1).staleness == (0, 1, 1, 1, 1)


@pytest.mark.parametrize(("n", "t", "d"), GRID)
def test_synchronous_rounds_start_fresh_and_others_a_whole_lead_behind(
    n: int, t: int, d: int
) -> None:
    plan = RoundSchedule(minibatches=n, epochs=t, ahead=d)
    for k in range(7):
        assert plan.staleness(plan.step_of(k, 0, 0)) == min(k, d) * n * t


@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 4), st.integers(0, 500))
def test_locate_inverts_step_of(n: int, t: int, d: int, u: int) -> None:
    plan = RoundSchedule(n, t, d)
    place = plan.locate(u)
    assert plan.step_of(*place) == u
    assert plan.generation_version(place.round) <= u


@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 6), st.integers(0, 60))
def test_a_limit_gives_the_largest_lead_that_keeps_it(n: int, t: int, d: int, limit: int) -> None:
    plan = RoundSchedule(n, t, d)
    fitting = [a for a in range(d + 1) if RoundSchedule(n, t, a).max_staleness <= limit]
    if fitting:
        assert plan.with_max_staleness(limit) == RoundSchedule(n, t, max(fitting))
    else:
        with pytest.raises(InvalidInputError) as caught:
            plan.with_max_staleness(limit)
        for part in (f"N={n}", f"T={t}", f"D={d}", f"got {limit}", "Lower N or T"):
            assert part in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"minibatches": 0}, "minibatches: expected an integer of at least 1 (N"),
        ({"epochs": 0}, "epochs: expected an integer of at least 1 (T"),
        ({"ahead": -1}, "ahead: expected an integer of at least 0 (D"),
        ({"minibatches": 1.5}, "got 1.5"),
    ],
)
def test_a_schedule_refuses_what_it_cannot_mean(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        RoundSchedule(**change)
    assert message in str(caught.value)


def test_a_step_that_is_not_in_a_round_is_refused() -> None:
    plan = RoundSchedule(minibatches=2, epochs=3)
    with pytest.raises(InvalidInputError, match="epoch: expected 0 to 2, got 3"):
        plan.step_of(0, 3, 0)
    with pytest.raises(InvalidInputError, match="minibatch: expected 0 to 1, got -1"):
        plan.step_of(0, 0, -1)
    with pytest.raises(InvalidInputError, match=r"step: .* got -1"):
        plan.locate(-1)


def test_a_schedule_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        RoundSchedule().ahead = 2  # type: ignore[misc]


def test_the_gate_for_loops_without_rounds_is_found_here_too() -> None:
    assert schedule.StalenessGate(2, 0).capacity() == 2


# --- how long it takes ---


@given(seconds, seconds, st.integers(1, 30))
def test_without_scoring_the_makespan_is_the_textbook_one(g: float, t: float, rounds: int) -> None:
    sync = simulate(g=g, t=t, rounds=rounds, ahead=0)
    assert sync.makespan == pytest.approx(rounds * (g + t))
    overlapped = simulate(g=g, t=t, rounds=rounds, ahead=1)
    assert overlapped.makespan == pytest.approx(g + (rounds - 1) * max(g, t) + t)


@pytest.mark.parametrize("stages", LAYOUTS)
@pytest.mark.parametrize("ahead", range(4))
def test_the_closed_forms_are_the_simulation_exactly(stages: Layout, ahead: int) -> None:
    # Whole seconds, so that sums are exact; some pipelines fill up, and in some the way round from
    # a publication to the next is what takes longest.
    round_trips = 0
    for g, r, t, w in itertools.product(range(4), range(4), range(4), range(2)):
        for rounds in (1, 2, 3, 5, 8):
            simulated = simulate(g=g, r=r, t=t, w=w, rounds=rounds, ahead=ahead, stages=stages)
            assert simulated.makespan == predicted_makespan(
                g=g, r=r, t=t, w=w, rounds=rounds, ahead=ahead, stages=stages
            )
            if rounds > ahead + 1:
                steady = predicted_round_time(g=g, r=r, t=t, w=w, ahead=ahead, stages=stages)
                assert simulated.round_time == pytest.approx(steady)
                round_trips += steady > max(g, r, t + w)
    if stages == "process":
        assert bool(round_trips) == (ahead <= 1)


@settings(deadline=None)
@given(
    st.tuples(seconds, seconds, seconds, seconds), st.integers(1, 25), st.integers(0, 5), layouts
)
def test_the_closed_form_holds_between_whole_seconds_too(
    durations: tuple[float, float, float, float], rounds: int, ahead: int, stages: Layout
) -> None:
    g, r, t, w = durations
    simulated = simulate(g=g, r=r, t=t, w=w, rounds=rounds, ahead=ahead, stages=stages)
    predicted = predicted_makespan(g=g, r=r, t=t, w=w, rounds=rounds, ahead=ahead, stages=stages)
    assert predicted == pytest.approx(simulated.makespan)


@pytest.mark.parametrize(
    ("stages", "ahead", "expected"),
    [
        ("learner", 0, 2 + 1 + 3 + 0.5),
        ("learner", 1, 1 + 3 + 0.5),
        ("process", 1, 3 + 0.5),  # the learner's; the way round, 6.5 / 2, is shorter
        ("process", 2, 3 + 0.5),
    ],
)
def test_a_round_takes_the_slowest_side_publication_included(
    stages: Layout, ahead: int, expected: float
) -> None:
    simulated = simulate(g=2, r=1, t=3, w=0.5, rounds=40, ahead=ahead, stages=stages)
    assert simulated.round_time == pytest.approx(expected)


@given(seconds, seconds, seconds, seconds)
def test_publishing_beside_generation_never_takes_longer_than_stopping_for_it(
    g: float, r: float, t: float, w: float
) -> None:
    stopping = max(g, r + t) + w
    assert predicted_round_time(g=g, r=r, t=t, w=w) <= stopping * (1 + 1e-12)
    assert predicted_round_time(g=g + w, r=r, t=t, w=w) == pytest.approx(stopping)


@settings(max_examples=100, deadline=None)
@given(st.data(), layouts, st.integers(1, 30))
def test_with_jitter_a_longer_lead_is_never_slower(
    data: st.DataObject, stages: Layout, rounds: int
) -> None:
    jitter = st.lists(st.floats(0, 10), min_size=rounds, max_size=rounds)
    g, r, t, w = (data.draw(jitter) for _ in range(4))
    makespans = [
        simulate(g=g, r=r, t=t, w=w, rounds=rounds, ahead=ahead, stages=stages).makespan
        for ahead in range(5)
    ]
    assert makespans == sorted(makespans, reverse=True)
    assert makespans[0] == pytest.approx(sum(g) + sum(r) + sum(t) + sum(w))


@settings(max_examples=100, deadline=None)
@given(st.data(), layouts, st.integers(0, 3), st.integers(1, 3), st.integers(1, 12))
def test_nobody_uses_what_is_not_there_yet_or_works_on_two_things(
    data: st.DataObject, stages: Layout, ahead: int, minibatches: int, rounds: int
) -> None:
    jitter = st.lists(st.floats(0, 10), min_size=rounds, max_size=rounds)
    g, r, t, w = (data.draw(jitter) for _ in range(4))
    timeline = simulate(
        g=g, r=r, t=t, w=w, rounds=rounds, ahead=ahead, minibatches=minibatches, stages=stages
    )
    published = {0: 0.0} | {e.version: e.end for e in timeline.of_kind("publish")}
    assert list(published) == [k * minibatches for k in range(rounds + 1)]
    rows = zip(
        *(timeline.of_kind(k) for k in ("generate", "score", "train", "publish")), strict=True
    )
    for generated, scored, trained, publication in rows:
        assert published[generated.version] <= generated.start
        assert generated.end <= scored.start
        assert scored.end <= trained.start
        assert trained.end <= publication.start
        assert publication.version == trained.version + minibatches
    for stage in timeline.stages:
        own = [e for e in timeline.events if e.stage == stage]
        assert all(a.end <= b.start for a, b in itertools.pairwise(own))


@settings(deadline=None)
@given(seconds, seconds, seconds, seconds, st.integers(1, 40), st.integers(0, 5), layouts)
def test_stages_bound_the_speedup_and_so_does_the_lead(
    g: float, r: float, t: float, w: float, rounds: int, ahead: int, stages: Layout
) -> None:
    sync = simulate(g=g, r=r, t=t, w=w, rounds=rounds, ahead=0, stages=stages)
    overlapped = simulate(g=g, r=r, t=t, w=w, rounds=rounds, ahead=ahead, stages=stages)
    bound = min(3 if stages == "process" else 2, ahead + 1) * (1 + 1e-9)
    gain = overlapped.speedup_over(sync)
    assert 1 - 1e-9 <= gain.ratio <= bound
    assert gain.time_reduction == pytest.approx(1 - 1 / gain.ratio)
    if rounds > ahead + 1:
        assert overlapped.speedup_over(sync, steady=True).ratio <= bound


def against_sync(ahead: int, **durations: Any) -> float:
    sync = simulate(rounds=60, ahead=0, **durations)
    return simulate(rounds=60, ahead=ahead, **durations).speedup_over(sync, steady=True).ratio


def test_known_speedups() -> None:
    assert against_sync(1, g=1, t=1) == pytest.approx(2)
    assert against_sync(1, g=3, t=1) == pytest.approx(4 / 3)
    assert against_sync(1, g=1, t=3) == pytest.approx(4 / 3)
    assert against_sync(1, g=2, r=1, t=1) == pytest.approx(2)
    # Three equal stages fill up only when the actor may be two rounds ahead.
    assert against_sync(1, g=1, r=1, t=1, stages="process") == pytest.approx(2)
    assert against_sync(2, g=1, r=1, t=1, stages="process") == pytest.approx(3)


def test_faster_is_said_as_ratio_and_as_reduction() -> None:
    # 230 against 142 are the compute times that the paper's Table 1 has.
    sync, overlapped = (simulate(g=0, t=x, rounds=1) for x in (230, 142))
    gain = overlapped.speedup_over(sync)
    assert gain == pytest.approx((1.6197, 0.3826), abs=1e-4)


@pytest.mark.parametrize(("g", "t"), [(1.0, 1.0), (3.0, 1.0), (1.0, 3.0), (2.0, 1.9)])
@pytest.mark.parametrize("ahead", [1, 3])
def test_steady_idle_fractions_are_one_minus_work_over_round(
    g: float, t: float, ahead: int
) -> None:
    timeline = simulate(g=g, t=t, rounds=20, ahead=ahead)
    assert timeline.idle("actor", steady=True) == pytest.approx(1 - g / max(g, t))
    assert timeline.idle("learner", steady=True) == pytest.approx(1 - t / max(g, t))
    assert timeline.idle("actor") == pytest.approx(1 - 20 * g / timeline.makespan)
    assert timeline.idle("learner") == pytest.approx(1 - 20 * t / timeline.makespan)


def test_scoring_and_publishing_are_work_of_the_learner_but_not_training() -> None:
    timeline = simulate(g=4, r=1, t=2, w=0.5, rounds=20)
    assert timeline.idle("learner", steady=True) == pytest.approx(0.5 / 4)
    assert 1 - timeline.share("train", steady=True) == pytest.approx(1 - 2 / 4)
    with pytest.raises(InvalidInputError, match="stage: expected one of actor, learner"):
        timeline.idle("scorer")
    apart = simulate(g=4, r=1, t=2, w=0.5, rounds=20, stages="process")
    assert apart.idle("scorer", steady=True) == pytest.approx(3 / 4)


@settings(deadline=None)
@given(st.data(), layouts, st.integers(0, 3), st.integers(1, 12))
def test_waits_and_work_of_a_stage_add_up(
    data: st.DataObject, stages: Layout, ahead: int, rounds: int
) -> None:
    jitter = st.lists(st.floats(0, 10), min_size=rounds, max_size=rounds)
    g, r, t, w = (data.draw(jitter) for _ in range(4))
    timeline = simulate(g=g, r=r, t=t, w=w, rounds=rounds, ahead=ahead, stages=stages)
    assert sum(timeline.round_times) == pytest.approx(timeline.makespan)
    learner = math.fsum([*t, *w, *(r if stages == "learner" else [])])
    assert math.fsum(timeline.waits("learner")) + learner == pytest.approx(timeline.makespan)
    last = timeline.of_kind("generate")[-1].end
    assert math.fsum(timeline.waits("actor")) + math.fsum(g) == pytest.approx(last)
    for stage in timeline.stages:
        assert 0 <= timeline.idle(stage) <= 1
        assert 0 <= timeline.idle(stage, steady=True) <= 1


def test_durations_may_be_given_per_round() -> None:
    constant = simulate(g=1.5, t=2, rounds=3)
    assert simulate(g=[1.5, 1.5, 1.5], t=(2, 2, 2), rounds=3) == constant
    slow_once = simulate(g=[1.5, 9.0, 1.5], t=2, rounds=3)
    assert slow_once.waits("learner") == (1.5, 7.0, 0.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"g": -1.0}, "g: expected seconds >= 0, got -1.0 in round 0"),
        ({"t": [1.0, math.nan, 1.0]}, "t: expected seconds >= 0, got nan in round 1"),
        ({"w": math.inf}, "w: expected seconds >= 0, got inf"),
        ({"r": [1.0]}, "r: expected one duration for all rounds or one for each of 3, got 1"),
        ({"rounds": 0}, "rounds: expected an integer of at least 1"),
        ({"ahead": -1}, "ahead: expected"),
        ({"stages": "both"}, "stages: expected one of learner, process, got 'both'"),
    ],
)
def test_a_simulation_refuses_what_it_cannot_run(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        simulate(**{"g": 1.0, "t": 1.0, "rounds": 3} | change)
    assert message in str(caught.value)


def test_runs_of_unequal_length_are_not_compared() -> None:
    long = simulate(g=1, t=1, rounds=4, minibatches=2)
    with pytest.raises(InvalidInputError, match=r"expected as many optimizer steps .* 4, got 8"):
        simulate(g=1, t=1, rounds=4).speedup_over(long)
    # The same work in other rounds is comparable: half as long, twice as many.
    assert simulate(g=0.5, t=0.5, rounds=8).speedup_over(long, steady=True).ratio == 1
    nothing = simulate(g=0, t=0, rounds=4)
    with pytest.raises(InvalidInputError, match="timelines that take time"):
        nothing.speedup_over(nothing)


# --- against what was measured ---


def as_measured(timeline: Timeline, clock: float = 0.0, factor: float = 1.0) -> list[RoundTimes]:
    """What a run would report that went exactly as simulated, but `factor` times as slow."""
    kinds = ("generate", "score", "train", "publish")
    columns = [timeline.of_kind(kind) for kind in kinds]
    return [
        RoundTimes(
            *(factor * (event.end - event.start) for event in events),
            wait_for_rollout=factor * learner,
            actor_wait=factor * actor,
            started=clock + factor * events[0].start,
            ended=clock + factor * events[3].end,
        )
        for *events, learner, actor in zip(
            *columns, timeline.waits("learner"), timeline.waits("actor"), strict=True
        )
    ]


@settings(deadline=None)
@given(st.data(), layouts, st.integers(0, 3), st.integers(1, 10))
def test_a_run_as_predicted_has_no_error(
    data: st.DataObject, stages: Layout, ahead: int, rounds: int
) -> None:
    jitter = st.lists(seconds, min_size=rounds, max_size=rounds)
    g, r, t, w = (data.draw(jitter) for _ in range(4))
    timeline = simulate(g=g, r=r, t=t, w=w, rounds=rounds, ahead=ahead, stages=stages)
    for row in compare(timeline, as_measured(timeline, clock=1000.0)).rows():
        assert row.measured == pytest.approx(row.predicted, abs=1e-9)


def test_a_run_twice_as_slow_has_an_error_of_one_hundred_percent() -> None:
    timeline = simulate(g=2, r=0.5, t=1, w=0.1, rounds=12)
    report = compare(timeline, as_measured(timeline, factor=2))
    for name in ("generate", "score", "train", "publish", "round", "makespan"):
        assert report[name].relative_error == pytest.approx(1)
    assert report["round"].predicted == 2
    assert report["learner idle"].measured == pytest.approx(timeline.idle("learner"))


def test_one_slow_round_does_not_move_the_median_round() -> None:
    timeline = simulate(g=1, t=1, rounds=12)
    hiccup = simulate(g=[1.0] * 6 + [30.0] + [1.0] * 5, t=1, rounds=12)
    report = compare(timeline, as_measured(hiccup))
    assert report["round"].relative_error == 0
    assert report["makespan"].measured == pytest.approx(13 + 29)


@pytest.mark.parametrize(
    ("g", "t", "ahead", "waiting"),
    [
        (3, 1, 1, "learner"),
        (1, 3, 1, "actor"),
        (1, 1, 1, "neither"),
        (1, 1, 0, "both"),
    ],
)
def test_the_side_that_stands_still_is_named(g: float, t: float, ahead: int, waiting: str) -> None:
    timeline = simulate(g=g, t=t, rounds=30, ahead=ahead)
    report = compare(timeline, as_measured(timeline))
    assert report.waiting == waiting
    assert str(report).endswith(f"waiting: {waiting}")


def test_the_report_is_a_table_with_aligned_columns() -> None:
    timeline = simulate(g=3, t=1, rounds=10)
    report = compare(timeline, as_measured(timeline, factor=1.031))
    head, *lines, _ = str(report).splitlines()
    assert len(lines) == len(report.rows())
    assert head.split() == ["predicted", "measured", "error"]
    assert "generate         3.000 s   3.093 s  +3.1%" in lines
    for end in (head.index("predicted") + 9, head.index("measured") + 8):
        assert {line[end - 1] for line in lines} <= {"s", "%"}


def test_the_remaining_time_is_the_rest_of_the_rounds_at_the_median_pace() -> None:
    timeline = simulate(g=1, r=0.5, t=2, w=0.25, rounds=20)
    done = as_measured(timeline)[:5]
    left = timeline.makespan - timeline.round_ends[4]
    assert remaining_time(done, 15, ahead=1) == pytest.approx(left)
    with pytest.raises(InvalidInputError, match="measured: expected the times of one round"):
        remaining_time([], 15, ahead=1)


def test_a_comparison_needs_a_measured_round_for_every_predicted_one() -> None:
    timeline = simulate(g=1, t=1, rounds=4)
    with pytest.raises(InvalidInputError, match=r"expected the 4 rounds .* simulate with rounds=2"):
        compare(timeline, as_measured(timeline)[:2])
