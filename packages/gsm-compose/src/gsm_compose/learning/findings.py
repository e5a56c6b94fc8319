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

from gsm_compose.errors import LearningError, MissingExtraError
from gsm_compose.learning.experiment import ARMS
from gsm_compose.stats import multiway_estimates

if TYPE_CHECKING:
    from decapod.claims import Claim, Evidence

Rates = Mapping[str, Any]  # of one point: "q1", "q2" and "cf" (means of those columns)
Result = Mapping[str, Any]  # as `experiment.train_and_measure` returns it

# Points at which a model is measured: the arm whose run it is, and after which half.
POINTS: Final = {
    "one-hop": ("one-hop", "half"),
    "more one-hop": ("one-hop", "end"),
    "compositional": ("compositional", "end"),
    "code": ("code", "end"),
}
_COLUMNS = ("q1", "q2", "cf")


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


def claims() -> tuple[Claim, ...]:
    """The claims, each with its decision rule.

    Raises:
        MissingExtraError: decapod is not installed.
    """
    try:
        from decapod.claims import Above, Below, Claim
    except ImportError as error:
        raise MissingExtraError("decapod", "experiments") from error
    question = {name: QUESTIONS[name].points for name in QUESTIONS}
    return (
        Claim(
            id="learning-gap",
            statement="A small model trained from scratch on one-hop problems alone solves two-hop "
            "compositions less often than its one-hop accuracy predicts.",
            source="Eq. 1 and Section 4: the reasoning gap",
            arms=question["learning-gap"],
            metric="Δ = S_comp − S1·S2 after the first half of training",
            rule=Below(-0.1),
        ),
        Claim(
            id="learning-more-helps-one-hop",
            statement="Twice as much one-hop training makes it better at one-hop problems.",
            source="Figure 7: fine-tuning on GSM8K keeps raising accuracy on GSM8K",
            arms=question["learning-more-helps-one-hop"],
            metric="S1·S2 after the second half minus after the first",
            rule=Above(0.0),
        ),
        Claim(
            id="learning-more-leaves-gap",
            statement="Twice as much one-hop training does not close the gap.",
            source="Figure 7: accuracy on compositions does not follow",
            arms=question["learning-more-leaves-gap"],
            metric="Δ after the second half of one-hop training",
            rule=Below(-0.1),
        ),
        Claim(
            id="learning-composition-closes",
            statement="The same amount of training with compositions of other templates closes "
            "most of the gap.",
            source="Asked by the paper's reviewers; not an experiment of the paper",
            arms=question["learning-composition-closes"],
            metric="share of the gap that is gone, 1 − Δ(compositional) / Δ(more one-hop)",
            rule=Above(0.5),
        ),
        Claim(
            id="learning-code-shrinks",
            statement="A model that answers in code has a smaller gap, with no composition in its "
            "training.",
            source="Figure 8: code instead of natural-language reasoning",
            arms=question["learning-code-shrinks"],
            metric="Δ(code) − Δ(more one-hop), after equally many steps",
            rule=Above(0.1),
        ),
    )


def evidence(results: Sequence[Result], level: float = 0.95) -> dict[str, Evidence]:
    """What the runs say about each claim whose arms are among them.

    Args:
        results: of `experiment.train_and_measure`, in any order; the same seeds for all arms.
        level: of the intervals.

    Raises:
        LearningError: an arm twice with the same seed, or arms with different seeds.
        MissingExtraError: decapod is not installed.
    """
    runs = by_arm(results)
    return {
        name: _evidence(question, runs, level)
        for name, question in QUESTIONS.items()
        if all(POINTS[point][0] in runs for point in question.points)
    }


def by_arm(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Results by arm, in the order of their seeds.

    Raises:
        LearningError: as `evidence`.
    """
    runs = {
        arm: sorted((r for r in results if r["arm"] == arm), key=lambda r: int(r["seed"]))
        for arm in ARMS
    }
    runs = {arm: found for arm, found in runs.items() if found}
    seeds = {arm: [r["seed"] for r in found] for arm, found in runs.items()}
    if not runs or any(
        len(set(s)) < len(s) or s != next(iter(seeds.values())) for s in seeds.values()
    ):
        raise LearningError(
            f"results: expected each arm once with each seed, the same ones for all; got {seeds}"
        )
    return runs


def _evidence(question: Question, runs: Mapping[str, list[Result]], level: float) -> Evidence:
    from decapod.claims import Evidence
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


def learning_curves(results: Sequence[Result]) -> dict[str, dict[str, Any]]:
    """Figure data: rates along training, by arm.

    Returns:
        By arm: ``step`` (list of checkpoints), ``half`` (the step at which the arms part), and for
        each rate of `experiment.rates` and ``loss`` a list per checkpoint of the values of all
        seeds, in the order of the seeds.

    Raises:
        LearningError: as `evidence`.
    """
    found: dict[str, dict[str, Any]] = {}
    for arm, runs in by_arm(results).items():
        curves = [run["curve"] for run in runs]
        names = [name for name in curves[0][0] if name != "step"]
        found[arm] = {"step": [point["step"] for point in curves[0]], "half": runs[0]["steps"]}
        found[arm] |= {
            name: [[point[name] for point in points] for points in zip(*curves, strict=True)]
            for name in names
        }
    return found
