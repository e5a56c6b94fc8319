"""What the estimators give in expectation, by summing over everything that can happen.

`enumerate_vine` goes through all responses and all outcomes of the rollouts with the library's own
`step_advantages` and `to_token_advantages`; the closed forms are held to it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vineppo.advantages import (
    grpo,
    rloo,
    step_advantages,
    step_rewards,
    to_token_advantages,
    whiten,
)
from vineppo.borders import token_borders
from vineppo.errors import InvalidInputError
from vineppo.exact import (
    Moments,
    critic_advantages,
    expected_gradient,
    fixed_moments,
    group_moments,
    responses,
    true_advantages,
)
from vineppo.exact_vines import enumerate_vine, token_weights, vine_moments
from vineppo.losses import ppo_clip_loss
from vineppo.segmenters import (
    FixedLengthSegmenter,
    GSM8KSegmenter,
    NewlineSegmenter,
    Segmenter,
    TokenSegmenter,
    WholeResponseSegmenter,
)
from vineppo.tasks.token_tree import TokenTree
from vineppo.values import ExactValueEstimator

Floats = npt.NDArray[np.float64]
SEGMENTERS = [TokenSegmenter(), FixedLengthSegmenter(2), WholeResponseSegmenter()]
LAMBDAS = [0.0, 0.5, 1.0]


@dataclass(frozen=True)
class CutAfter:
    """A step ends with the token 0: known as soon as it is there."""

    def segment_ids(self, ids: Sequence[int]) -> list[int]:
        return [0, *(i + 1 for i in range(len(ids) - 1) if ids[i] == 0), len(ids)]


@dataclass(frozen=True)
class CutBefore:
    """A step begins with the token 0: known only when the next token is."""

    def segment_ids(self, ids: Sequence[int]) -> list[int]:
        return [0, *(i for i in range(1, len(ids)) if ids[i] == 0), len(ids)]


@pytest.fixture(scope="module")
def tree() -> TokenTree:
    """Three tokens, horizon 4; its gradient is long enough for relative errors."""
    tree = TokenTree.random(3, 4, seed=1, success=0.3)
    assert np.linalg.norm(tree.gradient) > 0.1
    return tree


@pytest.fixture(scope="module")
def ending() -> TokenTree:
    """One with responses of different lengths, and three different rewards."""
    tree = TokenTree.random(3, 3, seed=2, end_token=2, success=None)
    return replace(tree, rewards=np.round(2 * tree.rewards) / 2)


def close(found: Floats, gradient: Floats) -> None:
    np.testing.assert_allclose(found, gradient, rtol=0, atol=1e-10)


# --- one rollout is enough -----------------------------------------------------------------------


@pytest.mark.parametrize("lam", LAMBDAS)
@pytest.mark.parametrize("segmenter", [*SEGMENTERS, CutAfter()])
def test_one_rollout_per_state_gives_the_exact_gradient(
    tree: TokenTree, ending: TokenTree, segmenter: Any, lam: float
) -> None:
    close(enumerate_vine(tree, segmenter, lam=lam).mean, tree.gradient)
    close(enumerate_vine(ending, segmenter, lam=lam).mean, ending.gradient)


@pytest.mark.parametrize("lam", LAMBDAS)
@pytest.mark.parametrize("segmenter", [*SEGMENTERS, CutAfter()])
@pytest.mark.parametrize("group", [2, 3])
def test_values_shared_by_a_group_keep_the_gradient_exact(
    segmenter: Any, lam: float, group: int
) -> None:
    tree = TokenTree.random(2, 3 if group == 2 else 2, seed=1, success=0.3)
    close(enumerate_vine(tree, segmenter, group, lam=lam, share=True).mean, tree.gradient)


def test_states_shared_by_a_group_keep_the_gradient_exact_on_three_tokens() -> None:
    tree = TokenTree.random(3, 3, seed=3, success=0.4)
    found = enumerate_vine(tree, TokenSegmenter(), 2, share=True)
    close(found.mean, tree.gradient)
    apart = enumerate_vine(tree, TokenSegmenter(), 2, share=False)
    close(apart.mean, tree.gradient)
    assert found.tokens < apart.tokens  # sharing saves rollouts,
    assert found.variance > apart.variance  # and errors that are shared do not average out


def test_all_leaves_of_all_rollouts_average_to_the_exact_gradient() -> None:
    """81 responses times 81 · 27 · 9 · 3 ends of their rollouts, all rewards different."""
    tree = TokenTree.random(3, 4, seed=5, success=None)
    every, shape = responses(tree), tree.shape
    weights, of_score = token_weights([0, 1, 2, 3, 4])
    below = [
        (shape.paths[:, depth][:, None] == np.arange(shape.nodes)[None, : shape.internal])
        for depth in range(4)
    ]
    advantages = np.zeros((81, 4))
    for leaf, path in enumerate(shape.paths):
        ends = [np.flatnonzero(below[depth][:, path[depth]]) for depth in range(4)]
        assert [len(end) for end in ends] == [81, 27, 9, 3]
        grids = np.meshgrid(*ends, indexing="ij")
        chance = np.ones(())
        for depth, grid in enumerate(grids):
            chance = chance * every.probabilities[grid] / tree.reach[path[depth]]
        assert chance.sum() == pytest.approx(1, abs=1e-12)
        values = np.stack([tree.rewards[grid] for grid in grids])
        for t in range(4):
            outcomes = np.tensordot(weights[t], values, axes=1) + of_score[t] * tree.rewards[leaf]
            advantages[leaf, t] = (chance * outcomes).sum()
        if leaf % 20 == 0:  # the linear form is what the library computes
            place = tuple(len(end) // 2 for end in ends)
            direct = step_advantages(
                values[(slice(None), *place)], step_rewards(float(tree.rewards[leaf]), 4)
            )
            np.testing.assert_allclose(
                weights @ values[(slice(None), *place)] + of_score * tree.rewards[leaf], direct,
                atol=1e-14,
            )  # fmt: skip
    close(expected_gradient(tree, advantages), tree.gradient)


def test_a_step_that_begins_with_its_mark_makes_the_gradient_biased(tree: TokenTree) -> None:
    """Whether a state is a border must not depend on the action taken in it.

    Where the mark (a newline, say) belongs to the step that it starts, a state is a border only if
    the mark follows. Its value is then taken for that of the mark having been chosen.
    """
    for lam in LAMBDAS:
        before = enumerate_vine(tree, CutBefore(), lam=lam)
        assert before.bias(tree.gradient) > 0.2
        close(before.mean, vine_moments(tree, CutBefore(), 9, lam=lam).mean)  # for any K
        assert enumerate_vine(tree, CutAfter(), lam=lam).bias(tree.gradient) < 1e-10


@dataclass(frozen=True)
class ReadAs:
    """A segmenter of text on the tokens of a tree, which are read as pieces of text."""

    segmenter: Segmenter
    pieces: tuple[str, ...]

    def decode(self, token_ids: list[int], **_options: bool) -> str:
        return "".join(self.pieces[token] for token in token_ids)

    def segment_ids(self, ids: Sequence[int]) -> list[int]:
        return token_borders(self.segmenter, ids, self)


@pytest.mark.parametrize("lam", LAMBDAS)
@pytest.mark.parametrize("pieces", [("\n", "a", "b"), ("\na", "a", "b"), ("\n\n", "a", "\nb")])
def test_lines_that_end_with_their_newline_keep_the_gradient_exact_and_those_of_gsm8k_do_not(
    tree: TokenTree, pieces: tuple[str, ...], lam: float
) -> None:
    lines = enumerate_vine(tree, ReadAs(NewlineSegmenter(), pieces), lam=lam)
    close(lines.mean, tree.gradient)
    assert lines.variance < enumerate_vine(tree, WholeResponseSegmenter(), lam=lam).variance
    reference = enumerate_vine(tree, ReadAs(GSM8KSegmenter(), pieces), lam=lam)
    assert np.abs(reference.mean - tree.gradient).max() > 1e-3
    assert reference.bias(tree.gradient) > 0.2


def test_the_bias_of_the_reference_is_small_where_it_is_certain_whether_a_newline_comes(
    tree: TokenTree,
) -> None:
    biases = []
    for shift in (-8.0, 0.0, 8.0):
        sure = tree.with_logits(tree.logits + np.array([shift, 0.0, 0.0]))
        found = enumerate_vine(sure, ReadAs(GSM8KSegmenter(), ("\n", "a", "b")))
        biases.append(found.bias(sure.gradient))
    assert biases[1] > 0.2
    assert max(biases[0], biases[2]) < 1e-3


@dataclass(frozen=True)
class OffsetsAlone:
    """Lines, without a word on whether one has ended where the text does."""

    def segment(self, text: str) -> list[int]:
        return NewlineSegmenter().segment(text)


@pytest.mark.parametrize("lam", LAMBDAS)
@pytest.mark.parametrize("pieces", [("\n", "a", ""), ("a\n", "\n", ""), ("\na", "\n\n", "")])
def test_lines_keep_the_gradient_exact_where_answers_end_behind_a_newline(
    pieces: tuple[str, ...], lam: float
) -> None:
    """The end is an action like others: the state before it is a border whichever is taken."""
    ending = TokenTree.random(3, 3, seed=1, end_token=2, success=0.3)
    assert np.linalg.norm(ending.gradient) > 0.05
    lines = enumerate_vine(ending, ReadAs(NewlineSegmenter(), pieces), lam=lam)
    close(lines.mean, ending.gradient)
    for k in (1, 9):  # where the end joins the line before it, no number of rollouts helps
        joined = vine_moments(ending, ReadAs(OffsetsAlone(), pieces), k, lam=lam)
        assert joined.bias(ending.gradient) > 0.01


@given(
    st.lists(st.sampled_from(["\n", "a", "\n\n", "a\n", "\na", " ", ""]), min_size=1, max_size=3),
    st.integers(1, 4), st.integers(0, 999), st.integers(1, 9), st.floats(0, 1),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_lines_are_unbiased_on_any_tree_with_an_end_whatever_the_tokens_read(
    pieces: list[str], horizon: int, seed: int, k: int, lam: float
) -> None:
    """Tokens without text may stand anywhere, the one that ends an answer is the last."""
    end = len(pieces)
    tree = TokenTree.random(end + 1, horizon, seed, end_token=end, success=None)
    lines = ReadAs(NewlineSegmenter(), (*pieces, ""))
    close(vine_moments(tree, lines, k, lam=lam).mean, tree.gradient)


# --- the step cap --------------------------------------------------------------------------------


@pytest.mark.parametrize("lam", LAMBDAS)
@pytest.mark.parametrize("cap", [1, 2, 3])
def test_a_step_cap_is_exact_up_to_the_step_that_crosses_it_and_silent_beyond(
    tree: TokenTree, cap: int, lam: float
) -> None:
    found = enumerate_vine(tree, TokenSegmenter(), lam=lam, max_value_steps=cap).mean
    depth = tree.shape.depths[: tree.shape.internal]
    close(found[depth < cap], tree.gradient[depth < cap])
    assert (found[depth >= cap] == 0).all()
    assert np.linalg.norm(tree.gradient[depth >= cap]) > 1e-3  # so that it is biased as a whole


def test_a_step_cap_that_no_response_reaches_changes_nothing(tree: TokenTree) -> None:
    for segmenter in SEGMENTERS:
        found = enumerate_vine(tree, segmenter, max_value_steps=4)
        close(found.mean, tree.gradient)
        assert found.variance == enumerate_vine(tree, segmenter).variance


# --- closed forms --------------------------------------------------------------------------------


def agree(found: Moments, want: Moments) -> None:
    np.testing.assert_allclose(found.mean, want.mean, atol=1e-12)
    assert found.variance == pytest.approx(want.variance, abs=1e-12)
    assert found.tokens == pytest.approx(want.tokens, abs=1e-9)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("cap", [None, 1, 2])
@pytest.mark.parametrize("segmenter", [*SEGMENTERS, CutAfter(), CutBefore()])
def test_closed_form_of_vines_equals_the_enumeration(
    ending: TokenTree, segmenter: Any, cap: int | None, share: bool
) -> None:
    small = TokenTree.random(2, 3, seed=4, success=0.4)
    for lam in LAMBDAS:
        more = {"lam": lam, "max_value_steps": cap, "share": share}
        agree(vine_moments(ending, segmenter, **more), enumerate_vine(ending, segmenter, **more))
        agree(
            vine_moments(small, segmenter, 1, 2, **more),
            enumerate_vine(small, segmenter, 2, **more),
        )


def test_closed_form_for_k_equals_one_rollout_that_is_a_mean_of_k() -> None:
    """Two rollouts on a tree of one step: every pair of leaves is one outcome."""
    tree = TokenTree.random(3, 1, seed=0, success=0.5)
    every = responses(tree)
    mean, second = np.zeros(tree.logits.shape), 0.0
    for leaf, first, other in itertools.product(range(3), repeat=3):
        chance = every.probabilities[[leaf, first, other]].prod()
        baseline = (tree.rewards[first] + tree.rewards[other]) / 2
        gradient = (tree.rewards[leaf] - baseline) * every.scores[leaf]
        mean, second = mean + chance * gradient, second + chance * (gradient**2).sum()
    agree(vine_moments(tree, TokenSegmenter(), 2), Moments(mean, second - (mean**2).sum(), 3.0))


@given(
    st.integers(2, 4), st.integers(1, 5), st.booleans(), st.integers(0, 999), st.integers(1, 9),
    st.integers(1, 8), st.sampled_from([*SEGMENTERS, CutAfter()]), st.floats(0, 1),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_vines_are_unbiased_on_any_tree_for_any_k_group_and_lambda(
    vocabulary: int, horizon: int, ends: bool, seed: int, k: int, group: int, segmenter: Any,
    lam: float,
) -> None:  # fmt: skip
    tree = TokenTree.random(vocabulary, horizon, seed, end_token=0 if ends else None, success=None)
    close(vine_moments(tree, segmenter, k, group, lam=lam).mean, tree.gradient)


@given(st.integers(0, 999), st.integers(1, 6))
@settings(max_examples=20, deadline=None)
def test_rollouts_add_variance_in_proportion_to_one_over_k(seed: int, group: int) -> None:
    tree = TokenTree.random(3, 4, seed, success=0.3)
    floor = vine_moments(tree, TokenSegmenter(), math.inf, group)
    exact = fixed_moments(tree, true_advantages(tree), group)
    agree(floor, exact)
    added = [vine_moments(tree, TokenSegmenter(), k, group).variance - exact.variance
             for k in (1, 3, 9)]  # fmt: skip
    assert added[0] > 0
    np.testing.assert_allclose(added, added[0] / np.array([1, 3, 9]), rtol=1e-9)


@pytest.mark.parametrize("advantage", [rloo, grpo, lambda r, g: grpo(r, g, scale=False)])
@pytest.mark.parametrize("group", [2, 3])
def test_closed_form_of_groups_equals_the_enumeration(
    ending: TokenTree, advantage: Callable[..., Floats], group: int
) -> None:
    every = responses(ending)
    sums = np.zeros((ending.shape.leaves, *ending.logits.shape))
    for leaf, column in np.argwhere(every.mask):
        sums[leaf, every.nodes[leaf, column]] += every.scores[leaf, column]
    mean, second = np.zeros(ending.logits.shape), 0.0
    for members in itertools.product(range(ending.shape.leaves), repeat=group):
        weights = advantage(every.rewards[list(members)], np.zeros(group, dtype=np.int64))
        estimate = np.tensordot(weights, sums[list(members)], axes=1) / group
        chance = every.probabilities[list(members)].prod()
        mean, second = mean + chance * estimate, second + chance * (estimate**2).sum()
    tokens = group * float(ending.remaining[0])
    agree(
        group_moments(ending, group, advantage),
        Moments(mean, second - float((mean**2).sum()), tokens),
    )


def test_groups_with_too_many_different_rewards_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="rewards"):
        group_moments(TokenTree.random(3, 4, success=None), 8, rloo)


# --- what biases ---------------------------------------------------------------------------------


def test_a_biased_critic_biases_below_lambda_one_and_not_at_one(tree: TokenTree) -> None:
    critic = tree.values + 0.1 * np.random.default_rng(0).standard_normal(tree.shape.nodes)
    biases = [
        fixed_moments(tree, critic_advantages(tree, critic, lam)).bias(tree.gradient)
        for lam in (0.0, 0.5, 0.95, 1.0)
    ]
    assert biases[0] > 0.15  # of the gradient's length
    assert biases[0] > biases[1] > biases[2] > 1e-3
    assert biases[3] < 1e-10
    apart = expected_gradient(tree, critic_advantages(tree, critic, 0.0)) - tree.gradient
    assert np.abs(apart).max() > 1e-3
    close(expected_gradient(tree, critic_advantages(tree, critic, 1.0)), tree.gradient)


def test_a_right_critic_is_unbiased_for_every_lambda(ending: TokenTree) -> None:
    for lam in LAMBDAS:
        advantages = critic_advantages(ending, ending.values, lam)
        close(expected_gradient(ending, advantages), ending.gradient)


def test_rloo_is_unbiased_and_grpo_is_not(tree: TokenTree, ending: TokenTree) -> None:
    for one in (tree, ending):
        close(group_moments(one, 4, rloo).mean, one.gradient)
    # With rewards 0 and 1, dividing by the standard deviation changes the length alone,
    # differently for every prompt; with graded rewards the direction too.
    scaled = group_moments(tree, 4, grpo)
    assert scaled.bias(tree.gradient) > 0.1
    assert scaled.cosine(tree.gradient) > 1 - 1e-12
    turned = group_moments(ending, 4, grpo)
    assert turned.bias(ending.gradient) > 0.1
    assert 1 - turned.cosine(ending.gradient) > 1e-6
    # A mean over the group holds the response's own reward, which shrinks the gradient by 1 / G.
    centred = group_moments(tree, 4, lambda r, g: grpo(r, g, scale=False))
    close(centred.mean, 0.75 * tree.gradient)


def test_whitening_biases_more_than_the_length() -> None:
    """Every pair of responses as one batch, with exact advantages before whitening."""
    tree = TokenTree.random(2, 3, seed=1, success=0.4)
    every, exact = responses(tree), true_advantages(tree)
    gradients = {}
    for mode in ("batch", "std", None):
        mean = np.zeros(tree.logits.shape)
        for pair in itertools.product(range(tree.shape.leaves), repeat=2):
            mask = torch.from_numpy(every.mask[list(pair)])
            found = whiten(torch.from_numpy(exact[list(pair)]), mask, mode).numpy()
            parts = found[..., None] * every.scores[list(pair)] / 2
            chance = every.probabilities[list(pair)].prod()
            np.add.at(mean, every.nodes[list(pair)], chance * parts)
        gradients[mode] = Moments(mean, 0.0, 0.0)
    close(gradients[None].mean, tree.gradient)
    for mode in ("batch", "std"):
        assert 1 - gradients[mode].cosine(tree.gradient) > 1e-3


def surrogate(
    tree: TokenTree, logits: Floats, advantages: Floats, clip_range: float, reduction: Any
) -> Floats:
    """Minus the expected gradient of the library's loss over all responses of the old policy.

    The loss is linear in the size of the advantages, so probabilities go into them.
    """
    every = responses(tree)
    learner = torch.tensor(logits, requires_grad=True)
    ids = [episode.response_ids for episode, _, _ in tree.episodes()]
    weighted = torch.from_numpy(every.probabilities[:, None] * advantages)
    mask = torch.from_numpy(every.mask)
    old = tree.token_logprobs(torch.tensor(tree.logits), ids)
    new = tree.token_logprobs(learner, ids)
    loss = ppo_clip_loss(
        new, old, weighted, mask, clip_range, reduction=reduction, denominator=1.0
    ).loss
    loss.backward()
    assert learner.grad is not None
    found: Floats = -learner.grad.numpy()
    return found


def test_first_step_of_the_clipped_loss_follows_the_exact_gradient(
    tree: TokenTree, ending: TokenTree
) -> None:
    for one in (tree, ending):
        found = surrogate(one, one.logits, true_advantages(one), 0.2, "sequence_sum")
        close(found, one.gradient)


def test_clipping_biases_once_the_policy_has_moved(tree: TokenTree) -> None:
    exact = true_advantages(tree)
    moved = tree.logits + 20 * tree.gradient
    loose = surrogate(tree, moved, exact, 1e6, "sequence_sum")
    clipped = surrogate(tree, moved, exact, 0.2, "sequence_sum")
    assert np.linalg.norm(clipped - loose) / np.linalg.norm(loose) > 0.05
    close(surrogate(tree, tree.logits, exact, 1e-3, "sequence_sum"), tree.gradient)


def test_a_mean_over_the_tokens_of_each_response_biases_where_lengths_differ(
    tree: TokenTree, ending: TokenTree
) -> None:
    same = surrogate(tree, tree.logits, true_advantages(tree), 0.2, "sequence")
    close(4 * same, tree.gradient)
    found = surrogate(ending, ending.logits, true_advantages(ending), 0.2, "sequence")
    assert 1 - Moments(found, 0.0, 0.0).cosine(ending.gradient) > 1e-3


# --- limits --------------------------------------------------------------------------------------


def test_exact_values_and_token_steps_give_the_exact_advantage(ending: TokenTree) -> None:
    values, exact = ExactValueEstimator(ending), true_advantages(ending)
    for leaf, (episode, _, reward) in enumerate(ending.episodes()):
        borders = TokenSegmenter().segment_ids(episode.response_ids)
        nodes = ending.shape.paths[leaf, borders[:-1]]
        found = step_advantages(
            values([ending.state(int(node)) for node in nodes]).values,
            step_rewards(reward, len(nodes)),
        )
        np.testing.assert_allclose(
            to_token_advantages(found, borders), exact[leaf, : len(nodes)], atol=1e-14
        )


@given(st.lists(st.floats(0, 1), min_size=2, max_size=8))
def test_one_segment_with_the_value_of_the_other_members_is_rloo(rewards: list[float]) -> None:
    found = []
    for own, reward in enumerate(rewards):
        others = [r for i, r in enumerate(rewards) if i != own]
        found += step_advantages([sum(others) / len(others)], [reward]).tolist()
    np.testing.assert_allclose(found, rloo(rewards, [0] * len(rewards)), atol=1e-12)


@pytest.mark.parametrize("segmenter", SEGMENTERS)
@pytest.mark.parametrize("group", [2, 3])
def test_a_response_must_not_be_among_the_rollouts_of_its_own_prompt(
    segmenter: Any, group: int
) -> None:
    """V(s_0) from the rewards of the group itself: without the own one exact, with it 1/G short."""
    tree = TokenTree.random(2, 3 if group == 2 else 2, seed=1, success=0.3)
    every = responses(tree)
    fresh, own = np.zeros(tree.logits.shape), np.zeros(tree.logits.shape)
    steps = [segmenter.segment_ids(row) for row in tree.shape.tokens.tolist()]
    for members in itertools.product(range(tree.shape.leaves), repeat=group):
        rewards = every.rewards[list(members)]
        chance = every.probabilities[list(members)].prod()
        for j, leaf in enumerate(members):
            borders = steps[leaf]
            values = tree.values[tree.shape.paths[leaf, borders[:-1]]]
            for total, mean in ((fresh, np.delete(rewards, j).mean()), (own, rewards.mean())):
                values[0] = mean
                found = to_token_advantages(
                    step_advantages(values, step_rewards(rewards[j], len(values))), borders
                )
                np.add.at(
                    total, every.nodes[leaf], chance * found[:, None] * every.scores[leaf] / group
                )
    close(fresh, tree.gradient)
    # The own reward is a baseline that knows the actions of the first step, and takes its share.
    first = tree.shape.depths[: tree.shape.internal] < steps[0][1]
    close(own[first], (1 - 1 / group) * tree.gradient[first])
    close(own[~first], tree.gradient[~first])


def test_only_the_step_that_matters_has_an_advantage_and_rloo_gives_it_to_all() -> None:
    tree = TokenTree.one_action_matters(3, 4, position=1)
    exact = true_advantages(tree)
    assert np.abs(exact[:, [0, 2, 3]]).max() < 1e-12
    assert np.abs(exact[:, 1]).min() > 0.1
    group = rloo(tree.rewards, np.zeros(81, dtype=np.int64))
    assert (np.abs(np.broadcast_to(group[:, None], (81, 4))) > 0.1).all()
    # And so RLOO pays with variance in three steps for nothing.
    vine = vine_moments(tree, TokenSegmenter(), math.inf, 8)
    assert group_moments(tree, 8, rloo).variance > 3 * vine.variance


# --- how precise K rollouts are ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("p", "errors"),
    [(0.5, (0.5, 0.25, 0.1367)), (0.1, (0.18, 0.1458, 0.0775)), (0.0, (0, 0, 0)), (1.0, (0, 0, 0))],
)
def test_error_of_k_rollouts(p: float, errors: tuple[float, ...]) -> None:
    """Variance and mean absolute error over all 2^K outcomes of a tree of one step."""
    tree = TokenTree.random(2, 1)
    if 0 < p < 1:
        tree = tree.with_logits([[math.log(p), math.log(1 - p)]])
        tree = replace(tree, rewards=np.array([1.0, 0.0]))
    else:
        tree = replace(tree, rewards=np.array([p, p]))
    assert tree.values[0] == pytest.approx(p, abs=1e-15)
    for k, error in zip((1, 3, 9), errors, strict=True):
        outcomes = np.array(list(itertools.product((0, 1), repeat=k)))
        chances = tree.probabilities[0][outcomes].prod(axis=1)
        values = tree.rewards[outcomes].mean(axis=1)
        variance = chances @ (values - p) ** 2
        assert variance == pytest.approx(p * (1 - p) / k, abs=1e-12)
        assert variance == pytest.approx(tree.variances[0] / k, abs=1e-12)
        assert chances @ np.abs(values - p) == pytest.approx(error, abs=5e-5)
        by_count = sum(
            math.comb(k, n) * p**n * (1 - p) ** (k - n) * abs(n / k - p) for n in range(k + 1)
        )
        assert chances @ np.abs(values - p) == pytest.approx(by_count, abs=1e-12)
