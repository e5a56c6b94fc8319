from __future__ import annotations

import json
import pickle
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrlhf.errors import InvalidInputError
from asyncrlhf.evaluate import sample
from asyncrlhf.tasks import GSM8KReward, SyntheticSummary, load_gsm8k
from asyncrlhf.tasks.fine_tuning import StepDone
from asyncrlhf.tasks.gsm8k import final_number

TASKS = st.builds(
    SyntheticSummary,
    symbols=st.integers(4, 12),
    length=st.integers(5, 7),
    rule=st.sampled_from(["sort", "most_frequent"]),
    noise=st.floats(0, 1),
)


def brute_force_answer(task: SyntheticSummary, prompt: str) -> str:
    letters = list(prompt[:-1])
    if task.rule == "sort":
        return "".join(sorted(letters))
    return "".join(sorted(set(letters), key=lambda letter: (-letters.count(letter), letter)))


def brute_force_score(task: SyntheticSummary, prompt: str, tokens: list[str]) -> float:
    """The gold score of an answer written as a list of tokens."""
    answer = brute_force_answer(task, prompt)
    if "<eos>" not in tokens:
        return task.penalty
    kept = tokens[: tokens.index("<eos>")]
    if len(kept) > len(answer):
        return task.penalty
    return sum(a == b for a, b in zip(kept, answer, strict=False)) / len(answer)


# --- prompts and texts ----------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(task=TASKS, seed=st.integers(0, 2**40), n=st.integers(1, 60), more=st.integers(0, 60))
def test_the_first_prompts_do_not_depend_on_how_many_follow(
    task: SyntheticSummary, seed: int, n: int, more: int
) -> None:
    few, many = task.prompts(n, seed), task.prompts(n + more, seed)
    assert few == many[:n]
    assert few != task.prompts(n + 5, seed + 1)[:n] or n < 3


def test_no_prompt_of_evaluation_is_in_another_stream() -> None:
    task = SyntheticSummary(symbols=4, length=5)  # so few prompts that all of them are drawn
    drawn = {
        stream: {row["prompt"] for row in task.prompts(10_000, seed, stream)}
        for seed, stream in enumerate(("sft", "train", "reward_model", "eval"))
    }
    assert drawn["sft"] == drawn["train"] == drawn["reward_model"]
    assert not drawn["train"] & drawn["eval"]
    assert len(drawn["train"] | drawn["eval"]) == 4**5
    assert len(drawn["eval"]) / 4**5 == pytest.approx(1 / 8, abs=0.03)


def test_streams_differ_but_for_what_they_may_share() -> None:
    task = SyntheticSummary()
    streams = [task.prompts(20, 0, name) for name in ("sft", "train", "reward_model", "eval")]
    assert all(streams[i] != streams[j] for i in range(4) for j in range(i))


@settings(deadline=None, max_examples=20)
@given(task=TASKS, seed=st.integers(0, 1000))
def test_texts_and_ids_are_two_forms_of_the_same(task: SyntheticSummary, seed: int) -> None:
    tokenizer = task.tokenizer()
    for row in task.sft_examples(5, seed):
        assert tokenizer(row["prompt"])["input_ids"] == row["prompt_ids"]
        assert task.encode(row["prompt"]) == row["prompt_ids"]
        joined = row["prompt"] + row["completion"]
        ids = tokenizer(joined)["input_ids"]
        assert [*ids, task.eos_token_id] == [*row["prompt_ids"], *row["completion_ids"]]
        assert tokenizer.decode(ids) == joined
        decoded = tokenizer.decode(row["completion_ids"], skip_special_tokens=True)
        assert decoded == row["completion"]


