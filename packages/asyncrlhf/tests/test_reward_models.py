from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from asyncrlhf.errors import InvalidInputError
from asyncrlhf.reward_models import (
    Pair,
    RewardModelConfig,
    bradley_terry,
    preference_accuracy,
    relabel,
    sample_pairs,
    score_ids,
    train_proxy,
    train_reward_model,
)
from asyncrlhf.tasks import SyntheticSummary
from asyncrlhf.tasks.fine_tuning import StepDone, new_model

# Easy enough that a reward model learns it in a second.
TASK = SyntheticSummary(symbols=4, length=5, noise=0.5)


@pytest.fixture(scope="module")
def base() -> Any:
    return new_model(TASK.model_config(width=32, layers=2, heads=4), 7)


def noisy_pairs(n: int, seed: int) -> list[Pair]:
    """Unlabelled pairs of answers as fine-tuning sees them."""
    rows = TASK.sft_examples(n, seed)
    right = [TASK.target(row["prompt_ids"]) for row in rows]
    rng = np.random.default_rng(seed)
    first, second = (
        [
            (*np.where(rng.random(5) < 0.5, rng.integers(4, 8, size=5), answer[:-1]).tolist(), 1)
            for answer in right
        ]
        for _ in range(2)
    )
    prompts = [tuple(row["prompt_ids"]) for row in rows]
    return [Pair(*pair) for pair in zip(prompts, first, second, strict=True)]


def test_samples_come_in_pairs_that_differ(base: Any) -> None:
    prompts = [row["prompt_ids"] for row in TASK.prompts(20)]
    pairs = sample_pairs(base, prompts, max_new_tokens=6, seed=1)
    assert [list(pair.prompt) for pair in pairs] == prompts
    assert sum(pair.chosen != pair.rejected for pair in pairs) > 15
    assert sample_pairs(base, prompts, max_new_tokens=6, seed=1) == pairs
    # Each answer is drawn with a seed of its own, so more prompts change nothing.
    assert sample_pairs(base, prompts[:5], max_new_tokens=6, seed=1) == pairs[:5]


def test_relabelled_pairs_are_in_the_order_of_gold_and_without_ties() -> None:
    pairs = noisy_pairs(200, 0)
    labelled = relabel(pairs, TASK.gold_score)
    prompts = [pair.prompt for pair in labelled]
    better = TASK.gold_score(prompts, [pair.chosen for pair in labelled])
    worse = TASK.gold_score(prompts, [pair.rejected for pair in labelled])
    assert (better > worse).all()
    both = {(p.prompt, frozenset((p.chosen, p.rejected))) for p in labelled}
    assert both <= {(p.prompt, frozenset((p.chosen, p.rejected))) for p in pairs}
    ties = sum(
        TASK.gold_score([p.prompt], [p.chosen])[0] == TASK.gold_score([p.prompt], [p.rejected])[0]
        for p in pairs
    )
    assert len(labelled) == len(pairs) - ties > 0
    # A swap changes the labels, not the result.
    swapped = [Pair(p.prompt, p.rejected, p.chosen) for p in pairs]
    assert relabel(swapped, TASK.gold_score) == labelled
    opposite = relabel(pairs, lambda p, c: -TASK.gold_score(p, c))
    assert [(p.chosen, p.rejected) for p in opposite] == [(p.rejected, p.chosen) for p in labelled]
    for bad in ([math.nan] * 200, [1.0]):
        with pytest.raises(InvalidInputError, match="gold: expected 200 finite scores"):
            relabel(pairs, lambda *_, bad=bad: bad)


