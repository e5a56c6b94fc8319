"""How long the paper's benchmark takes to build and to verify.

    python bench/build.py [--n 1200] [--repeats 3]

There is no peer to stand beside: no public code builds this benchmark from rows. The floor that is
given instead is the time to read the split and parse every solution.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from record import write

from gsm_compose.building import build_benchmark
from gsm_compose.engine.problems import load_gsm8k
from gsm_compose.errors import ProgramError
from gsm_compose.verify import symbolic_audit

RESULT = Path(__file__).parent / "results" / "build.json"


def seconds(run: Callable[[], Any], repeats: int) -> dict[str, float]:
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return {
        "min": round(min(times), 3),
        "median": round(statistics.median(times), 3),
        "max": round(max(times), 3),
    }


def parse_all() -> int:
    found = 0
    for row in load_gsm8k("test"):
        try:
            found += len(row.program.steps)
        except ProgramError:
            continue
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=1200)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()

    def build() -> Any:
        return build_benchmark(load_gsm8k("test"), n=options.n)

    benchmark = build()
    rows = load_gsm8k("test")
    with tempfile.TemporaryDirectory() as folder:
        benchmark.to_jsonl(Path(folder) / "b.jsonl")
        digest = hashlib.sha256((Path(folder) / "b.jsonl").read_bytes()).hexdigest()
    write(
        RESULT,
        {
            "items": options.n,
            "sha256": digest,
            "seconds": {
                "read and parse the split (floor)": seconds(parse_all, options.repeats),
                "build, reading included": seconds(build, options.repeats),
                "verify, programs not run": seconds(
                    lambda: symbolic_audit(benchmark, rows, execute=False), options.repeats
                ),
                "verify, programs run by two workers": seconds(
                    lambda: symbolic_audit(benchmark, rows), options.repeats
                ),
            },
        },
    )
    print(RESULT.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
