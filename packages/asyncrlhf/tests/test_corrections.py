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
from asyncrlhf.corrections import (
    effective_sample_size,
    importance_weights,
    sequence_log_ratios,
)
from asyncrlhf.errors import InvalidInputError

N, L = 4, 5


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


MASK = torch.arange(L) < torch.tensor([[5], [3], [0], [1]])
LEARNER = normal(0, N, L)
SAMPLER = LEARNER + 0.5 * normal(1, N, L)


def loop(level: str, mode: str, cap: float, low: float | None) -> list[list[float]] | list[float]:
    """The weights with plain numbers."""

    def bounded(ratio: float) -> float:
        floor = 0.0 if low is None else low
        if mode == "truncate":
            return min(max(ratio, floor), cap)
        return ratio if floor <= ratio <= cap else 0.0

    d = (LEARNER - SAMPLER).tolist()
    kept = [[x if m else None for x, m in zip(*r, strict=True)] for r in zip(d, MASK, strict=True)]
    if level == "token":
        return [[0.0 if x is None else bounded(math.exp(x)) for x in row] for row in kept]
    return [bounded(math.exp(math.fsum(x for x in row if x is not None))) for row in kept]


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("mode", ["truncate", "mask"])
@pytest.mark.parametrize(
    ("cap", "low"), [(2.0, None), (1.2, None), (1.2, 0.8), (math.inf, None), (math.inf, 0.5)]
)
def test_weights_are_bounded_ratios(level: Any, mode: Any, cap: float, low: float | None) -> None:
    found = importance_weights(LEARNER, SAMPLER, MASK, level, mode, cap, low)
    expected = torch.tensor(loop(level, mode, cap, low), dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("mode", ["truncate", "mask"])
def test_one_engine_at_staleness_0_without_a_cap_changes_no_bit_of_a_loss(
    level: Any, mode: Any
) -> None:
    logps = LEARNER.clone().requires_grad_()
    groups = torch.tensor([0, 0, 1, 1])
    weights = importance_weights(logps, LEARNER, MASK, level, mode, cap=math.inf)
    assert torch.equal(weights, MASK.double() if level == "token" else torch.ones(N).double())
    for loss in (
        lambda **kw: losses.rloo(logps, LEARNER, SAMPLER, normal(2, N), groups, mask=MASK, **kw),
        lambda **kw: losses.grpo(logps, LEARNER, normal(2, N), groups, MASK, **kw),
        lambda **kw: losses.ppo(logps, LEARNER, normal(2, N, L), MASK, **kw),
    ):
        (plain,) = torch.autograd.grad(loss().loss, logps)
        (weighted,) = torch.autograd.grad(loss(weights=weights).loss, logps)
        assert torch.equal(plain, weighted)
    assert effective_sample_size(sequence_log_ratios(LEARNER, LEARNER, MASK)).item() == 1.0


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_no_gradient_flows_through_weights(level: Any) -> None:
    learner = LEARNER.clone().requires_grad_()
    assert not importance_weights(learner, SAMPLER, MASK, level).requires_grad
    assert not sequence_log_ratios(learner, SAMPLER, MASK).requires_grad
    assert not effective_sample_size(learner).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [1e4, -1e4])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("cap", [2.0, math.inf])
def test_huge_log_ratios_give_finite_weights(
    level: Any, size: float, dtype: torch.dtype, cap: float
) -> None:
    far = LEARNER.clone()
    far[0] += size
    weights = importance_weights(far.to(dtype), SAMPLER.to(dtype), MASK, level, cap=cap)
    assert torch.isfinite(weights).all()
    assert weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.isfinite(effective_sample_size(sequence_log_ratios(far, SAMPLER, MASK)))


def test_what_stands_outside_the_mask_is_nobodys() -> None:
    spoilt = torch.where(MASK, LEARNER, torch.nan)
    for level in ("token", "sequence"):
        assert torch.equal(
            importance_weights(spoilt, SAMPLER, MASK, level),  # type: ignore[arg-type]
            importance_weights(LEARNER, SAMPLER, MASK, level),  # type: ignore[arg-type]
        )


@settings(max_examples=60, deadline=None)
@given(
    logs=st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=20),
    shift=st.floats(-1e4, 1e4),
)
def test_the_effective_share_lies_between_one_of_n_and_one(logs: list[float], shift: float) -> None:
    x = torch.tensor(logs, dtype=torch.float64)
    found = effective_sample_size(x).item()
    assert 1 / len(logs) <= found <= 1
    assert effective_sample_size(x + shift).item() == pytest.approx(found, rel=1e-6)


@settings(max_examples=40, deadline=None)
@given(weights=st.lists(st.floats(0.001, 1000), min_size=1, max_size=20))
def test_the_effective_share_is_its_formula(weights: list[float]) -> None:
    expected = math.fsum(weights) ** 2 / (len(weights) * math.fsum(w * w for w in weights))
    found = effective_sample_size(torch.tensor(weights, dtype=torch.float64).log())
    assert found.item() == pytest.approx(expected, rel=1e-10)


def test_the_effective_share_of_weights_of_zero() -> None:
    nothing = torch.full((4,), -math.inf)
    assert effective_sample_size(nothing).item() == 0.0
    assert effective_sample_size(torch.zeros(0)).item() == 0.0
    half = torch.tensor([0.0, 0.0, -math.inf, -math.inf])
    assert effective_sample_size(half).item() == 0.5
    assert effective_sample_size(half, valid=half == 0).item() == 1.0


def test_sequence_log_ratios_are_sums_over_the_mask() -> None:
    expected = torch.where(MASK, LEARNER - SAMPLER, 0.0).sum(1)
    assert torch.equal(sequence_log_ratios(LEARNER, SAMPLER, MASK), expected)
    assert expected[2].item() == 0.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: importance_weights(LEARNER, SAMPLER[:1], MASK), "sampler_logps: expected"),
        (lambda: importance_weights(LEARNER, SAMPLER, MASK[0]), "mask: expected the shape"),
        (lambda: importance_weights(LEARNER[0], SAMPLER[0], MASK[0]), "sampler_logps: expected"),
        (lambda: importance_weights(LEARNER, SAMPLER, MASK, "group"), "level: expected one of"),  # type: ignore[arg-type]
        (lambda: importance_weights(LEARNER, SAMPLER, MASK, mode="x"), "mode: expected one of"),  # type: ignore[arg-type]
        (lambda: importance_weights(LEARNER, SAMPLER, MASK, cap=0.0), "cap, low: expected"),
        (lambda: importance_weights(LEARNER, SAMPLER, MASK, cap=1.0, low=2.0), "cap, low"),
        (lambda: importance_weights(LEARNER, SAMPLER, MASK, cap=math.nan), "cap, low: expected"),
        (lambda: effective_sample_size(LEARNER, MASK[0]), "valid: expected shape"),
    ],
)
def test_what_does_not_fit_is_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        call()
