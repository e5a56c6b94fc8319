"""Credit assignment from wheels, on data that a sibling ships: found, not imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys
import torch
from decapod.lm import build_model, build_tokenizer
from vineppo import VinePPOConfig, VinePPOTrainer
from vineppo.tasks import GSM8K

torch.set_num_threads(1)
task = GSM8K(split="train")  # no path: the copy that gsm-compose has with it
rows = [row for row in task.examples() if len(row["prompt"]) < 200][:4]
assert not any(name.startswith("gsm_compose") for name in sys.modules)
assert len(GSM8K(split="test").examples()) == 1319

tokenizer = build_tokenizer([row["prompt"] + "#### 0123456789\\n" for row in rows], "char")
trainer = VinePPOTrainer(
    build_model(len(tokenizer), 16, 1, 2, init_std=0.3), None,
    lambda completions, **_: [float(len(text) % 2) for text in completions],  # it solves nothing
    rows, tokenizer,
    VinePPOConfig(
        output_dir=sys.argv[1], iterations=1, episodes_per_iteration=8, num_generations=4,
        num_rollouts=2, segmenter="fixed:6", max_response_tokens=24, temperature=1.0, top_p=1.0,
        mini_batch_size=4, unfinished_score=None, progress=False, use_cpu=True,
    ),
)
(metrics,) = trainer.train().history
print(metrics["rollouts"] >= 2 * metrics["states_unique"], metrics["total_steps"])
"""


def test_vines_grow_on_problems_that_a_sibling_ships(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    run = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[-2:] == ["True", "4.0"]
