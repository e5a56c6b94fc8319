"""TRL's rollout worker: prompts through a staleness gate, a generation engine, and rewards."""

from __future__ import annotations

import contextlib
import itertools
import logging
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from asyncrlhf.errors import ActorError, InvalidInputError, WaitTimeoutError
from asyncrlhf.integrations.trl_contract import check_contract
from asyncrlhf.integrations.trl_plan import Plan
from asyncrlhf.integrations.trl_queue import SampleQueue
from asyncrlhf.integrations.trl_scoring import (
    Group,
    RewardFunc,
    checked_rewards,
    rewards,
    samples,
)
from asyncrlhf.integrations.trl_stream import GroupStream
from asyncrlhf.integrations.trl_weights import EngineWeightTransfer
from asyncrlhf.staleness import StalenessGate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from asyncrlhf.engines.protocol import Completion, GenerationEngine
    from asyncrlhf.transport.snapshot import Snapshot

_LOG = logging.getLogger(__name__)
_TICK = 0.2  # seconds between two looks at whether to stop
_MOST_METRICS = 4096


class EngineRolloutWorker:
    """Fulfils ``RolloutWorkerProtocol`` of TRL with any engine of this library.

    A thread takes the rows of the data set in order and over again, lets each in through a
    :class:`~asyncrlhf.staleness.StalenessGate`, generates K completions with seeds of their own,
    calls the reward functions, and puts samples into the queue that TRL reads. At the optimizer
    step that trains on it, a sample is never staler than ``args.max_staleness`` weight updates,
    and nothing that was generated is thrown away.

    The bound counts on TRL taking samples in order and as many per step as its settings say, which
    it does. TRL itself measures when a sample leaves the queue; because its loader reads ahead of
    the step, it may see less.

    Args:
        engine: generates. It stays the caller's to attach to a model before training and to close
            afterwards; an inline one runs in the worker's thread.
        weights: the weight transfer that the trainer gets.
        args: the trainer's ``AsyncGRPOConfig``.
        dataset: rows with a ``prompt``, a text or a list of messages, such as a
            ``datasets.Dataset``; other columns go to the reward functions.
        processing_class: tokenizer.
        reward_funcs: one or several to be summed, in TRL's signature; also coroutine functions.
        replayable: True: its place in the stream decides which weights generate a group, namely
            those ``max_staleness`` updates older than the ones its step starts from, so that a run
            repeats bit for bit where engine and trainer do. False: the newest when it begins.
        groups_per_call: prompt groups of one call of the engine, a divisor of those between two
            weight updates; None takes all of them.
        first_group: number of the first group, to go on where an earlier run ended.
        stop_timeout: seconds that :meth:`stop` waits for the engine.

    Raises:
        MissingExtraError: TRL is not installed.
        TRLContractError: it is another release of TRL than the one this was made for.
        InvalidInputError: an argument that does not fit, or settings that
            :class:`~asyncrlhf.integrations.trl_plan.Plan` refuses.
    """

    def __init__(
        self,
        engine: GenerationEngine,
        weights: EngineWeightTransfer,
        *,
        args: Any,
        dataset: Sequence[Mapping[str, Any]],
        processing_class: PreTrainedTokenizerBase,
        reward_funcs: RewardFunc | Sequence[RewardFunc],
        replayable: bool = True,
        groups_per_call: int | None = None,
        first_group: int = 0,
        stop_timeout: float = 60.0,
    ) -> None:
        check_contract()
        self._plan = Plan.of(args)
        together = self._plan.per_version
        self._per_call = together if groups_per_call is None else groups_per_call
        if self._per_call < 1 or together % self._per_call:
            raise InvalidInputError(
                f"groups_per_call: expected a divisor of the {together} groups between two weight "
                f"updates, got {groups_per_call}"
            )
        self._stream = GroupStream(dataset, processing_class, self._plan, first_group)
        self._engine = engine
        self._weights = weights
        self._rewards = checked_rewards(reward_funcs)
        self._replayable = replayable
        self._stop_timeout = stop_timeout
        self.gate = StalenessGate(together, self._plan.max_staleness)
        """Who may begin; its versions count from 0, TRL's from 1."""
        self.rollout_buffer: SampleQueue = SampleQueue()
        """Samples that wait for the trainer."""
        self.metrics_queue: queue.Queue[dict[str, Any]] = queue.Queue(_MOST_METRICS)
        """Metrics for the trainer's log."""
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._failure: ActorError | None = None
        self._at_gate = False
        self._alive_at = time.monotonic()
        self._loaded: int | None = None

    # --- what TRL calls --------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to generate; TRL calls it after the first weight update.

        Raises:
            ActorError: it has been started before, or there are no weights.
        """
        if self._thread is not None:
            raise ActorError(
                "the rollout worker has been started before; make worker, weight transfer and "
                "trainer anew to train again"
            )
        if self._weights.version == 0:
            raise ActorError(
                "the rollout worker has no weights to begin with: the trainer uses another weight "
                "transfer than the worker; give it as weight_transfer="
            )
        self._alive_at = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="asyncrlhf-trl", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread; can be called twice. A call of the engine that runs is waited for."""
        self._stopping.set()
        self.gate.close()
        if self._thread is not None:
            self._thread.join(self._stop_timeout)
            if self._thread.is_alive():
                _LOG.warning(
                    "the rollout worker did not end within %g s: its engine or a reward function "
                    "does not return",
                    self._stop_timeout,
                )

    def update_model_version(self, model_version: int) -> None:
        """Let in what the new weights allow.

        Args:
            model_version: TRL's number of weight updates.

        Raises:
            InvalidInputError: it is not the number of updates that were published.
        """
        if model_version != self._weights.version:
            raise InvalidInputError(
                f"model_version: expected {self._weights.version}, the newest that the weight "
                f"transfer published, got {model_version}; worker and weight transfer belong to "
                "one trainer, make all three anew"
            )
        self.gate.advance(model_version - 1)

    def check_health(self, stale_after_s: float) -> None:
        """Raise if no sample will come.

        Args:
            stale_after_s: seconds without a sign of life after which the engine counts as hung.

        Raises:
            ActorError: the thread failed, does not run, or is silent; or it waits for the trainer
                while the trainer waits for it.
        """
        if self._failure is not None:
            raise self._failure
        if self._thread is None or self._stopping.is_set():
            raise ActorError("the rollout worker does not run; TRL starts it when training begins")
        # In this order: what was generated before the worker came to the gate is in the buffer by
        # now, and a group that was let in a moment ago counts as running.
        stuck = self._at_gate and not self.gate.counts.running and not self.gate.capacity()
        if stuck and self.rollout_buffer.empty():
            raise ActorError(
                "the trainer waits for samples and the staleness gate for the trainer: "
                f"{self.gate.counts.accepted} groups were delivered, and {self.gate.version} "
                "weight updates allow no more; does something else read rollout_buffer, or has "
                "the trainer other settings than the worker?"
            )
        silent = time.monotonic() - self._alive_at
        if not self._at_gate and silent > stale_after_s:
            raise ActorError(
                f"the rollout worker has given no sign of life for {silent:.0f} s, more than "
                f"{stale_after_s:g}: its engine or a reward function does not return; where a call "
                "takes that long, raise heartbeat_stale_after_s or lower groups_per_call"
            )

    # --- the thread ------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            for first in itertools.count(0, self._per_call):
                if not self._let_in():
                    return
                snapshot = self._snapshot(first)
                if snapshot is None:
                    return
                if snapshot.version != self._loaded:
                    self._engine.load_weights(snapshot, snapshot.version)
                    self._loaded = snapshot.version
                self._generate(range(first, first + self._per_call))
        except BaseException as error:  # noqa: BLE001 - raised in the trainer's thread
            self._failure = ActorError(
                f"the rollout worker failed: {type(error).__name__}: {error}"
            )
            self._failure.__cause__ = error
            self.rollout_buffer.fail(self._failure)

    def _let_in(self) -> bool:
        """Take places for the groups of a call; False when the worker is to end."""
        began = time.monotonic()
        self._at_gate = True
        taken = 0
        while taken < self._per_call:
            with contextlib.suppress(WaitTimeoutError):
                if not self.gate.admit(_TICK):
                    return False
                taken += 1
        self._alive_at = time.monotonic()
        self._at_gate = False
        self._measured({"rollout/gate_wait_s": self._alive_at - began})
        return True

    def _snapshot(self, first: int) -> Snapshot | None:
        if self._replayable:  # TRL's first version is 1
            return self._weights.at(1 + self._plan.scheduled_version(first))
        while not self._stopping.is_set():
            with contextlib.suppress(WaitTimeoutError):
                return self._weights.newest(_TICK)
        return None

    def _generate(self, places: range) -> None:
        count = self._plan.per_group
        requests = [request for place in places for request in self._stream.requests(place)]
        began = time.monotonic()
        done = iter(self._engine.generate(requests))
        for place, request in zip(places, requests[::count], strict=True):
            completions = tuple(itertools.islice(done, count))
            self._alive_at = time.monotonic()
            if self._stopping.is_set():
                return
            if len(completions) < count:
                raise ActorError(
                    f"the engine gave too few completions: expected {len(requests)}, got "
                    f"{(place - places.start) * count + len(completions)}"
                )
            tokens = float(sum(len(completion.ids) for completion in completions))
            self._deliver(place, request.prompt, completions, (tokens, self._alive_at - began))
            began = time.monotonic()

    def _deliver(
        self,
        place: int,
        prompt_ids: tuple[int, ...],
        completions: tuple[Completion, ...],
        speed: tuple[float, float],
    ) -> None:
        group = Group(
            number=self._stream.number(place),
            row=self._stream.row(place),
            prompt_ids=prompt_ids,
            completions=completions,
            texts=tuple(self._stream.text(completion.ids) for completion in completions),
        )
        began = time.monotonic()
        made = samples(group, rewards(group, self._rewards))
        self._alive_at = time.monotonic()
        # Known before it happens: groups are trained on in the order of the stream.
        step, oldest = self._plan.version_of(place), group.oldest_version - 1
        self.gate.finish(accepted=True)
        self.gate.consume(oldest, step)
        count = float(len(completions))
        cut = float(sum(completion.finish_reason == "length" for completion in completions))
        self._measured(
            {
                "rollout/generated_tok_s": speed,
                "rollout/score_s": self._alive_at - began,
                "rollout/staleness_at_step_mean": float(step - oldest),
                "rollout/staleness_at_step_max": float(step - oldest),
                "completions/mean_length": (speed[0], count),
                "completions/clipped_ratio": (cut, count),
            }
        )
        for sample in made:
            self.rollout_buffer.put(sample)

    def _measured(self, metrics: dict[str, Any]) -> None:
        # A trainer that does not log must not stop generation.
        with contextlib.suppress(queue.Full):
            self.metrics_queue.put_nowait(metrics)
