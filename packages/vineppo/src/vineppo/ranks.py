"""Processes of a run: each does a share of the work, and all of them have the whole result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeVar

from vineppo.errors import InvalidInputError, NotFiniteError, RewardError

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")

_KINDS: Final[dict[str, type[Exception]]] = {
    kind.__name__: kind for kind in (InvalidInputError, NotFiniteError, RewardError)
}


class Ranks:
    """The processes of a run, in order.

    Args:
        accelerator: knows how many there are, and which one this is.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self.count = int(accelerator.num_processes)
        self.index = int(accelerator.process_index)

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which alone writes and shows."""
        return self.index == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """The consecutive part of ``items`` that is this rank's; parts differ by one at most."""
        start = len(items) * self.index // self.count
        return items[start : len(items) * (self.index + 1) // self.count]

    def gather(self, items: Sequence[T]) -> list[T]:
        """The parts of all ranks, one after the other; all of them must call this."""
        if self.count == 1:
            return list(items)
        from accelerate.utils import gather_object

        parts: list[Any] = gather_object([list(items)])
        return [item for part in parts for item in part]

    def gathered(self, work: Callable[[], Sequence[T]]) -> list[T]:
        """What ``work`` gives on each rank, one after the other; all of them must call this.

        Raises:
            Exception: what it raised on one rank, on every rank: otherwise the others would wait
                for one that has left.
        """
        if self.count == 1:
            return list(work())
        raised: Exception | None = None
        part: list[T] = []
        try:
            part = list(work())
        except Exception as error:  # noqa: BLE001 - raised again below, when the others know
            raised = error
        told = None if raised is None else (type(raised).__name__, str(raised))
        every = self.gather([(part, told)])
        if raised is not None:
            raise raised
        for rank, (_, problem) in enumerate(every):
            if problem is not None:
                kind, text = problem
                raise _KINDS.get(kind, RuntimeError)(f"rank {rank}: {text}")
        return [item for part, _ in every for item in part]

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.count > 1:
            self._accelerator.wait_for_everyone()
