from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vineppo.episodes import Episode
from vineppo.errors import InvalidInputError
from vineppo.tasks.token_tree import TokenTree, TreeShape

SHAPES = [(2, 1, None), (3, 4, None), (2, 6, None), (3, 4, 2), (2, 5, 0), (4, 3, 1)]


def drawn(vocabulary: int, horizon: int, end: int | None, seed: int = 0, **more: Any) -> TokenTree:
    return TokenTree.random(vocabulary, horizon, seed, end_token=end, **more)


@st.composite
def trees(draw: Any) -> TokenTree:
    vocabulary = draw(st.integers(2, 4))
    end = draw(st.none() | st.integers(0, vocabulary - 1))
    success = draw(st.none() | st.floats(0, 1))
    seed, scale = draw(st.integers(0, 99)), draw(st.floats(0.1, 3))
    return drawn(vocabulary, draw(st.integers(1, 4)), end, seed, scale=scale, success=success)


def recursive(tree: TokenTree, response: tuple[int, ...] = ()) -> tuple[float, float, float]:
    """V, E[R²] and expected length from a state on, by the definition."""
    node = tree.node(response)
    if node >= tree.shape.internal:
        reward = tree.score([Episode(0, tree.prompt_ids, response, finished=True)])[0]
        return reward, reward**2, 0.0
    weights = np.exp(tree.logits[node]) / np.exp(tree.logits[node]).sum()
    below = [recursive(tree, (*response, a)) for a in range(tree.shape.vocabulary)]
    value, square, length = (float(np.dot(weights, column)) for column in zip(*below, strict=True))
    return value, square, 1 + length


# --- the shape ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("vocabulary", "horizon", "end"), SHAPES)
def test_every_response_is_a_path_to_a_leaf_of_its_own(
    vocabulary: int, horizon: int, end: int | None
) -> None:
    tree = drawn(vocabulary, horizon, end)
    found = [episode.response_ids for episode, _, _ in tree.episodes()]

    def walk(response: tuple[int, ...]) -> list[tuple[int, ...]]:
        if len(response) == horizon or (response and response[-1] == end):
            return [response]
        return [leaf for a in range(vocabulary) for leaf in walk((*response, a))]

    assert sorted(found) == sorted(walk(()))
    first = tree.shape.internal
    assert [tree.node(ids) for ids in found] == list(range(first, tree.shape.nodes))
    assert [tree.node(tree.state(n).response_ids) for n in range(first)] == list(range(first))
    assert [len(ids) for ids in found] == tree.shape.depths[first:].tolist()


@given(trees())
@settings(max_examples=30, deadline=None)
def test_nodes_are_numbered_by_depth_and_levels_hold_all_of_them(tree: TokenTree) -> None:
    shape = tree.shape
    levels = [list(range(level.start, level.stop)) for level in shape.levels]
    assert [node for level in levels for node in level] == list(range(shape.internal))
    for depth, level in enumerate(levels):
        assert set(shape.depths[level]) == {depth}
    assert (np.diff(shape.depths[shape.internal :]) >= 0).all()
    rows = np.arange(shape.internal)[:, None]
    assert (shape.parents[shape.children] == rows).all()
    assert shape.parents[0] == -1


# --- what follows from the policy -----------------------------------------------------------------


@given(trees())
@settings(max_examples=30, deadline=None)
def test_dynamic_programming_equals_the_recursive_definition(tree: TokenTree) -> None:
    for node in range(tree.shape.internal):
        value, square, length = recursive(tree, tree.state(node).response_ids)
        assert tree.values[node] == pytest.approx(value, abs=1e-12)
        assert tree.variances[node] == pytest.approx(square - value**2, abs=1e-12)
        assert tree.remaining[node] == pytest.approx(length, abs=1e-12)
        assert tree.value(tree.state(node).response_ids) == tree.values[node]


@given(trees())
@settings(max_examples=30, deadline=None)
def test_gradient_is_that_of_the_expected_reward(tree: TokenTree) -> None:
    logits = torch.tensor(tree.logits, requires_grad=True)
    every = list(tree.episodes())
    logprobs = tree.token_logprobs(logits, [episode.response_ids for episode, _, _ in every])
    chances = logprobs.sum(dim=1).exp()
    expected = (chances * torch.tensor(tree.rewards)).sum()
    expected.backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    np.testing.assert_allclose(tree.gradient, logits.grad.numpy(), atol=1e-12)
    np.testing.assert_allclose(chances.detach().numpy(), [p for _, p, _ in every], atol=1e-12)
    assert sum(p for _, p, _ in every) == pytest.approx(1, abs=1e-12)
    assert expected.item() == pytest.approx(tree.values[0], abs=1e-12)


