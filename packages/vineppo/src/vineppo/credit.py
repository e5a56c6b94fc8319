"""What each token of an episode is credited with: the one thing in which the trainers differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from vineppo.advantages import gae, grpo, rloo, step_advantages, step_rewards, to_token_advantages
from vineppo.batch import EpisodeBatch, Floats
from vineppo.borders import token_borders
from vineppo.episodes import State
from vineppo.ranks import Ranks
from vineppo.states import borders_to_states
from vineppo.values import MonteCarloValueEstimator, ValueEstimator


@dataclass(frozen=True)
class Credit:
    """What a batch of episodes is credited with.

    Attributes:
        advantages: float64 [T] of each episode.
        returns: what a critic should have said before each token, float64 [T] of each episode; None
            without a critic.
        metrics: means of interest.
    """

    advantages: Sequence[Floats]
    returns: Sequence[Floats] | None = None
    metrics: dict[str, float] = field(default_factory=dict)


class AdvantageEstimator(Protocol):
    """Gives each token of each episode its advantage.

    The contract: one array per episode, as long as its response; a function of batch and seed
    alone, the same on every process.
    """

    def __call__(self, batch: EpisodeBatch, seed: int) -> Credit:
        """The credit of a batch."""
        ...


class StepValueAdvantages:
    """Advantages of steps from values of the states between them (Eq. 3 and 6 of the paper).

    All tokens of a step share its advantage. With Monte-Carlo values this is VinePPO; any other
    value estimator may stand in its place.

    Args:
        values: of the states at step borders.
        segmenter: what a step is.
        tokenizer: reads answers where the segmenter works on text.
        max_value_steps: states beyond that many steps get the trajectory's own return.
        gamma: discount per step.
        lam: of generalised advantages over steps.
        ranks: share the states among them; None is one process.
    """

    def __init__(
        self,
        values: ValueEstimator,
        segmenter: Any,
        tokenizer: Any,
        max_value_steps: int | None = None,
        gamma: float = 1.0,
        lam: float = 0.0,
        ranks: Ranks | None = None,
    ) -> None:
        self.values = values
        self._segmenter = segmenter
        self._tokenizer = tokenizer
        self._cap = max_value_steps
        self._gamma, self._lam = gamma, lam
        self._ranks = ranks

    def __call__(self, batch: EpisodeBatch, seed: int) -> Credit:
        """The credit of a batch."""
        if isinstance(self.values, MonteCarloValueEstimator) and self.values.adaptive is not None:
            self.values.adaptive.check_scores(batch.scores)  # before a rollout is paid for
        borders = [
            token_borders(self._segmenter, episode.response_ids, self._tokenizer)
            for episode in batch.episodes
        ]
        states = [
            borders_to_states(episode, ends, self._cap)
            for episode, ends in zip(batch.episodes, borders, strict=True)
        ]
        known = self._estimated([state for of in states for state in of], seed)
        advantages, spread = [], []
        place = 0
        for episode_states, ends, score in zip(states, borders, batch.scores, strict=True):
            steps = len(ends) - 1
            values = np.full(steps, np.nan)
            values[: len(episode_states)] = known[place : place + len(episode_states)]
            place += len(episode_states)
            of_steps = step_advantages(
                values, step_rewards(float(score), steps), self._gamma, self._lam
            )
            spread.append(of_steps)
            advantages.append(to_token_advantages(of_steps, ends))
        of_all = np.concatenate(spread)
        return Credit(
            advantages,
            None,
            {
                "steps_per_answer": float(np.mean([len(of) for of in spread])),
                "value": float(known.mean()) if len(known) else 0.0,
                "step_advantage_abs": float(np.abs(of_all).mean()),
                "steps_without_credit": float((of_all == 0).mean()),
                **self._rollout_metrics([state for of in states for state in of]),
            },
        )

    def _estimated(self, states: Sequence[State], seed: int) -> Floats:
        """Values in the order of the states; equal states have equal ones."""
        if self._ranks is None or self._ranks.count == 1:
            return self.values(states, seed).values
        first: dict[State, int] = {}
        for state in states:
            first.setdefault(state, len(first))
        mine = self._ranks.share(list(first))
        found = self._ranks.gather(list(self.values(mine, seed).values))
        return np.array([found[first[state]] for state in states])

    def _rollout_metrics(self, states: Sequence[State]) -> dict[str, float]:
        """Of the last call, over all processes."""
        if not isinstance(self.values, MonteCarloValueEstimator) or self.values.last is None:
            return {}
        last = self.values.last
        own = [(last.rollouts, last.truncated * last.rollouts if last.rollouts else 0.0)]
        every = own if self._ranks is None else self._ranks.gather(own)
        rollouts, truncated = (float(sum(column)) for column in zip(*every, strict=True))
        return {
            "rollouts": rollouts,
            "rollouts_truncated": truncated / rollouts,
            "states": float(len(states)),
            "states_unique": float(len(set(states))),
        }


class CriticAdvantages:
    """Generalised advantages over tokens from a critic (PPO).

    Args:
        gamma: discount per token.
        lam: 1 gives the return less the value.
    """

    def __init__(self, gamma: float = 1.0, lam: float = 1.0) -> None:
        self._gamma, self._lam = gamma, lam

    def __call__(self, batch: EpisodeBatch, seed: int) -> Credit:  # noqa: ARG002 - nothing is drawn
        """The credit of a batch; its ``token_values`` are those of the critic."""
        assert batch.token_values is not None
        lengths = [len(values) for values in batch.token_values]
        shape = (len(lengths), max(lengths))
        values, rewards = torch.zeros(shape).double(), torch.zeros(shape).double()
        mask = torch.zeros(shape, dtype=torch.bool)
        for row, (of, length, score) in enumerate(
            zip(batch.token_values, lengths, batch.scores, strict=True)
        ):
            values[row, :length] = torch.from_numpy(np.asarray(of))
            rewards[row, length - 1] = float(score)
            mask[row, :length] = True
        found = gae(values, rewards, mask, self._gamma, self._lam)
        advantages = [row[:n].numpy() for row, n in zip(found.advantages, lengths, strict=True)]
        returns = [row[:n].numpy() for row, n in zip(found.returns, lengths, strict=True)]
        everything = np.concatenate([np.asarray(v) for v in batch.token_values])
        targets = np.concatenate(returns)
        left = float(np.var(targets - everything))
        total = float(np.var(targets))
        # Returns come of sums with the values: where all are equal, only rounding is left.
        rounding = 1e-12 * float(np.abs(everything).max() + np.abs(targets).max())
        return Credit(
            advantages,
            returns,
            {
                "value": float(everything.mean()),
                "explained_variance": 1 - left / total if total > rounding**2 else 0.0,
            },
        )


class GroupAdvantages:
    """One advantage per answer from the scores of its group (RLOO, GRPO), for all its tokens.

    Args:
        of: scores [N] and groups [N] to advantages [N].
    """

    def __init__(self, of: Callable[[Floats, Any], Floats]) -> None:
        self._of = of

    def __call__(self, batch: EpisodeBatch, seed: int) -> Credit:  # noqa: ARG002 - nothing is drawn
        """The credit of a batch."""
        found = self._of(batch.scores, batch.groups)
        return Credit(
            [
                np.full(len(episode.response_ids), value)
                for episode, value in zip(batch.episodes, found, strict=True)
            ],
            None,
            {"groups_without_credit": _without_credit(found, batch.groups)},
        )


def rloo_advantages() -> GroupAdvantages:
    """RLOO: the score less the mean of the others."""
    return GroupAdvantages(rloo)


def grpo_advantages(*, scale: bool) -> GroupAdvantages:
    """GRPO: the score less the mean, divided by the deviation if ``scale``."""
    return GroupAdvantages(lambda scores, groups: grpo(scores, groups, scale=scale))


def _without_credit(advantages: Floats, groups: Any) -> float:
    of = [bool((advantages[groups == group] == 0).all()) for group in np.unique(groups)]
    return float(np.mean(of))
