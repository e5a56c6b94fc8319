"""Processes of a run: each does a share of the work, and all of them have the whole result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")


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

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.count > 1:
            self._accelerator.wait_for_everyone()
