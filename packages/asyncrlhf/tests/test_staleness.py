from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from queue import Queue

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrlhf.errors import InvalidInputError, WaitTimeoutError
from asyncrlhf.schedule import RoundSchedule
from asyncrlhf.staleness import GateCounts, StalenessGate, StalePolicy

batches = st.integers(1, 4)
etas = st.integers(0, 3)
PATIENCE = 30.0  # of tests that wait for threads; reached only where something hangs


class Loop:
    """A generating and training loop whose every move is chosen from outside.

    Groups are numbered as admitted. With `ordered` the learner takes them in that order, else as
    they come from generation.
    """

    def __init__(self, gate: StalenessGate, *, ordered: bool) -> None:
        self.gate = gate
        self.ordered = ordered
        self.admitted = 0
        self.running: dict[int, int] = {}  # group -> version it is generated with
        self.ready: dict[int, int] = {}
        self.arrival: list[int] = []
        self.batch: list[int] = []
        self.version = gate.version
        self.staleness: list[int] = []
        self.trace: list[str] = []

    def holds_the_rule(self) -> None:
        counts = self.gate.counts
        allowed = (self.gate.max_staleness + self.gate.version + 1) * self.gate.batch_size
        assert counts.accepted + counts.running <= allowed
        assert self.gate.capacity() == allowed - counts.accepted - counts.running
        assert counts.running == len(self.running)
        trained = self.version * self.gate.batch_size
        assert counts.accepted == trained + len(self.ready) + len(self.batch)

    def next_ready(self) -> int | None:
        if not self.ordered:
            return self.arrival[0] if self.arrival else None
        first = min([*self.running, *self.ready], default=None)
        return first if first in self.ready else None

    def moves(self) -> list[str]:
        """What can be done now."""
        possible = ["finish", "reject"] if self.running else []
        if self.gate.capacity():
            possible.append("admit")
        if self.next_ready() is not None:
            possible.append("consume")
        return possible

    def do(self, move: str, pick: Callable[[int], int]) -> None:
        if move == "admit":
            assert self.gate.try_admit()
            self.running[self.admitted] = self.gate.version
            self.admitted += 1
        elif move in ("finish", "reject"):
            group = sorted(self.running)[pick(len(self.running))]
            version = self.running.pop(group)
            self.gate.finish(accepted=move == "finish")
            if move == "finish":
                self.ready[group] = version
                self.arrival.append(group)
        else:
            self.consume()
        self.trace.append(move)
        self.holds_the_rule()

    def consume(self) -> None:
        group = self.next_ready()
        assert group is not None
        generated = self.ready.pop(group)
        self.arrival.remove(group)
        if not self.gate.consume(generated, self.version):
            return
        self.batch.append(group)
        self.staleness.append(self.version - generated)
        if len(self.batch) == self.gate.batch_size:
            self.batch.clear()
            self.version += 1
            self.gate.advance(self.version)


def drive(loop: Loop, seed: int, steps: int, rejections: float) -> None:
    """Random moves until `steps` were trained; fails where there is nothing left to do."""
    rng = random.Random(seed)
    target = loop.version + steps
    while loop.version < target:
        possible = loop.moves()
        # A loop that rejects for ever trains for ever, so rejections are kept rare enough.
        weights = [rejections if move == "reject" else 1.0 for move in possible]
        assert sum(weights) > 0, f"deadlock at {loop.gate.counts} after {loop.trace[-20:]}"
        loop.do(rng.choices(possible, weights)[0], rng.randrange)


@settings(max_examples=150, deadline=None)
@given(batches, etas, st.integers(0, 10**6), st.sampled_from([0.0, 0.3, 1.0]), st.integers(0, 5))
def test_in_order_of_admission_no_group_is_staler_than_allowed(
    batch: int, eta: int, seed: int, rejections: float, version: int
) -> None:
    gate = StalenessGate(batch, eta, version=version)
    loop = Loop(gate, ordered=True)
    drive(loop, seed, steps=12, rejections=rejections)
    assert max(loop.staleness) <= eta
    assert gate.counts.late == gate.counts.dropped == 0


@settings(max_examples=150, deadline=None)
@given(batches, etas, st.integers(0, 10**6), st.sampled_from([0.0, 0.3, 1.0]))
def test_out_of_order_the_drop_rule_keeps_the_bound_and_the_loop_goes_on(
    batch: int, eta: int, seed: int, rejections: float
) -> None:
    gate = StalenessGate(batch, eta, "drop")
    loop = Loop(gate, ordered=False)
    drive(loop, seed, steps=12, rejections=rejections)
    assert len(loop.staleness) == 12 * batch
    assert max(loop.staleness) <= eta
    assert gate.counts.late == 0


