"""From the results of runs to the rows of a table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from hpreliability.errors import SweepResultError
from hpreliability.sweep.spec import SweepSpec, canonical
from hpreliability.sweep.trials import Trial

if TYPE_CHECKING:
    from decapod.jobs import JobResult

Point = tuple[int, float | None, float]  # budget, step, score


def points_of(value: Any, trial: Trial, spec: SweepSpec) -> list[Point]:
    """What one finished run contributes."""
    if "metrics" in value:
        metrics = value["metrics"]
        if spec.checkpoints:
            raise SweepResultError(
                f"{trial.label}: train gave no learning curve, so one run cannot serve the budgets "
                f"{list(spec.all_budgets)}; return points (step, score), or set checkpoints: false"
            )
        score = metrics.get(spec.metric)
        if not isinstance(score, int | float) or isinstance(score, bool):
            raise SweepResultError(
                f"{trial.label}: metric {spec.metric!r} is {score!r}; train gave: "
                f"{', '.join(metrics) or 'nothing'}"
            )
        return [(trial.budget, None, float(score))]
    curve = dict(value["curve"])
    if not spec.checkpoints:
        return [(trial.budget, step, score) for step, score in curve.items()]
    missing = [budget for budget in spec.all_budgets if budget not in curve]
    if missing:
        raise SweepResultError(
            f"{trial.label}: the learning curve has no point at budget {missing[0]}; its steps are "
            f"{', '.join(f'{step:g}' for step in list(curve)[:12])}"
        )
    return [(budget, None, curve[budget]) for budget in spec.all_budgets]


def frame_of(
    spec: SweepSpec,
    points: Mapping[Trial, list[Point] | None],
    slices: Iterable[tuple[str, str, frozenset[str]]],
) -> pd.DataFrame:
    """Rows of the table; `points` is None for a run that failed."""
    steps: dict[tuple[Any, ...], set[float | None]] = {}
    for trial, own in points.items():
        known = steps.setdefault((*trial.contexts.values(), trial.budget), set())
        known.update(step for _, step, _ in own or ())
    every = set().union(*steps.values())
    if None in every and len(every) > 1:
        raise SweepResultError("train gave scores in some runs and learning curves in others")
    curves = bool(every) and None not in every
    budgets = spec.all_budgets if spec.checkpoints else None
    by_config: dict[str, list[dict[str, Any]]] = {}
    for trial, own in points.items():
        if own is None:
            at = steps[(*trial.contexts.values(), trial.budget)] or {
                float(trial.budget) if curves else None
            }
            own = [(b, s, math.nan) for b in budgets or (trial.budget,) for s in at]
        rows = by_config.setdefault(canonical(trial.config), [])
        for budget, step, score in own:
            row = {**trial.contexts, "budget": budget, "seed": trial.seed_index, "score": score}
            rows.append(row | ({"step": step} if curves else {}))
    frame = pd.DataFrame(
        {"hyperparameter": name, "value": value, **row}
        for name, value, configs in slices
        for config in sorted(configs)
        for row in by_config.get(config, ())
    )
    if spec.design != "grid":
        return frame
    keys = [column for column in frame.columns if column != "score"]
    mean = frame.groupby(keys, sort=False)["score"].agg(lambda scores: scores.mean(skipna=False))
    return mean.reset_index()


def notes_of(failures: Sequence[JobResult], absent: int, total: int) -> Iterator[str]:
    """What a reader of the table must know of runs without a score."""
    if failures:
        killed = sum(result.status == "killed" for result in failures)
        yield (
            f"{len(failures)} of {total} runs failed ({killed} of them killed) and have the score "
            "NaN; running the sweep again repeats them"
        )
    if absent:
        yield f"{absent} of {total} runs have no result yet and are left out"
