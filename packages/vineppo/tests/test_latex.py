from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vineppo.latex import LONG, MATH_SIDE, PROSE_SIDE, SHORT, LatexSegmenter

PIECES = [
    *("$", "$$", r"\[", r"\]", r"\(", r"\)", r"\$", "\\\\", "[asy]", "[/asy]", "\n", "\n\n", " "),
    *(r"\begin{align*}", r"\end{align*}", r"\begin{cases}", r"\end{cases}", r"\begin{tabular}"),
    *(".", ",", "=", "+", r"\equiv", "x", "Then we see", "Dr", "J", "1", "\ue000", "é", "😀"),
    *("a sentence of forty characters or so, as", "a" * 25),
]
solutions = st.lists(st.sampled_from(PIECES), max_size=40).map("".join)
WORDS = [*("a", "in", "sum", "Then", "we", "Dr.", "e.g.", "x.", "so,", "is:", "no;", "yes!")]
prose = st.lists(st.sampled_from(WORDS), max_size=80).map(" ".join)


def steps(text: str) -> list[str]:
    return [text[start:end] for start, end in pairwise(LatexSegmenter().segment(text))]


def stripped(text: str) -> list[str]:
    return [step.strip() for step in steps(text)]


@given(text=solutions | st.text())
@settings(max_examples=150, deadline=None)
def test_the_steps_put_together_are_the_text(text: str) -> None:
    offsets = LatexSegmenter().segment(text)
    assert offsets[0] == 0
    assert offsets[-1] == len(text)
    assert all(left < right for left, right in pairwise(offsets))
    assert "".join(steps(text)) == text
    if text.strip():
        assert all(step.strip() for step in steps(text))


SOLUTION = r"""We have that $x^2 + 5x + 6 = 0.$ Factoring, we get
\[
(x + 2)(x + 3) = 0,
\]
so $x = -2$ or $x = -3.$ By Prof. J. R. Smith the sum is -5. Therefore, the answer is $\boxed{-5}$.
"""


def test_a_solution_is_cut_into_sentences_and_lines() -> None:
    assert steps(SOLUTION) == [
        "We have that $x^2 + 5x + 6 = 0.$",
        " Factoring, we get",
        "\n\\[\n(x + 2)(x + 3) = 0,\n\\]",
        "\nso $x = -2$ or $x = -3.$",
        " By Prof. J. R. Smith the sum is -5.",
        " Therefore, the answer is $\\boxed{-5}$.\n",
    ]


# Second pass: lines and sentences.


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("The sum is 5. Then we stop.", 2),
        ("The sum is 5.\nThen we stop.", 2),
        ("The sum is 5. \n\n Then we stop.", 2),
        ("The sum is n. Éa suit cela bien.", 2),
        ("The sum is 5. then we stop.", 1),
        ("The sum is 5.Then we stop.", 1),
        ("The sum is 5. 7 is the other.", 1),
        ("We use Dr. Smith and J. Smith and J.-P. Serre.", 1),
        ("We use (cf. Euler), i.e. Gauss, see Eq. A and Fig. B.", 1),
        ("1. First we add them.", 1),
        ("We add the numbers.\n 12. Second we stop.", 2),
        ("The answer must be 12. Second we stop.", 2),
        ("We take $a$. Then we stop.", 2),
        ("We take $a. Then$ we stop.", 1),
    ],
)
def test_a_sentence_ends_at_a_period_before_a_capital_letter(text: str, count: int) -> None:
    assert len(steps(text)) == count


def test_white_space_belongs_to_the_step_it_precedes() -> None:
    text = "The sum is five.  Then we multiply.\n\nThat is the answer here.\n"
    assert steps(text) == [
        "The sum is five.",
        "  Then we multiply.",
        "\n\nThat is the answer here.\n",
    ]


