"""Expectation and variance of the VinePPO estimator on a token tree, without sampling.

Given a response, the advantages of its steps are linear in the values of its states, and those are
means of K rollouts. So the moments follow from the mean and variance of one rollout from each
state, and :func:`enumerate_vine` goes through all outcomes instead, to check them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from vineppo.advantages import step_advantages, step_rewards, to_token_advantages
from vineppo.errors import at_least
from vineppo.exact import Moments, expected_gradient, responses
from vineppo.segmenters import TokenLevelSegmenter
from vineppo.tasks.token_tree import TokenTree
from vineppo.tasks.tree_shape import NOTHING

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def vine_moments(
    tree: TokenTree,
    segmenter: TokenLevelSegmenter,
    k: float = 1,
    group: int = 1,
    *,
    lam: float = 0.0,
    max_value_steps: int | None = None,
    share: bool = True,
) -> Moments:
    """Moments of the VinePPO estimator without whitening (Eq. 5 and 6 of arXiv 2410.01679).

    Where two responses of the group share a state, they share its value, and are correlated for it.

    Args:
        tree: the policy.
        segmenter: cuts responses into steps.
        k: K, rollouts per state; infinity gives the exact values (and costs no tokens).
        group: G.
        lam: λ over steps.
        max_value_steps: states s_0 .. s_{M-1} alone have an estimate; None: all.
        share: equal states are estimated once for the group, else once for each response.
    """
    at_least("group", group, 1)
    at_least("k", k, 1)
    every = responses(tree)
    shape = tree.shape
    noise = tree.variances / k
    means, variances = np.zeros(every.mask.shape), np.zeros(every.mask.shape)
    visits = np.zeros(shape.nodes)
    # Σ p W ∇log π over the responses through s and u, where W is the weight of the value of u in
    # the advantage at s: by [u, depth of s] where u is the deeper one, by [s, depth of u] else.
    below = np.zeros((shape.nodes, shape.horizon, shape.vocabulary))
    above = np.zeros_like(below)
    for borders, rows in alike(tree, segmenter).items():
        weights, of_score = token_weights(borders, lam, max_value_steps)
        states = shape.paths[rows[:, None], borders[:-1]]
        chances = every.probabilities[rows]
        here = rows[:, None], np.arange(borders[-1])
        means[here] = tree.values[states] @ weights.T + np.outer(every.rewards[rows], of_score)
        variances[here] = noise[states] @ (weights**2).T
        np.add.at(visits, states[:, :max_value_steps], chances[:, None])
        for t, j in np.argwhere(weights):
            part = (chances * weights[t, j])[:, None] * every.scores[rows, t]
            if borders[j] > t:
                np.add.at(below, (states[:, j], t), part)
            else:
                np.add.at(above, (every.nodes[rows, t], borders[j]), part)
    mean = expected_gradient(tree, means)
    second = every.probabilities @ ((means**2 + variances) * every.squares).sum(axis=1)
    variance = float(second - (mean**2).sum()) / group
    if share:
        shared = (below**2).sum(axis=(1, 2)) @ noise
        shared += ((above**2).sum(axis=2) * noise[_ancestors(tree)]).sum()
        variance += float(shared) * (group - 1) / group
        visits = 1 - (1 - visits) ** group
    else:
        visits *= group
    rollouts = float(visits @ tree.remaining) * k if math.isfinite(k) else 0.0
    return Moments(mean, variance, group * float(tree.remaining[0]) + rollouts)


def token_weights(
    borders: Sequence[int], lam: float = 0.0, max_value_steps: int | None = None
) -> tuple[Floats, Floats]:
    """The advantages of a response's tokens as linear functions of values and score.

    Args:
        borders: S + 1 token borders of the steps.
        lam: λ over steps.
        max_value_steps: see :func:`vine_moments`; values beyond it have weight 0.

    Returns:
        Weights of the values [T, S], and of the score [T], read off
        :func:`vineppo.advantages.step_advantages` by giving it one 1 at a time.
    """
    steps = len(borders) - 1
    cap = steps if max_value_steps is None else max_value_steps
    inputs = np.concatenate([np.eye(steps), np.zeros((1, steps))])
    inputs[:, cap:] = np.nan
    found = np.stack(
        [
            to_token_advantages(
                step_advantages(row, step_rewards(float(i == steps), steps), 1.0, lam), borders
            )
            for i, row in enumerate(inputs)
        ],
        axis=1,
    )
    found[:, cap:steps] = 0.0
    return found[:, :-1], found[:, -1]


def alike(tree: TokenTree, segmenter: TokenLevelSegmenter) -> dict[tuple[int, ...], Ints]:
    """The responses (leaves) with equal borders."""
    found: dict[tuple[int, ...], list[int]] = {}
    for leaf, row in enumerate(tree.shape.tokens.tolist()):
        ids = [token for token in row if token != NOTHING]
        found.setdefault(tuple(segmenter.segment_ids(ids)), []).append(leaf)
    return {borders: np.array(rows) for borders, rows in found.items()}


def _ancestors(tree: TokenTree) -> Ints:
    """[nodes, horizon]: the node at each depth on the way to a node, itself among them; else 0."""
    paths = tree.shape.paths
    found = np.zeros((tree.shape.nodes, tree.shape.horizon), dtype=np.int64)
    for depth in range(tree.shape.horizon):
        for at in range(depth, tree.shape.horizon):
            going = paths[:, at] != NOTHING
            found[paths[going, at], depth] = paths[going, depth]
    return found


def enumerate_vine(
    tree: TokenTree,
    segmenter: TokenLevelSegmenter,
    group: int = 1,
    *,
    lam: float = 0.0,
    max_value_steps: int | None = None,
    share: bool = True,
) -> Moments:
    """:func:`vine_moments` for K = 1 by brute force, which takes nothing for granted.

    Goes through every group of responses and every outcome (a reward) of the one rollout from each
    of its states, and sends each through the library's own advantages. For tiny trees only.
    """
    every = responses(tree)
    segments = {int(r): b for b, rows in alike(tree, segmenter).items() for r in rows}
    levels = np.unique(every.rewards)
    chances = np.stack([tree.expectations(tree.rewards == level) for level in levels], axis=1)
    gradients = np.zeros((*every.mask.shape, *tree.logits.shape))
    for row, column in np.argwhere(every.mask):
        gradients[row, column, every.nodes[row, column]] = every.scores[row, column]
    mean, second, tokens = np.zeros(tree.logits.shape), 0.0, 0.0
    for members in itertools.product(range(tree.shape.leaves), repeat=group):
        states = [
            [(0 if share else j, int(tree.shape.paths[leaf, at])) for at in segments[leaf][:-1]]
            for j, leaf in enumerate(members)
        ]
        asked = list(dict.fromkeys(key for row in states for key in row[:max_value_steps]))
        outcomes = np.array(
            list(itertools.product(*(np.flatnonzero(chances[node] > 0) for _, node in asked)))
        )
        nodes = [node for _, node in asked]
        weights = chances[nodes, outcomes].prod(axis=1) * every.probabilities[list(members)].prod()
        estimate = np.zeros((len(outcomes), *tree.logits.shape))
        for leaf, row in zip(members, states, strict=True):
            columns = [asked.index(key) for key in row[:max_value_steps]]
            values = levels[outcomes[:, columns]]
            score = float(every.rewards[leaf])
            advantages = np.array(
                [_advantages(tuple(v), score, segments[leaf], lam) for v in values.tolist()]
            )
            length = segments[leaf][-1]
            estimate += np.tensordot(advantages, gradients[leaf, :length], axes=1) / group
        mean += np.tensordot(weights, estimate, axes=1)
        second += float(weights @ (estimate**2).sum(axis=(1, 2)))
        lengths = every.mask[list(members)].sum() + tree.remaining[nodes].sum()
        tokens += float(weights.sum() * lengths)
    return Moments(mean, second - float((mean**2).sum()), tokens)


@lru_cache(maxsize=1 << 16)
def _advantages(
    values: tuple[float, ...], score: float, borders: tuple[int, ...], lam: float
) -> Floats:
    """Of the tokens of a response; values that are missing at the end have no estimate."""
    steps = len(borders) - 1
    padded = np.full(steps, np.nan)
    padded[: len(values)] = values
    return to_token_advantages(
        step_advantages(padded, step_rewards(score, steps), 1.0, lam), borders
    )
