"""Time 2,000 bootstraps and 1,000 permutations on every published cell of the 100k regime.

    python bench/published_cells.py

One process, one thread. The target is 60 s on two idle cores for all 41 cells.
"""

from __future__ import annotations

import time
from pathlib import Path

from record import write

from hpreliability.consistency import Method, thc_statistic
from hpreliability.null import permutation_null
from hpreliability.published import load_scores
from hpreliability.uncertainty import thc_interval

RESULT = Path(__file__).parent / "results" / "published_cells.json"
BOOTSTRAPS, PERMUTATIONS, SEED, TARGET_SECONDS = 2000, 1000, 0, 60.0


def main() -> None:
    started = time.perf_counter()
    table = load_scores()
    keys = table.frame[["agent", "hyperparameter"]].drop_duplicates().to_numpy().tolist()
    cells = {
        (agent, name): table.scores(name, over="env", agent=agent).scores for agent, name in keys
    }
    loaded = time.perf_counter()
    method = Method()
    rows = []
    for (agent, name), scores in cells.items():
        begun = time.perf_counter()
        interval = thc_interval(scores, method, replicates=BOOTSTRAPS, seed=SEED)
        middle = time.perf_counter()
        null = permutation_null(scores, method, permutations=PERMUTATIONS, seed=SEED)
        rows.append(
            {
                "agent": agent,
                "hyperparameter": name,
                "V": scores.shape[0],
                "thc": float(thc_statistic(scores, method)),
                "low": interval.low,
                "high": interval.high,
                "null_mean": null.mean,
                "p_value": null.p_value,
                "calibrated": null.calibrated,
                "bootstrap_seconds": round(middle - begun, 4),
                "permutation_seconds": round(time.perf_counter() - middle, 4),
            }
        )
    finished = time.perf_counter()
    result = {
        "cells": len(rows),
        "bootstraps": BOOTSTRAPS,
        "permutations": PERMUTATIONS,
        "seed": SEED,
        "loading_seconds": round(loaded - started, 2),
        "resampling_seconds": round(finished - loaded, 2),
        "target_seconds": TARGET_SECONDS,
        "target_met": finished - started < TARGET_SECONDS,
        "rows": rows,
    }
    write(RESULT, result)
    for key, entry in result.items():
        if key != "rows":
            print(f"{key}: {entry}")


if __name__ == "__main__":
    main()