def test_short_pieces_are_merged_unless_they_end_with_a_period() -> None:
    assert stripped("Step 1:\nWe add the two numbers") == ["Step 1:\nWe add the two numbers"]
    assert stripped("We add the two numbers\nso 5") == ["We add the two numbers\nso 5"]
    assert stripped("It is 5.\nWe add the two numbers") == ["It is 5.", "We add the two numbers"]
    assert stripped("It is $5.$\nWe add the two numbers")[0] == "It is $5.$"
    assert stripped("\n".join("abcdef")) == ["\n".join("abcdef")]
    long = "x" * SHORT
    assert stripped(f"{long}\n{long}") == [long, long]
    assert len(steps(f"{long[1:]}\n{long}")) == 1


@given(text=prose)
@settings(max_examples=100, deadline=None)
def test_no_step_of_prose_is_short_and_without_a_period(text: str) -> None:
    found = stripped(text)
    if len(found) > 1:
        assert all(len(step) >= SHORT or step.endswith(".") for step in found)


# First and third pass: math.


def test_math_is_not_cut_as_prose_is() -> None:
    for begin, end in [
        *(("$", "$"), ("$$", "$$"), (r"\[", r"\]"), (r"\(", r"\)"), ("[asy]", "[/asy]")),
        (r"\begin{tabular}{c}", r"\end{tabular}"),
        (r"\begin{align}", r"\end{align}"),
    ]:
        assert len(steps(f"We know that {begin}a. B{end} is so.")) == 1


def test_math_that_ends_with_a_period_ends_a_step() -> None:
    assert steps("We know that $x = 5.$ and so it is") == [
        "We know that $x = 5.$",
        " and so it is",
    ]
    assert len(steps("We know that $x = 5.$, and so it is")) == 1
    assert len(steps("We know that $1, 2, ...$ and so it is")) == 1
    assert len(steps("We know that \\[ x = 5. \\] and so it is")) == 2


def test_display_math_is_cut_at_its_lines_but_delimiters_do_not_stand_alone() -> None:
    text = "$$\n\\begin{aligned}\na &= b \\\\[2pt]\n  &= c\n\\end{aligned}\n$$"
    assert steps(text) == [
        "$$\n\\begin{aligned}\na &= b \\\\[2pt]",
        "\n  &= c\n\\end{aligned}\n$$",
    ]
    assert steps("\\[\nx = 1\n\\]") == ["\\[\nx = 1\n\\]"]
    assert steps("\\[\n\n\\]") == ["\\[\n\n\\]"]


def test_matrices_tables_and_drawings_are_kept_whole() -> None:
    matrix = "\\begin{pmatrix}\n1 & 2 \\\\\n3 & 4\n\\end{pmatrix}"
    assert stripped(f"\\[\nA =\n{matrix}\n= B\n\\]") == ["\\[\nA =", matrix, "= B\n\\]"]
    for begin, end in [("[asy]", "[/asy]"), ("\\begin{array}{c}", "\\end{array}")]:
        block = f"{begin}\ndraw(A--B. C);\n{'x = y + ' * 30}\n{end}"
        assert stripped(f"Here is the picture:\n{block}\nIt shows all we need.") == [
            "Here is the picture:",
            block,
            "It shows all we need.",
        ]


def test_environments_nest() -> None:
    inner = "\\begin{a}\nOne is here. Two.\n\\end{a}"
    block = f"\\begin{{a}}\n{inner}\nThree is here. Four.\n\\end{{a}}"
    assert stripped(f"We start with these words\n{block}\nand end with these words") == [
        "We start with these words",
        block,
        "and end with these words",
    ]


def test_formulas_side_by_side_are_not_display_math() -> None:
    assert stripped("We know $a. B$$c. D$ now. Then we stop.") == [
        "We know $a. B$$c. D$ now.",
        "Then we stop.",
    ]


def test_dollars_that_open_display_math_do_not_close_it() -> None:
    assert len(steps("$$$ We know that it is five. Then we stop adding $$ now")) == 1


@pytest.mark.parametrize("opener", ["$", "$$", r"\[", r"\(", "[asy]", r"\begin{align}", r"\$"])
def test_math_that_is_never_closed_is_prose(opener: str) -> None:
    text = f"The price is {opener}5. Then we go on.\n\nWe pay and come home again."
    assert len(steps(text)) == 3


