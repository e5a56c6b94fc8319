"""Weights in shared memory: one copy per version, which every process reads in place."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from multiprocessing import util
from typing import Self

from torch import Tensor

from asyncrlhf.errors import InvalidInputError, WeightUpdateError
from asyncrlhf.settings import at_least
from asyncrlhf.transport.layout import TensorSpec, check_version, difference, listed, specs_of
from asyncrlhf.transport.segment import Segment, attach, create, unlink
from asyncrlhf.transport.snapshot import checksum as checksum_of


class SharedSnapshot:
    """Weights of one version in shared memory; pickled, it is a handle of a few bytes.

    Iterating gives views of the shared memory, to be read and never written. They stay valid as
    long as they live, but the transport writes a newer version in their place once ``slots`` newer
    ones are published. So whoever goes on using the views, rather than copying them while
    iterating, calls :meth:`verify` *after* the use.

    :meth:`SharedMemory.publish` gives it.
    """

    def __init__(
        self, name: str, slots: int, slot: int, sequence: int, version: int, checksum: str | None
    ) -> None:
        self._name = name
        self._slots = slots
        self._slot = slot
        self._sequence = sequence
        self._version = version
        self._checksum = checksum
        self._kept: Segment | None = None
        # Attach now, so that the transport may be closed before the snapshot is read. Where it is
        # closed already, reading says so.
        with suppress(WeightUpdateError):
            self._segment()

    @property
    def name(self) -> str:
        """Name of the shared memory, as in ``/dev/shm``."""
        return self._name

    @property
    def version(self) -> int:
        """Number of optimizer steps these weights have seen."""
        return self._version

    @property
    def checksum(self) -> str:
        """Checksum of names and values when they were published.

        With ``SharedMemory(checksum=False)``, of what is there now.

        Raises:
            WeightUpdateError: it has to be computed, and the weights are no longer there.
        """
        return checksum_of(self) if self._checksum is None else self._checksum

    def verify(self) -> None:
        """Return if everything that was read through this snapshot until now was of its version.

        Raises:
            WeightUpdateError: a newer version was, or is being, written in its place.
        """
        segment = self._segment()
        if segment.sequence(self._slot) != self._sequence:
            there = segment.version(self._slot)
            by = "a newer version" if there is None else f"version {there}"
            raise WeightUpdateError(
                f"weights of version {self._version} were overwritten by {by}: they stay until "
                f"{self._slots} newer versions are published; use them sooner or give "
                "SharedMemory more slots"
            )

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Names and views of the shared memory, in the order in which they were published.

        Raises:
            WeightUpdateError: they were overwritten, before the first pair or while the loop ran;
                or the segment is gone.
        """
        segment = self._segment()
        self.verify()
        for index, spec in enumerate(segment.specs):
            yield spec.name, segment.tensor(self._slot, index)
        self.verify()

    def __reduce__(self) -> tuple[object, ...]:
        return SharedSnapshot, (
            self._name,
            self._slots,
            self._slot,
            self._sequence,
            self._version,
            self._checksum,
        )

    def __repr__(self) -> str:
        return f"SharedSnapshot(version={self._version}, checksum={self._checksum!r})"

    def _segment(self) -> Segment:
        if self._kept is None:
            self._kept = attach(self._name)
        return self._kept


