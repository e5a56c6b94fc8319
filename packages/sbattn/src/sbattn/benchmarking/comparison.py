"""Every arm on every problem, forward and backward, in one run."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sbattn.benchmarking.arms import Arm, choose
from sbattn.benchmarking.inputs import Logits, Problem, make_inputs
from sbattn.benchmarking.timing import Work, peak_gpu_bytes, ratio_interval, time_in_turns
from sbattn.errors import InvalidInputError
from sbattn.live import live_tile_fraction

Pass = Literal["forward", "both"]
# Matrix products over the visible half of the logits: what the definition needs at least.
MATMULS = {"forward": 2, "both": 7}
# What keeps a whole matrix of logits is not asked for more than this many bytes of it.
LARGEST_MATRIX = 4 * 1024**3


@dataclass(frozen=True)
class Options:
    """What to time.

    Attributes:
        lengths: numbers of queries, and of keys.
        logits: `random` (as at initialisation), `mixed` (heads differ as in trained models), `far`
            (nothing can be skipped).
        passes: `forward`, or `both` for forward and backward.
        arms: `skip` and `full` (this library with and without skipping), `sdpa`, `naive`, `fla`,
            `paper`; those that are not installed are said and left out.
        batch: sequences.
        heads: query heads.
        kv_heads: key and value heads; 0 for as many as query heads.
        head_dim: of queries, keys and values.
        dtype: `auto` is bfloat16 on a GPU and float32 elsewhere.
        device: `auto` is the GPU if there is one.
        rounds: how often each arm is timed; arms take turns.
        threads: numeric threads on the CPU.
        out: where to write the result as JSON.
    """

    lengths: tuple[int, ...] = (1024, 4096)
    logits: tuple[Logits, ...] = ("mixed",)
    passes: tuple[Pass, ...] = ("forward", "both")
    arms: tuple[str, ...] = ("skip", "full", "sdpa", "fla", "paper")
    batch: int = 1
    heads: int = 8
    kv_heads: int = 0
    head_dim: int = 64
    dtype: Literal["auto", "float16", "bfloat16", "float32", "float64"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    rounds: int = 5
    threads: int = 1
    out: Path | None = None

    def __post_init__(self) -> None:
        for name in ("lengths", "logits", "passes", "arms"):
            if not getattr(self, name):
                raise InvalidInputError(f"{name}: expected at least one, got none")
        for name in ("rounds", "threads"):
            if getattr(self, name) < 1:
                raise InvalidInputError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise InvalidInputError("device: expected one that is here, got cuda without a GPU")
        if self.out is not None and not self.out.resolve().parent.is_dir():
            raise InvalidInputError(f"out: the folder {self.out.resolve().parent} does not exist")
        choose(self.arms, self.where)
        self.problems()

    @property
    def where(self) -> torch.device:
        """The device that `device` means here."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return torch.device(self.device)

    def problems(self) -> list[Problem]:
        """One for every length and kind of logits."""
        dtype = self.dtype
        if dtype == "auto":
            dtype = "bfloat16" if self.where.type == "cuda" else "float32"
        return [
            Problem(
                batch=self.batch,
                heads=self.heads,
                kv_heads=self.kv_heads or self.heads,
                length=length,
                head_dim=self.head_dim,
                dtype=dtype,
                logits=logits,
            )
            for length, logits in itertools.product(self.lengths, self.logits)
        ]


@dataclass(frozen=True)
class Row:
    """One arm on one problem in one pass.

    Attributes:
        arm: its name.
        passes: `forward` or `both`.
        problem: the problem's fields.
        milliseconds: median over rounds, and every round's.
        teraflops: of the definition's matrix products over the whole triangle, per second; skipped
            tiles count as done, so this rises when more is skipped.
        live: share of the triangle's 64 × 64 tiles that skipping leaves; None for softmax.
        peak_bytes: on top of the inputs; None where it is not measured (the CPU).
        beside_sdpa: median and 95 % interval of the ratio of its time to softmax's; None without.
    """

    arm: str
    passes: Pass
    problem: dict[str, Any]
    milliseconds: float
    rounds: tuple[float, ...]
    teraflops: float
    live: float | None
    peak_bytes: int | None
    beside_sdpa: tuple[float, float, float] | None


def work_of(arm: Arm, inputs: tuple[Tensor, ...], passes: Pass) -> Work:
    """The function to time: gradients go to leaves in the arm's own layout."""
    if arm.layout == "tokens first":
        inputs = tuple(x.transpose(1, 2).contiguous() for x in inputs)
    q, k, v, d_out = (x.detach() for x in inputs)
    if passes == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return arm.run(q, k, v)

        return forward
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def both() -> tuple[Tensor, ...]:
        return tuple(torch.autograd.grad(arm.run(*leaves), leaves, d_out))

    return both


def measure(
    options: Options, tell: Callable[[str], None]
) -> Iterator[tuple[Problem, Pass, list[Row]]]:
    """Time everything that was asked for, one problem and pass after the other.

    `tell` hears what is left out, and why.
    """
    torch.set_num_threads(options.threads)
    device = options.where
    chosen = choose(options.arms, device)
    for arm in chosen.values():
        if arm.missing:
            tell(f"{arm.name}: left out ({arm.missing})")
    ready = {name: arm for name, arm in chosen.items() if not arm.missing}
    for problem in options.problems():
        matrix = 4 * problem.batch * problem.heads * problem.length**2
        arms = dict(ready)
        if "naive" in arms and matrix > LARGEST_MATRIX:
            tell(f"naive at {problem.length}: left out (its matrix takes {matrix >> 30} GiB)")
            del arms["naive"]
        inputs = make_inputs(problem, device)
        q, k = inputs[:2]
        live = float(live_tile_fraction(q, k).mean())
        for passes in options.passes:
            work = {name: work_of(arm, inputs, passes) for name, arm in arms.items()}
            times = time_in_turns(work, rounds=options.rounds, device=device)
            rows = []
            for name, arm in arms.items():
                beside = None
                if "sdpa" in times and name != "sdpa":
                    beside = ratio_interval(times[name].milliseconds, times["sdpa"].milliseconds)
                row = Row(
                    arm=arm.name,
                    passes=passes,
                    problem=problem.to_dict(),
                    milliseconds=times[name].median,
                    rounds=times[name].milliseconds,
                    teraflops=MATMULS[passes] * problem.causal_flops / times[name].median / 1e9,
                    live=(live if name == "skip" else 1.0) if arm.stick_breaking else None,
                    peak_bytes=peak_gpu_bytes(work[name]) if device.type == "cuda" else None,
                    beside_sdpa=beside,
                )
                rows.append(row)
            yield problem, passes, rows
