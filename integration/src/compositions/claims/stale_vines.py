"""What is claimed of stale vines, and how it is shown.

Set up with seed 0, where the rate was one of 3e-3, 1e-2 and 3e-2 that taught steadily, and where at
four updates bias and variance were alike; reported seeds begin at 1. The margins: 0.005 for a bias,
a fiftieth of the spread of values, and 0.02 for the success at the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from compositions.showing import composition, lines, over
from compositions.stale_vines import train
from decapod.claims import (
    Above,
    Below,
    Claim,
    Evidence,
    Exactly,
    Findings,
    Profile,
    Reproduction,
    Within,
)
from decapod.jobs import Job, JobResult

STALENESS = (0, 1, 2, 4, 8, 16)
SIZES: Final[Mapping[Profile, Mapping[str, Any]]] = {
    "quick": {"seeds": 2, "updates": 24},
    "standard": {"seeds": 10, "updates": 100},
    "full": {"seeds": 100, "updates": 100},
}
RATE, SETTLED = 3e-3, 16  # by then the stalest values are as stale as they will be


def jobs(profile: Profile) -> list[Job]:
    """A run for each staleness and seed; one more, served by another process."""
    size = SIZES[profile]
    cells = [(s, seed, "inline") for s in STALENESS for seed in range(1, 1 + size["seeds"])]
    return [
        Job(
            train,
            {
                "staleness": s,
                "updates": size["updates"],
                "rate": RATE,
                "seed": seed,
                "placement": w,
            },
            f"{s} updates old, seed {seed}, {w}",
        )
        for s, seed, w in [*cells, (4, 1, "process")]
    ]


CLAIMS = (
    Claim(
        id="fresh-values-unbiased",
        statement="Values that are served by the weights of the moment have no bias.",
        source="Equation 5 of VinePPO, through an engine of another library",
        arms=(),
        metric="mean error of a value against dynamic programming",
        rule=Within(-0.005, 0.005),
    ),
    Claim(
        id="one-update-old",
        statement="When they are one update old, their squared bias is below the variance of nine "
        "rollouts.",
        source="Here",
        arms=(),
        metric="logarithm of squared bias over variance",
        rule=Below(0.0),
    ),
    Claim(
        id="sixteen-updates-old",
        statement="When they are sixteen updates old, it is above it.",
        source="Here",
        arms=(),
        metric="logarithm of squared bias over variance",
        rule=Above(0.0),
    ),
    Claim(
        id="return-four-old",
        statement="Training with answers and values four updates old ends as high as without.",
        source="Here",
        arms=("four updates old", "fresh"),
        metric="exact success at the end, difference paired by seed",
        rule=Above(-0.02),
    ),
    Claim(
        id="served-elsewhere",
        statement="Served by another process, the run is the same, bit for bit.",
        source="The contract of the engine",
        arms=(),
        metric="runs of which every number is equal",
        rule=Exactly(1),
    ),
)


def conclude(profile: Profile, results: Sequence[JobResult]) -> Findings:
    """Evidence, and bias and variance drawn by staleness."""
    runs: dict[int, list[Any]] = {s: [] for s in STALENESS}
    for result in results[:-1]:
        runs[result.arguments["staleness"]].append(result.value)

    def settled(staleness: int, name: str) -> Any:
        return np.array(
            [np.mean([r[name] for r in run["rows"][SETTLED:]]) for run in runs[staleness]]
        )

    ends = {s: np.array([run["end"] for run in of]) for s, of in runs.items()}
    ratio = {s: np.log(settled(s, "bias2") / settled(s, "noise")) for s in STALENESS[1:]}
    same = float(results[-1].value == runs[4][0])
    after = f"Mean after update {SETTLED}, over the states whose values were asked for."
    detail = f"{after} Bias against dynamic programming, variance over nine rollouts."
    return Findings(
        evidence={
            "fresh-values-unbiased": over(settled(0, "error"), "seeds", after),
            "one-update-old": over(ratio[1], "seeds", detail),
            "sixteen-updates-old": over(ratio[16], "seeds", detail),
            "return-four-old": over(
                ends[4] - ends[0],
                "seeds",
                "Paired by seed.",
                {"four updates old": float(ends[4].mean()), "fresh": float(ends[0].mean())},
            ),
            "served-elsewhere": Evidence(
                same, same, same, 1, "pair of runs", {}, "Every stored number was compared."
            ),
        },
        figures=[
            lines(
                "Bias and variance of step values by staleness",
                STALENESS[1:],
                {
                    "squared bias": np.array([settled(s, "bias2") for s in STALENESS[1:]]).T,
                    "variance of nine rollouts": np.array(
                        [settled(s, "noise") for s in STALENESS[1:]]
                    ).T,
                },
                caption="Of values of steps, against the policy that learns from them. Lines are "
                "means, dots single seeds.",
                labels=("updates that the weights are old", "squared error"),
                then=lambda axes: axes.set(xscale="log", yscale="log"),
            )
        ],
    )


REPRODUCTION = Reproduction(
    name="stale-vines",
    paper=composition("Values of steps by old weights: asyncrlhf and vineppo"),
    claims=CLAIMS,
    jobs=jobs,
    conclude=conclude,
    packages=("asyncrlhf", "vineppo", "decapod", "torch", "transformers", "numpy"),
)
