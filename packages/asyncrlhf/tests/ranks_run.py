"""One rank of several: `python ranks_run.py FOLDER` in the environment that a launcher makes.

It makes the runs below one after another and writes what came of them to FOLDER/rank-R.json, and
the weights of each run to FOLDER/RUN-R.pt.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

import replay_run
from asyncrlhf.engines import FakeEngine, HFEngine

RUNS: dict[str, dict[str, Any]] = {
    "online_dpo": {"loss": "online_dpo"},
    "ppo": {"loss": "ppo", "num_generations": 1, "minibatches_per_round": 2},
}
ROWS = [{"prompt": prompt} for prompt in replay_run.PROMPTS]


class Noting(HFEngine):
    """Knows whether it was used."""

    used = False

    def attach(self, *args: Any) -> None:
        """See the engine."""
        self.used = True
        super().attach(*args)


def trainer(
    folder: Path,
    prompts: int,
    engine: Any = None,
    reward: Any = replay_run.score,
    **changes: Any,
) -> Any:
    """A run with all that rank 0 does alone: generation, rewards, evaluation, checkpoints.

    A step has four prompts, ``prompts`` of them on every rank.
    """
    chosen = {
        "per_device_train_batch_size": prompts,
        "save_strategy": "steps",
        "save_steps": 4,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "logging_steps": 1,
    }
    return replay_run.trainer(
        replay_run.settings(folder, **{**chosen, **changes}),
        Noting(placement="thread") if engine is None else engine,
        reward_funcs=reward,
        eval_dataset=ROWS[:4],
    )


def history(run: Any) -> list[dict[str, float]]:
    """What was logged, without times and without means over pairs or tokens of each part."""
    return [
        {
            name: value
            for name, value in row.items()
            if "time" not in name and (name.endswith("max") or not name.startswith("loss/"))
        }
        for row in run.state.log_history
    ]


def main() -> None:
    """Every run, then runs that fail on rank 0."""
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    rank = 0
    found: dict[str, Any] = {}
    calls = 0

    def counted(completion_ids: list[list[int]], **_: Any) -> list[float]:
        nonlocal calls
        calls += 1
        return replay_run.score(completion_ids)

    counted.__name__ = "score"
    for name, changes in RUNS.items():
        run = trainer(folder / name, 2, reward=counted, **changes)
        rank = PartialState().process_index
        run.train()
        torch.save(dict(run.model.state_dict()), folder / f"{name}-{rank}.pt")
        found[name] = {
            "digest": replay_run.digest(run.model),
            "history": history(run),
            "generated": run.engine.used,
        }
    found["calls"] = calls

    def late(completion_ids: list[list[int]], **_: Any) -> list[float]:
        nonlocal calls
        calls += 1
        if calls > 3:
            raise OSError("the judge is out")
        return replay_run.score(completion_ids)

    calls = 0
    failing = FakeEngine(fail_at=[1], vocab_size=len(replay_run.tokenizer()))
    failures = {
        "reward": trainer(folder / "reward", 2, reward=late),
        "engine": trainer(folder / "engine", 2, failing),
        "save": trainer(folder / "save", 2),
    }
    (folder / "save").write_text("in the way of the folder")
    for name, run in failures.items():
        try:
            run.train()
        except Exception as error:  # noqa: BLE001 - all of them are what is to be seen
            found[name] = [type(error).__name__, str(error), run.state.global_step]
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
