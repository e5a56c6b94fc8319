from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vineppo.errors import InvalidInputError
from vineppo.segmenters import (
    SEGMENTERS,
    FixedLengthSegmenter,
    GSM8KSegmenter,
    LatexSegmenter,
    NewlineSegmenter,
    PrefixSegmenter,
    Segmenter,
    TokenLevelSegmenter,
    TokenSegmenter,
    WholeResponseSegmenter,
    check_offsets,
    make_segmenter,
)

ON_TEXT = [NewlineSegmenter(), GSM8KSegmenter(), LatexSegmenter(), WholeResponseSegmenter()]
ON_IDS = [
    TokenSegmenter(),
    FixedLengthSegmenter(1),
    FixedLengthSegmenter(3),
    WholeResponseSegmenter(),
]
# Arbitrary characters, and those that the rules look at, often enough to meet each other.
texts = st.text() | st.lists(
    st.sampled_from(["\n", "\n\n", " ", "\t", "\r\n", "#", "####", "a", "Bc", "7", ".", "é", "😀"])
).map("".join)
ids = st.lists(st.integers(0, 9))


def steps(segmenter: Segmenter, text: str) -> list[str]:
    return [text[start:end] for start, end in pairwise(segmenter.segment(text))]


@given(text=texts)
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("segmenter", ON_TEXT)
def test_the_steps_put_together_are_the_text(segmenter: Segmenter, text: str) -> None:
    offsets = segmenter.segment(text)
    assert "".join(steps(segmenter, text)) == text
    assert offsets[0] == 0
    assert offsets[-1] == len(text)
    assert all(left < right for left, right in pairwise(offsets))
    assert check_offsets(offsets, len(text), segmenter) == offsets


@given(text=texts.filter(str.strip))
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("segmenter", ON_TEXT)
def test_no_step_is_blank_but_for_a_rest_of_lines(segmenter: Segmenter, text: str) -> None:
    found = steps(segmenter, text)
    if isinstance(segmenter, NewlineSegmenter) and not found[-1].strip():
        rest = re.fullmatch(r"[\s\S]*\S[^\S\n]*\n(\s+)", text)
        assert rest is not None
        assert found.pop() == rest[1]
    assert all(step.strip() for step in found)


@given(ids=ids)
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("segmenter", ON_IDS)
def test_the_steps_put_together_are_the_ids(segmenter: TokenLevelSegmenter, ids: list[int]) -> None:
    borders = segmenter.segment_ids(ids)
    assert borders[0] == 0
    assert borders[-1] == len(ids)
    assert all(left < right for left, right in pairwise(borders))


def test_steps_of_tokens() -> None:
    ids = [5, 6, 7, 8, 9]
    assert TokenSegmenter().segment_ids(ids) == [0, 1, 2, 3, 4, 5]
    assert FixedLengthSegmenter(2).segment_ids(ids) == [0, 2, 4, 5]
    assert FixedLengthSegmenter(5).segment_ids(ids) == [0, 5]
    assert FixedLengthSegmenter(9).segment_ids(ids) == [0, 5]
    assert WholeResponseSegmenter().segment_ids(ids) == [0, 5]


@pytest.mark.parametrize("segmenter", [NewlineSegmenter(), GSM8KSegmenter()])
@given(lines=st.lists(st.text(st.characters(exclude_characters="\n#")).filter(str.strip)))
@settings(max_examples=60, deadline=None)
def test_n_lines_are_n_steps(segmenter: Segmenter, lines: list[str]) -> None:
    assert len(steps(segmenter, "\n".join(lines))) == len(lines)


@given(lines=st.lists(st.text(st.characters(exclude_characters="\n")).filter(str.strip)))
@settings(max_examples=60, deadline=None)
def test_a_step_is_a_line_with_its_newline(lines: list[str]) -> None:
    ended = [line + "\n" for line in lines]
    assert steps(NewlineSegmenter(), "".join(ended)) == ended
    assert steps(NewlineSegmenter(), "".join(ended) + "so") == [*ended, "so"]


def test_a_newline_belongs_to_the_step_it_ends() -> None:
    assert steps(NewlineSegmenter(), "one\ntwo\nthree") == ["one\n", "two\n", "three"]


