"""The trainer as people use it: losses, adapters, batches, callbacks, logs, staleness."""

from __future__ import annotations

import itertools
import logging
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("decapod.lm")

import torch

from asyncrlhf import losses
from asyncrlhf.config import AsyncRLHFConfig
from asyncrlhf.engines import HFEngine
from asyncrlhf.trainer import AsyncRLHFTrainer

# peft asks transformers by a name that newer releases warn of.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

CORRECTIONS = ("truncate_token", "truncate_sequence", "mask_token", "mask_sequence", "decoupled")
Train = Callable[..., AsyncRLHFTrainer]


@pytest.fixture
def trained(replay: Any, tmp_path: Path) -> Train:
    """Makes a run of three steps and trains it."""

    def run(engine: Any = None, **changes: Any) -> AsyncRLHFTrainer:
        given = ("policy", "callbacks", "reward_funcs", "eval_dataset", "peft_config", "ref_model")
        parts = {name: changes.pop(name) for name in given if name in changes}
        args = replay.settings(tmp_path, **{"max_steps": 3, "logging_steps": 1, **changes})
        made = replay.trainer(args, engine or HFEngine(placement="inline"), **parts)
        made.train()
        return made

    return run


def logged(run: AsyncRLHFTrainer, name: str) -> list[float]:
    return [row[name] for row in run.state.log_history if name in row]


def assert_near(one: Any, other: Any, atol: float = 1e-6) -> None:
    torch.testing.assert_close(
        dict(one.named_parameters()), dict(other.named_parameters()), atol=atol, rtol=0
    )


