"""Numbers and answers as models write them."""

from __future__ import annotations

import sys
from fractions import Fraction
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gsm_compose.numerals import MAX_DIGITS, normalise, numerals, parse_number
from gsm_compose.parse import (
    extract_answer,
    extract_answer_strict,
    extract_q1,
    find_code,
    run_code_solution,
    run_code_solutions,
)

if TYPE_CHECKING:
    from gsm_compose.items import Item

# Numbers that have to be read alike alone, after a marker, and at the end of a sentence.
NUMBERS: list[tuple[str, str]] = [
    ("18", "18"),
    ("$1,234.00", "1234"),
    ("18 dollars", "18"),
    ("**18**", "18"),
    ("*18*", "18"),
    ("**$18**", "18"),
    ("\\boxed{18}", "18"),
    ("$\\boxed{18}$", "18"),
    ("\\boxed{\\text{18 dollars}}", "18"),
    ("3/4", "3/4"),
    ("-5", "-5"),
    ("−5", "-5"),
    ("-$5", "-5"),
    ("$-5", "-5"),
    ("5.0", "5"),
    ("5.25", "21/4"),
    (".5", "1/2"),
    ("5%", "5"),
    ("5\\%", "5"),
    ("1,234,567", "1234567"),
    ("1{,}234", "1234"),
    ("1\\,234", "1234"),
    ("1'234", "1234"),
    ("1’234", "1234"),
    ("1_000", "1000"),
    ("1\u202f234", "1234"),
    ("1\u00a0234", "1234"),
    ("1,23,456", "123456"),
    ("1.234,50", "2469/2"),
    ("1.234.567", "1234567"),
    ("1 1/2", "3/2"),
    ("-1 1/2", "-3/2"),
    ("½", "1/2"),
    ("2½", "5/2"),
    ("1⁄2", "1/2"),
    ("1e3", "1000"),
    ("1.5E+2", "150"),
    ("2e-1", "1/5"),
    ("1.5 × 10^3", "1500"),
    ("1.5 \\times 10^{3}", "1500"),
    ("10^3", "1000"),
    ("１８", "18"),
    ("＄１，２３４．５０", "2469/2"),
    ("٣٤", "34"),
    ("\\frac{3}{4}", "3/4"),
    ("\\dfrac34", "3/4"),
    ("-\\frac{3}{4}", "-3/4"),
    ("1\\frac{1}{2}", "3/2"),
    ("\\$18", "18"),
    ("\\( 18 \\)", "18"),
    ("$18$", "18"),
    ("€18", "18"),
    ("18km", "18"),
    ("007", "7"),
]

UNCERTAIN = ["12,50", "3,4", "1.2.3", "3/0", "3/4/2020", "1e9999", "10^9999", "9" * 700, "0,500"]


@pytest.mark.parametrize(("written", "meant"), NUMBERS)
def test_a_number_is_read_as_it_is_meant(written: str, meant: str) -> None:
    number = Fraction(meant)
    assert extract_answer(written) == number
    for text in (
        f"The final answer is {written}.",
        f"The final answer is: {written}",
        f"Final answer: {written}\n",
        f"**Final Answer**\n\n{written}",
        f"So 7 + 9 = 16. Therefore, the final answer is {written}. I am 100% sure of 3 things.",
        f"The final answer is 3. No: the final answer is {written}.",
        f"The answer is {written}",
        f"**Answer:** {written}",
        f"#### {written}",
        f"The Q1 answer is 77. Therefore X=77. The final answer is {written}.",
    ):
        assert extract_answer(text) == number, text
        assert extract_answer_strict(text) == number, text
    assert extract_q1(f"The Q1 answer is {written}. Then 99.") == number
    assert extract_q1(f"X = {written}. Then 99.") == number