def test_in_gsm8k_a_newline_belongs_to_the_step_it_starts() -> None:
    assert steps(GSM8KSegmenter(), "one\ntwo\nthree") == ["one", "\ntwo", "\nthree"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\n \n\none\n\n\t\ntwo", ["\n \n\none\n", "\n\t\ntwo"]),
        ("one \n", ["one \n"]),
        ("one\n\n", ["one\n", "\n"]),
        ("one\n ", ["one\n", " "]),
        ("one\n\n\t\n\n", ["one\n", "\n\t\n\n"]),
        ("one\n\n\t\n\ntwo\n", ["one\n", "\n\t\n\ntwo\n"]),
        ("\n\n \n", ["\n\n \n"]),
        (" ", [" "]),
        ("\n", ["\n"]),
        ("one\r\ntwo", ["one\r\n", "two"]),
    ],
)
def test_blank_lines_go_with_the_next_step_or_are_the_last(text: str, expected: list[str]) -> None:
    assert steps(NewlineSegmenter(), text) == expected


def test_in_gsm8k_blank_lines_go_with_the_next_step_or_the_last() -> None:
    found = steps(GSM8KSegmenter(), "\n \n\none\n\n\t\ntwo\n\n")
    assert found == ["\n \n\none", "\n\n\t\ntwo\n\n"]
    assert steps(GSM8KSegmenter(), "\n\n \n") == ["\n\n \n"]


@given(text=texts)
@settings(max_examples=60, deadline=None)
def test_steps_of_lines_begin_where_a_regular_expression_says(text: str) -> None:
    # The line before may end in white space, after which its newline stands.
    newlines = re.finditer(r"(?<=\S)[^\S\n]*(\n)(?=[\s\S])", text)
    assert NewlineSegmenter().segment(text)[1:-1] == [match.end(1) for match in newlines]
    text = text.replace("#", "")
    newlines = re.finditer(r"(?<=\S)[^\S\n]*(\n)\s*(?=\S)", text)
    assert GSM8KSegmenter().segment(text)[1:-1] == [match.start(1) for match in newlines]


SOLUTION = (
    "Tom has 3 bags of 4 apples, 3*4 = <<3*4=12>>12 apples.\n"
    "He eats 2, so 12-2 = <<12-2=10>>10 are left.\n"
    "#### 10"
)


def test_gsm8k_answer_line_belongs_to_the_last_step() -> None:
    first, last = steps(GSM8KSegmenter(), SOLUTION)
    assert first == SOLUTION.split("\n")[0]
    assert last.endswith("are left.\n#### 10")
    assert len(steps(NewlineSegmenter(), SOLUTION)) == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\n\n#### 5\n", ["a\n\n#### 5\n"]),
        ("a\nb\n####", ["a", "\nb\n####"]),
        ("#### 5", ["#### 5"]),
        ("\n\n#### 5", ["\n\n#### 5"]),
        ("a\n#### 5\nb\n#### 6", ["a\n#### 5", "\nb\n#### 6"]),
        ("#### 5\nb", ["#### 5", "\nb"]),
        ("a\nso #### 5", ["a", "\nso #### 5"]),
        ("a\n### 5", ["a", "\n### 5"]),
    ],
)
def test_gsm8k_answer_lines_start_no_step(text: str, expected: list[str]) -> None:
    assert steps(GSM8KSegmenter(), text) == expected


@given(text=texts)
@settings(max_examples=60, deadline=None)
def test_gsm8k_cuts_before_a_newline_where_lines_are_cut_behind_it(text: str) -> None:
    """Where no line is an answer, and something follows that is not blank."""
    text = text.replace("#", "")
    behind = [cut for cut in NewlineSegmenter().segment(text)[1:-1] if text[cut:].strip()]
    assert GSM8KSegmenter().segment(text)[1:-1] == [cut - 1 for cut in behind]


def prefixes(text: str) -> Iterator[str]:
    return (text[:length] for length in range(len(text) + 1))


@given(text=texts)
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("segmenter", [NewlineSegmenter(), WholeResponseSegmenter()])
def test_streaming_segmenters_withdraw_no_border(segmenter: Segmenter, text: str) -> None:
    whole = segmenter.segment(text)
    for prefix in prefixes(text):
        assert set(segmenter.segment(prefix)[1:-1]) <= set(whole)


