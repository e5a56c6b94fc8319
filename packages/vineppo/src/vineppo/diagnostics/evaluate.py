"""Any value functions, on the same states, against the same independent truth."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from vineppo.diagnostics.arrays import Floats, Ints, codes, floats
from vineppo.diagnostics.intervals import POSITIVE, SHARE, Interval, Resampling, ratios
from vineppo.diagnostics.ranking import score_sets
from vineppo.diagnostics.reliability import calibrate, membership
from vineppo.diagnostics.state_samples import Candidates, states_of
from vineppo.diagnostics.truth import PREDICTION, GroundTruth, shares_rollouts, stream_seed
from vineppo.diagnostics.value_report import Points, PositionBin, ValueReport
from vineppo.episodes import State
from vineppo.errors import InvalidInputError, at_least
from vineppo.states import unique
from vineppo.values import ValueEstimates, ValueEstimator

_ROUNDING: Final = 1e-12
_ENDLESS: Final = (-math.inf, math.inf)


@dataclass(frozen=True, eq=False)
class Predictions:
    """Values that were computed before, e.g. in a training run.

    Attributes:
        values: (S,) of the states.
        candidates: (C,) of the candidates, set after set; needed where candidates are judged.
        seed: that the estimator was called with, where rollouts were drawn; it must not be that of
            the truth.
    """

    values: npt.ArrayLike
    candidates: npt.ArrayLike | None = None
    seed: int | None = None


Predictor = ValueEstimator | Callable[[Sequence[State]], Any] | Predictions
"""A value function: an estimator, anything that maps states to as many numbers (an array, a list, a
tensor), or numbers that were computed before."""


def evaluate_values(
    predictors: Mapping[str, Predictor],
    states: Sequence[State],
    truth: GroundTruth,
    positions: npt.ArrayLike | None = None,
    clusters: Sequence[Hashable] | None = None,
    *,
    candidates: Candidates | None = None,
    tolerance: float = 0.05,
    bins: int = 10,
    resolution: float = 0.0,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, ValueReport]:
    """Judge value functions (Sec. 7 of arXiv 2410.01679).

    The reference code draws Monte-Carlo predictions from the very rollouts that make the truth, and
    counts ties as mistakes; neither is done here. Estimators that draw rollouts are called with a
    seed of the stream "prediction", from which no truth is drawn, whatever ``seed`` is.

    Args:
        predictors: value functions by name.
        states: S of them, e.g. :func:`vineppo.diagnostics.collect_states`.
        truth: of these states, from :func:`vineppo.diagnostics.ground_truth`.
        positions: (S,) place in the trajectory, from 0 to 1; None: no error by position.
        clusters: (S,) labels; equal ones are not independent. None: states of one prompt belong
            together.
        candidates: sets of alternative steps to rank; None: no scores of order.
        tolerance: of the share of states that are predicted to within it.
        bins: of positions and of calibration.
        resolution: see :func:`vineppo.diagnostics.score_sets`.
        level: confidence of the intervals.
        resamples: of the bootstrap over clusters.
        seed: of predictions and bootstrap.

    Returns:
        A report for each name.

    Raises:
        InvalidInputError: no predictor, no state, lengths that differ, a number that is not finite,
            an option out of range, or predictions that share rollouts with the truth.
    """
    how = Resampling(level, resamples, seed)
    if not predictors:
        raise InvalidInputError("predictors: expected at least one, got none")
    if not states:
        raise InvalidInputError("states: expected at least one, got none")
    if len(truth) != len(states):
        raise InvalidInputError(
            f"truth: expected a value for each of the {len(states)} states, got {len(truth)}"
        )
    at_least("tolerance", tolerance, 0)
    at_least("resolution", resolution, 0)
    at_least("bins", bins, 1)
    trial = _Trial(
        tuple(states),
        truth,
        None if positions is None else _positions(positions, len(states)),
        _by_prompt(states) if clusters is None else codes("clusters", clusters, len(states)),
        _Ranked.of(candidates) if candidates is not None else None,
        tolerance,
        bins,
        resolution,
        how,
    )
    found = {name: trial.predict(name, predictor) for name, predictor in predictors.items()}
    return {name: trial.report(name, *values) for name, values in found.items()}


@dataclass(frozen=True)
class _Ranked:
    """Candidates, laid flat."""

    states: tuple[State, ...]
    sizes: Ints
    groups: Ints
    truth: GroundTruth

    @classmethod
    def of(cls, candidates: Candidates) -> _Ranked:
        sets = candidates.sets
        groups = (
            _by_prompt([one.origin for one in sets])
            if candidates.clusters is None
            else codes("candidates.clusters", candidates.clusters, len(sets))
        )
        sizes = np.array([len(one.states) for one in sets], dtype=np.int64)
        return cls(tuple(states_of(sets)), sizes, groups, candidates.truth)


@dataclass(frozen=True)
class _Trial:
    """What all value functions of one evaluation are judged on."""

    states: tuple[State, ...]
    truth: GroundTruth
    positions: Floats | None
    groups: Ints
    ranked: _Ranked | None
    tolerance: float
    bins: int
    resolution: float
    how: Resampling

    def predict(self, name: str, predictor: Predictor) -> tuple[Floats, Floats | None]:
        """Values of the states, and of the candidates."""
        argument = f"predictors[{name!r}]"
        seed = stream_seed(PREDICTION, self.how.seed)
        values = self._values(argument, predictor, self.states, self.truth, seed)
        if self.ranked is None:
            return values, None
        if isinstance(predictor, Predictions):
            if predictor.candidates is None:
                raise InvalidInputError(
                    f"{argument}.candidates: expected values of the {len(self.ranked.states)} "
                    "candidates, got None; give them, or judge without candidates"
                )
            predictor = Predictions(predictor.candidates, seed=predictor.seed)
            argument += ".candidates"
        ranked = self.ranked
        return values, self._values(argument, predictor, ranked.states, ranked.truth, seed)

    def _values(
        self,
        argument: str,
        predictor: Predictor,
        states: tuple[State, ...],
        truth: GroundTruth,
        seed: int,
    ) -> Floats:
        if isinstance(predictor, Predictions):
            if predictor.seed is not None and predictor.seed == truth.stream:
                raise InvalidInputError(
                    f"{argument}.seed: expected another than that of the truth's own rollouts, got "
                    f"{predictor.seed}; a truth must not share rollouts with what it judges"
                )
            given = predictor.values
        else:
            given = _call(predictor, states, seed)
        values = floats(argument, given, (len(states),))
        different, place = unique(states)
        first = np.full(len(different), len(states))
        np.minimum.at(first, place, np.arange(len(states)))
        if shares_rollouts(values, truth, first):
            raise InvalidInputError(
                f"{argument}: expected values that are independent of the truth, got means of the "
                "truth's own rollouts; call the estimator with another seed than truth.stream"
            )
        return values

    def report(self, name: str, values: Floats, candidates: Floats | None) -> ValueReport:
        """All that is found out about one value function."""
        error = values - self.truth.values
        noise = self.truth.standard_errors
        near = np.abs(error) <= self.tolerance + _ROUNDING
        columns = np.stack([np.abs(error), error, error**2 - noise**2, near], axis=1)
        bounds = [POSITIVE, _ENDLESS, _ENDLESS, SHARE]
        mae, bias, mse, within = ratios(
            columns, np.ones_like(columns), self.groups, bounds, self.how
        )
        top1 = chance = pairwise = strict = None
        if candidates is not None:
            top1, chance, pairwise, strict = self._order(candidates)
        return ValueReport(
            name=name,
            level=self.how.level,
            tolerance=self.tolerance,
            rollouts=float(self.truth.counts.mean()),
            mae=mae,
            mae_floor=float(math.sqrt(2 / math.pi) * noise.mean()),
            bias=bias,
            mse=mse,
            within=within,
            top1=top1,
            chance=chance,
            pairwise=pairwise,
            pairwise_strict=strict,
            by_position=self._by_position(np.abs(error)),
            calibration=calibrate(values, self.truth.values, self.groups, self.bins, self.how),
            points=Points(
                tuple(values.tolist()),
                tuple(self.truth.values.tolist()),
                tuple(self.groups.tolist()),
                None if self.positions is None else tuple(self.positions.tolist()),
            ),
        )

    def _order(self, candidates: Floats) -> tuple[Interval, float, Interval, Interval]:
        assert self.ranked is not None
        truth = self.ranked.truth
        scores = score_sets(
            candidates,
            truth.values,
            self.ranked.sizes,
            standard_errors=truth.standard_errors,
            resolution=self.resolution,
        )
        has_best = ~np.isnan(scores.top1)
        top = np.stack([np.nan_to_num(scores.top1), scores.agreements, scores.strict], axis=1)
        bottom = np.stack([has_best, scores.pairs, scores.all_pairs], axis=1).astype(np.float64)
        top1, pairwise, strict = ratios(top, bottom, self.ranked.groups, [SHARE] * 3, self.how)
        chance = float(scores.chance[has_best].mean()) if has_best.any() else math.nan
        return top1, chance, pairwise, strict

    def _by_position(self, errors: Floats) -> tuple[PositionBin, ...]:
        if self.positions is None:
            return ()
        edges = np.linspace(0, 1, self.bins + 1)
        inside = membership(self.positions, edges)
        held = np.flatnonzero(inside.any(axis=0))
        weights = inside[:, held].astype(np.float64)
        means = ratios(
            errors[:, None] * weights, weights, self.groups, [POSITIVE] * len(held), self.how
        )
        return tuple(
            PositionBin(float(edges[b]), float(edges[b + 1]), mean)
            for b, mean in zip(held, means, strict=True)
        )


def _call(predictor: Any, states: Sequence[State], seed: int) -> Any:
    """Its values; the seed is for those who ask for one."""
    try:
        seeded = "seed" in inspect.signature(predictor).parameters
    except (TypeError, ValueError):  # not every builtin tells what it takes
        seeded = False
    given = predictor(states, seed=seed) if seeded else predictor(states)
    return given.values if isinstance(given, ValueEstimates) else given


def _positions(positions: npt.ArrayLike, length: int) -> Floats:
    found = floats("positions", positions, (length,))
    if found.min() < 0 or found.max() > 1:
        raise InvalidInputError(
            f"positions: expected numbers from 0 to 1, got {found.min():g} to {found.max():g}; "
            "divide the step by the number of steps"
        )
    return found


def _by_prompt(states: Sequence[State]) -> Ints:
    return codes("clusters", [(s.row, s.prompt_ids) for s in states], len(states))