# --- losses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "k"),
    [*((loss, 2) for loss in losses.INFO), ("online_dpo", 4), ("best_of_k", 4), ("rloo", 4)],
)
def test_every_loss_trains_with_finite_numbers(
    replay: Any, trained: Train, loss: str, k: int
) -> None:
    run = trained(loss=loss, num_generations=k, minibatches_per_round=3)
    assert run.state.global_step == 3
    assert replay.digest(run.model) != replay.digest(replay.model())
    rows = [row for row in run.state.log_history if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert all(math.isfinite(value) for value in row.values()), row
        assert {"reward", "kl", "ess", "grad_norm", "learning_rate", "staleness"} <= row.keys()
    # The first step is on the policy itself, which still is the reference.
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert rows[0]["ess"] == pytest.approx(1, abs=1e-5)


def test_one_completion_per_prompt_is_enough_for_ppo(trained: Train) -> None:
    assert trained(loss="ppo", num_generations=1).state.global_step == 3


@pytest.mark.parametrize("loss", ["ppo", "grpo", "rloo", "proximal_rloo"])
@pytest.mark.parametrize("correction", CORRECTIONS)
def test_every_correction_trains_where_it_is_allowed(
    trained: Train, loss: str, correction: str
) -> None:
    try:
        run = trained(loss=loss, is_correction=correction, minibatches_per_round=3)
    except ValueError as error:
        assert "is_correction" in str(error)  # noqa: PT017 - allowed or refused, by the settings
        assert loss in ("rloo", "proximal_rloo")
        return
    assert all(math.isfinite(value) for value in logged(run, "loss"))


def test_the_critic_learns_what_completions_are_worth(trained: Train) -> None:
    def constant(completions: list[str], **_: Any) -> list[float]:
        return [1.0] * len(completions)

    run = trained(
        loss="ppo", kl_coef=0.0, lam=1.0, vf_coef=1.0, learning_rate=1e-2, max_steps=40,
        lr_scheduler_type="constant", reward_funcs=constant, num_generations=1,
    )  # fmt: skip
    values = logged(run, "loss/value_loss")
    assert values[0] == pytest.approx(0.5)  # values start at 0, and the return is 1
    assert max(values[-5:]) < 0.02


# --- the same in other ways -----------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["online_dpo", "ppo", "grpo"])
def test_accumulated_gradients_are_those_of_the_whole_minibatch(trained: Train, loss: str) -> None:
    settings = {"loss": loss, "minibatches_per_round": 2, "max_steps": 4}
    whole = trained(per_device_train_batch_size=4, **settings)
    parts = trained(per_device_train_batch_size=2, gradient_accumulation_steps=2, **settings)
    assert_near(parts.model, whole.model)
    for name in ("loss", "grad_norm", "kl", "ess", "reward"):
        assert logged(parts, name) == pytest.approx(logged(whole, name), rel=1e-4, abs=1e-6)


def checkpointing() -> str:
    """The setting's name, which releases of transformers differ in."""
    known = AsyncRLHFConfig.__dataclass_fields__
    return (
        "activation_checkpointing"
        if "activation_checkpointing" in known
        else "gradient_checkpointing"
    )


@pytest.mark.parametrize("loss", ["online_dpo", "ppo"])
def test_activations_that_are_computed_again_change_nothing(trained: Train, loss: str) -> None:
    plain = trained(loss=loss)
    again = trained(
        loss=loss, eval_dataset=[{"prompt": "a b c"}], eval_strategy="steps", eval_steps=1,
        **{checkpointing(): True},
    )  # fmt: skip
    assert again.model.training
    assert_near(again.model, plain.model)


def test_dropout_is_off_with_and_without_checkpointing(replay: Any, tmp_path: Path) -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    size = len(replay.tokenizer())
    config = GPTNeoXConfig(
        vocab_size=size, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16, hidden_dropout=0.5,
        attention_dropout=0.5, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    for again in (False, True):
        args = replay.settings(tmp_path, **{checkpointing(): again})
        run = replay.trainer(args, HFEngine(placement="inline"), GPTNeoXForCausalLM(config))
        ids = torch.arange(3, 9)[None]
        assert torch.equal(run.model(ids).logits, run.model(ids).logits)


def test_half_precision_compares_like_with_like(trained: Train) -> None:
    engine = HFEngine(placement="inline", dtype="bfloat16")
    run = trained(engine, bf16=True, rounds_ahead=0)
    assert logged(run, "kl")[0] == 0  # policy and reference go through the same kernels
    assert min(logged(run, "ess")) > 0.99
    assert all(parameter.dtype == torch.float32 for parameter in run.model.parameters())


def test_a_model_in_half_precision_can_be_sent_to_an_actor(trained: Train) -> None:
    from asyncrlhf.processes import packed

    class Packing(HFEngine):
        def attach(self, model: Any, eos_token_ids: Any) -> None:
            packed(model, "the model")
            super().attach(model, eos_token_ids)

    run = trained(Packing(placement="inline"), bf16=True)
    run.train()  # and again, when the model has been trained


def test_rewards_in_a_process_of_their_own_change_nothing(replay: Any, trained: Train) -> None:
    plain = trained()
    apart = trained(HFEngine(placement="thread"), scoring="process")
    assert replay.digest(apart.model) == replay.digest(plain.model)
    assert logged(apart, "reward") == logged(plain, "reward")
    assert all(seconds > 0 for seconds in logged(apart, "time/score"))


def test_a_trainer_trains_twice(trained: Train) -> None:
    run = trained()
    run.train()
    assert run.state.global_step == 3
    assert len(run.report().times) == 6


# --- adapters -------------------------------------------------------------------------------------


def lora() -> Any:
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)


class Recording(HFEngine):
    """Keeps the names of what it was given."""

    names: list[str]

    def load_weights(self, source: Any, version: int) -> None:
        self.names = [name for name, _ in source]
        super().load_weights(source, version)


def test_an_adapter_trains_and_is_all_that_is_published(replay: Any, trained: Train) -> None:
    engine = Recording(placement="inline")
    run = trained(engine, peft_config=lora(), learning_rate=1e-2)
    assert len(engine.names) == 4
    assert all("lora_" in name for name in engine.names)
    base = dict(replay.model().named_parameters())
    for name, value in run.model.get_base_model().named_parameters():
        if "lora_" not in name:
            assert torch.equal(value, base[name.replace(".base_layer", "")])
    moved = [v for n, v in run.model.named_parameters() if "lora_B" in n]
    assert all(value.abs().sum() > 0 for value in moved)


def test_the_reference_of_an_adapter_is_the_model_without_it(replay: Any, trained: Train) -> None:
    run = trained(peft_config=lora(), learning_rate=1e-2, max_steps=4)
    assert run.ref_model is None
    kl = logged(run, "kl")
    assert kl[0] == pytest.approx(0, abs=1e-5)
    assert abs(kl[-1]) > 1e-3
    # With the same base given as a model of its own nothing changes.
    given = trained(peft_config=lora(), learning_rate=1e-2, max_steps=4, ref_model=replay.model())
    assert_near(given.model, run.model)


def test_an_adapter_starts_the_same_whatever_was_drawn_before(trained: Train, replay: Any) -> None:
    torch.manual_seed(1)
    one = trained(peft_config=lora())
    torch.manual_seed(2)
    other = trained(peft_config=lora())
    assert replay.digest(one.model) == replay.digest(other.model)


@pytest.mark.parametrize("placement", ["thread", pytest.param("process", marks=pytest.mark.slow)])
def test_an_adapter_learns_the_same_wherever_the_actor_is(
    replay: Any, trained: Train, placement: Any
) -> None:
    plain = trained(peft_config=lora(), learning_rate=1e-2)
    engine = HFEngine(placement=placement, threads=1)
    apart = trained(engine, peft_config=lora(), learning_rate=1e-2)
    assert replay.digest(apart.model) == replay.digest(plain.model)


# --- transformers' conventions --------------------------------------------------------------------


@pytest.fixture
def recorder(replay: Any) -> Any:
    """A callback that keeps the names of events, with the step of each."""

    class Recorder(replay.TrainerCallback):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            self.events: list[tuple[str, int]] = []

        def __getattribute__(self, name: str) -> Any:
            if not name.startswith("on_"):
                return super().__getattribute__(name)

            def note(_args: Any, state: Any, _control: Any, **_: Any) -> None:
                self.events.append((name.removeprefix("on_"), state.global_step))

            return note

    return Recorder()


ROWS = [{"prompt": "a b c"}, {"prompt": "b c d"}]


def test_callbacks_hear_of_everything_in_order(trained: Train, recorder: Any) -> None:
    trained(
        max_steps=4, minibatches_per_round=2, save_strategy="steps", save_steps=2,
        eval_strategy="steps", eval_steps=3, logging_steps=2, eval_dataset=ROWS,
        callbacks=[recorder],
    )  # fmt: skip
    assert recorder.events == [
        ("init_end", 0), ("train_begin", 0),
        ("step_end", 1), ("step_end", 2), ("log", 2), ("save", 2),
        ("step_end", 3), ("log", 3), ("evaluate", 3),
        ("step_end", 4), ("log", 4), ("log", 4), ("evaluate", 4), ("save", 4),
        ("log", 4), ("train_end", 4),
    ]  # fmt: skip


def test_a_callback_stops_the_run_at_the_end_of_a_round(replay: Any, trained: Train) -> None:
    class Stop(replay.TrainerCallback):  # type: ignore[misc,name-defined]
        def on_step_end(self, _args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step == 3

    run = trained(
        HFEngine(placement="thread"), max_steps=8, minibatches_per_round=2, callbacks=[Stop()]
    )
    assert run.state.global_step == 4
    assert len(run.report().times) == 2


def test_train_returns_what_transformers_returns(replay: Any, tmp_path: Path) -> None:
    from transformers.trainer_utils import TrainOutput

    run = replay.trainer(replay.settings(tmp_path, logging_steps=1), HFEngine(placement="inline"))
    output = run.train()
    assert isinstance(output, TrainOutput)
    assert output.global_step == 6
    assert output.training_loss == pytest.approx(sum(logged(run, "loss")) / 6)
    assert output.metrics["train_runtime"] > 0
    assert run.state.max_steps == 6
    assert run.state.epoch == pytest.approx(3)  # num_train_epochs by default


def test_logs_are_means_over_the_steps_since_the_last(trained: Train) -> None:
    every = trained(max_steps=4)
    some = trained(max_steps=4, logging_steps=2)
    for name in ("loss", "reward", "ess", "staleness"):
        ones = logged(every, name)
        twos = [(a + b) / 2 for a, b in zip(ones[::2], ones[1::2], strict=True)]
        assert logged(some, name) == pytest.approx(twos)


def test_tensorboard_gets_the_logs(trained: Train, tmp_path: Path, monkeypatch: Any) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    trained(report_to="tensorboard")
    (events,) = (tmp_path / "logs").rglob("events.out.tfevents*")
    written = events.read_bytes()
    assert b"train/reward" in written
    assert b"train/staleness" in written


def test_the_progress_bar_says_when_the_run_ends_and_who_waits(trained: Train, capfd: Any) -> None:
    trained(disable_tqdm=False)
    shown = capfd.readouterr().err
    assert re.search(r"3/3 .*ends \d\d:\d\d:\d\d, (learner|actor) waits", shown)


def test_a_saved_model_loads_in_transformers(replay: Any, trained: Train, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = trained()
    run.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert_near(loaded, run.model, atol=0)
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").encode("a b")
    # And a path trains like the model it holds.
    args = replay.settings(tmp_path / "again", max_steps=3)
    by_path = replay.trainer(
        args, HFEngine(placement="inline"), str(tmp_path / "saved"), processing_class=None
    )
    by_path.train()
    by_model = replay.trainer(args, HFEngine(placement="inline"), loaded)
    by_model.train()
    assert replay.digest(by_path.model) == replay.digest(by_model.model)


def test_evaluation_runs_while_training_and_changes_nothing(replay: Any, trained: Train) -> None:
    run = trained(eval_dataset=ROWS, eval_strategy="steps", eval_steps=1, eval_temperature=0.7)
    assert replay.digest(run.model) == replay.digest(trained().model)
    rows = [row for row in run.state.log_history if "eval_reward" in row]
    assert [row["step"] for row in rows] == [1, 2, 3]
    expected = {"eval_reward", "eval_rewards/score", "eval_kl", "eval_ppl", "eval_length"}
    assert expected <= rows[0].keys()
    assert run.evaluate()["eval_reward"] == rows[-1]["eval_reward"]


def test_the_report_is_a_text(trained: Train) -> None:
    run = trained(HFEngine(placement="thread"))
    text = str(run.report())
    assert "3 rounds, 1 ahead" in text
    assert "effective sample size" in text
    assert sum(run.report().staleness.values()) == 3


def test_each_reward_function_is_logged_by_name(trained: Train) -> None:
    def length(completion_ids: list[list[int]], log_metric: Any, **_: Any) -> list[float]:
        log_metric("longest", max(map(len, completion_ids)))
        return [float(len(ids)) for ids in completion_ids]

    def half(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        return [1.0 if i % 2 else None for i in range(len(completion_ids))]

    run = trained(reward_funcs=[length, half], reward_weights=[0.1, 2.0])
    lengths = logged(run, "rewards/length/mean")
    assert lengths == logged(run, "completions/mean_length")
    assert logged(run, "longest") == logged(run, "completions/max_length")
    assert logged(run, "rewards/half/mean") == [1] * 3
    assert logged(run, "reward") == pytest.approx([0.1 * mean + 1 for mean in lengths])


# --- staleness ------------------------------------------------------------------------------------


def test_fresh_samples_have_their_full_size_and_stale_ones_less(trained: Train) -> None:
    fresh = trained(rounds_ahead=0, max_steps=6, learning_rate=2e-2)
    assert logged(fresh, "staleness") == [0] * 6
    assert logged(fresh, "ess") == pytest.approx([1] * 6, abs=1e-3)
    assert logged(fresh, "ratio/log_mean") == pytest.approx([0] * 6, abs=1e-3)
    stale = trained(rounds_ahead=2, max_steps=6, learning_rate=2e-2)
    assert logged(stale, "staleness") == [0, 1, 2, 2, 2, 2]
    assert logged(stale, "ess")[0] == pytest.approx(1, abs=1e-3)
    assert max(logged(stale, "ess")[1:]) < 0.99


@pytest.mark.parametrize(("limit", "ahead"), [(1, 0), (2, 0), (3, 1), (5, 2), (9, 3)])
def test_block_keeps_the_bound_by_running_fewer_rounds_ahead(
    trained: Train, caplog: Any, limit: int, ahead: int
) -> None:
    with caplog.at_level(logging.WARNING, "asyncrlhf"):
        run = trained(
            rounds_ahead=3, minibatches_per_round=2, max_steps=12, max_staleness=limit,
            per_device_train_batch_size=1,
        )  # fmt: skip
    assert run.schedule.ahead == ahead
    assert max(logged(run, "staleness")) <= limit
    told = [r.getMessage() for r in caplog.records if "max_staleness" in r.getMessage()]
    assert told == (
        [f"max_staleness={limit} is kept by running {ahead} instead of 3 rounds ahead"]
        if ahead < 3
        else []
    )


def test_drop_leaves_out_staler_minibatches_and_reports_them(replay: Any, trained: Train) -> None:
    weights: list[str] = []

    class Keeping(replay.TrainerCallback):  # type: ignore[misc,name-defined]
        def on_step_end(self, *_: Any, model: Any, **__: Any) -> None:
            weights.append(replay.digest(model))

    run = trained(
        stale_policy="drop", max_staleness=3, rounds_ahead=1, minibatches_per_round=3,
        max_steps=9, callbacks=[Keeping()],
    )  # fmt: skip
    staleness = logged(run, "staleness")
    dropped = logged(run, "staleness/dropped")
    assert staleness == [0, 1, 2, 3, 4, 5, 3, 4, 5]
    assert dropped == [s > 3 for s in staleness]
    changed = [a != b for a, b in itertools.pairwise(weights)]
    assert changed == [not d for d in dropped[1:]]
    assert len(logged(run, "loss")) == 5
    assert run.report().dropped == 4
    assert "4 minibatches were dropped" in str(run.report())


def test_a_bound_that_nothing_breaks_changes_nothing(replay: Any, trained: Train) -> None:
    settings = {"minibatches_per_round": 2, "max_steps": 6}
    free = replay.digest(trained(**settings).model)
    for policy in ("block", "drop"):
        bounded = trained(max_staleness=3, stale_policy=policy, **settings)
        assert replay.digest(bounded.model) == free
