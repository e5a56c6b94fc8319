"""Rounds on their way: in order, each error with its round, nobody waits for ever."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("decapod.lm")

from asyncrlhf.engines import FakeEngine
from asyncrlhf.errors import ActorError, InvalidInputError, WaitTimeoutError, WeightUpdateError
from asyncrlhf.pipeline import Pipeline
from asyncrlhf.rewards import Rewards
from asyncrlhf.rounds import Orders, Round
from asyncrlhf.schedule import RoundSchedule
from asyncrlhf.supply import Supply
from asyncrlhf.transport import SharedMemory
from decapod.lm import EngineError, SamplingParams

PROMPTS = [(3, 4), (5,), (6, 7, 8), (9,), (10, 3)]


@dataclass(frozen=True)
class NoWeights:
    """A snapshot of nothing."""

    version: int
    checksum: str = "none"

    def __iter__(self) -> Iterator[Any]:
        return iter(())


class Inline(FakeEngine):
    placement = "inline"


def orders(per_round: int = 2, samples: int = 2, *, shuffle: bool = True) -> Orders:
    params = SamplingParams(max_new_tokens=4)
    return Orders(PROMPTS, params, per_round=per_round, samples=samples, seed=1, shuffle=shuffle)


def scored(done: Round) -> Rewards:
    n = len(done.completions)
    return Rewards(np.full(n, float(done.order.index)), np.ones(n, dtype=np.bool_))


@pytest.fixture
def opened() -> Iterator[Callable[..., Pipeline]]:
    """Makes pipelines that are closed at the end of the test."""
    made: list[Pipeline] = []

    def make(engine: Any, score: Any = None, timeout: float = 20.0) -> Pipeline:
        made.append(Pipeline(engine, score, timeout=timeout))
        return made[-1]

    yield make
    for pipeline in made:
        pipeline.close()


def submit(pipeline: Pipeline, index: int, version: int = 0) -> None:
    pipeline.submit(orders().order(index, version), NoWeights(version))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("score", [None, scored])
@pytest.mark.parametrize("kind", [FakeEngine, Inline])
def test_rounds_come_as_they_were_ordered(opened: Any, kind: Any, score: Any) -> None:
    slower_first = lambda call: 0.03 if call == 0 else 0.0  # noqa: E731
    pipeline = opened(kind(slower_first), score)
    for index in range(4):
        submit(pipeline, index)
    for index in range(4):
        done = pipeline.take(index)
        assert done.order == orders().order(index, 0)
        assert [c.id for c in done.completions] == [r.id for r in done.order.requests]
        assert done.checksum == "none"
        assert done.rewards is None or done.rewards.scores.tolist() == [float(index)] * 4
        assert (done.rewards is None) == (score is None)
        assert done.generate >= 0
        assert done.actor_wait >= 0


def test_a_version_is_loaded_once_for_all_its_rounds(opened: Any) -> None:
    loads: list[int] = []

    class Recording(FakeEngine):
        def load_weights(self, source: Any, version: int) -> None:
            loads.append(version)
            super().load_weights(source, version)

    pipeline = opened(Recording())
    for index, version in enumerate([0, 0, 0, 1, 1, 2]):
        submit(pipeline, index, version)
    rounds = [pipeline.take(index) for index in range(6)]
    assert loads == [0, 1, 2]
    versions = [{c.oldest_version for c in done.completions} for done in rounds]
    assert versions == [{0}, {0}, {0}, {1}, {1}, {2}]


def test_an_error_is_raised_where_its_round_is_taken_and_notes_it(opened: Any) -> None:
    pipeline = opened(FakeEngine(fail_at=[1]))
    for index in range(3):
        submit(pipeline, index)
    assert pipeline.take(0).order.index == 0
    with pytest.raises(EngineError, match="call 1") as caught:
        pipeline.take(1)
    assert caught.value.__notes__ == ["while round 1 was generated"]
    assert pipeline.take(2).order.index == 2


def test_an_error_of_an_inline_engine_notes_its_round(opened: Any) -> None:
    pipeline = opened(Inline(fail_at=[0]))
    with pytest.raises(EngineError) as caught:
        submit(pipeline, 5)
    assert caught.value.__notes__ == ["while round 5 was generated"]


def test_an_error_of_scoring_notes_its_round(opened: Any) -> None:
    def score(done: Round) -> Rewards:
        if done.order.index == 1:
            raise ZeroDivisionError("no judge")
        return scored(done)

    pipeline = opened(FakeEngine(), score)
    for index in range(3):
        submit(pipeline, index)
    pipeline.take(0)
    with pytest.raises(ZeroDivisionError) as caught:
        pipeline.take(1)
    assert caught.value.__notes__ == ["while round 1 was scored"]
    pipeline.take(2)


def test_a_round_that_does_not_come_is_named_with_the_engines_health(opened: Any) -> None:
    class Ill(FakeEngine):
        def health(self) -> str:
            return "the cable is out"

    pipeline = opened(Ill(), timeout=0.05)
    with pytest.raises(WaitTimeoutError, match=r"round 7 .*the cable is out"):
        pipeline.take(7)


class Stuck(FakeEngine):
    """Generates until it is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.entered, self.closed = threading.Event(), threading.Event()

    def generate(self, requests: Any) -> Any:
        self.entered.set()
        self.closed.wait(20)
        return super().generate(requests)

    def close(self) -> None:
        self.closed.set()
        super().close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c[:-1], "4 completions, got 3"),
        (lambda c: [*c, c[0]], "4 completions, got 5"),
        (lambda c: [replace(c[0], logprobs=c[0].logprobs[:-1]), *c[1:]], "a log-probability and"),
        (lambda c: [replace(c[0], version_spans=()), *c[1:]], "a version for each"),
        (lambda c: [replace(c[0], ids=(16,), logprobs=(0.0,)), *c[1:]], "got token 16 of 16"),
    ],
)
def test_answers_that_break_the_contract_are_refused(
    change: Callable[[list[Any]], list[Any]], message: str
) -> None:
    class Careless(FakeEngine):
        def generate(self, requests: Any) -> Any:
            return iter(change(list(super().generate(requests))))

    pipeline = Pipeline(Careless(), timeout=20.0, vocab_size=16)
    try:
        submit(pipeline, 0)
        with pytest.raises(ActorError, match=f"contract in round 0: expected .*{message}"):
            pipeline.take(0)
    finally:
        pipeline.close()


