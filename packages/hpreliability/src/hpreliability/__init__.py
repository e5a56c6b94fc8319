"""How consistent is a hyper-parameter choice across environments, agents and data regimes?

The THC score of arXiv 2406.17523, with a null distribution, an interval that covers, comparators
and advice. Names are loaded when they are first used, so importing the package costs next to
nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hpreliability._version import __version__

if TYPE_CHECKING:
    from hpreliability import plot
    from hpreliability.advice import Recommendation, effect_size, recommend, tune_first
    from hpreliability.aggregates import (
        iqm,
        mean,
        median,
        optimality_gap,
        performance_profile,
        probability_of_improvement,
        stratified_bootstrap,
    )
    from hpreliability.comparators import (
        anova_importance,
        chs,
        friedman,
        kendall_w,
        lpi,
        rank_correlation,
        sensitivity,
        top1_agreement,
    )
    from hpreliability.consistency import Method
    from hpreliability.errors import HPReliabilityError
    from hpreliability.intervals import score_intervals
    from hpreliability.null import Null, permutation_null
    from hpreliability.ranks import interval_ranks
    from hpreliability.readers.consistent_hparams import from_consistent_hparams
    from hpreliability.readers.designs import from_runs
    from hpreliability.readers.files import read
    from hpreliability.readers.hydra_runs import from_hydra
    from hpreliability.readers.optuna_studies import from_optuna
    from hpreliability.readers.ray_results import from_ray_results
    from hpreliability.readers.sb3_logs import from_sb3
    from hpreliability.readers.tensorboard_events import from_tensorboard
    from hpreliability.readers.wandb_exports import from_wandb_export
    from hpreliability.report import write_report
    from hpreliability.scoring import THCResult, THCTable, thc, thc_score
    from hpreliability.sweep import Sweep
    from hpreliability.table import ScoreArray, Table, from_frame
    from hpreliability.uncertainty import (
        BiasedIntervalWarning,
        Uncertainty,
        context_influence,
        thc_interval,
    )

_HOMES = {
    "advice": ("Recommendation", "effect_size", "recommend", "tune_first"),
    "aggregates": (
        "iqm",
        "mean",
        "median",
        "optimality_gap",
        "performance_profile",
        "probability_of_improvement",
        "stratified_bootstrap",
    ),
    "comparators": (
        "anova_importance",
        "chs",
        "friedman",
        "kendall_w",
        "lpi",
        "rank_correlation",
        "sensitivity",
        "top1_agreement",
    ),
    "consistency": ("Method",),
    "errors": ("HPReliabilityError",),
    "intervals": ("score_intervals",),
    "null": ("Null", "permutation_null"),
    "ranks": ("interval_ranks",),
    "readers.consistent_hparams": ("from_consistent_hparams",),
    "readers.designs": ("from_runs",),
    "readers.files": ("read",),
    "readers.hydra_runs": ("from_hydra",),
    "readers.optuna_studies": ("from_optuna",),
    "readers.ray_results": ("from_ray_results",),
    "readers.sb3_logs": ("from_sb3",),
    "readers.tensorboard_events": ("from_tensorboard",),
    "readers.wandb_exports": ("from_wandb_export",),
    "report": ("write_report",),
    "scoring": ("THCResult", "THCTable", "thc", "thc_score"),
    "sweep": ("Sweep",),
    "table": ("ScoreArray", "Table", "from_frame"),
    "uncertainty": (
        "BiasedIntervalWarning",
        "Uncertainty",
        "context_influence",
        "thc_interval",
    ),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "BiasedIntervalWarning",
    "HPReliabilityError",
    "Method",
    "Null",
    "Recommendation",
    "ScoreArray",
    "Sweep",
    "THCResult",
    "THCTable",
    "Table",
    "Uncertainty",
    "__version__",
    "anova_importance",
    "chs",
    "context_influence",
    "effect_size",
    "friedman",
    "from_consistent_hparams",
    "from_frame",
    "from_hydra",
    "from_optuna",
    "from_ray_results",
    "from_runs",
    "from_sb3",
    "from_tensorboard",
    "from_wandb_export",
    "interval_ranks",
    "iqm",
    "kendall_w",
    "lpi",
    "mean",
    "median",
    "optimality_gap",
    "performance_profile",
    "permutation_null",
    "plot",
    "probability_of_improvement",
    "rank_correlation",
    "read",
    "recommend",
    "score_intervals",
    "sensitivity",
    "stratified_bootstrap",
    "thc",
    "thc_interval",
    "thc_score",
    "top1_agreement",
    "tune_first",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name == "plot":
        return import_module("hpreliability.plot")
    if name not in _HOME:
        raise AttributeError(f"module 'hpreliability' has no attribute {name!r}")
    found = getattr(import_module(f"hpreliability.{_HOME[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return __all__