def test_a_dollar_closes_no_dollar_of_another_paragraph() -> None:
    text = "The price is $5. Then we go on.\n\nWe pay $6. Then we come home."
    assert len(steps(text)) == 4


# Fourth pass: what is long.


def test_a_long_sentence_is_cut_at_the_punctuation_that_balances_it_best() -> None:
    first, second, third = "a" * 45, "b" * 30, "c" * 60
    assert steps(f"{first}, {second}; {third}") == [f"{first}, {second};", f" {third}"]
    assert steps(f"{third}, {second}; {first}") == [f"{third},", f" {second}; {first}"]
    # Each half is cut again where it is still too long.
    assert stripped(f"{third}, {third}, {third}, {third}") == [*[f"{third},"] * 3, third]
    # A side would be too short.
    assert len(steps(f"{'a' * (PROSE_SIDE - 2)}, {third} {third}")) == 1


def test_decimals_and_abbreviations_do_not_cut_a_long_sentence() -> None:
    words = "word " * 9
    assert len(steps(f"{words}1,000 and 3.14 {words} {words}")) == 1
    assert len(steps(f"{words}e.g. {words} {words}")) == 1
    assert len(steps(f"{words}all. {words} {words}")) == 2


@given(text=prose)
@settings(max_examples=100, deadline=None)
def test_prose_is_cut_until_no_cut_is_left(text: str) -> None:
    for step in stripped(text):
        if len(step) > LONG:
            sides = range(PROSE_SIDE, len(step) - PROSE_SIDE + 1)
            assert not any(step[at - 1] in ",;:!" and step[at].isspace() for at in sides)


@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=12))
@settings(max_examples=100, deadline=None)
def test_formulas_are_cut_after_relations_until_no_cut_is_left(lengths: list[int]) -> None:
    text = "$" + "=".join("x" * length for length in lengths) + "$"
    found = steps(text)
    for step in found[:-1]:
        assert step.endswith("=")
    for step in found:
        assert len(found) == 1 or len(step) >= MATH_SIDE
        if len(step) > LONG:
            sides = range(MATH_SIDE, len(step) - MATH_SIDE + 1)
            assert not any(step[at - 1] == "=" for at in sides)


@pytest.mark.parametrize("sign", ["=", "+", r"\equiv "])
def test_long_formulas_are_cut_after_signs(sign: str) -> None:
    text = f"${'x' * 60}{sign}{'y' * 60}$"
    assert steps(text)[0] == f"${'x' * 60}{sign.strip()}"


def test_long_formulas_are_cut_after_the_comma_that_ends_them() -> None:
    text = f"so${'x' * 60},${'y' * 60}"
    assert steps(text) == [f"so${'x' * 60},$", "y" * 60]
    assert len(steps(f"${'x' * 60}\\equivalent {'y' * 60}$")) == 1
    assert len(steps(f"${'x' * 60}=={'y' * 60}$")[0]) == 63


def test_prose_is_preferred_to_math_where_a_long_step_is_cut() -> None:
    text = f"{'word ' * 9}here, ${'x' * 30} = {'y' * 30}$"
    assert steps(text)[0].endswith("here,")
    text = f"{'word ' * 7}here ${'x' * 30} = {'y' * 30}$"
    assert steps(text)[0].endswith("=")


@pytest.mark.parametrize(
    "text",
    [
        *("$" * 20000, "$$\n" * 8000, "$\n" * 8000, r"\[" * 8000, "\n" * 20000, ". A" * 8000),
        *("\\[\n" + ".\n" * 8000 + "\\]", "$" + "=" * 20000 + "$", "." + " " * 20000 + "x"),
        *("\\begin{a}" * 4000 + "\\end{a}" * 4000, "\\[" + "\\begin{b}" * 4000, "a, " * 8000),
    ],
    ids=range(12),
)
def test_hostile_answers_are_cut_too(text: str) -> None:
    # Where a pass were quadratic, these would take minutes.
    offsets = LatexSegmenter().segment(text)
    assert offsets[-1] == len(text)
    assert all(left < right for left, right in pairwise(offsets))
