"""One segment of shared memory: a header, and slots that each hold all tensors of one version.

A slot is guarded as by a sequence lock: its sequence number is odd while the slot is being written
and another one afterwards, so a reader that finds the number of its snapshot before and after has
read that snapshot.

The segment belongs to the process that creates it. It is removed when that process says so, when it
ends, or, by the resource tracker of :mod:`multiprocessing`, when it is killed. Readers attach
without telling the tracker: before Python 3.13, a process that was not started by
:mod:`multiprocessing` would otherwise remove the segment when it ends, although others still use
it.
"""

from __future__ import annotations

import _posixshmem  # type: ignore[import-not-found]  # what multiprocessing itself opens with
import json
import mmap
import os
import sys
import threading
from collections.abc import Sequence
from multiprocessing import resource_tracker, shared_memory
from secrets import token_hex
from typing import Final
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from asyncrlhf.errors import WeightUpdateError
from asyncrlhf.transport.layout import ALIGNMENT, TensorSpec, aligned, from_json, offsets, to_json

_MAGIC: Final = int.from_bytes(b"arlhf\0\0\1", "little")
_NONE: Final = 2**64 - 1  # in place of a version
# The header in words of 8 bytes: the five named here, from word 8 on the sequence number and the
# version of each slot, then the layout as JSON. Slots begin at the next page.
_WORD: Final = 8
_SLOTS, _STRIDE, _FIRST, _LAYOUT_BYTES = 1, 2, 3, 4
_STATES: Final = 8


class Segment:
    """A mapping of the segment into this process.

    It is never closed by hand. Tensors keep the mapping that they lie in alive, and it goes with
    the last of them; closing it earlier would leave them pointing at nothing.

    Raises:
        WeightUpdateError: the segment is of another release.
    """

    def __init__(self, name: str, mapping: mmap.mmap) -> None:
        self.name = name
        self._mapping = mapping
        # Aligned words of native size are read and written in one piece.
        self._words = memoryview(mapping).cast("Q")
        if self._words[0] != _MAGIC:
            raise WeightUpdateError(
                f"the shared memory {name} was not written by this release of asyncrlhf"
            )
        begin = _layout_begin(self._words[_SLOTS])
        layout = mapping[begin : begin + self._words[_LAYOUT_BYTES]]
        self.specs = from_json(json.loads(layout))
        self._offsets, _ = offsets(self.specs)

    def sequence(self, slot: int) -> int:
        """Sequence number of a slot."""
        return self._words[_STATES + 2 * slot]

    def version(self, slot: int) -> int | None:
        """Version in a slot; None when there is no whole one."""
        version = self._words[_STATES + 2 * slot + 1]
        return None if version == _NONE else version

    def set_state(self, slot: int, sequence: int, version: int | None) -> None:
        """Of the writer: the version first, so that it is there when the sequence number is."""
        self._words[_STATES + 2 * slot + 1] = _NONE if version is None else version
        self._words[_STATES + 2 * slot] = sequence

    def tensor(self, slot: int, index: int) -> Tensor:
        """View of one tensor in a slot."""
        spec = self.specs[index]
        if not spec.nbytes:
            return torch.empty(spec.shape, dtype=spec.dtype)
        begin = self._words[_FIRST] + slot * self._words[_STRIDE] + self._offsets[index]
        return spec.of_bytes(
            torch.frombuffer(self._mapping, dtype=torch.uint8, count=spec.nbytes, offset=begin)
        )


# Of this process, by name: all snapshots of one segment share one mapping.
_attached: WeakValueDictionary[str, Segment] = WeakValueDictionary()
_attaching = threading.Lock()


def attach(name: str) -> Segment:
    """The segment of this name.

    Raises:
        WeightUpdateError: there is none, or none of this release.
    """
    with _attaching:
        segment = _attached.get(name)
        if segment is None:
            segment = _attached[name] = Segment(name, _map(name))
        return segment


def create(specs: Sequence[TensorSpec], slots: int) -> tuple[Segment, shared_memory.SharedMemory]:
    """A new segment, its memory reserved, all slots empty; and what :func:`unlink` takes.

    Raises:
        WeightUpdateError: there is not so much shared memory.
    """
    layout = json.dumps(to_json(specs)).encode()
    begin = _layout_begin(slots)
    first = aligned(begin + len(layout), mmap.PAGESIZE)
    stride = aligned(offsets(specs)[1], mmap.PAGESIZE)
    size = first + stride * slots
    # Short, because some systems allow no more than 30 characters.
    name = f"asyncrlhf_{os.getpid()}_{token_hex(4)}"
    try:
        memory = shared_memory.SharedMemory(name, create=True, size=size)
    except OSError as error:
        raise WeightUpdateError(f"no shared memory of {size:,} bytes: {error}") from error
    try:
        memory.close()  # tensors would not keep this mapping alive, but one of our own
        mapping = _map(name, reserve=size)
        words = memoryview(mapping).cast("Q")
        words[0] = _MAGIC
        words[_SLOTS], words[_STRIDE] = slots, stride
        words[_FIRST], words[_LAYOUT_BYTES] = first, len(layout)
        for slot in range(slots):
            words[_STATES + 2 * slot + 1] = _NONE
        mapping[begin : begin + len(layout)] = layout
        segment = Segment(name, mapping)
    except BaseException:
        unlink(memory)
        raise
    with _attaching:
        _attached[name] = segment
    return segment, memory


def unlink(memory: shared_memory.SharedMemory) -> None:
    """Remove the segment; whoever has mapped it keeps it."""
    try:
        memory.unlink()
    except FileNotFoundError:
        # Somebody else removed it; the tracker would otherwise complain when this process ends.
        resource_tracker.unregister(f"/{memory.name}", "shared_memory")


def _layout_begin(slots: int) -> int:
    return aligned(_WORD * (_STATES + 2 * slots), ALIGNMENT)


def _map(name: str, reserve: int = 0) -> mmap.mmap:
    try:
        handle = _posixshmem.shm_open(f"/{name}", os.O_RDWR, 0o600)
    except FileNotFoundError as error:
        raise WeightUpdateError(
            f"the shared memory {name} is not, or no longer, on this machine: the transport was "
            "closed, or its process has ended"
        ) from error
    try:
        if reserve and sys.platform == "linux":
            # Otherwise a file system that is too small shows at the first write to the memory,
            # as a signal that ends the process.
            os.posix_fallocate(handle, 0, reserve)
        return mmap.mmap(handle, 0)
    except OSError as error:
        room = os.fstatvfs(handle)
        raise WeightUpdateError(
            f"the shared memory {name} could not be had ({error}): it needs "
            f"{os.fstat(handle).st_size:,} bytes, {room.f_bavail * room.f_frsize:,} are free; "
            "enlarge /dev/shm (containers: --shm-size), keep fewer versions, or publish with "
            "SafetensorsDir"
        ) from error
    finally:
        os.close(handle)
