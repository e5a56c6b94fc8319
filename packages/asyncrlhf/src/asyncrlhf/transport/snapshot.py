"""Weights as they were at one version: what every way of publishing gives, and engines load."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor


class Snapshot(Protocol):
    """Weights at one version; can be read several times, and by a process it was pickled to.

    A learner that goes on changing its parameters never changes a snapshot.
    """

    @property
    def version(self) -> int:
        """Number of optimizer steps these weights have seen."""
        ...

    @property
    def checksum(self) -> str:
        """:func:`checksum` of names and values."""
        ...

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Names and values in a fixed order.

        Raises:
            WeightUpdateError: the weights are no longer, or not yet wholly, there.
        """
        ...


class Transport(Protocol):
    """Publishes weights to actors; the newest versions stay readable until newer replace them."""

    def publish(self, weights: Iterable[tuple[str, Tensor]], version: int) -> Snapshot:
        """Take a snapshot and make it readable.

        Args:
            weights: names and parameters, of any device and dtype.
            version: larger than every one before.

        Raises:
            WeightUpdateError: it could not be published; no reader sees the version.
        """
        ...

    def close(self) -> None:
        """Remove what was published; can be called twice."""
        ...


def checksum(weights: Iterable[tuple[str, Tensor]]) -> str:
    """CRC-32 (8 hexadecimal digits) over names, dtypes, shapes and bytes, in the given order.

    Two bit-equal sets of weights have the same checksum on every machine; it guards against
    mistakes, not against forgery.
    """
    value = 0
    for name, tensor in weights:
        value = zlib.crc32(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode(), value)
        flat = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
        value = zlib.crc32(memoryview(flat.numpy()), value)
    return f"{value:08x}"