def test_closing_ends_the_threads_of_an_engine_at_work() -> None:
    before = set(threading.enumerate())
    engine = Stuck()
    pipeline = Pipeline(engine, scored, timeout=20)
    submit(pipeline, 0)
    submit(pipeline, 1)
    assert engine.entered.wait(20)
    pipeline.close()
    pipeline.close()
    assert set(threading.enumerate()) <= before


def test_a_pipeline_that_was_never_used_closes() -> None:
    before = set(threading.enumerate())
    Pipeline(FakeEngine(), scored).close()
    assert set(threading.enumerate()) <= before


def test_finished_rounds_are_seen_in_order_and_stay(opened: Any) -> None:
    pipeline = opened(FakeEngine(fail_at=[1]))
    assert pipeline.finished() == []
    for index in range(4):
        submit(pipeline, index)
    wait_until(lambda: len(pipeline.finished()) == 3)
    assert [done.order.index for done in pipeline.finished()] == [0, 2, 3]
    assert pipeline.take(2).order.index == 2
    assert [done.order.index for done in pipeline.finished()] == [0, 3]


def test_a_round_of_an_earlier_run_is_taken_like_any_other(opened: Any) -> None:
    first = opened(FakeEngine())
    submit(first, 3)
    done = first.take(3)
    again = opened(FakeEngine(fail_at=[0]))
    again.put_back(done)
    assert again.finished() == [done]
    assert again.take(3) is done


# --- orders ---------------------------------------------------------------------------------------


def test_every_pass_over_the_prompts_has_each_once_in_an_order_of_its_own() -> None:
    found = [row for index in range(10) for row in orders().rows(index)]
    passes = [found[i : i + 5] for i in range(0, 20, 5)]
    assert all(sorted(rows) == list(range(5)) for rows in passes)
    assert len({tuple(rows) for rows in passes}) > 1
    kept = [row for index in range(5) for row in orders(shuffle=False).rows(index)]
    assert kept == [*range(5), *range(5)]


def test_an_order_is_a_function_of_its_number_alone() -> None:
    made = orders()
    forwards = [made.order(index, 0) for index in range(6)]
    backwards = [orders().order(index, 0) for index in reversed(range(6))][::-1]
    assert forwards == backwards
    requests = [request for order in forwards for request in order.requests]
    assert len({request.seed for request in requests}) == len(requests)
    assert all(
        request.prompt == PROMPTS[order.rows[place // 2]]
        for order in forwards
        for place, request in enumerate(order.requests)
    )


def test_no_prompts_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="train_dataset"):
        Orders([], SamplingParams(max_new_tokens=1), per_round=1, samples=1, seed=0)


# --- weights --------------------------------------------------------------------------------------


@pytest.fixture
def supplied() -> Iterator[Callable[[Any], Supply]]:
    """Makes supplies that publish nothing but names of versions."""
    made: list[Supply] = []

    def make(engine: Any) -> Supply:
        made.append(
            Supply(engine, SharedMemory(), orders(), RoundSchedule(), score=None, timeout=20.0)
        )
        return made[-1]

    yield make
    for supply in made:
        supply.close()


def weights(value: float) -> list[tuple[str, Any]]:
    import torch

    return [("w", torch.full((2,), value))]


def test_a_round_of_other_weights_than_ordered_is_refused(supplied: Any) -> None:
    class Stubborn(FakeEngine):
        """Stays with its first weights."""

        def load_weights(self, source: Any, version: int) -> None:
            if version == 0:
                super().load_weights(source, version)

    supply = supplied(Stubborn())
    supply.begin(None, (2,))
    supply.publish_first(weights(0.0), None)
    for index in range(2):
        supply.order(index)
    for index in range(2):
        supply.take(index)
    supply.publish(weights(1.0), 1)
    supply.order(2)
    with pytest.raises(WeightUpdateError, match=r"round 2 .* weights 1"):
        supply.take(2)


def test_versions_are_let_go_when_no_round_needs_them(supplied: Any) -> None:
    supply = supplied(FakeEngine())
    supply.begin(None, (2,))
    supply.publish_first(weights(0.0), None)
    supply.publish(weights(1.0), 1)
    assert list(supply.snapshots) == [0, 1]
    supply.forget(1)
    assert list(supply.snapshots) == [1]


def test_nothing_is_started_before_it_begins_and_nothing_is_left_when_it_is_closed() -> None:
    before = set(threading.enumerate())
    supply = Supply(
        FakeEngine(), SharedMemory(), orders(), RoundSchedule(), score=scored, timeout=20.0
    )
    assert set(threading.enumerate()) <= before
    supply.close()
    assert supply.snapshots == {}
