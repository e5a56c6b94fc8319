"""A benchmark in numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from gsm_compose.benchmark import Benchmark


def benchmark_stats(benchmark: Benchmark) -> dict[str, Any]:
    """Counts, reuse and magnitudes, as JSON values.

    ``magnitudes`` has the quartiles of three sets of answers, each with its Kolmogorov-Smirnov
    distance from the first (and the p-value of the two-sample test): of the first questions, which
    is what S1 is measured on; of the last questions as published; and of the compositions. The
    paper shows the first and the last to match (Figure A.1 of arXiv 2410.01748).
    """
    items = benchmark.items
    last = Counter(item.q2.problem for item in items)
    firsts = [item.x for item in items]
    return {
        "items": len(items),
        "split": benchmark.split,
        "shapes": dict(sorted(Counter(f"{i.shape} of {len(i.hops)}" for i in items).items())),
        "orders": dict(
            sorted(Counter(" → ".join(f"Q{hop + 1}" for hop in i.order) for i in items).items())
        ),
        "first_questions": len({item.q1.problem for item in items}),
        "last_questions": len(last),
        "most_uses_of_a_last_question": max(last.values()),
        "magnitudes": {
            "first questions": _magnitudes(firsts, firsts),
            "last questions as published": _magnitudes([item.ignored for item in items], firsts),
            "compositions": _magnitudes([item.gold for item in items], firsts),
        },
    }


def _magnitudes(answers: Sequence[int], reference: Sequence[int]) -> dict[str, float]:
    from scipy.stats import ks_2samp

    low, median, high = np.quantile(answers, [0.25, 0.5, 0.75])
    # The exact p-value does not exist for some sizes; this one serves for all.
    test = ks_2samp(answers, reference, method="asymp")
    return {
        "quartile_1": float(low),
        "median": float(median),
        "quartile_3": float(high),
        "largest": float(max(answers)),
        "ks_distance": float(test.statistic),
        "ks_p_value": float(test.pvalue),
    }
