"""Tile sizes, warps and stages of the kernels: chosen in Python, by device and head size."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ForwardConfig:
    """How the forward kernel cuts its work.

    Attributes:
        block_q: query rows per program.
        block_k: keys per tile.
        superblock: keys between the saved edges; a multiple of `block_k`.
        warps: warps per program.
        stages: tiles in flight.
        registers: what a thread may use at most, to have several programs on a multiprocessor;
            None: what the compiler likes.
    """

    block_q: int
    block_k: int
    superblock: int
    warps: int
    stages: int
    registers: int | None = None

    def __post_init__(self) -> None:
        for name in ("block_q", "block_k"):
            size = getattr(self, name)
            if size < 16 or size & (size - 1):
                raise ValueError(f"{name} must be a power of two of at least 16, got {size}")
        if self.superblock < 1 or self.superblock % self.block_k:
            raise ValueError(
                f"superblock must be a multiple of block_k={self.block_k}, got {self.superblock}"
            )


def superblock_size(keys: int, smallest: int = 4096) -> int:
    """Keys per super-block such that there are 16 at most: so edges are linear in the length."""
    size = smallest
    while 16 * size < keys:
        size *= 2
    return size


def forward_config(
    head_dim: int, dtype: torch.dtype, capability: tuple[int, int] | None, keys: int
) -> ForwardConfig:
    """The forward kernel's tiles.

    Args:
        head_dim: the larger of the keys' and the values' head size.
        dtype: of the inputs.
        capability: the device's compute capability, or None for the interpreter.
        keys: of the longest sequence.
    """
    if capability is None:
        # Small, so that tests of a few hundred keys cross edges.
        superblock = superblock_size(keys, smallest=64)
        return ForwardConfig(block_q=32, block_k=32, superblock=superblock, warps=4, stages=1)
    superblock = superblock_size(keys)
    # None spills, but for bytes in float32 on 8.0: see tests/test_compiles.py, and NOTES.md.
    if dtype == torch.float32:
        if head_dim <= 128:
            return ForwardConfig(block_q=32, block_k=32, superblock=superblock, warps=4, stages=1)
        return ForwardConfig(block_q=16, block_k=16, superblock=superblock, warps=4, stages=1)
    if head_dim > 128:
        if capability >= (9, 0):
            # 128 rows, as two warp groups have, or they would compute the same twice.
            return ForwardConfig(block_q=128, block_k=16, superblock=superblock, warps=8, stages=2)
        return ForwardConfig(block_q=64, block_k=32, superblock=superblock, warps=8, stages=2)
    if capability < (9, 0):
        block_k = 64 if head_dim <= 64 else 32
        return ForwardConfig(block_q=128, block_k=block_k, superblock=superblock, warps=8, stages=2)
    if head_dim <= 64:
        # 168 registers: three programs fit.
        return ForwardConfig(64, 64, superblock=superblock, warps=4, stages=3, registers=168)
    return ForwardConfig(block_q=128, block_k=64, superblock=superblock, warps=8, stages=2)
