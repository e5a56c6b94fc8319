from __future__ import annotations

import itertools
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vineppo.tasks
from vineppo.errors import InvalidInputError, NotFiniteError
from vineppo.tasks import ChainArithmetic
from vineppo.tasks.fine_tuning import Batch, StepDone, fine_tune, kept_or_trained

SPLITS = ("train", "validation", "test")
TINY: dict[str, Any] = {"batch_size": 4, "width": 16, "layers": 1}

tasks = st.builds(
    ChainArithmetic,
    operands=st.integers(3, 6),
    modulus=st.integers(7, 120),
    operations=st.sampled_from(["+", "-", "*", "+-", "-*", "+-*", "*+"]),
)


def score(task: ChainArithmetic, row: dict[str, Any], completion: str) -> float:
    (found,) = task.reward([row["prompt"]], [completion], [row["answer"]])
    return found


# --- expressions and their splits ----------------------------------------------------------------


def test_the_example_of_the_documentation() -> None:
    solution = "7+5=2\n2*2=4\n4-3=1\n#### 1"
    assert ChainArithmetic().solution("7+5*2-3=?\n") == solution


@settings(max_examples=60, deadline=None)
@given(task=tasks, seed=st.integers(0, 2**40), split=st.sampled_from(SPLITS))
def test_answers_are_those_of_python_from_left_to_right(
    task: ChainArithmetic, seed: int, split: Any
) -> None:
    for row in task.examples(5, seed, split):
        expression = row["prompt"].removesuffix("=?\n")
        nested = expression
        for sign in "+-*":
            nested = nested.replace(sign, f"){sign}")
        # Reduced at the end only: the ring of remainders allows it.
        value = eval("(" * nested.count(")") + nested) % task.modulus  # noqa: S307
        assert row["answer"] == str(value)
        assert row["solution"].endswith(f"\n#### {value}")
        assert row["solution"].count("\n") == task.steps == task.operands - 1


@settings(max_examples=40, deadline=None)
@given(task=tasks, seeds=st.lists(st.integers(0, 2**40), min_size=3, max_size=3))
def test_no_prompt_is_in_two_splits_whatever_the_seeds(
    task: ChainArithmetic, seeds: list[int]
) -> None:
    found = [
        {row["prompt"] for row in task.examples(40, seed, split)}
        for seed, split in zip(seeds, SPLITS, strict=True)
    ]
    assert all(a.isdisjoint(b) for a, b in itertools.combinations(found, 2))


def test_splits_have_their_shares_of_all_prompts() -> None:
    task = ChainArithmetic(operands=2, modulus=13)
    drawn = {s: {row["prompt"] for row in task.examples(7000, 0, s)} for s in SPLITS}
    assert sum(map(len, drawn.values())) == 3 * 13**2, "every expression is in one of them"
    assert len(drawn["train"]) / (3 * 13**2) == pytest.approx(6 / 8, abs=0.05)
    assert len(drawn["test"]) / (3 * 13**2) == pytest.approx(1 / 8, abs=0.04)


@pytest.mark.parametrize("split", SPLITS)
def test_the_first_examples_do_not_depend_on_how_many_are_asked_for(split: Any) -> None:
    task = ChainArithmetic()
    many = task.examples(300, 5, split)
    assert task.examples(7, 5, split) == many[:7]
    assert task.examples(300, 6, split) != many


def test_operands_and_operations_are_drawn_evenly() -> None:
    rows = ChainArithmetic(operands=5).examples(2000, 0)
    text = "".join(row["prompt"].removesuffix("=?\n") for row in rows)
    for digit in "0123456789":
        assert text.count(digit) / 10_000 == pytest.approx(0.1, abs=0.015)
    for sign in "+-*":
        assert text.count(sign) / 8_000 == pytest.approx(1 / 3, abs=0.03)


# --- the verifier --------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(task=tasks, seed=st.integers(0, 2**40))
def test_every_demonstration_scores_1_and_has_no_wrong_step(
    task: ChainArithmetic, seed: int
) -> None:
    for row in task.examples(5, seed):
        assert score(task, row, row["solution"]) == 1.0
        assert task.first_wrong_step(row["prompt"], row["solution"]) is None


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**40), data=st.data())
def test_only_the_right_last_line_with_nothing_behind_scores_1(seed: int, data: Any) -> None:
    task = ChainArithmetic(operands=4)
    (row,) = task.examples(1, seed)
    solution, answer = row["solution"], row["answer"]
    place = data.draw(st.integers(0, len(solution)))
    inserted = data.draw(st.text("0123456789#=+-* \n", min_size=1, max_size=4))
    changed = solution[:place] + inserted + solution[place:]
    assert score(task, row, changed) == float(changed.split("\n")[-1] == f"#### {answer}")
    assert task.first_wrong_step(row["prompt"], changed) is not None
    assert score(task, row, solution[:place]) == float(place == len(solution))
    wrong = str((int(answer) + 1) % 10)
    assert score(task, row, solution.replace(f"#### {answer}", f"#### {wrong}")) == 0.0
    assert score(task, row, solution + "\n") == score(task, row, solution + inserted) == 0.0


