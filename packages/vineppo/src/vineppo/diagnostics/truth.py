"""True values of states, as far as many fresh rollouts can tell, and never the same rollouts twice.

A Monte-Carlo estimate that is compared with a truth made of the same rollouts looks better than it
is: with 9 of 256 shared, the mean square of their difference is 7 % too small, and candidates come
in the same order by shared luck. So truth and predictions draw from streams of different names,
whatever seeds they are given, and :func:`shares_rollouts` finds out from the numbers alone where
that was circumvented.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from vineppo.backend import RolloutBackend
from vineppo.diagnostics.arrays import Floats, Ints, floats
from vineppo.episodes import Reward, State
from vineppo.errors import InvalidInputError, at_least
from vineppo.states import unique
from vineppo.values import MonteCarloValueEstimator

if TYPE_CHECKING:
    from decapod.lm import SamplingParams

TRUTH: Final = "truth"
PREDICTION: Final = "prediction"
ALTERNATIVES: Final = "alternatives"
_BY_CHANCE: Final = 1e-6  # below this, a coincidence of all values is none


def stream_seed(stream: str, seed: int) -> int:
    """The seed of a named stream: two names never draw the same rollouts.

    Args:
        stream: its name.
        seed: the user's.

    Returns:
        A number in [0, 2**63): the first 63 bits of a SHA-256.
    """
    digest = hashlib.sha256(f"vineppo.diagnostics|{stream}|{seed}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@dataclass(frozen=True, eq=False)
class GroundTruth:
    """True values of S states, or what stands for them.

    Attributes:
        values: (S,).
        standard_errors: (S,), of ``values``; 0 where they are exact.
        counts: (S,), rollouts behind each; 0 where they are exact.
        seed: what it was made with; None where nothing was drawn.
        returns: (S, rollouts), the scores behind each value; None where they are exact.

    Raises:
        InvalidInputError: lengths that differ, or a number that is not finite.
    """

    values: Floats
    standard_errors: Floats
    counts: Ints
    seed: int | None = None
    returns: Floats | None = None

    def __post_init__(self) -> None:
        values = floats("values", self.values)
        errors = floats("standard_errors", self.standard_errors, values.shape)
        if (errors < 0).any():
            raise InvalidInputError(
                f"standard_errors: expected numbers of at least 0, got {errors.min()}"
            )
        counts = floats("counts", self.counts, values.shape).astype(np.int64)
        if self.returns is not None:
            floats("returns", self.returns, (len(values), None))
        for name, array in (("values", values), ("standard_errors", errors), ("counts", counts)):
            object.__setattr__(self, name, array)

    def __len__(self) -> int:
        return len(self.values)

    @property
    def stream(self) -> int | None:
        """The seed that its rollouts were drawn with; predictions must have another one."""
        return None if self.seed is None else stream_seed(TRUTH, self.seed)

    @classmethod
    def exact(cls, values: npt.ArrayLike) -> GroundTruth:
        """Values that a task knows, e.g. by dynamic programming.

        Args:
            values: (S,).
        """
        known = floats("values", values)
        return cls(known, np.zeros_like(known), np.zeros(known.shape, dtype=np.int64))


def ground_truth(
    backend: RolloutBackend,
    reward: Reward,
    states: Sequence[State],
    rollouts: int = 256,
    seed: int = 0,
    *,
    params: SamplingParams,
    max_response_tokens: int | None = None,
    states_per_call: int = 256,
) -> GroundTruth:
    """Mean scores of fresh rollouts from each state (256 in Sec. 7 of arXiv 2410.01679).

    Equal states are sampled once. A state's rollouts depend on the state and the seed alone.

    Args:
        backend: samples from the policy whose values are asked for.
        reward: scores whole episodes.
        states: in any order; none of them a finished answer.
        rollouts: from each state, at least 2, so that the noise is known. With rewards 0 and 1
            the standard error is at most 1/(2 √rollouts), 0.031 for 256.
        seed: of the stream that is kept for truths.
        params: how rollouts are drawn: as in the training that the values are for.
        max_response_tokens: most tokens of an answer, those of the state included; see
            :class:`vineppo.values.MonteCarloValueEstimator`.
        states_per_call: different states that the backend and the reward get at once; bounds
            memory, and changes nothing else.

    Raises:
        InvalidInputError: no state, or a number out of its range.
        RewardError: scores that are not one finite number per rollout.
    """
    if not states:
        raise InvalidInputError("states: expected at least one, got none")
    at_least("rollouts", rollouts, 2)
    at_least("states_per_call", states_per_call, 1)
    estimator = MonteCarloValueEstimator(
        backend, reward, rollouts, params=params, max_response_tokens=max_response_tokens
    )
    different, place = unique(states)
    parts: list[Floats] = []
    for start in range(0, len(different), states_per_call):
        estimator(different[start : start + states_per_call], seed=stream_seed(TRUTH, seed))
        assert estimator.last is not None
        parts.extend(estimator.last.returns)
    returns = np.stack(parts)[place]
    return GroundTruth(
        returns.mean(axis=1),
        returns.std(axis=1, ddof=1) / math.sqrt(rollouts),
        np.full(len(states), rollouts, dtype=np.int64),
        seed,
        returns,
    )


def shares_rollouts(predictions: Floats, truth: GroundTruth, distinct: Ints) -> bool:
    """Whether predictions are means of the truth's own first k rollouts, for some k.

    Sample j of a state is a function of state, seed and j, so that is what an estimator gives that
    was run with the truth's seed. Whatever does not know the rollouts hits their mean in a state
    with a chance of at most p, that of the likeliest score, for every k: a sum of more of them is
    no less spread out. Where all states agree though the product of their p is below one in a
    million, it was not by chance. States whose rollouts all score the same tell nothing, so few or
    easy states may go undetected; nothing is suspected that could be luck.

    Args:
        predictions: (S,).
        truth: of the same states.
        distinct: places of different states.
    """
    if truth.returns is None:
        return False
    returns = truth.returns[distinct]
    numbers = np.arange(1, returns.shape[1] + 1)
    means = returns.cumsum(axis=1) / numbers
    agree = np.isclose(predictions[distinct, None], means, rtol=0, atol=1e-9).all(axis=0)
    if not agree.any():
        return False
    chance = 0.0
    for row in returns:
        _, counts = np.unique(row, return_counts=True)
        chance += math.log(counts.max() / len(row))
    return chance + math.log(len(numbers)) < math.log(_BY_CHANCE)
