"""Rounds on their way: ordered by the learner, generated and scored in threads, taken in order.

The threads only wait: for an actor's process, a server or a GPU. Whatever goes wrong in them is
raised where the round is taken, and nobody waits without a limit.
"""

from __future__ import annotations

import dataclasses
import queue
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from asyncrlhf.engines.protocol import GenerationEngine
from asyncrlhf.errors import WaitTimeoutError
from asyncrlhf.rounds import Round, RoundOrder, check_completions

if TYPE_CHECKING:
    from asyncrlhf.rewards import Rewards
    from asyncrlhf.transport.snapshot import Snapshot

_JOIN_SECONDS = 5.0


class Pipeline:
    """The stages before the learner.

    Args:
        engine: generates; with the attribute ``placement == "inline"`` it does so inside
            :meth:`submit`, otherwise in a thread.
        score: scores a round in a stage of its own; None leaves that to whoever takes the round.
        timeout: seconds that :meth:`take` waits for a round.
        vocab_size: token ids that completions may have; None: any.
    """

    def __init__(
        self,
        engine: GenerationEngine,
        score: Callable[[Round], Rewards] | None = None,
        *,
        timeout: float = 3600.0,
        vocab_size: int | None = None,
    ) -> None:
        self._engine = engine
        self._score = score
        self._timeout = timeout
        self._vocab_size = vocab_size
        self._loaded: int | None = None
        self._idle_since = time.perf_counter()
        self._inline = getattr(engine, "placement", "thread") == "inline"
        self._changed = threading.Condition()
        self._done: dict[int, Round | BaseException] = {}
        self._closed = threading.Event()
        self._orders: queue.SimpleQueue[tuple[RoundOrder, Snapshot] | None] = queue.SimpleQueue()
        self._unscored: queue.SimpleQueue[Round | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        if not self._inline:
            self._spawn(self._generate_all, "asyncrlhf-actor")
        if score is not None:
            self._spawn(self._score_all, "asyncrlhf-scorer")

    def submit(self, order: RoundOrder, snapshot: Snapshot) -> None:
        """Order a round; rounds are generated in the order in which they were ordered.

        Args:
            order: what to generate.
            snapshot: the weights ``order.version``.

        Raises:
            Exception: with an inline engine, what it raised.
        """
        if self._inline:
            self._pass_on(self._generate(order, snapshot))
        else:
            self._orders.put((order, snapshot))

    def take(self, index: int) -> Round:
        """Wait for a round and take it out.

        Raises:
            WaitTimeoutError: it did not come in time; the message has the engine's health.
            Exception: what the engine or the scoring raised.
        """
        deadline = time.monotonic() + self._timeout
        with self._changed:
            while index not in self._done:
                # In slices, so that Ctrl-C is noticed on every platform.
                self._changed.wait(min(0.5, max(0.0, deadline - time.monotonic())))
                if time.monotonic() >= deadline and index not in self._done:
                    raise WaitTimeoutError(
                        f"round {index} to be generated and scored", self._timeout,
                        f"the engine says: {self._engine.health() or 'nothing is wrong'}",
                    )  # fmt: skip
            done = self._done.pop(index)
        if isinstance(done, BaseException):
            raise done
        return done

    def finished(self) -> list[Round]:
        """Rounds that could be taken now, in order; they stay."""
        with self._changed:
            return [r for _, r in sorted(self._done.items()) if isinstance(r, Round)]

    def put_back(self, finished: Round) -> None:
        """Hand in a round that was finished before, by a run that is being resumed."""
        self._deliver(finished.order.index, finished)

    def close(self) -> None:
        """Stop the threads and the engine; can be called twice."""
        self._closed.set()
        self._orders.put(None)
        self._unscored.put(None)
        self._engine.close()
        for thread in self._threads:
            thread.join(_JOIN_SECONDS)

    def _spawn(self, target: Callable[[], None], name: str) -> None:
        thread = threading.Thread(target=target, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _generate_all(self) -> None:
        while (ordered := self._orders.get()) is not None and not self._closed.is_set():
            order, snapshot = ordered
            try:
                self._pass_on(self._generate(order, snapshot))
            except BaseException as error:  # noqa: BLE001 - raised where the round is taken
                self._deliver(order.index, error)

    def _generate(self, order: RoundOrder, snapshot: Snapshot) -> Round:
        started = time.perf_counter()
        try:
            if self._loaded != order.version:
                self._engine.load_weights(snapshot, order.version)
                self._loaded = order.version
            completions = tuple(self._engine.generate(order.requests))
            check_completions(order, completions, self._vocab_size)
        except BaseException as error:
            error.add_note(f"while round {order.index} was generated")
            raise
        ended = time.perf_counter()
        waited, self._idle_since = started - self._idle_since, ended
        return Round(order, completions, snapshot.checksum, ended - started, waited, started)

    def _pass_on(self, generated: Round) -> None:
        if self._score is None:
            self._deliver(generated.order.index, generated)
        else:
            self._unscored.put(generated)

    def _score_all(self) -> None:
        assert self._score is not None
        while (generated := self._unscored.get()) is not None and not self._closed.is_set():
            started = time.perf_counter()
            done: Round | BaseException
            try:
                rewards = self._score(generated)
                seconds = time.perf_counter() - started
                done = dataclasses.replace(generated, rewards=rewards, score=seconds)
            except BaseException as error:  # noqa: BLE001 - raised where the round is taken
                error.add_note(f"while round {generated.order.index} was scored")
                done = error
            self._deliver(generated.order.index, done)

    def _deliver(self, index: int, done: Round | BaseException) -> None:
        with self._changed:
            self._done[index] = done
            self._changed.notify_all()
