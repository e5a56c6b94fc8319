"""How weights come into an engine that is not a plain module: the seams of sender and receiver.

An update is prepared first, which changes nothing where it will go, and sent afterwards. One that
can be sent again is what an engine goes back to when a later one fails.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from asyncrlhf.transport.model_folder import ModelFolder

Weights = Iterable[tuple[str, Tensor]]


@runtime_checkable
class SyncClient(Protocol):
    """The receiving end of vLLM's weight transfer; the protocol is vLLM's."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Join the transfer's group; once."""

    def start_weight_update(self) -> None:
        """Make ready for new weights."""

    def update_weights(self, update_info: Any) -> None:
        """Receive some."""

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Use what was received, under this label."""


class Receiver(Protocol):
    """Where an update goes: a server, or a vLLM in this process."""

    def reload(self, folder: Path) -> None:
        """Load the model files of a folder."""
        ...

    def sync_client(self, timeout: float) -> SyncClient:
        """The receiving end of the transfer in four phases."""
        ...

    def world_size(self) -> int:
        """How many workers receive."""
        ...


class Update(Protocol):
    """Weights that are ready to be sent."""

    @property
    def repeatable(self) -> bool:
        """Whether sending it again later sends the same weights."""
        ...

    def send(self, receiver: Receiver, version: int) -> None:
        """Load the weights there, under the label ``version`` where the way of sending has one.

        Raises:
            Exception: whatever went wrong; what the receiver then holds is not known.
        """
        ...


class Route(Protocol):
    """A way of sending weights."""

    def prepare(self, source: Weights, version: int, start: ModelFolder | None) -> Update:
        """Check weights and make them ready; nothing changes where they will go.

        Args:
            source: all weights, or those that learn.
            version: number of optimizer steps that they have seen.
            start: the weights that the receiver began with, to check and complete others; None
                when they are not at hand, and the source must then hold all.

        Raises:
            WeightUpdateError: they do not fit, or cannot be made ready.
        """
        ...


def verify(source: Any) -> None:
    """Raise if a source that was read in place has changed meanwhile."""
    verify = getattr(source, "verify", None)
    if verify is not None:
        verify()
