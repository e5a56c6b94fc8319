"""What is passed around: states, what was sampled from them, and whole episodes, as token ids.

Text is no part of it. A state is restarted from the very ids that were sampled, so that its
rollouts continue the trajectory it belongs to and no other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Rollout:
    """What was sampled from a state.

    Attributes:
        token_ids: with the token that ended it, if one did.
        logprobs: natural log-probability of each token under the distribution of the sampler, or
            of the model, as asked for; empty where the backend knows none.
        finished: a stop token or text ended it; False where it was cut by length.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finished: bool


@dataclass(frozen=True)
class Episode:
    """A whole answer to a prompt; the unit that rewards are given to.

    Attributes:
        row: of the dataset, which knows the right answer.
        prompt_ids: not empty.
        response_ids: with the token that ended it.
        finished: see :class:`Rollout`.
    """

    row: int
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    finished: bool


@dataclass(frozen=True)
class State:
    """A prompt with the first tokens of an answer. Equal states are estimated once.

    Attributes:
        row: of the dataset.
        prompt_ids: not empty.
        response_ids: the tokens so far; empty at the prompt.
    """

    row: int
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...] = ()

    @property
    def ids(self) -> tuple[int, ...]:
        """All tokens, which is what a rollout is asked to continue."""
        return self.prompt_ids + self.response_ids

    def continued(self, rollout: Rollout) -> Episode:
        """The episode that a rollout from here completes."""
        return Episode(
            self.row, self.prompt_ids, self.response_ids + rollout.token_ids, rollout.finished
        )


class Reward(Protocol):
    """Scores whole episodes.

    The contract: one finite number per episode, in order; a function of the episode alone, so that
    an episode scores the same in whatever company.
    """

    def __call__(self, episodes: Sequence[Episode]) -> Sequence[float] | npt.NDArray[np.float64]:
        """A number for each episode."""
        ...