@pytest.mark.parametrize("written", UNCERTAIN)
def test_what_can_be_read_in_two_ways_is_no_answer(written: str) -> None:
    assert extract_answer(written) is None
    # Not the 5 before it either: the model has said something else.
    assert extract_answer(f"It is 5. The final answer is {written}.") is None
    assert extract_answer_strict(f"The final answer is {written}.") is None
    assert extract_q1(f"The Q1 answer is {written}.") is None
    assert parse_number(written) is None


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("", None),
        ("I do not know.", None),
        ("Q1 and X2 and Room_3", None),  # digits of names are no numbers
        ("The final answer is 1 234.", 1234),  # spaces group where a number is announced …
        ("She has 1 234", 234),  # … and nowhere else
        ("The final answer is 6 * 8 = 48.", 48),
        ("The final answer is 6 \\times 8 = 48.", 48),
        ("The final answer is X * 8 = 48", 48),
        ("The final answer is 6(8) = 48", 48),
        ("The final answer is 20% of 50 = 10.", 10),
        ("The final answer is 6 * 8.", None),
        ("The final answer is 48 = 6 * 8.", 48),
        ("The final answer is 48 (6*8 = 48).", 48),
        ("The final answer is 48. Check: 48 / 8 = 6.", 48),
        ("The final answer is 18 - as above.", 18),
        ("The final answer is that Ann has 18 pears.", 18),
        ("The final answer to Q2 is 48.", 48),
        ("The final answer is unknown. It may be 4", 4),
        ("The final answer is 3. The final answer is not clear", 3),
        ("the FINAL   answer is 3", 3),
        ("The final answer is 5. So \\boxed{6}. #### 7", 7),
        ("\\boxed{6}, then \\boxed{48}", 48),
        ("\\boxed{x = 18}", 18),
        ("\\boxed{3 \\cdot 6 = 18}", 18),
        ("#### 2. Compute the cost\nIt is $9", 9),  # a heading of Markdown
        ("#### Step 3\nIt is 9.", 9),
        ("##### 5\nIt is 9.", 9),
        ("Answer: 12\nThe final answer is 13. Answer: 14", 13),
        ("The answer is 7. They had 3 cats.", 7),
        ("Q1 answer: 6\nThen 9.", 9),
        ("The Q1 answer is 6. Then 9.", 9),
        ("The answer to Q1 is 6. The answer to Q2 is 48. Of 50.", 48),
        ("10-5", 5),
        ("it is 10 - 5", 5),
        ("3–5", 5),
        ("pages 3-5", 5),
        ("it is -5", -5),
        ("(-5)", -5),
        ("x = -5", -5),
        ("on a 24/7 basis 3 times", 3),
        ("18.\n", 18),
        ("18.5.", Fraction(37, 2)),
    ],
)
def test_the_answer_of_a_text(text: str, meant: int | Fraction | None) -> None:
    assert extract_answer(text) == meant


def test_without_a_marker_only_the_lenient_reading_answers() -> None:
    assert extract_answer_strict("She has 18 eggs.") is None
    assert extract_answer("She has 18 eggs.") == 18
    assert extract_answer_strict("The Q1 answer is 6. Therefore X=6.") is None


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("", None),
        ("The Q1 answer is 6. Therefore X=6. The final answer is 48.", 6),
        ("The Q1 answer is 6. 6 * 8 = 48. The final answer is 48.", 6),
        ("So X=6. The final answer is 48.", 6),
        ("The Q1 answer is 5. No: the Q1 answer is 6.", 6),
        ("The Q1 answer is 6. Therefore X=7.", 6),
        ("The Q1 answer is $6 * 2 = 12$. X=12", 12),
        ("**Q1 answer:** 6", 6),
        ("The answer to Q1 is 6.", 6),
        ("X = 6. Later X = 9", 6),
        ("X=6\nX=7", 6),
        ("**X = 6**", 6),
        ("so **X = 6**", 6),
        ("$X=6$", 6),
        ("\\(X = 6\\)", 6),
        ("- X = 6", 6),
        ("* X = 6", 6),
        ("(X = 6)", 6),
        ("X = $6", 6),
        ("X = \\boxed{6}", 6),
        ("X = -5", -5),
        ("X = 6 apples", 6),
        ("X is 6", 6),
        ("The value of X is 6.", 6),
        ("X equals 6", 6),
        ("X = 30/5 = 6, so X * 4 = 24", 6),
        ("X = 2 * 3 = 6", 6),
        ("X = 1,234", 1234),
        ("X is the answer to Q1. X = 7", 7),
        ("Let X be the answer to Q1. Since X = 6, X * 4 = 24", 6),
        ("X = 4 * 3. Thus X = 12", 12),
        ("X*4=24", None),
        ("X * 4 = 24", None),
        ("X + 4 = 24", None),
        ("5X=30", None),
        ("2 X = 30", None),
        ("4*X = 24", None),
        ("4 * X = 24", None),
        ("24 / X = 4", None),
        ("2**X = 64", None),
        ("TX = 30", None),
        ("X = 4 * 3", None),
        ("X = 4 + Y", None),
        ("X = 2Y + 3", None),
        ("X = 6X", None),
        ("X == 6", None),
        ("x = 6", None),
        ("X is 3 + Y", None),
    ],
)
def test_the_first_questions_answer_inside_a_composition(text: str, meant: int | None) -> None:
    assert extract_q1(text) == meant


def test_reference_answers_of_items_are_read(items: tuple[Item, ...]) -> None:
    for item in items:
        text = (
            f"{item.q1.solution}\nThe Q1 answer is {item.x}. Therefore X={item.x}.\n"
            f"{item.q2.solution}\nThe final answer is {item.gold}."
        )
        assert (extract_q1(text), extract_answer_strict(text)) == (item.x, item.gold)


@given(st.text(alphabet=st.characters() | st.sampled_from("0123456789.,-/$%{}\\^=X* \n#\u00a0½")))
def test_no_text_makes_a_reader_fail(text: str) -> None:
    for read in (extract_answer, extract_answer_strict, extract_q1, parse_number):
        assert isinstance(read(text), Fraction | None)
    assert isinstance(find_code(text), str | None)


PIECES = """\
The Q1 final answer is|final answer|X =|X is|\\boxed{|####|Answer:|}|$|**|=|-|+|*|/|6|48|1,234|.5|\
3/4|10^|\\frac{|e9|
| |.|1 1/2|\u00a0|½|of|(|,|1.2.3"""


