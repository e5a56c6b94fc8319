"""Several engines as one: order, shares, failures, and versions that never mix."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("decapod")

from asyncrlhf.engines import FakeEngine, GenerationEngine, Replicas
from asyncrlhf.engines.replicas import split
from asyncrlhf.errors import ActorError, InvalidInputError, WaitTimeoutError, WeightUpdateError
from decapod.lm import EngineError, Request, RequestError, SamplingParams, sample_requests

PARAMS = SamplingParams(6, logprobs_of="sampler")
WEIGHTS = [("weight", torch.zeros(2))]


class Noted(FakeEngine):
    """Remembers what it was asked, and fails or waits when told to."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.asked: list[list[Request]] = []
        self.problem = ""
        self.before: Callable[[], None] = lambda: None
        self.before_load: Callable[[], None] = lambda: None

    def generate(self, requests: Any) -> Iterator[Any]:
        self.asked.append(list(requests))
        self.before()
        return super().generate(requests)

    def load_weights(self, source: Any, version: int) -> None:
        self.before_load()
        super().load_weights(source, version)

    def health(self) -> str:
        return self.problem


def some_requests(prompts: int = 6, each: int = 4) -> list[Request]:
    return sample_requests([[3, 4, i] for i in range(prompts)], PARAMS, seed=5, n=each)


def raising(error: Exception) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


# --- shares ---------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 9), max_size=20), st.integers(1, 6))
def test_shares_keep_order_and_prompts_together_and_differ_by_less_than_the_longest_run(
    runs: list[int], parts: int
) -> None:
    requests = [
        Request((i % 3, i), PARAMS, seed) for i, size in enumerate(runs) for seed in range(size)
    ]
    shares = split(requests, parts)
    assert len(shares) == parts
    assert [i for share in shares for i in share] == list(range(len(requests)))
    homes: dict[tuple[int, ...], set[int]] = {}
    for part, share in enumerate(shares):
        for i in share:
            homes.setdefault(requests[i].prompt, set()).add(part)
    assert all(len(parts_of) == 1 for parts_of in homes.values())
    for share in shares:
        assert abs(len(share) - len(requests) / parts) <= max(runs, default=0)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_completions_and_their_order_are_those_of_one_engine(count: int) -> None:
    replicas = Replicas([Noted() for _ in range(count)])
    assert isinstance(replicas, GenerationEngine)
    requests = some_requests()
    assert list(replicas.generate(requests)) == list(FakeEngine().generate(requests))
    replicas.load_weights(WEIGHTS, 3)
    alone = FakeEngine()
    alone.load_weights(WEIGHTS, 3)
    assert list(replicas.generate(requests)) == list(alone.generate(requests))
    assert list(replicas.generate([])) == []


def test_engines_work_at_the_same_time_on_equal_shares() -> None:
    meeting = threading.Barrier(3, timeout=20)
    engines = [Noted() for _ in range(3)]
    for engine in engines:
        engine.before = lambda: meeting.wait() and None
        engine.before_load = lambda: meeting.wait() and None
    replicas = Replicas(engines)
    replicas.load_weights(WEIGHTS, 1)
    list(replicas.generate(some_requests()))
    assert [[len(share) for share in engine.asked] for engine in engines] == [[8], [8], [8]]


# --- failures -------------------------------------------------------------------------------------


def test_the_share_of_a_failing_engine_goes_to_the_others_and_is_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    engines = [Noted(), Noted(fail_at=[0]), Noted()]
    replicas = Replicas(engines, names=["a", "b", "c"])
    requests = some_requests()
    assert list(replicas.generate(requests)) == list(FakeEngine().generate(requests))
    assert [[len(share) for share in engine.asked] for engine in engines] == [[8, 4], [8], [8, 4]]
    assert replicas.failures == [0, 1, 0]
    assert "b failed, its 8 requests go to the others" in caplog.text
    # It says that it is well, so it is asked again.
    list(replicas.generate(requests))
    assert len(engines[1].asked) == 2


def test_an_engine_that_says_that_it_is_not_well_is_not_asked() -> None:
    engines = [Noted(), Noted()]
    engines[0].problem = "on fire"
    replicas = Replicas(engines)
    assert replicas.health() == "replica 0: on fire"
    requests = some_requests()
    assert list(replicas.generate(requests)) == list(FakeEngine().generate(requests))
    assert engines[0].asked == []


def test_an_engine_whose_weights_somebody_else_changed_is_not_asked() -> None:
    engines = [Noted(), Noted()]
    replicas = Replicas(engines)
    engines[1].load_weights(WEIGHTS, 7)
    assert replicas.health() == "replica 1: it has weights of version 7 instead of 0"
    assert {c.oldest_version for c in replicas.generate(some_requests())} == {0}
    assert engines[1].asked == []


def test_when_all_engines_fail_each_is_quoted() -> None:
    engines = [Noted(), Noted()]
    engines[0].before = raising(EngineError("out of memory"))
    engines[1].before = raising(WaitTimeoutError("an answer", 3))
    with pytest.raises(ActorError) as caught:
        Replicas(engines).generate(some_requests())
    for words in ("left for 24 requests", "replica 0: EngineError: out of memory", "waited 3 s"):
        assert words in str(caught.value)


