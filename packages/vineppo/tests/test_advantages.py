from __future__ import annotations

import itertools
import math
import threading
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vineppo import advantages
from vineppo.errors import InvalidInputError, NotFiniteError

NAN = math.nan
unit = st.floats(0, 1)
number = st.floats(-5, 5)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_mask(seed: int, rows: int, columns: int, *, holes: bool = False) -> Tensor:
    """Answers of length 0 to T, one full; with holes, any places."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, columns + 1, (rows,), generator=g)
    lengths[0] = columns
    mask = torch.arange(columns) < lengths[:, None]
    return mask & (torch.rand(rows, columns, generator=g) < 0.6) if holes else mask


def naive_gae(values: list[float], rewards: list[float], gamma: float, lam: float) -> list[float]:
    """The double sum of the definition."""
    v = [*values, 0.0]
    deltas = [rewards[t] + gamma * v[t + 1] - v[t] for t in range(len(rewards))]
    return [
        math.fsum((gamma * lam) ** (s - t) * deltas[s] for s in range(t, len(deltas)))
        for t in range(len(deltas))
    ]


# --- steps ---------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(values=st.lists(unit, min_size=1, max_size=9), score=number)
def test_step_advantages_telescope_to_score_minus_first_value(
    values: list[float], score: float
) -> None:
    found = advantages.step_advantages(values, advantages.step_rewards(score, len(values)))
    assert found.sum() == pytest.approx(score - values[0], abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(values=st.lists(unit, min_size=1, max_size=9), score=number, data=st.data())
def test_step_advantages_telescope_with_a_cap_and_only_the_step_before_it_bears_the_rest(
    values: list[float], score: float, data: st.DataObject
) -> None:
    cap = data.draw(st.integers(1, len(values)))
    capped = np.array(values)
    capped[cap:] = NAN
    rewards = advantages.step_rewards(score, len(values))
    found = advantages.step_advantages(capped, rewards)
    assert found.sum() == pytest.approx(score - values[0], abs=1e-12)
    assert found[cap - 1] == pytest.approx(score - values[cap - 1], abs=1e-12)
    assert (found[cap:] == 0.0).all()
    # The steps before the cap know nothing of it.
    whole = advantages.step_advantages(values, rewards)
    np.testing.assert_array_equal(found[: cap - 1], whole[: cap - 1])


def test_step_advantages_are_equation_6_by_hand() -> None:
    values = [0.5, 0.75, 0.25]
    np.testing.assert_allclose(
        advantages.step_advantages(values, [0.0, 0.0, 1.0]), [0.25, -0.5, 0.75]
    )
    # With a discount, a penalty on the way, and no estimate of the last state:
    # V_2 = 1, A_1 = -0.1 + 0.5 * 1 - 0.75, A_0 = 0.5 * 0.75 - 0.5.
    np.testing.assert_allclose(
        advantages.step_advantages([0.5, 0.75, NAN], [0.0, -0.1, 1.0], gamma=0.5),
        [-0.125, -0.35, 0.0],
    )


def test_without_any_estimate_no_step_is_credited() -> None:
    rewards = advantages.step_rewards(1.0, 4)
    for lam in (0.0, 0.5, 1.0):
        found = advantages.step_advantages([NAN] * 4, rewards, gamma=0.9, lam=lam)
        assert found.tolist() == [0.0] * 4


def test_a_first_state_without_estimate_takes_the_value_of_what_follows() -> None:
    found = advantages.step_advantages([NAN, 0.25, NAN], [0.0, 0.0, 1.0])
    np.testing.assert_allclose(found, [0.0, 0.75, 0.0])


def test_the_input_of_step_advantages_is_left_as_it_was() -> None:
    values = np.array([0.5, NAN])
    advantages.step_advantages(values, np.array([0.0, 1.0]))
    assert np.isnan(values[1])


@settings(max_examples=60, deadline=None)
@given(values=st.lists(unit, min_size=1, max_size=7), score=number, gamma=unit, lam=unit)
def test_step_advantages_are_the_double_sum_of_gae(
    values: list[float], score: float, gamma: float, lam: float
) -> None:
    rewards = advantages.step_rewards(score, len(values))
    np.testing.assert_allclose(
        advantages.step_advantages(values, rewards, gamma, lam),
        naive_gae(values, rewards.tolist(), gamma, lam),
        atol=1e-12,
    )


@settings(max_examples=60, deadline=None)
@given(values=st.lists(unit, min_size=1, max_size=7), score=number)
def test_lambda_1_gives_return_minus_value_at_every_step(values: list[float], score: float) -> None:
    found = advantages.step_advantages(values, advantages.step_rewards(score, len(values)), lam=1.0)
    np.testing.assert_allclose(found, score - np.array(values), atol=1e-12)


def test_one_step_with_the_mean_of_the_others_as_value_is_rloo() -> None:
    scores = np.array([1.0, 0.0, 0.0, 1.0, 1.0])
    by_steps = [
        advantages.step_advantages(
            [np.delete(scores, i).mean()], advantages.step_rewards(score, 1)
        )[0]
        for i, score in enumerate(scores)
    ]
    np.testing.assert_allclose(by_steps, advantages.rloo(scores, np.zeros(5, int)), atol=1e-15)


@pytest.mark.parametrize(
    ("values", "rewards", "name"),
    [
        ([], [], "values, rewards"),
        ([0.1, 0.2], [1.0], "values, rewards"),
        ([[0.1]], [[1.0]], "values, rewards"),
        ([0.1, math.inf], [0.0, 1.0], "values: .*inf at 1"),
        ([0.1, 0.2], [0.0, NAN], "rewards: .*nan at 1"),
    ],
)
def test_step_advantages_refuse_what_does_not_fit(values: Any, rewards: Any, name: str) -> None:
    with pytest.raises(InvalidInputError, match=name):
        advantages.step_advantages(values, rewards)


@pytest.mark.parametrize(("gamma", "lam", "name"), [(1.1, 0.0, "gamma"), (1.0, -0.1, "lam")])
def test_discounts_outside_0_to_1_are_refused(gamma: float, lam: float, name: str) -> None:
    with pytest.raises(InvalidInputError, match=name):
        advantages.step_advantages([0.5], [1.0], gamma, lam)
    x, mask = torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool)
    with pytest.raises(InvalidInputError, match=name):
        advantages.gae(x, x, mask, gamma, lam)


def test_step_rewards_stand_at_the_last_step_and_refuse_empty_answers() -> None:
    assert advantages.step_rewards(0.5, 3).tolist() == [0.0, 0.0, 0.5]
    with pytest.raises(InvalidInputError, match=r"steps: .*empty answer"):
        advantages.step_rewards(1.0, 0)
    with pytest.raises(InvalidInputError, match="score"):
        advantages.step_rewards(NAN, 2)


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_all_tokens_of_a_step_share_its_advantage(lengths: list[int]) -> None:
    borders = [0, *itertools.accumulate(lengths)]
    steps = [float(i) for i in range(len(lengths))]
    expected = [a for a, n in zip(steps, lengths, strict=True) for _ in range(n)]
    assert advantages.to_token_advantages(steps, borders).tolist() == expected


@pytest.mark.parametrize(
    "borders", [[0, 2], [0, 2, 2], [1, 2, 3], [0, 3, 2], [0.0, 1.0, 2.0], [[0, 1, 2]]]
)
def test_borders_that_are_not_a_partition_are_refused(borders: Any) -> None:
    with pytest.raises(InvalidInputError, match="borders"):
        advantages.to_token_advantages([0.1, 0.2], borders)


# --- tokens --------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), gamma=unit, lam=unit, holes=st.booleans())
def test_gae_is_the_double_sum_over_the_tokens_of_each_answer(
    seed: int, gamma: float, lam: float, holes: bool
) -> None:
    mask = random_mask(seed, 4, 6, holes=holes)
    values, rewards = normal(seed, 4, 6), normal(seed + 1, 4, 6)
    spoilt = torch.where(mask, 1.0, torch.nan)  # outside the mask anything may stand
    found = advantages.gae(values * spoilt, rewards * spoilt, mask, gamma, lam)
    expected = torch.zeros_like(values)
    for row, places in enumerate(mask):
        expected[row, places] = torch.tensor(
            naive_gae(values[row, places].tolist(), rewards[row, places].tolist(), gamma, lam),
            dtype=torch.float64,
        )
    torch.testing.assert_close(found.advantages, expected, rtol=0, atol=1e-12)
    returns = torch.where(mask, expected + values, 0.0)
    torch.testing.assert_close(found.returns, returns, rtol=0, atol=1e-12)


def test_gae_with_the_papers_settings_is_return_minus_value_also_for_an_answer_cut_by_length() -> (
    None
):
    mask = random_mask(3, 4, 6)
    values, rewards = normal(3, 4, 6), torch.zeros(4, 6, dtype=torch.float64)
    scores = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    lengths = mask.sum(1)
    for row, length in enumerate(lengths.tolist()):
        if length:
            rewards[row, length - 1] = scores[row]
    found = advantages.gae(values, rewards, mask)
    expected = torch.where(mask, scores[:, None] - values, 0.0)
    torch.testing.assert_close(found.advantages, expected, rtol=0, atol=1e-12)
    # The row of full length is one that was cut: nothing is bootstrapped from its last value.
    longer = torch.nn.functional.pad(values, (0, 1), value=9.0)
    padded = advantages.gae(
        longer, torch.nn.functional.pad(rewards, (0, 1)), torch.nn.functional.pad(mask, (0, 1))
    )
    torch.testing.assert_close(padded.advantages[:, :-1], found.advantages, rtol=0, atol=0)


def test_gae_on_one_token_per_step_equals_step_advantages() -> None:
    values, rewards = normal(7, 1, 5), normal(8, 1, 5)
    found = advantages.gae(values, rewards, torch.ones(1, 5, dtype=torch.bool), 0.9, 0.7)
    steps = advantages.step_advantages(values[0].numpy(), rewards[0].numpy(), 0.9, 0.7)
    np.testing.assert_allclose(found.advantages[0].numpy(), steps, atol=1e-13)


def test_gae_gives_no_gradient_and_keeps_its_precision() -> None:
    values = torch.zeros(1, 2, requires_grad=True)
    found = advantages.gae(values, torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool))
    assert not found.advantages.requires_grad
    assert found.advantages.dtype == torch.float32


def test_gae_names_what_is_not_finite_or_does_not_fit() -> None:
    mask = torch.tensor([[True, True, False]])
    good, bad = torch.zeros(1, 3), torch.tensor([[0.0, NAN, 0.0]])
    with pytest.raises(NotFiniteError, match=r"values: .*nan at \(0, 1\) and 1 such"):
        advantages.gae(bad, good, mask)
    with pytest.raises(NotFiniteError, match="rewards"):
        advantages.gae(good, bad, mask)
    with pytest.raises(InvalidInputError, match=r"rewards: .*\(1, 3\), got \(1, 2\)"):
        advantages.gae(good, good[:, :2], mask)
    with pytest.raises(InvalidInputError, match=r"mask: .*bool, got .*int64"):
        advantages.gae(good, good, mask.long())


# --- groups --------------------------------------------------------------------------------------


def shuffled_groups(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    groups = np.repeat(rng.permutation(50)[:4] - 20, rng.integers(2, 6, 4))
    rng.shuffle(groups)
    return rng.normal(size=len(groups)) + 3.0, groups


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_rloo_is_the_reward_less_the_mean_of_the_others_and_sums_to_zero(seed: int) -> None:
    rewards, groups = shuffled_groups(seed)
    found = advantages.rloo(rewards, groups)
    n = range(len(rewards))
    expected = [
        rewards[i] - np.mean([rewards[j] for j in n if j != i and groups[j] == groups[i]])
        for i in n
    ]
    np.testing.assert_allclose(found, expected, atol=1e-12)
    for group in set(groups.tolist()):
        assert found[groups == group].sum() == pytest.approx(0.0, abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), scale=st.booleans())
def test_grpo_is_the_standard_score_in_the_group(seed: int, scale: bool) -> None:
    rewards, groups = shuffled_groups(seed)
    found = advantages.grpo(rewards, groups, eps=1e-3, scale=scale)
    for group in set(groups.tolist()):
        x = rewards[groups == group]
        expected = x - x.mean()
        if scale:
            expected = expected / (np.std(x, ddof=1) + 1e-3)
        np.testing.assert_allclose(found[groups == group], expected, atol=1e-12)


@pytest.mark.parametrize("eps", [0.0, 1e-4])
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 1e9 + 0.1])
def test_a_group_of_equal_rewards_gets_exact_zeros(reward: float, eps: float) -> None:
    rewards = [reward] * 3 + [0.0, 1.0]
    groups = [7, 7, 7, 2, 2]
    for found in (advantages.grpo(rewards, groups, eps), advantages.rloo(rewards, groups)):
        assert found[:3].tolist() == [0.0] * 3
        assert found[4] > 0 > found[3]


@pytest.mark.parametrize("method", [advantages.rloo, advantages.grpo])
def test_groups_refuse_what_does_not_fit(method: Any) -> None:
    with pytest.raises(InvalidInputError, match="got 1 in group 5; set num_generations"):
        method([1.0, 0.0, 1.0], [3, 3, 5])
    with pytest.raises(InvalidInputError, match=r"\(2,\) and \(3,\)"):
        method([1.0, 0.0], [3, 3, 5])
    with pytest.raises(InvalidInputError, match="groups: expected integers"):
        method([1.0, 0.0], [0.5, 0.5])
    with pytest.raises(InvalidInputError, match=r"rewards: .*nan at 1"):
        method([1.0, NAN], [0, 0])
    assert method([], []).tolist() == []


# --- whitening -----------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 1e6])
@pytest.mark.parametrize("seed", range(3))
def test_whitening_is_the_standard_score_with_the_unbiased_variance(
    seed: int, offset: float
) -> None:
    mask = random_mask(seed, 4, 6, holes=True)
    x = normal(seed, 4, 6) + offset
    values = x[mask].tolist()
    mean = math.fsum(values) / len(values)
    variance = math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)
    scale = 1 / math.sqrt(variance + 1e-8)
    garbage = torch.where(mask, x, torch.inf)
    batch = advantages.whiten(garbage, mask)
    std = advantages.whiten(garbage, mask, "std")
    expected = torch.where(mask, (x - mean) * scale, 0.0)
    torch.testing.assert_close(batch, expected, rtol=0, atol=1e-9 if offset else 1e-12)
    torch.testing.assert_close(std, torch.where(mask, x * scale, 0.0), rtol=1e-9, atol=0)
    as_they_are = advantages.whiten(garbage, mask, None)
    torch.testing.assert_close(as_they_are, torch.where(mask, x, 0.0), rtol=0, atol=0)


def test_whitening_keeps_its_digits_in_float32_beside_a_large_mean() -> None:
    mask = torch.ones(2, 50, dtype=torch.bool)
    x = (normal(1, 2, 50) + 4096.0).float()
    exact = x.double()
    expected = (exact - exact.mean()) / torch.sqrt(exact.var() + 1e-8)
    found = advantages.whiten(x, mask)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected.float(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("value", [0.0, 0.1, -7.3])
@pytest.mark.parametrize("tokens", [0, 1, 11])
def test_whitening_without_a_scale_gives_zero_or_leaves_as_is(value: float, tokens: int) -> None:
    mask = torch.zeros(2, 8, dtype=torch.bool)
    mask.view(-1)[:tokens] = True
    x = torch.full((2, 8), value)
    assert not advantages.whiten(x, mask).any()
    torch.testing.assert_close(
        advantages.whiten(x, mask, "std"), torch.where(mask, x, 0.0), rtol=0, atol=0
    )


@pytest.mark.parametrize("mode", ["batch", "std"])
def test_whitening_over_ranks_equals_that_of_the_whole(mode: Any) -> None:
    """Three ranks as threads that meet in a true sum; one of them holds no token."""
    x, mask = normal(5, 6, 4) + 2.0, random_mask(5, 6, 4)
    mask[2:4] = False
    whole = advantages.whiten(x, mask, mode)
    barrier = threading.Barrier(3)
    shared: list[Tensor] = [torch.empty(0)] * 3
    found: list[Tensor] = [torch.empty(0)] * 3

    def rank(i: int) -> None:
        def reduce(sums: Tensor) -> Tensor:
            shared[i] = sums
            barrier.wait(10)
            total = torch.stack(shared).sum(0)
            barrier.wait(10)
            return total

        rows = slice(2 * i, 2 * i + 2)
        found[i] = advantages.whiten(x[rows], mask[rows], mode, reduce)

    threads = [threading.Thread(target=rank, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    torch.testing.assert_close(torch.cat(found), whole, rtol=0, atol=1e-14)


def test_whitening_refuses_what_does_not_fit() -> None:
    x, mask = torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(InvalidInputError, match="mode: expected one of batch, std, None"):
        advantages.whiten(x, mask, "gray")  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="advantages"):
        advantages.whiten(x[:, :1], mask)
    with pytest.raises(NotFiniteError, match="advantages"):
        advantages.whiten(x / 0, mask)
