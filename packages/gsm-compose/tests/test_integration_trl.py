from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from gsm_compose.benchmark import Benchmark
from gsm_compose.integrations.trl_data import TRAINING_SPEC, grpo_dataset, sft_dataset
from gsm_compose.rewards import composition_reward, format_reward, q1_reward, stepwise_reward

pytest.importorskip("trl")
pytest.importorskip("decapod.lm")
# TRL uses names that newer transformers have changed.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore:`\\w*gradient_checkpointing\\w*` is deprecated:FutureWarning"
    ),
]


@pytest.fixture(scope="module")
def training(benchmark: Benchmark) -> Benchmark:
    return Benchmark(tuple(replace(item, split="train") for item in benchmark), benchmark.settings)


def _tiny(benchmark: Benchmark) -> tuple[Any, Any]:
    from decapod.lm.tiny import build_model, build_tokenizer

    texts = [hop.question for item in benchmark for hop in item.hops]
    tokenizer = build_tokenizer(texts, "bpe", chat=True)
    return build_model(len(tokenizer), hidden_size=32, layers=1, max_positions=1024), tokenizer


@pytest.mark.parametrize("chat", [False, True])
def test_grpo_trainer_calls_the_rewards_with_the_columns_of_the_dataset(
    chat: bool, training: Benchmark, tmp_path: Path
) -> None:
    from trl import GRPOConfig, GRPOTrainer

    seen: list[dict[str, Any]] = []

    def spy(**arguments: Any) -> list[float | None]:
        seen.append(arguments)
        return stepwise_reward(**arguments)

    model, tokenizer = _tiny(training)
    trainer = GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=[
            composition_reward,
            q1_reward,
            format_reward,
            partial(stepwise_reward, q1_credit=0.1),
            spy,
        ],
        train_dataset=grpo_dataset(training, replace(TRAINING_SPEC, chat=chat)),
        args=GRPOConfig(
            output_dir=str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=2,
            num_generations=2,
            max_completion_length=6,
            reward_weights=[1.0, 0.2, 0.1, 0.0, 0.0],
            use_cpu=True,
            bf16=False,
            report_to=[],
            save_strategy="no",
            logging_steps=1,
        ),
    )
    trainer.train()
    (history, *_) = trainer.state.log_history
    for name in ("composition_reward", "q1_reward", "format_reward", "stepwise_reward"):
        assert 0.0 <= history[f"rewards/{name}/mean"] <= 1.0
    (arguments,) = seen
    by_id = {item.id: item for item in training}
    assert len(arguments["completions"]) == 2
    assert isinstance(arguments["completions"][0], list if chat else str)
    for identity, final, x in zip(
        arguments["item"], arguments["gold_final"], arguments["gold_x"], strict=True
    ):
        assert (final, x) == (by_id[identity].gold, by_id[identity].x)


def test_rewards_of_single_questions_do_not_apply_to_a_first_answer(training: Benchmark) -> None:
    rows = grpo_dataset(training, condition="original")
    answers = [f"The final answer is {gold}." for gold in rows["gold_final"]]
    columns = {name: rows[name] for name in rows.column_names if name != "prompt"}
    assert composition_reward(rows["prompt"], answers, **columns) == [1, 1, 1]
    assert q1_reward(rows["prompt"], answers, **columns) == [None, None, None]


@pytest.mark.parametrize("chat", [False, True])
def test_sft_trainer_learns_from_the_solutions_and_not_from_the_prompts(
    chat: bool, training: Benchmark, tmp_path: Path
) -> None:
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = _tiny(training)
    rows = sft_dataset(training, replace(TRAINING_SPEC, chat=chat))
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=rows,
        args=SFTConfig(
            output_dir=str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=3,
            max_length=1024,
            use_cpu=True,
            bf16=False,
            report_to=[],
            save_strategy="no",
        ),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    learned = {
        tokenizer.decode(ids[labels != -100], skip_special_tokens=True).strip()
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)
    }
    written = {
        (row["completion"][0]["content"] if chat else row["completion"]).strip() for row in rows
    }
    assert learned == written
    assert all(text.endswith(".") and "The Q1 answer is" in text for text in written)
    trainer.train()