def test_a_group_that_comes_late_is_dropped_and_replaced_or_trained_on_and_counted() -> None:
    policies: tuple[StalePolicy, ...] = ("block", "drop")
    for policy in policies:
        gate = StalenessGate(2, 0, policy)
        assert gate.try_admit()
        assert gate.try_admit()
        assert not gate.try_admit()
        gate.finish(accepted=True)
        gate.finish(accepted=True)
        gate.advance(1)  # an outage: the version went on without these two
        assert [gate.consume(0, 1) for _ in range(2)] == [policy == "block"] * 2
        counts = gate.counts
        assert (counts.late, counts.dropped) == ((2, 0) if policy == "block" else (0, 2))
        assert gate.capacity() == (2 if policy == "block" else 4)


def test_staleness_is_counted_to_the_version_that_the_step_starts_from() -> None:
    gate = StalenessGate(1, 1, "drop", version=5)
    assert gate.consume(4, 5)
    assert gate.consume(5, 6)
    assert not gate.consume(4, 6)  # the queue was left at version 5, but the step starts from 6


@settings(max_examples=50, deadline=None)
@given(batches, etas, st.integers(0, 10**6), st.booleans())
def test_the_same_calls_in_the_same_order_decide_the_same(
    batch: int, eta: int, seed: int, ordered: bool
) -> None:
    loops = [Loop(StalenessGate(batch, eta, "drop"), ordered=ordered) for _ in range(2)]
    for loop in loops:
        drive(loop, seed, steps=6, rejections=0.2)
    assert loops[0].trace == loops[1].trace
    assert loops[0].staleness == loops[1].staleness
    assert loops[0].gate.counts == loops[1].gate.counts


@pytest.mark.parametrize("eta", range(4))
@pytest.mark.parametrize("n", [1, 3])
def test_whole_rounds_are_let_in_just_as_the_schedule_of_rounds_says(eta: int, n: int) -> None:
    prompts = 2
    gate = StalenessGate(n * prompts, eta)
    plan = RoundSchedule(minibatches=n, ahead=eta)
    admitted = 0
    for version in range(6):
        while gate.try_admit():
            # As early as the rule allows, that is with the oldest weights that a group can have.
            k = admitted // (n * prompts)
            assert plan.generation_version(k) == version * n
            admitted += 1
            gate.finish(accepted=True)
        gate.advance(version + 1)
    assert admitted == (6 + eta) * n * prompts


def test_without_staleness_the_loop_is_synchronous() -> None:
    gate = StalenessGate(3, 0)
    for version in range(4):
        assert [gate.try_admit() for _ in range(4)] == [True, True, True, False]
        for _ in range(3):
            gate.finish(accepted=True)
        assert not gate.try_admit()
        gate.advance(version + 1)


# --- waiting ---


def test_a_wait_that_is_in_vain_says_what_it_waited_for() -> None:
    gate = StalenessGate(1, 1)
    assert gate.admit()
    assert gate.admit()
    message = r"0 accepted \+ 2 running are not below \(1 \+ 0 \+ 1\) \* 1; the learner has to"
    with pytest.raises(WaitTimeoutError, match=message):
        gate.admit(timeout=0.01)
    with pytest.raises(WaitTimeoutError, match=message):
        asyncio.run(gate.admit_async(timeout=0.01))
    gate.finish(accepted=False)
    assert gate.admit(timeout=0)  # those who gave up hold no place
    assert gate.counts == GateCounts(running=2, accepted=0, rejected=1, dropped=0, late=0)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_who_asks_first_is_admitted_first() -> None:
    gate = StalenessGate(1, 0)
    assert gate.try_admit()
    order: list[int] = []

    def ask(number: int) -> None:
        assert gate.admit(PATIENCE)
        order.append(number)
        gate.finish(accepted=False)

    threads = []
    for number in range(5):
        threads.append(threading.Thread(target=ask, args=(number,)))
        threads[-1].start()
        until(lambda: len(gate._waiting) == len(threads))
    gate.finish(accepted=False)
    for thread in threads:
        thread.join(PATIENCE)
    assert order == list(range(5))
    assert gate.counts.rejected == 6


def test_nobody_overtakes_those_who_wait() -> None:
    gate = StalenessGate(1, 0)
    assert gate.try_admit()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(gate.admit, PATIENCE)
        until(lambda: len(gate._waiting) == 1)
        gate.finish(accepted=False)
        assert not gate.try_admit()  # the place went to the one who waited, at once
        assert waiting.result(PATIENCE)


def test_a_dropped_group_lets_in_one_who_waits() -> None:
    gate = StalenessGate(1, 0, "drop")
    assert gate.try_admit()
    gate.finish(accepted=True)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(gate.admit, PATIENCE)
        until(lambda: len(gate._waiting) == 1)
        assert not gate.consume(oldest_version=0, version=1)
        assert waiting.result(PATIENCE)
    assert gate.counts == GateCounts(running=1, accepted=0, rejected=0, dropped=1, late=0)


