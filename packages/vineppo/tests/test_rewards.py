"""Reward functions see what TRL shows them, once per answer, and are held to their contract."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

pytest.importorskip("decapod.lm")
pytest.importorskip("transformers")

from decapod.lm import build_tokenizer
from vineppo.dataset import Prompts
from vineppo.episodes import Episode
from vineppo.errors import InvalidInputError, RewardError
from vineppo.rewards import RewardSuite

ROWS = [
    {"prompt": "1+1=", "answer": "2", "level": 1},
    {"prompt": "2+1=", "answer": "3", "level": 2},
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer(["0123456789+=?abc\n "], "char", add_bos=True, chat=True)


@pytest.fixture(scope="module")
def prompts(tokenizer: Any) -> Prompts:
    return Prompts("train_dataset", ROWS, tokenizer, None, 8)


def episode(tokenizer: Any, prompts: Prompts, row: int, text: str, *, cut: bool = False) -> Episode:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    end = () if cut else (tokenizer.eos_token_id,)
    return Episode(row, prompts.ids[row], (*ids, *end), not cut)


def right(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    return [float(c == a) for c, a in zip(completions, answer, strict=True)]


def test_functions_get_texts_ids_and_columns(tokenizer: Any, prompts: Prompts) -> None:
    seen: list[dict[str, Any]] = []

    def score(**given: Any) -> list[float]:
        seen.append(given)
        return [0.5, 1.5, -2.0]

    episodes = [
        episode(tokenizer, prompts, row, text) for row, text in ((1, "3"), (0, "2"), (1, " ab"))
    ]
    found = RewardSuite(score, prompts, tokenizer)(episodes)
    assert found.dtype == np.float64
    assert found.tolist() == [0.5, 1.5, -2.0]
    assert seen == [
        {
            "prompts": ["2+1=", "1+1=", "2+1="],
            "completions": ["3", "2", " ab"],
            "completion_ids": [list(e.response_ids) for e in episodes],
            "answer": ["3", "2", "3"],
            "level": [2, 1, 2],
        }
    ]


def test_equal_answers_are_scored_once(tokenizer: Any, prompts: Prompts) -> None:
    seen: list[str] = []

    def score(completions: list[str], answer: list[str], **_: Any) -> list[float]:
        seen.extend(completions)
        return right(completions, answer)

    suite = RewardSuite(score, prompts, tokenizer)
    episodes = [
        episode(tokenizer, prompts, row, text)
        for row, text in ((0, "2"), (1, "2"), (0, "2"), (1, "3"), (0, "2"))
    ]
    assert suite(episodes).tolist() == [1, 0, 1, 1, 1]
    assert sorted(seen) == ["2", "2", "3"]  # the second "2" answers another row
    for one, expected in zip(episodes, (1, 0, 1, 1, 1), strict=True):
        assert suite([one]).tolist() == [expected]


@pytest.mark.parametrize(("score", "expected"), [(0.0, 0.0), (-1.0, -1.0), (None, 1.0)])
def test_answers_that_were_cut_have_their_own_score(
    tokenizer: Any, prompts: Prompts, score: float | None, expected: float
) -> None:
    episodes = [
        episode(tokenizer, prompts, 0, "2", cut=True), episode(tokenizer, prompts, 0, "2")
    ]  # fmt: skip
    suite = RewardSuite(right, prompts, tokenizer, unfinished_score=score)
    assert suite(episodes).tolist() == [expected, 1.0]
    assert suite(episodes[:1]).tolist() == [expected]
    assert suite([]).tolist() == []


def test_weights_add_functions_up(tokenizer: Any, prompts: Prompts) -> None:
    def length(completions: list[str], **_: Any) -> list[float]:
        return [float(len(text)) for text in completions]

    episodes = [episode(tokenizer, prompts, 0, "2"), episode(tokenizer, prompts, 1, "abc")]
    assert RewardSuite([right, length], prompts, tokenizer)(episodes).tolist() == [2, 3]
    weighted = RewardSuite([right, length], prompts, tokenizer, weights=(2.0, -0.5))
    assert weighted(episodes).tolist() == [1.5, -1.5]


def test_conversations_have_messages_as_completions(tokenizer: Any) -> None:
    rows = [{"prompt": [{"role": "user", "content": "1+1="}], "answer": "2"}]
    prompts = Prompts("train_dataset", rows, tokenizer, None, 8)
    expected = tokenizer.apply_chat_template(
        rows[0]["prompt"], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    assert list(prompts.ids[0]) == expected["input_ids"]
    assert prompts.is_conversation(0)

    def score(prompts: Any, completions: Any, **_: Any) -> list[float]:
        assert prompts == [[{"role": "user", "content": "1+1="}]]
        assert completions == [[{"role": "assistant", "content": "2"}]]
        return [1.0]

    assert RewardSuite(score, prompts, tokenizer)([episode(tokenizer, prompts, 0, "2")]) == [1]


def test_prompts_may_be_token_ids(tokenizer: Any) -> None:
    ids = tokenizer("1+1=")["input_ids"]
    rows = [{"prompt_ids": ids, "answer": "2"}, {"prompt_ids": np.array(ids[:-1]), "answer": "?"}]
    prompts = Prompts("train_dataset", rows, tokenizer, None, 8)
    assert prompts.ids == [tuple(ids), tuple(ids[:-1])]
    assert all(type(token) is int for token in prompts.ids[1])
    assert prompts.texts == ["1+1=", "1+1"]
    assert prompts.columns == ["answer"]


def raises(**_: Any) -> list[float]:
    raise KeyError("solution")


def returns(value: Any, **_: Any) -> Any:
    return value


BAD: list[tuple[Callable[..., Any], str]] = [
    (raises, r"reward_funcs: raises raised KeyError: 'solution'"),
    (partial(returns, [1.0]), r"reward_funcs: expected 2 numbers from partial, got the shape \(1,"),
    (partial(returns, [[1.0, 2.0]]), r"reward_funcs: expected 2 numbers .* shape \(1, 2\)"),
    (partial(returns, 1.0), r"reward_funcs: expected 2 numbers .* shape \(\)"),
    (partial(returns, None), r"reward_funcs: expected 2 numbers .* shape \(\)"),
    (partial(returns, "ab"), r"reward_funcs: expected a number for each .* got 'ab'"),
    (partial(returns, ["a", "b"]), r"reward_funcs: expected a number for each"),
    (partial(returns, [1.0, float("nan")]), r"expected finite numbers .* got nan .* 'abc'"),
    (partial(returns, [float("-inf"), 1.0]), r"expected finite numbers .* got -inf .* '2'"),
    (partial(returns, [None, 1.0]), r"reward_funcs: expected finite numbers"),
]


@pytest.mark.parametrize(("function", "message"), BAD)
def test_functions_that_break_the_contract_are_named(
    tokenizer: Any, prompts: Prompts, function: Callable[..., Any], message: str
) -> None:
    episodes = [episode(tokenizer, prompts, 0, "2"), episode(tokenizer, prompts, 1, "abc")]
    with pytest.raises(RewardError, match=message):
        RewardSuite([right, function], prompts, tokenizer)(episodes)


@pytest.mark.parametrize("functions", [(), [], None, "right", [right, "length"]])
def test_there_must_be_a_function(tokenizer: Any, prompts: Prompts, functions: Any) -> None:
    with pytest.raises(InvalidInputError, match="reward_funcs: expected one function or several"):
        RewardSuite(functions, prompts, tokenizer)


def test_there_must_be_as_many_weights_as_functions(tokenizer: Any, prompts: Prompts) -> None:
    with pytest.raises(InvalidInputError, match=r"reward_weights: expected 1, .* got 2"):
        RewardSuite(right, prompts, tokenizer, weights=(1.0, 2.0))


BAD_ROWS: list[tuple[Any, str]] = [
    (None, r"train_dataset: expected rows with a column prompt or prompt_ids, got NoneType"),
    ("1+1=", r"train_dataset: expected rows .* got str"),
    ({"prompt": ["1+1="]}, r"train_dataset: expected rows .* got dict"),
    ([], r"train_dataset: expected at least one row, got none"),
    ([{"question": "1+1="}], r"train_dataset\[0\]: expected a text or messages .* \['question'\]"),
    ([ROWS[0], {"prompt": 3, "answer": "2"}], r"train_dataset\[1\]: expected a text or messages"),
    ([{"prompt": []}], r"train_dataset\[0\]: expected a text or messages"),
    ([{"prompt_ids": []}], r"train_dataset\[0\]: expected a prompt of at least one token"),
    (["1+1="], r"train_dataset\[0\]: expected a row with columns by name, got str"),
    ([ROWS[0], {"prompt": "1"}], r"train_dataset\[1\]: expected the columns .*answer.* got"),
    ([{"prompt": "1+1=" * 5}], r"train_dataset\[0\]: its prompt of 21 .*=8 are more than the 28"),
]


@pytest.mark.parametrize(("rows", "message"), BAD_ROWS)
def test_rows_without_a_usable_prompt_are_named(tokenizer: Any, rows: Any, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        Prompts("train_dataset", rows, tokenizer, 28, 8)
