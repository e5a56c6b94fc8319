"""How long something takes, and how much memory: arms take turns, so that all share the weather."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

Work = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Times of one arm.

    Attributes:
        milliseconds: one per round.
    """

    milliseconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """In milliseconds."""
        return statistics.median(self.milliseconds)


def time_in_turns(
    arms: Mapping[str, Work], *, rounds: int, device: torch.device, warmup: int = 1
) -> dict[str, Timing]:
    """Time every arm once per round, in alternating order.

    On a GPU by its own events, with the cache flushed before each; elsewhere by the wall clock.
    """
    for _ in range(warmup):
        for work in arms.values():
            work()
    clock = _time_on_gpu if device.type == "cuda" else _time_on_cpu
    found: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(rounds):
        order = list(arms) if turn % 2 == 0 else list(arms)[::-1]
        for name in order:
            found[name].append(clock(arms[name]))
    return {name: Timing(tuple(times)) for name, times in found.items()}


def _time_on_cpu(work: Work) -> float:
    start = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - start)


def _time_on_gpu(work: Work) -> float:
    torch.empty(256 * 1024**2, dtype=torch.int8, device="cuda").zero_()  # larger than any L2
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def ratio_interval(
    numerator: Sequence[float], denominator: Sequence[float], *, resamples: int = 2000
) -> tuple[float, float, float]:
    """Median of the per-round ratios of two arms, with a 95 % bootstrap interval over rounds."""
    ratios = np.asarray(numerator) / np.asarray(denominator)
    rng = np.random.default_rng(0)
    draws = np.median(rng.choice(ratios, (resamples, len(ratios))), axis=1)
    low, high = np.quantile(draws, (0.025, 0.975))
    return float(np.median(ratios)), float(low), float(high)


def peak_gpu_bytes(work: Work) -> int:
    """Most memory that torch held on the GPU during `work`, above what it held before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = work()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del kept
    return int(peak)
