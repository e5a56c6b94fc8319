"""Learner processes: what the first one does alone, all of them hear of, errors included."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from asyncrlhf.messages import described, rebuilt

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")


class Ranks:
    """The processes of a run; rank 0 owns actor, transport, rewards and checkpoints.

    Args:
        accelerator: knows how many there are, and which one this is.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._several = accelerator.num_processes > 1
        self.first = bool(accelerator.is_main_process)
        """Whether this is rank 0."""

    def shared(self, work: Callable[[], T]) -> T:
        """What ``work`` gives on rank 0, on every rank; all of them must call this.

        Args:
            work: called on rank 0 alone; what it gives can be pickled.

        Raises:
            Exception: what it raised, on every rank: otherwise the others would wait for a rank
                that has left. An error of another library is an ActorError on the others.
        """
        if not self._several:
            return work()
        from accelerate.utils import broadcast_object_list

        message: list[Any] = [None]
        raised: BaseException | None = None
        if self.first:
            try:
                value = work()
                message = [pickle.dumps((True, value))]
            except BaseException as error:  # noqa: BLE001 - raised again below, after the others know
                raised = error
                message = [pickle.dumps((False, described(error)))]
        broadcast_object_list(message)
        if raised is not None:
            raise raised
        if self.first:
            return value
        fine, told = pickle.loads(message[0])  # noqa: S301 - packed by rank 0 of this run
        if not fine:
            raise rebuilt("rank 0", *told)
        result: T = told
        return result