def test_the_tokenizer_tells_padding_from_the_end_and_survives_saving(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    task = SyntheticSummary()
    tokenizer = task.tokenizer()
    assert tokenizer.is_fast
    assert len(tokenizer) == task.vocab_size <= 20
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (
        task.pad_token_id,
        task.eos_token_id,
    )
    assert task.pad_token_id != task.eos_token_id
    assert tokenizer.convert_tokens_to_ids(">") == task.sep_token_id
    assert tokenizer("z")["input_ids"] == [tokenizer.unk_token_id]
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again("cafbb>")["input_ids"] == tokenizer("cafbb>")["input_ids"]


def test_noise_replaces_the_share_of_symbols_it_says() -> None:
    for noise in (0.0, 0.35, 0.7, 1.0):
        task = SyntheticSummary(noise=noise)
        rows = task.sft_examples(4000, 3)
        wrong = [
            given != right
            for row in rows
            for given, right in zip(
                row["completion"], brute_force_answer(task, row["prompt"]), strict=True
            )
        ]
        # One replacement in twelve is the right symbol.
        assert np.mean(wrong) == pytest.approx(noise * 11 / 12, abs=4 * 0.5 / np.sqrt(len(wrong)))


# --- gold -----------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(task=TASKS, seed=st.integers(0, 100), data=st.data())
def test_gold_equals_a_brute_force_over_texts(
    task: SyntheticSummary, seed: int, data: st.DataObject
) -> None:
    rows = task.prompts(6, seed)
    vocabulary = [*"abcdefghijkl"[: task.symbols], ">", "<eos>", "<eos>", "<pad>", "<unk>"]
    answers = []
    for row in rows:
        right = list(brute_force_answer(task, row["prompt"]))
        begun = right[: data.draw(st.integers(0, len(right)))]
        answers.append([*begun, *data.draw(st.lists(st.sampled_from(vocabulary), max_size=12))])
    tokenizer = task.tokenizer()
    ids = [tokenizer.convert_tokens_to_ids(answer) if answer else [] for answer in answers]
    found = task.gold_score([row["prompt_ids"] for row in rows], ids)
    wanted = [
        brute_force_score(task, row["prompt"], answer)
        for row, answer in zip(rows, answers, strict=True)
    ]
    assert found.tolist() == pytest.approx(wanted)
    assert task.gold(prompts=[row["prompt"] for row in rows], completions=[], completion_ids=ids) \
        == found.tolist()  # fmt: skip


def test_the_right_answer_scores_one_and_only_it() -> None:
    for rule in ("sort", "most_frequent"):
        task = SyntheticSummary(rule=rule)
        prompts = [row["prompt_ids"] for row in task.prompts(200, 1)]
        right = [task.target(prompt) for prompt in prompts]
        assert (task.gold_score(prompts, right) == 1).all()
        early = task.gold_score(prompts, [answer[1:] for answer in right])
        assert ((early < 1) & (early >= 0)).all()
        late = [[*answer[:-1], answer[0], task.eos_token_id] for answer in right]
        assert (task.gold_score(prompts, late) == task.penalty).all()
        assert (task.gold_score(prompts, [a[:-1] for a in right]) == task.penalty).all()


def test_gold_refuses_prompts_that_are_none() -> None:
    task = SyntheticSummary()
    good = task.encode("cafbb>")
    for bad in (good[:-1], [*good, 3], [1, *good[1:]], [*good[:-1], 4]):
        with pytest.raises(InvalidInputError, match=r"prompt_ids\[1\]"):
            task.gold_score([good, bad], [[1], [1]])
    with pytest.raises(InvalidInputError, match="one prompt per answer"):
        task.gold_score([good], [])
    for text in ("cafbb", "cafbz>", "cafbbb>", ""):
        with pytest.raises(InvalidInputError, match="prompt: expected"):
            task.encode(text)


def test_the_gold_reward_travels_to_other_processes() -> None:
    task = SyntheticSummary(rule="most_frequent")
    again = pickle.loads(pickle.dumps(task.gold))
    assert again == task.gold
    answers = [task.target(task.encode("cafbb>")), [1]]
    assert again(
        prompts=["cafbb>"] * 2, completions=["", ""], completion_ids=answers, trainer_state=None
    ) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"symbols": 1}, "symbols"),
        ({"symbols": 27}, "symbols"),
        ({"length": 2}, "length"),
        ({"rule": "reverse"}, "rule"),
        ({"noise": 1.5}, "noise"),
        ({"penalty": 0.0}, "penalty"),
    ],
)
def test_tasks_that_make_no_sense_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=f"^{message}: expected"):
        SyntheticSummary(**changed)
    with pytest.raises(InvalidInputError, match="stream: expected"):
        SyntheticSummary().prompts(1, 0, "test")  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="n: expected"):
        SyntheticSummary().prompts(0)


# --- the fine-tuned model -------------------------------------------------------------------------


def perfect_gold(task: SyntheticSummary, temperature: float) -> float:
    """Gold score of a model that has learnt the noisy answers of fine-tuning exactly."""
    wrong = task.noise / task.symbols
    right = 1 - task.noise + wrong
    powers = [right ** (1 / temperature), wrong ** (1 / temperature)]
    return powers[0] / (powers[0] + (task.symbols - 1) * powers[1])


def sampled_gold(task: SyntheticSummary, model: Any, temperature: float) -> float:
    prompts = [row["prompt_ids"] for row in task.prompts(512, 0, "eval")]
    drawn = sample(
        model, prompts, max_new_tokens=task.max_completion_length, temperature=temperature
    )
    return float(task.gold_score(drawn.prompt_ids, drawn.completion_ids).mean())


def test_fine_tuning_nears_what_its_noise_allows() -> None:
    # The standard task needs 500 steps (below); four symbols show the same in a fifth of them.
    task = SyntheticSummary(symbols=4, noise=0.5)
    model = task.sft_model(0, 100, batch_size=64)
    assert not model.training
    assert model.config.model_type == "gpt_neox"
    for temperature in (0.7, 1.0):
        limit = perfect_gold(task, temperature)
        assert limit - 0.12 < sampled_gold(task, model, temperature) < limit + 0.03


@pytest.mark.slow
def test_fine_tuning_gives_the_gold_score_of_the_pilot() -> None:
    task = SyntheticSummary()
    assert perfect_gold(task, 0.7) == pytest.approx(0.5487, abs=1e-4)
    # 0.513 was seen with another architecture and seed.
    assert sampled_gold(task, task.sft_model(), 0.7) == pytest.approx(0.513, abs=0.03)