@settings(max_examples=100, deadline=None)
@given(task=tasks, seed=st.integers(0, 2**40), data=st.data())
def test_a_wrong_line_is_found_at_its_place(task: ChainArithmetic, seed: int, data: Any) -> None:
    (row,) = task.examples(1, seed)
    lines = row["solution"].split("\n")
    step = data.draw(st.integers(0, task.steps))
    wrong = data.draw(st.text("0123456789#=+-* ", max_size=8).filter(lambda t: t != lines[step]))
    spoilt = [*lines[:step], wrong, *lines[step + 1 :]]
    assert task.first_wrong_step(row["prompt"], "\n".join(spoilt)) == step
    if step:
        missing = "\n".join(lines[:step])
        assert task.first_wrong_step(row["prompt"], missing) == step
    assert task.first_wrong_step(row["prompt"], row["solution"] + "\n1+1=2") == task.steps + 1


def test_a_wrong_step_that_is_forgiven_scores_1_and_is_still_found() -> None:
    task, row = ChainArithmetic(), {"prompt": "7+5*0=?\n", "answer": "0"}
    forgiven = "7+5=9\n9*0=0\n#### 0"
    assert score(task, row, forgiven) == 1.0
    assert task.first_wrong_step(row["prompt"], forgiven) == 0


def test_the_reward_has_the_signature_of_trl_and_travels_to_other_processes() -> None:
    task = ChainArithmetic()
    rows = task.examples(3)
    said = [[{"role": "assistant", "content": row["solution"]}] for row in rows]
    reward = pickle.loads(pickle.dumps(task.reward))
    assert reward.__name__ == "reward"
    found = reward(
        prompts=[row["prompt"] for row in rows],
        completions=said,
        completion_ids=[[1]] * 3,
        answer=[row["answer"] for row in rows],
        trainer_state=None,
    )
    assert found == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    "prompt", ["", "7+5=?", "7=?\n", "7+5*12=?\n", "7/5=?\n", "7++5=?\n", "7+-5=?\n", "٣+1=?\n"]
)
def test_what_is_no_prompt_is_refused(prompt: str) -> None:
    with pytest.raises(InvalidInputError, match="prompt: expected an expression"):
        ChainArithmetic().first_wrong_step(prompt, "")


def test_settings_out_of_range_are_refused_by_name() -> None:
    for name, value in [("operands", 1), ("modulus", 1), ("operations", ""), ("operations", "++")]:
        with pytest.raises(InvalidInputError, match=f"^{name}: "):
            ChainArithmetic(**{name: value})
    with pytest.raises(InvalidInputError, match=r"^operations: .*'\+/'"):
        ChainArithmetic(operations="+/")
    with pytest.raises(InvalidInputError, match=r"expected at least 256 .* got 200;"):
        ChainArithmetic(operands=2, operations="+-")
    task = ChainArithmetic()
    with pytest.raises(InvalidInputError, match=r"^n: "):
        task.examples(0)
    with pytest.raises(InvalidInputError, match=r"^seed: "):
        task.examples(1, -1)
    with pytest.raises(InvalidInputError, match=r"^split: .*'eval'"):
        task.examples(1, 0, "eval")  # type: ignore[arg-type]
    for name in ("seed", "steps", "batch_size", "learning_rate"):
        with pytest.raises(InvalidInputError, match=f"^{name}: "):
            task.sft_model(**{name: -1})
    with pytest.raises(InvalidInputError, match=r"^width, layers, heads: "):
        task.sft_model(width=30, heads=4)
    with pytest.raises(InvalidInputError, match=r"^until_loss: "):
        task.sft_model(until_loss=-1.0)


# --- tokens --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return ChainArithmetic().tokenizer()


def test_the_tokenizer_is_the_same_for_all_settings(tokenizer: Any) -> None:
    other = ChainArithmetic(3, 12, "-*").tokenizer()
    assert other.get_vocab() == tokenizer.get_vocab()


