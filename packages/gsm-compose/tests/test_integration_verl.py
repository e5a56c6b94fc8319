from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gsm_compose.benchmark import Benchmark
from gsm_compose.integrations.open_instruct_data import VERIFIER, write_open_instruct_jsonl
from gsm_compose.integrations.verl_data import compute_score, write_verl_parquet
from gsm_compose.prompts import Condition, PromptSpec
from gsm_compose.solutions import reference_solution


@pytest.fixture(scope="module")
def training(benchmark: Benchmark) -> Benchmark:
    return Benchmark(tuple(replace(item, split="train") for item in benchmark), benchmark.settings)


def _tokenizer(benchmark: Benchmark) -> Any:
    pytest.importorskip("decapod.lm")
    from decapod.lm.tiny import build_tokenizer

    texts = [hop.question for item in benchmark for hop in item.hops]
    return build_tokenizer(texts, "bpe", chat=True)


def test_file_has_the_columns_that_verl_documents(training: Benchmark, tmp_path: Path) -> None:
    import pyarrow.parquet

    write_verl_parquet(training, tmp_path / "train.parquet")
    rows = pyarrow.parquet.read_table(tmp_path / "train.parquet").to_pylist()
    for index, (row, item) in enumerate(zip(rows, training, strict=True)):
        assert list(row) == ["data_source", "prompt", "ability", "reward_model", "extra_info"]
        assert row["data_source"] == "gsm-compose/compositional"
        assert [message["role"] for message in row["prompt"]] == ["user"]
        assert row["reward_model"] == {"style": "rule", "ground_truth": str(item.gold)}
        assert row["extra_info"] == {
            "split": "train",
            "index": index,
            "item": item.id,
            "gold_x": item.x,
            "ignored": item.ignored,
        }


def test_files_of_several_conditions_can_be_joined(training: Benchmark, tmp_path: Path) -> None:
    import datasets

    paths = []
    conditions: tuple[Condition, ...] = ("compositional", "original")
    for condition in conditions:
        paths.append(str(tmp_path / f"{condition}.parquet"))
        write_verl_parquet(training, paths[-1], condition=condition)
    joined = datasets.load_dataset(
        "parquet", data_files=paths, split="train", cache_dir=str(tmp_path / "cache")
    )
    assert [row["extra_info"]["gold_x"] for row in joined] == [6, 12, 10, None, None, None]


@pytest.mark.slow
def test_verl_loads_the_file_and_its_reward_manager_calls_the_score(
    training: Benchmark, tmp_path: Path
) -> None:
    pytest.importorskip("verl", exc_type=ImportError)
    import torch
    from omegaconf import OmegaConf
    from verl import DataProto
    from verl.trainer.ppo.reward import get_custom_reward_fn
    from verl.utils.dataset.rl_dataset import RLHFDataset, collate_fn
    from verl.workers.reward_manager.naive import NaiveRewardManager

    path = tmp_path / "train.parquet"
    write_verl_parquet(training, path, PromptSpec(shots=1, chat=True))
    tokenizer = _tokenizer(training)
    options = {"max_prompt_length": 1024, "filter_overlong_prompts_workers": 1}
    loaded = RLHFDataset(
        str(path), tokenizer, OmegaConf.create(options | {"cache_dir": str(tmp_path / "cache")})
    )
    assert len(loaded) == len(training)
    batch = collate_fn([loaded[i] for i in range(len(loaded))])
    assert batch["raw_prompt"][0][-1]["role"] == "user"

    settings = {
        "reward": {
            "custom_reward_function": {
                "path": "pkg://gsm_compose.integrations.verl_data",
                "name": "compute_score",
                "reward_kwargs": {"q1_credit": 0.25},
            }
        }
    }
    score = get_custom_reward_fn(OmegaConf.create(settings))
    answers = [reference_solution(item, "compositional") for item in training]
    answers[1] = "The Q1 answer is 12. Therefore X=12. The final answer is 7."
    answers[2] = "I cannot say."
    encoded = tokenizer(answers, return_tensors="pt", padding=True, padding_side="right")
    data = DataProto.from_dict(
        tensors={
            "prompts": torch.full((3, 1), tokenizer.bos_token_id),
            "responses": encoded["input_ids"],
            "attention_mask": torch.cat(
                [torch.ones(3, 1, dtype=torch.long), encoded["attention_mask"]], dim=1
            ),
        },
        non_tensors={key: batch[key] for key in ("data_source", "reward_model", "extra_info")},
    )
    manager = NaiveRewardManager(tokenizer, num_examine=0, compute_score=score)
    found = manager(data, return_dict=True)
    assert found["reward_tensor"].sum(dim=1).tolist() == [1.0, 0.25, 0.0]
    assert found["reward_extra_info"]["q1"] == [1.0, 1.0, 0.0]


def test_open_instruct_rows_end_with_the_solution_and_name_their_verifier(
    training: Benchmark, tmp_path: Path
) -> None:
    for spec in (PromptSpec(shots=0), PromptSpec(shots=2, chat=True)):
        write_open_instruct_jsonl(training, tmp_path / "train.jsonl", spec)
        rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
        for row, item in zip(rows, training, strict=True):
            roles = [message["role"] for message in row["messages"]]
            assert roles == ["user", "assistant"] * (spec.shots * spec.chat + 1)
            assert row["messages"][-1]["content"] == reference_solution(item, "compositional")
            assert (row["ground_truth"], row["dataset"]) == (str(item.gold), VERIFIER)


def test_open_instruct_rows_load_and_fit_a_chat_template(
    training: Benchmark, tmp_path: Path
) -> None:
    import datasets

    write_open_instruct_jsonl(training, tmp_path / "train.jsonl")
    rows = datasets.load_dataset(
        "json",
        data_files=str(tmp_path / "train.jsonl"),
        split="train",
        cache_dir=str(tmp_path / "cache"),
    )
    tokenizer = _tokenizer(training)
    for row in rows:
        # What its tokenization does: all but the answering message is the prompt.
        asked = tokenizer.apply_chat_template(
            row["messages"][:-1], add_generation_prompt=True, tokenize=False
        )
        assert asked.endswith("<assistant>")
        assert compute_score("", row["messages"][-1]["content"], row["ground_truth"])["acc"] == 1
