"""What weights look like without their values, and where each would lie in a block of bytes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from asyncrlhf.errors import InvalidInputError, WeightUpdateError

# Bytes, as torch aligns its own memory on a CPU: kernels add numbers in an order that can depend on
# the alignment, and a view must give the bits that a copy gives.
ALIGNMENT = 64


class TensorSpec(NamedTuple):
    """One tensor without its values."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its values, without gaps."""
        return math.prod(self.shape) * int(self.dtype.itemsize)

    def of_bytes(self, flat: Tensor) -> Tensor:
        """The tensor whose values are these bytes, without a copy."""
        return flat.view(self.dtype).reshape(self.shape)

    def __str__(self) -> str:
        return f"{self.name} ({str(self.dtype).removeprefix('torch.')}, {self.shape})"


def listed(weights: Iterable[tuple[str, Tensor]], version: int) -> list[tuple[str, Tensor]]:
    """All weights, read to the end and checked before a transport writes any of them.

    Raises:
        InvalidInputError: none, not pairs of a name and a dense tensor with values, or a name
            twice.
        WeightUpdateError: reading them raised.
    """
    try:
        pairs = list(weights)
    except Exception as error:
        raise WeightUpdateError(
            f"reading the weights of version {version} raised {type(error).__name__}: {error}; "
            "nothing was published"
        ) from error
    seen: set[str] = set()
    for pair in pairs:
        given: Any = pair  # whatever the caller's types say
        name, tensor = given if isinstance(given, tuple) and len(given) == 2 else (None, None)
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise InvalidInputError(
                f"weights: expected pairs of a name and a tensor, got {type(given).__name__}; give "
                "model.named_parameters() or the items() of a state dict"
            )
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise InvalidInputError(
                f"weights[{name!r}]: expected a dense tensor with values, got one on "
                f"{tensor.device} with layout {tensor.layout}"
            )
        if name in seen:
            raise InvalidInputError(f"weights: expected each name once, got {name!r} twice")
        seen.add(name)
    if not pairs:
        raise InvalidInputError("weights: expected at least one tensor, got none")
    return pairs


def check_version(version: object, newest: int | None) -> None:
    """Refuse a version that is not a count of steps, or not above the newest one.

    Raises:
        InvalidInputError: as said.
    """
    if not isinstance(version, int) or isinstance(version, bool) or version < 0:
        raise InvalidInputError(
            f"version: expected a number of optimizer steps, at least 0, got {version!r}"
        )
    if newest is not None and version <= newest:
        raise InvalidInputError(
            f"version: expected more than {newest}, which is published, got {version}"
        )


def specs_of(pairs: Iterable[tuple[str, Tensor]]) -> tuple[TensorSpec, ...]:
    """The weights without their values."""
    return tuple(TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in pairs)


def offsets(specs: Iterable[TensorSpec]) -> tuple[list[int], int]:
    """Where each tensor begins in one block, in bytes and aligned; and the size of the block."""
    begins = []
    end = 0
    for spec in specs:
        begins.append(end)
        end += aligned(spec.nbytes, ALIGNMENT)
    return begins, end


def aligned(size: int, to: int) -> int:
    """The smallest multiple of ``to`` that is at least ``size``."""
    return -(-size // to) * to


def difference(expected: Sequence[TensorSpec], got: Sequence[TensorSpec]) -> str:
    """Where two layouts part, in words; empty when they are equal."""
    for ours, theirs in zip(expected, got, strict=False):
        if ours != theirs:
            return f"expected {ours}, got {theirs}"
    if len(expected) != len(got):
        return f"expected {len(expected)} tensors, got {len(got)}"
    return ""


def to_json(specs: Iterable[TensorSpec]) -> list[list[Any]]:
    """As lists of name, dtype and shape."""
    return [[s.name, str(s.dtype).removeprefix("torch."), list(s.shape)] for s in specs]


def from_json(rows: Iterable[Sequence[Any]]) -> tuple[TensorSpec, ...]:
    """The inverse of :func:`to_json`.

    Raises:
        ValueError: not what :func:`to_json` gives.
    """
    specs = []
    for name, dtype, shape in rows:
        kind = getattr(torch, str(dtype), None)
        if not isinstance(kind, torch.dtype):
            raise ValueError(f"{dtype!r} is no dtype of torch {torch.__version__}")
        specs.append(TensorSpec(str(name), kind, tuple(int(length) for length in shape)))
    return tuple(specs)