def test_a_request_that_cannot_be_served_is_named_by_its_place_in_the_call() -> None:
    requests = some_requests()
    requests[17] = Request((3, 99), PARAMS, id="bad")
    engines = [Noted(), Noted()]
    with pytest.raises(RequestError, match=r"requests\[17\] \(id 'bad'\): prompt: .*99") as caught:
        Replicas(engines).generate(requests)
    assert (caught.value.index, caught.value.id) == (17, "bad")
    assert str(caught.value).count("requests[") == 1


def test_an_engine_that_hangs_is_given_up_and_its_share_done_by_others() -> None:
    released = threading.Event()
    engines = [Noted(), Noted()]
    engines[0].before = lambda: released.wait(20) and None
    replicas = Replicas(engines, timeout=0.2)
    requests = some_requests()
    try:
        assert list(replicas.generate(requests)) == list(FakeEngine().generate(requests))
    finally:
        released.set()
    assert replicas.failures == [1, 0]


# --- weights --------------------------------------------------------------------------------------


def test_the_version_moves_when_all_have_the_weights_and_not_before() -> None:
    engines = [Noted(), Noted(fail_load_at=[1]), Noted()]
    replicas = Replicas(engines, names=["a", "b", "c"])
    replicas.load_weights(WEIGHTS, 1)
    with pytest.raises(WeightUpdateError, match=r"version 2 reached 2 of 3 replicas; b: load 1"):
        replicas.load_weights(WEIGHTS, 2)
    assert replicas.version == 1
    assert replicas.health() == "replicas hold different weights: {'a': 2, 'b': 1, 'c': 2}"
    with pytest.raises(WeightUpdateError, match="until an update reaches all"):
        replicas.generate(some_requests())
    replicas.load_weights(WEIGHTS, 2)
    assert (replicas.version, replicas.health()) == (2, "")
    assert {c.oldest_version for c in replicas.generate(some_requests())} == {2}


def test_when_no_engine_took_the_weights_the_old_ones_go_on() -> None:
    replicas = Replicas([Noted(fail_load_at=[1]), Noted(fail_load_at=[1])])
    replicas.load_weights(WEIGHTS, 1)
    with pytest.raises(WeightUpdateError, match="0 of 2 replicas"):
        replicas.load_weights(WEIGHTS, 2)
    assert replicas.health() == ""
    assert {c.oldest_version for c in replicas.generate(some_requests())} == {1}


def test_weights_that_can_be_read_once_reach_every_engine() -> None:
    got: list[list[str]] = []

    class Reading(FakeEngine):
        def load_weights(self, source: Iterable[Any], version: int) -> None:
            weights = list(source)
            got.append([name for name, _ in weights])
            super().load_weights(weights, version)

    Replicas([Reading() for _ in range(3)]).load_weights(iter(WEIGHTS), 1)
    assert got == [["weight"]] * 3


def test_an_engine_that_is_late_with_its_weights_may_not_generate() -> None:
    released = threading.Event()
    engines = [Noted(), Noted()]
    engines[1].before_load = lambda: released.wait(20) and None
    replicas = Replicas(engines, timeout=0.2)
    try:
        with pytest.raises(WeightUpdateError, match=r"waited 0\.2 s for replica 1 to load weights"):
            replicas.load_weights(WEIGHTS, 1)
    finally:
        released.set()
    with pytest.raises(WeightUpdateError, match="until an update reaches all"):
        replicas.generate(some_requests())


# --- the rest -------------------------------------------------------------------------------------


def test_pausing_resuming_closing_and_attaching_reach_every_engine() -> None:
    reached: list[str] = []

    class Attached(FakeEngine):
        def attach(self, model: Any, eos_token_ids: Any) -> None:
            reached.append(f"{model}{tuple(eos_token_ids)}")

        def pause(self) -> None:
            reached.append("pause")

        def resume(self) -> None:
            reached.append("resume")

        def close(self) -> None:
            reached.append("close")

    replicas = Replicas([Attached(), FakeEngine(), Attached()])
    replicas.attach("model", iter([2]))
    replicas.pause()
    replicas.resume()
    replicas.close()
    assert reached == [word for word in ("model(2,)", "pause", "resume", "close") for _ in "12"]


def test_what_does_not_fit_is_refused() -> None:
    ahead = FakeEngine()
    ahead.load_weights(WEIGHTS, 1)
    for engines, options, words in (
        ([], {}, "at least one, got none"),
        ([FakeEngine()], {"names": ["a", "b"]}, "names: expected 1, got 2"),
        ([FakeEngine()], {"timeout": 0}, "timeout"),
        ([FakeEngine(), ahead], {}, r"one version of weights in all, got \[0, 1\]"),
    ):
        with pytest.raises(InvalidInputError, match=words):
            Replicas(engines, **options)
