"""The exact bench: bias, variance and cosine of gradient estimators on random token trees.

Nothing is trained. Bias and variance are sums over all responses (:mod:`vineppo.exact`); the cosine
of one estimate to the true gradient is not linear in it and comes from samples, with an interval.

Estimators are compared at equal numbers of responses, which is what the learner pays for, and at
equal numbers of generated tokens, rollouts included, which is what the sampler pays for. A critic's
values cost no tokens here; what training one costs is not counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from vineppo.advantages import grpo, rloo
from vineppo.errors import InvalidInputError, one_of
from vineppo.exact import (
    GroupAdvantage,
    Moments,
    critic_advantages,
    fixed_moments,
    group_moments,
    responses,
    true_advantages,
)
from vineppo.exact_vines import alike, token_weights, vine_moments
from vineppo.segmenters import FixedLengthSegmenter, TokenLevelSegmenter, TokenSegmenter
from vineppo.tasks.token_tree import TokenTree

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Result = Mapping[str, Any]
Budget = Literal["responses", "tokens"]

FAMILIES: Final[dict[str, dict[str, Any]]] = {
    "short": {"vocabulary": 3, "horizon": 4, "success": 0.3},
    "long": {"vocabulary": 3, "horizon": 6, "success": 0.3},
    "sparse": {"vocabulary": 3, "horizon": 6, "success": 0.05},
    "deep": {"vocabulary": 2, "horizon": 8, "success": 0.3},
    "wide": {"vocabulary": 4, "horizon": 5, "success": 0.2},
    "ending": {"vocabulary": 3, "horizon": 6, "success": 0.3, "end_token": 2},
    "sharp": {"vocabulary": 3, "horizon": 6, "success": 0.3, "scale": 3.0},
    "first action": {"vocabulary": 3, "horizon": 6, "position": 0},
    "last action": {"vocabulary": 3, "horizon": 6, "position": 5},
}
"""Arguments of :meth:`TokenTree.random`, or of ``one_action_matters`` where there is a position."""

ROLLOUTS: Final = (1, 3, 9)
STEP_TOKENS: Final = 2
CRITIC_ERROR: Final = 0.11
"""Mean absolute error of the critic, that of PPO's in Figure 3 of arXiv 2410.01679."""

BUDGET_GROUPS: Final = 4
"""Equal tokens: as many as so many groups of the costliest estimator take."""

NAMES: Final = {
    "reinforce": "REINFORCE",
    "rloo": "RLOO",
    "grpo": "GRPO",
    "ppo_0": "PPO, λ = 0",
    "ppo_95": "PPO, λ = 0.95",
    "ppo_1": "PPO, λ = 1",
    **{f"vine_token_{k}": f"VinePPO, tokens, K = {k}" for k in ROLLOUTS},
    **{f"vine_step_{k}": f"VinePPO, steps, K = {k}" for k in ROLLOUTS},
    "vine_after_9": "VinePPO, cut after mark, K = 9",
    "vine_before_9": "VinePPO, cut before mark, K = 9",
    "exact": "exact advantages",
}


@dataclass(frozen=True)
class MarkSegmenter:
    """Cuts at a token, as at a newline.

    Attributes:
        token: the mark.
        before: it belongs to the step that it starts, else to the one that it ends.
    """

    token: int = 0
    before: bool = False

    def segment_ids(self, ids: Sequence[int]) -> list[int]:
        """See :class:`vineppo.segmenters.TokenLevelSegmenter`."""
        cuts = {i + (not self.before) for i, token in enumerate(ids) if token == self.token}
        return sorted({0, len(ids)} | cuts)


@dataclass(frozen=True)
class Arm:
    """An estimator on one tree.

    Attributes:
        moments: of one group.
        draw: from leaves [groups, G] to advantages [groups, G, horizon].
    """

    moments: Moments
    draw: Callable[[np.random.Generator, Ints], Floats]


def make_tree(family: str, seed: int) -> TokenTree:
    """The tree of a family with a seed."""
    one_of("family", family, FAMILIES)
    given = FAMILIES[family]
    if "position" in given:
        return TokenTree.one_action_matters(seed=seed, **given)
    return TokenTree.random(seed=seed, **given)


def cells(seeds: int) -> list[dict[str, Any]]:
    """Arguments of :func:`tree_cell` for so many trees of each family; half a second each."""
    return [{"family": family, "seed": seed} for family in FAMILIES for seed in range(seeds)]


