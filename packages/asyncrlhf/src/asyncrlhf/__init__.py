"""Asynchronous RLHF whose asynchrony can be proved.

Generation and learning run at the same time, the learner a bounded number of updates behind: after
arXiv 2410.18252. A run can be replayed bit for bit, its speed predicted before it starts, and its
actor killed without changing the result. Names are loaded when they are first used, so importing
the package costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from asyncrlhf._version import __version__

if TYPE_CHECKING:
    from asyncrlhf import (
        corrections,
        engines,
        evaluate,
        losses,
        rewards,
        schedule,
        sequences,
        tasks,
        transport,
    )
    from asyncrlhf.config import AsyncRLHFConfig
    from asyncrlhf.engines.protocol import Completion, GenerationEngine, VersionSpan
    from asyncrlhf.errors import (
        ActorError,
        InvalidInputError,
        MissingExtraError,
        RewardError,
        WaitTimeoutError,
        WeightUpdateError,
    )
    from asyncrlhf.schedule import RoundSchedule
    from asyncrlhf.staleness import StalenessGate
    from asyncrlhf.trainer import AsyncRLHFTrainer

_MODULES = (
    "corrections",
    "engines",
    "evaluate",
    "losses",
    "rewards",
    "schedule",
    "sequences",
    "tasks",
    "transport",
)
_HOMES = {
    "config": ("AsyncRLHFConfig",),
    "engines.protocol": ("Completion", "GenerationEngine", "VersionSpan"),
    "errors": (
        "ActorError",
        "InvalidInputError",
        "MissingExtraError",
        "RewardError",
        "WaitTimeoutError",
        "WeightUpdateError",
    ),
    "schedule": ("RoundSchedule",),
    "staleness": ("StalenessGate",),
    "trainer": ("AsyncRLHFTrainer",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}
_TRAIN = ("accelerate", "decapod", "safetensors", "transformers")

__all__ = [
    "ActorError",
    "AsyncRLHFConfig",
    "AsyncRLHFTrainer",
    "Completion",
    "GenerationEngine",
    "InvalidInputError",
    "MissingExtraError",
    "RewardError",
    "RoundSchedule",
    "StalenessGate",
    "VersionSpan",
    "WaitTimeoutError",
    "WeightUpdateError",
    "__version__",
    "corrections",
    "engines",
    "evaluate",
    "losses",
    "rewards",
    "schedule",
    "sequences",
    "tasks",
    "transport",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"asyncrlhf.{name}")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f"asyncrlhf.{_HOME[name]}"), name)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _TRAIN:
            raise
        from asyncrlhf.errors import MissingExtraError

        raise MissingExtraError(missing, "train") from error
