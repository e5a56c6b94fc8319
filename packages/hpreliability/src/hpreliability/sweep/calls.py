"""How a user's training function is called, and what it may return."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from typing import Any

from hpreliability.sweep.trials import Trial

Train = Callable[..., "float | Mapping[str, float] | Iterable[tuple[float, float]]"]
"""Called as `train(config=..., env=..., seed=..., budget=...)`, with one keyword per context."""


def as_job(train: Train) -> Callable[..., Any]:
    """`train` as a function that can be a job: it has a name, and gives JSON."""
    inner: Any = train
    bound = ""
    while isinstance(inner, functools.partial):
        try:
            bound += json.dumps([inner.args, inner.keywords], sort_keys=True)
        except TypeError as error:
            raise TypeError(
                f"train: the partial of {inner.func!r} binds something that is not JSON ({error}), "
                "so its results could not be told from those of another; bind it in a def instead"
            ) from error
        inner = inner.func

    def run(
        config: Mapping[str, Any], contexts: Mapping[str, str], budget: int, seed: int, version: str
    ) -> Any:
        del version  # part of the job's identity only
        return _as_json(train(config=config, **contexts, seed=seed, budget=budget))

    owner = inner if hasattr(inner, "__qualname__") else type(inner)
    # The job is known by, and travels to the workers like, the function that it wraps.
    run.__module__ = owner.__module__
    run.__qualname__ = owner.__qualname__ + bound
    return run


def _as_json(returned: Any) -> dict[str, Any]:
    if isinstance(returned, Mapping):
        return {"metrics": dict(returned)}
    if isinstance(returned, Real):
        return {"metrics": {"score": float(returned)}}
    if isinstance(returned, str) or not isinstance(returned, Iterable):
        raise TypeError(
            "train: expected a score, a mapping of metrics, or points (step, score), got "
            f"{returned!r}"
        )
    curve = []
    for point in returned:
        step, score = point
        curve.append([float(step), float(score)])
        if len(curve) > 1 and not curve[-2][0] < curve[-1][0]:
            raise ValueError(f"train: expected increasing steps, got {step} after {curve[-2][0]}")
    if not curve:
        raise ValueError("train: expected at least one point (step, score), got none")
    return {"curve": curve}


def require_signature(train: Train, trial: Trial) -> None:
    """Refuse a function that does not take a run's keywords, before anything runs.

    Raises:
        TypeError: it does not; the message names the keywords.
    """
    arguments: dict[str, Any] = {"config": trial.config, **trial.contexts}
    arguments |= {"seed": trial.seed, "budget": trial.budget}
    try:
        signature = inspect.signature(train)
    except ValueError:  # built in: says nothing about itself
        return
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise TypeError(
            f"train: expected a function of the keywords {', '.join(arguments)}, got one of "
            f"{signature} ({error}); contexts are passed under their column's name"
        ) from error
