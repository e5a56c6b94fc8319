"""Credit assignment for language models, provably right and measurable.

VinePPO (arXiv 2410.01679) replaces PPO's critic by Monte-Carlo rollouts from intermediate states.
Here are that method, its baselines in the same loop, value estimators and diagnostics for any value
function, and tasks on which all of it can be checked exactly. Names are loaded when they are first
used, so importing the package costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vineppo._version import __version__

if TYPE_CHECKING:
    from vineppo import (
        advantages,
        diagnostics,
        losses,
        rollout,
        segmenters,
        tasks,
        values,
    )
    from vineppo.config import (
        DPOPositiveConfig,
        GRPOConfig,
        PolicyGradientConfig,
        PPOConfig,
        RestEMConfig,
        RLOOConfig,
        VinePPOConfig,
    )
    from vineppo.episodes import Episode, Reward, Rollout, State
    from vineppo.errors import (
        InvalidInputError,
        MissingExtraError,
        NotFiniteError,
        RewardError,
    )
    from vineppo.methods import (
        DPOPositiveTrainer,
        GRPOTrainer,
        PolicyGradientTrainer,
        PPOTrainer,
        RestEMTrainer,
        RLOOTrainer,
        VinePPOTrainer,
    )

_MODULES = ("advantages", "diagnostics", "losses", "rollout", "segmenters", "tasks", "values")
_HOMES = {
    "config": (
        "DPOPositiveConfig",
        "GRPOConfig",
        "PPOConfig",
        "PolicyGradientConfig",
        "RLOOConfig",
        "RestEMConfig",
        "VinePPOConfig",
    ),
    "episodes": ("Episode", "Reward", "Rollout", "State"),
    "errors": ("InvalidInputError", "MissingExtraError", "NotFiniteError", "RewardError"),
    "methods": (
        "DPOPositiveTrainer",
        "GRPOTrainer",
        "PPOTrainer",
        "PolicyGradientTrainer",
        "RLOOTrainer",
        "RestEMTrainer",
        "VinePPOTrainer",
    ),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}
_TRAIN = ("accelerate", "decapod", "safetensors", "transformers")

__all__ = [
    "DPOPositiveConfig",
    "DPOPositiveTrainer",
    "Episode",
    "GRPOConfig",
    "GRPOTrainer",
    "InvalidInputError",
    "MissingExtraError",
    "NotFiniteError",
    "PPOConfig",
    "PPOTrainer",
    "PolicyGradientConfig",
    "PolicyGradientTrainer",
    "RLOOConfig",
    "RLOOTrainer",
    "RestEMConfig",
    "RestEMTrainer",
    "Reward",
    "RewardError",
    "Rollout",
    "State",
    "VinePPOConfig",
    "VinePPOTrainer",
    "__version__",
    "advantages",
    "diagnostics",
    "losses",
    "rollout",
    "segmenters",
    "tasks",
    "values",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES and name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        if name in _MODULES:
            return import_module(f"vineppo.{name}")
        return getattr(import_module(f"vineppo.{_HOME[name]}"), name)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _TRAIN:
            raise
        from vineppo.errors import MissingExtraError

        raise MissingExtraError(missing, "train") from error
