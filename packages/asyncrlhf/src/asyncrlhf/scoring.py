"""Rewards in a process of their own: a third stage between generation and learning."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

from asyncrlhf.errors import ActorError
from asyncrlhf.processes import ProcessDiedError, SupervisedProcess, packed

if TYPE_CHECKING:
    from asyncrlhf.rewards import Rewards, RewardSuite


class ScoringProcess:
    """Scores rounds in a supervised process; called like the suite itself.

    When the process dies it is started again and the round is scored once more.

    Args:
        suite: the rewards.
        timeout: seconds that one round may take.
        threads: numeric threads of the process.
        max_restarts: deaths in a row after which it is given up.

    Raises:
        InvalidInputError: a reward function cannot be sent to another process; it is named.
    """

    def __init__(
        self,
        suite: RewardSuite,
        *,
        timeout: float = 3600.0,
        threads: int = 1,
        max_restarts: int = 3,
    ) -> None:
        # One by one, so that functions of scripts and test files travel as code, and so that the
        # message names the one that cannot.
        functions = [
            packed(function, f"reward_funcs: {name}")
            for name, function in zip(suite.names, suite.functions, strict=True)
        ]
        bare = suite.with_functions([None] * len(functions))
        self._process = SupervisedProcess(
            lambda: _Scorer(bare.with_functions([pickle.loads(f) for f in functions])),  # noqa: S301 - packed above
            what="the scorer",
            threads=threads,
        )
        self._timeout = timeout
        self._max_restarts = max_restarts

    def start(self) -> None:
        """Start the process now rather than at the first call.

        Raises:
            ActorError: it did not start.
        """
        self._process.start()

    def __call__(self, **round: Any) -> Rewards:
        """Scores of one round; arguments as for the suite.

        Raises:
            RewardError: a reward function failed.
            ActorError: the process died more often than it may be started again.
            WaitTimeoutError: no answer in time.
        """
        for attempt in range(self._max_restarts + 1):
            try:
                if not self._process.alive:
                    self._process.start()
                rewards: Rewards = self._process.call("score", round, timeout=self._timeout)
            except ProcessDiedError as error:
                if attempt == self._max_restarts:
                    raise ActorError(f"the scorer died {attempt + 1} times: {error}") from error
            else:
                return rewards
        raise AssertionError("unreachable")

    def close(self) -> None:
        """End the process; can be called twice."""
        self._process.close()


class _Scorer:
    def __init__(self, suite: RewardSuite) -> None:
        self._suite = suite

    def score(self, round: dict[str, Any]) -> Rewards:
        return self._suite(**round)