@given(trees())
@settings(max_examples=20, deadline=None)
def test_advantages_average_to_zero_and_reach_counts_visits(tree: TokenTree) -> None:
    np.testing.assert_allclose((tree.probabilities * tree.advantages).sum(axis=1), 0, atol=1e-12)
    visits = np.zeros(tree.shape.nodes)
    for episode, chance, _ in tree.episodes():
        for length in range(len(episode.response_ids) + 1):
            visits[tree.node(episode.response_ids[:length])] += chance
    np.testing.assert_allclose(tree.reach, visits, atol=1e-12)


@pytest.mark.parametrize("position", range(4))
def test_where_one_action_matters_all_others_have_no_advantage(position: int) -> None:
    tree = TokenTree.one_action_matters(3, 4, position)
    size = np.abs(tree.advantages).max(axis=1)
    there = tree.shape.depths[: tree.shape.internal] == position
    assert size[~there].max(initial=0.0) < 1e-12
    assert size[there].min() > 0.1


@pytest.mark.parametrize("success", [0.0, 0.1, 0.5, 1.0])
def test_share_of_right_leaves_is_as_asked_but_never_none_or_all(success: float) -> None:
    tree = drawn(3, 4, None, success=success)
    assert set(tree.rewards) == {0.0, 1.0}
    assert tree.rewards.sum() == min(max(round(81 * success), 1), 80)


def test_graded_rewards_spread_over_the_whole_range() -> None:
    tree = drawn(3, 3, None, success=None)
    np.testing.assert_allclose(sorted(tree.rewards), np.linspace(0, 1, 27))


def test_neighbouring_leaves_are_more_alike_than_distant_ones() -> None:
    rewards = np.stack([drawn(3, 4, None, seed, success=None).rewards for seed in range(30)])
    by_parent = rewards.reshape(30, 27, 3)
    assert by_parent.var(axis=2).mean() < 0.6 * rewards.var(axis=1).mean()


