"""Admission control for loops without rounds: how many prompt groups may be under way.

A group is admitted iff ::

    accepted + running < (eta + v + 1) * B

with B groups a step, `v` the current version and `eta` the largest staleness allowed. Why this
bounds it: consumed in the order of admission, the group admitted at a count of c (both terms on the
left) is trained on at step c // B or earlier, and c < (eta + v + 1) * B makes that at most eta + v,
while its tokens come from version v or a newer one. With eta = 0 the loop is synchronous.

Nothing that was generated is thrown away. Where groups are *not* consumed in that order, or an
outage broke the count, the policy ``"drop"`` keeps the bound: a group that has become too stale is
not trained on. A dropped group no longer counts as accepted, so one more is admitted in its place;
otherwise the learner could wait for a batch that the rule will not let anyone fill. The same holds
for rejected ones.

One version here is B groups trained on. With rounds of N minibatches that is a round: a gate with
``batch_size=N*B, max_staleness=D`` lets through just what
:class:`asyncrlhf.schedule.RoundSchedule` does.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections import deque
from typing import Literal, NamedTuple, get_args

from asyncrlhf.errors import InvalidInputError, WaitTimeoutError

StalePolicy = Literal["block", "drop"]
_TIMEOUT = 600.0


class GateCounts(NamedTuple):
    """Prompt groups at one moment; `late` were trained on although staler than allowed."""

    running: int
    accepted: int
    rejected: int
    dropped: int
    late: int


class StalenessGate:
    """Lets prompt groups in so that none is trained on more than `max_staleness` versions later.

    Safe to use from any number of threads and event loops. Whoever asks first is admitted first,
    so decisions depend on the order of calls alone, never on a clock.

    A generating loop calls :meth:`admit`, generates, and calls :meth:`finish`; the learner calls
    :meth:`consume` for each group and :meth:`advance` when actors can have new weights.

    Args:
        batch_size: B, groups that one version is trained on.
        max_staleness: eta, in versions.
        policy: what becomes of a group that is too stale all the same: ``"block"`` trains on it and
            counts it as late, ``"drop"`` discards it.
        version: to start from, as after a resume; what earlier versions took counts as accepted.

    Raises:
        InvalidInputError: B below 1, eta or version below 0, an unknown policy.
    """

    def __init__(
        self,
        batch_size: int,
        max_staleness: int,
        policy: StalePolicy = "block",
        *,
        version: int = 0,
    ) -> None:
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("max_staleness", max_staleness, 0),
            ("version", version, 0),
        ):
            if value < least:
                raise InvalidInputError(f"{name}: expected at least {least}, got {value!r}")
        if policy not in get_args(StalePolicy):
            raise InvalidInputError(f"policy: expected block or drop, got {policy!r}")
        self.batch_size = batch_size
        self.max_staleness = max_staleness
        self.policy = policy
        self._lock = threading.Lock()
        self._waiting: deque[concurrent.futures.Future[bool]] = deque()
        self._closed = False
        self._version = version
        self._running = self._rejected = self._dropped = self._late = 0
        self._accepted = version * batch_size

    @property
    def version(self) -> int:
        """The current one, v."""
        return self._version

    @property
    def counts(self) -> GateCounts:
        """All counters, of one moment."""
        with self._lock:
            return GateCounts(
                self._running, self._accepted, self._rejected, self._dropped, self._late
            )

    def capacity(self) -> int:
        """How many groups the rule would let in now."""
        with self._lock:
            return self._capacity()

    def try_admit(self) -> bool:
        """Admit a group if that is possible at once."""
        with self._lock:
            admitted = not self._closed and self._capacity() > 0
            self._running += admitted
            return admitted

    def admit(self, timeout: float = _TIMEOUT) -> bool:
        """Wait until a group may be admitted; False once the gate is closed.

        Args:
            timeout: seconds.

        Raises:
            WaitTimeoutError: the rule let nothing in for that long.
        """
        waiter = self._ask()
        try:
            concurrent.futures.wait([waiter], timeout)
        except BaseException:  # such as Ctrl-C: nobody will take this place
            self._give_up(waiter)
            raise
        return self._answer(waiter, timeout)

    async def admit_async(self, timeout: float = _TIMEOUT) -> bool:
        """:meth:`admit` for a coroutine; one that is cancelled takes no place."""
        waiter = self._ask()
        try:
            await asyncio.wait([asyncio.wrap_future(waiter)], timeout=timeout)
        except BaseException:
            self._give_up(waiter)
            raise
        return self._answer(waiter, timeout)

    def finish(self, *, accepted: bool) -> None:
        """A group that was admitted is done: it will be trained on, or it was rejected.

        Raises:
            InvalidInputError: no group is running.
        """
        with self._lock:
            if not self._running:
                raise InvalidInputError(
                    "finish: expected one call per admitted group, got one more; no group is "
                    "running. Call it only where admit() or try_admit() gave True"
                )
            self._running -= 1
            self._accepted += accepted
            self._rejected += not accepted
            self._let_in()

    def advance(self, version: int) -> None:
        """Actors can have new weights now.

        Raises:
            InvalidInputError: the version is older than the current one.
        """
        with self._lock:
            if version < self._version:
                raise InvalidInputError(
                    f"version: expected at least the current one, {self._version}, got {version}"
                )
            self._version = version
            self._let_in()

    def consume(self, oldest_version: int, version: int) -> bool:
        """Whether an accepted group may be trained on; call it once for each.

        Args:
            oldest_version: of the group's tokens.
            version: that the optimizer step starts from, which can be newer than the one at which
                the group was taken from a queue.

        Returns:
            False if it is too stale and the policy is to drop it.
        """
        with self._lock:
            if version - oldest_version <= self.max_staleness:
                return True
            if self.policy == "block":
                self._late += 1
                return True
            self._dropped += 1
            self._accepted -= 1
            self._let_in()
            return False

    def close(self) -> None:
        """Admit nothing more and wake all who wait; can be called twice."""
        with self._lock:
            self._closed = True
            self._let_in()

    def _capacity(self) -> int:
        allowed = (self.max_staleness + self._version + 1) * self.batch_size
        return max(0, allowed - self._accepted - self._running)

    def _ask(self) -> concurrent.futures.Future[bool]:
        waiter: concurrent.futures.Future[bool] = concurrent.futures.Future()
        with self._lock:
            self._waiting.append(waiter)
            self._let_in()
        return waiter

    def _let_in(self) -> None:
        # Places are taken here, for those who wait: while anyone does there is none for others.
        while self._waiting and (self._closed or self._capacity() > 0):
            self._running += not self._closed
            self._waiting.popleft().set_result(not self._closed)

    def _answer(self, waiter: concurrent.futures.Future[bool], timeout: float) -> bool:
        with self._lock:
            if waiter.done():
                return waiter.result()
            self._waiting.remove(waiter)
            what = (
                f"a place for a prompt group: {self._accepted} accepted + {self._running} running "
                f"are not below ({self.max_staleness} + {self._version} + 1) * {self.batch_size}"
            )
        raise WaitTimeoutError(
            what, timeout, "the learner has to train and advance(), or running groups to finish()"
        )

    def _give_up(self, waiter: concurrent.futures.Future[bool]) -> None:
        with self._lock:
            if not waiter.done():
                self._waiting.remove(waiter)
            elif waiter.result():
                self._running -= 1
                self._let_in()
