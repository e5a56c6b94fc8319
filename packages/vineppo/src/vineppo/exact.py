"""Expectation and variance of policy-gradient estimators on a token tree, without sampling.

An estimator averages over a group of G responses to one prompt

    ĝ = 1/G Σ_j Σ_t A_jt ∇ log π(a_jt | s_jt),    ∇ log π(a | s) = e_a − π(· | s) in the row of s,

and differs from the others in A alone. A tree has few enough responses to sum over all of them;
what is random in A given a response is known in closed form. Vines are in
:mod:`vineppo.exact_vines`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from vineppo.advantages import gae
from vineppo.errors import InvalidInputError, at_least
from vineppo.tasks.token_tree import TokenTree
from vineppo.tasks.tree_shape import NOTHING

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
GroupAdvantage = Callable[[Floats, Ints], Floats]

_MOST_COMPOSITIONS: Final = 200_000


@dataclass(frozen=True, eq=False)
class Moments:
    """What an estimator gives for one group.

    Attributes:
        mean: [internal, vocabulary], the expected gradient.
        variance: the trace of its covariance.
        tokens: generated for the group in expectation, rollouts among them.
    """

    mean: Floats
    variance: float
    tokens: float

    def bias(self, gradient: Floats) -> float:
        """Distance of the mean from the true gradient, as a share of the latter's length."""
        return float(np.linalg.norm(self.mean - gradient) / np.linalg.norm(gradient))

    def cosine(self, gradient: Floats) -> float:
        """Cosine of the mean to the true gradient: 1 where the bias is one of length only."""
        lengths = np.linalg.norm(self.mean) * np.linalg.norm(gradient)
        return float((self.mean * gradient).sum() / lengths)


class Responses(NamedTuple):
    """All responses of a tree, in the order of its leaves; n of them, of up to H tokens.

    Attributes:
        probabilities: [n].
        rewards: [n].
        nodes: [n, H], the state before each token; 0 behind the end.
        mask: [n, H], where there is a token.
        scores: [n, H, vocabulary], ∇ log π of each token, 0 behind the end.
    """

    probabilities: Floats
    rewards: Floats
    nodes: Ints
    mask: npt.NDArray[np.bool_]
    scores: Floats

    @property
    def squares(self) -> Floats:
        """[n, H]: squared lengths of the scores. States of a response differ, so they add up."""
        found: Floats = (self.scores**2).sum(axis=2)
        return found


def responses(tree: TokenTree) -> Responses:
    """All responses of a tree."""
    shape = tree.shape
    mask = shape.tokens != NOTHING
    nodes = np.where(mask, shape.paths[:, :-1], 0)
    taken = np.arange(shape.vocabulary) == shape.tokens[:, :, None]
    scores = np.where(mask[:, :, None], taken - tree.probabilities[nodes], 0.0)
    return Responses(tree.reach[shape.internal :], tree.rewards, nodes, mask, scores)


def expected_gradient(tree: TokenTree, advantages: Floats) -> Floats:
    """The sum over all responses of probability times Σ_t A_t ∇ log π.

    Args:
        tree: the policy.
        advantages: [leaves, horizon] of the tokens of each response.

    Returns:
        [internal, vocabulary].
    """
    every = responses(tree)
    found = np.zeros(tree.logits.shape)
    np.add.at(
        found, every.nodes, (every.probabilities[:, None] * advantages)[..., None] * every.scores
    )
    return found


def fixed_moments(tree: TokenTree, advantages: Floats, group: int = 1) -> Moments:
    """Moments where the advantages are a function of the response alone: no rollouts, no group.

    Args:
        tree: the policy.
        advantages: [leaves, horizon] of the tokens of each response.
        group: G, responses that are averaged.
    """
    at_least("group", group, 1)
    every = responses(tree)
    mean = expected_gradient(tree, advantages)
    second = every.probabilities @ (advantages**2 * every.squares).sum(axis=1)
    return Moments(mean, (second - (mean**2).sum()) / group, group * float(tree.remaining[0]))


