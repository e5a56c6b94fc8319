"""Gold against proxy: what a policy gains by a reward model it can fool.

A small reward model learns gold preferences between answers of the fine-tuned model, and the policy
optimises its score. What both scores say at each divergence from the fine-tuned model is the
picture of over-optimisation (the gold and proxy models of section 3.1 of arXiv 2410.18252).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from asyncrlhf.experiments import machine
from asyncrlhf.experiments.robustness import kept
from asyncrlhf.experiments.setting import PILOT, Setting, inline, one_thread, train

PROXY: Final[dict[str, Any]] = {**PILOT, "evaluation": {"prompts": 512, "every": 12}}
"""The setting; `experiments/proxy.yaml` holds the same."""

PAIRS: Final = 4096
REWARD_MODEL: Final[dict[str, Any]] = {"epochs": 4, "learning_rate": 1e-3}
LOSSES: Final = ("online_dpo", "proximal_rloo")


def overoptimise(content: Mapping[str, Any], loss: str, pairs: int, seed: int) -> dict[str, Any]:
    """Job: train a reward model, then a policy on its score, on one thread.

    Args:
        content: see :meth:`~asyncrlhf.experiments.setting.Setting.from_mapping`.
        loss: the arm.
        pairs: prompts with two answers each, that the reward model learns from.
        seed: of everything.

    Returns:
        ``loss``, ``seed``; ``accuracy`` of the reward model on as many fresh pairs; ``curve``, with
        a row per evaluation and in it ``proxy``, the mean score of the reward model.
    """
    from asyncrlhf.reward_models import (
        RewardModelConfig,
        preference_accuracy,
        relabel,
        sample_pairs,
        score_ids,
        train_reward_model,
    )

    setting = Setting.from_mapping({**content, "training": {**content["training"], "loss": loss}})
    task = setting.task
    with machine.shared(), one_thread():
        base = setting.start(seed)
        prompts = [row["prompt_ids"] for row in task.prompts(2 * pairs, seed, "reward_model")]
        drawn = sample_pairs(
            base, prompts, max_new_tokens=task.max_completion_length,
            temperature=setting.training["temperature"], seed=seed,
        )  # fmt: skip
        learnt, fresh = (relabel(part, task.gold_score) for part in (drawn[:pairs], drawn[pairs:]))
        model = train_reward_model(base, learnt, RewardModelConfig(seed=seed, **REWARD_MODEL))
        done = train(
            setting,
            seed,
            inline(setting),
            start=base,
            reward=model,
            measures={
                "proxy": lambda prompts, answers: score_ids(
                    model, [(*p, *a) for p, a in zip(prompts, answers, strict=True)]
                ).tolist()
            },
        )
    return {
        "loss": loss,
        "seed": seed,
        "accuracy": preference_accuracy(model, fresh),
        "curve": [kept(row, "proxy") for row in done.curve],
    }
