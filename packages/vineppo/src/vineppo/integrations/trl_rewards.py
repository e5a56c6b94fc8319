"""Rollouts scored by the reward functions of TRL's trainer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from vineppo.episodes import Episode
from vineppo.errors import InvalidInputError, RewardError

if TYPE_CHECKING:
    from torch import Tensor

Floats = npt.NDArray[np.float64]
_NOT_COLUMNS = ("prompt", "completion", "completion_ids")


class TrainerReward:
    """A :class:`~vineppo.episodes.Reward` that asks the functions which score the answers.

    They are called as TRL calls them: with the prompts of the data set, completions as text or as
    conversation, their ids, every column, the trainer's state, and what logs. What a function logs
    of a rollout is dropped: TRL has a place for as many lines as there are answers.

    Args:
        trainer: ``trl.GRPOTrainer``; its functions, weights and tokenizer are read.

    Raises:
        InvalidInputError: a reward is a model or asynchronous.
    """

    def __init__(self, trainer: Any) -> None:
        import torch
        from trl.trainer.utils import is_async_callable

        for function, name in zip(trainer.reward_funcs, trainer.reward_func_names, strict=True):
            what = (
                "a model"
                if isinstance(function, torch.nn.Module)
                else "an asynchronous function"
                if is_async_callable(function)
                else ""
            )
            if what:
                raise InvalidInputError(
                    f"reward_funcs: expected plain functions, got {what}, {name}; call it in a "
                    "function of (prompts, completions, **columns) that waits for its result"
                )
        self._trainer = trainer
        self._inputs: Sequence[Mapping[str, Any]] = ()
        self._prompts: Sequence[Any] = ()

    def of_batch(self, inputs: Sequence[Mapping[str, Any]], prompts: Sequence[Any]) -> None:
        """Rows of the episodes to come are places in these.

        Args:
            inputs: rows of the data set, one per answer.
            prompts: their prompts, as they were given to the reward functions.
        """
        self._inputs, self._prompts = inputs, prompts

    def __call__(self, episodes: Sequence[Episode]) -> list[float]:
        """Scores, float64 [episodes]; an episode that comes several times is asked for once.

        Raises:
            RewardError: a function gave something else than a number or None for each, or none of
                them can score a rollout.
        """
        different = list(dict.fromkeys((e.row, e.response_ids) for e in episodes))
        if not different:
            return []
        score = dict(zip(different, self._scored(different, episodes), strict=True))
        return [float(score[e.row, e.response_ids]) for e in episodes]

    def _scored(
        self, asked: Sequence[tuple[int, tuple[int, ...]]], episodes: Sequence[Episode]
    ) -> Floats:
        trainer = self._trainer
        prompt_ids = {e.row: e.prompt_ids for e in episodes}
        rows = [row for row, _ in asked]
        completions = as_completions(
            trainer._tokenizer,
            [self._prompts[row] for row in rows],
            [prompt_ids[row] for row in rows],
            [list(ids) for _, ids in asked],
        )
        columns = {
            key: [self._inputs[row][key] for row in rows]
            for key in self._inputs[0]
            if key not in _NOT_COLUMNS
        }
        found = np.full((len(asked), len(trainer.reward_funcs)), np.nan)
        with _nothing_logged(trainer):
            for place, (function, name) in enumerate(
                zip(trainer.reward_funcs, trainer.reward_func_names, strict=True)
            ):
                given = function(
                    prompts=[self._prompts[row] for row in rows],
                    completions=completions,
                    completion_ids=[list(ids) for _, ids in asked],
                    **columns,
                    trainer_state=trainer.state,
                    log_extra=trainer._log_completion_extra,
                    log_metric=trainer._log_metric,
                )
                found[:, place] = _numbers(name, given, len(asked))
        weights = trainer.reward_weights.double().cpu().numpy()
        if (unknown := np.isnan(found).all(axis=1)).any():
            row = rows[int(unknown.argmax())]
            raise RewardError(
                "reward_funcs: expected a score of every rollout, got None from all functions for "
                f"one of the prompt {self._prompts[row]!r:.80}, whose answer they could score"
            )
        return np.asarray(np.nansum(found * weights, axis=1), dtype=np.float64)


def weighted(rewards: Tensor, weights: Tensor) -> Floats:
    """Scores of answers from what each function gave, as TRL adds them.

    Args:
        rewards: (B, functions), NaN where a function gave None.
        weights: (functions,).

    Returns:
        float64 [B], NaN where no function gave a number.
    """
    given = rewards.double().cpu().numpy()
    total = np.nansum(given * weights.double().cpu().numpy(), axis=1)
    return np.asarray(np.where(np.isnan(given).all(axis=1), np.nan, total))


def as_completions(
    tokenizer: Any,
    prompts: Sequence[Any],
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
) -> list[Any]:
    """Answers as TRL hands them to reward functions: texts, or messages after a conversation.

    Args:
        tokenizer: with a template for responses, if it has one.
        prompts: texts or conversations, all of one kind.
        prompt_ids: their ids.
        completion_ids: of the answers.
    """
    from trl.chat_template_utils import parse_response
    from trl.data_utils import is_conversational

    if not is_conversational({"prompt": prompts[0]}):
        return list(tokenizer.batch_decode(completion_ids, skip_special_tokens=True))
    if any(getattr(tokenizer, f"response_{kind}", None) for kind in ("template", "schema")):
        return [
            [parse_response(tokenizer, list(ids), prefix=list(prefix), tools=[])]
            for ids, prefix in zip(completion_ids, prompt_ids, strict=True)
        ]
    texts = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
    return [[{"role": "assistant", "content": text}] for text in texts]


def rows_of(inputs: Sequence[Mapping[str, Any]], prompt_ids: Sequence[Sequence[int]]) -> list[int]:
    """A number for each answer, equal for answers to the same row of the data set.

    TRL repeats a row for each answer of a group and tells nothing of it, so rows are compared.
    Rows that cannot be compared count as different, which costs rollouts and nothing else.

    Args:
        inputs: rows, one per answer.
        prompt_ids: of each.

    Returns:
        The place of the first answer to the same row.
    """
    first: dict[tuple[int, ...], list[int]] = {}
    rows = []
    for place, ids in enumerate(prompt_ids):
        alike = first.setdefault(tuple(ids), [])
        same = next((at for at in alike if _equal(inputs[at], inputs[place])), place)
        if same == place:
            alike.append(place)
        rows.append(same)
    return rows


def _equal(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if getattr(a, "shape", None) != getattr(b, "shape", None):
        return False
    try:
        return bool(np.all(a == b))
    except (TypeError, ValueError, RuntimeError):  # arrays or tensors that do not compare
        return False


def _numbers(name: str, given: Any, expected: int) -> Floats:
    try:
        numbers = np.array([np.nan if one is None else one for one in given], dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise RewardError(
            f"reward_funcs: expected a number or None for each rollout from {name}, got "
            f"{given!r:.80}"
        ) from error
    if numbers.shape != (expected,):
        raise RewardError(
            f"reward_funcs: expected {expected} numbers from {name}, one per rollout, got the "
            f"shape {numbers.shape}"
        )
    return numbers


@contextmanager
def _nothing_logged(trainer: Any) -> Iterator[None]:
    """Keep what reward functions log of rollouts out of the table of answers."""
    kept = trainer._pending_extra_logs, trainer._pending_metrics
    trainer._pending_extra_logs = defaultdict(list)
    trainer._pending_metrics = defaultdict(list)
    try:
        yield
    finally:
        trainer._pending_extra_logs, trainer._pending_metrics = kept
