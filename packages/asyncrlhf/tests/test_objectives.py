"""From a minibatch to its loss: parts add up, failures teach nothing, corrections count once."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from asyncrlhf import losses
from asyncrlhf.errors import InvalidInputError
from asyncrlhf.minibatch import Minibatch
from asyncrlhf.objectives import Objective, log_ratio
from asyncrlhf.settings import IsCorrection

LENGTHS = (3, 5, 1, 4, 2, 5, 5, 3)
CORRECTIONS: tuple[IsCorrection, ...] = (
    "truncate_token", "truncate_sequence", "mask_token", "mask_sequence", "decoupled",
)  # fmt: skip
RATIO_LOSSES = ("ppo", "grpo", "proximal_rloo")


def drawn(mask: Tensor, seed: int, scale: float = 0.3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = -1.0 + scale * torch.randn(mask.shape, generator=generator, dtype=torch.float64)
    return torch.where(mask, values, 0.0)


@pytest.fixture
def batch() -> Minibatch:
    """Four prompts with two completions each, every log-probability another."""
    n, longest = len(LENGTHS), max(LENGTHS)
    mask = torch.arange(longest) < torch.tensor(LENGTHS)[:, None]
    return Minibatch(
        prompts=((1,),) * n,
        completions=tuple(tuple(range(length)) for length in LENGTHS),
        mask=mask,
        behaviour_logps=drawn(mask, 1),
        group_ids=torch.arange(n) // 2,
        scores=torch.linspace(-1, 1, n, dtype=torch.float64).square() + torch.arange(n) / 10,
        valid=torch.ones(n, dtype=torch.bool),
        oldest_version=0,
        ref_logps=drawn(mask, 2),
        proximal_logps=drawn(mask, 3),
        values=torch.where(mask, 0.1 * drawn(mask, 4), 0.0),
    )


def loss_and_gradient(
    objective: Objective, batch: Minibatch, parts: int = 1
) -> tuple[float, Tensor]:
    """Of a minibatch that is learnt from in parts, by its token log-probabilities."""
    batch = objective.prepared(batch)
    logps = drawn(batch.mask, 5).requires_grad_()
    values = batch.values
    size = len(batch) // parts
    rows = [slice(i, i + size) for i in range(0, len(batch), size)]
    pieces = [batch.rows(r.start, r.stop) for r in rows]
    total = sum(map(objective.normalizer, pieces))
    loss = logps.new_zeros(())
    for r, piece in zip(rows, pieces, strict=True):
        width = piece.mask.shape[1]
        critic = None if values is None else values[r, :width] + 0.05
        loss = loss + objective(piece, logps[r, :width], critic, normalizer=total).loss
    (gradient,) = torch.autograd.grad(loss, logps)
    return float(loss.detach()), gradient


@pytest.mark.parametrize("loss", losses.INFO)
@pytest.mark.parametrize("parts", [2, 4])
def test_parts_of_a_minibatch_sum_to_the_whole(batch: Minibatch, loss: str, parts: int) -> None:
    whole, gradient = loss_and_gradient(Objective(loss), batch)
    found, in_parts = loss_and_gradient(Objective(loss), batch, parts)
    assert found == pytest.approx(whole, abs=1e-12)
    torch.testing.assert_close(in_parts, gradient, atol=1e-12, rtol=0)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("loss", losses.INFO)
def test_what_a_reward_failed_for_has_no_gradient(batch: Minibatch, loss: str) -> None:
    failed = replace(batch, valid=torch.tensor([False, False, True, True, True, True, True, False]))
    failed = replace(failed, scores=torch.where(failed.valid, failed.scores, math.nan))
    found, gradient = loss_and_gradient(Objective(loss), failed)
    assert math.isfinite(found)
    assert gradient.isfinite().all()
    assert (gradient[~failed.valid] == 0).all()
    assert gradient[failed.valid].abs().sum() > 0


@pytest.mark.parametrize("loss", losses.INFO)
def test_a_minibatch_without_a_score_has_a_loss_of_0(batch: Minibatch, loss: str) -> None:
    nothing = replace(
        batch,
        valid=torch.zeros(len(batch), dtype=torch.bool),
        scores=torch.full((len(batch),), math.nan),
    )
    objective = Objective(loss)
    prepared = objective.prepared(nothing)
    output = objective(prepared, drawn(batch.mask, 5), batch.values, normalizer=1.0)
    assert float(output.loss) == 0


def test_advantages_are_whitened_over_what_counts(batch: Minibatch) -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def whiten(x: Tensor, mask: Tensor) -> Tensor:
        seen.append((x, mask))
        return losses.whiten(x, mask)

    valid = torch.tensor([True] * 7 + [False])
    prepared = Objective("ppo").prepared(replace(batch, valid=valid), whiten)
    assert len(seen) == 1
    assert torch.equal(seen[0][1], batch.mask & valid[:, None])
    assert prepared.advantages is not None
    inside = prepared.advantages[prepared.mask]
    assert float(inside.mean()) == pytest.approx(0, abs=1e-6)
    assert float(inside.std()) == pytest.approx(1, abs=1e-3)
    assert (prepared.advantages[~prepared.mask] == 0).all()


@pytest.mark.parametrize("loss", RATIO_LOSSES)
def test_truncation_without_a_cap_is_the_decoupled_loss(batch: Minibatch, loss: str) -> None:
    """So the sampler's distance is corrected once, not by the ratio and by the weight again."""
    unbounded: IsCorrection = "truncate_sequence" if loss == "proximal_rloo" else "truncate_token"
    # The KL in the rewards of proximal_rloo is that of the policy that the weights lead to.
    kl_coef = 0.0 if loss == "proximal_rloo" else 0.05
    truncated = Objective(loss, kl_coef=kl_coef, correction=unbounded, cap=math.inf)
    decoupled = Objective(loss, kl_coef=kl_coef, correction="decoupled")
    found, gradient = loss_and_gradient(truncated, batch)
    expected, expected_gradient = loss_and_gradient(decoupled, batch)
    assert found == pytest.approx(expected, rel=1e-9)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("loss", [*RATIO_LOSSES, "rloo"])
