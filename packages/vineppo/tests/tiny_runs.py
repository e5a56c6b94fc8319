"""Runs of a tiny model in double precision on a task of digits, for the tests of the trainers.

An answer is right if it is finished and the number of its characters is as odd as the first digit
of its prompt: a model without any training is right about half as often as it finishes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

import vineppo
from decapod.lm import SamplingParams, build_model, build_tokenizer
from vineppo.backend import Usage
from vineppo.episodes import Rollout
from vineppo.rollout import TransformersBackend

EOS = 2
ROWS = [{"prompt": f"{i % 4}{i // 4}=", "odd": i % 2} for i in range(8)]
METHODS = ("VinePPO", "PPO", "RLOO", "GRPO", "RestEM", "DPOPositive")


@lru_cache(maxsize=1)
def _tokenizer() -> Any:
    return build_tokenizer(["0123=\n"], "char", add_bos=True)


def tokenizer() -> Any:
    """One token per character, and its own object for every caller."""
    return copy.deepcopy(_tokenizer())


def model(seed: int = 4, **changes: Any) -> Any:
    """Untrained, with uneven next-token distributions, in double precision."""
    settings: dict[str, Any] = {"max_positions": 48, "init_std": 0.25, "seed": seed, **changes}
    return build_model(len(_tokenizer()), 16, 1, 2, **settings).double()


START = {name: value.detach() for name, value in model().named_parameters()}


def odd(completions: Sequence[str], odd: Sequence[int], **_: Any) -> list[float]:
    """The reward function."""
    return [float(len(text) % 2 == wanted) for text, wanted in zip(completions, odd, strict=True)]


def settings(method: str, folder: Path | str, **changes: Any) -> Any:
    """Two iterations of eight answers to two prompts, in mini-batches that do not come out even."""
    chosen: dict[str, Any] = {
        "output_dir": str(folder),
        "iterations": 2,
        "episodes_per_iteration": 8,
        "num_generations": 4,
        "temperature": 0.9,
        "top_p": 1.0,
        "max_response_tokens": 12,
        "mini_batch_size": 3,
        "micro_batch_size": 2,
        "num_epochs": 2,
        "learning_rate": 1e-2,
        "eval_samples": 2,
        "progress": False,
        "use_cpu": True,
    }
    if method == "VinePPO":
        chosen["num_rollouts"] = 3
    if method == "RestEM":
        chosen["validation_share"] = 0.0
    return getattr(vineppo, f"{method}Config")(**{**chosen, **changes})


def trainer(
    method: str,
    folder: Path | str,
    *,
    args: Any = None,
    of: Any = None,
    rows: Any = ROWS,
    reward: Any = odd,
    processing_class: Any = None,
    extra: dict[str, Any] | None = None,
    **changes: Any,
) -> Any:
    """A trainer of a fresh model.

    Args:
        method: the name before ``Trainer``.
        folder: of its output.
        args: instead of :func:`settings`.
        of: the model.
        rows: of the training set.
        reward: function or functions.
        processing_class: the tokenizer.
        extra: further arguments of the trainer.
        changes: of the settings.
    """
    return getattr(vineppo, f"{method}Trainer")(
        model() if of is None else of,
        None,
        reward,
        rows,
        tokenizer() if processing_class is None else processing_class,
        settings(method, folder, **changes) if args is None else args,
        **(extra or {}),
    )


def parameters(run: Any) -> dict[str, torch.Tensor]:
    """Copies of all parameters of a trainer's policy."""
    return {name: value.detach().clone() for name, value in run.model.named_parameters()}


def difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """The largest between two sets of parameters of the same names."""
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).abs().max()) for name in left)


def history(run: Any) -> list[dict[str, float]]:
    """Metrics of each iteration, without times."""
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in run.history]


def files(folder: Path) -> set[str]:
    """All files in a folder and below."""
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


class Recording:
    """A backend that notes what it is asked for and what it gives.

    Args:
        inner: another backend.

    Attributes:
        calls: (prompts, numbers of rollouts, rollouts) of each call.
    """

    def __init__(self, inner: TransformersBackend) -> None:
        self.inner = inner
        self.calls: list[tuple[list[tuple[int, ...]], list[int], list[list[Rollout]]]] = []

    @property
    def usage(self) -> Usage:
        """See :class:`~vineppo.backend.RolloutBackend`."""
        return self.inner.usage

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        n: int | Sequence[int],
        params: SamplingParams | Sequence[SamplingParams],
        seeds: Sequence[int],
    ) -> list[list[Rollout]]:
        """See :class:`~vineppo.backend.RolloutBackend`."""
        found = self.changed(self.inner.generate(prompts, n, params, seeds))
        counts = [n] * len(prompts) if isinstance(n, int) else list(n)
        self.calls.append(([tuple(prompt) for prompt in prompts], counts, found))
        return found

    def changed(self, rollouts: list[list[Rollout]]) -> list[list[Rollout]]:
        """What it gives in the place of what the other backend gave."""
        return rollouts

    def load_weights(self, model: Any) -> None:
        """See :class:`~vineppo.backend.RolloutBackend`."""
        self.inner.load_weights(model)


def changed_by(change: Callable[[Any], Any]) -> type[Recording]:
    """A recording backend that changes what it gives."""
    return type("Changing", (Recording,), {"changed": staticmethod(change)})


def recorded(method: str, folder: Path | str, kind: type[Recording] = Recording, **how: Any) -> Any:
    """A trainer whose ``backend`` is recording."""
    policy = how.pop("of", None) or model()
    backend = kind(TransformersBackend(policy))
    extra = {**how.pop("extra", {}), "rollout_backend": backend}
    return trainer(method, folder, of=policy, extra=extra, **how)