@given(text=texts)
@settings(max_examples=60, deadline=None)
def test_borders_of_a_prefix_are_those_of_the_whole_that_lie_below_it(text: str) -> None:
    whole = NewlineSegmenter().segment(text)
    for prefix in prefixes(text):
        inner = NewlineSegmenter().segment(prefix)[1:-1]
        assert inner == [border for border in whole if 0 < border < len(prefix)]


EXACT = [NewlineSegmenter(), WholeResponseSegmenter()]


@given(text=texts, one=texts.filter(len), other=texts.filter(len))
@settings(max_examples=100, deadline=None)
@pytest.mark.parametrize("segmenter", EXACT)
def test_whether_a_border_stands_is_decided_by_what_stands_before_it(
    segmenter: Segmenter, text: str, one: str, other: str
) -> None:
    for cut in (text, text + "\n"):
        after_one = len(cut) in segmenter.segment(cut + one)
        assert after_one == (len(cut) in segmenter.segment(cut + other))


@given(text=texts, more=texts.filter(len))
@settings(max_examples=100, deadline=None)
def test_a_line_ends_a_step_where_every_longer_text_is_cut(text: str, more: str) -> None:
    lines = NewlineSegmenter()
    for cut in (text, text + "\n"):
        assert lines.ends_step(cut) == (len(cut) > 0 and len(cut) in lines.segment(cut + more))


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        *(("a\n", True), ("a \n", True), ("\n\na\n", True), ("a\r\n", True), ("b\na\n", True)),
        *(("", False), ("a", False), ("a\nb", False), ("\n", False), (" \n", False)),
        # A blank line goes with what follows it, or with the end.
        *(("a\n\n", False), ("a\n \n", False), ("a\n ", False)),
    ],
)
def test_a_step_ends_with_the_newline_of_a_line_that_is_not_blank(text: str, ends: bool) -> None:
    assert NewlineSegmenter().ends_step(text) is ends


def test_only_lines_say_that_a_step_has_ended() -> None:
    found = [type(one) for one in ON_TEXT if isinstance(one, PrefixSegmenter)]
    assert found == [NewlineSegmenter]


@given(ids=ids, one=ids.filter(len), other=ids.filter(len))
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("segmenter", ON_IDS)
def test_whether_a_border_of_ids_stands_is_decided_by_what_stands_before_it(
    segmenter: TokenLevelSegmenter, ids: list[int], one: list[int], other: list[int]
) -> None:
    after_one = len(ids) in segmenter.segment_ids(ids + one)
    assert after_one == (len(ids) in segmenter.segment_ids(ids + other))


@pytest.mark.parametrize("segmenter", [GSM8KSegmenter(), LatexSegmenter()])
def test_in_gsm8k_and_latex_it_is_decided_by_what_comes_next(segmenter: Segmenter) -> None:
    begun = "We add the two numbers."
    assert len(begun) in segmenter.segment(f"{begun}\nThis is the sum of both of them.")
    assert len(begun) not in segmenter.segment(f"{begun}5 is not the sum of both of them.")


@given(ids=ids)
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("segmenter", ON_IDS)
def test_segmenters_of_ids_withdraw_no_border(
    segmenter: TokenLevelSegmenter, ids: list[int]
) -> None:
    whole = segmenter.segment_ids(ids)
    for length in range(len(ids)):
        assert set(segmenter.segment_ids(ids[:length])[1:-1]) <= set(whole)


@given(text=texts)
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("segmenter", [NewlineSegmenter(), GSM8KSegmenter()])
def test_lines_cut_the_text_before_a_border_as_they_cut_the_whole(
    segmenter: Segmenter, text: str
) -> None:
    whole = segmenter.segment(text)
    for step, border in enumerate(whole):
        assert segmenter.segment(text[:border]) == whole[: step + 1]


def test_gsm8k_withdraws_a_border_only_while_the_answer_mark_is_half_written() -> None:
    inner = [GSM8KSegmenter().segment(prefix)[1:-1] for prefix in prefixes("a\n#### 5")]
    assert inner == [[], [], [], [1], [1], [1], [], [], []]


def test_latex_looks_ahead() -> None:
    begun = f"We add the two numbers and obtain the sum, {'x' * 55}, and so"
    ended = f"{begun} {'y' * 80}"
    assert LatexSegmenter().segment(begun) == [0, begun.index(",") + 1, len(begun)]
    assert LatexSegmenter().segment(ended) == [0, begun.rindex(",") + 1, len(ended)]


