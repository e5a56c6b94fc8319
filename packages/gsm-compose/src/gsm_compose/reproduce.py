"""The claims that `decapod reproduce` tests: the generator, the estimators, and the gap itself.

Every rule was fixed here before the run whose results are quoted. The thresholds:

- *Exactly*: counts of facts about GSM8K and of labels that hold; there is no room for chance.
- *0.05* for the distance between the magnitudes of answers: the paper shows two histograms that
  match and gives no number (Figure A.1); two samples of this size from one distribution are 0.054
  apart once in twenty times.
- *0.005* for the bias of Δ, a quarter of its standard error in the paper's design, and *0.92 to
  0.98* for the coverage of nominal 95 % intervals.
- Those of the learning experiment stand with their reasons in `gsm_compose.learning.findings`.

The yields of the rules and the match of the magnitudes had been seen while the generator was built;
the learning experiment was set up on other seeds than those it is judged on. The rule for the
magnitudes is the second one: the first asked that the interval of a difference of mean logarithms
lie within a quarter of a doubling, which 1200 answers cannot decide, their interval being as wide;
a quick run showed that, and the distance of distributions over seeds of the builder took its place.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from decapod.claims import (
    Below,
    Claim,
    Evidence,
    Exactly,
    Findings,
    Paper,
    Profile,
    Reproduction,
    Within,
)
from gsm_compose import exhibits
from gsm_compose.benchmark import Benchmark
from gsm_compose.building import build_benchmark
from gsm_compose.describe import benchmark_stats
from gsm_compose.engine.problems import load_gsm8k
from gsm_compose.engine.slots import candidates
from gsm_compose.engine.yields import count_yields
from gsm_compose.errors import MissingExtraError
from gsm_compose.learning import findings as learning
from gsm_compose.recovery import REASONERS, recover
from gsm_compose.verify import symbolic_audit

if TYPE_CHECKING:
    from decapod.jobs import Job, JobResult

_VERSION: Final = "1"  # raise when a job gives other results
_ITEMS: Final = 1200  # the size of the paper's three sets
_CHUNK: Final = 250  # draws a job

CLAIMS: Final = (
    Claim(
        id="annotations",
        statement="All calculator annotations of the test split hold exactly in rational "
        "arithmetic, so solutions can be read as programs.",
        source="Our own count of GSM8K test; not a number of the paper",
        arms=(),
        metric="annotations that hold",
        rule=Exactly(4282),
    ),
    Claim(
        id="figure-2",
        statement="The paper's example pair, unicorns into lockers, gets the paper's answer.",
        source="Figure 2 of the paper",
        arms=(),
        metric="answer of the composition",
        rule=Exactly(48),
    ),
    Claim(
        id="labels",
        statement="Of 1200 compositions built without a language model, every one is confirmed "
        "along another way: all resolutions of its program, its solution parsed again, and its "
        "Python program run.",
        source="The paper checks its labels with 16 samples of two models and by hand (Section 2)",
        arms=(),
        metric="items without a fault",
        rule=Exactly(_ITEMS),
    ),
    Claim(
        id="magnitudes",
        statement="Answers of compositions are as large as those of the original questions.",
        source="Figure A.1 of the paper",
        arms=(),
        metric="Kolmogorov-Smirnov distance between the 1200 answers and those of all test rows",
        rule=Below(0.05),
    ),
    Claim(
        id="bias",
        statement="The estimate of Δ is right on average for reasoners whose gap is known.",
        source="Own check of the paper's eq. 1 as an estimator",
        arms=tuple(REASONERS),
        metric="mean estimate of Δ minus the analytic value, for the reasoner where it is largest",
        rule=Within(-0.005, 0.005),
    ),
    Claim(
        id="coverage",
        statement="Intervals of Δ at 95 % cover the true value as often as they say.",
        source="Own check; the paper reports no intervals",
        arms=tuple(REASONERS),
        metric="share of intervals that cover, over all reasoners",
        rule=Within(0.92, 0.98),
    ),
    *learning.CLAIMS,
)


@dataclass(frozen=True)
class _Scale:
    """How much work a profile is.

    Attributes:
        benchmarks: built with other seeds, for the magnitudes.
        draws: replications for each simulated reasoner.
        learning: size of the learning experiment.
    """

    benchmarks: int
    draws: int
    learning: learning.Scale


_SCALES: Final[dict[Profile, _Scale]] = {
    "quick": _Scale(3, 500, learning.SCALES["quick"]),
    "standard": _Scale(10, 2000, learning.SCALES["standard"]),
    "full": _Scale(50, 10_000, learning.SCALES["full"]),
}


def build_and_audit(n: int, seed: int) -> dict[str, Any]:
    """Job: the paper's three sets of `n` questions from GSM8K test, and all that checks them."""
    rows = load_gsm8k("test")
    benchmark = build_benchmark(rows, n=n, seed=seed)
    audit = symbolic_audit(benchmark, rows, workers=1)
    (number,) = (slot for slot in candidates(rows[418]) if slot.text == "5")
    return {
        "yields": asdict(count_yields(rows)),
        "settings": dict(benchmark.settings),
        "stats": benchmark_stats(benchmark),
        "faults": {item: list(texts) for item, texts in audit.faults.items()},
        "executed": audit.executed,
        "original": [int(row.final) for row in rows if row.final > 0],
        "first": [item.x for item in benchmark],
        "composed": [item.gold for item in benchmark],
        "figure_2": int(rows[418].program.evaluate({number: rows[136].final})),
        "examples": _examples(benchmark),
    }