def test_closing_wakes_all_who_wait() -> None:
    gate = StalenessGate(1, 0)
    assert gate.try_admit()
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(gate.admit, PATIENCE) for _ in range(4)]
        until(lambda: len(gate._waiting) == 4)
        gate.close()
        assert [w.result(PATIENCE) for w in waiting] == [False] * 4
    gate.close()
    gate.finish(accepted=True)  # what runs may still end
    assert not gate.try_admit()
    assert not gate.admit()
    assert not asyncio.run(gate.admit_async())


def test_a_coroutine_that_is_cancelled_takes_no_place() -> None:
    async def scenario(gate: StalenessGate) -> None:
        assert await gate.admit_async()
        first, second = (asyncio.create_task(gate.admit_async(PATIENCE)) for _ in range(2))
        await asyncio.sleep(0)
        assert len(gate._waiting) == 2
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        gate.finish(accepted=False)
        assert await second
        # Cancelled in the moment between being let in and hearing of it: the place comes back.
        third = asyncio.create_task(gate.admit_async(PATIENCE))
        await asyncio.sleep(0)
        gate.finish(accepted=False)
        assert gate.counts.running == 1
        third.cancel()
        with pytest.raises(asyncio.CancelledError):
            await third

    gate = StalenessGate(1, 0)
    asyncio.run(scenario(gate))
    assert gate.counts.running == 0
    assert gate.capacity() == 1


@pytest.mark.parametrize("eta", [0, 1, 3])
@pytest.mark.parametrize("ordered", [True, False])
def test_threads_that_generate_beside_a_learner_keep_the_bound(eta: int, ordered: bool) -> None:
    batch, steps = 3, 40
    gate = StalenessGate(batch, eta, "block" if ordered else "drop")
    queue: Queue[tuple[int, int]] = Queue()
    lock = threading.Lock()
    numbers = iter(range(10**6))

    def actor() -> None:
        rng = random.Random(threading.get_ident())
        while True:
            with lock:  # the number follows the order of admission
                if not gate.admit(PATIENCE):
                    return
                number, version = next(numbers), gate.version
            if rng.random() < 0.3:
                time.sleep(0)
            gate.finish(accepted=True)
            queue.put((number, version))

    threads = [threading.Thread(target=actor) for _ in range(4)]
    for thread in threads:
        thread.start()
    early: dict[int, int] = {}
    trained: list[int] = []
    staleness: list[int] = []
    try:
        for step in range(steps):
            group: deque[int] = deque()
            while len(group) < batch:
                if ordered and len(trained) in early:
                    number, version = len(trained), early.pop(len(trained))
                else:
                    number, version = queue.get(timeout=PATIENCE)
                    if ordered and number != len(trained):
                        early[number] = version
                        continue
                if gate.consume(version, step):
                    group.append(number)
                    trained.append(number)
                    staleness.append(step - version)
            gate.advance(step + 1)
    finally:
        gate.close()
        for thread in threads:
            thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in threads)
    assert len(trained) == steps * batch
    assert max(staleness) <= eta
    if ordered:
        assert trained == list(range(steps * batch))
        assert gate.counts.late == gate.counts.dropped == 0


@pytest.mark.parametrize("eta", [0, 2])
def test_coroutines_that_generate_beside_a_learner_keep_the_bound(eta: int) -> None:
    batch, steps = 2, 30

    async def scenario() -> list[int]:
        gate = StalenessGate(batch, eta, "drop")
        queue: asyncio.Queue[int] = asyncio.Queue()

        async def actor() -> None:
            while await gate.admit_async(PATIENCE):
                version = gate.version
                await asyncio.sleep(0)
                gate.finish(accepted=True)
                queue.put_nowait(version)

        actors = [asyncio.create_task(actor()) for _ in range(3)]
        staleness: list[int] = []
        for step in range(steps):
            while len(staleness) < (step + 1) * batch:
                version = await asyncio.wait_for(queue.get(), PATIENCE)
                if gate.consume(version, step):
                    staleness.append(step - version)
            gate.advance(step + 1)
        gate.close()
        await asyncio.gather(*actors)
        return staleness

    assert max(asyncio.run(scenario())) <= eta


# --- refusals ---


def test_a_gate_refuses_what_it_cannot_mean() -> None:
    with pytest.raises(InvalidInputError, match="batch_size: expected at least 1, got 0"):
        StalenessGate(0, 1)
    with pytest.raises(InvalidInputError, match="max_staleness: expected at least 0, got -1"):
        StalenessGate(1, -1)
    with pytest.raises(InvalidInputError, match="policy: expected block or drop, got 'wait'"):
        StalenessGate(1, 1, "wait")  # type: ignore[arg-type]
    gate = StalenessGate(1, 1, version=3)
    with pytest.raises(InvalidInputError, match=r"version: expected at least .* 3, got 2"):
        gate.advance(2)
    with pytest.raises(InvalidInputError, match="finish: expected one call per admitted group"):
        gate.finish(accepted=True)
