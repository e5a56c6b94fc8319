from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sbattn.errors import InvalidInputError
from sbattn.evaluation import between, evaluate_recall, loss_by_position
from sbattn.model import CausalLM, ModelConfig
from sbattn.tasks import IGNORED, MQRAR, Text, staggered_windows
from sbattn.training import StepDone, TrainingConfig, lines, train
from sbattn.writing import whole_file

TASK = MQRAR(keys=2, values=3)
CONFIG = TrainingConfig(steps=9, batch_size=4, length=16, save_every=2)


def _model(attn: Any = "stickbreaking", seed: int = 0) -> CausalLM:
    torch.manual_seed(seed)
    return CausalLM(
        ModelConfig(TASK.vocab_size, hidden_size=16, num_layers=1, num_heads=2, attn=attn)
    )


def _config(**changes: Any) -> TrainingConfig:
    fields = {"steps": 9, "batch_size": 4, "length": 16, "save_every": 2}
    return TrainingConfig(**{**fields, **changes})


class _Interrupted(Exception):  # noqa: N818 - not an error
    pass


def _interrupt_at(step: int) -> Any:
    def on_step(done: StepDone) -> None:
        if done.step == step:
            raise _Interrupted

    return on_step


def test_interrupted_and_resumed_equals_undisturbed_to_the_last_bit(tmp_path: Path) -> None:
    undisturbed, path = _model(), tmp_path / "run.pt"
    losses = train(undisturbed, TASK, CONFIG)
    for stop in (3, 6):  # once between two checkpoints, once at one
        with pytest.raises(_Interrupted):
            train(_model(), TASK, CONFIG, checkpoint=path, on_step=_interrupt_at(stop))
    resumed = _model(seed=1)  # its weights come from the checkpoint
    steps: list[int] = []
    again = train(resumed, TASK, CONFIG, checkpoint=path, on_step=lambda d: steps.append(d.step))
    assert steps == [7, 8, 9]
    assert again == losses
    for name, value in undisturbed.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_a_finished_run_is_only_loaded(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    first = train(_model(), TASK, CONFIG, checkpoint=path)
    assert train(_model(), TASK, CONFIG, checkpoint=path, on_step=_interrupt_at(1)) == first


@pytest.mark.parametrize(
    ("name", "model", "task", "changes"),
    [
        ("model", "rope", TASK, {}),
        ("data", "stickbreaking", MQRAR(keys=3, values=2), {}),
        ("training", "stickbreaking", TASK, {"learning_rate": 1e-3}),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    tmp_path: Path, name: str, model: str, task: MQRAR, changes: dict[str, Any]
) -> None:
    path = tmp_path / "run.pt"
    train(_model(), TASK, _config(steps=2), checkpoint=path)
    with pytest.raises(InvalidInputError, match=f"checkpoint.*its {name} is"):
        train(_model(model), task, _config(steps=2, **changes), checkpoint=path)


def test_a_file_is_left_whole_when_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def write() -> None:
        with whole_file(path) as file:
            file.write(b"half of the n")
            raise _Interrupted

    with pytest.raises(_Interrupted):
        write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_gradients_of_parts_add_up_to_those_of_the_batch() -> None:
    whole, parts = _model(), _model()
    at_once = train(whole, TASK, _config(steps=3))
    in_parts = train(parts, TASK, _config(steps=3, micro_batch=3))  # 3 and 1
    assert in_parts == pytest.approx(at_once, rel=1e-5)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("attn", ["stickbreaking", "rope"])
def test_training_learns_the_task(attn: str) -> None:
    task = MQRAR(keys=1, values=4)  # the value seen last
    torch.manual_seed(0)
    model = CausalLM(ModelConfig(task.vocab_size, 16, 1, 2, attn=attn))  # type: ignore[arg-type]
    config = TrainingConfig(steps=120, batch_size=8, length=16, learning_rate=1e-2)
    losses = train(model, task, config)
    assert losses[0] > 1.0
    assert np.mean(losses[-5:]) < 0.2
    found = evaluate_recall(model, task, (16,))[16]
    assert found.accuracy > 0.95
    assert found.questions == 64 * 7


def test_autocast_trains_in_bfloat16_with_weights_in_float32() -> None:
    model = _model("rope")
    seen: list[torch.dtype] = []
    model.blocks[0].gate.register_forward_hook(lambda *args: seen.append(args[2].dtype))
    losses = train(model, TASK, _config(steps=2, dtype="bfloat16"))
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert losses == pytest.approx(train(_model("rope"), TASK, _config(steps=2)), rel=0.02)


def test_the_rate_goes_through_one_cycle() -> None:
    config = TrainingConfig(steps=100, learning_rate=1.0, warm_up=0.2)
    rates = [config.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 25)
    assert rates[20] == max(rates) == 1.0
    assert rates[:21] == sorted(rates[:21])
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert rates[-1] < 1e-3
    assert TrainingConfig(steps=1, warm_up=0).rate(0) == 3e-3


def test_weight_decay_leaves_vectors_alone() -> None:
    # With a decay this strong, what decays is gone at once.
    model = _model()
    train(model, TASK, _config(steps=4, weight_decay=300.0, learning_rate=3e-3))
    gains = [p for p in model.parameters() if p.ndim == 1]
    assert gains
    assert all(float(p.detach().abs().min()) > 0.9 for p in gains)
    assert float(model.lm_head.weight.detach().abs().max()) < 0.5


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    path, model = tmp_path / "run.pt", _model()

    def spoil(done: StepDone) -> None:
        if done.step == 3:
            with torch.no_grad():
                model.norm.weight.fill_(math.nan)

    with pytest.raises(FloatingPointError, match="step 4"):
        train(model, TASK, CONFIG, checkpoint=path, on_step=spoil)
    assert len(torch.load(path, weights_only=True)["losses"]) == 2


@pytest.mark.parametrize(
    ("name", "value"),
    [("steps", 0), ("micro_batch", 0), ("learning_rate", 0.0), ("clip", -1.0), ("seed", -1),
     ("warm_up", 2.0), ("dtype", "float16")],
)  # fmt: skip
def test_settings_out_of_range_are_refused(name: str, value: Any) -> None:
    with pytest.raises(InvalidInputError, match=name):
        TrainingConfig(**{name: value})


def test_progress_tells_the_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    tell = lines(every=0.0)
    tell(StepDone(5, 10, 1.25, 3e-3, 1000.0, 3725.0))
    written = capsys.readouterr()
    assert written.out == ""
    assert "step 5/10  loss 1.2500" in written.err
    assert "1:02:05 left" in written.err


class _Fake(nn.Module):
    """Logits of a rule, behind the face of a model."""

    def __init__(self, rule: Any) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))
        self.rule = rule

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.rule(tokens)
        return logits


