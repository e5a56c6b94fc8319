"""What the pipeline itself costs: sleeping stages, so that nothing else takes time.

    python bench/pipeline.py [--seconds 0.2] [--rounds 20]

Generation is a fake engine that sleeps, learning is a sleep; loop, pipeline and transport are
those of a training run, with weights of 100,000 numbers. The peer is the synchronous run of the
same loop; the floor is the closed form of `asyncrlhf.schedule`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from asyncrlhf.engines import FakeEngine
from asyncrlhf.loop import run_rounds
from asyncrlhf.pipeline import Pipeline
from asyncrlhf.rounds import Orders
from asyncrlhf.schedule import RoundSchedule, predicted_makespan
from asyncrlhf.transport import SharedMemory
from decapod.lm import SamplingParams
from decapod.runs import environment
from decapod.writing import write_text

RESULT = Path(__file__).parent / "results" / "pipeline.json"


def makespan(seconds: float, rounds: int, ahead: int) -> float:
    """Seconds from the first order to the end of the last round."""
    schedule = RoundSchedule(ahead=ahead)
    weights = {"weight": torch.zeros(100_000)}
    orders = Orders(
        [[1, 3], [1, 4]], SamplingParams(max_new_tokens=8), per_round=32, samples=2, seed=0
    )
    with SharedMemory(slots=max(2, ahead + 1)) as transport:
        snapshots = {0: transport.publish(weights.items(), 0)}
        pipeline = Pipeline(FakeEngine(seconds), timeout=60)

        def order(index: int) -> None:
            version = schedule.generation_version(index)
            pipeline.submit(orders.order(index, version), snapshots[version])

        def learn(_: Any) -> float:
            time.sleep(seconds)
            weights["weight"] += 1
            return 0.0

        def publish(version: int) -> None:
            snapshots[version] = transport.publish(weights.items(), version)

        started = time.perf_counter()
        run_rounds(
            schedule, rounds, order=order, take=pipeline.take, learn=learn, publish=publish,
            done=lambda *_: True,
        )  # fmt: skip
        ended = time.perf_counter()
        pipeline.close()
    return ended - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=0.2)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    found = {}
    for ahead in (0, 1, 2):
        measured = makespan(options.seconds, options.rounds, ahead)
        predicted = predicted_makespan(
            g=options.seconds, t=options.seconds, rounds=options.rounds, ahead=ahead
        )
        found[str(ahead)] = {
            "measured_s": measured,
            "predicted_s": predicted,
            "relative_error": measured / predicted - 1,
        }
    record = {
        "command": f"python pipeline.py --seconds {options.seconds} --rounds {options.rounds}",
        "seconds": options.seconds,
        "rounds": options.rounds,
        "by_rounds_ahead": found,
        "speedup_over_synchronous": {
            ahead: found["0"]["measured_s"] / found[ahead]["measured_s"] for ahead in ("1", "2")
        },
        "environment": environment(("asyncrlhf", "torch")),
    }
    RESULT.parent.mkdir(exist_ok=True)
    write_text(RESULT, json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
