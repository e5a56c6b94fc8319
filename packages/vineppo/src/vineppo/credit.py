"""What each token of an episode is credited with: the one thing in which the trainers differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from vineppo.advantages import gae, grpo, rloo
from vineppo.batch import EpisodeBatch, Floats
from vineppo.episodes import State
from vineppo.ranks import Ranks
from vineppo.values import MonteCarloValueEstimator, ValueEstimates, ValueEstimator
from vineppo.vines import VineValues


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
        segmenter: what a step is, by name or an object.
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
        self._shared = _OverRanks(values, ranks)
        self._vines = VineValues(
            self._shared,
            tokenizer=tokenizer,
            segmenter=segmenter,
            max_value_steps=max_value_steps,
            gamma=gamma,
            lam=lam,
        )

    def __call__(self, batch: EpisodeBatch, seed: int) -> Credit:
        """The credit of a batch."""
        if isinstance(self.values, MonteCarloValueEstimator) and self.values.adaptive is not None:
            self.values.adaptive.check_scores(batch.scores)  # before a rollout is paid for
        episodes = batch.episodes
        found = self._vines(
            [episode.prompt_ids for episode in episodes],
            [episode.response_ids for episode in episodes],
            [episode.finished for episode in episodes],
            [episode.row for episode in episodes],
            scores=batch.scores.tolist(),
            seed=seed,
        )
        values, steps = np.concatenate(found.step_values), np.concatenate(found.step_advantages)
        known = values[~np.isnan(values)]
        return Credit(
            found.advantages,
            None,
            {
                "steps_per_answer": len(steps) / len(episodes),
                "value": float(known.mean()) if len(known) else 0.0,
                "step_advantage_abs": float(np.abs(steps).mean()),
                "steps_without_credit": float((steps == 0).mean()),
                **self._shared.metrics(),
            },
        )


class _OverRanks:
    """An estimator whose states are shared among the processes."""

    def __init__(self, values: ValueEstimator, ranks: Ranks | None) -> None:
        self._values = values
        self._ranks = ranks
        self._states: Sequence[State] = ()

    def __call__(self, states: Sequence[State], seed: int = 0) -> ValueEstimates:
        """Values in the order of the states; equal states have equal ones."""
        self._states = states
        if self._ranks is None or self._ranks.count == 1:
            return self._values(states, seed)
        first: dict[State, int] = {}
        for state in states:
            first.setdefault(state, len(first))
        share = self._ranks.share(list(first))

        def mine() -> list[tuple[float, float, int]]:
            found = self._values(share, seed)
            return list(zip(found.values, found.variances, found.counts, strict=True))

        every = self._ranks.gathered(mine)
        columns = np.array([every[first[state]] for state in states]).reshape(-1, 3)
        return ValueEstimates(columns[:, 0], columns[:, 1], columns[:, 2].astype(np.int64))

    def metrics(self) -> dict[str, float]:
        """Of the last call, over all processes."""
        if not isinstance(self._values, MonteCarloValueEstimator) or self._values.last is None:
            return {}
        last = self._values.last
        own = [(last.rollouts, last.truncated * last.rollouts if last.rollouts else 0.0)]
        every = own if self._ranks is None else self._ranks.gather(own)
        rollouts, truncated = (float(sum(column)) for column in zip(*every, strict=True))
        return {
            "rollouts": rollouts,
            "rollouts_truncated": truncated / rollouts,
            "states": float(len(self._states)),
            "states_unique": float(len(set(self._states))),
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
