"""A small run whose end must always be the same, bit for bit; also a script for other processes.

`python replay_run.py FOLDER key=value …` trains with checkpoints in FOLDER, prints the actor's pid
as soon as there is one, and the digest of the weights at the end.
"""

from __future__ import annotations

import ast
import hashlib
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from asyncrlhf.config import AsyncRLHFConfig
from asyncrlhf.engines import HFEngine
from asyncrlhf.trainer import AsyncRLHFTrainer
from decapod.lm import build_model, build_tokenizer

WORDS = "abcdefgh"
PROMPTS = [" ".join(WORDS[(i + j) % 8] for j in range(3)) for i in range(12)]
EOS = 2
RATE = 2e-3


def tokenizer() -> Any:
    """Characters."""
    return build_tokenizer([" ".join(WORDS)], "char")


def model() -> Any:
    """One layer, uneven distributions."""
    size = len(tokenizer())
    return build_model(size, hidden_size=16, layers=1, heads=2, max_positions=16, init_std=0.3)


def score(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Smooth enough that two completions seldom tie."""
    return [sum(ids) / 10 - 0.05 * len(ids) ** 2 for ids in completion_ids]


def settings(folder: Path, **changes: Any) -> AsyncRLHFConfig:
    """Six steps of four prompts."""
    chosen: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "learning_rate": RATE,
        "max_completion_length": 5,
        "max_steps": 6,
        "missing_eos_score": None,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "optim": "adamw_torch",
        "use_cpu": True,
        "logging_steps": 1000,
    }
    return AsyncRLHFConfig(**{**chosen, **changes})


def trainer(
    args: AsyncRLHFConfig, engine: Any, policy: Any = None, **more: Any
) -> AsyncRLHFTrainer:
    """The run."""
    chosen: dict[str, Any] = {
        "reward_funcs": score,
        "train_dataset": [{"prompt": prompt} for prompt in PROMPTS],
        "processing_class": tokenizer(),
    }
    return AsyncRLHFTrainer(
        model=model() if policy is None else policy, args=args, engine=engine, **{**chosen, **more}
    )


def digest(policy: Any) -> str:
    """SHA-256 of all parameters, bit for bit."""
    found = hashlib.sha256()
    for name, value in policy.named_parameters():
        found.update(name.encode())
        found.update(value.detach().numpy().tobytes())
    return found.hexdigest()


class Sleeping:
    """An engine that dawdles at random; everything else is the engine's own."""

    def __init__(self, engine: HFEngine, seed: int, longest: float = 0.05) -> None:
        self._engine = engine
        self._chance = random.Random(seed)
        self._longest = longest

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def generate(self, requests: Any) -> Any:
        """As the engine does, but later."""
        time.sleep(self._chance.uniform(0, self._longest))
        yield from self._engine.generate(requests)
        time.sleep(self._chance.uniform(0, self._longest))


class SleepingLearner(TrainerCallback):  # type: ignore[misc]
    """A learner that dawdles at random."""

    def __init__(self, seed: int, longest: float = 0.05) -> None:
        self._chance = random.Random(seed)
        self._longest = longest

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """After every optimizer step."""
        time.sleep(self._chance.uniform(0, self._longest))


class Announced(HFEngine):
    """Says which process the actor is."""

    def attach(self, *args: Any) -> None:
        """Start it, and print its pid."""
        super().attach(*args)
        sys.stdout.write(f"actor {self.pid}\n")
        sys.stdout.flush()


class Announcing(TrainerCallback):  # type: ignore[misc]
    """Says how far the run is."""

    def on_step_end(self, _args: Any, state: Any, *_: Any, **__: Any) -> None:
        """After every optimizer step."""
        sys.stdout.write(f"step {state.global_step}\n")
        sys.stdout.flush()


def main() -> None:
    """Train, print the digest."""
    torch.set_num_threads(1)
    # A shell that starts tests in the background has them ignore it, and Python then leaves it so.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    folder, *words = sys.argv[1:]
    changes = {k: ast.literal_eval(v) for k, v in (word.split("=", 1) for word in words)}
    resume = changes.pop("resume", False)
    dawdle = changes.pop("dawdle", 0.0)
    run = trainer(
        settings(Path(folder), **changes),
        Announced(placement="process", threads=1),
        callbacks=[Announcing(), SleepingLearner(0, dawdle)],
    )
    run.train(resume_from_checkpoint=resume)
    sys.stdout.write(f"digest {digest(run.model)}\n")


if __name__ == "__main__":
    main()
