from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gsm_compose.errors import RewardError
from gsm_compose.integrations.verl_data import compute_score
from gsm_compose.prompts import CONDITIONS
from gsm_compose.rewards import (
    code_reward,
    completion_text,
    composition_reward,
    format_reward,
    judge_text,
    q1_reward,
    stepwise_reward,
)
from gsm_compose.solutions import gold_answers, reference_solution

if TYPE_CHECKING:
    from gsm_compose.items import Item

RIGHT = "9*2/3=6. The Q1 answer is 6. Therefore X=6.\n6*4*2=48. The final answer is 48."
ONLY_Q1 = "The Q1 answer is 6. Therefore X=6. The final answer is 47."
LUCKY = "The Q1 answer is 5. Therefore X=5. The final answer is 48."
UNMARKED = "6 and then 48"
TEXTS = [RIGHT, ONLY_Q1, LUCKY, UNMARKED, ""]
PROMPTS = ["?"] * len(TEXTS)
COLUMNS: dict[str, Any] = {"gold_final": [48] * len(TEXTS), "gold_x": [6] * len(TEXTS)}


def test_rewards_of_right_half_right_lucky_unmarked_and_empty_answers() -> None:
    assert composition_reward(PROMPTS, TEXTS, **COLUMNS) == [1, 0, 1, 0, 0]
    assert q1_reward(PROMPTS, TEXTS, **COLUMNS) == [1, 1, 0, 0, 0]
    assert stepwise_reward(PROMPTS, TEXTS, **COLUMNS) == [1, 0.3, 1, 0, 0]
    assert format_reward(PROMPTS, TEXTS, **COLUMNS) == [1, 1, 1, 0, 0]


def test_chat_messages_are_worth_what_their_text_is_worth() -> None:
    chats = [[{"role": "assistant", "content": text}] for text in TEXTS]
    for reward in (composition_reward, q1_reward, stepwise_reward, format_reward):
        assert reward(PROMPTS, chats, **COLUMNS) == reward(PROMPTS, TEXTS, **COLUMNS)


def test_only_what_the_assistant_says_counts() -> None:
    messages: list[dict[str, Any]] = [
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "tool", "content": "The final answer is 48."},
        {"role": "assistant", "content": [{"type": "text", "text": "The final answer is 7."}]},
    ]
    assert completion_text(messages) == "\nThe final answer is 7."
    assert composition_reward(["?"], [messages], gold_final=[48]) == [0]


def test_a_missing_gold_value_means_that_the_reward_does_not_apply() -> None:
    assert composition_reward("??", [RIGHT, RIGHT], gold_final=[None, 48]) == [None, 1]
    assert q1_reward("??", [RIGHT, RIGHT], gold_x=[6, None]) == [1, None]
    # A single question has no first answer, but its reward applies.
    assert stepwise_reward("??", [ONLY_Q1, RIGHT], gold_final=[48, 48], gold_x=[None, None]) == [
        0,
        1,
    ]


def test_gold_values_may_be_digits() -> None:
    assert composition_reward("?", [RIGHT], gold_final=["48"]) == [1]


@pytest.mark.parametrize(
    ("columns", "named"),
    [
        ({"gold_final": [48]}, "gold_final: expected one value for each of the 2 completions"),
        ({"gold_final": "48"}, "gold_final: expected one value for each of the 2 completions"),
        ({"gold_final": [48, "many"]}, "gold_final: expected an integer or its digits"),
    ],
)
def test_columns_that_do_not_fit_are_refused_by_name(columns: dict[str, Any], named: str) -> None:
    with pytest.raises(RewardError, match=named):
        composition_reward("??", [RIGHT, RIGHT], **columns)


@pytest.mark.parametrize("completion", [None, 7, [{"text": "48"}], ["48"]])
def test_completions_of_another_form_are_refused(completion: Any) -> None:
    with pytest.raises(RewardError, match="completions: expected texts or lists of messages"):
        composition_reward(["?"], [completion], gold_final=[48])


@pytest.mark.parametrize("credit", [-0.1, 1.5])
def test_partial_credit_outside_the_unit_interval_is_refused(credit: float) -> None:
    with pytest.raises(RewardError, match="q1_credit"):
        partial(stepwise_reward, q1_credit=credit)(PROMPTS, TEXTS, **COLUMNS)
    with pytest.raises(RewardError, match="q1_credit"):
        compute_score("gsm-compose", RIGHT, "48", {}, q1_credit=credit)


@given(st.integers(1, 10**6), st.integers(1, 10**6), st.integers(1, 10**6), st.integers(1, 10**6))
def test_reward_depends_on_the_marked_numbers_alone(a: int, b: int, x: int, final: int) -> None:
    text = f"Say {final}. The Q1 answer is {a}. Therefore X={a}.\nThe final answer is {b:,}."
    found = judge_text(text, final, x)
    assert (found.final, found.q1, found.marked) == (b == final, a == x, True)
    assert judge_text(text, None, None).credit(0.5) == 0


@given(st.text(max_size=200))
def test_no_text_breaks_a_reward(text: str) -> None:
    for reward in (composition_reward, q1_reward, stepwise_reward, format_reward):
        (value,) = reward(["?"], [text], gold_final=[48], gold_x=[6])
        assert value in (0.0, 0.3, 1.0)


def test_reference_solutions_earn_the_full_reward(items: tuple[Item, ...]) -> None:
    for item in items:
        for condition in CONDITIONS:
            if condition in ("code", "original-q2"):
                continue
            final, x = gold_answers(item, condition)
            found = judge_text(reference_solution(item, condition), final, x)
            assert found.final
            assert found.q1 == (x is not None)


def test_code_earns_its_reward_by_being_run(items: tuple[Item, ...]) -> None:
    right = reference_solution(items[1], "code")
    wrong = right.replace("3 * 4", "3 + 4")
    texts = [right, wrong, "```python\nwhile True: pass", "The final answer is 6."]
    assert code_reward("????", texts, gold_final=[items[1].gold] * 4) == [1, 0, 0, 0]
    assert code_reward("?", [right], gold_final=[None]) == [None]


@pytest.mark.parametrize(("text", "score"), list(zip(TEXTS, [1, 0.2, 1, 0, 0], strict=True)))
def test_verl_score_is_the_stepwise_reward(text: str, score: float) -> None:
    found = compute_score("gsm-compose", text, "48", {"gold_x": 6}, q1_credit=0.2, num_turns=1)
    assert found["score"] == score
    assert found["acc"] == composition_reward("?", [text], gold_final=[48])[0]
    assert found["q1"] == q1_reward("?", [text], gold_x=[6])[0]
    assert compute_score("gsm-compose", text, "48") == found | {"score": found["acc"], "q1": 0.0}
