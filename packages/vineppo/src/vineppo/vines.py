"""Step values and advantages for a training loop of one's own: one call per batch of answers.

A loop that has sampled answers calls a function object with their token ids, and gets what each
token is worth. It needs to know nothing of segmenters, states or rollouts::

    vines = vine_values(backend, reward, params=params, tokenizer=tokenizer)
    credit = vines(prompt_ids, completion_ids, finished, rows, seed=step)
    advantages = credit.padded(width)  # (B, T)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vineppo.advantages import step_advantages, step_rewards, to_token_advantages
from vineppo.backend import RolloutBackend
from vineppo.borders import token_borders
from vineppo.episodes import Episode, Reward
from vineppo.errors import InvalidInputError
from vineppo.segmenters import make_segmenter
from vineppo.states import borders_to_states
from vineppo.values import MonteCarloValueEstimator, ValueEstimator, scored

if TYPE_CHECKING:
    from decapod.lm import SamplingParams
    from vineppo.budget import AdaptiveBudget

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class VineCredit:
    """What a batch of B answers is credited with, not whitened.

    Attributes:
        advantages: of each answer float64 [T], one number per token of it.
        step_values: of each answer float64 [S], of the states in which its steps begin; NaN where
            there is no estimate, that is beyond ``max_value_steps`` and in answers without a score.
        step_advantages: of each answer float64 [S].
        step_borders: of each answer S + 1 token places, from 0 to T.
        scores: float64 [B]; NaN where there is none.
    """

    advantages: tuple[Floats, ...]
    step_values: tuple[Floats, ...]
    step_advantages: tuple[Floats, ...]
    step_borders: tuple[tuple[int, ...], ...]
    scores: Floats

    def padded(self, width: int | None = None) -> Tensor:
        """Advantages of the tokens as one tensor, float64 (B, width), 0 behind each answer.

        Args:
            width: at least the length of the longest answer, which is what None takes.

        Raises:
            InvalidInputError: an answer is longer.
        """
        longest = max((len(of) for of in self.advantages), default=0)
        width = longest if width is None else width
        if width < longest:
            raise InvalidInputError(
                f"width: expected at least {longest}, the length of the longest answer, got {width}"
            )
        out = torch.zeros(len(self.advantages), width, dtype=torch.float64)
        for row, of in zip(out, self.advantages, strict=True):
            row[: len(of)] = torch.from_numpy(of)
        return out


class VineValues:
    """Values of the states between the steps of answers, and what follows for their tokens.

    Eq. 5 and 6 of arXiv 2410.01679 where ``estimator`` is Monte Carlo; any estimator will do.

    Args:
        estimator: of the values.
        reward: scores whole answers, where :meth:`__call__` is given no scores; None then refuses.
        tokenizer: reads answers where the segmenter works on text; nothing is ever encoded.
        segmenter: what a step is, by name or an object (:mod:`vineppo.segmenters`).
        max_value_steps: states beyond that many steps have no estimate and take the return of
            their own trajectory; None is no cap.
        gamma: discount per step.
        lam: λ of generalised advantages over steps; 0 is Eq. 6.

    Raises:
        InvalidInputError: an argument out of its range.
    """

    def __init__(
        self,
        estimator: ValueEstimator,
        reward: Reward | None = None,
        *,
        tokenizer: Any = None,
        segmenter: Any = "newline",
        max_value_steps: int | None = None,
        gamma: float = 1.0,
        lam: float = 0.0,
    ) -> None:
        for name, factor in (("gamma", gamma), ("lam", lam)):
            if not 0 <= factor <= 1:
                raise InvalidInputError(f"{name}: expected a number from 0 to 1, got {factor}")
        if max_value_steps is not None and max_value_steps < 1:
            raise InvalidInputError(
                f"max_value_steps: expected at least 1 or None for no cap, got {max_value_steps}"
            )
        self.estimator = estimator
        self.reward = reward
        self._tokenizer = tokenizer
        self._segmenter = make_segmenter(segmenter)
        self._cap = max_value_steps
        self._gamma, self._lam = gamma, lam

    def __call__(
        self,
        prompt_ids: Sequence[Sequence[int]],
        completion_ids: Sequence[Sequence[int]],
        finished: Sequence[bool],
        rows: Sequence[int],
        *,
        scores: Sequence[float] | None = None,
        seed: int = 0,
    ) -> VineCredit:
        """The credit of B answers.

        Args:
            prompt_ids: of each answer the ids of its prompt, without padding.
            completion_ids: of each answer the very ids that were sampled, with the token that ended
                it, without padding. States restart from them.
            finished: of each answer whether a stop token ended it.
            rows: of each answer the row of the data set that its reward looks up. Answers to one
                prompt with one row share the value of the prompt.
            scores: of each answer, where they are known already. NaN marks an answer that cannot be
                scored: nothing is sampled for it and its advantages are 0.
            seed: of the rollouts; take another one for every batch.

        Raises:
            InvalidInputError: the arguments are of different lengths, an answer is empty, or there
                are neither scores nor a reward.
            RewardError: scores that cannot be used.
        """
        episodes = _episodes(prompt_ids, completion_ids, finished, rows)
        known = self._scores(episodes, scores)
        borders = [
            token_borders(self._segmenter, episode.response_ids, self._tokenizer)
            for episode in episodes
        ]
        states = [
            [] if np.isnan(score) else borders_to_states(episode, cuts, self._cap)
            for episode, cuts, score in zip(episodes, borders, known, strict=True)
        ]
        estimates = self.estimator([state for of in states for state in of], seed=seed).values
        ends = np.cumsum([len(of) for of in states])
        values, of_steps, of_tokens = [], [], []
        for cuts, score, found in zip(
            borders, known, np.split(estimates, ends[:-1]) if episodes else [], strict=True
        ):
            steps = len(cuts) - 1
            value = np.full(steps, np.nan)
            value[: len(found)] = found
            rewards = step_rewards(0.0 if np.isnan(score) else float(score), steps)
            values.append(value)
            of_steps.append(step_advantages(value, rewards, self._gamma, self._lam))
            of_tokens.append(to_token_advantages(of_steps[-1], cuts))
        return VineCredit(
            tuple(of_tokens), tuple(values), tuple(of_steps), tuple(map(tuple, borders)), known
        )

    def _scores(self, episodes: Sequence[Episode], scores: Sequence[float] | None) -> Floats:
        if scores is None:
            if self.reward is None:
                raise InvalidInputError(
                    "scores: expected one number per answer, got None and no reward to ask; pass "
                    "scores, or give VineValues a reward"
                )
            return scored(self.reward, episodes)
        known = np.asarray(scores, dtype=np.float64)
        if known.shape != (len(episodes),) or np.isinf(known).any():
            raise InvalidInputError(
                f"scores: expected {len(episodes)} numbers, one per answer, finite or NaN for an "
                f"answer without one, got {scores!r:.80}"
            )
        return known


def vine_values(
    backend: RolloutBackend,
    reward: Reward,
    *,
    params: SamplingParams,
    tokenizer: Any = None,
    num_rollouts: int = 9,
    segmenter: Any = "newline",
    max_value_steps: int | None = None,
    max_response_tokens: int | None = None,
    adaptive: AdaptiveBudget | None = None,
    gamma: float = 1.0,
    lam: float = 0.0,
) -> VineValues:
    """A function object that credits answers by Monte-Carlo values, as VinePPO does.

    Args:
        backend: samples from the policy; give it new weights by ``backend.load_weights``.
        reward: scores rollouts, and answers where they come without scores.
        params: how rollouts are drawn: as the answers were.
        tokenizer: see :class:`VineValues`.
        num_rollouts: K, from each state.
        segmenter: see :class:`VineValues`.
        max_value_steps: see :class:`VineValues`.
        max_response_tokens: where answers were cut; a rollout from a later state is shorter. None
            leaves ``params.max_new_tokens`` for every state.
        adaptive: spends the rollouts unevenly (:class:`vineppo.budget.AdaptiveBudget`).
        gamma: see :class:`VineValues`.
        lam: see :class:`VineValues`.

    Raises:
        InvalidInputError: an argument out of its range.
    """
    estimator = MonteCarloValueEstimator(
        backend,
        reward,
        num_rollouts,
        params=params,
        max_response_tokens=max_response_tokens,
        adaptive=adaptive,
    )
    return VineValues(
        estimator,
        reward,
        tokenizer=tokenizer,
        segmenter=segmenter,
        max_value_steps=max_value_steps,
        gamma=gamma,
        lam=lam,
    )


def _episodes(
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    finished: Sequence[bool],
    rows: Sequence[int],
) -> list[Episode]:
    given = {
        "prompt_ids": prompt_ids,
        "completion_ids": completion_ids,
        "finished": finished,
        "rows": rows,
    }
    lengths = {name: len(of) for name, of in given.items()}
    if len(set(lengths.values())) != 1:
        raise InvalidInputError(
            f"{', '.join(lengths)}: expected as many of each as there are answers, got "
            f"{', '.join(map(str, lengths.values()))}"
        )
    for name in ("prompt_ids", "completion_ids"):
        for index, ids in enumerate(given[name]):
            if len(ids) == 0:  # type: ignore[arg-type]
                raise InvalidInputError(
                    f"{name}[{index}]: expected at least one token, got none; leave such answers "
                    "out of the batch"
                )
    return [
        Episode(int(row), tuple(map(int, prompt)), tuple(map(int, answer)), bool(end))
        for prompt, answer, end, row in zip(prompt_ids, completion_ids, finished, rows, strict=True)
    ]
