r"""Steps of solutions that are written in prose with LaTeX, as those of MATH are.

Four passes over one text; the first finds the math, the others move cuts. No character is changed
or lost, so the steps put together are the text. The rules are those by which VinePPO
(arXiv 2410.01679) cuts answers to MATH. Where they leave room:

- White space belongs to the step that it precedes, newlines too.
- A piece to be merged goes with what follows it, the last one with what precedes it.
- Lengths are those of a piece without the white space around it.
- "1." at the beginning of a line ends no sentence, and an ellipsis in math (``$1, 2, ...$``) ends
  none either.
- Matrices, cases, tables and drawings are never cut, in or out of math.
- A delimiter that is never closed is ordinary text, and so is a dollar whose closing one stands in
  another paragraph: answers cut by length, and sums of money, are read as prose.

Whether a cut is made depends on what comes after it, so the steps of the beginning of a text need
not be the first steps of the text.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, NamedTuple

SHORT: Final = 20  # characters; a shorter piece without a period is merged
LONG: Final = 100  # a longer piece is cut again
PROSE_SIDE: Final = 40  # the least on either side where prose is cut again
MATH_SIDE: Final = 20  # ... and where math is

_PROSE, _MATH, _RIGID = range(3)
# Stands for hidden characters, one for one: no letter, no mark and no white space.
_HIDDEN: Final = "\ue000"
_MATH_ENVIRONMENT: Final = re.compile(
    r"\\begin\{(?:align|aligned|alignat|displaymath|eqnarray|equation|flalign|gather|gathered|math"
    r"|multline|split)\*?\}"
)
# Line breaks and escaped dollars are among them so as to be passed over: `\\[2pt]` opens nothing.
_MARK: Final = re.compile(r"\\\\|\\\$|\$|\\[\[\]()]|\[/?asy\]|\\(?:begin|end)\{[A-Za-z]+\*?\}")
_BEGIN: Final = r"\begin{"
_END: Final = r"\end{"
_CLOSING: Final = {"$": "$", r"\[": r"\]", r"\(": r"\)", "[asy]": "[/asy]"}
_GOES_ON: Final = re.compile(r"[^\S\n]+\S")
_PARAGRAPH: Final = re.compile(r"\n\s*\n")
_NEWLINES: Final = re.compile(r"\n\s*")
_SENTENCE_END: Final = re.compile(r"\.(?=\s+([^\W\d_]))")
_PUNCTUATION: Final = re.compile(r"[.,;:!?](?=\s)")
_RELATION: Final = re.compile(r"=(?!=)|\+(?!\+)|\\equiv(?![A-Za-z])")
_WORD_BREAK: Final = re.compile(r"[\s(\[" + _HIDDEN + "]")
_ABBREVIATION: Final = re.compile(
    r"approx|cf|dr|e\.g|eqs?|figs?|i\.e|mrs?|ms|prof|resp|sec|st|thm|viz|vs", re.IGNORECASE
)
_REACH: Final = 12  # characters before a period; more than any abbreviation has
_DELIMITER: Final = r"\$|\\[\[\]()]|\\(?:begin|end)\{[A-Za-z]+\*?\}"
_BARE: Final = re.compile(rf"(?:{_DELIMITER}|[.,;\s])*")
_CLOSED_SENTENCE: Final = re.compile(rf"\.\s*(?:\$\$|{_DELIMITER})?\Z")


class _Mark(NamedTuple):
    start: int
    end: int
    text: str


class _Pair(NamedTuple):
    """Marks that open and close a span: the last of the opening, the first and last of the other.

    Display math in dollars has two marks at either end.
    """

    opener: int
    closer: int
    last: int


class _Span(NamedTuple):
    """Characters that belong together, and what they are without their delimiters."""

    start: int
    end: int
    inner: str
    math: bool


@dataclass(frozen=True)
class _Hidden:
    """The first pass.

    Attributes:
        text: as given.
        prose: as long as ``text``, with every character of a span hidden.
        spans: math and other environments, one after the other.
        kinds: of each character.
    """

    text: str
    prose: str
    spans: list[_Span]
    kinds: bytearray


@dataclass(frozen=True)
class LatexSegmenter:
    r"""A step is a sentence, a line, or a line of display math; long ones are cut again.

    1. Math, drawings, tables and other environments are hidden.
    2. Cuts are made at newlines, and at periods before white space and a capital letter, but not
       after initials and abbreviations. A piece shorter than 20 characters that does not end with a
       period is merged.
    3. Cuts are made after math that ends with a period, and at newlines inside math. A piece of
       mere delimiters, such as ``\[``, is merged.
    4. A piece longer than 100 characters is cut at the punctuation outside math that balances it
       best, with at least 40 characters on either side; failing that, inside math after ``,$``,
       ``=``, ``\equiv`` or ``+``, with at least 20; again until it cannot be cut.
    """

    def segment(self, text: str) -> list[int]:
        """Where steps begin, in characters, and where the last one ends; see ``Segmenter``."""
        if not text:
            return [0]
        hidden = _hide(text)
        cuts = _merge_short(text, _prose_cuts(hidden.prose))
        cuts = sorted({*cuts, *_math_lines(hidden), *_math_sentences(hidden)})
        return [0, *_cut_long(hidden, cuts), len(text)]


def _hide(text: str) -> _Hidden:
    """First pass: find what is not prose."""
    marks = [_Mark(found.start(), found.end(), found.group()) for found in _MARK.finditer(text)]
    closings = _Closings(marks)
    spans: list[_Span] = []
    kinds = bytearray(len(text))
    prose: list[str] = []
    done = index = 0
    while index < len(marks):
        pair = closings.of(index)
        if pair is None:
            index += 1
            continue
        start, end = marks[index].start, marks[pair.last].end
        inner = text[marks[pair.opener].end : marks[pair.closer].start]
        if pair.opener == index and marks[index].text == "$" and _PARAGRAPH.search(inner):
            index += 1
            continue
        math = _is_math(marks[index].text)
        spans.append(_Span(start, end, inner, math))
        _fill(kinds, start, end, _MATH if math else _RIGID)
        if math:
            _fill_rigid(kinds, marks, closings, pair)
        prose += text[done:start], _HIDDEN * (end - start)
        done = end
        index = pair.last + 1
    return _Hidden(text, "".join(prose) + text[done:], spans, kinds)


def _fill_rigid(
    kinds: bytearray, marks: Sequence[_Mark], closings: _Closings, outer: _Pair
) -> None:
    """Mark the matrices, cases and the like inside a span of math."""
    index = outer.opener + 1
    while index < outer.closer:
        inner = None if _is_math(marks[index].text) else closings.of(index)
        if inner is not None and inner.last < outer.closer:
            _fill(kinds, marks[index].start, marks[inner.last].end, _RIGID)
            index = inner.last
        index += 1


def _fill(kinds: bytearray, start: int, end: int, kind: int) -> None:
    kinds[start:end] = bytes([kind]) * (end - start)


def _is_math(opener: str) -> bool:
    if opener.startswith(_BEGIN):
        return bool(_MATH_ENVIRONMENT.fullmatch(opener))
    return opener != "[asy]"


class _Closings:
    """Which mark closes which, found in one pass over all of them.

    Two dollars side by side open and close display math, but they may also close one formula and
    open the next (``$a$$b$``); which it is depends on what is open.
    """

    def __init__(self, marks: Sequence[_Mark]) -> None:
        self._marks = marks
        self._places: dict[str, list[int]] = defaultdict(list)
        self._ends: dict[int, int] = {}
        begun: dict[str, list[int]] = defaultdict(list)
        for index, mark in enumerate(marks):
            self._places[mark.text].append(index)
            if mark.text.startswith(_BEGIN):
                begun[mark.text[len(_BEGIN) :]].append(index)
            elif mark.text.startswith(_END) and begun[mark.text[len(_END) :]]:
                self._ends[begun[mark.text[len(_END) :]].pop()] = index
        self._double = [
            left
            for left, right in pairwise(self._places["$"])
            if marks[left].end == marks[right].start
        ]

    def of(self, index: int) -> _Pair | None:
        """The pair that a mark opens, or None if it opens none."""
        text = self._marks[index].text
        if text.startswith(_BEGIN):
            end = self._ends.get(index)
        elif text in _CLOSING:
            if text == "$" and _next(self._double, index) == index:
                closer = _next(self._double, index + 2)
                if closer is not None:
                    return _Pair(index + 1, closer, closer + 1)
            end = _next(self._places[_CLOSING[text]], index + 1)
        else:
            end = None
        return None if end is None else _Pair(index, end, end)


def _next(places: Sequence[int], least: int) -> int | None:
    """The first of some increasing places that is at least ``least``."""
    found = bisect_left(places, least)
    return places[found] if found < len(places) else None


def _prose_cuts(prose: str) -> set[int]:
    """Second pass: newlines and ends of sentences outside math."""
    sentences = {
        found.end()
        for found in _SENTENCE_END.finditer(prose)
        if found.group(1).isupper() and not _is_abbreviated(prose, found.start())
    }
    return sentences | {found.start() for found in _NEWLINES.finditer(prose)}


def _is_abbreviated(prose: str, period: int) -> bool:
    """Whether a period ends an initial, an abbreviation or the number of an item."""
    reach = max(0, period - _REACH)
    word = _WORD_BREAK.split(prose[reach:period])[-1]
    before = prose[reach : period - len(word)].rstrip(" \t")
    opens_line = before.endswith("\n") or (not before and not reach)
    name = word.replace("-", ".").split(".")[-1]
    return (
        (len(name) == 1 and name.isupper())
        or bool(_ABBREVIATION.fullmatch(word))
        or (word.isdigit() and opens_line)
    )


def _merge_short(text: str, cuts: Iterable[int]) -> list[int]:
    """Second pass: undo the cut after a short piece, or before it if it is the last.

    A merged piece is judged anew.
    """
    kept = [0]
    for cut in sorted(cut for cut in cuts if 0 < cut < len(text)):
        if not _is_short(text[kept[-1] : cut]):
            kept.append(cut)
    while len(kept) > 1 and _is_short(text[kept[-1] :]):
        kept.pop()
    return kept[1:]


def _is_short(piece: str) -> bool:
    piece = piece.strip()
    return len(piece) < SHORT and not _CLOSED_SENTENCE.search(piece)


def _math_lines(hidden: _Hidden) -> Iterator[int]:
    """Third pass: newlines inside math, but for those of matrices and the like.

    A line of mere delimiters goes with the next one, and those at the end of the math with the one
    before them.
    """
    for span in hidden.spans:
        if not span.math:
            continue
        lines = [
            found.start()
            for found in _NEWLINES.finditer(hidden.text, span.start, span.end)
            if hidden.kinds[found.start()] == _MATH
        ]
        borders = [span.start, *lines, span.end]
        bare = [bool(_BARE.fullmatch(hidden.text, *ends)) for ends in pairwise(borders)]
        while bare and bare[-1]:
            bare.pop()
        yield from (cut for cut, before in zip(lines, bare[:-1], strict=False) if not before)


def _math_sentences(hidden: _Hidden) -> Iterator[int]:
    """Third pass: after math that ends with a period, where its line goes on."""
    for span in hidden.spans:
        inner = span.inner.rstrip()
        ends = span.math and inner.endswith(".") and not inner.endswith("..")
        if ends and _GOES_ON.match(hidden.text, span.end):
            yield span.end


def _cut_long(hidden: _Hidden, cuts: Sequence[int]) -> list[int]:
    """Fourth pass: cut what is too long, and again what is still too long."""
    prose = [
        found.end()
        for found in _PUNCTUATION.finditer(hidden.prose)
        if found.group() != "." or not _is_abbreviated(hidden.prose, found.start())
    ]
    math = sorted(_relations(hidden))
    result: list[int] = []
    pieces = list(pairwise([0, *cuts, len(hidden.text)]))[::-1]
    while pieces:
        start, end = pieces.pop()
        piece = hidden.text[start:end]
        low, high = end - len(piece.lstrip()), start + len(piece.rstrip())
        cut = None
        if high - low > LONG:
            cut = _most_balanced(prose, low, high, PROSE_SIDE)
            if cut is None:
                cut = _most_balanced(math, low, high, MATH_SIDE)
        if cut is None:
            result.append(end)
        else:
            pieces += (cut, end), (start, cut)
    return result[:-1]


def _relations(hidden: _Hidden) -> Iterator[int]:
    """Where a formula may be broken: after relations, sums and lists."""
    for span in hidden.spans:
        if not span.math:
            continue
        if span.inner.rstrip().endswith(","):
            yield span.end
        for found in _RELATION.finditer(hidden.text, span.start, span.end):
            if hidden.kinds[found.start()] == _MATH:
                yield found.end()


def _most_balanced(places: Sequence[int], low: int, high: int, side: int) -> int | None:
    """The place nearest to the middle with at least ``side`` characters on either side."""
    middle = (low + high) / 2
    found = bisect_left(places, middle)
    near = [place for place in places[max(0, found - 1) : found + 1] if low + side <= place]
    return min(
        (place for place in near if place <= high - side),
        key=lambda place: abs(place - middle),
        default=None,
    )
