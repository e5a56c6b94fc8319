"""Weights by broadcast over ``torch.distributed``: to ranks on other machines, without files."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Final, Self

import torch
import torch.distributed as dist
from torch import Tensor

from asyncrlhf.errors import InvalidInputError, WaitTimeoutError, WeightUpdateError
from asyncrlhf.settings import at_least, positive
from asyncrlhf.transport.layout import (
    ALIGNMENT,
    TensorSpec,
    aligned,
    check_version,
    from_json,
    listed,
    offsets,
    specs_of,
    to_json,
)
from asyncrlhf.transport.snapshot import checksum as checksum_of

# What an announcement says: its kind, then the version, the bytes of the layout (0: as before), the
# size of buckets, and the checksum.
_REFUSED, _WEIGHTS = 0, 1
_NUMBERS: Final = 5
_NO_CHECKSUM: Final = -1
_LONGEST_NAP: Final = 0.05


class HeldSnapshot:
    """Weights of one version in memory of this process; pickled, its values travel.

    :meth:`TorchDist.publish` and :meth:`TorchDist.receive` give it.
    """

    def __init__(
        self,
        version: int,
        buckets: Sequence[tuple[TensorSpec, ...]],
        blocks: Sequence[Tensor],
        checksum: str | None = None,
    ) -> None:
        self._version = version
        self._buckets = buckets
        self._blocks = blocks
        self._checksum = checksum

    @property
    def version(self) -> int:
        """Number of optimizer steps these weights have seen."""
        return self._version

    @property
    def checksum(self) -> str:
        """Checksum of names and values."""
        if self._checksum is None:
            self._checksum = checksum_of(self)
        return self._checksum

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Names and values in the order in which they were published."""
        for bucket, block in zip(self._buckets, self._blocks, strict=True):
            for spec, begin in zip(bucket, offsets(bucket)[0], strict=True):
                yield spec.name, spec.of_bytes(block[begin : begin + spec.nbytes])


