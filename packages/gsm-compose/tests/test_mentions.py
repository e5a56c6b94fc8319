from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gsm_compose.engine.mentions import find_mentions
from gsm_compose.engine.problems import load_gsm8k
from gsm_compose.engine.slots import candidates, find_slots


def kinds(text: str) -> dict[str, str]:
    return {m.text: m.kind for m in find_mentions(text)}


@pytest.mark.parametrize(
    ("text", "number", "kind"),
    [
        ("He has 12 apples.", "12", "whole"),
        ("It costs $1,200.", "1,200", "whole"),
        ("It costs $3.", "3", "whole"),
        ("It costs $2.50.", "2.50", "decimal"),
        ("about 20% off", "20", "percent"),
        ("about 20 percent off", "20", "percent"),
        ("on the 3rd day", "3", "ordinal"),
        ("at 3 pm", "3", "time"),
        ("at 3:30", "3", "time"),
        ("at 3:30", "30", "time"),
        ("at 5 o'clock", "5", "time"),
        ("from 1 to 4 PM", "1", "time"),
        ("from 9-11 a.m.", "9", "time"),
        ("a 5k run", "5", "glued"),
        ("a 4x6 frame", "4", "glued"),
        ("3-5 days", "3", "glued"),
        ("3-5 days", "5", "glued"),
        ("it is -5 degrees", "5", "glued"),
        ("in 1999 he", "1999", "year"),
        ("worth $1999", "1999", "whole"),
        ("on day 3 he", "3", "label"),
        ("in grade 5", "5", "label"),
        ("player #7", "7", "label"),
        ("a 20-foot rope", "20", "whole"),
    ],
)
def test_kinds_of_numbers(text: str, number: str, kind: str) -> None:
    assert kinds(text)[number] == kind


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("twenty-five birds", 25),
        ("three hundred and five", 305),
        ("a hundred", 100),
        ("two thousand", 2000),
        ("one-third of it", Fraction(1, 3)),
        ("two thirds of it", Fraction(2, 3)),
        ("half of it", Fraction(1, 2)),
        ("1/4 of it", Fraction(1, 4)),
        ("¾ of it", Fraction(3, 4)),
        ("2 1/2 cups", Fraction(5, 2)),
        ("20% of it", Fraction(1, 5)),
        ("20% of it", Fraction(4, 5)),
    ],
)
def test_values_that_a_mention_may_stand_for(text: str, value: Fraction) -> None:
    assert any(value in mention.values for mention in find_mentions(text))


def test_parts_of_a_fraction_are_no_numbers_of_their_own() -> None:
    assert kinds("1/4 of 20") == {"1/4": "fraction", "20": "whole"}


@given(st.text(max_size=80))
def test_any_text_is_read_and_spans_are_where_they_say(text: str) -> None:
    for mention in find_mentions(text):
        assert text[mention.start : mention.end] == mention.text


@pytest.mark.parametrize("split", ["test", "train"])
def test_no_accepted_slot_touches_another_character_of_a_number_or_word(split: str) -> None:
    for problem in load_gsm8k(split)[:700]:
        for slot in find_slots(problem):
            before, after = slot.problem.question[: slot.start], slot.problem.question[slot.end :]
            assert not before[-1:].isalnum()
            assert not after[:1].isalnum()
            assert not after.lstrip().startswith(("%", "percent"))
            assert not (after[:1] in (".", ",", ":", "/") and after[1:2].isdigit())
            assert not (before[-1:] in (".", ",", ":", "/") and before[-2:-1].isdigit())


@pytest.mark.parametrize("split", ["test"])
def test_putting_the_number_back_restores_the_text(split: str) -> None:
    for problem in load_gsm8k(split):
        for slot in candidates(problem):
            replaced = slot.replaced_by("X")
            assert (
                replaced[: slot.start] + slot.text + replaced[slot.start + 1 :] == problem.question
            )
