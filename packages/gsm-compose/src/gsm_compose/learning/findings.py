"""The claims of the learning experiment, with rules fixed in advance, and what its runs say.

Each seed gives one number per claim, a function of its arms' rates. With two seeds or more the
interval is Student's t over seeds: it covers weights, examples and test pairs, which all change
with the seed. With one seed there is only the interval over test pairs, which says nothing of other
seeds; it is the multiway estimate of `gsm_compose.stats`, which allows for questions used twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from decapod.claims import Above, Below, Claim, Evidence, Profile
from gsm_compose.learning.exhibits import figures, tables
from gsm_compose.learning.experiment import ARMS, train_and_measure
from gsm_compose.learning.runs import Result, by_arm
from gsm_compose.stats import multiway_estimates

if TYPE_CHECKING:
    from decapod.jobs import Job

__all__ = [
    "CLAIMS", "NOTES", "POINTS", "QUESTIONS", "SCALES", "Question", "Scale", "delta", "evidence",
    "figures", "jobs", "tables",
]  # fmt: skip

Rates = Mapping[str, Any]  # of one point: "q1", "q2" and "cf" (means of those columns)

# Points at which a model is measured: the arm whose run it is, and after which half.
POINTS: Final = {
    "one-hop": ("one-hop", "half"),
    "more one-hop": ("one-hop", "end"),
    "compositional": ("compositional", "end"),
    "code": ("code", "end"),
}
_COLUMNS = ("q1", "q2", "cf")
_VERSION: Final = "1"  # raise when a job gives other results
# Ten points: five standard errors of Δ in the paper's design; its small models have 12 to 37.
_CLEAR: Final = 0.1


def delta(rates: Rates) -> Any:
    """S_comp − S1·S2."""
    return rates["cf"] - rates["q1"] * rates["q2"]


@dataclass(frozen=True)
class Question:
    """A claim's number as a function of the rates at its points, and what its arms show.

    Attributes:
        points: what it compares; names of `POINTS`.
        effect: from the rates of those points, in order, to the number, by arithmetic only.
        shown: what is reported of each point.
    """

    points: tuple[str, ...]
    effect: Callable[..., Any]
    shown: Callable[[Rates], Any] = delta


QUESTIONS: Final[dict[str, Question]] = {
    "learning-gap": Question(("one-hop",), delta),
    "learning-more-helps-one-hop": Question(
        ("more one-hop", "one-hop"),
        lambda more, less: more["q1"] * more["q2"] - less["q1"] * less["q2"],
        lambda rates: rates["q1"] * rates["q2"],
    ),
    "learning-more-leaves-gap": Question(("more one-hop",), delta),
    "learning-composition-closes": Question(
        ("more one-hop", "compositional"),
        lambda more, composed: 1 - delta(composed) / delta(more),
    ),
    "learning-code-shrinks": Question(
        ("code", "more one-hop"), lambda code, more: delta(code) - delta(more)
    ),
}


CLAIMS: Final = (
    Claim(
        id="learning-gap",
        statement="A small model trained from scratch on one-hop problems alone solves two-hop "
        "compositions less often than its one-hop accuracy predicts.",
        source="Eq. 1 and Figures 1 and 3 of the paper, at another scale",
        arms=QUESTIONS["learning-gap"].points,
        metric="Δ = S_comp − S1·S2 after the first half of training",
        rule=Below(-_CLEAR),
    ),
    Claim(
        id="learning-more-helps-one-hop",
        statement="Twice as much one-hop training makes it better at one-hop problems.",
        source="Figure 7 of the paper, its rising curve",
        arms=QUESTIONS["learning-more-helps-one-hop"].points,
        metric="S1·S2 after the second half minus after the first",
        rule=Above(0.0),
    ),
    Claim(
        id="learning-more-leaves-gap",
        statement="Twice as much one-hop training does not close the gap.",
        source="Figure 7 of the paper, its other curve",
        arms=QUESTIONS["learning-more-leaves-gap"].points,
        metric="Δ after the second half of one-hop training",
        rule=Below(-_CLEAR),
    ),
    Claim(
        id="learning-composition-closes",
        statement="As many steps of training with compositions of other templates close most of "
        "the gap.",
        source="Asked by the paper's reviewers; not an experiment of the paper",
        arms=QUESTIONS["learning-composition-closes"].points,
        metric="share of the gap that is gone, 1 − Δ(compositional) / Δ(more one-hop)",
        rule=Above(0.5),
    ),
    Claim(
        id="learning-code-shrinks",
        statement="A model that answers in code has a smaller gap, with no composition in its "
        "training.",
        source="Figure 8 of the paper, trained here rather than prompted",
        arms=QUESTIONS["learning-code-shrinks"].points,
        metric="Δ(code) − Δ(more one-hop), after as many steps",
        rule=Above(0.0),
    ),
)


@dataclass(frozen=True)
class Scale:
    """How much of the experiment is run.

    Attributes:
        seeds: of every arm, counted from 0; the set-up was tuned on seeds from 100 on.
        steps: of each half of the training.
        pairs: held-out pairs per seed.
        checkpoints: measurements per half.
    """

    seeds: int
    steps: int = 300
    pairs: int = 300
    checkpoints: int = 3


SCALES: Final[dict[Profile, Scale]] = {
    "quick": Scale(seeds=1),
    "standard": Scale(seeds=5),
    "full": Scale(seeds=20, pairs=1000, checkpoints=6),
}
NOTES: Final = (
    "The learning experiment is about a model of 130 thousand parameters and a language of some "
    "200 words. It shows that the gap can come from what a model is trained on; it does not show "
    "that this is where the gap of large models comes from.",
    "Where a single seed was run, the intervals of the learning experiment are over its test pairs "
    "and say nothing of other seeds; its verdicts are then a demonstration.",
    "How well compositions of some templates carry over to others depends on how many templates "
    "there are. With 12 templates a group instead of 320, an exploratory run lost most of what "
    "it had gained at first.",
)


def jobs(scale: Scale) -> list[Job]:
    """A job for every arm and seed; all arms of a seed stand together."""
    from decapod.jobs import Job

    return [
        Job(
            train_and_measure,
            {
                "arm": arm,
                "seed": seed,
                "steps": scale.steps,
                "pairs": scale.pairs,
                "checkpoints": scale.checkpoints,
            },
            f"learning, {arm}, seed {seed}",
            _VERSION,
        )
        for seed in range(scale.seeds)
        for arm in ARMS
    ]


def evidence(results: Sequence[Result], level: float = 0.95) -> dict[str, Evidence]:
    """What the runs say about each claim whose arms are among them.

    Args:
        results: of `experiment.train_and_measure`, in any order; the same seeds for all arms.
        level: of the intervals.

    Raises:
        LearningError: an arm twice with the same seed, or arms with different seeds.
    """
    runs = by_arm(results)
    return {
        name: _evidence(question, runs, level)
        for name, question in QUESTIONS.items()
        if all(POINTS[point][0] in runs for point in question.points)
    }


def _evidence(question: Question, runs: Mapping[str, list[Result]], level: float) -> Evidence:
    from decapod.stats import aggregate

    points = {
        name: [_point(name, run) for run in runs[POINTS[name][0]]] for name in question.points
    }
    means = {name: [_means(point) for point in found] for name, found in points.items()}
    per_seed = np.array([_number(question.effect, of) for of in zip(*means.values(), strict=True)])
    arms = {name: float(np.mean([question.shown(r) for r in of])) for name, of in means.items()}
    n = len(per_seed)
    if not np.isfinite(per_seed).all():
        return Evidence(
            0.0, -np.inf, np.inf, n, "seeds", arms,
            "Undefined: there is a seed without any gap to close.",
        )  # fmt: skip
    if n > 1:
        estimate = aggregate(per_seed, "mean", level=level)
        low, high = estimate.low, estimate.high
        how = f"Student's t over {n} seeds"
    else:
        low, high = _over_pairs(question, {name: of[0] for name, of in points.items()}, level)
        how = "over the test pairs of one seed; says nothing of other seeds"
    count = len(next(iter(points.values()))[0]["q1"])
    return Evidence(
        float(per_seed.mean()), low, high, n, "seeds", arms,
        f"{count} held-out pairs per seed; {100 * level:g} % interval: {how}.",
    )  # fmt: skip


def _point(name: str, run: Result) -> dict[str, NDArray[np.float64]]:
    """Columns (n,) of a point, and labels of its questions."""
    found = {column: np.asarray(run[POINTS[name][1]][column], dtype=float) for column in _COLUMNS}
    return found | {role: np.asarray(run[role]) for role in ("q1_ids", "q2_ids")}


def _means(point: Mapping[str, NDArray[np.float64]]) -> dict[str, float]:
    return {column: float(point[column].mean()) for column in _COLUMNS}


def _number(effect: Callable[..., Any], of: Sequence[Rates]) -> float:
    try:
        return float(effect(*of))
    except ZeroDivisionError:
        return float("nan")


def _over_pairs(
    question: Question, points: Mapping[str, Mapping[str, NDArray[np.float64]]], level: float
) -> tuple[float, float]:
    """Interval over the test pairs, which all points of a seed share."""
    columns = {
        f"{name}:{column}": point[column] for name, point in points.items() for column in _COLUMNS
    }

    def statistic(means: Mapping[str, Any]) -> dict[str, Any]:
        rates = [{c: means[f"{name}:{c}"] for c in _COLUMNS} for name in points]
        return {"effect": question.effect(*rates)}

    first = next(iter(points.values()))
    estimate = multiway_estimates(columns, statistic, (first["q1_ids"], first["q2_ids"]))["effect"]
    if estimate is None:
        return -np.inf, np.inf
    interval = estimate.interval(level)
    return interval.low, interval.high
