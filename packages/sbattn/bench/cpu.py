"""Time and memory of the operator on a CPU, beside the definition and fused softmax attention.

    python bench/cpu.py                  # both parts; about six minutes on one core, 16 GB
    python bench/cpu.py --threads 2      # the same with two threads
    python bench/cpu.py --only memory    # one of the parts
    python bench/cpu.py --quick          # tiny problems, nothing kept

`time` is forward plus backward in float32 at B=1, H=8, L=4096, D=64; the logits are those of
`sbattn.benchmarking.inputs`. Arms take turns, so that all see the same machine. `memory` is the
growth of a process's resident peak while it runs forward and backward, a fresh process for every
length.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from sbattn.benchmarking.arms import Arm, choose
from sbattn.benchmarking.inputs import Problem, make_inputs
from sbattn.benchmarking.recording import record
from sbattn.benchmarking.timing import ratio_interval, time_in_turns
from sbattn.live import live_keys

RESULTS = Path(__file__).parents[3] / "kernels" / "benchmarks" / "results"
CPU = torch.device("cpu")
# Compared with the softmax that torch fuses, or with the definition.
RATIOS = (("naive", "skip"), ("naive", "full"), ("skip", "sdpa"), ("full", "sdpa"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="tiny problems, nothing kept")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="these parts")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--rounds", type=int, default=5, help="how often every arm is timed")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--peak-of", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak_of:
        length, arm = options.peak_of
        print(json.dumps(peak_growth(int(length), arm)))
        return
    suffix = "" if options.threads == 1 else f"-{options.threads}-threads"
    for part in options.only:
        print(f"--- {part}", flush=True)
        result = PARTS[part](options)
        if not options.quick:
            record(options.out / f"cpu-{part}{suffix}.json", result)
    print("quick run passed" if options.quick else f"results are in {options.out}")


def measure_time(options: argparse.Namespace) -> dict[str, Any]:
    length, rounds = (256, 2) if options.quick else (4096, options.rounds)
    # The definition takes long, and does not depend on the logits: one of them is enough.
    everything, without_naive = ("naive", "full", "skip", "sdpa"), ("full", "skip", "sdpa")
    return {
        "mixed": compare(Problem(length=length, logits="mixed"), everything, rounds),
        "random": compare(Problem(length=length, logits="random"), without_naive, rounds),
        "far": compare(Problem(length=length, logits="far"), without_naive, rounds),
    }


def compare(problem: Problem, names: tuple[str, ...], rounds: int) -> dict[str, Any]:
    q, k, v, d_out = make_inputs(problem, CPU)
    live = live_keys(q, k).double().mean((0, 2))
    for x in (q, k, v):
        x.requires_grad_()

    def step(arm: Arm) -> None:
        torch.autograd.grad(arm.run(q, k, v), (q, k, v), d_out)

    arms = {name: functools.partial(step, arm) for name, arm in choose(names, CPU).items()}
    timings = time_in_turns(arms, rounds=rounds, device=CPU)
    ratios = {
        f"{a} / {b}": ratio_interval(timings[a].milliseconds, timings[b].milliseconds)
        for a, b in RATIOS
        if a in timings and b in timings
    }
    print(f"{problem.logits}: live keys per row, by head: {[round(x) for x in live.tolist()]}")
    for name, timing in timings.items():
        print(f"  {name:6} {timing.median:9.1f} ms")
    for name, (ratio, low, high) in ratios.items():
        print(f"  {name:14} {ratio:6.2f}  [{low:.2f}, {high:.2f}]")
    return {
        "problem": problem.to_dict(),
        "live keys per row": live.tolist(),
        "milliseconds": {name: list(timing.milliseconds) for name, timing in timings.items()},
        "medians": {name: timing.median for name, timing in timings.items()},
        "ratios with 95 % intervals": ratios,
    }


def measure_memory(options: argparse.Namespace) -> dict[str, Any]:
    lengths = [512, 1024] if options.quick else [8192, 16384, 32768, 65536]
    result: dict[str, Any] = {"problem": peak_problem(0).to_dict(), "lengths": lengths}
    for arm in ("skip", "full"):
        grown = []
        for length in lengths:
            command = [sys.executable, __file__, "--threads", str(options.threads)]
            done = subprocess.run(
                [*command, "--peak-of", str(length), arm],
                check=True,
                capture_output=True,
                text=True,
            )
            grown.append(json.loads(done.stdout))
            print(f"  {arm:5} L={length:6}: {grown[-1] / 2**20:8.1f} MiB", flush=True)
        slope = math.log(max(grown[-1], 1) / max(grown[0], 1)) / math.log(lengths[-1] / lengths[0])
        print(f"  {arm:5} grows as L^{slope:.2f}")
        result[arm] = {"bytes": grown, "exponent": slope}
    return result


def peak_problem(length: int) -> Problem:
    return Problem(heads=1, kv_heads=1, length=max(length, 1), head_dim=64, logits="mixed")


def peak_growth(length: int, name: str) -> int:
    """Bytes by which forward and backward raise the resident peak, beyond inputs and libraries."""
    (arm,) = choose((name,), CPU).values()

    def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, d_out: torch.Tensor) -> None:
        torch.autograd.grad(arm.run(q, k, v), (q, k, v), d_out)

    small = make_inputs(peak_problem(300), CPU)
    inputs = make_inputs(peak_problem(length), CPU)
    for x in (*small[:3], *inputs[:3]):
        x.requires_grad_()
    step(*small)
    before = resident_peak()
    step(*inputs)
    return resident_peak() - before


def resident_peak() -> int:
    """Of this program. What `getrusage` says on Linux includes the process that started it."""
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return 1024 * int(line.split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


PARTS = {"time": measure_time, "memory": measure_memory}


if __name__ == "__main__":
    main()
