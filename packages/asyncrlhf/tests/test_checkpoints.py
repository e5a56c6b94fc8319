"""A run on disk: what is resumed ends as if it had never stopped, or is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("decapod.lm")

import torch

from asyncrlhf import checkpoints
from asyncrlhf.engines import HFEngine
from asyncrlhf.errors import InvalidInputError
from asyncrlhf.trainer import AsyncRLHFTrainer

# peft asks transformers by a name that newer releases warn of.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

STEPS = 6
Make = Callable[..., AsyncRLHFTrainer]


class Counting(HFEngine):
    """Counts the rounds that it generates."""

    generated = 0

    def generate(self, requests: Any) -> Any:
        self.generated += 1
        return super().generate(requests)


@pytest.fixture
def made(replay: Any, tmp_path: Path) -> Make:
    """A run with checkpoints after every second step; ``stop`` ends it at a step."""

    class Stop(replay.TrainerCallback):  # type: ignore[misc,name-defined]
        def __init__(self, step: int) -> None:
            self.step = step

        def on_step_end(self, _args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop |= state.global_step == self.step

    def make(
        *, stop: int | None = None, folder: str = "run", placement: Any = "inline", **changes: Any
    ) -> AsyncRLHFTrainer:
        parts = {n: changes.pop(n) for n in ("policy", "peft_config", "callbacks") if n in changes}
        chosen = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 2, "logging_steps": 1}
        args = replay.settings(tmp_path / folder, **{**chosen, **changes})
        if stop is not None:
            parts.setdefault("callbacks", []).append(Stop(stop))
        run: AsyncRLHFTrainer = replay.trainer(args, Counting(placement=placement), **parts)
        return run

    return make


def stopped_at_4(made: Make, **changes: Any) -> Path:
    run = made(stop=4, **changes)
    run.train()
    assert run.state.global_step == 4
    return Path(run.args.output_dir) / "checkpoint-4"


def other_layers(replay: Any) -> Any:
    """A model whose parameters are not in the order of the alphabet, and do not all learn."""
    from decapod.lm import build_model

    model = build_model(
        len(replay.tokenizer()), hidden_size=8, layers=11, heads=2, max_positions=16, init_std=0.3
    )
    model.model.layers[3].input_layernorm.weight.requires_grad_(requires_grad=False)
    return model


# --- resuming -------------------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [0, 1, 2])
@pytest.mark.parametrize("placement", ["inline", "thread"])
def test_a_resumed_run_ends_bit_for_bit_as_an_undisturbed_one(
    replay: Any, made: Make, ahead: int, placement: str
) -> None:
    undisturbed = made(folder="whole", rounds_ahead=ahead)
    undisturbed.train()
    stopped_at_4(made, rounds_ahead=ahead, placement=placement)
    resumed = made(rounds_ahead=ahead, placement=placement)
    output = resumed.train(resume_from_checkpoint=True)
    assert output.global_step == STEPS
    assert replay.digest(resumed.model) == replay.digest(undisturbed.model)
    for name in ("loss", "reward", "learning_rate", "staleness", "ess"):
        found, expected = (
            [row[name] for row in run.state.log_history if name in row]
            for run in (resumed, undisturbed)
        )
        assert found == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": "ppo", "minibatches_per_round": 2},
        {"loss": "rloo", "epochs_per_round": 2, "rounds_ahead": 2},
        {"lr_scheduler_type": "cosine", "warmup_steps": 2},
        {"stale_policy": "drop", "max_staleness": 2, "minibatches_per_round": 2},
        {"bf16": True},
    ],
)
def test_any_settings_resume(replay: Any, made: Make, changes: dict[str, Any]) -> None:
    undisturbed = made(folder="whole", max_steps=8, **changes)
    undisturbed.train()
    checkpoint = stopped_at_4(made, max_steps=8, **changes)
    resumed = made(max_steps=8, **changes)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert replay.digest(resumed.model) == replay.digest(undisturbed.model)


def test_the_order_of_parameters_in_a_file_does_not_matter(replay: Any, made: Make) -> None:
    undisturbed = made(folder="whole", policy=other_layers(replay))
    undisturbed.train()
    stopped_at_4(made, policy=other_layers(replay))
    resumed = made(policy=other_layers(replay))
    resumed.train(resume_from_checkpoint=True)
    assert replay.digest(resumed.model) == replay.digest(undisturbed.model)


def test_an_adapter_resumes(replay: Any, made: Make) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    undisturbed = made(folder="whole", peft_config=config)
    undisturbed.train()
    checkpoint = stopped_at_4(made, peft_config=config)
    sizes = {path.name: path.stat().st_size for path in checkpoint.iterdir()}
    assert sizes["weights-4.safetensors"] < 4000  # the adapter alone
    assert "adapter_model.safetensors" in sizes
    resumed = made(peft_config=config)
    resumed.train(resume_from_checkpoint=True)
    assert replay.digest(resumed.model) == replay.digest(undisturbed.model)


def test_rounds_in_flight_are_restored_and_not_generated_again(made: Make) -> None:
    checkpoint = stopped_at_4(made, rounds_ahead=2)
    record = json.loads((checkpoint / "asyncrlhf.json").read_text())
    # An inline engine has finished all it was asked for: the two rounds that remain.
    assert [done["index"] for done in record["finished"]] == [4, 5]
    resumed = made(rounds_ahead=2)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.engine.generated == 0


def test_rounds_that_were_not_finished_are_generated_again(made: Make, replay: Any) -> None:
    undisturbed = made(folder="whole", rounds_ahead=2)
    undisturbed.train()
    checkpoint = stopped_at_4(made, rounds_ahead=2)
    path = checkpoint / "asyncrlhf.json"
    record = json.loads(path.read_text())
    del record["finished"][0]
    path.write_text(json.dumps(record))
    resumed = made(rounds_ahead=2)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.engine.generated == 1
    assert replay.digest(resumed.model) == replay.digest(undisturbed.model)


def test_a_run_that_is_over_resumes_to_its_end(replay: Any, made: Make) -> None:
    run = made()
    run.train()
    again = made()
    output = again.train(resume_from_checkpoint=True)
    assert output.global_step == STEPS
    assert replay.digest(again.model) == replay.digest(run.model)


def test_what_a_checkpoint_holds_loads_in_transformers(replay: Any, made: Make) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    checkpoint = stopped_at_4(made, max_steps=4)
    run = made(max_steps=4)
    run.train(resume_from_checkpoint=True)
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert replay.digest(loaded) == replay.digest(run.model)
    AutoTokenizer.from_pretrained(checkpoint)


# --- which there are ------------------------------------------------------------------------------


def test_only_so_many_checkpoints_are_kept(made: Make) -> None:
    run = made(save_steps=1, save_total_limit=2)
    run.train()
    folder = Path(run.args.output_dir)
    assert {path.name for path in folder.iterdir()} == {"checkpoint-5", "checkpoint-6"}


def test_the_checkpoint_just_written_outlives_those_of_an_earlier_run(tmp_path: Path) -> None:
    for step in (1, 3, 50, 60):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "asyncrlhf.json").write_text("{}")
    written = tmp_path / "checkpoint-1"
    checkpoints.prune(tmp_path, None, written)
    assert len(list(tmp_path.iterdir())) == 4
    checkpoints.prune(tmp_path, 9, written)
    assert len(list(tmp_path.iterdir())) == 4
    checkpoints.prune(tmp_path, 2, written)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-1", "checkpoint-60"}


def test_the_end_of_a_run_is_saved_unless_nothing_is(made: Make) -> None:
    run = made(save_steps=5)
    run.train()
    names = {path.name for path in Path(run.args.output_dir).iterdir()}
    assert names == {"checkpoint-5", "checkpoint-6"}
    none = made(folder="none", save_strategy="no")
    none.train()
    assert not Path(none.args.output_dir).exists()


def test_a_checkpoint_falls_on_the_end_of_a_round(made: Make) -> None:
    run = made(minibatches_per_round=3, save_steps=2)  # due at 2, 4 and 6
    run.train()
    names = {path.name for path in Path(run.args.output_dir).iterdir()}
    assert names == {"checkpoint-3", "checkpoint-6"}


# --- what is refused ------------------------------------------------------------------------------


def test_other_settings_are_refused_by_name(made: Make) -> None:
    stopped_at_4(made)
    run = made(num_generations=3, temperature=0.9)
    with pytest.raises(InvalidInputError) as caught:
        run.train(resume_from_checkpoint=True)
    message = str(caught.value)
    assert "num_generations was 2 and is 3" in message
    assert "temperature was 0.7 and is 0.9" in message


@pytest.mark.parametrize(
    "changes",
    [
        {"learning_rate": 1e-3}, {"rounds_ahead": 0}, {"loss": "ipo"}, {"seed": 1},
        {"max_steps": 8}, {"warmup_steps": 1}, {"adam_beta2": 0.9}, {"shuffle_prompts": False},
        {"bf16": True}, {"reward_weights": [2.0]},
    ],
)  # fmt: skip
def test_all_that_a_result_depends_on_is_compared(made: Make, changes: dict[str, Any]) -> None:
    stopped_at_4(made)
    with pytest.raises(InvalidInputError, match=r"other settings: .* was .* and is "):
        made(**changes).train(resume_from_checkpoint=True)


def test_what_no_result_depends_on_may_change(made: Make) -> None:
    stopped_at_4(made)
    run = made(logging_steps=3, save_steps=1, round_timeout=99.0, placement="thread")
    assert run.train(resume_from_checkpoint=True).global_step == STEPS


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "state.pt").write_bytes(b"PK\x03\x04 and no more"),
        lambda folder: (folder / "state.pt").write_bytes((folder / "state.pt").read_bytes()[:900]),
        lambda folder: (folder / "state.pt").write_bytes(b""),
        lambda folder: (folder / "state.pt").unlink(),
        lambda folder: (folder / "weights-3.safetensors").unlink(),
        lambda folder: (folder / "weights-4.safetensors").write_bytes(b"x" * 20),
        lambda folder: (folder / "weights-4.safetensors").write_bytes(
            (folder / "weights-4.safetensors").read_bytes()[:-9]
        ),
        lambda folder: (folder / "trainer_state.json").unlink(),
        lambda folder: (folder / "asyncrlhf.json").write_text('{"format": 1, "rounds'),
        lambda folder: (folder / "asyncrlhf.json").write_text("[]"),
        lambda folder: (folder / "asyncrlhf.json").write_text('{"format": 1}'),
    ],
)
def test_a_damaged_checkpoint_is_refused(made: Make, damage: Callable[[Path], Any]) -> None:
    checkpoint = stopped_at_4(made)
    damage(checkpoint)
    run = made()
    with pytest.raises(InvalidInputError, match=r"resume_from_checkpoint: .*checkpoint-4"):
        run.train(resume_from_checkpoint=str(checkpoint))
    assert run.engine.generated == 0


def test_a_half_written_checkpoint_is_passed_over(replay: Any, made: Make) -> None:
    undisturbed = made(folder="whole")
    undisturbed.train()
    checkpoint = stopped_at_4(made)
    shutil.move(checkpoint, checkpoint.with_name(".checkpoint-4.partial"))
    resumed = made()
    resumed.train(resume_from_checkpoint=True)  # from step 2
    assert replay.digest(resumed.model) == replay.digest(undisturbed.model)
    names = {path.name for path in checkpoint.parent.iterdir()}
    assert names == {"checkpoint-2", "checkpoint-4", "checkpoint-6"}


@pytest.mark.parametrize("there", [True, False])
def test_resuming_without_a_checkpoint_says_so(made: Make, there: bool) -> None:
    run = made()
    if there:
        Path(run.args.output_dir).mkdir()
    with pytest.raises(InvalidInputError, match=r"no checkpoint in .*start anew"):
        run.train(resume_from_checkpoint=True)


def test_a_folder_that_is_no_checkpoint_is_refused(made: Make, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="is no whole checkpoint"):
        made().train(resume_from_checkpoint=str(tmp_path))


def test_a_checkpoint_of_another_format_is_refused(made: Make) -> None:
    checkpoint = stopped_at_4(made)
    path = checkpoint / "asyncrlhf.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 99'))
    with pytest.raises(InvalidInputError, match="has format 99, expected 1"):
        made().train(resume_from_checkpoint=True)


def test_a_model_of_another_size_is_refused(replay: Any, made: Make) -> None:
    stopped_at_4(made)
    with pytest.raises(InvalidInputError, match="parameters was"):
        made(policy=other_layers(replay)).train(resume_from_checkpoint=True)


def test_writing_that_fails_leaves_the_earlier_checkpoint(
    made: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made()

    def fail(*_: Any, **__: Any) -> None:
        if run.state.global_step == 4:
            raise OSError("disk full")

    whole = torch.save
    monkeypatch.setattr(torch, "save", lambda *a, **k: (fail(), whole(*a, **k)))
    with pytest.raises(OSError, match="disk full"):
        run.train()
    monkeypatch.undo()
    folder = Path(run.args.output_dir)
    assert checkpoints.newest(folder) == folder / "checkpoint-2"
    assert made().train(resume_from_checkpoint=True).global_step == STEPS