def test_a_correction_of_nothing_changes_nothing(
    batch: Minibatch, loss: str, correction: Any
) -> None:
    if (loss, correction) in {
        ("rloo", "decoupled"), ("proximal_rloo", "truncate_token"), ("proximal_rloo", "mask_token"),
    }:  # fmt: skip
        pytest.skip("refused by the settings")
    fresh = replace(batch, proximal_logps=batch.behaviour_logps)
    plain, gradient = loss_and_gradient(Objective(loss), fresh)
    found, corrected = loss_and_gradient(Objective(loss, correction=correction), fresh)
    assert found == pytest.approx(plain, abs=1e-12)
    torch.testing.assert_close(corrected, gradient, atol=1e-12, rtol=0)


@pytest.mark.parametrize("loss", ["ppo", "grpo", "rloo"])
def test_tokens_that_are_masked_as_too_unlikely_have_no_gradient(
    batch: Minibatch, loss: str
) -> None:
    assert batch.proximal_logps is not None
    ratio = (batch.proximal_logps - batch.behaviour_logps).exp()
    outside = batch.mask & (ratio > 1.2)
    assert outside.any()
    objective = Objective(loss, kl_coef=0.0, correction="mask_token", cap=1.2)
    _, gradient = loss_and_gradient(objective, batch)
    assert (gradient[outside] == 0).all()
    assert gradient[batch.mask & ~outside].abs().sum() > 0


def test_only_corrections_need_the_learner_of_the_rounds_arrival() -> None:
    assert not Objective("ppo").needs_proximal
    assert all(Objective("ppo", correction=correction).needs_proximal for correction in CORRECTIONS)
    assert [loss for loss in losses.INFO if Objective(loss).needs_critic] == ["ppo"]


def test_the_log_ratio_of_a_completion_is_the_sum_over_its_tokens(batch: Minibatch) -> None:
    logps = drawn(batch.mask, 7) + 100 * ~batch.mask  # whatever stands outside
    expected = [
        float((logps - batch.behaviour_logps)[i, :length].sum()) for i, length in enumerate(LENGTHS)
    ]
    assert log_ratio(batch, logps).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("loss", "correction"),
    [
        ("online_dpo", "truncate_token"), ("ipo", "decoupled"), ("best_of_k", "mask_sequence"),
        ("copg", "truncate_sequence"), ("rloo", "decoupled"), ("proximal_rloo", "mask_token"),
        ("proximal_rloo", "truncate_token"),
    ],
)  # fmt: skip
def test_a_correction_that_a_loss_has_no_use_for_is_refused(
    replay: Any, tmp_path: Any, loss: str, correction: str
) -> None:
    with pytest.raises(InvalidInputError, match=f"is_correction: .*{loss}"):
        replay.settings(tmp_path, loss=loss, is_correction=correction)
