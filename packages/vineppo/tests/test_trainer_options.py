"""What trainers offer around the loop: exact restarts, adapters, precision, reports, evaluation."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("decapod.lm")
pytest.importorskip("transformers")

from transformers import PreTrainedTokenizerFast, TrainerCallback

from vineppo.batch import EpisodeBatch
from vineppo.episodes import Episode

# PEFT asks models for what transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


# --- token-exact restarts -------------------------------------------------------------------------


def merging_tokenizer() -> Any:
    """Byte pairs over whole texts, so that tokens reach across line ends, as ``"1\\n2"`` does."""
    from tokenizers import Tokenizer, decoders, models, trainers

    built = Tokenizer(models.BPE())
    built.decoder = decoders.Fuse()
    learner = trainers.BpeTrainer(
        vocab_size=40, special_tokens=["<pad>", "<bos>", "<eos>", "<unk>"], show_progress=False
    )
    built.train_from_iterator(["1\n2=3\n1\n2=3\n0\n1\n12\n33\n"] * 8, learner)
    return PreTrainedTokenizerFast(
        tokenizer_object=built, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


@pytest.mark.parametrize("adaptive", [None, 2])
def test_restarts_are_exact_and_no_answer_is_ever_encoded(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adaptive: int | None
) -> None:
    from decapod.lm import build_model

    tokenizer = merging_tokenizer()
    policy = build_model(len(tokenizer), 16, 1, 2, max_positions=48, init_std=0.2).double()
    rows = [{"prompt": f"{i}=", "odd": i % 2} for i in range(4)]
    run = tiny.recorded(
        "VinePPO", tmp_path, of=policy, rows=rows, processing_class=tokenizer, num_rollouts=4,
        adaptive_pilot=adaptive,
    )  # fmt: skip
    kind = type(tokenizer)
    with monkeypatch.context() as patched:
        for name in ("__call__", "encode", "_encode_plus", "tokenize", "apply_chat_template"):
            patched.setattr(kind, name, None)  # whoever calls it fails
        run.train()
    requests = 0
    trajectories: set[tuple[int, ...]] = set()
    calls = 2 if adaptive is None else 3  # of an iteration, the first one for its episodes
    assert len(run.backend.calls) == 2 * calls
    for number, (prompts, _, rollouts) in enumerate(run.backend.calls):
        if number % calls == 0:
            found = zip(prompts, rollouts, strict=True)
            trajectories = {prompt + r.token_ids for prompt, of in found for r in of}
            continue
        requests += len(prompts)
        for ids in prompts:
            assert any(of[: len(ids)] == ids and len(of) > len(ids) for of in trajectories)
    assert requests > 8
    # With this tokenizer, text would not have led back to where the trajectories were.
    lost = [
        of[2:] for of in trajectories
        if tuple(tokenizer(tokenizer.decode(of[2:]))["input_ids"]) != of[2:]
    ]  # fmt: skip
    assert lost


# --- models ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lora() -> Any:
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(
        r=2, lora_alpha=4, lora_dropout=0.5, target_modules=["q_proj", "v_proj"],
        task_type="CAUSAL_LM",
    )  # fmt: skip


@pytest.mark.parametrize("critic", ["copy", "shared"])
def test_an_adapter_learns_and_its_base_is_the_reference(
    tiny: Any, tmp_path: Path, lora: Any, critic: str
) -> None:
    run = tiny.trainer(
        "PPO", tmp_path, extra={"peft_config": lora}, critic=critic, save_every=1, num_epochs=1,
        gradient_checkpointing=critic == "shared",
    )  # fmt: skip
    before = tiny.parameters(run)
    assert run.history == []
    run.train()
    moved = {n for n, p in tiny.parameters(run).items() if not torch.equal(p, before[n])}
    assert moved
    assert moved <= {name for name in before if "lora_" in name}
    assert run.history[0]["divergence"] == pytest.approx(0, abs=1e-12)
    assert abs(run.history[1]["divergence"]) > 1e-6
    with run._reference() as module:
        found = module.policy(torch.tensor([[1, 4, 5]])).logits
    expected = tiny.model()(torch.tensor([[1, 4, 5]])).logits
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    again = tiny.trainer(
        "PPO", tmp_path, extra={"peft_config": lora}, critic=critic, save_every=1, num_epochs=1,
        gradient_checkpointing=critic == "shared",
    )  # fmt: skip
    again.train(resume_from_checkpoint=tmp_path / "checkpoint-1")
    assert tiny.difference(tiny.parameters(again), tiny.parameters(run)) == 0


def test_an_adapter_is_saved_as_one(tiny: Any, tmp_path: Path, lora: Any) -> None:
    import peft

    run = tiny.trainer("RLOO", tmp_path, extra={"peft_config": lora})
    run.train()
    run.save_model(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(tiny.model(), tmp_path / "adapter")
    ids = torch.tensor([[1, 4, 5]])
    torch.testing.assert_close(loaded(ids).logits, run.model(ids).logits, atol=1e-12, rtol=0)
    assert not torch.equal(loaded(ids).logits, tiny.model()(ids).logits)


def test_a_critic_on_the_policys_trunk_learns(tiny: Any, tmp_path: Path) -> None:
    run = tiny.trainer("PPO", tmp_path, critic="shared", learning_rate=1e-3, iterations=4)
    run.train()
    assert run.module.trunk is None
    assert bool(run.module.head.weight.any())
    assert run.history[0]["value"] == 0
    assert run.history[-1]["value"] != 0


def test_equal_scores_leave_a_critic_nothing_to_explain(tiny: Any, tmp_path: Path) -> None:
    def same(completions: Sequence[str], **_: Any) -> list[float]:
        return [0.3] * len(completions)

    run = tiny.trainer("PPO", tmp_path, reward=same, unfinished_score=0.3)
    run.train()
    assert [row["explained_variance"] for row in run.history] == [0, 0]
    assert run.history[1]["value"] > 0


def test_bf16_runs_on_a_cpu(tiny: Any, tmp_path: Path) -> None:
    policy = tiny.model().float()
    for method in ("VinePPO", "PPO", "RestEM", "DPOPositive"):
        run = tiny.trainer(
            method, tmp_path / method, of=policy, mixed_precision="bf16", iterations=1,
            num_epochs=1, mini_batch_size=32,
        )  # fmt: skip
        before = tiny.parameters(run)
        run.train()
        assert all(p.dtype == torch.float32 for p in run.model.parameters())
        assert all(bool(p.isfinite().all()) for p in run.model.parameters())
        assert tiny.difference(tiny.parameters(run), before) > 1e-4
        if "ratio" in run.history[0]:
            assert run.history[0]["ratio"] == pytest.approx(1, abs=0.05)


def test_a_model_may_be_a_path(tiny: Any, tmp_path: Path) -> None:
    import vineppo

    folder = tmp_path / "model"
    tiny.model().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    expected = tiny.trainer("RLOO", tmp_path / "object")
    expected.train()
    for path in (folder, str(folder)):
        args = tiny.settings("RLOO", tmp_path / "path")
        run = vineppo.RLOOTrainer(path, None, tiny.odd, tiny.ROWS, args=args)
        run.train()
        assert tiny.difference(tiny.parameters(run), tiny.parameters(expected)) == 0


def test_another_reference_is_what_divergence_is_measured_from(tiny: Any, tmp_path: Path) -> None:
    import vineppo

    other = tiny.model(seed=5)
    args = tiny.settings("RLOO", tmp_path, iterations=1)
    run = vineppo.RLOOTrainer(tiny.model(), other, tiny.odd, tiny.ROWS, tiny.tokenizer(), args)
    run.train()
    assert abs(run.history[0]["divergence"]) > 0.1
    assert not any(p.requires_grad for p in other.parameters())


def test_another_backend_gets_the_weights_of_every_iteration(tiny: Any, tmp_path: Path) -> None:
    from vineppo.rollout import TransformersBackend

    sampler = tiny.model(seed=9)  # overwritten before anything is sampled
    run = tiny.trainer("RLOO", tmp_path, extra={"rollout_backend": TransformersBackend(sampler)})
    expected = tiny.trainer("RLOO", tmp_path)
    run.train()
    expected.train()
    assert tiny.difference(tiny.parameters(run), tiny.parameters(expected)) == 0
    assert tiny.difference(dict(tiny.parameters(run)), dict(sampler.state_dict())) == 0


# --- credit ---------------------------------------------------------------------------------------


def test_an_adaptive_budget_has_the_mean_of_a_constant_one(tiny: Any, tmp_path: Path) -> None:
    run = tiny.recorded("VinePPO", tmp_path, num_rollouts=24, adaptive_pilot=4, iterations=1)
    run.train()
    (_, pilots, _), (_, later, _) = run.backend.calls[1:]
    row = run.history[0]
    assert set(pilots) == {4}
    assert len(set(later)) > 1
    assert row["rollouts"] == sum(pilots) + sum(later) == 24 * row["states_unique"]


def test_states_beyond_the_cap_get_no_rollouts(tiny: Any, tmp_path: Path) -> None:
    asked = []
    for cap in (None, 1, 2):
        run = tiny.recorded("VinePPO", tmp_path, max_value_steps=cap, iterations=1, seed=3)
        run.train()
        prompts = {prompt for prompt, _ in zip(*run.backend.calls[0][:2], strict=True)}
        asked.append([ids for ids in run.backend.calls[1][0] if ids not in prompts])
    everything, none, some = asked
    assert none == []
    assert 0 < len(some) < len(everything)
    assert set(some) <= set(everything)


def test_a_constant_is_no_critic(tiny: Any, tmp_path: Path) -> None:
    run = tiny.trainer("PPO", tmp_path, constant_value=0.5)
    run.train()
    assert run.module.head is None
    assert "value_error" not in run.history[0]
    assert run.history[0]["value"] == 0.5


def test_several_reward_functions_have_weights(tiny: Any, tmp_path: Path) -> None:
    def length(completions: Sequence[str], **_: Any) -> list[float]:
        return [float(len(text)) for text in completions]

    means = []
    for functions, weights in ((tiny.odd, None), (length, None), ([tiny.odd, length], (2.0, -0.5))):
        run = tiny.trainer("RLOO", tmp_path, reward=functions, reward_weights=weights, iterations=1)
        run.train()
        means.append(run.history[0]["reward"])
    assert means[2] == pytest.approx(2 * means[0] - 0.5 * means[1])


def test_prompts_may_be_conversations(tiny: Any, tmp_path: Path) -> None:
    from decapod.lm import build_model, build_tokenizer

    tokenizer = build_tokenizer(["0123=\n"], "char", chat=True)
    rows = [{"prompt": [{"role": "user", "content": f"{i}="}], "odd": i % 2} for i in range(4)]
    seen: list[Any] = []

    def score(prompts: Any, completions: Any, odd: Any, **_: Any) -> list[float]:
        seen.extend(zip(prompts, completions, strict=True))
        return tiny.odd([answer[-1]["content"] for answer in completions], odd)

    policy = build_model(len(tokenizer), 16, 1, 2, max_positions=48, init_std=0.25)
    run = tiny.trainer(
        "VinePPO", tmp_path, of=policy, rows=rows, reward=score, processing_class=tokenizer
    )
    assert tokenizer.decode(run.prompts.ids[1]) == "<user>1=<eos><assistant>"
    run.train()
    assert all(prompt[0]["role"] == "user" for prompt, _ in seen)
    assert all(answer[0]["role"] == "assistant" for _, answer in seen)


def test_texts_may_end_answers(tiny: Any, tmp_path: Path) -> None:
    run = tiny.trainer("RLOO", tmp_path, stop=("=",), iterations=1)
    run.train()
    plain = tiny.trainer("RLOO", tmp_path, iterations=1)
    plain.train()
    assert run.history[0]["length"] < plain.history[0]["length"]
    assert run.history[0]["finished"] >= plain.history[0]["finished"]


# --- methods that choose what they learn ----------------------------------------------------------


def episodes(*groups: Sequence[tuple[int, float]]) -> EpisodeBatch:
    """A group of answers to each prompt; each answer is a token and its score."""
    found = [
        (group, Episode(group, (1, 4 + group), (token, 2), finished=True), score)
        for group, answers in enumerate(groups)
        for token, score in answers
    ]
    return EpisodeBatch(
        [e for _, e, _ in found], np.array([s for *_, s in found]), np.array([g for g, *_ in found])
    )


def test_pairs_are_a_right_and_a_wrong_answer_to_one_prompt(tiny: Any, tmp_path: Path) -> None:
    batch = episodes([(4, 1.0), (5, 0.0), (6, 1.0), (7, 0.0)], [(8, 1.0)] * 4, [(9, 0.5), (3, 0.9)])
    run = tiny.trainer("DPOPositive", tmp_path)
    units = run._lesson(batch, 0).units
    found = [(u[0].prompt_ids, u[0].response_ids[0], u[1].response_ids[0]) for u in units]
    assert all(chosen.prompt_ids == rejected.prompt_ids for chosen, rejected in units)
    first, third = (1, 4), (1, 6)
    assert found == [
        (first, 4, 5), (first, 4, 7), (first, 6, 5), (first, 6, 7), (third, 3, 9)
    ]  # fmt: skip
    assert all(r.ref_logprobs is not None for unit in units for r in unit)
    capped = tiny.trainer("DPOPositive", tmp_path, max_pairs_per_prompt=2)
    drawn = [
        [(u[0].response_ids[0], u[1].response_ids[0]) for u in capped._lesson(batch, i).units]
        for i in range(6)
    ]
    assert all(len(pairs) == 3 for pairs in drawn)
    assert len({tuple(pairs) for pairs in drawn}) > 1


def test_right_answers_are_learnt_once_and_held_out_by_prompt(tiny: Any, tmp_path: Path) -> None:
    batch = episodes(*[[(4, 1.0), (5, 0.0), (4, 1.0), (6, 0.6), (7, 0.5)]] * 4)
    run = tiny.trainer("RestEM", tmp_path, validation_share=0.25)
    lesson = run._lesson(batch, 0)
    assert [len(lesson.units), len(lesson.held_out)] == [6, 2]
    prompts = {u[0].prompt_ids for u in lesson.units}
    assert not prompts & {u[0].prompt_ids for u in lesson.held_out}
    assert {u[0].response_ids[0] for u in lesson.units} == {4, 6}
    one = tiny.trainer("RestEM", tmp_path, max_correct_per_prompt=1)._lesson(batch, 0)
    assert [u[0].response_ids[0] for u in one.units] == [4] * 4
    assert not one.held_out


def test_fine_tuning_stops_and_goes_back_to_the_best_epoch(tiny: Any, tmp_path: Path) -> None:
    changes = {
        "iterations": 1, "validation_share": 0.5, "lr_schedule": "constant", "warmup_ratio": 0.0,
        "episodes_per_iteration": 16,
    }  # fmt: skip
    run = tiny.trainer("RestEM", tmp_path / "stopped", num_epochs=12, **changes)
    run.train()
    epochs = int(run.history[0]["epochs"])
    assert 2 <= epochs < 12
    best = tiny.trainer("RestEM", tmp_path / "best", num_epochs=epochs - 1, **changes)
    best.train()
    assert best.history[0]["epochs"] == epochs - 1
    assert tiny.difference(tiny.parameters(run), tiny.parameters(best)) == 0
    longer = tiny.trainer(
        "RestEM", tmp_path / "longer", num_epochs=epochs, **{**changes, "validation_share": 0.0}
    )
    longer.train()
    assert tiny.difference(tiny.parameters(run), tiny.parameters(longer)) > 1e-3


def test_restarts_go_back_to_the_model_as_given(tiny: Any, tmp_path: Path) -> None:
    changes = {"lr_schedule": "constant", "warmup_ratio": 0.0}
    once = tiny.trainer("RestEM", tmp_path, restart=True, iterations=2, **changes)
    once.train()
    # A fresh model that learns what the second iteration has taught.
    fresh = tiny.trainer("RestEM", tmp_path, iterations=2, **changes)
    taught = []
    run = tiny.trainer("RestEM", tmp_path, restart=True, iterations=2, **changes)
    lesson_of = run._lesson
    run._lesson = lambda batch, i: taught.append(lesson_of(batch, i)) or taught[-1]
    run.train()
    fresh._learn(taught[1], 1)
    assert taught[0].restart
    assert tiny.difference(tiny.parameters(fresh), tiny.parameters(once)) == 0


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("score", [0.0, 1.0])
def test_without_a_right_or_without_a_wrong_answer_there_is_no_step(
    tiny: Any, tmp_path: Path, score: float, restart: bool
) -> None:
    def same(completions: Sequence[str], **_: Any) -> list[float]:
        return [score] * len(completions)

    for method, changes in (("DPOPositive", {}), ("RestEM", {"restart": restart})):
        if method == "RestEM" and score:
            continue
        run = tiny.trainer(method, tmp_path, reward=same, unfinished_score=None, **changes)
        with torch.no_grad():  # it has learnt something before
            run.model.lm_head.weight.mul_(1.1)
        before = tiny.parameters(run)
        assert run.train().steps == 0
        assert tiny.difference(tiny.parameters(run), before) == 0
        assert run.history[1]["steps"] == 0


def test_the_first_step_of_dpo_positive_has_no_penalty(tiny: Any, tmp_path: Path) -> None:
    """Policy and reference differ by rounding then, and the penalty weighs 50 times as much."""
    from decapod.lm import build_model

    norms = []
    for size in (1, 2, 3, 16):
        policy = build_model(10, 48, 2, 2, max_positions=48, init_std=0.2)  # in single precision
        run = tiny.trainer(
            "DPOPositive", tmp_path, of=policy, iterations=1, num_epochs=1, mini_batch_size=64,
            micro_batch_size=size, episodes_per_iteration=16,
        )  # fmt: skip
        run.train()
        assert run.history[0]["pairs"] > 4
        assert run.history[0]["penalised"] == 0
        norms.append(run.history[0]["grad_norm"])
    assert norms == pytest.approx([norms[0]] * 4, rel=1e-4)


# --- what people see ------------------------------------------------------------------------------


def test_evaluation_is_a_mean_over_rows_and_samples(tiny: Any, tmp_path: Path) -> None:
    from vineppo.rollout import SamplingParams, TransformersBackend

    extra = {"eval_dataset": tiny.ROWS}
    run = tiny.trainer("RLOO", tmp_path, extra=extra, eval_temperature=0.0, eval_samples=16)
    found = run.evaluate()
    backend, tokenizer = TransformersBackend(tiny.model()), tiny.tokenizer()
    scores, lengths, finished = [], [], []
    for row in tiny.ROWS:
        ids = tokenizer(row["prompt"])["input_ids"]
        ((rollout,),) = backend.generate([ids], 1, SamplingParams(12, 0.0), [0])
        text = tokenizer.decode(rollout.token_ids, skip_special_tokens=True)
        scores.append(rollout.finished and len(text) % 2 == row["odd"])
        lengths.append(len(rollout.token_ids))
        finished.append(rollout.finished)
    assert found == {
        "eval_reward": pytest.approx(np.mean(scores)),
        "eval_finished": pytest.approx(np.mean(finished)),
        "eval_length": pytest.approx(np.mean(lengths)),
    }
    assert run.evaluate() == found
    assert run.state.log_history[-1]["eval_reward"] == found["eval_reward"]


def test_evaluations_come_when_they_are_due_and_change_nothing(tiny: Any, tmp_path: Path) -> None:
    seen: list[float] = []

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_evaluate(self, *_: Any, metrics: Any, **__: Any) -> None:
            seen.append(metrics["eval_reward"])

    extra = {"eval_dataset": tiny.ROWS[:3], "callbacks": [Watch()]}
    run = tiny.trainer("VinePPO", tmp_path, extra=extra, eval_every=2, iterations=4)
    run.train()
    logged = [row for row in run.state.log_history if "eval_reward" in row]
    assert [row["epoch"] for row in logged] == [2, 4]
    assert [row["eval_reward"] for row in logged] == seen
    without = tiny.trainer("VinePPO", tmp_path, iterations=4)
    without.train()
    assert tiny.difference(tiny.parameters(run), tiny.parameters(without)) == 0
    assert tiny.history(run) == tiny.history(without)


def test_logs_come_when_they_are_due(tiny: Any, tmp_path: Path) -> None:
    run = tiny.trainer("RLOO", tmp_path, iterations=5, log_every=2)
    result = run.train()
    assert [row["epoch"] for row in run.state.log_history] == [2, 4, 5]
    assert len(result.history) == 5
    assert run.state.log_history[-1]["step"] == result.steps == run.state.global_step


def test_a_callback_may_end_the_run(tiny: Any, tmp_path: Path) -> None:
    class Enough(TrainerCallback):  # type: ignore[misc]
        ended = 0

        def on_step_end(self, _args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step >= 8

        def on_train_end(self, *_: Any, **__: Any) -> None:
            Enough.ended += 1

    run = tiny.trainer("RLOO", tmp_path, iterations=5, save_every=5)
    run.add_callback(Enough())
    result = run.train()
    assert (result.iterations, result.steps) == (2, 12)  # the iteration is finished
    assert Enough.ended == 1
    assert (tmp_path / "checkpoint-2").is_dir()


def test_tensorboard_gets_what_the_history_has(tiny: Any, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tiny.trainer("RLOO", tmp_path, report_to=("tensorboard",), run_name="tiny")
    run.train()
    (path,) = (p for p in tmp_path.rglob("events.out.tfevents.*"))
    events = EventAccumulator(str(path)).Reload()
    found = [event.value for event in events.Scalars("train/reward")]
    assert found == pytest.approx([row["reward"] for row in run.history])
    steps = [event.step for event in events.Scalars("train/reward")]
    assert steps == [row["total_steps"] for row in run.history]


def test_a_bar_shows_the_time_that_is_left(
    tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tiny.trainer("RLOO", tmp_path, progress=True, iterations=3)
    run.train()
    shown = capsys.readouterr()
    assert shown.out == ""
    assert re.search(r"2/3 \[\d\d:\d\d<\d\d:\d\d,.*reward 0\.\d{3}", shown.err)
    assert "3/3" in shown.err
    for stage in ("sampling", "giving credit", "learning"):
        assert stage in shown.err
    tiny.trainer("RLOO", tmp_path, iterations=1).train()
    assert capsys.readouterr().err == ""


def test_a_run_leaves_its_settings(tiny: Any, tmp_path: Path) -> None:
    import json

    import vineppo

    run = tiny.trainer("GRPO", tmp_path, iterations=1, scale=False)
    run.train()
    found = json.loads((tmp_path / "settings.json").read_text())
    assert (found["trainer"], found["config"]) == ("GRPOTrainer", "GRPOConfig")
    assert vineppo.GRPOConfig(**found["settings"]) == run.args
    assert found["versions"]["vineppo"] == vineppo.__version__
    assert found["versions"]["torch"] == torch.__version__


def test_prompts_come_by_passes_over_the_data(tiny: Any, tmp_path: Path) -> None:
    run = tiny.trainer("RLOO", tmp_path, rows=tiny.ROWS[:5])
    drawn = [row for i in range(10) for row in run._rows_of(i)]
    passes = [drawn[i : i + 5] for i in range(0, 20, 5)]
    assert all(sorted(of) == [0, 1, 2, 3, 4] for of in passes)
    assert len({tuple(of) for of in passes}) > 1
