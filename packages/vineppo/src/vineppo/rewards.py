"""Reward functions in TRL's signature, called on whole episodes and checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from vineppo.dataset import Prompts
from vineppo.episodes import Episode
from vineppo.errors import InvalidInputError, RewardError

RewardFunction = Callable[..., Sequence[float]]


class RewardSuite:
    """A :class:`~vineppo.episodes.Reward` made of functions of texts.

    An episode that comes several times in a call is scored once, and one that is cut by length
    never reaches the functions if ``unfinished_score`` is set: rollouts are many and alike.

    Args:
        functions: one or several ``f(prompts, completions, completion_ids, **columns)``, each of
            which gives a number per completion; the scores are added.
        prompts: the dataset that rows of episodes are of.
        tokenizer: reads answers; its special tokens are left out.
        weights: of the functions; None are ones.
        unfinished_score: of an episode that is cut by length; None asks the functions.

    Raises:
        InvalidInputError: no function, or weights that do not fit.
    """

    def __init__(
        self,
        functions: RewardFunction | Sequence[RewardFunction],
        prompts: Prompts,
        tokenizer: Any,
        weights: Sequence[float] | None = None,
        unfinished_score: float | None = 0.0,
    ) -> None:
        self._functions = [functions] if callable(functions) else list(functions or ())
        if not self._functions or not all(map(callable, self._functions)):
            raise InvalidInputError(
                "reward_funcs: expected one function or several, got "
                f"{functions!r}; each is called with prompts, completions, completion_ids and the "
                "dataset's columns"
            )
        self._weights = [1.0] * len(self._functions) if weights is None else list(weights)
        if len(self._weights) != len(self._functions):
            raise InvalidInputError(
                f"reward_weights: expected {len(self._functions)}, one for each reward function, "
                f"got {len(self._weights)}"
            )
        self._prompts = prompts
        self._tokenizer = tokenizer
        self._unfinished = unfinished_score

    def __call__(self, episodes: Sequence[Episode]) -> npt.NDArray[np.float64]:
        """Scores, float64 [episodes].

        Raises:
            RewardError: a function raised, or gave something else than a finite number for each.
        """
        asked: dict[tuple[int, tuple[int, ...]], int] = {}
        scores = np.full(len(episodes), self._unfinished or 0.0)
        places: list[int] = []
        kept: list[Episode] = []
        at: list[int] = []
        for place, episode in enumerate(episodes):
            if not episode.finished and self._unfinished is not None:
                continue
            key = (episode.row, episode.response_ids)
            if key not in asked:
                asked[key] = len(kept)
                kept.append(episode)
            places.append(place)
            at.append(asked[key])
        if kept:
            scores[places] = self._scored(kept)[at]
        return scores

    def _scored(self, episodes: Sequence[Episode]) -> npt.NDArray[np.float64]:
        prompts = self._prompts
        texts = self._tokenizer.batch_decode(
            [episode.response_ids for episode in episodes], skip_special_tokens=True
        )
        completions: list[Any] = [
            [{"role": "assistant", "content": text}] if prompts.is_conversation(e.row) else text
            for e, text in zip(episodes, texts, strict=True)
        ]
        columns = {name: [prompts.rows[e.row][name] for e in episodes] for name in prompts.columns}
        total = np.zeros(len(episodes))
        for function, weight in zip(self._functions, self._weights, strict=True):
            total += weight * _checked(
                function,
                {
                    "prompts": [prompts.texts[e.row] for e in episodes],
                    "completions": completions,
                    "completion_ids": [list(e.response_ids) for e in episodes],
                    **columns,
                },
            )
        return total


def _checked(function: RewardFunction, arguments: dict[str, Any]) -> npt.NDArray[np.float64]:
    name = getattr(function, "__name__", type(function).__name__)
    expected = len(arguments["completions"])
    try:
        given = function(**arguments)
    except Exception as error:
        raise RewardError(f"reward_funcs: {name} raised {type(error).__name__}: {error}") from error
    try:
        scores = np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise RewardError(
            f"reward_funcs: expected a number for each completion from {name}, got {given!r:.80}"
        ) from error
    if scores.shape != (expected,):
        raise RewardError(
            f"reward_funcs: expected {expected} numbers from {name}, got the shape {scores.shape}"
        )
    if not np.isfinite(scores).all():
        index = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise RewardError(
            f"reward_funcs: expected finite numbers from {name}, got {scores[index]} for the "
            f"completion {arguments['completions'][index]!r:.80}"
        )
    return scores
