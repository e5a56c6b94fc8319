"""TRL's weight transfer: snapshots that a worker loads when it is ready for them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor

from asyncrlhf.errors import WaitTimeoutError, WeightUpdateError
from asyncrlhf.integrations.trl_contract import check_contract
from asyncrlhf.integrations.trl_plan import Plan

if TYPE_CHECKING:
    from asyncrlhf.transport.snapshot import Snapshot, Transport


class EngineWeightTransfer:
    """Fulfils ``WeightTransferProtocol`` of TRL by publishing into a transport of this library.

    Versions are TRL's: the weights before the first step are version 1, and each weight update adds
    one. TRL's own transfer stops the server, overwrites its weights and lets it go on, so an answer
    can be begun by one version and ended by another. Here the trainer only makes a copy and goes on
    training; :class:`~asyncrlhf.integrations.trl_rollouts.EngineRolloutWorker` loads it into the
    engine before a group, so each answer is of one version. Groups never begin between
    :meth:`pause` and :meth:`resume` with the newest weights that are about to be replaced; answers
    under way are ended by the weights they began with.

    Args:
        args: the trainer's ``AsyncGRPOConfig``.
        transport: where to publish; it must keep the newest ``max(2, max_staleness + 1)`` versions.
            None makes a :class:`asyncrlhf.transport.SharedMemory`, which is closed at the end of
            training; another stays its maker's to close.

    Raises:
        MissingExtraError: TRL is not installed.
        TRLContractError: it is another release of TRL than the one this was made for.
        InvalidInputError: settings that :class:`~asyncrlhf.integrations.trl_plan.Plan` refuses.
    """

    def __init__(self, args: Any, transport: Transport | None = None) -> None:
        check_contract()
        self._slots = max(2, Plan.of(args).max_staleness + 1)
        self._transport = transport
        self._owned: Transport | None = None
        self._version = 0
        self._snapshots: dict[int, Snapshot] = {}
        self._changed = threading.Condition()
        self._paused = False

    @property
    def version(self) -> int:
        """TRL's number of the newest published weights; 0 before the first."""
        return self._version

    def init_weight_transfer(self) -> None:
        """Make the transport, if none was given. TRL calls it before the first update."""
        if self._transport is None:
            from asyncrlhf.transport.shared_memory import SharedMemory

            self._transport = self._owned = SharedMemory(slots=self._slots)

    def pause(self) -> None:
        """Let no group begin with the newest weights until :meth:`resume`."""
        with self._changed:
            self._paused = True

    def send_weights(self, iterator: Iterator[tuple[str, Tensor]]) -> None:
        """Publish the trainer's weights as the next version.

        Args:
            iterator: names and values; read to its end.

        Raises:
            WeightUpdateError: they could not be published; the old version stays the newest.
        """
        if self._transport is None:
            raise WeightUpdateError(
                "send_weights: expected init_weight_transfer before it, got none; the transfer "
                "was destroyed, so make a new one for each trainer"
            )
        version = self._version + 1
        snapshot = self._transport.publish(iterator, version)
        with self._changed:
            self._snapshots[version] = snapshot
            self._snapshots.pop(version - self._slots, None)
            self._version = version

    def resume(self) -> None:
        """Let groups begin again."""
        with self._changed:
            self._paused = False
            self._changed.notify_all()

    def destroy(self) -> None:
        """Close the transport, if it was made here; can be called twice."""
        self._snapshots.clear()
        self._transport = None
        if self._owned is not None:
            self._owned.close()
            self._owned = None

    def at(self, version: int) -> Snapshot:
        """The weights of one version.

        Raises:
            WeightUpdateError: it was not published yet, or was replaced.
        """
        with self._changed:
            return self._kept(version)

    def newest(self, timeout: float) -> Snapshot:
        """The newest weights; while the trainer publishes, those that it publishes.

        Args:
            timeout: seconds.

        Raises:
            WaitTimeoutError: the trainer did not resume for so long.
            WeightUpdateError: nothing was published yet.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: not self._paused, timeout):
                raise WaitTimeoutError("the trainer to resume after publishing weights", timeout)
            return self._kept(self._version)

    def _kept(self, version: int) -> Snapshot:
        if version not in self._snapshots:
            raise WeightUpdateError(
                f"version: expected one of {sorted(self._snapshots)}, which are kept, got {version}"
            )
        return self._snapshots[version]
