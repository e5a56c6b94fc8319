"""An engine for latencies and faults: it keeps the protocol and draws tokens uniformly."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from asyncrlhf.engines.protocol import Completion, FinishReason, VersionSpan
from asyncrlhf.errors import InvalidInputError, WaitTimeoutError, WeightUpdateError

if TYPE_CHECKING:
    from torch import Tensor

    from decapod.lm import Request


class FakeEngine:
    """The uniform language model, after a wait, with faults on demand.

    For timings of the pipeline without the noise of a model, and for drills. It keeps the contract
    of :class:`~asyncrlhf.engines.protocol.GenerationEngine`, which the tests hold it to beside the
    real engines.

    Args:
        latency: seconds per call of :meth:`generate`, or a function of the call's number, from 0.
        load_latency: seconds per call of :meth:`load_weights`.
        fail_at: numbers of the calls of :meth:`generate` that raise ``EngineError``.
        fail_load_at: numbers of the calls of :meth:`load_weights` that raise.
        vocab_size: tokens are drawn from 0 to this, exclusive.
        eos_token_id: ends a completion.
        pause_timeout: seconds that :meth:`generate` waits for :meth:`resume`.
    """

    def __init__(
        self,
        latency: float | Callable[[int], float] = 0.0,
        *,
        load_latency: float = 0.0,
        fail_at: Collection[int] = (),
        fail_load_at: Collection[int] = (),
        vocab_size: int = 16,
        eos_token_id: int = 2,
        pause_timeout: float = 600.0,
    ) -> None:
        if not 0 <= eos_token_id < vocab_size:
            raise InvalidInputError(
                f"eos_token_id: expected one of 0 to {vocab_size - 1}, got {eos_token_id}"
            )
        self._latency = latency if callable(latency) else lambda _: latency
        self._load_latency = load_latency
        self._fail_at, self._fail_load_at = frozenset(fail_at), frozenset(fail_load_at)
        self._vocab_size, self._eos = vocab_size, eos_token_id
        self._version = 0
        self._calls = self._loads = 0
        self._running = threading.Event()
        self._running.set()
        self._pause_timeout = pause_timeout

    @property
    def version(self) -> int:
        """Version of the weights in use."""
        return self._version

    def generate(self, requests: Sequence[Request]) -> Iterator[Completion]:
        """Uniform tokens, a function of seed and weights' version alone.

        Raises:
            decapod.lm.RequestError: a request cannot be served.
            decapod.lm.EngineError: this call was to fail.
            WaitTimeoutError: the engine stayed paused too long.
        """
        from decapod.lm import EngineError
        from decapod.lm.engine import check_requests

        check_requests(requests, vocab_size=self._vocab_size, max_length=None)
        if not self._running.wait(self._pause_timeout):
            raise WaitTimeoutError("the paused engine to be resumed", self._pause_timeout)
        number, self._calls = self._calls, self._calls + 1
        time.sleep(self._latency(number))
        if number in self._fail_at:
            raise EngineError(f"call {number} of the fake engine was to fail")
        return (self._drawn(request) for request in requests)

    def load_weights(self, source: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Read the source to its end, wait, and take the version.

        Raises:
            WeightUpdateError: this call was to fail; the old version stays.
        """
        for _ in source:
            pass
        number, self._loads = self._loads, self._loads + 1
        time.sleep(self._load_latency)
        if number in self._fail_load_at:
            raise WeightUpdateError(f"load {number} of the fake engine was to fail")
        self._version = version

    def pause(self) -> None:
        """Hold back further requests."""
        self._running.clear()

    def resume(self) -> None:
        """Take requests again."""
        self._running.set()

    def health(self) -> str:
        """Always empty."""
        return ""

    def close(self) -> None:
        """Let go whoever waits."""
        self._running.set()

    def _drawn(self, request: Request) -> Completion:
        from decapod.seeding import Seeds

        params = request.params
        rng = Seeds(request.seed).generator("asyncrlhf.fake", self._version)
        drawn = rng.integers(self._vocab_size, size=params.max_new_tokens).tolist()
        ids: list[int] = []
        reason: FinishReason = "length"
        for token in drawn:
            ids.append(token)
            if token == self._eos and not params.ignore_eos:
                reason = "stop"
                break
        logprobs = (-math.log(self._vocab_size),) * len(ids)
        span = VersionSpan(0, len(ids), self._version)
        return Completion(tuple(ids), logprobs, (span,), reason, request.id)