class SharedMemory:
    """Publishes weights to processes of this machine, which read them without a copy.

    The first publication decides names, shapes and dtypes, and allocates the memory: ``slots``
    times the size of the weights. Only the process that made the transport publishes; a version can
    be read by everyone who has its snapshot, until ``slots`` newer ones are published.

    Args:
        slots: how many versions are kept, at least 2; when rounds run D ahead, ``max(2, D + 1)``.
        checksum: compute the checksum of each version when it is published, which takes about as
            long as the copy; otherwise when it is asked for.

    Raises:
        InvalidInputError: fewer than two slots.
    """

    def __init__(self, slots: int = 2, checksum: bool = True) -> None:
        at_least("slots", slots, 2)
        self._kept: list[SharedSnapshot | None] = [None] * slots
        self._with_checksum = checksum
        self._segment: Segment | None = None
        self._remove: Callable[[], object] | None = None
        self._closed = False
        self._writing = threading.Lock()

    @property
    def versions(self) -> tuple[int, ...]:
        """Versions that can be read, oldest first."""
        return tuple(sorted(kept.version for kept in self._kept if kept is not None))

    def publish(self, weights: Iterable[tuple[str, Tensor]], version: int) -> SharedSnapshot:
        """Copy the weights to the place of the oldest version, which can no longer be read.

        Args:
            weights: names and parameters, of any device; read to the end before anything is
                written. A tensor under two names is stored twice.
            version: larger than every one before.

        Raises:
            InvalidInputError: the version is not larger, or names, shapes or dtypes differ from
                the first publication; nothing was written.
            WeightUpdateError: reading or copying the weights failed, there is too little memory,
                or the transport is closed; nobody can read the version, and at most the oldest
                one is lost.
        """
        with self._writing:
            if self._closed:
                raise WeightUpdateError(f"version {version} was not published: it is closed")
            check_version(version, max(self.versions, default=None))
            pairs = listed(weights, version)
            segment = self._ready(specs_of(pairs))
            slot = min(range(len(self._kept)), key=self._age)
            self._kept[slot] = None
            # Odd, also where an interrupted publication left an odd number.
            writing = (segment.sequence(slot) + 1) | 1
            try:
                segment.set_state(slot, writing, None)
                checksum = self._write(segment, slot, pairs, version)
                segment.set_state(slot, writing + 1, version)
            except BaseException:
                segment.set_state(slot, writing + 1, None)
                raise
            made = SharedSnapshot(
                segment.name, len(self._kept), slot, writing + 1, version, checksum
            )
            self._kept[slot] = made
            return made

    def snapshot(self, version: int) -> SharedSnapshot:
        """A version that was published earlier and not yet replaced.

        Raises:
            WeightUpdateError: it is not, or no longer, there.
        """
        for kept in self._kept:
            if kept is not None and kept.version == version:
                return kept
        raise WeightUpdateError(
            f"weights of version {version} are not there; versions {list(self.versions)} are"
        )

    def close(self) -> None:
        """Remove the segment; can be called twice.

        The memory is freed with the last snapshot or tensor of it, in whichever process. A snapshot
        that was pickled and not yet unpickled can then no longer be read.
        """
        with self._writing:
            self._closed = True
            self._kept = [None] * len(self._kept)
            self._segment = None
            if self._remove is not None:
                self._remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _age(self, slot: int) -> int:
        kept = self._kept[slot]
        return -1 if kept is None else kept.version

    def _ready(self, specs: tuple[TensorSpec, ...]) -> Segment:
        if self._segment is None:
            self._segment, memory = create(specs, len(self._kept))
            # Runs once: now and then not in processes forked from this one, when the transport is
            # collected, and at the end of the process, after its children have ended.
            self._remove = util.Finalize(self, unlink, (memory,), exitpriority=-10)
        elif wrong := difference(self._segment.specs, specs):
            raise InvalidInputError(
                f"weights: {wrong}; every publication has the names, dtypes and shapes of the "
                "first, in the same order"
            )
        return self._segment

    def _write(
        self, segment: Segment, slot: int, pairs: list[tuple[str, Tensor]], version: int
    ) -> str | None:
        for index, (name, tensor) in enumerate(pairs):
            try:
                segment.tensor(slot, index).copy_(tensor.detach())
            except Exception as error:
                raise WeightUpdateError(
                    f"weights[{name!r}] of version {version} could not be copied: {error}"
                ) from error
        if not self._with_checksum:
            return None
        # Of the copies: what readers see, even if somebody changes the originals meanwhile.
        return checksum_of(
            (name, segment.tensor(slot, index)) for index, (name, _) in enumerate(pairs)
        )