class TorchDist:
    """Publishes weights from one rank of a process group to all others.

    Rank ``src`` calls :meth:`publish` as often as every other rank calls :meth:`receive`, and no
    rank uses the group for anything else meanwhile. A version counts when all ranks have confirmed
    it; when one cannot take it, all raise :class:`WeightUpdateError` and the next one can be tried.
    When a rank does not answer at all, all raise and the group is not used again: what is still
    under way in it cannot be told from what would follow.

    Args:
        group: gloo or NCCL; None means all ranks.
        src: the rank that publishes, counted over all processes as for ``broadcast``.
        timeout: seconds that each step may take after :meth:`publish` began; with NCCL, the
            group's own timeout counts. That one must be longer than the time between two
            publications, because it also runs while :meth:`receive` waits; and after a rank did not
            answer, torch lets the process end, or destroy the group, only when it is over.
        device: where the tensors travel and stay; None is the current GPU for NCCL, else the CPU.
        bucket_bytes: tensors travel in groups of about this size; that of ``src`` counts.
        checksum: compare the checksum of what arrived with that of what was sent; that of ``src``
            counts.

    Raises:
        InvalidInputError: no process group, this process or ``src`` is not in it, or a number out
            of range.
    """

    def __init__(
        self,
        group: Any = None,
        src: int = 0,
        *,
        timeout: float = 600.0,
        device: torch.device | str | None = None,
        bucket_bytes: int = 64 * 2**20,
        checksum: bool = True,
    ) -> None:
        positive("timeout", timeout)
        at_least("bucket_bytes", bucket_bytes, 1)
        if not (dist.is_available() and dist.is_initialized()):
            raise InvalidInputError(
                "group: there is no process group yet; call torch.distributed.init_process_group"
            )
        self._rank = dist.get_rank()
        members = dist.get_process_group_ranks(group if group is not None else dist.group.WORLD)
        for name, rank in (("group", self._rank), ("src", src)):
            if rank not in members:
                raise InvalidInputError(f"{name}: expected a group with rank {rank}, got {members}")
        if device is None:
            nccl = dist.get_backend(group) == "nccl"
            device = torch.device("cuda", torch.cuda.current_device()) if nccl else "cpu"
        self._group = group
        self._members = members
        self._src = src
        self._patience = timedelta(seconds=timeout)
        self._device = torch.device(device)
        self._bucket_bytes = bucket_bytes
        self._with_checksum = checksum
        self._newest: int | None = None
        self._layout: tuple[TensorSpec, ...] | None = None  # that all ranks know
        self._pending: tuple[Tensor, Any] | None = None
        self._unusable = ""

    def publish(self, weights: Iterable[tuple[str, Tensor]], version: int) -> HeldSnapshot:
        """Send the weights to all other ranks, and return when all have them.

        Args:
            weights: names and parameters, of any device.
            version: larger than every one before.

        Raises:
            InvalidInputError: this is not the rank that publishes, the version is not larger, or
                these are not weights; the other ranks raise WeightUpdateError.
            WeightUpdateError: reading the weights failed, or a rank did not take or confirm them.
        """
        self._check_role(self._rank == self._src, "publish", "receive")
        try:
            check_version(version, self._newest)
            pairs = listed(weights, version)
            specs = specs_of(pairs)
            snapshot = self._allocated(specs, version, self._bucket_bytes)
            for (_, held), (_, tensor) in zip(snapshot, pairs, strict=True):
                held.copy_(tensor.detach())
            crc = int(snapshot.checksum, 16) if self._with_checksum else _NO_CHECKSUM
        except Exception as error:
            self._announce(_REFUSED, 0, 0, 0, 0)
            if isinstance(error, InvalidInputError | WeightUpdateError):
                raise
            raise WeightUpdateError(f"version {version} could not be copied: {error}") from error
        layout = b"" if specs == self._layout else json.dumps(to_json(specs)).encode()
        self._layout = None  # until all ranks have confirmed that they know it
        self._announce(_WEIGHTS, version, len(layout), self._bucket_bytes, crc)
        if layout:
            self._broadcast(torch.frombuffer(bytearray(layout), dtype=torch.uint8), "the layout")
        self._agree(version, None)
        self._transfer(snapshot)
        self._agree(version, None)
        self._layout, self._newest = specs, version
        return snapshot

    def receive(self, timeout: float = 600.0) -> HeldSnapshot:
        """The weights that are published next.

        Args:
            timeout: seconds until their publication must begin; after a WaitTimeoutError the same
                publication can be waited for again.

        Raises:
            InvalidInputError: this is the rank that publishes.
            WaitTimeoutError: nothing was published in time.
            WeightUpdateError: this or another rank could not publish, take or confirm them; the
                version does not count on any rank that raised.
        """
        self._check_role(self._rank != self._src, "receive", "publish")
        kind, version, layout_bytes, bucket_bytes, crc = self._announced(timeout)
        if kind == _REFUSED:
            raise WeightUpdateError(f"rank {self._src} failed to publish; its own error says why")
        layout = torch.empty(layout_bytes, dtype=torch.uint8)
        if layout_bytes:
            layout = self._broadcast(layout, "the layout")
        snapshot: HeldSnapshot | None = None
        failure: Exception | None = None
        try:
            if layout_bytes:
                self._layout = from_json(json.loads(bytes(layout.tolist())))
            assert self._layout is not None
            snapshot = self._allocated(self._layout, version, bucket_bytes)
        except Exception as error:  # noqa: BLE001 - whatever it was, the other ranks wait to hear of it
            failure = error
        self._agree(version, failure)
        assert snapshot is not None
        self._transfer(snapshot)
        try:
            if crc != _NO_CHECKSUM and (got := snapshot.checksum) != (sent := f"{crc:08x}"):
                failure = WeightUpdateError(f"expected checksum {sent}, got {got}")
        except Exception as error:  # noqa: BLE001 - as above
            failure = error
        self._agree(version, failure)
        return snapshot

    def close(self) -> None:
        """Use the group no more; it stays, as does what was received. Can be called twice."""
        self._unusable = self._unusable or "it was closed"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_role(self, right: bool, method: str, other: str) -> None:
        if not right:
            raise InvalidInputError(
                f"{method}: rank {self._rank} has to call {other}; rank {self._src} publishes"
            )
        if self._unusable:
            raise WeightUpdateError(
                f"weights can no longer be sent: {self._unusable}; make a new process group"
            )

    def _allocated(
        self, specs: Sequence[TensorSpec], version: int, bucket_bytes: int
    ) -> HeldSnapshot:
        buckets = _buckets(specs, bucket_bytes)
        blocks = [
            torch.empty(max(offsets(bucket)[1], ALIGNMENT), dtype=torch.uint8, device=self._device)
            for bucket in buckets
        ]
        return HeldSnapshot(version, buckets, blocks)

    def _transfer(self, snapshot: HeldSnapshot) -> None:
        for block in snapshot._blocks:
            self._broadcast(block, f"weights of version {snapshot.version}")

    def _announce(self, *numbers: int) -> None:
        self._broadcast(torch.tensor(numbers, dtype=torch.int64), "the announcement")

    def _announced(self, timeout: float) -> list[int]:
        if self._pending is None:
            numbers = torch.empty(_NUMBERS, dtype=torch.int64, device=self._device)
            with self._whole("the announcement"):
                work = dist.broadcast(numbers, self._src, self._group, async_op=True)
            self._pending = numbers, work
        numbers, work = self._pending
        # Asked rather than waited for, because not every backend can give up a wait.
        deadline, nap = time.monotonic() + timeout, 0.0005
        while not work.is_completed():
            left = deadline - time.monotonic()
            if left <= 0:
                raise WaitTimeoutError(f"rank {self._src} to publish weights", timeout)
            time.sleep(min(nap, left))
            nap = min(2 * nap, _LONGEST_NAP)
        self._pending = None
        with self._whole("the announcement"):
            work.wait()
        return [int(number) for number in numbers.tolist()]

    def _agree(self, version: int, failure: Exception | None) -> None:
        flags = torch.zeros(len(self._members), dtype=torch.int32, device=self._device)
        flags[self._members.index(self._rank)] = failure is not None
        what = f"the confirmation of version {version}"
        with self._whole(what):
            dist.all_reduce(flags, group=self._group, async_op=True).wait(self._patience)
        failed = [rank for rank, flag in zip(self._members, flags.tolist(), strict=True) if flag]
        if failed:
            reason = f"{type(failure).__name__}: {failure}" if failure else "its own error says why"
            raise WeightUpdateError(
                f"version {version} does not count: rank {', '.join(map(str, failed))} could not "
                f"take it ({reason})"
            ) from failure

    def _broadcast(self, tensor: Tensor, what: str) -> Tensor:
        sent = tensor.to(self._device)
        with self._whole(what):
            dist.broadcast(sent, self._src, self._group, async_op=True).wait(self._patience)
        return sent

    @contextmanager
    def _whole(self, what: str) -> Iterator[None]:
        """What is left half done here, on this rank or by another, cannot be taken up again."""
        try:
            yield
        except BaseException as error:
            self._unusable = f"{what} broke off"
            if isinstance(error, Exception):
                raise WeightUpdateError(
                    f"{what} did not get through between ranks {self._members}: {error}; a rank "
                    "has ended or does not answer, so its own output says more"
                ) from error
            raise


def _buckets(specs: Iterable[TensorSpec], limit: int) -> list[tuple[TensorSpec, ...]]:
    """In order; each as full as the limit allows, and with one tensor at least."""
    buckets: list[list[TensorSpec]] = []
    room = 0
    for spec in specs:
        size = aligned(spec.nbytes, ALIGNMENT)
        if not buckets or size > room:
            buckets.append([])
            room = limit
        buckets[-1].append(spec)
        room -= size
    return [tuple(bucket) for bucket in buckets]
