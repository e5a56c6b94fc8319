"""``VineGRPOTrainer`` on the installed TRL: its numbers against the library's own; its seams."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("decapod.lm")

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from decapod.lm import SamplingParams, build_model, build_tokenizer
from vineppo.episodes import Episode, State
from vineppo.errors import InvalidInputError, MissingExtraError, RewardError
from vineppo.integrations import trl_contract
from vineppo.integrations.trl import TRLContractError, VineBatch, VineGRPOTrainer
from vineppo.integrations.trl_rewards import TrainerReward, rows_of
from vineppo.integrations.trl_settings import check_shared_vllm
from vineppo.rollout import TransformersBackend
from vineppo.segmenters import FixedLengthSegmenter
from vineppo.tasks.token_tree import TokenTree
from vineppo.values import ConstantValueEstimator, ExactValueEstimator, state_seed
from vineppo.vines import VineValues, vine_values

pytestmark = [
    # TRL and PEFT use a name that transformers 5.23 calls old.
    pytest.mark.filterwarnings(
        "ignore:.(is_)?gradient_checkpointing.* is deprecated:FutureWarning"
    ),
]
PAGE = Path(__file__).parents[3] / "docs" / "pages" / "vineppo" / "trl.md"
TOKENIZER = build_tokenizer(["abc=\n"], chat=True)
PROMPTS = [
    {"prompt": "ab=", "wanted": "a"},
    {"prompt": "c=", "wanted": "c"},
    {"prompt": "ab=", "wanted": "b"},  # the same prompt, but scored by something else
    {"prompt": "cb=", "wanted": "b"},
]


def tiny(seed: int = 0) -> Any:
    """A model that mostly writes characters and new lines, and ends now and then."""
    model = build_model(len(TOKENIZER), 16, heads=2, max_positions=64, init_std=0.1, seed=seed)
    head = torch.nn.Linear(16, len(TOKENIZER))
    with torch.no_grad():
        head.weight.copy_(model.lm_head.weight)
        head.bias.zero_()
        head.bias[: min(TOKENIZER("abc=\n")["input_ids"])] = -3.0
        head.bias[TOKENIZER.eos_token_id] = -0.5
        head.bias[TOKENIZER("\n")["input_ids"]] = 0.5
    model.lm_head = head
    return model


def share_of_wanted(completions: Any, wanted: Sequence[str], **_: Any) -> list[float]:
    """Answers come as texts, or as conversations of one message."""
    texts = [one if isinstance(one, str) else one[0]["content"] for one in completions]
    return [text.count(one) / (1 + len(text)) for text, one in zip(texts, wanted, strict=True)]


def config(folder: Path, **changes: Any) -> GRPOConfig:
    return GRPOConfig(
        str(folder / "out"),
        **{
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "num_generations": 2,
            "max_completion_length": 16,
            "temperature": 0.8,
            "top_p": 0.9,
            "learning_rate": 2e-3,
            "beta": 0.0,
            "use_cpu": True,
            "bf16": False,
            "report_to": "none",
            "save_strategy": "no",
            "logging_steps": 1,
            "disable_tqdm": True,
            "gradient_checkpointing": False,
            **changes,
        },
    )


class Recorded(VineGRPOTrainer):
    """Keeps each generation batch, the weights it was made with, and what the loss was given."""

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        weights = copy.deepcopy(self.model.state_dict())
        output = super()._generate_and_score_completions(inputs)
        self.__dict__.setdefault("batches", []).append(
            SimpleNamespace(
                inputs=copy.deepcopy(inputs),
                weights=weights,
                vines=self.last_vines,
                output={key: value.clone() for key, value in output.items()},
                rewards=dict(self._metrics["train"]),
            )
        )
        return output

    def _compute_loss(self, model: Any, inputs: Any) -> Any:
        self.__dict__.setdefault("losses", []).append(dict(inputs))
        return super()._compute_loss(model, inputs)


def trainer(folder: Path, cls: type = Recorded, **changes: Any) -> Any:
    mine = ("num_rollouts", "segmenter", "max_value_steps", "lam", "whiten", "rollout_backend",
            "value_estimator", "reward_funcs", "train_dataset", "eval_dataset", "model",
            "processing_class", "peft_config", "tools", "rollout_func")  # fmt: skip
    parts = {name: changes.pop(name) for name in mine if name in changes}
    args = config(folder, **changes)
    return cls(
        **{
            "model": tiny(),
            "reward_funcs": share_of_wanted,
            "args": args,
            "train_dataset": Dataset.from_list(PROMPTS),
            "processing_class": TOKENIZER,
            **({"num_rollouts": 3} if "value_estimator" not in parts else {}),
            **parts,
        }
    )


def decoded(ids: Sequence[int]) -> str:
    return TOKENIZER.decode(list(ids), skip_special_tokens=True)


def line_borders(ids: Sequence[int]) -> list[int]:
    """Borders of lines where each token is a character, written down from the definition."""
    borders, blank, ended = [0], True, False
    for place, token in enumerate(ids):
        character = decoded([token])
        if ended:  # whatever follows, EOS among it
            borders.append(place)
            ended = False
        if character == "\n" and not blank:
            blank = ended = True
        elif character.strip():
            blank = False
    return [*borders, len(ids)]


def by_hand(batch: Any, k: int, args: GRPOConfig) -> torch.Tensor:
    """Advantages of a generation batch, one state at a time, from nothing but the sampled ids."""
    model = tiny()
    model.load_state_dict(batch.weights)
    backend = TransformersBackend(model, TOKENIZER)
    vines, output = batch.vines, batch.output
    out = torch.zeros(output["completion_ids"].shape, dtype=torch.float64)
    for row in range(len(out)):
        prompt = tuple(output["prompt_ids"][row][output["prompt_mask"][row].bool()].tolist())
        ids = tuple(output["completion_ids"][row][output["completion_mask"][row].bool()].tolist())
        wanted = batch.inputs[row]["wanted"]

        def score(answer: Sequence[int], letter: str = wanted) -> float:
            return decoded(answer).count(letter) / (1 + len(decoded(answer)))

        borders = line_borders(ids)
        values = []
        for cut in borders[:-1]:
            state = State(vines.rows[row], prompt, ids[:cut])
            params = SamplingParams(
                args.max_completion_length - cut, args.temperature, args.top_p,
                stop_token_ids=(TOKENIZER.eos_token_id,),
            )  # fmt: skip
            [rollouts] = backend.generate([state.ids], k, params, [state_seed(vines.seed, state)])
            values.append(np.mean([score(ids[:cut] + r.token_ids) for r in rollouts]))
        values.append(score(ids))  # in place of V = 0 and the reward behind the last step
        for step, (first, last) in enumerate(pairwise(borders)):
            out[row, first:last] = values[step + 1] - values[step]
    mask = output["completion_mask"].bool()
    on = out[mask]
    out[mask] = (on - on.mean()) * torch.rsqrt(on.var() + 1e-8)
    return out


# --- must show: two steps of a tiny model, and the advantages are the library's ------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = trainer(tmp_path_factory.mktemp("trained"), log_completions=False)
    made.train()
    return made


def test_two_steps_are_trained_on_the_advantages_of_the_library(trained: Any) -> None:
    assert len(trained.batches) == 2
    assert trained.state.global_step == 2
    first, second = (batch.weights for batch in trained.batches)
    assert any(not torch.equal(first[name], second[name]) for name in first)
    steps = []
    for batch in trained.batches:
        expected = by_hand(batch, 3, trained.args)
        found = batch.output["advantages"]
        assert found.shape == batch.output["completion_ids"].shape
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)
        steps += [len(values) for values in batch.vines.credit.step_values]
    assert sum(count > 1 for count in steps) > 3, "or nothing of this is about steps"


def test_the_loss_gets_each_answer_with_its_own_advantages_after_trl_has_shuffled(
    trained: Any,
) -> None:
    def rows(batch: Any) -> list[Any]:
        names = ("prompt_ids", "completion_ids", "advantages")
        return [tuple(map(tuple, row)) for row in zip(*(batch[n].tolist() for n in names))]  # noqa: B905

    assert len(trained.losses) == 4  # two steps of two micro-batches
    for step, batch in enumerate(trained.batches):
        micro = trained.losses[2 * step : 2 * step + 2]
        shape = batch.output["completion_ids"].shape
        assert all(inputs["advantages"].shape == (4, shape[1]) for inputs in micro)
        assert sorted(rows(micro[0]) + rows(micro[1])) == sorted(rows(batch.output))


def test_states_restart_from_the_very_ids_that_were_sampled(trained: Any) -> None:
    eos, ends = set(trained.eos_token_ids), set()
    for batch in trained.batches:
        vines, output = batch.vines, batch.output
        for row, (prompt, completion) in enumerate(
            zip(vines.prompt_ids, vines.completion_ids, strict=True)
        ):
            assert prompt == TOKENIZER(batch.inputs[row]["prompt"])["input_ids"]
            kept = output["completion_mask"][row].bool()
            assert completion == output["completion_ids"][row][kept].tolist()
            assert vines.finished[row] == (completion[-1] in eos)
            ends.add(vines.finished[row])
    assert ends == {True, False}, "or no answer was cut by length"


def test_answers_to_one_row_share_the_value_of_its_prompt_and_other_rows_do_not(
    trained: Any,
) -> None:
    for batch in trained.batches:
        first: dict[int, tuple[str, str, float]] = {}
        for inputs, row, values in zip(
            batch.inputs, batch.vines.rows, batch.vines.credit.step_values, strict=True
        ):
            this = (inputs["prompt"], inputs["wanted"], values[0])
            assert first.setdefault(row, this) == this
        assert len({one[:2] for one in first.values()}) == len(first)


def test_what_was_spent_and_found_is_logged(trained: Any) -> None:
    logged = [entry for entry in trained.state.log_history if "vine/value_mean" in entry]
    assert len(logged) == 2
    for entry, batch in zip(logged, trained.batches, strict=True):
        credit = batch.vines.credit
        values = np.concatenate(credit.step_values)
        assert entry["vine/value_mean"] == pytest.approx(values.mean())
        absolute = np.abs(np.concatenate(credit.advantages)).mean()
        assert entry["vine/advantage_abs_mean"] == pytest.approx(absolute)
        states = {
            (row, *prompt, -1, *completion[:cut])
            for row, prompt, completion, borders in zip(
                batch.vines.rows, batch.vines.prompt_ids, batch.vines.completion_ids,
                credit.step_borders, strict=True,
            )
            for cut in borders[:-1]
        }  # fmt: skip
        assert entry["vine/rollouts"] == 3 * len(states)
        assert entry["vine/states"] == len(values)
        assert entry["vine/generated_tokens"] > 0
        assert 0 < entry["vine/hit_rate"] < 1


def test_a_run_repeats_bit_for_bit(trained: Any, tmp_path: Path) -> None:
    again = trainer(tmp_path)
    again.train()
    for name, weights in trained.model.state_dict().items():
        assert torch.equal(weights, again.model.state_dict()[name])


# --- TRL's contract ------------------------------------------------------------------------------


def test_the_installed_trl_keeps_its_contract() -> None:
    trl_contract.check_contract()
    assert trl_contract.differences(GRPOTrainer) == []


def test_token_advantages_that_are_equal_in_an_answer_give_the_loss_of_one_per_answer(
    trained: Any,
) -> None:
    inputs = dict(trained.losses[0])
    one_each = inputs["completion_mask"].sum(1).float() - 5
    losses, gradients = [], []
    for advantages in (one_each, one_each[:, None].expand_as(inputs["completion_mask"])):
        trained.model.zero_grad()
        loss = GRPOTrainer._compute_loss(
            trained, trained.model, {**inputs, "advantages": advantages}
        )
        loss.backward()
        losses.append(loss.detach())
        gradients.append([p.grad.clone() for p in trained.model.parameters()])
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(gradients[0], gradients[1])
    assert losses[0] != 0


def test_another_trl_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TRLContractError, match=r'expected a release 1\.16\.x.*"trl>=1\.16,<1\.17"'):
        trl_contract.check_version("1.17.0")
    with pytest.raises(TRLContractError, match="none of advantages"):
        trl_contract.check_output(trl_contract.OUTPUT[:-1])

    class Changed:
        def _generate_and_score_completions(self, inputs: Any, mode: str) -> None: ...
        def _calculate_rewards(
            self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any
        ) -> None: ...

    found = trl_contract.differences(Changed)
    assert found[0].endswith("expected (inputs), got (inputs, mode)")
    assert found[1].endswith("_compute_loss: expected (model, inputs), got no such method")

    def nothing(name: str) -> str:
        raise trl_contract.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(trl_contract.metadata, "version", nothing)
    with pytest.raises(MissingExtraError, match=r'pip install "vineppo\[trl\]"'):
        trl_contract.check_contract()


# --- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level: expected 'token'"),
        ({"loss_type": "vespo"}, "loss_type: expected 'dapo'"),
        ({"off_policy_mask_threshold": 0.5}, "off_policy_mask_threshold: expected None"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, "multi_objective_aggregation"),
        ({"use_liger_kernel": True}, "use_liger_kernel: expected False"),
        ({"min_p": 0.1}, "min_p: expected None, got 0.1"),
        ({"repetition_penalty": 1.1}, "repetition_penalty: expected 1"),
        ({"generation_kwargs": {"num_beams": 2}}, "generation_kwargs: expected None"),
        ({"tools": [print]}, "tools: expected None"),
        ({"whiten": "group"}, "whiten: expected one of"),
        ({"segmenter": "lines"}, "segmenter: expected one of"),
        ({"max_value_steps": 0}, "max_value_steps: expected at least 1"),
        ({"lam": 2.0}, "lam: expected a number from 0 to 1"),
        ({"num_rollouts": 0}, "num_rollouts .*expected a whole number of at least 1, got 0"),
        ({"rollout_backend": 3}, "rollout_backend: expected a RolloutBackend"),
        (
            {"rollout_backend": object(), "value_estimator": ConstantValueEstimator()},
            "rollout_backend: expected None beside a value_estimator",
        ),
        (
            {"train_dataset": Dataset.from_list([{**row, "image": "x"} for row in PROMPTS])},
            "expected text, got the column 'image'",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:.use_liger_kernel=True. is deprecated:FutureWarning")
def test_what_token_advantages_cannot_keep_is_refused_when_the_trainer_is_made(
    change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidInputError, match=said):
        trainer(tmp_path, **change)


def test_rewards_that_rollouts_cannot_ask_are_refused(tmp_path: Path) -> None:
    async def later(completions: Any, **_: Any) -> list[float]:
        return [0.0] * len(completions)

    with pytest.raises(InvalidInputError, match="got an asynchronous function, later"):
        trainer(tmp_path, reward_funcs=later)


# --- rewards -------------------------------------------------------------------------------------


def test_rollouts_are_scored_as_answers_are(tmp_path: Path) -> None:
    calls: list[dict[str, Any]] = []

    def seen(prompts: Any, completions: Any, completion_ids: Any, **columns: Any) -> list[float]:
        calls.append(
            {"prompts": prompts, "completions": completions, "ids": completion_ids, **columns}
        )
        columns["log_extra"]("length", [len(ids) for ids in completion_ids])
        columns["log_metric"]("mine", float(len(completion_ids)))
        return [None if "c" in text[0]["content"] else 1.0 for text in completions]

    chats = [
        {"prompt": [{"role": "user", "content": row["prompt"]}], "wanted": row["wanted"]}
        for row in PROMPTS
    ]
    made = trainer(
        tmp_path,
        reward_funcs=[share_of_wanted, seen],
        reward_weights=[2.0, 0.25],
        train_dataset=Dataset.from_list(chats),
        log_completions=False,
        max_steps=1,
        whiten=None,
    )
    made.train()
    answers, rollouts = calls
    assert answers.keys() == rollouts.keys()
    assert len(answers["ids"]) == 8
    [batch] = made.batches
    credit = batch.vines.credit
    for scores, ids, wanted in zip(
        credit.scores, batch.vines.completion_ids, answers["wanted"], strict=True
    ):
        text = decoded(ids)
        score = 2 * text.count(wanted) / (1 + len(text)) + (0.0 if "c" in text else 0.25)
        assert scores == pytest.approx(score, abs=1e-6)
    for prompt, completion, ids in zip(
        rollouts["prompts"], rollouts["completions"], rollouts["ids"], strict=True
    ):
        assert prompt in [chat["prompt"] for chat in chats]
        assert completion == [{"role": "assistant", "content": decoded(ids)}]
    # What was logged of rollouts did not reach the table: it has as many lines as answers.
    assert list(made._logs["extra"]["length"]) == [len(ids) for ids in answers["ids"]]
    assert len(made._logs["advantages"]) == len(made._logs["prompt"]) == 8
    [entry] = [entry for entry in made.state.log_history if "mine" in entry]
    assert entry["mine"] == 8


def test_answers_without_a_score_and_masked_ones_cost_no_rollouts_and_learn_nothing(
    tmp_path: Path,
) -> None:
    def only_of_a(completions: Any, wanted: Any, **_: Any) -> list[float | None]:
        return [
            float(len(text)) if letter == "a" else None
            for text, letter in zip(completions, wanted, strict=True)
        ]

    made = trainer(
        tmp_path, reward_funcs=only_of_a, mask_truncated_completions=True, max_steps=1, whiten=None
    )
    made.model.train()
    inputs = [PROMPTS[0]] * 4 + [PROMPTS[1]] * 4
    batch = made._generate_and_score_completions([dict(row) for row in inputs])
    vines = made.last_vines
    assert vines is not None
    assert sum(vines.finished[:4]) not in (0, 4), "or nothing is masked or all is"
    for row, (values, advantages) in enumerate(
        zip(vines.credit.step_values, batch["advantages"], strict=True)
    ):
        counts = row < 4 and vines.finished[row]
        assert np.isnan(values).all() != counts
        assert counts or not advantages.any()


def test_a_rollout_that_no_function_can_score_is_an_error(tmp_path: Path) -> None:
    made = trainer(tmp_path, reward_funcs=lambda completions, **_: [None] * len(completions))
    reward = TrainerReward(made)
    reward.of_batch(PROMPTS, [row["prompt"] for row in PROMPTS])
    with pytest.raises(RewardError, match="expected a score of every rollout, got None"):
        reward([Episode(1, (5,), (6, 2), finished=True)])
    made.reward_funcs = [lambda **_: [1.0]]
    with pytest.raises(RewardError, match="expected 2 numbers"):
        reward([Episode(1, (5,), (6, 2), finished=True), Episode(0, (5,), (6, 2), finished=True)])


def test_rows_are_told_apart_by_all_their_columns() -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "a", "x": np.array([1, 2])},
        {"prompt": "a", "x": np.array([1, 2])},
        {"prompt": "a", "x": np.array([1])},
        {"prompt": "a", "x": {"y": [1]}},
        {"prompt": "a", "x": {"y": [1]}},
        {"prompt": "a", "x": [np.array([1, 2])]},  # does not compare, so stands alone
        {"prompt": "a", "x": [np.array([1, 2])]},
    ]
    assert rows_of(rows, [[1]] * 7) == [0, 0, 2, 3, 3, 5, 6]
    assert rows_of(rows[:2], [[1], [2]]) == [0, 1]


# --- where values come from ----------------------------------------------------------------------


def test_a_backend_of_one_s_own_gets_the_policy_after_each_step(tmp_path: Path) -> None:
    loaded: list[float] = []

    class Mine(TransformersBackend):
        def load_weights(self, model: Any) -> None:
            loaded.append(float(next(model.parameters()).sum()))
            super().load_weights(model)

    made = trainer(
        tmp_path,
        rollout_backend=lambda _: Mine(tiny(seed=1), TOKENIZER),
        steps_per_generation=1,
    )
    made.train()
    assert len(made.batches) == 4  # two for each step
    assert len(loaded) == 2
    assert loaded[0] != loaded[1]
    seeds = [batch.vines.seed for batch in made.batches]
    assert len(set(seeds)) == 4
    for batch in made.batches[::2]:
        expected = by_hand(batch, 3, made.args)
        torch.testing.assert_close(batch.output["advantages"].double(), expected, rtol=0, atol=1e-6)


def test_any_value_estimator_may_stand_in_place_of_rollouts(tmp_path: Path) -> None:
    made = trainer(
        tmp_path, value_estimator=ConstantValueEstimator(0.25), segmenter="token", whiten=None,
        max_value_steps=2, max_steps=1,
    )  # fmt: skip
    made.train()
    [batch] = made.batches
    for row, score in enumerate(batch.vines.credit.scores):
        ids = batch.vines.completion_ids[row]
        expected = np.zeros(len(ids))
        expected[min(1, len(ids) - 1)] = score - 0.25  # the step that crosses the cap
        found = batch.output["advantages"][row][: len(ids)]
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)
    [entry] = [e for e in made.state.log_history if "vine/value_mean" in e]
    assert entry["vine/value_mean"] == 0.25
    assert "vine/rollouts" not in entry


def test_evaluation_rolls_nothing_out(tmp_path: Path) -> None:
    made = trainer(
        tmp_path, eval_dataset=Dataset.from_list(PROMPTS[:2]), per_device_eval_batch_size=4
    )
    result = made.evaluate()
    assert np.isfinite(result["eval_loss"])
    assert not any(key.startswith("eval_vine") for key in result)
    assert made._backend.usage.requests == 0
    assert made.last_vines is None
    assert made.batches[0].output["advantages"].ndim == 1


def by_rollout_func(prompts: list[str], trainer: Any, **more: Any) -> dict[str, Any]:
    """Answers that are all the same, of two steps."""
    answer = [*TOKENIZER("a\nb")["input_ids"], TOKENIZER.eos_token_id]
    return {
        "prompt_ids": [TOKENIZER(prompt)["input_ids"] for prompt in prompts],
        "completion_ids": [answer] * len(prompts),
        "logprobs": [[-1.0] * len(answer)] * len(prompts),
        **more,
    }


def test_answers_of_a_rollout_func_are_credited_unless_others_wrote_in_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    made = trainer(tmp_path, rollout_func=by_rollout_func, max_steps=1, whiten=None)
    made.train()
    [batch] = made.batches
    assert batch.vines.credit.step_borders == ((0, 2, 4),) * 8
    for scores, values, advantages in zip(
        batch.vines.credit.scores,
        batch.vines.credit.step_values,
        batch.output["advantages"].double().numpy(),
        strict=True,
    ):
        first, second = values[1] - values[0], scores - values[1]
        np.testing.assert_allclose(advantages, [first, first, second, second], atol=1e-6)

    def with_tools(prompts: list[str], trainer: Any) -> dict[str, Any]:
        return by_rollout_func(prompts, trainer, env_mask=[[1, 0, 1, 1]] * len(prompts))

    with pytest.raises(InvalidInputError, match=r"rollout_func: .*got an env_mask"):
        trainer(tmp_path, rollout_func=with_tools).train()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vllm_tensor_parallel_size": 2}, "vllm_tensor_parallel_size: expected 1, got 2"),
        ({"vllm_enable_sleep_mode": True}, "vllm_enable_sleep_mode: expected False"),
    ],
)
def test_an_engine_of_trl_that_is_not_this_process_s_alone_is_refused(
    change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    check_shared_vllm(config(tmp_path))
    with pytest.raises(InvalidInputError, match=said):
        check_shared_vllm(config(tmp_path, **change))


def test_an_adapter_of_peft_is_rolled_out_and_trained(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    made = trainer(
        tmp_path, max_steps=1, gradient_checkpointing=True,
        peft_config=peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
    )  # fmt: skip
    made.train()
    [batch] = made.batches
    assert made._backend.usage.requests > 0
    assert batch.output["advantages"].ndim == 2
    assert made.model.training


TWO_RANKS = """
import json, sys
from pathlib import Path
import torch
sys.path.insert(0, str(Path(sys.argv[1]).parent))
from test_integration_trl import trainer
torch.set_num_threads(1)
made = trainer(Path(sys.argv[2]), max_steps=1, per_device_train_batch_size=2)
made.train()
[batch] = made.batches
mask = batch.output["completion_mask"].bool()
found = {
    "advantages": batch.output["advantages"][mask].tolist(),
    "raw": batch.vines.credit.padded(mask.shape[1])[mask].tolist(),
    "log": made.state.log_history[0] if made.state.log_history else {},
}
# To a file of its own: lines that two processes print may be mixed.
Path(sys.argv[2], f"rank{made.accelerator.process_index}.json").write_text(json.dumps(found))
"""


@pytest.mark.slow
def test_two_processes_whiten_over_the_tokens_of_both(tmp_path: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(textwrap.dedent(TWO_RANKS))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(script), str(Path(__file__).resolve()), str(tmp_path)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    raw = torch.cat([torch.tensor(rank["raw"], dtype=torch.float64) for rank in ranks])
    found = torch.cat([torch.tensor(rank["advantages"], dtype=torch.float64) for rank in ranks])
    expected = (raw - raw.mean()) * torch.rsqrt(raw.var() + 1e-8)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert ranks[0]["log"]["vine/advantage_abs_mean"] == pytest.approx(float(raw.abs().mean()))


# --- the callback form ---------------------------------------------------------------------------


def test_a_loop_of_one_s_own_gets_the_advantages_that_the_trainer_has(trained: Any) -> None:
    batch = trained.batches[0]
    vines: VineBatch = batch.vines
    model = tiny()
    model.load_state_dict(batch.weights)

    def reward(episodes: Sequence[Episode]) -> list[float]:
        letters = [batch.inputs[episode.row]["wanted"] for episode in episodes]
        texts = [decoded(episode.response_ids) for episode in episodes]
        return share_of_wanted(texts, letters)

    callback = vine_values(
        TransformersBackend(model, TOKENIZER),
        reward,
        params=SamplingParams(16, 0.8, 0.9),
        tokenizer=TOKENIZER,
        num_rollouts=3,
        max_response_tokens=16,
    )
    credit = callback(
        vines.prompt_ids, vines.completion_ids, vines.finished, vines.rows, seed=vines.seed
    )
    for mine, theirs in (
        (credit.advantages, vines.credit.advantages),
        (credit.step_values, vines.credit.step_values),
    ):
        for a, b in zip(mine, theirs, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)
    assert credit.step_borders == vines.credit.step_borders
    padded = credit.padded(16)
    assert padded.shape == (8, 16)
    assert not padded[0, len(vines.completion_ids[0]) :].any()


def test_exact_values_of_a_tree_give_its_exact_advantages() -> None:
    tree = TokenTree.random(vocabulary=3, horizon=4, seed=0)
    callback = VineValues(ExactValueEstimator(tree), segmenter="token")
    answers = [(0, 1, 2, 0), (2, 2, 1, 1)]
    prompts = [tree.prompt_ids] * 2
    credit = callback(
        prompts, answers, [True] * 2, [0] * 2, scores=[tree.value(answer) for answer in answers]
    )
    for answer, advantages in zip(answers, credit.advantages, strict=True):
        states = [tree.value(answer[:t]) for t in range(5)]
        np.testing.assert_allclose(advantages, np.diff(states), atol=1e-12)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rows": [0]}, "prompt_ids, completion_ids, finished, rows: .*got 2, 2, 2, 1"),
        ({"completion_ids": [[1], []]}, r"completion_ids\[1\]: expected at least one token"),
        ({"prompt_ids": [[], [1]]}, r"prompt_ids\[0\]: expected at least one token"),
        ({"scores": [0.0, np.inf]}, "scores: expected 2 numbers"),
        ({"scores": None}, "scores: expected one number per answer, got None and no reward"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused_by_name(change: dict[str, Any], said: str) -> None:
    arguments: dict[str, Any] = {
        "prompt_ids": [[1], [1]], "completion_ids": [[1, 2], [2]], "finished": [True, False],
        "rows": [0, 0], "scores": [0.0, 1.0],
    }  # fmt: skip
    callback = VineValues(ConstantValueEstimator(), segmenter=FixedLengthSegmenter(1))
    with pytest.raises(InvalidInputError, match=said):
        callback(**{**arguments, **change})
    with pytest.raises(InvalidInputError, match="width: expected at least 2"):
        callback(**arguments).padded(1)


def blocks(language: str) -> list[str]:
    text = PAGE.read_text(encoding="utf-8")
    return [part.split("```")[0] for part in text.split(f"```{language}\n")[1:]]


def test_the_page_runs_and_says_what_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    printed = io.StringIO()
    names: dict[str, Any] = {"__name__": "page"}
    with contextlib.redirect_stdout(printed):
        for block in blocks("python"):
            exec(compile(block, str(PAGE), "exec"), names)  # noqa: S102
    assert blocks("text")
    for expected in blocks("text"):
        assert expected in printed.getvalue()
