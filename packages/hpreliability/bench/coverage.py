"""How often intervals of THC cover the expected THC, by simulation over many designs.

    python bench/coverage.py [--experiments 200] [--replicates 400]

For each design the expected THC is the mean over 8,000 simulated experiments; then fresh
experiments are simulated and each method's intervals are checked against it.
"""

from __future__ import annotations

import argparse
import itertools
import time
import warnings
from pathlib import Path

import numpy as np
from record import write

from hpreliability.consistency import Method, thc_statistic
from hpreliability.uncertainty import BiasedIntervalWarning, thc_interval

RESULT = Path(__file__).parent / "results" / "coverage.json"
EXPECTATION_SEED, EXPERIMENT_SEED, TRUTH_SEED = 1, 2, 3
EFFECTS = ("none", "ordered", "mixed", "opposed")
METHODS = ("bootstrap", "jackknife", "percentile", "basic")


def true_means(effect: str, V: int, C: int) -> np.ndarray:
    """Mean of each value in each context (V, C), in units of a run's standard deviation."""
    steps = np.arange(V)[:, None].repeat(C, axis=1).astype(float)
    if effect == "none":
        return np.zeros((V, C))
    if effect == "ordered":  # one order everywhere, neighbours far apart
        return 4 * steps
    if effect == "mixed":  # a common trend and an interaction as large as the noise
        return steps + np.random.default_rng(TRUTH_SEED).normal(size=(V, C))
    if effect == "opposed":  # the order turns round in half of the contexts
        steps[:, C // 2 :] = steps[::-1, C // 2 :]
        return 3 * steps
    raise ValueError(effect)


def noise(kind: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Centred noise of one run."""
    if kind == "normal":
        return rng.normal(size=shape)
    if kind == "t3":
        return rng.standard_t(3, size=shape) / np.sqrt(3)
    if kind == "lognormal":
        return (rng.lognormal(size=shape) - np.exp(0.5)) / np.sqrt((np.e - 1) * np.e)
    raise ValueError(kind)


def designs() -> list[dict[str, object]]:
    """All combinations for normal noise; fewer for heavy tails and for symmetric ties."""
    rows = [
        ("normal", "paper", *rest)
        for rest in itertools.product(EFFECTS, (2, 4, 7), (2, 8, 26), (3, 5, 10))
    ]
    few = list(itertools.product(("none", "mixed"), (4, 7), (8, 26), (3, 5)))
    rows += [(kind, "paper", *rest) for kind in ("t3", "lognormal") for rest in few]
    rows += [("normal", "symmetric", *rest) for rest in few]
    names = ("noise", "ties", "effect", "V", "C", "R")
    return [dict(zip(names, row, strict=True)) for row in rows]


def measure(design: dict, experiments: int, replicates: int) -> dict[str, object]:
    """Coverage and mean width of each method in one design."""
    V, C, R = design["V"], design["C"], design["R"]
    method = Method(ties=design["ties"])
    means = true_means(design["effect"], V, C)[:, None, :, None]
    rng = np.random.default_rng(EXPECTATION_SEED)
    many = np.concatenate(
        [
            thc_statistic(means + noise(design["noise"], (400, V, R, C, 1), rng), method)
            for _ in range(20)
        ]
    )
    expected = many.mean()
    rng = np.random.default_rng(EXPERIMENT_SEED)
    hits = dict.fromkeys(METHODS, 0)
    widths = dict.fromkeys(METHODS, 0.0)
    for experiment in range(experiments):
        scores = means + noise(design["noise"], (V, R, C, 1), rng)
        for name in METHODS[:3]:
            drawn = thc_interval(scores, method, how=name, replicates=replicates, seed=experiment)
            bounds = {name: (drawn.low, drawn.high)}
            if name == "percentile":
                reflected = 2 * drawn.observed - np.array([drawn.high, drawn.low])
                bounds["basic"] = tuple(np.clip(reflected, 0, 1))
            for key, (low, high) in bounds.items():
                # The expectation itself is only known to about this accuracy.
                hits[key] += low - 1e-9 <= expected <= high + 1e-9
                widths[key] += high - low
    return {
        **design,
        "expected": round(float(expected), 4),
        "spread": round(float(many.std()), 4),
        "coverage": {name: round(float(hits[name] / experiments), 3) for name in METHODS},
        "width": {name: round(float(widths[name] / experiments), 4) for name in METHODS},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experiments", type=int, default=200)
    parser.add_argument("--replicates", type=int, default=400)
    options = parser.parse_args()
    warnings.simplefilter("ignore", BiasedIntervalWarning)
    started = time.perf_counter()
    rows = []
    for design in designs():
        rows.append(measure(design, options.experiments, options.replicates))
        print(rows[-1], flush=True)
    summary = {
        name: {
            "designs": len(rows),
            "designs_below_90_percent": int(sum(row["coverage"][name] < 0.9 for row in rows)),
            "lowest_coverage": min(row["coverage"][name] for row in rows),
            "mean_coverage": round(float(np.mean([row["coverage"][name] for row in rows])), 4),
            "mean_width": round(float(np.mean([row["width"][name] for row in rows])), 4),
        }
        for name in METHODS
    }
    write(
        RESULT,
        {
            "level": 0.95,
            "experiments": options.experiments,
            "replicates": options.replicates,
            "seeds": {
                "expectation": EXPECTATION_SEED,
                "experiments": EXPERIMENT_SEED,
                "truth": TRUTH_SEED,
                "intervals": "the number of the experiment",
            },
            "seconds": round(time.perf_counter() - started, 1),
            "summary": summary,
            "designs": rows,
        },
    )
    print(summary)


if __name__ == "__main__":
    main()
