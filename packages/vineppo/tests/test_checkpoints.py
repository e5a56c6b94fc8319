"""Runs on disk: whole or not at all, resumed bit for bit, and refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("decapod.lm")
pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from vineppo import checkpoints
from vineppo.errors import InvalidInputError

RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "VinePPO": ("VinePPO", {"adaptive_pilot": 2, "num_rollouts": 4}),
    "PPO": ("PPO", {}),
    "shared": ("PPO", {"critic": "shared"}),
    "RestEM": ("RestEM", {"restart": True, "validation_share": 0.5, "num_epochs": 3}),
    "DPOPositive": ("DPOPositive", {"learning_rate": 1e-3}),
}


class Interrupt(TrainerCallback):  # type: ignore[misc]
    """Presses Ctrl-C at an optimizer step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def start(tiny: Any, name: str, folder: Path, **how: Any) -> Any:
    method, changes = RUNS[name]
    return tiny.trainer(method, folder, **{"iterations": 3, "save_every": 1, **changes, **how})


def everything(run: Any) -> dict[str, Tensor]:
    """Parameters of policy and critic, and the optimizer's moments."""
    module = run.module
    found = {name: value.detach().clone() for name, value in module.named_parameters()}
    for place, state in run._learner.optimizer.state_dict()["state"].items():
        found |= {f"{place}.{name}": torch.as_tensor(value) for name, value in state.items()}
    return found


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


@pytest.mark.parametrize("name", list(RUNS))
def test_an_interrupted_run_resumes_bit_for_bit(tiny: Any, tmp_path: Path, name: str) -> None:
    whole = start(tiny, name, tmp_path / "whole", save_every=0)
    result = whole.train()
    steps = [int(row["total_steps"]) for row in whole.history]
    assert steps[0] < steps[1] < steps[2] == result.steps

    halt = Interrupt(steps[0] + 1)  # after the first step of the second iteration
    cut = start(tiny, name, tmp_path / "cut", extra={"callbacks": [halt]})
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    assert {p.name for p in (tmp_path / "cut").iterdir()} == {"checkpoint-1", "settings.json"}

    resumed = start(tiny, name, tmp_path / "cut")
    again = resumed.train(resume_from_checkpoint=True)
    assert (again.iterations, again.steps) == (3, result.steps)
    assert equal(everything(resumed), everything(whole))
    assert tiny.history(resumed) == tiny.history(whole)
    logged = [
        [{k: v for k, v in row.items() if "seconds" not in k} for row in run.state.log_history]
        for run in (resumed, whole)
    ]
    assert logged[0] == logged[1]
    generated = [run.history[-1]["total_generated_tokens"] for run in (resumed, whole)]
    assert generated[0] == generated[1]


def test_a_finished_run_resumes_to_itself(tiny: Any, tmp_path: Path) -> None:
    whole = start(tiny, "VinePPO", tmp_path)
    whole.train()
    again = start(tiny, "VinePPO", tmp_path)
    result = again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert (result.iterations, result.history) == (3, whole.history)
    assert equal(everything(again), everything(whole))


def test_checkpoints_are_models_for_everybody(tiny: Any, tmp_path: Path) -> None:
    run = start(tiny, "PPO", tmp_path)
    run.train()
    run.save_model(tmp_path / "final")
    for folder in ("checkpoint-3", "final"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        for name, value in tiny.parameters(run).items():
            assert torch.equal(model.get_parameter(name), value)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / folder)
        assert tokenizer("12=\n")["input_ids"] == tiny.tokenizer()("12=\n")["input_ids"]
        assert tokenizer.eos_token_id == tiny.EOS


@pytest.mark.parametrize(("keep", "left"), [(None, {1, 2, 3}), (2, {2, 3}), (1, {3})])
def test_the_newest_checkpoints_are_kept(
    tiny: Any, tmp_path: Path, keep: int | None, left: set[int]
) -> None:
    start(tiny, "DPOPositive", tmp_path, save_total_limit=keep).train()
    found = {path.name for path in tmp_path.iterdir()} - {"settings.json"}
    assert found == {f"checkpoint-{number}" for number in left}


def test_numbers_of_checkpoints_are_no_words(tmp_path: Path) -> None:
    for number in (9, 10, 8):
        write(tmp_path, number, keep=2)
    assert checkpoints.newest(tmp_path) == tmp_path / "checkpoint-10"
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-8", "checkpoint-10"}


def write(
    folder: Path,
    iterations: int,
    *,
    keep: int | None = None,
    settings: dict[str, Any] | None = None,
    write_model: Callable[[Path], None] = lambda _: None,
) -> Path:
    return checkpoints.save(
        folder,
        iterations,
        parameters={"weight": torch.arange(3.0) + iterations},
        state={"steps": 5},
        record={"history": [{"reward": 0.1}]},
        settings={"seed": 0, "betas": (0.9, 0.99)} if settings is None else settings,
        write_model=write_model,
        keep=keep,
    )


