"""Estimates of V(s), the expected score of an answer that goes on from s under the policy.

The paper replaces PPO's critic by the mean score of K rollouts (Eq. 5 of arXiv 2410.01679); the
rest of PPO stays. So whatever gives a number per state is one protocol here, and estimators can be
exchanged and compared.
"""

from __future__ import annotations

import dataclasses
import hashlib
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from vineppo.episodes import Episode, Reward, Rollout, State
from vineppo.errors import InvalidInputError, NotFiniteError, RewardError
from vineppo.states import unique

if TYPE_CHECKING:
    from decapod.lm import SamplingParams
    from vineppo.backend import RolloutBackend
    from vineppo.budget import AdaptiveBudget
    from vineppo.tasks.token_tree import TokenTree

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ValueEstimates:
    """Values of states, in the order in which the states were given.

    Attributes:
        values: [S] float64.
        variances: [S] float64, of each estimate given its state; NaN where it is not known. For
            Monte-Carlo values it is itself an estimate.
        counts: [S] int64, rollouts behind each value; equal states show the same ones.
    """

    values: FloatArray
    variances: FloatArray
    counts: IntArray

    def __len__(self) -> int:
        return len(self.values)


class ValueEstimator(Protocol):
    """Estimates the values of states.

    The contract, held by the tests of every estimator here: one finite value per state, in order;
    the value of a state depends on the set of states in the call, not on their order nor on how
    often one is repeated; equal calls with equal seeds give equal values.
    """

    def __call__(self, states: Sequence[State], seed: int = 0) -> ValueEstimates:
        """Values of the states.

        Args:
            states: in any order, repeated or not; may be empty.
            seed: root of what is drawn at random, if anything is.
        """
        ...


@dataclass(frozen=True)
class MonteCarloStatistics:
    """What one call of :class:`MonteCarloValueEstimator` did.

    Attributes:
        states: asked for.
        unique_states: different ones among them.
        rollouts: sampled in all.
        truncated: share of the rollouts that no stop token or text ended; NaN without rollouts.
        unique_rollouts: share of the rollouts that differ from all earlier ones of their state; NaN
            without rollouts.
        mean_std: mean over the different states of the standard deviation of their returns
            (of the sample, divided by n - 1); NaN where no state has two.
        generated_tokens: of all rollouts.
        returns: for each state asked for, the scores of its rollouts, float64.
    """

    states: int
    unique_states: int
    rollouts: int
    truncated: float
    unique_rollouts: float
    mean_std: float
    generated_tokens: int
    returns: tuple[FloatArray, ...]


class MonteCarloValueEstimator:
    """The mean score of K rollouts from each state; Eq. 5 of arXiv 2410.01679.

    Unbiased for every K, with variance Var[R | s] / K. Equal states are sampled once and share
    their value. A state's rollouts are a function of the state and ``seed`` alone: neither other
    states of the call, nor their order, nor repetitions change a value, and the first 3 of 9
    rollouts are those that K = 3 would draw. (With ``adaptive`` the *number* of rollouts does
    depend on the other states.)

    Args:
        backend: samples from the policy.
        reward: scores whole episodes, the ones cut by length among them.
        k: rollouts from each state; with ``adaptive`` the mean number over the different states.
        params: how rollouts are drawn. ``max_new_tokens`` bounds each of them, and
            ``max_response_tokens`` as well, if given.
        max_response_tokens: most tokens of an answer, those of the state included: a rollout from a
            late state must end where the trajectory itself would have been cut. None leaves
            ``params.max_new_tokens`` for every state, however long its answer is already.
        adaptive: spends more rollouts where they are worth more; None gives each state K.

    Attributes:
        last: statistics of the last call; None before the first.

    Raises:
        InvalidInputError: a number out of its range.
    """

    def __init__(
        self,
        backend: RolloutBackend,
        reward: Reward,
        k: int,
        *,
        params: SamplingParams,
        max_response_tokens: int | None = None,
        adaptive: AdaptiveBudget | None = None,
    ) -> None:
        self.k = _whole("num_rollouts (k)", k)
        if max_response_tokens is not None:
            max_response_tokens = _whole("max_response_tokens", max_response_tokens)
        if adaptive is not None:
            adaptive.check_k(self.k)
        self.backend = backend
        self.reward = reward
        self.params = params
        self.max_response_tokens = max_response_tokens
        self.adaptive = adaptive
        self.last: MonteCarloStatistics | None = None

    def __call__(self, states: Sequence[State], seed: int = 0) -> ValueEstimates:
        """Values of the states by fresh rollouts.

        Args:
            states: in any order, repeated or not; may be empty.
            seed: of the call; take another one for every batch and every purpose, so that no two
                estimates that should be independent share rollouts.

        Raises:
            InvalidInputError: a state that leaves no room for a rollout, or, with ``adaptive``, a
                score outside 0 to 1.
            RewardError: scores that are not one finite number per rollout.
        """
        different, place = unique(states)
        params = self._params(different)
        batch = _Batch(different, params, self.backend, self.reward, seed)
        if self.adaptive is None or not different:
            batch.sample("values", [self.k] * len(different))
            values, variances = _means(batch.returns)
        else:
            values, variances = self._adaptive(self.adaptive, batch)
        counts = np.array([len(r) for r in batch.returns], dtype=np.int64)
        self.last = batch.statistics(place)
        return ValueEstimates(values[place], variances[place], counts[place])

    def _adaptive(self, budget: AdaptiveBudget, batch: _Batch) -> tuple[FloatArray, FloatArray]:
        total = budget.total_for(len(batch.states), self.k)
        batch.sample("values", [budget.pilot] * len(batch.states))
        pilot = np.stack(batch.returns)
        budget.check_scores(pilot)
        allocation = budget.allocate(pilot, total)
        batch.sample("values, second phase", allocation.tolist())
        later = [returns[budget.pilot :] for returns in batch.returns]
        for returns in later:
            budget.check_scores(returns)
        return budget.estimate(pilot, later)

    def _params(self, states: Sequence[State]) -> list[SamplingParams]:
        if self.max_response_tokens is None:
            return [self.params] * len(states)
        made: dict[int, SamplingParams] = {}
        found = []
        for state in states:
            room = self.max_response_tokens - len(state.response_ids)
            if room < 1:
                raise InvalidInputError(
                    f"max_response_tokens: expected more than the {len(state.response_ids)} answer "
                    f"tokens of a state of row {state.row}, got {self.max_response_tokens}; a "
                    "finished or cut answer has no value to estimate, so leave it out"
                )
            room = min(room, self.params.max_new_tokens)
            if room not in made:
                made[room] = dataclasses.replace(self.params, max_new_tokens=room)
            found.append(made[room])
        return found