def test_another_policy_has_other_values_and_the_same_rewards() -> None:
    tree = drawn(3, 3, None)
    other = tree.with_logits(np.zeros_like(tree.logits))
    assert (other.rewards == tree.rewards).all()
    assert other.values[0] == pytest.approx(tree.rewards.mean())
    with pytest.raises(ValueError, match="read-only"):
        tree.logits[0, 0] = 1.0


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: TreeShape(1, 3), "vocabulary"),
        (lambda: TreeShape(3, 0), "horizon"),
        (lambda: TreeShape(3, 3, 3), "end_token"),
        (lambda: TreeShape(4, 12), "horizon"),
        (lambda: TokenTree.random(scale=0), "scale"),
        (lambda: TokenTree.random(success=1.5), "success"),
        (lambda: TokenTree.one_action_matters(3, 4, 4), "position"),
        (lambda: TokenTree(TreeShape(2, 1), np.zeros((1, 3)), np.zeros(2)), "logits"),
        (lambda: TokenTree(TreeShape(2, 1), np.full((1, 2), np.nan), np.zeros(2)), "logits"),
        (lambda: TokenTree(TreeShape(2, 1), np.zeros((1, 2)), np.array([0.0, 1.1])), "rewards"),
        (lambda: TokenTree(TreeShape(2, 1), np.zeros((1, 2)), np.array([0, np.nan])), "rewards"),
        (lambda: drawn(3, 2, None).node((0, 3)), "response_ids"),
        (lambda: drawn(3, 2, None).node((0, 1, 1)), "response_ids"),
        (lambda: drawn(3, 2, 0).value((0, 1)), "response_ids"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(make: Any, named: str) -> None:
    with pytest.raises(InvalidInputError, match=named):
        make()


def test_a_response_that_was_cut_scores_zero() -> None:
    tree = drawn(3, 3, None, success=None)
    whole = tree.episode(tree.shape.leaves - 1)
    cut = dataclasses.replace(whole, response_ids=whole.response_ids[:-1], finished=False)
    assert tree.score([whole, cut]) == [tree.rewards[-1], 0.0]


# --- the backend ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def params() -> Any:
    sampling = pytest.importorskip("decapod.lm").SamplingParams
    return lambda **given: sampling(**{"max_new_tokens": 8, **given})


def test_samples_have_the_probabilities_of_the_tree(params: Any) -> None:
    tree = drawn(3, 3, 2, 4)
    count = 20_000
    (rollouts,) = tree.backend().generate([tree.prompt_ids], count, params(), [5])
    seen = Counter(r.token_ids for r in rollouts)
    for episode, chance, _ in tree.episodes():
        error = abs(seen[episode.response_ids] / count - chance)
        assert error < 4.5 * np.sqrt(chance * (1 - chance) / count)
    assert all(r.finished for r in rollouts)


def test_a_sample_depends_on_ids_seed_and_number_alone(params: Any) -> None:
    tree = drawn(3, 4, 0, 1)
    root = tree.prompt_ids
    prompts = [root, (*root, 1), (*root, 2), root]
    together = tree.backend().generate(prompts, [9, 2, 4, 3], params(), [7, 7, 8, 7])
    for prompt, seed, found in zip(prompts, [7, 7, 8, 7], together, strict=True):
        (alone,) = tree.backend().generate([prompt], 12, params(), [seed])
        assert alone[: len(found)] == found
    (other,) = tree.backend().generate([root], 9, params(), [8])
    assert other != together[0]


def test_log_probabilities_are_of_the_model_or_of_the_sampler(params: Any) -> None:
    tree = drawn(3, 4, None, 1)
    backend = tree.backend()
    for temperature, of, logits in [
        (1.0, "model", tree.logits),
        (0.5, "model", tree.logits),
        (0.5, "sampler", tree.logits / 0.5),
    ]:
        asked = params(temperature=temperature, logprobs_of=of)
        (rollouts,) = backend.generate([tree.prompt_ids], 5, asked, [3])
        want = tree.token_logprobs(torch.tensor(logits), [r.token_ids for r in rollouts])
        np.testing.assert_allclose([r.logprobs for r in rollouts], want.numpy(), atol=1e-12)


def test_rollouts_stop_at_the_limit_and_at_stop_tokens(params: Any) -> None:
    tree = drawn(3, 4, None, 1)
    (cut,) = tree.backend().generate([tree.prompt_ids], 50, params(max_new_tokens=2), [3])
    assert {(len(r.token_ids), r.finished) for r in cut} == {(2, False)}
    (whole,) = tree.backend().generate([tree.prompt_ids], 50, params(), [3])
    (stopped,) = tree.backend().generate([tree.prompt_ids], 50, params(stop_token_ids=(1,)), [3])
    for before, after in zip(whole, stopped, strict=True):
        ids = before.token_ids
        assert after.token_ids == (ids[: ids.index(1) + 1] if 1 in ids else ids)
        assert after.finished


def test_greedy_takes_the_most_probable_and_cuts_keep_the_most_probable(params: Any) -> None:
    tree = drawn(4, 2, None, 1)
    ranks = (-tree.logits[0]).argsort()

    def first(**given: Any) -> set[int]:
        (found,) = tree.backend().generate([tree.prompt_ids], 2000, params(**given), [0])
        return {r.token_ids[0] for r in found}

    shares = np.sort(tree.probabilities[0])[::-1].cumsum()
    assert first(temperature=0.0) == {ranks[0]}
    assert first(top_k=2) == set(ranks[:2])
    assert first(top_p=float(shares[1] + shares[2]) / 2) == set(ranks[:3])
    assert first(top_p=float(shares[0]) / 2) == {ranks[0]}
    assert first() == set(ranks)


def test_new_weights_are_sampled_from(params: Any) -> None:
    tree = drawn(2, 1, None)
    backend = tree.backend()
    for sure in (0, 1):
        backend.load_weights(tree.with_logits(np.where(np.arange(2) == sure, 50.0, 0.0)[None]))
        (rollouts,) = backend.generate([tree.prompt_ids], 20, params(), [0])
        assert {r.token_ids for r in rollouts} == {(sure,)}


def test_usage_counts_tokens_and_requests(params: Any) -> None:
    tree = drawn(3, 4, None)
    backend = tree.backend()
    before = backend.usage
    backend.generate([tree.prompt_ids, (*tree.prompt_ids, 1, 1)], [2, 3], params(), [0, 1])
    done = backend.usage - before
    assert (done.generated_tokens, done.prompt_tokens, done.requests) == (2 * 4 + 3 * 2, 11, 5)
    assert done.reused_tokens == 6
    assert done.seconds > 0


def test_prompts_that_are_no_open_state_are_refused_before_anything_is_drawn(params: Any) -> None:
    tree = drawn(3, 2, 0)
    root = tree.prompt_ids
    backend = tree.backend()
    for prompts, named in [
        ([root, (1,)], r"prompts\[1\].*root"),
        ([root, (*root, 0)], r"prompts\[1\].*leaf"),
        ([root, (*root, 5)], "response_ids"),
        ([root, ()], r"prompts\[1\]"),
    ]:
        with pytest.raises(InvalidInputError, match=named):
            backend.generate(prompts, 2, params(), [0, 1])
    with pytest.raises(InvalidInputError, match="seeds"):
        backend.generate([root], 2, params(), [-1])
    with pytest.raises(InvalidInputError, match="stop"):
        backend.generate([root], 2, params(stop=("x",)), [1])
    assert backend.usage.requests == 0
