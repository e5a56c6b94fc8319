"""Diagnostics of any value function, and of the gradients and runs that come of it.

    sample = collect_states(episodes, borders)
    truth = ground_truth(backend, reward, sample.states, params=params)
    reports = evaluate_values(
        {"critic": critic, "K = 9": MonteCarloValueEstimator(backend, reward, 9, params=params)},
        sample.states, truth, sample.positions, sample.clusters,
    )
    print(reports["critic"])

Needs numpy and torch; the figures of :mod:`vineppo.diagnostics.plots` need the extra
``experiments``. Names are loaded when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vineppo.diagnostics import plots
    from vineppo.diagnostics.curves import TrainTestCurve, best_within, train_test_curve
    from vineppo.diagnostics.evaluate import Predictions, Predictor, evaluate_values
    from vineppo.diagnostics.gradients import GradientVariance, gradient_variance
    from vineppo.diagnostics.intervals import Interval, mean_interval
    from vineppo.diagnostics.ranking import SetScores, score_sets
    from vineppo.diagnostics.reliability import Calibration, CalibrationBin, calibration
    from vineppo.diagnostics.state_samples import (
        Alternatives,
        Candidates,
        StateSample,
        alternatives,
        collect_states,
        states_of,
    )
    from vineppo.diagnostics.truth import GroundTruth, ground_truth
    from vineppo.diagnostics.value_report import (
        PositionBin,
        ValueReport,
        comparison_table,
        mae_difference,
    )

_HOMES = {
    "curves": ("TrainTestCurve", "best_within", "train_test_curve"),
    "evaluate": ("Predictions", "Predictor", "evaluate_values"),
    "gradients": ("GradientVariance", "gradient_variance"),
    "intervals": ("Interval", "mean_interval"),
    "ranking": ("SetScores", "score_sets"),
    "reliability": ("Calibration", "CalibrationBin", "calibration"),
    "state_samples": (
        "Alternatives",
        "Candidates",
        "StateSample",
        "alternatives",
        "collect_states",
        "states_of",
    ),
    "truth": ("GroundTruth", "ground_truth"),
    "value_report": ("PositionBin", "ValueReport", "comparison_table", "mae_difference"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Alternatives",
    "Calibration",
    "CalibrationBin",
    "Candidates",
    "GradientVariance",
    "GroundTruth",
    "Interval",
    "PositionBin",
    "Predictions",
    "Predictor",
    "SetScores",
    "StateSample",
    "TrainTestCurve",
    "ValueReport",
    "alternatives",
    "best_within",
    "calibration",
    "collect_states",
    "comparison_table",
    "evaluate_values",
    "gradient_variance",
    "ground_truth",
    "mae_difference",
    "mean_interval",
    "plots",
    "score_sets",
    "states_of",
    "train_test_curve",
]


def __getattr__(name: str) -> Any:
    if name == "plots":
        return import_module("vineppo.diagnostics.plots")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"vineppo.diagnostics.{_HOME[name]}"), name)
