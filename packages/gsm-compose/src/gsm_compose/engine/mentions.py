"""Every number that a question states, whatever it looks like.

A *mention* is a number in the text: digits, a number word, a fraction, or a word such as *half* or
*dozen* that implies one. Only plain whole numbers in digits may become X; everything else matters
because it may be what a literal of the solution stands for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Final, Literal

from gsm_compose.engine.expressions import number

Kind = Literal[
    "whole",  # plain digits, perhaps with thousands commas
    "decimal",
    "percent",
    "fraction",
    "ordinal",
    "time",  # of the clock
    "glued",  # to letters or to other digits by punctuation: 5k, A4, 3-5, 10/12/2020
    "year",
    "label",  # names a thing instead of counting: day 3, grade 5
    "word",  # written in letters
]


@dataclass(frozen=True)
class Mention:
    """A stated number.

    Attributes:
        start: where it begins in the text, in characters.
        end: where it ends, exclusive.
        text: its characters.
        kind: how it is written.
        values: every value that a solution may write for it. A whole number has one; ``3/4`` has
            3, 4, 1, 3/4, 1/4, 7/4, 75 and 25; ``20%`` has 20, 1/5, 4/5, 80, 6/5 and 120.
    """

    start: int
    end: int
    text: str
    kind: Kind
    values: tuple[Fraction, ...]


_VULGAR: Final = {
    "½": (1, 2), "⅓": (1, 3), "⅔": (2, 3), "¼": (1, 4), "¾": (3, 4), "⅕": (1, 5), "⅖": (2, 5),
    "⅗": (3, 5), "⅘": (4, 5), "⅙": (1, 6), "⅚": (5, 6), "⅛": (1, 8), "⅜": (3, 8), "⅝": (5, 8),
    "⅞": (7, 8),
}  # fmt: skip
_DIGITS: Final = re.compile(r"\d{1,3}(?:,\d{3})+(?!\d)|\d+")
_FRACTION: Final = re.compile(rf"(\d+)\s*[/⁄]\s*(\d+)(?![\d/])|(?:\d+\s*)?([{''.join(_VULGAR)}])")
_AFTER_PERCENT: Final = re.compile(r"\s*(?:%|percent|per\s+cent|percentage)", re.I)
_AFTER_ORDINAL: Final = re.compile(r"\s?(?:st|nd|rd|th)\b", re.I)
_AFTER_TIME: Final = re.compile(
    r":\d\d|(?:\s*(?:-|–|to|until|till)\s*\d{1,2}(?::\d\d)?)?\s*(?:[ap]\.?m\b|o['’]clock)", re.I
)
_BEFORE_TIME: Final = re.compile(r"\d:$")
_BEFORE_LABEL: Final = re.compile(
    r"(?:\b(?:day|week|month|grade|chapter|page|number|no\.?|step|level|room|phase|round|route|"
    r"highway|section|type|group|team|class|question|problem|part|stage|season|episode|volume|"
    r"version|size|age|aisle|gate|lane|apartment|floor|table|house|box|bag|jar|bus|train|store|"
    r"model|game|set|test|quiz|exam|shift|trip|lap|row|year|quarter|interstate|channel|unit|lot)"
    r"\s+|#\s*)$",
    re.I,
)
_CURRENCY: Final = re.compile(r"[$€£]\s*$")

_SMALL: Final = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven",
    "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
_TENS: Final = (
    "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety",
)  # fmt: skip
_CARDINALS: Final = (
    {word: i for i, word in enumerate(_SMALL)}
    | {word: 10 * i for i, word in enumerate(_TENS, start=2)}
    | {"fourty": 40}
)
_SCALES: Final = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9}
_CARDINAL: Final = re.compile(
    r"\b(?:(?:{words}|an?(?=\s+(?:{scales})\b))(?:[\s-]+(?:and\s+)?(?:{words}|{scales}))*|"
    r"(?<!\d)(?<!\d\s)(?:{scales}))\b".format(
        words="|".join(sorted(_CARDINALS, key=len, reverse=True)), scales="|".join(_SCALES)
    ),
    re.I,
)
_PARTS: Final = {
    "half": 2, "halves": 2, "third": 3, "fourth": 4, "quarter": 4, "fifth": 5, "sixth": 6,
    "seventh": 7, "eighth": 8, "ninth": 9, "tenth": 10, "eleventh": 11, "twelfth": 12,
    "fifteenth": 15, "twentieth": 20, "hundredth": 100,
}  # fmt: skip
_PART: Final = re.compile(
    rf"\b(?:({'|'.join(_CARDINALS)}|an?)[\s-]+)?({'|'.join(_PARTS)})s?\b", re.I
)


def find_mentions(text: str) -> list[Mention]:
    """All mentions, in the order of their beginning; they may overlap."""
    found = [*_digits(text), *_fractions(text), *_cardinals(text), *_parts(text)]
    return sorted(found, key=lambda m: (m.start, m.end))


def whole_value(text: str) -> Fraction:
    """Value of a plain whole number such as ``1,200``."""
    return number(text)


def _digits(text: str) -> Iterator[Mention]:
    fractions = [match.span() for match in _FRACTION.finditer(text)]
    for match in _DIGITS.finditer(text):
        start, end = match.span()
        before, after = text[:start], text[end:]
        if before.endswith(".") and before[-2:-1].isdigit():
            continue  # the digits after a decimal point: part of the mention before
        if any(a <= start < b for a, b in fractions):
            continue  # part of a fraction, which has a mention of its own
        decimal = re.match(r"\.\d+", after)
        if decimal:
            end += decimal.end()
            after = text[end:]
        elif before.endswith("."):
            start -= 1
            before = text[:start]
        shown = text[start:end]
        kind = _kind(before, shown, after)
        value = number(shown)
        yield Mention(start, end, shown, kind, _values(kind, value))


def _kind(before: str, shown: str, after: str) -> Kind:
    if _AFTER_PERCENT.match(after):
        return "percent"
    if "." in shown:
        return "decimal"
    if _AFTER_ORDINAL.match(after):
        return "ordinal"
    if _AFTER_TIME.match(after) or _BEFORE_TIME.search(before):
        return "time"
    if _glued(before, after):
        return "glued"
    if _CURRENCY.search(before):
        return "whole"
    if len(shown) == 4 and 1700 <= int(shown) <= 2100:
        return "year"
    if _BEFORE_LABEL.search(before):
        return "label"
    return "whole"


def _glued(before: str, after: str) -> bool:
    if before[-1:].isalpha() or after[:1].isalpha() or "_" in (before[-1:], after[:1]):
        return True
    # A number joined to another by punctuation: 3-5, 6/7, 4*6; or signed.
    return bool(
        re.search(r"\d\s?[-–—/*+^=x×~]\s?$|(?:^|\s)[-−–]$", before)
        or re.match(r"\s?[-–—/*+^=×~]\s?\d|\s?x\s?\d|[²³]", after)
    )


def _values(kind: Kind, value: Fraction) -> tuple[Fraction, ...]:
    if kind == "percent":
        part = value / 100
        return (value, part, 1 - part, 100 - value, 1 + part, 100 + value)
    if kind == "decimal":
        whole = value.numerator // value.denominator
        return (value, Fraction(whole), value - whole)
    return (value,)


def _share(above: int, below: int) -> tuple[Fraction, ...]:
    part = Fraction(above, below)
    rest = 1 - part
    whole = (Fraction(above), Fraction(below), Fraction(below - above))
    return (*whole, part, rest, 1 + part, 100 * part, 100 * rest)


def _fractions(text: str) -> Iterator[Mention]:
    for match in _FRACTION.finditer(text):
        above, below = _VULGAR[match[3]] if match[3] else (int(match[1][-9:]), int(match[2][-9:]))
        if below == 0:
            continue
        values = _share(above, below)
        # "2 1/2": the number before the fraction belongs to it.
        mixed = re.search(r"(\d+)\s*(?:and\s+|-)?$", text[: match.start(3 if match[3] else 1)])
        if mixed:
            whole = int(mixed[1][-9:])
            values += (Fraction(whole), whole + Fraction(above, below))
        yield Mention(match.start(), match.end(), match[0], "fraction", values)


def _cardinals(text: str) -> Iterator[Mention]:
    for match in _CARDINAL.finditer(text):
        total = current = 0
        for word in re.findall(r"[a-z]+", match[0].lower()):
            if word in _CARDINALS:
                current += _CARDINALS[word]
            elif word == "hundred":
                current = max(current, 1) * 100
            elif word in _SCALES:
                total += max(current, 1) * _SCALES[word]
                current = 0
        value = Fraction(total + current)
        yield Mention(match.start(), match.end(), match[0], "word", (value,))


def _parts(text: str) -> Iterator[Mention]:
    for match in _PART.finditer(text):
        below = _PARTS[match[2].lower()]
        above = _CARDINALS.get((match[1] or "one").lower(), 1)
        yield Mention(match.start(), match.end(), match[0], "word", _share(above, below))