@settings(max_examples=30, deadline=None)
@given(task=tasks, seed=st.integers(0, 2**40))
def test_ids_are_the_tokenizers_and_answers_fit_their_room(
    tokenizer: Any, task: ChainArithmetic, seed: int
) -> None:
    for row in task.examples(3, seed):
        assert tokenizer(row["prompt"])["input_ids"] == row["prompt_ids"]
        assert row["prompt_ids"][0] == tokenizer.bos_token_id
        ids = tokenizer(row["solution"], add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == row["solution"]
        assert len(ids) + 1 <= task.max_response_tokens


def test_the_longest_answer_needs_all_of_its_room() -> None:
    task = ChainArithmetic(operands=2, modulus=30, operations="+")
    assert len(task.solution("10+10=?\n")) + 1 == task.max_response_tokens


# --- fine-tuning ---------------------------------------------------------------------------------


def equal(a: Any, b: Any) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def test_fine_tuning_is_the_same_bit_for_bit_and_leaves_the_random_state_alone() -> None:
    task = ChainArithmetic(operands=3)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = task.sft_model(3, 5, **TINY)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert equal(first, task.sft_model(3, 5, **TINY))
    assert not equal(first, task.sft_model(4, 5, **TINY))
    assert not first.training
    assert {p.dtype for p in first.parameters()} == {torch.float32}


def test_a_kept_model_is_the_trained_one_and_is_not_trained_again(tmp_path: Path) -> None:
    task = ChainArithmetic(operands=3)
    taken: list[StepDone] = []
    trained = task.sft_model(3, 5, **TINY)
    folder = tmp_path / "made" / "if absent"
    for _ in range(2):
        kept = task.sft_model(3, 5, **TINY, cache_dir=folder, on_step=taken.append)
        assert equal(kept, trained)
        assert not kept.training
    assert [done.step for done in taken] == [1, 2, 3, 4, 5]
    for other in ({"steps": 6}, {"seed": 4}, {"learning_rate": 1e-3}, {"until_loss": 0.5}):
        task.sft_model(**{"seed": 3, "steps": 5, **TINY, "cache_dir": folder, **other})
    ChainArithmetic(operands=4).sft_model(3, 5, **TINY, cache_dir=folder)
    assert len(list(folder.iterdir())) == 6


def test_a_training_that_fails_leaves_nothing_in_the_folder(tmp_path: Path) -> None:
    class Unsaveable(torch.nn.Linear):
        def state_dict(self) -> Any:  # type: ignore[override]
            return {"no pickle": lambda: None}

    with pytest.raises(Exception, match="pickle"):
        kept_or_trained(Unsaveable(1, 1), tmp_path, "settings", lambda _: None)
    with pytest.raises(ZeroDivisionError):
        kept_or_trained(torch.nn.Linear(1, 1), tmp_path, "settings", lambda _: 1 // 0)
    assert list(tmp_path.iterdir()) == []


def test_training_learns_and_ends_once_the_loss_is_low_enough() -> None:
    task = ChainArithmetic(operands=4, modulus=3)
    losses: list[float] = []
    task.sft_model(0, 60, **TINY, until_loss=0.0, on_step=lambda d: losses.append(d.loss))
    assert sum(losses[-20:]) / 20 < 0.5 * losses[0]
    middle = sum(losses[20:40]) / 20
    again: list[float] = []
    task.sft_model(0, 60, **TINY, until_loss=middle, on_step=lambda d: again.append(d.loss))
    assert 20 <= len(again) <= 40
    assert again == losses[: len(again)], "the same course, ended sooner"
    assert sum(again[-20:]) / 20 <= middle + 1e-12


def test_prompts_and_padding_are_not_learnt(tokenizer: Any) -> None:
    task = ChainArithmetic(operands=3, modulus=12)
    rows = [r | {"n": len(r["prompt_ids"])} for r in task.examples(8)]
    batch = task._demonstrations(rows)
    for row, ids, learnt in zip(rows, batch.ids, batch.learnt, strict=True):
        assert tokenizer.decode(ids[learnt]) == row["solution"] + "<eos>"
        assert ids[: row["n"]].tolist() == row["prompt_ids"]
        assert not learnt[: row["n"]].any()
        assert (ids[row["n"] :][~learnt[row["n"] :]] == tokenizer.pad_token_id).all()
    assert len({int(n) for n in batch.learnt.sum(axis=1)}) > 1, "some rows are padded"
    # The loss of the first step is that of the answers alone, row by row.
    model = task.sft_model(0, 1, **TINY)
    total, count = 0.0, 0
    for row in rows:
        answer = [*tokenizer(row["solution"], add_special_tokens=False)["input_ids"], 2]
        with torch.no_grad():
            logits = model(torch.tensor([[*row["prompt_ids"], *answer]])).logits[0]
        logprobs = logits.double().log_softmax(-1)[row["n"] - 1 : -1]
        total -= sum(float(lp[token]) for lp, token in zip(logprobs, answer, strict=True))
        count += len(answer)
    (loss,) = fine_tune(model, lambda _: batch, 1, 1e-3)
    assert loss == pytest.approx(total / count, rel=1e-5)


def test_a_loss_that_is_not_finite_stops_training() -> None:
    task = ChainArithmetic(operands=3)
    model = task.sft_model(0, 1, **TINY)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("inf"))

    def batch(_: int) -> Batch:
        return task._demonstrations(task.examples(2))

    with pytest.raises(NotFiniteError, match=r"in step 1; lower learning_rate"):
        fine_tune(model, batch, 3, 1e-3)


# --- the face ------------------------------------------------------------------------------------


def test_the_face_offers_what_it_names_and_imports_none_of_it() -> None:
    for name in vineppo.tasks.__all__:
        assert getattr(vineppo.tasks, name).__name__ == name
    assert set(vineppo.tasks.__all__) <= set(dir(vineppo.tasks))
    with pytest.raises(AttributeError, match="no attribute 'Sudoku'"):
        _ = vineppo.tasks.Sudoku
    code = (
        "import sys, vineppo.tasks; from vineppo.tasks import ChainArithmetic, GSM8K; "
        "ChainArithmetic().examples(3); "
        "print(*{'torch', 'transformers', 'decapod'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")