def _examples(benchmark: Benchmark) -> list[list[str]]:
    return [
        [item.q1.question, item.q2.template, f"{item.x} → {item.gold}"]
        for item in benchmark.items[:5]
    ]


def magnitude_distance(n: int, seed: int) -> float:
    """Job: how far the answers of a benchmark are from those of all rows with a positive answer.

    Returns:
        The two-sample Kolmogorov-Smirnov statistic, between 0 and 1.
    """
    from scipy.stats import ks_2samp

    rows = load_gsm8k("test")
    answers = [item.gold for item in build_benchmark(rows, n=n, seed=seed)]
    return float(ks_2samp(answers, [int(row.final) for row in rows if row.final > 0]).statistic)


def jobs(profile: Profile) -> list[Job]:
    """All jobs of a profile: the generator, the simulated reasoners, the learning runs.

    Raises:
        MissingExtraError: without the extra `experiments`; said here, before any job has run.
    """
    for package in ("matplotlib", "torch", "transformers"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(package, "experiments")
    return [
        _generator_job(),
        *_magnitude_jobs(profile),
        *_recovery_jobs(profile),
        *learning.jobs(_SCALES[profile].learning),
    ]


def _generator_job() -> Job:
    from decapod.jobs import Job

    return Job(build_and_audit, {"n": _ITEMS, "seed": 0}, "build and audit", _VERSION)


def _magnitude_jobs(profile: Profile) -> list[Job]:
    from decapod.jobs import Job

    return [
        Job(magnitude_distance, {"n": _ITEMS, "seed": seed}, f"magnitudes, seed {seed}", _VERSION)
        for seed in range(_SCALES[profile].benchmarks)
    ]


def _recovery_jobs(profile: Profile) -> list[Job]:
    from decapod.jobs import Job

    return [
        Job(
            recover,
            {"reasoner": name, "first": first, "draws": _CHUNK},
            f"{name}, draws {first} to {first + _CHUNK - 1}",
            _VERSION,
        )
        for name in REASONERS
        for first in range(0, _SCALES[profile].draws, _CHUNK)
    ]


def conclude(profile: Profile, results: Sequence[JobResult]) -> Findings:
    """Evidence, figures and tables from the results of `jobs(profile)`, in their order."""
    values: list[Any] = [result.value for result in results]
    first = 1 + len(_magnitude_jobs(profile))
    last = first + len(_recovery_jobs(profile))
    built, distances, learned = values[0], values[1:first], values[last:]
    recovered = recovery_columns(values[first:last])
    evidence = {
        "annotations": _count(built["yields"]["exact"], "annotations"),
        "figure-2": _count(built["figure_2"], "pairs", n=1),
        "labels": _labels(built),
        "magnitudes": _magnitudes(distances),
        "bias": _bias(recovered),
        "coverage": _coverage(recovered),
        **learning.evidence(learned),
    }
    return Findings(
        evidence=evidence,
        figures=[*exhibits.figures(built, recovered), *learning.figures(learned)],
        tables=[*exhibits.tables(built, recovered), *learning.tables(learned)],
        notes=[
            "The paper released no data: these are other compositions than its own, built by "
            "rules, and no model of the paper is evaluated here.",
            "That a label follows from the published solution does not make the question good. "
            "What reading found is in the package's audit file.",
            *learning.NOTES,
        ],
    )


Recovered = dict[str, dict[str, dict[str, Any]]]


def recovery_columns(values: Sequence[dict[str, Any]]) -> Recovered:
    """Reasoner → quantity → ``truth``, and arrays ``estimates``, ``low``, ``high`` over draws."""
    columns: Recovered = {}
    for value in values:
        by_quantity = columns.setdefault(value["reasoner"], {})
        for name, found in value["quantities"].items():
            column = by_quantity.setdefault(name, {"truth": found["truth"]})
            for key in ("estimates", "low", "high"):
                column[key] = np.concatenate([column.get(key, np.empty(0)), found[key]])
    return columns


def _count(value: int, unit: str, n: int | None = None) -> Evidence:
    return Evidence(effect=value, low=value, high=value, n=n or value, unit=unit)


def _labels(built: dict[str, Any]) -> Evidence:
    whole = len(built["composed"]) - len(built["faults"])
    return Evidence(
        effect=whole,
        low=whole,
        high=whole,
        n=len(built["composed"]),
        unit="items",
        detail=f"{built['executed']} programs run in the sandbox. Each last question serves at "
        f"most {built['settings']['max_reuse']} times.",
    )


def _magnitudes(distances: Sequence[float]) -> Evidence:
    from decapod.stats import aggregate

    estimate = aggregate(distances, "mean")
    return Evidence(
        effect=estimate.value,
        low=estimate.low,
        high=estimate.high,
        n=len(distances),
        unit="seeds of the builder",
        detail=f"From {min(distances):.3f} to {max(distances):.3f}; 95 % interval of the mean over "
        "seeds. Two samples of this size from one distribution are 0.054 apart once in twenty "
        "times.",
    )


def _bias(recovered: Recovered) -> Evidence:
    bias = {
        name: float(found["delta"]["estimates"].mean() - found["delta"]["truth"])
        for name, found in recovered.items()
    }
    worst = max(bias, key=lambda name: abs(bias[name]))
    estimates = recovered[worst]["delta"]["estimates"]
    error = float(estimates.std(ddof=1) / len(estimates) ** 0.5)
    return Evidence(
        effect=bias[worst],
        low=bias[worst] - 1.96 * error,
        high=bias[worst] + 1.96 * error,
        n=len(estimates),
        unit="draws",
        arms=bias,
        detail=f"{worst!r}: analytic Δ {recovered[worst]['delta']['truth']:.4f}; each draw has "
        f"{_ITEMS} items; normal 95 % interval of the mean.",
    )


def _coverage(recovered: Recovered) -> Evidence:
    from gsm_compose.stats import wilson

    shares = {name: exhibits.coverage(found["delta"]) for name, found in recovered.items()}
    draws = sum(len(found["delta"]["estimates"]) for found in recovered.values())
    together = float(np.mean(list(shares.values())))
    interval = wilson(together * draws, draws)
    return Evidence(
        effect=together,
        low=interval.low,
        high=interval.high,
        n=draws,
        unit="draws",
        arms=shares,
        detail="Wilson's 95 % interval.",
    )


REPRODUCTION: Final = Reproduction(
    name="gsm-compose",
    paper=Paper(
        title="Not All LLM Reasoners Are Created Equal",
        authors="Hosseini, Sordoni, Toyama, Courville, Agarwal",
        venue="arXiv",
        year=2024,
        url="https://arxiv.org/abs/2410.01748",
    ),
    claims=CLAIMS,
    jobs=jobs,
    conclude=conclude,
    packages=("gsm-compose", "numpy", "scipy", "torch", "transformers"),
)
