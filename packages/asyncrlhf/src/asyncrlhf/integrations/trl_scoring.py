"""From a prompt's completions to samples as TRL's asynchronous trainer takes them."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from asyncrlhf.errors import InvalidInputError, RewardError

if TYPE_CHECKING:
    from asyncrlhf.engines.protocol import Completion

RewardFunc = Callable[..., Any]
_NOT_COLUMNS = frozenset({"prompt", "completion", "completion_ids"})


@dataclass(frozen=True)
class Group:
    """A row of the data set and its completions.

    Attributes:
        number: in the stream, from 0.
        row: of the data set.
        prompt_ids: tokens of its prompt.
        completions: K.
        texts: of the completions, without special tokens.
    """

    number: int
    row: Mapping[str, Any]
    prompt_ids: tuple[int, ...]
    completions: tuple[Completion, ...]
    texts: tuple[str, ...]

    @property
    def oldest_version(self) -> int:
        """The smallest version among all tokens."""
        return min(completion.oldest_version for completion in self.completions)


def checked_rewards(reward_funcs: RewardFunc | Sequence[RewardFunc]) -> dict[str, RewardFunc]:
    """Reward functions by name, in order.

    Raises:
        InvalidInputError: none, or two of one name.
    """
    funcs = [reward_funcs] if callable(reward_funcs) else list(reward_funcs)
    names = [_name(func) for func in funcs]
    if not funcs or len(set(names)) < len(names):
        raise InvalidInputError(
            f"reward_funcs: expected one or more functions with names of their own, got {names}"
        )
    return dict(zip(names, funcs, strict=True))


def rewards(group: Group, funcs: Mapping[str, RewardFunc]) -> dict[str, NDArray[np.float64]]:
    """Call reward functions as TRL does, ``f(prompts=, completions=, completion_ids=, **columns)``.

    Completions are texts where the prompt is one, else lists of one message. Other columns of the
    row come once per completion. Coroutine functions are awaited, one after another.

    Returns:
        (K,) of each function; NaN where it gave None.

    Raises:
        RewardError: a function raised, or gave another number of values; with its name.
    """
    count = len(group.completions)
    plain = isinstance(group.row["prompt"], str)
    arguments: dict[str, Any] = {
        "prompts": [group.row["prompt"]] * count,
        "completions": list(group.texts) if plain else [_answer(text) for text in group.texts],
        "completion_ids": [list(completion.ids) for completion in group.completions],
        **{name: [value] * count for name, value in group.row.items() if name not in _NOT_COLUMNS},
    }
    return {name: _values(name, func, arguments, count) for name, func in funcs.items()}


def advantages(totals: NDArray[np.float64]) -> NDArray[np.float64]:
    """(r - mean) / (standard deviation + 1e-8) over the rewards of a prompt that are not NaN.

    Those that are NaN have advantage 0, as in TRL.
    """
    found = np.zeros_like(totals)
    known = ~np.isnan(totals)
    if known.any():
        found[known] = (totals[known] - totals[known].mean()) / (totals[known].std() + 1e-8)
    return found


def samples(group: Group, scores: Mapping[str, NDArray[np.float64]]) -> list[Any]:
    """TRL's ``RolloutSample`` of each completion of a group.

    The reward of a completion is the sum over functions; NaN where all of them gave None.
    """
    made: Any = import_module("trl.experimental.async_grpo.async_rollout_worker").RolloutSample
    matrix = np.stack(list(scores.values()))
    totals = np.where(np.isnan(matrix).all(0), np.nan, np.nansum(matrix, 0))
    known = totals[~np.isnan(totals)]
    spread = float(known.std()) if len(known) else float("nan")
    prompt = group.row["prompt"]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    found = []
    for place, (completion, advantage) in enumerate(
        zip(group.completions, advantages(totals), strict=True)
    ):
        before = len(group.prompt_ids)
        found.append(
            made(
                prompt=messages,
                completion=_answer(group.texts[place]),
                input_ids=np.array(group.prompt_ids + completion.ids, dtype=np.int64),
                completion_mask=np.array([0] * before + [1] * len(completion.ids), dtype=np.int64),
                old_log_probs=np.array([0.0] * before + list(completion.logprobs), np.float32),
                advantage=float(advantage),
                model_version=group.oldest_version,
                group_id=group.number,
                metrics={
                    "reward": float(totals[place]),
                    "reward_std": spread,
                    **{f"rewards/{name}": float(row[place]) for name, row in scores.items()},
                },
                enqueued_at=time.time(),
            )
        )
    return found


def _answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def _name(func: RewardFunc) -> str:
    return str(getattr(func, "__name__", type(func).__name__))


def _values(
    name: str, func: RewardFunc, arguments: dict[str, Any], count: int
) -> NDArray[np.float64]:
    try:
        given = func(**arguments)
        if inspect.isawaitable(given):
            given = asyncio.run(_result(given))
        values = [float("nan") if value is None else float(value) for value in given]
    except Exception as error:
        raise RewardError(
            f"reward function {name} raised {type(error).__name__}: {error}"
        ) from error
    if len(values) != count:
        raise RewardError(
            f"reward function {name}: expected {count} values, one per completion, got "
            f"{len(values)}"
        )
    return np.array(values, dtype=np.float64)


async def _result(awaitable: Any) -> Any:
    return await awaitable
