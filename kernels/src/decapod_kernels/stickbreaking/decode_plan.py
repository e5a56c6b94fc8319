"""How decoding cuts a cache up: tiles, segments, and waves of segments, nearest first."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class DecodeConfig:
    """How the decode kernels cut their work.

    Attributes:
        block_q: most query rows per program, a power of two of at least 16; more rows of one kv
            head are so many more programs.
        block_k: keys per tile, a power of two of at least 16.
        step: tiles between two looks at what is left of the stick.
        segment: fewest keys of a segment, a multiple of `step * block_k`.
        first_wave: keys of the first wave, at least `segment`.
        growth: how many times as far as all waves before it a wave reaches, at least 2.
        programs: programs that a wave aims at. A fixed number, not that of the device: results
            do not depend, to the last bit, on where they were computed.
        warps: warps per program.
        stages: tiles in flight.
    """

    block_q: int = 32
    block_k: int = 64
    step: int = 2
    segment: int = 256
    first_wave: int = 512
    growth: int = 8
    programs: int = 384
    warps: int = 4
    stages: int = 3

    def __post_init__(self) -> None:
        for name in ("block_q", "block_k"):
            size = getattr(self, name)
            if size < 16 or size & (size - 1):
                raise ValueError(f"{name} must be a power of two of at least 16, got {size}")
        stride = self.step * self.block_k
        if self.step < 1 or self.segment < stride or self.segment % stride:
            raise ValueError(
                f"segment must be a multiple of step * block_k = {stride}, got {self.segment}"
            )
        if self.first_wave < self.segment:
            raise ValueError(
                f"first_wave must be at least segment={self.segment}, got {self.first_wave}"
            )
        if self.growth < 2:
            raise ValueError(f"growth must be at least 2, got {self.growth}")
        if self.programs < 1:
            raise ValueError(f"programs must be at least 1, got {self.programs}")


def decode_config(head_dim: int, dtype: torch.dtype) -> DecodeConfig:
    """Tiles for a head size (the larger of keys' and values').

    The most that compile without spilled registers for compute capabilities 8.0 and 9.0; float32
    products are done by the multiply-add units and need more registers per row.
    """
    key_bytes = dtype.itemsize * max(16, 1 << (head_dim - 1).bit_length())
    block_k = max(16, min(64, 16384 // key_bytes))
    if dtype == torch.float32:
        return DecodeConfig(block_q=16, block_k=block_k, warps=4 if key_bytes > 512 else 8)
    return DecodeConfig(block_k=block_k, warps=8 if key_bytes > 256 else 4)


@dataclass(frozen=True)
class Wave:
    """Segments that run side by side: `count` of them, each of `length` keys.

    `start` is the distance of the nearest key from the end of the sequence.
    """

    start: int
    length: int
    count: int

    @property
    def end(self) -> int:
        """Distance of the position behind the farthest key."""
        return self.start + self.length * self.count


def plan_waves(reach: int, groups: int, config: DecodeConfig, *, skipping: bool) -> list[Wave]:
    """Waves over the `reach` nearest positions, where each segment is `groups` programs.

    Without skipping there is nothing to learn from nearer waves: one wave does it all.
    """
    stride = config.step * config.block_k
    waves: list[Wave] = []
    start = 0
    end = config.first_wave if skipping else reach
    while start < reach:
        keys = min(end, reach) - start
        count = min(max(1, config.programs // groups), -(-keys // config.segment))
        length = -(-keys // (count * stride)) * stride
        waves.append(Wave(start, length, -(-keys // length)))
        start = waves[-1].end
        end = start * config.growth
    return waves