def test_the_same_arguments_give_the_same_weights_and_leave_the_random_state() -> None:
    task = SyntheticSummary()
    before = torch.get_rng_state()
    one, again, other = (task.sft_model(seed, 3, batch_size=8) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    pairs = zip(one.state_dict().items(), again.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for (_, a), b in pairs)
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)


def test_progress_is_told_after_every_step() -> None:
    told: list[StepDone] = []
    SyntheticSummary().sft_model(0, 3, batch_size=8, on_step=told.append)
    assert [(done.step, done.steps) for done in told] == [(1, 3), (2, 3), (3, 3)]
    assert all(np.isfinite(done.loss) for done in told)
    assert told[-1].seconds_left == 0


def test_kept_weights_are_those_that_were_trained(tmp_path: Path) -> None:
    task = SyntheticSummary()
    told: list[StepDone] = []
    first = task.sft_model(0, 2, batch_size=8, cache_dir=tmp_path / "new", on_step=told.append)
    again = task.sft_model(0, 2, batch_size=8, cache_dir=tmp_path / "new", on_step=told.append)
    assert len(told) == 2
    assert all(map(torch.equal, first.state_dict().values(), again.state_dict().values()))
    task.sft_model(0, 3, batch_size=8, cache_dir=tmp_path / "new", on_step=told.append)
    assert len(told) == 5
    assert len(list((tmp_path / "new").iterdir())) == 2


def test_training_without_steps_is_refused() -> None:
    for arguments in ({"steps": 0}, {"batch_size": 0}, {"learning_rate": 0.0}, {"width": 50}):
        with pytest.raises(InvalidInputError, match=next(iter(arguments))):
            SyntheticSummary().sft_model(0, **arguments)  # type: ignore[arg-type]


# --- GSM8K ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so\n#### 18", "18"),
        ("#### 1,234", "1234"),
        ("#### $1,234.50.", "1234.5"),
        ("####18.", "18"),
        ("#### -7", "-7"),
        ("#### -$7", "-7"),
        ("#### .5 litres", "0.5"),
        ("#### 18.0", "18"),
        ("#### 3\n\nQuestion: 4", "3"),
        ("first #### 3, no: #### 4", "4"),
        ("#### eighteen", None),
        ("#### ", None),
        ("it is 18", None),
        ("", None),
    ],
)
def test_the_number_behind_the_last_mark_counts(text: str, number: str | None) -> None:
    assert final_number(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("it is 5, I mean 6.", "6"),
        ("20-8=12", "12"),
        ("20-8", "8"),
        ("it fell to -8", "-8"),
        ("#### none of 3", None),
        ("no number", None),
    ],
)
def test_without_a_mark_the_last_number_may_count(text: str, number: str | None) -> None:
    assert final_number(text, "last_number") == (None if number is None else Decimal(number))


def test_gsm8k_rewards_exact_matches_of_texts_and_chats() -> None:
    reward = pickle.loads(pickle.dumps(GSM8KReward()))
    completions = [
        "x #### 1,000",
        "#### 999",
        "1000",
        [{"role": "assistant", "content": "####1000"}],
    ]
    answer = ["a\n#### 1000", "a\n#### 1000", "#### 1000", "1000"]
    called = {"prompts": [""] * 4, "completion_ids": [[1]] * 4, "trainer_state": None}
    assert reward(completions=completions, answer=answer, **called) == [1.0, 0.0, 0.0, 1.0]
    lenient = GSM8KReward("last_number")
    assert lenient(completions=completions, answer=answer, **called) == [1.0, 0.0, 1.0, 1.0]
    with pytest.raises(InvalidInputError, match=r"answer\[0\]"):
        reward(completions=["#### 1"], answer=["none"])
    with pytest.raises(InvalidInputError, match="fallback"):
        GSM8KReward("first")  # type: ignore[arg-type]


def test_gsm8k_files_are_read_and_bad_lines_named(tmp_path: Path) -> None:
    rows = [{"question": f"{i} + 1?", "answer": f"{i}+1\n#### {i + 1}"} for i in range(3)]
    path = tmp_path / "some.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    loaded = load_gsm8k(path)
    assert loaded == [{"prompt": row["question"], "answer": row["answer"]} for row in rows]
    assert load_gsm8k(path, limit=2) == loaded[:2]
    for line, message in (
        ("{", "one JSON object"),
        ("[]", "one JSON object"),
        ('{"question": "a"}', "'answer'"),
        ('{"question": 3, "answer": "#### 1"}', "'question'"),
        ('{"question": "a", "answer": "1"}', "behind ####"),
    ):
        path.write_text(json.dumps(rows[0]) + "\n" + line + "\n", encoding="utf-8")
        with pytest.raises(InvalidInputError, match=message) as caught:
            load_gsm8k(path)
        assert "some.jsonl, line 2" in str(caught.value)
    path.write_text("\n", encoding="utf-8")
    with pytest.raises(InvalidInputError, match="at least one row"):
        load_gsm8k(path)
    with pytest.raises(InvalidInputError, match="no file"):
        load_gsm8k(tmp_path / "absent.jsonl")