def test_recall_counts_right_answers() -> None:
    def solved(tokens: Tensor) -> Tensor:
        logits = torch.zeros(*tokens.shape, TASK.vocab_size)
        for row, sequence in enumerate(tokens.tolist()):
            latest: dict[int, int] = {}
            for at in range(0, len(sequence), 2):
                logits[row, at, latest.get(sequence[at], 0)] = 50.0
                if at + 1 < len(sequence):
                    latest[sequence[at]] = sequence[at + 1]
        return logits

    right: Any = _Fake(solved)
    blind: Any = _Fake(lambda tokens: torch.ones(*tokens.shape, TASK.vocab_size))
    lengths = (9, 16, 64)
    for length, found in evaluate_recall(right, TASK, lengths).items():
        assert found.accuracy == 1.0, length
    for found in evaluate_recall(blind, TASK, lengths).values():
        assert found.loss == pytest.approx(math.log(TASK.vocab_size))
    batch = TASK.draw(np.random.default_rng((0, 1, 9)), 64, 9)
    assert evaluate_recall(blind, TASK, (9,))[9].questions == int((batch.targets != IGNORED).sum())


def test_without_context_the_loss_is_the_same_at_every_position() -> None:
    # Plain windows would not do this: other tokens would stand at other positions.
    document = np.random.default_rng(0).integers(5, size=400)
    table = torch.randn(5, generator=torch.Generator().manual_seed(0))
    model: Any = _Fake(lambda tokens: table.expand(*tokens.shape, 5))
    stretches = staggered_windows([document], 32, 8, 3, 2)
    losses = loss_by_position(model, stretches, 8, at_once=40)
    assert len(losses) == 4
    assert losses == pytest.approx([losses[0]] * 4, abs=1e-7)


def test_losses_stand_at_the_positions_where_they_arise() -> None:
    def rule(tokens: Tensor) -> Tensor:
        # The token 0 gets a logit that grows with the position.
        logits = torch.zeros(*tokens.shape, 3)
        logits[..., 0] = torch.arange(tokens.shape[1], dtype=torch.float32) / 10
        return logits

    model: Any = _Fake(rule)
    losses = loss_by_position(model, staggered_windows([np.zeros(200, int)], 32, 8, 3, 1), 8)
    at = np.arange(32) / 10
    expected = np.log(np.exp(at) + 2) - at
    assert losses == pytest.approx(expected.reshape(4, 8).mean(axis=1).tolist(), rel=1e-5)
    assert between(losses, 8, 16, 32) == pytest.approx(expected[16:].mean(), rel=1e-5)
    with pytest.raises(InvalidInputError, match="start, end"):
        between(losses, 8, 4, 16)


def test_a_text_is_learned_as_any_task() -> None:
    text = Text(np.tile(np.arange(4), 50), TASK.vocab_size, "0123")
    assert np.mean(train(_model(), text, _config(steps=60))[-5:]) < 0.2


def test_a_damaged_checkpoint_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    train(_model(), TASK, CONFIG, checkpoint=path)
    whole = path.read_bytes()
    for content in (b"", b"no checkpoint", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(InvalidInputError, match=r"run\.pt is damaged"):
            train(_model(), TASK, CONFIG, checkpoint=path)
        assert path.read_bytes() == content


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said_before_training() -> None:
    with pytest.raises(InvalidInputError, match="no GPU is here"):
        train(_model(), TASK, _config(device="cuda"))