def test_a_checkpoint_that_was_not_finished_does_not_exist(tmp_path: Path) -> None:
    write(tmp_path, 1)

    def stopped(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half of it")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, 2, write_model=stopped, keep=1)
    assert checkpoints.newest(tmp_path) == tmp_path / "checkpoint-1"
    assert not (tmp_path / "checkpoint-2").exists()
    write(tmp_path, 2, keep=1)  # what was left of it is in nobody's way
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    assert {path.name for path in (tmp_path / "checkpoint-2").iterdir()} == {
        "vineppo.json", "state.pt", "trained.safetensors",
    }  # fmt: skip


def test_a_checkpoint_gives_back_what_was_saved(tmp_path: Path) -> None:
    settings = {"seed": 0, "betas": (0.9, 0.99)}
    resumed = checkpoints.load(write(tmp_path, 4, settings=settings), settings)
    assert resumed.iterations == 4
    assert torch.equal(resumed.parameters["weight"], torch.tensor([4.0, 5.0, 6.0]))
    assert (resumed.state, resumed.record) == ({"steps": 5}, {"history": [{"reward": 0.1}]})


def test_other_settings_are_named(tiny: Any, tmp_path: Path) -> None:
    start(tiny, "VinePPO", tmp_path, iterations=1).train()
    for changes, told in [
        ({"num_rollouts": 5}, "num_rollouts was 4 and is 5"),
        ({"learning_rate": 0.5}, "learning_rate was 0.01 and is 0.5"),
        ({"iterations": 9}, "iterations was 1 and is 9"),
        ({"seed": 2, "gamma": 0.5}, "gamma was 1.0 and is 0.5, seed was 0 and is 2"),
    ]:
        run = start(tiny, "VinePPO", tmp_path, **{"iterations": 1, **changes})
        before = tiny.parameters(run)
        with pytest.raises(InvalidInputError, match=f"resume_from_checkpoint: .*{told}"):
            run.train(resume_from_checkpoint=True)
        assert equal(tiny.parameters(run), before)
    with pytest.raises(InvalidInputError, match="trainer was 'VinePPOTrainer' and is 'PPOTrainer'"):
        start(tiny, "PPO", tmp_path, iterations=1).train(resume_from_checkpoint=True)
    # What is shown, and where it is written, may change.
    other = start(
        tiny, "VinePPO", tmp_path / "other", iterations=1, save_every=7, log_every=3, eval_samples=5
    )
    other.train(resume_from_checkpoint=tmp_path / "checkpoint-1")


def test_parameters_of_another_model_are_refused(tiny: Any, tmp_path: Path) -> None:
    start(tiny, "PPO", tmp_path, iterations=1).train()
    run = start(tiny, "PPO", tmp_path, iterations=1, of=tiny.model(intermediate=32))
    with pytest.raises(InvalidInputError, match=r"parameters: .*other names or shapes"):
        run.train(resume_from_checkpoint=True)


@pytest.fixture(scope="module")
def saved(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    start(tiny, "RestEM", folder, iterations=1).train()
    return folder / "checkpoint-1"


@pytest.mark.parametrize("name", ["vineppo.json", "state.pt", "trained.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "empty", "half", "other"])
def test_damaged_checkpoints_are_refused(
    tiny: Any, saved: Path, tmp_path: Path, name: str, damage: str
) -> None:
    folder = tmp_path / "checkpoint-1"
    shutil.copytree(saved, folder)
    content = (folder / name).read_bytes()
    if damage == "missing":
        (folder / name).unlink()
    else:
        changed = {"empty": b"", "half": content[: len(content) // 2], "other": b"[1, 2]"}
        (folder / name).write_bytes(changed[damage])
    run = start(tiny, "RestEM", tmp_path / "run", iterations=1)
    with pytest.raises(InvalidInputError, match=r"resume_from_checkpoint: .*no whole checkpoint"):
        run.train(resume_from_checkpoint=folder)
    assert not (tmp_path / "run").exists()


def test_formats_of_the_future_are_refused(tiny: Any, saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-1"
    shutil.copytree(saved, folder)
    content = json.loads((folder / "vineppo.json").read_text())
    (folder / "vineppo.json").write_text(json.dumps({**content, "format": 2}))
    with pytest.raises(InvalidInputError, match="has format 2, expected 1; resume it with"):
        checkpoints.load(folder, content["settings"])


def test_there_must_be_something_to_resume(tiny: Any, tmp_path: Path) -> None:
    run = start(tiny, "RestEM", tmp_path / "none")
    with pytest.raises(InvalidInputError, match="resume_from_checkpoint: expected a checkpoint in"):
        run.train(resume_from_checkpoint=True)
    with pytest.raises(InvalidInputError, match=r"resume_from_checkpoint: .*no whole checkpoint"):
        run.train(resume_from_checkpoint=tmp_path / "missing")
    assert not (tmp_path / "none").exists()
    assert checkpoints.newest(tmp_path) is None
