"""One rank of several: `python ranks_run.py FOLDER` in the environment that a launcher makes.

It makes the runs below one after another, each rank with an output folder of its own, and leaves
what came of them in FOLDER/RUN-R.pt.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import tiny_runs
from vineppo.errors import RewardError

# Each has a mini-batch with fewer units than ranks, or held-out units that are fewer.
RUNS: dict[str, dict[str, Any]] = {
    "VinePPO": {"mini_batch_size": 7},
    "PPO": {"mini_batch_size": 7, "critic_learning_rate": 3e-2},
    "DPOPositive": {"mini_batch_size": 2, "max_pairs_per_prompt": 3},
    "RestEM": {
        "episodes_per_iteration": 16,
        "validation_share": 0.25,
        "max_correct_per_prompt": 1,
    },
}


def trainer(method: str, folder: Path) -> Any:
    """A run that evaluates and saves."""
    changes = {"eval_every": 2, "save_every": 1, "log_every": 2, **RUNS[method]}
    extra = {"eval_dataset": tiny_runs.ROWS[:3]}
    return tiny_runs.trainer(method, folder, extra=extra, **changes)


def noting(sizes: list[int], method: Callable[..., Any]) -> Callable[..., Any]:
    """The method of a learner, which notes how many units it gets."""

    def noted(units: Sequence[Any], *rest: Any) -> Any:
        sizes.append(len(units))
        return method(units, *rest)

    return noted


def raising(episodes: Sequence[Any]) -> list[float]:
    """A reward."""
    raise RewardError(f"reward_funcs: no scores for {len(episodes)} answers")


def main() -> None:
    """Every run, and one whose reward function fails on the last rank alone."""
    torch.set_num_threads(1)
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    for method in RUNS:
        run = trainer(method, folder / f"{method}-{rank}")
        learner, sizes = run._learner, []
        learner.step = noting(sizes, learner.step)
        learner.loss_of = noting(sizes, learner.loss_of)
        run.train()
        module = run.module
        found = {
            "parameters": {n: p.detach() for n, p in module.named_parameters()},
            "history": tiny_runs.history(run),
            "sizes": sizes,
            "ranks": run.accelerator.num_processes,
        }
        torch.save(found, folder / f"{method}-{rank}.pt")
    failing = tiny_runs.trainer("RLOO", folder / f"failing-{rank}")
    if rank:
        failing.reward = raising
    try:
        failing.train()
    except RewardError as error:
        (folder / f"failing-{rank}.txt").write_text(str(error), encoding="utf-8")


if __name__ == "__main__":
    main()
