"""Numbers as people and models write them: "$1,234.00", "−5", "3/4", "1 1/2", "5%", "\\frac{3}{4}".

Values are exact `Fraction`s. A percent sign is a unit here: "5%" is 5, as GSM8K writes its answers.
What could be read in two ways is no number: "12,50" (a list, or a decimal comma), "1.2.3", "3/0";
nor is one with more than `MAX_DIGITS` digits. "1.234" is a little more than one.

Reading takes time proportional to the length of the text, whatever the text is.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

# Python converts no longer text to an integer where a user has set the limit to its lowest, 640.
MAX_DIGITS = 600

_SEPARATORS = ",.'_\u00a0"
_WORD_OR_NUMBER = re.compile(
    r"""
    [A-Za-z_][A-Za-z0-9_]*                    # a word, whose digits are no number: Q1
    | (?P<before>-)? (?:[$€£¥₹][ ]?(?P<after>-)?)?
      (?P<body>[0-9](?:[0-9,.'_]|\u00a0(?=[0-9]{3}(?![0-9])))* | \.[0-9]+)
    """,
    re.VERBOSE,
)
_PLAIN = re.compile(r"[0-9]+|[0-9]*\.[0-9]+")
# The same separator throughout; thousands in Europe, where the point separates; lakhs.
_GROUPED = re.compile(r"[1-9][0-9]{0,2}(?:([,'_\u00a0])[0-9]{3})(?:\1[0-9]{3})*(?:\.[0-9]+)?")
_POINT_GROUPED = re.compile(r"[1-9][0-9]{0,2}(?:(?:\.[0-9]{3})+,[0-9]+|\.[0-9]{3}(?:\.[0-9]{3})+)")
_LAKHS = re.compile(r"[1-9][0-9]?(?:,[0-9]{2})+,[0-9]{3}(?:\.[0-9]+)?")
_SPACE_GROUPS = re.compile(r"(?: [0-9]{3})+(?![0-9,/])(?:\.[0-9]+)?")

_MIXED = re.compile(r"[ \u00a0]([0-9]{1,9})/([0-9]{1,9})(?![0-9/])(?!\.[0-9])")
_OVER = re.compile(r"/([0-9]+)(?P<more>[/.][0-9][0-9,./]*)?")
_EXPONENT = re.compile(r"[eE]([+-]?[0-9]{1,5})(?![A-Za-z0-9_])")
_TIMES_TEN_TO = re.compile(r" ?(?:[×*·]|\\times|\\cdot) ?10 ?\^ ?\{?([+-]?[0-9]{1,5})\}?")
_POWER = re.compile(r"\^ ?\{?([0-9]{1,5})\}?")
_PERCENT = re.compile(r" ?%")

# Minus signs and hyphens, thin spaces, full-width signs, slashes, apostrophes, dots.
_SAME = str.maketrans(
    "−－﹣‒–‐‑\u2007\u2009\u202f．，％＄／＝：⁄’∗⋅",
    "-------\u00a0\u00a0\u00a0.,%$/=:/'*·",
)
_FRACTION = re.compile(
    r"(?P<digit>[0-9]?)\\[dt]?frac\s*"
    r"(?:\{\s*([0-9.,]+)\s*\}\s*\{\s*([0-9.,]+)\s*\}|([0-9])\s*([0-9]))"
)
_VULGAR = re.compile(r"([0-9]?)([¼-¾⅐-⅞])")
_DECIMAL = re.compile(r"[^\x00-\x7f]")


@dataclass(frozen=True)
class Numeral:
    """A number in a text that `normalise` has gone over.

    Attributes:
        start: where it begins, its sign and currency included, in characters.
        end: where it ends, exclusive.
        value: what it means, or None if that is not certain.
    """

    start: int
    end: int
    value: Fraction | None


def normalise(text: str) -> str:
    """The text with other scripts' digits, minus signs, spaces and LaTeX brought to one form."""
    if not text.isascii():
        text = _VULGAR.sub(_spell_vulgar, text.translate(_SAME))
        text = _DECIMAL.sub(_spell_digit, text)
    if "\\" in text or "{" in text:
        text = text.replace("{,}", ",").replace("\\!", "").replace("\\,", "\u00a0")
        text = text.replace("\\$", "$").replace("\\%", "%")
        text = _FRACTION.sub(_spell_fraction, text)
    return text


def _spell_digit(match: re.Match[str]) -> str:
    digit = unicodedata.decimal(match[0], -1)
    return match[0] if digit < 0 else str(digit)


def _spell_vulgar(match: re.Match[str]) -> str:
    # The character's own decomposition is digits around U+2044, the fraction slash.
    written = unicodedata.normalize("NFKD", match[2]).replace("⁄", "/")
    return f"{match[1]} {written}" if match[1] else written


def _spell_fraction(match: re.Match[str]) -> str:
    digit, *parts = match.groups()
    top, bottom = (part for part in parts if part is not None)
    return f"{digit} {top}/{bottom}" if digit else f"{top}/{bottom}"


def numerals(text: str, start: int = 0, end: int | None = None) -> Iterator[Numeral]:
    """The numbers of a normalised text that begin in ``[start, end)``, from left to right."""
    place = start
    stop = len(text) if end is None else end
    while match := _WORD_OR_NUMBER.search(text, place):
        if match.start() >= stop:
            return
        place = match.end()
        if match["body"] is not None:
            numeral = _read(text, match, is_spaced=False)
            place = numeral.end
            yield numeral


def numeral_at(text: str, place: int) -> Numeral | None:
    """The number of a normalised text that begins exactly at `place`.

    Here spaces may separate thousands ("1 234"): where a number is announced there is one number.
    """
    match = _WORD_OR_NUMBER.match(text, place)
    if match is None or match["body"] is None:
        return None
    return _read(text, match, is_spaced=True)


def parse_number(text: str) -> Fraction | None:
    """The number that the text is, as a whole; None if it is anything else.

    Currency, a percent sign, emphasis and a final period may stand around it; a unit may not.
    """
    text = normalise(text).strip(" \t\r\n*_.(){}[]\\")
    numeral = numeral_at(text, 0)
    if numeral is None or text[numeral.end :].strip(" $%\u00a0"):
        return None
    return numeral.value


def _read(text: str, match: re.Match[str], *, is_spaced: bool) -> Numeral:
    start, place = match.start(), match.start("body")
    body = match["body"].rstrip(_SEPARATORS)
    value = _amount(body)
    end = place + len(body)
    whole = value is not None and body.isdigit()
    if is_spaced and whole and len(body) <= 3 and (groups := _SPACE_GROUPS.match(text, end)):
        end = groups.end()
        value = _amount((body + groups[0]).replace(" ", "\u00a0"))
    elif whole and value is not None and (part := _MIXED.match(text, end)):
        top, bottom = int(part[1]), int(part[2])
        if 0 < top < bottom:
            end = part.end()
            value += Fraction(top, bottom)
    elif over := _OVER.match(text, end):
        end = over.end()
        below = None if over["more"] else _amount(over[1])
        value = value / below if value is not None and below else None
    elif scale := _EXPONENT.match(text, end) or _TIMES_TEN_TO.match(text, end):
        end = scale.end()
        value = _scaled(value, int(scale[1]))
    elif power := _POWER.match(text, end):
        end = power.end()
        value = _raised(value, int(power[1]))
    if percent := _PERCENT.match(text, end):
        end = percent.end()
    if match["after"] or (match["before"] and _is_sign(text, start)):
        value = None if value is None else -value
    return Numeral(start, end, value)


def _amount(body: str) -> Fraction | None:
    """The value of digits with separators, if there is one way to read them."""
    if len(body) > 2 * MAX_DIGITS or sum(map(str.isdigit, body)) > MAX_DIGITS:
        return None
    if _PLAIN.fullmatch(body):
        return Fraction(body)
    if _GROUPED.fullmatch(body) or _LAKHS.fullmatch(body):
        return Fraction(re.sub(r"[,'_\u00a0]", "", body))
    if _POINT_GROUPED.fullmatch(body):
        return Fraction(body.replace(".", "").replace(",", "."))
    return None


def _scaled(value: Fraction | None, exponent: int) -> Fraction | None:
    if value is None or abs(exponent) > MAX_DIGITS:
        return None
    return value * Fraction(10) ** exponent


def _raised(value: Fraction | None, exponent: int) -> Fraction | None:
    if value is None:
        return None
    digits = len(str(value.numerator)) + len(str(value.denominator))
    return None if digits * exponent > MAX_DIGITS else value**exponent


def _is_sign(text: str, place: int) -> bool:
    """Whether the hyphen at `place` is a sign, not an operator, a dash or part of a word."""
    before = text[max(0, place - 2) : place]
    if not before or before[-1] == "\n":
        return True
    if before[-1].isspace():
        return not (before[0].isdigit() or before[0] in ")]")
    return not (before[-1].isalnum() or before[-1] in ")]}%-")
