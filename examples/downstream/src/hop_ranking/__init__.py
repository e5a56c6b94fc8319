"""Is the model that is best at single questions the best at compositions?

A benchmark of compositions asks three things of a model: the original questions, the modified
ones, and both in one. If models rank the same under all three, single questions are enough to
choose by. `gsm_compose` builds the benchmark and asks the models; `hpreliability` says how far the
ranking depends on what is asked, and how far it would by chance.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace

import pandas as pd

import gsm_compose as gc
import hpreliability as hpr
from gsm_compose.evaluation import Generate
from gsm_compose.simulate import SimulatedReasoner

CONDITIONS = ("original", "modified", "compositional")

# A model is a function from prompts to texts; these have a known answer instead. The first two are
# the better at single questions, and lose what they won when questions come together.
REASONERS: Mapping[str, SimulatedReasoner] = {
    "sharp": SimulatedReasoner(e1=0.04, e2=0.06, second_hop=0.45, distraction=0.2),
    "quick": SimulatedReasoner(e1=0.10, e2=0.12, second_hop=0.30, distraction=0.1),
    "plain": SimulatedReasoner(e1=0.18, e2=0.20, second_hop=0.05),
    "steady": SimulatedReasoner(e1=0.24, e2=0.26),
}


def scores(
    models: Callable[[gc.Benchmark, int], Mapping[str, Generate]], runs: int
) -> pd.DataFrame:
    """Accuracy of every model under every condition, on as many benchmarks as there are runs.

    Args:
        models: what to ask, given a benchmark and the number of the run.
        runs: at least 2; each has 40 compositions of its own.

    Returns:
        One row per model, condition and run: model, condition, run, accuracy.
    """
    problems = gc.load_gsm8k("test")
    rows = []
    for run in range(runs):
        benchmark = gc.build_benchmark(problems[:250], n=40, seed=run)
        for name, ask in models(benchmark, run).items():
            found = gc.evaluate(benchmark, ask, progress=False)
            rows += [
                {"what": "model", "model": name, "condition": c, "run": run,
                 "accuracy": found.accuracy(c)}
                for c in CONDITIONS
            ]  # fmt: skip
    return pd.DataFrame(rows)


def simulated(
    reasoners: Mapping[str, SimulatedReasoner],
) -> Callable[[gc.Benchmark, int], Mapping[str, Generate]]:
    """The reasoners as models, each run with random numbers of its own."""
    return lambda benchmark, run: {
        name: replace(model, seed=run).generate_for(benchmark) for name, model in reasoners.items()
    }


def consistency(frame: pd.DataFrame) -> pd.Series:
    """How far the ranking of models depends on what is asked: score, chance, p-value."""
    table = hpr.from_frame(
        frame, hyperparameter="what", value="model", seed="run", score="accuracy",
        context=("condition",),
    )  # fmt: skip
    return hpr.thc(table, over="condition").frame.iloc[0]


def main() -> None:
    """Print what the simulated reasoners give."""
    frame = scores(simulated(REASONERS), runs=5)
    means = frame.pivot_table(index="model", columns="condition", values="accuracy", sort=False)
    row = consistency(frame)
    sys.stdout.write(
        f"{means[list(CONDITIONS)].round(2)}\n\n"
        f"THC over conditions {row.score:.2f}, chance {row.null_mean:.2f}, p = {row.p_value:.3f}\n"
    )