def true_advantages(tree: TokenTree) -> Floats:
    """[leaves, horizon]: Q − V of each token, 0 behind the end."""
    every = responses(tree)
    found: Floats = np.where(
        every.mask, tree.advantages[every.nodes, np.maximum(tree.shape.tokens, 0)], 0.0
    )
    return found


def critic_advantages(tree: TokenTree, values: Floats, lam: float) -> Floats:
    """Advantages of a critic by GAE over tokens.

    Args:
        tree: the responses.
        values: [nodes] or [internal], what the critic says of each state.
        lam: λ; 1 makes the critic a mere baseline.

    Returns:
        [leaves, horizon].
    """
    every = responses(tree)
    mask = torch.from_numpy(every.mask)
    rewards = np.zeros(every.mask.shape)
    rewards[np.arange(len(rewards)), every.mask.sum(axis=1) - 1] = every.rewards
    found = gae(torch.from_numpy(values[every.nodes]), torch.from_numpy(rewards), mask, 1.0, lam)
    return np.asarray(found.advantages.numpy(), dtype=np.float64)


# --- advantages of whole groups -------------------------------------------------------------------


def group_moments(tree: TokenTree, group: int, advantage: GroupAdvantage) -> Moments:
    """Moments where a response's advantage is a function of the rewards of its group.

    Responses enter through their rewards alone, so it is enough to go through the numbers of
    responses with each reward.

    Args:
        tree: with few different rewards.
        group: G, at least 2.
        advantage: from rewards [N] and group numbers [N] to [N], as
            :func:`vineppo.advantages.rloo`; it must not depend on the order within a group.

    Raises:
        InvalidInputError: more combinations of rewards than can be enumerated.
    """
    at_least("group", group, 2)
    every = responses(tree)
    levels, level = np.unique(every.rewards, return_inverse=True)
    if math.comb(group + len(levels) - 1, group) > _MOST_COMPOSITIONS:
        raise InvalidInputError(
            f"tree: expected few different rewards, got {len(levels)}, too many combinations in "
            f"groups of {group}; draw the tree with success=0.5, say"
        )
    counts = np.array(list(_compositions(group, len(levels))))
    chances = np.bincount(level, every.probabilities)
    ways = np.array([_ways(row) for row in counts.tolist()])
    weights = ways * (chances**counts).prod(axis=1)
    # Equal rewards of a group have equal advantages: a table of one per combination and reward.
    member = np.repeat(np.arange(counts.size), counts.ravel())
    table = np.zeros(counts.shape)
    table.flat[member] = advantage(levels[member % len(levels)], member // len(levels))
    own = weights @ (counts / group * table) / chances
    own_square = weights @ (counts / group * table**2) / chances
    pairs = counts[:, :, None] * (counts[:, None, :] - np.eye(len(levels)))
    both = np.einsum("c,crs,cr,cs->rs", weights, pairs / (group * (group - 1)), table, table)
    both /= np.outer(chances, chances)
    kinds = [np.where(level[:, None] == r, every.mask, 0.0) for r in range(len(levels))]
    shares = np.stack([expected_gradient(tree, kind) for kind in kinds])
    mean = np.einsum("r,ria->ia", own, shares)
    alone = np.bincount(level, every.probabilities * every.squares.sum(axis=1)) @ own_square
    dots = np.einsum("ria,sia->rs", shares, shares)
    second = (alone + (group - 1) * (both * dots).sum()) / group
    return Moments(mean, float(second - (mean**2).sum()), group * float(tree.remaining[0]))


def _compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    if parts == 1:
        yield (total,)
        return
    for first in range(total + 1):
        for rest in _compositions(total - first, parts - 1):
            yield (first, *rest)


def _ways(counts: Sequence[int]) -> int:
    """The multinomial coefficient."""
    return math.factorial(sum(counts)) // math.prod(map(math.factorial, counts))