def test_the_loss_is_bradley_and_terrys() -> None:
    chosen = torch.tensor([0.3, -1.0, 200.0], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([0.3, 1.0, -200.0], dtype=torch.float64)
    wanted = (math.log(2) + math.log1p(math.exp(2)) + 0) / 3
    assert float(bradley_terry(chosen, rejected).detach()) == pytest.approx(wanted)
    (gradient,) = torch.autograd.grad(bradley_terry(chosen, rejected), chosen)
    wrong = 1 / (1 + math.exp(-2))  # the chance that the model gives to the wrong order
    assert gradient.tolist() == pytest.approx([-0.5 / 3, -wrong / 3, 0.0])


def test_a_reward_model_learns_preferences_that_it_has_not_seen(base: Any) -> None:
    train = relabel(noisy_pairs(1200, 0), TASK.gold_score)
    seen = set(train)
    held_out = [p for p in relabel(noisy_pairs(600, 1), TASK.gold_score) if p not in seen]
    assert len(held_out) > 300
    told: list[StepDone] = []
    config = RewardModelConfig(epochs=6, learning_rate=4e-3)
    model = train_reward_model(base, train, config, on_step=told.append)
    assert told[0].loss == pytest.approx(math.log(2))  # no preference before the first step
    assert told[-1].step == told[-1].steps == len(told) == 6 * math.ceil(len(train) / 64)
    accuracy = preference_accuracy(model, held_out)
    # Chance is 1/2 with a standard error of 0.5 / sqrt(n).
    assert accuracy > 0.5 + 6 * 0.5 / math.sqrt(len(held_out))
    swapped = [Pair(p.prompt, p.rejected, p.chosen) for p in held_out]
    assert preference_accuracy(model, swapped) == pytest.approx(1 - accuracy)


def test_the_same_arguments_give_the_same_reward_model(base: Any) -> None:
    pairs = relabel(noisy_pairs(100, 0), TASK.gold_score)
    before, state = torch.get_rng_state(), {k: v.clone() for k, v in base.state_dict().items()}
    one, again = (train_reward_model(base, pairs) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(map(torch.equal, one.state_dict().values(), again.state_dict().values()))
    assert all(torch.equal(v, base.state_dict()[k]) for k, v in state.items())
    assert base.config.num_labels == 2  # what transformers gives to models without labels
    fresh = train_reward_model(base, pairs, from_scratch=True)
    other = train_reward_model(base, pairs, RewardModelConfig(seed=1))
    for different in (fresh, other):
        assert not torch.equal(one.score.weight, different.score.weight)
    assert not one.training


def test_scores_do_not_depend_on_the_batch(base: Any) -> None:
    pairs = relabel(noisy_pairs(64, 0), TASK.gold_score)
    model = train_reward_model(base, pairs)
    sequences = [(*p.prompt, *p.chosen[: 1 + i % 6]) for i, p in enumerate(pairs)]
    together = score_ids(model, sequences)
    alone = np.concatenate([score_ids(model, [row]) for row in sequences])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert score_ids(model, []).shape == (0,)


def test_the_proxy_of_a_task_is_made_from_samples_and_gold(base: Any) -> None:
    told: list[StepDone] = []
    arguments: dict[str, Any] = {"pairs": 64, "config": RewardModelConfig()}
    one = train_proxy(TASK, base, **arguments, on_step=told.append)
    again, other = (train_proxy(TASK, base, **arguments, seed=seed) for seed in (0, 1))
    assert len(told) == 1
    assert all(map(torch.equal, one.state_dict().values(), again.state_dict().values()))
    assert not torch.equal(one.score.weight, other.score.weight)
    assert one.config.num_labels == 1


def test_trainings_that_make_no_sense_are_refused(base: Any) -> None:
    for arguments in ({"epochs": 0}, {"batch_size": 0}, {"learning_rate": math.nan}):
        with pytest.raises(InvalidInputError, match=next(iter(arguments))):
            RewardModelConfig(**arguments)  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="pairs: expected at least one"):
        train_reward_model(base, [])
    with pytest.raises(InvalidInputError, match="pairs: expected at least one"):
        preference_accuracy(base, [])
    config = TASK.model_config(width=32, layers=1, heads=4)
    config.pad_token_id = None
    with pytest.raises(InvalidInputError, match="pad_token_id"):
        train_reward_model(new_model(config, 0), noisy_pairs(4, 0))