class _Batch:
    """The different states of a call and what was sampled from them so far."""

    def __init__(
        self,
        states: Sequence[State],
        params: list[SamplingParams],
        backend: RolloutBackend,
        reward: Reward,
        seed: int,
    ) -> None:
        self.states = states
        self.returns: list[FloatArray] = [np.empty(0) for _ in states]
        self._rollouts: list[list[Rollout]] = [[] for _ in states]
        self._params = params
        self._backend = backend
        self._reward = reward
        self._seed = seed

    def sample(self, phase: str, counts: list[int]) -> None:
        """One call of the backend, and one of the reward, for all states together."""
        if not sum(counts):
            return
        # States are left out here: a backend need not know what to do with a prompt and no sample.
        asked = [i for i, count in enumerate(counts) if count]
        found = self._backend.generate(
            [self.states[i].ids for i in asked],
            [counts[i] for i in asked],
            [self._params[i] for i in asked],
            [state_seed(self._seed, self.states[i], phase) for i in asked],
        )
        episodes = [
            self.states[i].continued(rollout)
            for i, rollouts in zip(asked, found, strict=True)
            for rollout in rollouts
        ]
        scores = scored(self._reward, episodes)
        ends = np.cumsum([counts[i] for i in asked])
        for i, rollouts, part in zip(asked, found, np.split(scores, ends[:-1]), strict=True):
            self._rollouts[i].extend(rollouts)
            self.returns[i] = np.concatenate([self.returns[i], part])

    def statistics(self, place: IntArray) -> MonteCarloStatistics:
        """What was done, told of the states as they were asked for."""
        rollouts = [rollout for group in self._rollouts for rollout in group]
        distinct = sum(len({r.token_ids for r in group}) for group in self._rollouts)
        spreads = [float(r.std(ddof=1)) for r in self.returns if len(r) > 1]
        total = len(rollouts)
        return MonteCarloStatistics(
            states=len(place),
            unique_states=len(self.states),
            rollouts=total,
            truncated=sum(not r.finished for r in rollouts) / total if total else np.nan,
            unique_rollouts=distinct / total if total else np.nan,
            mean_std=float(np.mean(spreads)) if spreads else np.nan,
            generated_tokens=sum(len(r.token_ids) for r in rollouts),
            returns=tuple(self.returns[i] for i in place),
        )


