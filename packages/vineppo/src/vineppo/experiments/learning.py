"""The learning bench: every method from one fine-tuned model, on equal numbers of episodes.

A tiny Llama, fine-tuned on chain arithmetic and stopped early, is trained by each method. All runs
start from the same weights; those of one seed see the same prompts in the same order and are
measured on the same test prompts, so that methods compare in pairs. The clock counts what a trainer
does itself, by the seconds of its processor: measuring is not in it, and neighbours on the machine
hardly are.
"""

from __future__ import annotations

import contextlib
import copy
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from vineppo.errors import one_of

LEARNING: Final[dict[str, Any]] = {
    "task": {"operands": 8, "modulus": 10},
    "start": {"seed": 0},
    "training": {
        "iterations": 32,
        "episodes_per_iteration": 128,
        "num_generations": 8,
        "mini_batch_size": 64,
        "num_epochs": 2,
        "temperature": 1.0,
        "top_p": 1.0,
        "lr_schedule": "linear",
        "warmup_ratio": 0.03,
        "beta": 1e-4,
        "critic_learning_rate": 3e-4,
    },
    "evaluation": {
        "split": "test",
        "prompts": 512,
        "every": 4,
        "states": 96,
        "rollouts": 256,
        "alternatives": 24,
    },
}
"""The setting. Sampling is without cuts, so that all methods are on-policy but for PPO's epochs."""

METHODS: Final = (
    "PPO", "RLOO", "GRPO", "RestEM", "DPO+", "VinePPO K=1", "VinePPO K=3", "VinePPO K=9",
)  # fmt: skip
VINE: Final = {f"VinePPO K={k}": k for k in (1, 3, 9)}
RATES: Final = (1e-4, 2e-4, 3e-4, 1e-3, 2e-3)
"""Learning rates among which methods were tuned: DPO+ among the last three, RestEM among 1e-4, 3e-4
and 1e-3, all others among the first three (1e-3 had been the ruin of each of them)."""
TUNED: Final = {
    "PPO": 1e-4,
    "RLOO": 2e-4,
    "GRPO": 2e-4,
    "RestEM": 1e-4,
    "DPO+": 1e-3,
    "VinePPO K=1": 3e-4,
    "VinePPO K=3": 1e-4,
    "VinePPO K=9": 2e-4,
}
"""The best for each, by mean validation accuracy along a whole run with seed 100."""


def learn(
    content: Mapping[str, Any], method: str, rate: float, seed: int, *, values: bool = False
) -> dict[str, Any]:
    """One run: a job of the reproduction.

    Args:
        content: a setting, as :data:`LEARNING` is.
        method: one of :data:`METHODS`.
        rate: learning rate of the policy.
        seed: of the prompts and all sampling.
        values: judge the values of the last policy, see :mod:`vineppo.experiments.value_bench`.

    Returns:
        ``curve``: a row for each measurement, the first before training: iteration, gradient steps,
        generated tokens, seconds, accuracy on test prompts (greedy), training accuracy.
        ``end``: accuracy greedy and sampled, and divergence from the start in nats per answer.
        ``values``: reports, if asked for.
    """
    one_of("method", method, METHODS)
    with quiet(), tempfile.TemporaryDirectory() as folder:
        run = _Run(content, method, rate, seed, folder)
        run.train()
        found: dict[str, Any] = {
            "method": method, "rate": rate, "seed": seed, "curve": run.curve, "end": run.end(),
        }  # fmt: skip
        if values:
            found["values"] = run.judged_values()
    return found


