"""How often intervals of the gap cover the truth, with simulated reasoners.

    python bench/coverage.py [--draws 500] [--small-draws 2000] [--resamples 2000]

Four kinds of interval are held against the exact expectations of `SimulatedReasoner`:

- multiway: the default of `gap_report`;
- bootstrap: its other method, groups of items that share a question in the same role, percentiles;
- items: multiway intervals as if no two items shared a question;
- pigeonhole: first and last questions resampled apart, an item weighing the product of the counts
  (Owen 2007), percentiles of 500 samples; on the first 200 draws.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from record import write

from gsm_compose.gap import GapReport, _both, _columns, gap_report
from gsm_compose.outcomes import Outcomes
from gsm_compose.simulate import Pairing, SimulatedReasoner

RESULT = Path(__file__).parent / "results" / "coverage.json"
LEVEL, LOW, HIGH, BIAS = 0.95, 0.92, 0.98, 0.005
PIGEONHOLE_DRAWS, PIGEONHOLE_RESAMPLES = 200, 500
QUANTITIES = (
    "delta",
    "delta_paired",
    "distraction_term",
    "second_hop_term",
    "lucky",
    "distraction",
    "second_hop",
    "relative",
    "s1",
    "s2",
    "s_comp",
    "c1",
    "cf_given_c1",
)
GAP = SimulatedReasoner(
    e1=0.15, e2=0.25, distraction=0.08, second_hop=0.12, ignore_x=0.04, lucky=0.08
)
NO_GAP = SimulatedReasoner(e1=0.15, e2=0.25)
STRONG = SimulatedReasoner(e1=0.03, e2=0.05, distraction=0.01, second_hop=0.03, lucky=0.1)
WEAK = SimulatedReasoner(e1=0.6, e2=0.7, distraction=0.2, second_hop=0.3, ignore_x=0.1, lucky=0.05)


def designs() -> dict[str, tuple[SimulatedReasoner, Pairing]]:
    """Reasoners and who is paired with whom.

    "reused": last questions serve twice. "rows": as in the paper's benchmark, both roles are played
    by the same rows, 1,319 for 1,200 items.
    """
    found = {}
    for n in (1200, 100):
        apart, reused = Pairing.distinct(n), Pairing.reused(n)
        rows = Pairing.reused(n, rows=round(n * 1319 / 1200))
        varied, coupled = replace(GAP, difficulty=0.8), replace(GAP, difficulty=0.8, coupling=0.7)
        found |= {
            f"n={n}, distinct, independent": (GAP, apart),
            f"n={n}, distinct, correlated": (coupled, apart),
            f"n={n}, distinct, no gap": (NO_GAP, apart),
            f"n={n}, reused, independent": (GAP, reused),
            f"n={n}, reused, varied": (varied, reused),
            f"n={n}, reused, correlated": (coupled, reused),
            f"n={n}, rows, independent": (GAP, rows),
            f"n={n}, rows, varied": (varied, rows),
            f"n={n}, rows, very varied": (replace(GAP, difficulty=1.0), rows),
            f"n={n}, rows, strong": (replace(STRONG, difficulty=0.8), rows),
            f"n={n}, rows, weak": (replace(WEAK, difficulty=0.8), rows),
            f"n={n}, rows, unparsable": (replace(varied, unparsable=0.05), rows),
            f"n={n}, used 5 times, varied": (varied, Pairing.reused(n, uses=5)),
        }
    return found


def pigeonhole(outcomes: Outcomes, seed: int) -> dict[str, tuple[float, float]]:
    """Percentile intervals of the two-way bootstrap."""
    rng = np.random.default_rng(seed)
    weights = np.ones((PIGEONHOLE_RESAMPLES, len(outcomes)))
    for labels in outcomes.clusters:
        distinct, place = np.unique(labels, return_inverse=True)
        times = rng.multinomial(
            len(distinct), np.full(len(distinct), 1 / len(distinct)), size=PIGEONHOLE_RESAMPLES
        )
        weights *= times[:, place]
    columns = _columns(outcomes)
    means = (weights @ np.stack(list(columns.values()), axis=1)) / weights.sum(axis=1)[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        values = _both(dict(zip(columns, means.T, strict=True)))
    tails = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    return {name: tuple(np.nanquantile(values[name], tails)) for name in QUANTITIES}


def intervals(report: GapReport) -> dict[str, tuple[float, float]]:
    return {
        name: (getattr(report, name).low, getattr(report, name).high)
        for name in QUANTITIES
        if getattr(report, name) is not None
    }


def measure(
    reasoner: SimulatedReasoner, pairing: Pairing, draws: int, resamples: int
) -> dict[str, object]:
    """Bias, and coverage and mean width by method, of each quantity."""
    truth = reasoner.expected()
    alone = np.arange(len(pairing.item_ids)).astype(str)
    estimates: dict[str, list[float]] = {name: [] for name in QUANTITIES}
    hits: dict[str, dict[str, list[bool]]] = {}
    widths: dict[str, list[float]] = {}
    for draw in range(draws):
        outcomes = replace(
            reasoner.outcomes(pairing, draw),
            independent=None,
            original_q2=None,
            code=None,
            parsable=None,
        )
        report = gap_report(outcomes, LEVEL)
        apart = replace(outcomes, q1_ids=alone, q2_ids=np.char.add("last ", alone))
        found = {
            "multiway": intervals(report),
            "bootstrap": intervals(
                gap_report(outcomes, LEVEL, resamples, seed=draw, method="bootstrap")
            ),
            "items": intervals(gap_report(apart, LEVEL)),
        }
        if draw < PIGEONHOLE_DRAWS:
            found["pigeonhole"] = pigeonhole(outcomes, draw)
        for name in QUANTITIES:
            estimates[name].append(getattr(report, name).value)
        for method, ends in found.items():
            widths.setdefault(method, []).append(ends["delta"][1] - ends["delta"][0])
            for name, (low, high) in ends.items():
                hit = low - 1e-12 <= truth[name] <= high + 1e-12
                hits.setdefault(method, {}).setdefault(name, []).append(bool(hit))
    return {
        "draws": draws,
        "expected": {name: round(truth[name], 5) for name in QUANTITIES},
        "bias": {
            name: round(float(np.mean(estimates[name])) - truth[name], 5)
            for name in truth
            if name in estimates
        },
        "spread_of_delta": round(float(np.std(estimates["delta"])), 5),
        "coverage": {
            method: {name: round(float(np.mean(hit)), 4) for name, hit in by_name.items()}
            for method, by_name in hits.items()
        },
        "mean_width_of_delta": {
            method: round(float(np.mean(width)), 5) for method, width in widths.items()
        },
    }


def summarise(rows: list[dict], method: str) -> dict[str, object]:
    cells = {
        (row["design"], name): row["coverage"][method][name]
        for row in rows
        for name in QUANTITIES
        if name in row["coverage"][method]
    }
    outside = {cell: found for cell, found in cells.items() if not LOW <= found <= HIGH}
    return {
        "cells": len(cells),
        "cells_outside": len(outside),
        "lowest": min(cells.values()),
        "highest": max(cells.values()),
        "mean": round(float(np.mean(list(cells.values()))), 4),
        "delta_lowest": min(v for (_, name), v in cells.items() if name == "delta"),
        "delta_highest": max(v for (_, name), v in cells.items() if name == "delta"),
        "outside": [f"{design}: {name} {found}" for (design, name), found in outside.items()],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=500, help="of designs of 1,200 items")
    parser.add_argument("--small-draws", type=int, default=2000, help="of smaller designs")
    parser.add_argument("--resamples", type=int, default=2000)
    options = parser.parse_args()
    started = time.perf_counter()
    rows = []
    for design, (reasoner, pairing) in designs().items():
        draws = options.draws if len(pairing.item_ids) >= 1000 else options.small_draws
        rows.append(
            {
                "design": design,
                "reasoner": asdict(reasoner),
                **measure(reasoner, pairing, draws, options.resamples),
            }
        )
        print(
            f"{design:32} bias of Δ {rows[-1]['bias']['delta']:+.4f}",
            *(f"{m} {c['delta']:.3f}" for m, c in rows[-1]["coverage"].items()),
            flush=True,
        )
    methods = ("multiway", "bootstrap", "items", "pigeonhole")
    write(
        RESULT,
        {
            "level": LEVEL,
            "bounds": [LOW, HIGH],
            "resamples": options.resamples,
            "pigeonhole": {"draws": PIGEONHOLE_DRAWS, "resamples": PIGEONHOLE_RESAMPLES},
            "seeds": "of reasoners 0, of the bootstrap the number of the draw",
            "largest_bias": max(abs(row["bias"]["delta"]) for row in rows),
            "largest_bias_allowed": BIAS,
            "seconds": round(time.perf_counter() - started, 1),
            "summary": {method: summarise(rows, method) for method in methods},
            "designs": rows,
        },
    )


if __name__ == "__main__":
    main()
