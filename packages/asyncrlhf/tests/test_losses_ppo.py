from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from asyncrlhf import losses
from asyncrlhf.errors import InvalidInputError

N, L = 5, 6


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_mask(seed: int, *, holes: bool = False) -> Tensor:
    """Completions of length 0 to L, one of them empty and one full; with holes, any columns."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, L + 1, (N,), generator=g)
    lengths[0], lengths[1] = 0, L
    mask = torch.arange(L) < lengths[:, None]
    return mask & (torch.rand(N, L, generator=g) < 0.6) if holes else mask


def close(found: Tensor, expected: Any, tolerance: float = 1e-10) -> None:
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(found.detach(), expected, rtol=tolerance, atol=tolerance)


def naive_gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """The double sum of the definition, over the tokens of each completion."""
    advantages, returns = torch.zeros_like(rewards), torch.zeros_like(rewards)
    for i in range(len(mask)):
        columns = mask[i].nonzero()[:, 0].tolist()
        r, v = rewards[i, columns].tolist(), [*values[i, columns].tolist(), 0.0]
        deltas = [r[t] + gamma * v[t + 1] - v[t] for t in range(len(r))]
        for t, column in enumerate(columns):
            terms = [(gamma * lam) ** (s - t) * deltas[s] for s in range(t, len(r))]
            advantages[i, column] = math.fsum(terms)
            returns[i, column] = math.fsum(terms) + v[t]
    return advantages, returns


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    gamma=st.floats(0, 1),
    lam=st.floats(0, 1),
    holes=st.booleans(),
)
def test_advantages_are_the_double_sum(seed: int, gamma: float, lam: float, holes: bool) -> None:
    mask = make_mask(seed, holes=holes)
    rewards, values = normal(seed, N, L), normal(seed + 1, N, L)
    # What stands outside the mask is nobody's.
    spoilt = torch.where(mask, 1.0, torch.nan)
    found = losses.gae(rewards * spoilt, values * spoilt, mask, gamma, lam)
    for x, y in zip(found, naive_gae(rewards, values, mask, gamma, lam), strict=True):
        close(x, y)


@pytest.mark.parametrize("seed", range(3))
def test_without_discount_values_and_kl_every_advantage_is_the_score(seed: int) -> None:
    mask, scores = make_mask(seed), normal(seed, N)
    logps = normal(seed + 1, N, L)
    rewards = losses.token_rewards(logps, logps - 1.0, scores, mask, kl_coef=0.0)
    advantages, returns = losses.gae(rewards, torch.zeros(N, L), mask, gamma=1.0, lam=1.0)
    close(advantages, torch.where(mask, scores[:, None], 0.0), 1e-12)
    close(returns, advantages, 0.0)


@pytest.mark.parametrize("seed", range(3))
def test_with_lambda_1_advantages_are_returns_less_values(seed: int) -> None:
    mask, rewards, values = make_mask(seed), normal(seed, N, L), normal(seed + 1, N, L)
    advantages, _ = losses.gae(rewards, values, mask, gamma=1.0, lam=1.0)
    kept = torch.where(mask, rewards, 0.0)
    to_go = kept.flip(1).cumsum(1).flip(1)
    close(advantages, torch.where(mask, to_go - values, 0.0))


@pytest.mark.parametrize("holes", [False, True])
def test_rewards_are_the_kl_of_each_token_and_the_score_at_the_last(holes: bool) -> None:
    mask = make_mask(4, holes=holes)
    behaviour, reference, scores = normal(1, N, L), normal(2, N, L), normal(3, N)
    spoilt = torch.where(mask, 1.0, torch.nan)
    scores = torch.where(mask.any(1), scores, torch.nan)
    found = losses.token_rewards(behaviour * spoilt, reference * spoilt, scores, mask, 0.3)
    expected = torch.zeros(N, L, dtype=torch.float64)
    for i in range(N):
        columns = mask[i].nonzero()[:, 0].tolist()
        for t in columns:
            expected[i, t] = -0.3 * (behaviour[i, t] - reference[i, t])
        if columns:
            expected[i, columns[-1]] += scores[i]
    close(found, expected)
    assert not found[0].any()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), scale=st.floats(0.01, 100), shift=st.floats(-1000, 1000))
def test_whitening_forgets_scale_and_shift(seed: int, scale: float, shift: float) -> None:
    mask, x = make_mask(seed), normal(seed, N, L)
    white = losses.whiten(x, mask)
    inside = white[mask]
    assert inside.mean().item() == pytest.approx(0, abs=1e-9)
    assert inside.std().item() == pytest.approx(1, abs=1e-6)
    # 1e-8 is added to the variance, which a small scale feels.
    close(losses.whiten(scale * x + shift, mask), white, 1e-3)
    assert not white[~mask].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_whitening_equal_numbers_gives_exact_zeros(dtype: torch.dtype) -> None:
    mask = make_mask(0)
    assert not losses.whiten(torch.full((N, L), 0.1, dtype=dtype), mask).any()
    one = torch.zeros_like(mask)
    one[1, 2] = True
    assert not losses.whiten(normal(0, N, L).to(dtype), one).any()
    assert not losses.whiten(normal(0, N, L).to(dtype), torch.zeros_like(mask)).any()


def inputs(seed: int) -> dict[str, Tensor]:
    logps = -normal(seed, N, L).abs()
    values = normal(seed + 1, N, L)
    return {
        "logps": logps,
        "behaviour_logps": logps + 0.3 * normal(seed + 2, N, L),
        "advantages": normal(seed + 3, N, L),
        "mask": make_mask(seed),
        "values": values,
        "old_values": values + 0.3 * normal(seed + 4, N, L),
        "returns": normal(seed + 5, N, L),
        "proximal_logps": logps + 0.2 * normal(seed + 6, N, L),
        "weights": normal(seed + 7, N, L).exp(),
    }


def run(x: dict[str, Tensor], **options: Any) -> tuple[Any, Tensor, Tensor]:
    """Output and gradients by log-probabilities and values."""
    logps, values = x["logps"].clone().requires_grad_(), x["values"].clone().requires_grad_()
    out = losses.ppo(**{**x, "logps": logps, "values": values}, **options)
    out.loss.backward()
    assert logps.grad is not None
    assert values.grad is not None
    return out, logps.grad, values.grad


def without(x: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in x.items() if name not in names}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_loss_is_the_mean_over_tokens_of_the_formula(
    seed: int, decoupled: bool, weighted: bool
) -> None:
    x = inputs(seed)
    dropped = [*([] if decoupled else ["proximal_logps"]), *([] if weighted else ["weights"])]
    out, by_logps, by_values = run(without(x, *dropped), clip=0.15, vf_coef=0.4, value_clip=0.25)
    tokens = int(x["mask"].sum())
    total = [0.0] * N
    slopes, value_slopes = torch.zeros(N, L).double(), torch.zeros(N, L).double()
    for i, t in x["mask"].nonzero().tolist():
        at = {name: float(tensor[i, t]) for name, tensor in x.items()}
        anchor = at["proximal_logps"] if decoupled else at["behaviour_logps"]
        weight = at["weights"] if weighted else 1.0
        weight *= math.exp(anchor - at["behaviour_logps"])
        rho, a = math.exp(at["logps"] - anchor), at["advantages"]
        total[i] -= weight * min(rho * a, min(max(rho, 0.85), 1.15) * a)
        if not ((a > 0 and rho > 1.15) or (a < 0 and rho < 0.85)):
            slopes[i, t] = -weight * rho * a
        v, old, target = at["values"], at["old_values"], at["returns"]
        held = old + min(max(v - old, -0.25), 0.25)
        total[i] += 0.4 * 0.5 * max((v - target) ** 2, (held - target) ** 2)
        if abs(v - old) <= 0.25 or (v - target) ** 2 > (held - target) ** 2:
            value_slopes[i, t] = 0.4 * (v - target)
    assert out.normalizer == tokens
    close(out.per_sequence, total)
    close(out.loss, math.fsum(total) / tokens)
    close(by_logps, slopes / tokens)
    close(by_values, value_slopes / tokens)


@pytest.mark.parametrize("seed", range(3))
def test_from_scores_to_the_loss_in_one_go(seed: int) -> None:
    """Rewards, GAE as the double sum, whitening and loss, against loops, to 1e-8."""
    mask = make_mask(seed)
    logps, scores = -normal(seed, N, L).abs(), normal(seed + 1, N)
    behaviour = logps + 0.1 * normal(seed + 2, N, L)
    reference, values = logps + normal(seed + 3, N, L), normal(seed + 4, N, L)
    rewards = losses.token_rewards(behaviour, reference, scores, mask)
    advantages, returns = losses.gae(rewards, values, mask)
    out = losses.ppo(
        logps,
        behaviour,
        losses.whiten(advantages, mask),
        mask,
        values=values,
        old_values=values,
        returns=returns,
    )
    r = -0.05 * (behaviour - reference)
    for i in range(N):
        if mask[i].any():
            r[i, int(mask[i].sum()) - 1] += scores[i]
    raw, targets = naive_gae(r, values, mask, 1.0, 0.95)
    flat = raw[mask].tolist()
    mean = math.fsum(flat) / len(flat)
    std = math.sqrt(math.fsum((a - mean) ** 2 for a in flat) / (len(flat) - 1) + 1e-8)
    terms = []
    for i, t in mask.nonzero().tolist():
        a = (raw[i, t].item() - mean) / std
        rho = math.exp(logps[i, t].item() - behaviour[i, t].item())
        terms.append(-min(rho * a, min(max(rho, 0.8), 1.2) * a))
        terms.append(0.1 * 0.5 * (values[i, t] - targets[i, t]).item() ** 2)
    close(out.loss, math.fsum(terms) / len(flat), 1e-8)


@pytest.mark.parametrize("seed", range(3))
def test_the_decoupled_loss_is_the_plain_one_where_nothing_is_decoupled(seed: int) -> None:
    x = without(inputs(seed), "weights")
    plain = run(without(x, "proximal_logps"))
    same = run({**x, "proximal_logps": x["behaviour_logps"]})
    assert torch.equal(plain[0].per_sequence, same[0].per_sequence)
    assert torch.equal(plain[1], same[1])


@pytest.mark.parametrize("seed", range(3))
def test_micro_batches_sum_to_the_minibatch(seed: int) -> None:
    x = inputs(seed)
    whole, by_logps, by_values = run(x)
    total, parts = 0.0, []
    for rows in (slice(0, 1), slice(1, 4), slice(4, 5)):  # the first has no token
        out, *gradients = run({name: t[rows] for name, t in x.items()}, normalizer=whole.normalizer)
        total += out.loss.item()
        parts.append(gradients)
    close(whole.loss, total, 1e-12)
    close(torch.cat([p[0] for p in parts]), by_logps, 1e-12)
    close(torch.cat([p[1] for p in parts]), by_values, 1e-12)


def test_weights_of_sequences_are_those_of_all_their_tokens() -> None:
    x = inputs(1)
    weights = normal(9, N).exp()
    by_sequence = run({**x, "weights": weights})
    by_token = run({**x, "weights": weights[:, None].expand(N, L)})
    for found, expected in zip(by_sequence[1:], by_token[1:], strict=True):
        assert torch.equal(found, expected)


def test_what_stands_outside_the_mask_is_nobodys() -> None:
    x = inputs(2)
    spoilt = torch.where(x["mask"], 1.0, torch.nan)
    found = run({n: t if n == "mask" else t * spoilt for n, t in x.items()})
    expected = run(x)
    close(found[0].loss, expected[0].loss.detach(), 0.0)
    for a, b in zip(found[1:], expected[1:], strict=True):
        assert torch.equal(a, b)


def test_a_batch_without_a_token_gives_a_loss_of_zero_that_can_go_backward() -> None:
    x = inputs(3)
    out, *gradients = run({**x, "mask": torch.zeros_like(x["mask"])})
    assert out.loss.item() == 0.0
    assert not any(g.any() for g in gradients)
    assert all(torch.isfinite(value) for value in out.metrics.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e4, -1e4])
@pytest.mark.parametrize("name", ["logps", "behaviour_logps", "proximal_logps", "values"])
def test_huge_numbers_give_finite_values_and_gradients(
    name: str, size: float, dtype: torch.dtype
) -> None:
    x = {n: t if n == "mask" else t.to(dtype) for n, t in inputs(4).items()}
    out, *gradients = run({**x, name: x[name] + size})
    assert torch.isfinite(out.loss)
    assert all(torch.isfinite(g).all() for g in gradients)
    assert all(torch.isfinite(value) for value in out.metrics.values())


def test_metrics_are_means_over_tokens() -> None:
    behaviour = torch.tensor([[-1.0, -1.0, -9.0]], dtype=torch.float64)
    logps = behaviour + torch.tensor([[0.5, -0.1, 7.0]])
    mask = torch.tensor([[True, True, False]])
    a = torch.tensor([[2.0, 2.0, 2.0]], dtype=torch.float64)
    v = torch.tensor([[0.0, 1.0, 5.0]], dtype=torch.float64)
    out = losses.ppo(
        logps, behaviour, a, mask, values=v, old_values=v - 0.5, returns=torch.zeros(1, 3)
    )
    expected = {
        "clip_fraction": 0.5,
        "ratio_mean": (math.exp(0.5) + math.exp(-0.1)) / 2,
        "ratio_max": math.exp(0.5),
        "approx_kl": (math.exp(0.5) - 1.5 + math.exp(-0.1) - 0.9) / 2,
        "policy_loss": -(1.2 * 2 + math.exp(-0.1) * 2) / 2,
        "value_loss": 0.5 * (0.3**2 + 1.0) / 2,
        "value_clip_fraction": 0.5,
    }
    assert {k: m.item() for k, m in out.metrics.items()} == pytest.approx(expected)


X, M = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: losses.ppo(X[0], X, X, M), "logps: expected the mask's shape"),
        (lambda: losses.ppo(X, X, X, M.float()), "mask: expected shape"),
        (lambda: losses.ppo(X, X, X[:, 0], M), "advantages: expected the mask's shape"),
        (lambda: losses.ppo(X, X, X, M, clip=-0.1), "clip: expected a positive"),
        (lambda: losses.ppo(X, X, X, M, values=X, returns=X), "old_values: expected together"),
        (lambda: losses.ppo(X, X, X, M, weights=X[0]), "weights: expected shape"),
        (lambda: losses.ppo(X, X, X, M, normalizer=-1.0), "normalizer: expected"),
        (lambda: losses.gae(X, X, M, gamma=1.5), "gamma: expected a number from 0 to 1"),
        (lambda: losses.gae(X, X[:1], M), "values: expected the mask's shape"),
        (lambda: losses.whiten(X[0], M), "x: expected the mask's shape"),
        (lambda: losses.token_rewards(X, X, X, M), "scores: expected shape"),
        (lambda: losses.token_rewards(X, X, X[:, 0] / 0, M), "scores: expected finite"),
    ],
)
def test_what_does_not_fit_is_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        call()