class _Run:
    """A trainer and what is measured along its way."""

    def __init__(
        self, content: Mapping[str, Any], method: str, rate: float, seed: int, folder: str
    ) -> None:
        from vineppo.tasks import ChainArithmetic

        self.task = ChainArithmetic(**content["task"])
        self.curve: list[dict[str, float]] = []
        self._evaluation = content["evaluation"]
        self._seed = seed
        start = self.task.sft_model(**content["start"], cache_dir=cache() / "models")
        self._start = copy.deepcopy(start)
        training = dict(content["training"])
        prompts = training["iterations"] * training["episodes_per_iteration"]
        prompts //= training["num_generations"]
        trainer, config, changes = _of_method(method, training)
        allowed = config.__dataclass_fields__
        args = config(
            output_dir=folder,
            **{
                "max_response_tokens": self.task.max_response_tokens,
                "learning_rate": rate,
                "micro_batch_size": 64,
                "eval_temperature": 0.0,
                "eval_top_p": 1.0,
                "seed": seed,
                "use_cpu": True,
                "progress": False,
                **{name: value for name, value in training.items() if name in allowed},
                **changes,
            },
        )
        self._every = max(1, self._evaluation["every"] * args.iterations // training["iterations"])
        self.trainer = trainer(
            start,
            None,
            self.task.reward,
            self.task.examples(prompts, seed, "train"),
            self.task.tokenizer(),
            args,
            eval_dataset=self._examples(self._evaluation["prompts"]),
            callbacks=[self._measuring()],
        )

    def _examples(self, n: int) -> list[dict[str, Any]]:
        return self.task.examples(n, self._seed, self._evaluation["split"])

    def train(self) -> None:
        self._measure(0, {})
        self.trainer.train()

    def _measuring(self) -> Any:
        from transformers import TrainerCallback

        outer = self

        class Measuring(TrainerCallback):
            """Measures after every so many iterations."""

            def on_log(self, args: Any, state: Any, control: Any, **given: Any) -> None:  # noqa: ARG002
                """An iteration or a measurement was logged."""
                logs = given["logs"]
                if "reward" in logs:
                    done = round(logs["epoch"])
                    if done % outer._every == 0 or done == outer.trainer.args.iterations:
                        outer._measure(done, logs)

        return Measuring()

    def _measure(self, done: int, logs: Mapping[str, float]) -> None:
        if self.curve and self.curve[-1]["iteration"] == done:
            return
        found = self.trainer.evaluate()
        self.curve.append(
            {
                "iteration": done,
                "steps": logs.get("total_steps", 0.0),
                "tokens": logs.get("total_generated_tokens", 0.0),
                "seconds": logs.get("total_cpu_seconds", 0.0),
                "accuracy": found["eval_reward"],
                **({"train": logs["reward"]} if "reward" in logs else {}),
                **({"divergence": logs["divergence"]} if "divergence" in logs else {}),
            }
        )

    def end(self) -> dict[str, float]:
        """Accuracy on further test prompts, and how far the policy has gone."""
        from vineppo.experiments.value_bench import Sampling, divergence

        # Every measurement has the first of these prompts.
        rows = self._examples(2 * self._evaluation["prompts"])
        sampling = Sampling(self.trainer.model, self.task, rows)
        drawn = sampling.episodes(1, self._seed)
        return {
            "greedy": float(np.mean(sampling.reward(sampling.episodes(1, self._seed, 0.0)))),
            "sampled": float(np.mean(sampling.reward(drawn))),
            "divergence": divergence(self.trainer.model, self._start, drawn),
        }

    def judged_values(self) -> dict[str, Any]:
        """Reports on values of states of the last policy, on test prompts."""
        from vineppo.experiments.value_bench import Sampling, judge

        rows = self._examples(self._evaluation["prompts"] // 8)
        module = self.trainer.module
        return judge(
            Sampling(self.trainer.model, self.task, rows),
            None if module.head is None else module,
            self._evaluation,
            self._seed,
        )


def _of_method(method: str, training: Mapping[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """Trainer, config class and what the method sets; episodes of the whole run are the same."""
    import vineppo

    if method in VINE:
        return vineppo.VinePPOTrainer, vineppo.VinePPOConfig, {"num_rollouts": VINE[method]}
    if method == "RestEM":  # few large rounds, as in its paper
        changes = {
            "iterations": training["iterations"] // 4,
            "episodes_per_iteration": training["episodes_per_iteration"] * 4,
            "num_epochs": 8,
        }
        return vineppo.RestEMTrainer, vineppo.RestEMConfig, changes
    if method == "DPO+":  # one round
        changes = {
            "iterations": 1,
            "episodes_per_iteration": training["episodes_per_iteration"] * training["iterations"],
            "num_epochs": 3,
        }
        return vineppo.DPOPositiveTrainer, vineppo.DPOPositiveConfig, changes
    trainers = {
        "PPO": (vineppo.PPOTrainer, vineppo.PPOConfig),
        "RLOO": (vineppo.RLOOTrainer, vineppo.RLOOConfig),
        "GRPO": (vineppo.GRPOTrainer, vineppo.GRPOConfig),
    }
    return (*trainers[method], {})


def cache() -> Path:
    """The folder of this user for what can be made again: ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(root) if root else Path.home() / ".cache") / "vineppo"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """One numeric thread, on which sums are the same in every process; no bars of transformers."""
    import torch
    from transformers.utils import logging

    threads, shown = torch.get_num_threads(), logging.is_progress_bar_enabled()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if shown:
            logging.enable_progress_bar()
