"""The queue between a rollout worker's thread and TRL's trainer."""

from __future__ import annotations

import queue
from typing import Any, NamedTuple


class SampleQueue(queue.Queue[Any]):
    """A queue whose reader gets the error of its writer, behind the samples that came before it.

    TRL asks a worker for its health only after it has waited in vain for some seconds.
    """

    def fail(self, error: Exception) -> None:
        """Raise ``error`` wherever the queue is read once its samples are used up."""
        self.put(_Failure(error))

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """The next item.

        Raises:
            queue.Empty: none came.
            Exception: what :meth:`fail` was given.
        """
        item = super().get(block, timeout)
        if isinstance(item, _Failure):
            self.put(item)  # for whoever asks again
            raise item.error
        return item


class _Failure(NamedTuple):
    error: Exception
