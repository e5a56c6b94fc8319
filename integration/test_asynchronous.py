"""A run with an actor in a process of its own, from wheels, by a script without a main guard."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys
import torch
from asyncrlhf import AsyncRLHFConfig, AsyncRLHFTrainer, engines, tasks

torch.set_num_threads(1)
task = tasks.SyntheticSummary(length=3)

def end(placement):
    trainer = AsyncRLHFTrainer(
        model=task.sft_model(steps=2, width=16, layers=1, heads=2),
        reward_funcs=lambda prompt_ids, completion_ids, **_: list(
            task.gold_score(prompt_ids, completion_ids)),
        args=AsyncRLHFConfig(
            output_dir=sys.argv[1], max_steps=3, per_device_train_batch_size=4, report_to="none",
            gradient_accumulation_steps=1, disable_tqdm=True, save_strategy="no", use_cpu=True,
            max_completion_length=task.max_completion_length, learning_rate=1e-3),
        train_dataset=task.prompts(12),
        processing_class=task.tokenizer(),
        engine=engines.HFEngine(placement=placement, threads=1),
    )
    trainer.train()
    assert dict(trainer.report().staleness) == {0: 1, 1: 2}
    return [p.detach().clone() for p in trainer.model.parameters()]

assert all(map(torch.equal, end("process"), end("inline")))
print("equal")
"""


def test_an_asynchronous_run_from_wheels_equals_one_in_a_single_process(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    run = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "equal"


def test_the_command_predicts_a_run_before_it_starts() -> None:
    words = ["simulate", "--g", "1", "--t", "1", "--rounds", "20"]
    run = subprocess.run(
        [sys.executable, "-m", "asyncrlhf", *words], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "21" in run.stdout  # seconds: one to fill the pipeline, then twenty rounds