@pytest.mark.parametrize("name", SEGMENTERS)
def test_names_make_segmenters(name: str) -> None:
    made = make_segmenter(name)
    assert made == SEGMENTERS[name]()
    assert isinstance(made, Segmenter | TokenLevelSegmenter)
    assert make_segmenter(made) is made


def test_fixed_lengths_have_a_name() -> None:
    assert make_segmenter("fixed:16") == FixedLengthSegmenter(tokens=16)


@pytest.mark.parametrize(
    "spec",
    [
        *("", "lines", "fixed", "fixed:", "fixed:0", "fixed:-1", "fixed:2.5", "fixed:²", "token:2"),
        *(None, 16, ["newline"], len, NewlineSegmenter),
    ],
)
def test_what_is_no_segmenter_is_refused(spec: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"^segmenter: expected .*, got "):
        make_segmenter(spec)


@pytest.mark.parametrize("tokens", [0, -3, 2.0, True, "4", None])
def test_fixed_length_is_a_whole_number_of_tokens(tokens: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"^tokens: expected a whole number"):
        FixedLengthSegmenter(tokens)


class Broken:
    """A segmenter that returns what it is told to."""

    def __init__(self, offsets: Any) -> None:
        self.offsets = offsets

    def segment(self, _text: str) -> Any:
        return self.offsets


@pytest.mark.parametrize(
    ("offsets", "what"),
    [
        ([0, 4, 2, 5], "returned 4 and then 2; expected offsets that increase strictly"),
        ([0, 2, 2, 5], "returned 2 and then 2; expected offsets that increase strictly"),
        ([0, 2], "returned offsets from 0 to 2; expected them to go from 0 to 5"),
        ([2, 5], "returned offsets from 2 to 5; expected them to go from 0 to 5"),
        ([0, 2, 6], "returned offsets from 0 to 6; expected them to go from 0 to 5"),
        ([-1, 0, 5], "returned offsets from -1 to 5; expected them to go from 0 to 5"),
        ([], "returned no offset; expected them to go from 0 to 5"),
        ([0, 2.0, 5], "returned 2.0 among its offsets; expected whole numbers"),
        ([False, 5], "returned False among its offsets; expected whole numbers"),
        ([0, "2", 5], "returned '2' among its offsets; expected whole numbers"),
        ([0, None, 5], "returned None among its offsets; expected whole numbers"),
        ("0 5", "returned '0 5'; expected a list of whole numbers"),
        (None, "returned None; expected a list of whole numbers"),
        (5, "returned 5; expected a list of whole numbers"),
    ],
)
def test_offsets_that_break_the_contract_are_refused_by_name(offsets: Any, what: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        check_offsets(offsets, 5, Broken(offsets))
    assert str(caught.value).startswith(f"segmenter: Broken {what}")
    assert "a segmenter returns where each step begins" in str(caught.value)


def test_an_empty_answer_has_one_offset() -> None:
    assert check_offsets([0], 0, Broken([0])) == [0]
    for segmenter in ON_TEXT:
        assert segmenter.segment("") == [0]
    for on_ids in ON_IDS:
        assert on_ids.segment_ids([]) == [0]
    with pytest.raises(InvalidInputError, match="segmenter: "):
        check_offsets([0, 0], 0, Broken([0, 0]))


def test_whole_numbers_of_any_kind_become_ints() -> None:
    checked = check_offsets(np.array([0, 2, 5]), 5, Broken(None))
    assert checked == [0, 2, 5]
    assert all(type(place) is int for place in checked)


@given(offsets=st.lists(st.integers(-1, 6), max_size=6), length=st.integers(0, 5))
@example(offsets=[0, 3], length=3)
@settings(max_examples=60, deadline=None)
def test_what_passes_the_check_is_a_partition(offsets: list[int], length: int) -> None:
    partition = sorted({0, length, *(place for place in offsets if 0 < place < length)})
    if offsets == partition:
        assert check_offsets(offsets, length, Broken(offsets)) == partition
    else:
        with pytest.raises(InvalidInputError, match=r"^segmenter: Broken "):
            check_offsets(offsets, length, Broken(offsets))