@given(st.lists(st.sampled_from(PIECES.split("|"))))
def test_no_mixture_of_markers_makes_a_reader_fail(parts: list[str]) -> None:
    for separator in ("", " "):
        for read in (extract_answer, extract_answer_strict, extract_q1):
            assert isinstance(read(separator.join(parts)), Fraction | None)


@given(st.integers(-(10**12), 10**12))
def test_integers_survive_any_grouping(number: int) -> None:
    for written in (str(number), f"{number:,}", f"{number:_}", f"{number:,}".replace(",", "'")):
        assert parse_number(written) == number
        assert extract_answer_strict(f"The final answer is {written}.") == number


@given(st.fractions(max_denominator=1000))
def test_fractions_and_decimals_survive(number: Fraction) -> None:
    assert parse_number(str(number)) == number
    decimal = f"{float(number):.4f}"
    assert parse_number(decimal) == Fraction(decimal)


@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_the_last_marker_wins(first: int, second: int) -> None:
    text = f"The final answer is {first}. Wait. The final answer is {second}. Not {first}."
    assert extract_answer(text) == second


@given(st.text(alphabet="0123456789,.'- $%/", max_size=30))
def test_numbers_of_a_text_do_not_overlap_and_are_where_they_say(text: str) -> None:
    normal = normalise(text)
    end = 0
    for numeral in numerals(normal):
        assert end <= numeral.start < numeral.end <= len(normal)
        assert any(map(str.isdigit, normal[numeral.start : numeral.end]))
        end = numeral.end


def test_numbers_of_many_digits_are_refused_under_the_lowest_limit_of_the_interpreter() -> None:
    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(640)
    try:
        for length in (MAX_DIGITS + 1, 5000, 10**6):
            assert extract_answer("9" * length) is None
            assert extract_answer("1" + ",234" * (length // 3)) is None
            assert extract_q1(f"X = {'9' * length}") is None
            assert extract_answer(f"1/{'9' * length}") is None
            assert extract_answer(f"0.{'1' * length}") is None
        assert extract_answer("9" * MAX_DIGITS) == 10**MAX_DIGITS - 1
    finally:
        sys.set_int_max_str_digits(before)


@pytest.mark.parametrize(
    "unit",
    [
        *("final answer is ", "final answer ", "\\boxed{", "answer is ", "X = ", "X = 1+", "1,"),
        *("Q1 answer is ", "1 ", "1\u00a0", "1/", "1^", "-", "####", "\\frac{", "\\frac ", "9"),
        *("1,234,", "$", "*", "½", "X=(((", "```\n", "def ", "{", " ", "\t", "X = 1 = ", "\n"),
    ],
)
def test_reading_takes_time_in_proportion_to_the_text(unit: str) -> None:
    """Counted in steps of the interpreter, not in seconds; a regular expression is one step."""
    steps = []
    for size in (2_000, 4_000):
        text = "final answer X " + unit * size
        count = 0

        def count_lines(*_: object) -> object:
            nonlocal count
            count += 1
            return count_lines

        previous = sys.gettrace()
        sys.settrace(count_lines)
        try:
            extract_answer(text)
            extract_q1(text)
            find_code(text)
        finally:
            sys.settrace(previous)
        steps.append(count)
    assert steps[1] < 2.5 * steps[0] + 100


FENCED = """\
Here is the program:

```python
def solve_q1():
    return 6
```

and then

```python
def solution():
    X = solve_q1()
    return X * 8
```

It prints:

```
48
```
"""

PLAIN = """\
Let me write it down.
def solve_q1():
    '''How many?'''

    return 6

# the second question
RATE = 8

def solution():
    X = solve_q1()
    return X * RATE

print(solution())
The answer is 48 because six times eight is 48.
def solution():
    return 1
"""


@pytest.mark.parametrize(
    "text",
    [
        FENCED,
        PLAIN,
        FENCED.replace("```python", "```"),
        FENCED.replace("```python", "``` Python"),
        "```python\ndef solve_q1():\n    return 6\ndef solution():\n    return solve_q1() * 8\n",
        "from math import prod\ndef solve_q1():\n    return 6\n"
        "def solution():\n    return prod([6, 8])",
        "def solve_q1():\n    return 6\n\n\ndef solution():\n    return 48\n```\n\nQ1: Next",
    ],
)
def test_the_program_in_a_text_is_found_and_run(text: str) -> None:
    result = run_code_solution(text)
    assert (result.values, result.error) == ({"solve_q1": 6, "solution": 48}, None)


def test_texts_without_a_program_say_so() -> None:
    for text in ("", "The final answer is 48.", "```\n48\n```", "definitely not code"):
        assert find_code(text) is None
    results = run_code_solutions(["no code", FENCED], workers=2)
    assert [result.error for result in results] == ["no function", None]


def test_programs_of_items_give_their_answers(items: tuple[Item, ...]) -> None:
    programs = [item.q1.program for item in items if item.q1.program is not None]
    answers = [item.x for item in items if item.q1.program is not None]
    results = run_code_solutions(programs, ("solution",))
    assert [result.values["solution"] for result in results] == answers
