"""asyncrlhf x hpreliability: which hyper-parameters must be tuned again when one goes off-policy?

Generating ahead is said to change the speed of RLHF and to leave the recipe alone. Whether the
recipe may stay is a question about rankings, which no learning curve answers: does the best value
of a hyper-parameter stay the best as samples age, or move farther than luck would move it? A sweep
varies one hyper-parameter at a time around a recipe that was tuned on-policy. Its contexts are N,
the minibatches that one version of the weights generates. asyncrlhf makes runs of any staleness
with all else equal, hpreliability says what rankings of a few seeds allow one to conclude.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import asyncrlhf  # loads torch and transformers where they are used, which is in workers alone
from asyncrlhf.tasks import SyntheticSummary
from hpreliability.consistency import Method, thc_statistic
from hpreliability.sweep import Sweep, SweepSpec

Floats = np.ndarray[Any, np.dtype[np.float64]]

TASK = SyntheticSummary()
EPISODES = 32  # answers of an optimizer step, whatever K: 16 prompts with 2 each, or 4 with 8
RECIPE = {"learning_rate": 1e-3, "beta": 0.1, "samples": 4}


@functools.cache
def fine_tuned(steps: int) -> Any:
    """The model that every run starts from; a process makes it once."""
    return TASK.sft_model(steps=steps, learning_rate=2e-3, heads=4)


def train(config: Mapping[str, Any], minibatches: str, seed: int, budget: int) -> dict[str, float]:
    """Online DPO; with every N and K a run has as many updates and as many episodes.

    Args:
        config: the recipe (K is ``samples``); steps of ``fine_tuning``; ``judged`` prompts.
        minibatches: N, as text, because contexts of a sweep are labels.
        seed: of prompts and sampling.
        budget: optimizer steps.

    Returns:
        ``score``, the gold score of answers to unseen prompts; ``kl``, nats from the start;
        ``staleness``, the mean over optimizer steps.
    """
    import torch

    torch.set_num_threads(1)
    prompts = EPISODES // config["samples"]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        args = asyncrlhf.AsyncRLHFConfig(
            output_dir=folder,
            loss="online_dpo",
            beta=config["beta"],
            learning_rate=config["learning_rate"],
            num_generations=config["samples"],
            per_device_train_batch_size=prompts,
            minibatches_per_round=int(minibatches),
            rounds_ahead=0,  # N alone makes samples stale
            max_steps=budget,
            lr_scheduler_type="constant",  # staleness meets the same step size early and late
            temperature=0.7,
            eval_temperature=0.7,
            per_device_eval_batch_size=512,
            max_completion_length=TASK.max_completion_length,
            missing_eos_score=TASK.penalty,
            seed=seed,
            use_cpu=True,
            verify_weights=False,
            save_strategy="no",
            report_to="none",
            logging_steps=10**9,
            disable_tqdm=True,
        )
        trainer = asyncrlhf.AsyncRLHFTrainer(
            model=copy.deepcopy(fine_tuned(config["fine_tuning"])),
            reward_funcs=TASK.gold,
            args=args,
            train_dataset=TASK.prompts(budget * prompts, seed),
            eval_dataset=TASK.prompts(config["judged"], stream="eval"),
            processing_class=TASK.tokenizer(),
            engine=asyncrlhf.engines.HFEngine(placement="inline", max_batch_size=512),
        )
        trainer.train()
        found = trainer.evaluate()
    stale = trainer.report().staleness
    mean = sum(s * n for s, n in stale.items()) / sum(stale.values())
    return {"score": found["eval_reward"], "kl": found["eval_kl"], "staleness": mean}


def sweep(
    values: Mapping[str, Sequence[float]],
    minibatches: Sequence[int],
    *,
    updates: int,
    seeds: int,
    fine_tuning: int,
    judged: int,
) -> Sweep:
    """One hyper-parameter of the recipe at a time, at every N; all runs have seeds of their own."""
    spec = SweepSpec(
        name="retuning-off-policy",
        base={**RECIPE, "fine_tuning": fine_tuning, "judged": judged},
        hyperparameters=values,
        contexts={"minibatches": [str(n) for n in minibatches]},
        budgets=updates,
        seeds=seeds,
    )
    return Sweep(spec)


def steady(scores: Floats, *, copies: int = 2000, seed: int = 0) -> Floats:
    """THC scores [copies] that luck gives where the order of the values is the same at every N.

    The library's null is that no value matters, and where one does, a steady order beats it too: at
    one N luck separates neighbours that tie at another. Here values and N have additive effects,
    those that were found, and what is left of the runs is dealt to the values anew within each N.

    Args:
        scores: [values, seeds, N].
        copies: how many.
        seed: of the deals.
    """
    values, runs, ns = scores.shape
    means = scores.mean(axis=1, keepdims=True)
    rest = ((scores - means) * np.sqrt(runs / (runs - 1))).reshape(1, values * runs, ns)
    dealt = np.random.default_rng(seed).permuted(np.repeat(rest, copies, axis=0), axis=1)
    additive = means.mean(axis=2, keepdims=True) + means.mean(axis=0, keepdims=True)
    return thc_statistic((additive + dealt.reshape(copies, *scores.shape))[..., None], Method())


def carried(at: Floats, to: Floats) -> Floats:
    """What a value scores where it is used, if it was chosen elsewhere; judged on unused seeds.

    Args:
        at: [values, seeds], scores where the value is chosen, by the mean of all seeds but one.
        to: [values, seeds], scores where it is used, by the seed that was left out.
    """
    seeds = range(at.shape[1])
    return np.array([to[np.delete(at, s, axis=1).mean(axis=1).argmax(), s] for s in seeds])