def state_seed(seed: int, state: State, purpose: str = "values") -> int:
    """A seed that belongs to a state, whatever stands beside it in a batch.

    Args:
        seed: of the call.
        state: of which row, prompt and answer so far all count.
        purpose: keeps samples apart that must be independent of each other.

    Returns:
        A number in [0, 2**63): the first 63 bits of a SHA-256.
    """
    head = f"{purpose}|{seed}|{state.row}|{len(state.prompt_ids)}|"
    digest = hashlib.sha256(head.encode() + np.array(state.ids, dtype="<i8").tobytes()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def scored(reward: Reward, episodes: Sequence[Episode]) -> FloatArray:
    """Scores of episodes, checked.

    Returns:
        [episodes] float64, finite.

    Raises:
        RewardError: not one number per episode, or one that is not finite.
    """
    name = getattr(reward, "__name__", type(reward).__name__)
    given = reward(episodes)
    try:
        scores = np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise RewardError(f"reward {name}: expected numbers, got {given!r:.80}") from error
    if scores.shape != (len(episodes),):
        raise RewardError(
            f"reward {name}: expected {len(episodes)} numbers, one per episode, got an array of "
            f"shape {scores.shape}"
        )
    if not np.isfinite(scores).all():
        first = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise RewardError(
            f"reward {name}: expected finite numbers, got {scores[first]} for an episode of row "
            f"{episodes[first].row}; give a number where scoring fails, such as 0"
        )
    return scores


def _means(returns: Sequence[FloatArray]) -> tuple[FloatArray, FloatArray]:
    """Mean, and variance of the mean, of each array; the variance of a single return is NaN."""
    values = np.array([r.mean() for r in returns], dtype=np.float64)
    variances = [r.var(ddof=1) / len(r) if len(r) > 1 else np.nan for r in returns]
    return values, np.array(variances, dtype=np.float64)


class CriticValueEstimator:
    """Values by a function of token ids, such as the head of PPO's critic.

    Args:
        value_fn: gets the ids of each state, prompt and answer so far, and gives a value for each:
            that at the last token, which is the value of the state *after* it.
    """

    def __init__(
        self, value_fn: Callable[[Sequence[Sequence[int]]], Sequence[float] | FloatArray]
    ) -> None:
        self.value_fn = value_fn

    def __call__(self, states: Sequence[State], seed: int = 0) -> ValueEstimates:  # noqa: ARG002
        """Values of the states; the seed has no effect, and equal states are computed once.

        Raises:
            InvalidInputError: ``value_fn`` does not give one number per state.
            NotFiniteError: a value is not finite.
        """
        different, place = unique(states)
        if not different:
            return _known(np.empty(0), np.nan)
        values = np.asarray(self.value_fn([s.ids for s in different]), dtype=np.float64)
        if values.shape != (len(different),):
            raise InvalidInputError(
                f"value_fn: expected {len(different)} numbers, one per sequence of ids, got an "
                f"array of shape {values.shape}"
            )
        if not np.isfinite(values).all():
            bad = different[int(np.flatnonzero(~np.isfinite(values))[0])]
            raise NotFiniteError(
                f"value_fn: expected finite values, got another for a state of row {bad.row} after "
                f"{len(bad.response_ids)} answer tokens"
            )
        return _known(values[place], np.nan)


class GroupMeanValueEstimator:
    """The mean score of a row's group at every state of it: what GRPO and RLOO take as baseline.

    It knows nothing of the steps, and it is no unbiased baseline: a trajectory's own score is part
    of its group's mean. RLOO leaves it out (:func:`vineppo.advantages.rloo`).

    Args:
        rows_to_mean: mean score of the group by row.
    """

    def __init__(self, rows_to_mean: Mapping[int, float]) -> None:
        for row, mean in rows_to_mean.items():
            if not np.isfinite(mean):
                raise InvalidInputError(
                    f"rows_to_mean: expected finite means, got {mean} for row {row}"
                )
        self.rows_to_mean = dict(rows_to_mean)

    def __call__(self, states: Sequence[State], seed: int = 0) -> ValueEstimates:  # noqa: ARG002
        """Values of the states; the seed has no effect.

        Raises:
            InvalidInputError: a row without a mean.
        """
        if missing := {s.row for s in states} - self.rows_to_mean.keys():
            raise InvalidInputError(
                f"rows_to_mean: expected a mean for every row asked for, got none for row "
                f"{min(missing)} and {len(missing) - 1} others; score their groups first"
            )
        means = [self.rows_to_mean[s.row] for s in states]
        return _known(np.array(means, dtype=np.float64), np.nan)


class ConstantValueEstimator:
    """The same value everywhere; an ablation of the reference code, with 0.5.

    Args:
        value: finite.
    """

    def __init__(self, value: float = 0.5) -> None:
        if not np.isfinite(value):
            raise InvalidInputError(f"value: expected a finite number, got {value}")
        self.value = float(value)

    def __call__(self, states: Sequence[State], seed: int = 0) -> ValueEstimates:  # noqa: ARG002
        """The constant for each state; the seed has no effect."""
        return _known(np.full(len(states), self.value), 0.0)


class ExactValueEstimator:
    """The true values, where a task can compute them.

    Args:
        tree: knows them; states are found in it by the tokens of their answers.
    """

    def __init__(self, tree: TokenTree) -> None:
        self.tree = tree

    def __call__(self, states: Sequence[State], seed: int = 0) -> ValueEstimates:  # noqa: ARG002
        """Exact values of the states; the seed has no effect.

        Raises:
            InvalidInputError: a state that is not in the tree.
        """
        values = [self.tree.value(s.response_ids) for s in states]
        return _known(np.array(values, dtype=np.float64), 0.0)


def _known(values: FloatArray, variance: float) -> ValueEstimates:
    """Values that took no rollouts, all with one variance."""
    shape = values.shape
    return ValueEstimates(values, np.full(shape, variance), np.zeros(shape, dtype=np.int64))


def _whole(name: str, value: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if number < 1 or isinstance(value, bool):
        raise InvalidInputError(f"{name}: expected a whole number of at least 1, got {value!r}")
    return number
