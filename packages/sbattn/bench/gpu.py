"""Everything that the documentation claims about the GPU, measured by one command.

    python bench/gpu.py                      # a GPU: all parts, results as JSON
    python bench/gpu.py --dry-run            # no GPU: the same code on tiny problems, nothing kept
    python bench/gpu.py --only speed decode  # some of the parts

Without a GPU it is always a dry run, in which Triton's interpreter executes the kernels. The parts
are described in `sbattn.benchmarking.suite`.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch

RESULTS = Path(__file__).parents[3] / "kernels" / "benchmarks" / "results"
PARTS = ("correctness", "determinism", "memory", "speed", "trained", "decode")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dry-run", action="store_true", help="tiny problems, nothing kept")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="these parts")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    dry = options.dry_run or not torch.cuda.is_available()
    if dry:
        # Read when Triton is imported, so before the parts are.
        os.environ["TRITON_INTERPRET"] = "1"
        print("dry run: tiny problems through Triton's interpreter; no result is kept")
    from sbattn.benchmarking import suite
    from sbattn.benchmarking.recording import record

    size = suite.TINY if dry else suite.FULL
    for name in options.only:
        print(f"--- {name}", flush=True)
        result = getattr(suite, name)(size)
        if not dry:
            gpu = torch.cuda.get_device_name().lower().replace(" ", "-")
            record(options.out / f"{gpu}-{name}.json", result)
    print("dry run passed" if dry else f"results are in {options.out}")


if __name__ == "__main__":
    main()
