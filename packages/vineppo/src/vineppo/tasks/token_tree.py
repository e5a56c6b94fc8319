"""Finite token trees: a task on which values, advantages and the policy gradient are known exactly.

A response is a path from the root to a leaf, and the policy is a table with a row of logits per
internal node. All that a method has to estimate follows by dynamic programming, so that its bias
and variance are numbers, not impressions.

Nodes are numbered as in :mod:`vineppo.tasks.tree_shape`: the internal ones, then the leaves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from vineppo.episodes import Episode, State
from vineppo.errors import InvalidInputError, fraction, positive
from vineppo.tasks.tabular import TabularBackend, log_softmax
from vineppo.tasks.tree_shape import NOTHING, TreeShape

if TYPE_CHECKING:
    import torch

__all__ = ["TabularBackend", "TokenTree", "TreeShape"]

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class TokenTree:
    """A shape with a policy and rewards. The transition is concatenation, and γ = 1.

    It is one prompt of one token, ``vocabulary``, which no response holds; row 0.

    Attributes:
        shape: the nodes.
        logits: [internal, vocabulary] of the softmax policy; finite.
        rewards: [leaves] of the responses, from 0 to 1; given after the last token.

    Raises:
        InvalidInputError: arrays of another shape, a logit that is not finite, a reward outside
            [0, 1].
    """

    shape: TreeShape
    logits: Floats
    rewards: Floats

    def __post_init__(self) -> None:
        wanted = {
            "logits": (self.shape.internal, self.shape.vocabulary),
            "rewards": (self.shape.leaves,),
        }
        for name, size in wanted.items():
            found = np.array(getattr(self, name), dtype=np.float64)
            if found.shape != size:
                raise InvalidInputError(f"{name}: expected shape {size}, got {found.shape}")
            found.flags.writeable = False
            object.__setattr__(self, name, found)
        if not np.isfinite(self.logits).all():
            raise InvalidInputError("logits: expected finite numbers, got NaN or inf")
        if not ((self.rewards >= 0) & (self.rewards <= 1)).all():
            raise InvalidInputError(
                f"rewards: expected numbers from 0 to 1, got {self.rewards.min():g} to "
                f"{self.rewards.max():g}"
            )

    @classmethod
    def random(
        cls,
        vocabulary: int = 3,
        horizon: int = 4,
        seed: int = 0,
        *,
        end_token: int | None = None,
        scale: float = 1.0,
        success: float | None = 0.5,
    ) -> TokenTree:
        """A tree with normal logits, and rewards to which every action contributes.

        Each action adds a normal number to the worth of the leaves below it, so that neighbours
        are alike, as answers are that differ in their last words only.

        Args:
            vocabulary: see :class:`TreeShape`.
            horizon: see :class:`TreeShape`.
            seed: of all that is drawn.
            end_token: see :class:`TreeShape`.
            scale: standard deviation of the logits.
            success: the share of the leaves, those worth most, that have reward 1 (at least one
                leaf, and not all); the others have 0. None: rewards are spread evenly over [0, 1],
                in the order of worth.
        """
        positive("scale", scale)
        shape = TreeShape(vocabulary, horizon, end_token)
        rng = np.random.default_rng(seed)
        logits = scale * rng.standard_normal((shape.internal, vocabulary))
        credit = rng.standard_normal(shape.nodes)
        worth = np.where(shape.paths == NOTHING, 0.0, credit[shape.paths])[:, 1:].sum(axis=1)
        rank = worth.argsort().argsort()
        if success is None:
            return cls(shape, logits, rank / (shape.leaves - 1))
        fraction("success", success)
        right = min(max(round(success * shape.leaves), 1), shape.leaves - 1)
        return cls(shape, logits, (rank >= shape.leaves - right).astype(np.float64))

    @classmethod
    def one_action_matters(
        cls, vocabulary: int = 3, horizon: int = 4, position: int = 1, seed: int = 0
    ) -> TokenTree:
        """A tree where token 0 at one position is right, and nothing else matters.

        The policy at that position is the same whatever came before, so that every other action
        has an advantage of exactly 0.

        Args:
            vocabulary: see :class:`TreeShape`.
            horizon: see :class:`TreeShape`.
            position: from 0 to ``horizon`` - 1.
            seed: of the logits.
        """
        shape = TreeShape(vocabulary, horizon)
        if not 0 <= position < horizon:
            raise InvalidInputError(
                f"position: expected a number from 0 to {horizon - 1}, got {position}"
            )
        logits = np.random.default_rng(seed).standard_normal((shape.internal, vocabulary))
        level = shape.levels[position]
        logits[level] = logits[level.start]
        return cls(shape, logits, (shape.tokens[:, position] == 0).astype(np.float64))

    def with_logits(self, logits: npt.ArrayLike) -> TokenTree:
        """The same task under another policy, [internal, vocabulary]."""
        return replace(self, logits=np.asarray(logits, dtype=np.float64))

    # --- the policy, and what follows from it ---------------------------------------------------

    @cached_property
    def logprobs(self) -> Floats:
        """[internal, vocabulary]: natural log-probability of each token."""
        return log_softmax(self.logits)

    @cached_property
    def probabilities(self) -> Floats:
        """[internal, vocabulary]: π(a | s)."""
        return np.exp(self.logprobs)

    def expectations(self, at_leaves: npt.ArrayLike) -> Floats:
        """The expectation, from every node on, of a function of the leaf.

        Args:
            at_leaves: [leaves].

        Returns:
            [nodes]; at a leaf the function itself.
        """
        found = np.concatenate([np.zeros(self.shape.internal), np.asarray(at_leaves, np.float64)])
        for level in reversed(self.shape.levels):
            below = found[self.shape.children[level]]
            found[level] = (self.probabilities[level] * below).sum(axis=1)
        return found

    @cached_property
    def values(self) -> Floats:
        """[nodes]: V(s), the expected reward from a node on; at a leaf its reward."""
        return self.expectations(self.rewards)

    @cached_property
    def variances(self) -> Floats:
        """[nodes]: of the reward of one rollout; p (1 - p) where rewards are 0 and 1."""
        return self.expectations(self.rewards**2) - self.values**2

    @cached_property
    def q_values(self) -> Floats:
        """[internal, vocabulary]: Q(s, a)."""
        return self.values[self.shape.children]

    @cached_property
    def advantages(self) -> Floats:
        """[internal, vocabulary]: A(s, a) = Q(s, a) - V(s)."""
        return self.q_values - self.values[: self.shape.internal, None]

    @cached_property
    def reach(self) -> Floats:
        """[nodes]: the chance that a response passes through, or ends in, each node."""
        found = np.ones(self.shape.nodes)
        for level in self.shape.levels:
            found[self.shape.children[level]] = found[level, None] * self.probabilities[level]
        return found

    @cached_property
    def remaining(self) -> Floats:
        """[nodes]: expected tokens from each node to the end, which is what a rollout costs."""
        lengths = self.shape.depths[self.shape.internal :]
        return self.expectations(lengths) - self.shape.depths

    @cached_property
    def gradient(self) -> Floats:
        """[internal, vocabulary]: of J = E[R] by the logits, d(s) π(a | s) A(s, a).

        The policy gradient theorem for a softmax per state; d(s) is :attr:`reach`.
        """
        return self.reach[: self.shape.internal, None] * self.probabilities * self.advantages

    # --- as episodes ------------------------------------------------------------------------------

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """The one token that stands for the root."""
        return (self.shape.vocabulary,)

    def node(self, response_ids: Sequence[int]) -> int:
        """The node that a response, or its beginning, leads to.

        Raises:
            InvalidInputError: a token that is none, or one behind the end of a response.
        """
        at = 0
        for place, token in enumerate(response_ids):
            if at >= self.shape.internal or not 0 <= token < self.shape.vocabulary:
                raise InvalidInputError(
                    f"response_ids: expected a path of the tree, tokens 0 to "
                    f"{self.shape.vocabulary - 1} up to a leaf, got {tuple(response_ids)}; token "
                    f"{place} leads nowhere"
                )
            at = int(self.shape.children[at, token])
        return at

    def value(self, response_ids: Sequence[int]) -> float:
        """V of the state after these tokens; of a whole response, its reward."""
        return float(self.values[self.node(response_ids)])

    def state(self, node: int) -> State:
        """The state of a node."""
        return State(0, self.prompt_ids, tuple(self._way_to(node)))

    def episode(self, leaf: int) -> Episode:
        """The whole response that ends in the ``leaf``-th leaf (0 .. leaves - 1)."""
        state = self.state(self.shape.internal + leaf)
        return Episode(0, self.prompt_ids, state.response_ids, finished=True)

    def episodes(self) -> Iterator[tuple[Episode, float, float]]:
        """Every response with its probability and its reward, in the order of the leaves."""
        probabilities = self.reach[self.shape.internal :]
        for leaf in range(self.shape.leaves):
            yield self.episode(leaf), float(probabilities[leaf]), float(self.rewards[leaf])

    def _way_to(self, node: int) -> list[int]:
        found: list[int] = []
        while node:
            found.append(int(self.shape.last_tokens[node]))
            node = int(self.shape.parents[node])
        return found[::-1]

    def score(self, episodes: Sequence[Episode]) -> list[float]:
        """The rewards; 0 for a response that was cut before a leaf. A ``Reward``."""
        nodes = [self.node(episode.response_ids) for episode in episodes]
        first = self.shape.internal
        return [float(self.rewards[node - first]) if node >= first else 0.0 for node in nodes]

    def token_logprobs(
        self, logits: torch.Tensor, responses: Sequence[Sequence[int]]
    ) -> torch.Tensor:
        """Log-probabilities of responses under logits that may ask for a gradient.

        Args:
            logits: (internal, vocabulary).
            responses: n of them, the longest of T tokens.

        Returns:
            (n, T), 0 behind the end of a response.
        """
        import torch

        length = max(map(len, responses), default=0)
        found = torch.zeros(len(responses), length, dtype=logits.dtype)
        rows, columns, nodes, tokens = [], [], [], []
        for row, response in enumerate(responses):
            self.node(response)  # it is a path of the tree
            at = 0
            for column, token in enumerate(response):
                rows.append(row)
                columns.append(column)
                nodes.append(at)
                tokens.append(token)
                at = int(self.shape.children[at, token])
        where = (torch.tensor(rows, dtype=torch.long), torch.tensor(columns, dtype=torch.long))
        return found.index_put(where, torch.log_softmax(logits, dim=1)[nodes, tokens])

    def backend(self) -> TabularBackend:
        """Samples from this tree."""
        return TabularBackend(self)