def tree_cell(seed: int, family: str, group: int = 8, batches: int = 200) -> dict[str, Any]:
    """Job: all estimators on one tree.

    Args:
        seed: of the tree, of the critic's errors, and of the samples.
        family: in :data:`FAMILIES`.
        group: G, responses of a group.
        batches: estimates that the cosines are means of.

    Returns:
        The arguments; ``value``, V of the root; ``length``, of the true gradient; ``tokens``, of a
        group without rollouts; ``budget``, tokens of the comparison at equal tokens; and for each
        estimator in ``arms``: ``bias`` relative to the gradient's length, ``direction``, the cosine
        of the expected estimate; ``variance`` of one group relative to the squared length;
        ``tokens`` of one group; ``groups`` that fit the budget; ``cosine`` of single estimates at
        either budget, mean and half of its 95 % interval.
    """
    tree = make_tree(family, seed)
    true = tree.gradient
    length = float(np.linalg.norm(true))
    arms = make_arms(tree, group, np.random.default_rng([seed, 1]))
    budget = BUDGET_GROUPS * max(arm.moments.tokens for arm in arms.values())
    rows = {}
    for name, arm in arms.items():
        groups = max(1, round(budget / arm.moments.tokens))
        rows[name] = {
            "bias": arm.moments.bias(true),
            "direction": arm.moments.cosine(true),
            "variance": arm.moments.variance / length**2,
            "tokens": arm.moments.tokens,
            "groups": groups,
            "cosine": {
                "responses": _cosine(tree, arm, group, 1, batches, seed),
                "tokens": _cosine(tree, arm, group, groups, batches, seed),
            },
        }
    return {
        "family": family,
        "seed": seed,
        "group": group,
        "batches": batches,
        "value": float(tree.values[0]),
        "length": length,
        "tokens": group * float(tree.remaining[0]),
        "budget": budget,
        "arms": rows,
    }


def squared_error(result: Result, arm: str, budget: Budget) -> float:
    """Expected squared distance of an estimate to the gradient, relative to its squared length.

    Args:
        result: of :func:`tree_cell`.
        arm: in :data:`NAMES`.
        budget: "responses": of one group. "tokens": of as many groups, whole or not, as the budget
            of the tree pays for.
    """
    row = result["arms"][arm]
    groups = 1.0 if budget == "responses" else result["budget"] / row["tokens"]
    return float(row["bias"] ** 2 + row["variance"] / groups)


def ratios(results: Sequence[Result], arm: str, against: str, budget: Budget) -> list[float]:
    """Squared error of an estimator over that of another, for each tree."""
    return [squared_error(r, arm, budget) / squared_error(r, against, budget) for r in results]


def break_even(result: Result, arm: str, against: str = "rloo") -> float:
    """The cost of training on a token, in generated tokens, from which an estimator pays.

    At that cost both have the same variance for the same total. 0 where it wins without any,
    infinite where its variance per response is not smaller. For estimators without bias.
    """
    row, other = result["arms"][arm], result["arms"][against]
    saved = other["variance"] - row["variance"]
    if saved <= 0:
        return math.inf
    lost = row["variance"] * row["tokens"] - other["variance"] * other["tokens"]
    return max(0.0, float(lost / (saved * result["tokens"])))


# --- the estimators ------------------------------------------------------------------------------


def make_arms(tree: TokenTree, group: int, rng: np.random.Generator) -> dict[str, Arm]:
    """All estimators, by the names of :data:`NAMES`.

    Args:
        tree: with rewards 0 and 1, so that the sum of K rollouts is binomial.
        group: G.
        rng: draws the critic's errors.

    Raises:
        InvalidInputError: another reward.
    """
    if not np.isin(tree.rewards, (0, 1)).all():
        raise InvalidInputError("tree: expected rewards 0 and 1 alone, got others between them")
    every = responses(tree)
    spread = CRITIC_ERROR * math.sqrt(math.pi / 2)  # of a normal number with that mean size
    critic = tree.values + spread * rng.standard_normal(tree.shape.nodes)
    token, step = TokenSegmenter(), FixedLengthSegmenter(STEP_TOKENS)
    return {
        "reinforce": _fixed(tree, group, np.where(every.mask, every.rewards[:, None], 0.0)),
        "rloo": _of_group(tree, group, rloo),
        "grpo": _of_group(tree, group, grpo),
        "ppo_0": _fixed(tree, group, critic_advantages(tree, critic, 0.0)),
        "ppo_95": _fixed(tree, group, critic_advantages(tree, critic, 0.95)),
        "ppo_1": _fixed(tree, group, critic_advantages(tree, critic, 1.0)),
        **{f"vine_token_{k}": _vine(tree, group, token, k) for k in ROLLOUTS},
        **{f"vine_step_{k}": _vine(tree, group, step, k) for k in ROLLOUTS},
        "vine_after_9": _vine(tree, group, MarkSegmenter(), 9),
        "vine_before_9": _vine(tree, group, MarkSegmenter(before=True), 9),
        "exact": _fixed(tree, group, true_advantages(tree)),
    }


def _fixed(tree: TokenTree, group: int, advantages: Floats) -> Arm:
    return Arm(fixed_moments(tree, advantages, group), lambda _, leaves: advantages[leaves])


def _of_group(tree: TokenTree, group: int, advantage: GroupAdvantage) -> Arm:
    mask = responses(tree).mask

    def draw(_: np.random.Generator, leaves: Ints) -> Floats:
        numbers = np.repeat(np.arange(len(leaves)), leaves.shape[1])
        found = advantage(tree.rewards[leaves].ravel(), numbers).reshape(leaves.shape)
        return np.where(mask[leaves], found[..., None], 0.0)

    return Arm(group_moments(tree, group, advantage), draw)


def _vine(tree: TokenTree, group: int, segmenter: TokenLevelSegmenter, k: int) -> Arm:
    kinds = [
        (borders, rows, *token_weights(borders)) for borders, rows in alike(tree, segmenter).items()
    ]
    kind_of = np.empty(tree.shape.leaves, dtype=np.int64)
    for kind, (_, rows, _, _) in enumerate(kinds):
        kind_of[rows] = kind

    def draw(rng: np.random.Generator, leaves: Ints) -> Floats:
        chances = np.clip(tree.values[: tree.shape.internal], 0.0, 1.0)
        values = rng.binomial(k, chances, (len(leaves), tree.shape.internal)) / k
        found = np.zeros((*leaves.shape, tree.shape.horizon))
        for kind, (borders, _, weights, of_score) in enumerate(kinds):
            group_of, member = np.nonzero(kind_of[leaves] == kind)
            leaf = leaves[group_of, member]
            at = tree.shape.paths[leaf[:, None], borders[:-1]]
            found[group_of, member, : borders[-1]] = (
                values[group_of[:, None], at] @ weights.T + tree.rewards[leaf, None] * of_score
            )
        return found

    return Arm(vine_moments(tree, segmenter, k, group), draw)


# --- samples -------------------------------------------------------------------------------------


def sampled_gradients(
    tree: TokenTree, arm: Arm, group: int, groups: int, batches: int, rng: np.random.Generator
) -> Floats:
    """Estimates, each the mean of so many groups.

    Returns:
        [batches, internal, vocabulary].
    """
    every = responses(tree)
    leaves = rng.choice(tree.shape.leaves, (batches * groups, group), p=every.probabilities).astype(
        np.int64
    )
    advantages = arm.draw(rng, leaves)
    size = tree.shape.internal
    batch = np.repeat(np.arange(batches), groups)[:, None, None]
    place = (batch * size + every.nodes[leaves]).ravel()
    found = np.empty((batches, size, tree.shape.vocabulary))
    for token in range(tree.shape.vocabulary):
        weights = advantages * every.scores[leaves, :, token]
        found[..., token] = np.bincount(place, weights.ravel(), batches * size).reshape(-1, size)
    return found / (groups * group)


def _cosine(
    tree: TokenTree, arm: Arm, group: int, groups: int, batches: int, seed: int
) -> list[float]:
    """Mean cosine to the true gradient, and half of its 95 % interval. No estimate counts as 0."""
    rng = np.random.default_rng([seed, 2])  # the same responses for all estimators
    found = sampled_gradients(tree, arm, group, groups, batches, rng)
    true = tree.gradient
    lengths = np.sqrt((found**2).sum(axis=(1, 2))) * np.linalg.norm(true)
    dots = (found * true).sum(axis=(1, 2))
    cosines = np.divide(dots, lengths, out=np.zeros_like(dots), where=lengths > 0)
    half = 1.96 * cosines.std(ddof=1) / math.sqrt(batches)
    return [float(cosines.mean()), float(half)]
