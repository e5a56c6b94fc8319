"""Words that tie a number of a question to something that the arithmetic does not show."""

from __future__ import annotations

import re
from typing import Final

_NUMBER: Final = r"\$?(?:\d[\d,]*|an?|one|two|three|four|five|six|seven|eight|nine|ten|twelve)"

# Under these the solution picks a case: with other numbers another case may hold.
_CASES: Final = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"\bat (?:least|most)\b|\bup to\b|\bminimum|\bmaximum|\blimit",
        r"\bno (?:more|less|fewer) than\b",
        r"\b(?:cheapest|smallest|largest|biggest|fewest|greatest|highest|lowest|shortest|longest|"
        r"fastest|slowest|oldest|youngest|heaviest|lightest|least|most expensive|"
        r"less expensive|whichever|best deal|better deal)\b",
        r"\bovertime\b|\bbonus|\bpenalt|\bfree\b|\blate fee",
        r"\bevery (?:second|third|other|fourth|fifth|\d+(?:st|nd|rd|th))\b",
        r"\bodd\b|\beven number|\bprime\b|\bmultiples?\b|\bdivisible\b|\bremainder\b",
        r"\bconsecutive\b|\bpattern\b|\bsequence\b",
        rf"\b(?:over|above|exceed\w*|beyond|past|under|below) {_NUMBER}\b",
        rf"(?<!\d )(?<!\w\w )\b(?:more|less|fewer) than {_NUMBER}\b",
        r"\bround(?:s|ed|ing)?\b(?![\s-]?trip)|\bnearest\b|\bapproximate|\bwhole number",
    )
)


def case_distinction(question: str) -> str | None:
    """The first words under which a solution may take another course, or None."""
    for pattern in _CASES:
        found = pattern.search(question)
        if found:
            return found[0]
    return None


_UNITS: Final = (
    r"(?:[kmgt]?b|[kmgt]bs?|(?:kilo|mega|giga|tera)?bytes?|inch(?:es)?|f(?:oo|ee)t|yards?|miles?|"
    r"(?:centi|milli|kilo)?met(?:er|re)s?|cm|mm|km|ounces?|oz|pounds?|lbs?|tons?|(?:kilo|milli)?"
    r"grams?|kg|(?:milli)?lit(?:er|re)s?|ml|gallons?|quarts?|pints?|cups?|tablespoons?|teaspoons?|"
    r"cents?|pennies|nickels?|dimes?|quarters?|dollars?|seconds?|minutes?|hours?|days?|weeks?|"
    r"months?|years?)"
)
_CONVERSION_AFTER: Final = re.compile(
    rf"\s+{_UNITS}\s+(?:of \w+ )?(?:in|to|per|make|equal)\s+(?:an?|one|1|every|each|the)\s+"
    rf"{_UNITS}\b",
    re.IGNORECASE,
)
_CONVERSION_BEFORE: Final = re.compile(
    rf"\b(?:1|one|an?|each|every)\s+{_UNITS}\s+"
    r"(?:has|have|is|are|=|equals?|contains?|makes?|holds?)\s+"
    r"(?:about |equal to )?$",
    re.IGNORECASE,
)
# "miles per hour" and the like are speeds and rates, not conversions.
_SAME_DIMENSION: Final = tuple(
    re.compile(rf"^(?:{words})$", re.IGNORECASE)
    for words in (
        r"[kmgt]?b|[kmgt]bs?|(?:kilo|mega|giga|tera)?bytes?",
        r"inch(?:es)?|f(?:oo|ee)t|yards?|miles?|(?:centi|milli|kilo)?met(?:er|re)s?|cm|mm|km",
        r"ounces?|oz|pounds?|lbs?|tons?|(?:kilo|milli)?grams?|kg",
        r"(?:milli)?lit(?:er|re)s?|ml|gallons?|quarts?|pints?|cups?|tablespoons?|teaspoons?|"
        r"ounces?|oz",
        r"cents?|pennies|nickels?|dimes?|quarters?|dollars?",
    )
)
_UNIT: Final = re.compile(rf"\b{_UNITS}\b", re.IGNORECASE)


def states_conversion(before: str, after: str) -> bool:
    """Whether a number between these texts says how many of one unit make another."""
    told = _CONVERSION_AFTER.match(after)
    if told:
        return _one_dimension(_UNIT.findall(told[0]))
    told = _CONVERSION_BEFORE.search(before)
    unit = re.match(rf"\s*({_UNITS})\b", after, re.IGNORECASE)
    if told and unit:
        return _one_dimension([*_UNIT.findall(told[0]), unit[1]])
    return False


def _one_dimension(units: list[str]) -> bool:
    return any(all(kind.match(unit) for unit in units) for kind in _SAME_DIMENSION)


_PART_AFTER: Final = re.compile(
    r"\W*(?:\w+\W+){0,2}of\s+(?:them|those|these|whom|which)\b|\s+of\s+(?:the|his|her|their|its)\b",
    re.IGNORECASE,
)
_GOT_BACK: Final = re.compile(
    r"\b(?:found|finds?|recover\w*|retriev\w*|came up with|(?:got|gets?|gave|gives?|brings?|"
    r"brought|came|comes?|takes?|took) back|return\w*)\W+(?:\w+\W+){0,3}$",
    re.IGNORECASE,
)
_LOSS: Final = re.compile(
    r"\b(?:lost|loses?|dropp\w+|drops|fell|missing|stole|sold|escap\w+|spill\w*|scatter\w*"
    r"|gave away)\b",
    re.IGNORECASE,
)


def part_of_a_whole(before: str, after: str) -> bool:
    """Whether a number between these texts counts a part of something counted before."""
    if _PART_AFTER.match(after):
        return True
    return bool(_GOT_BACK.search(before) and _LOSS.search(before))


_REMAINDER: Final = re.compile(
    r"\b(?:the|his|her|their|its)\s+(?:other|remaining)\s+\$?$", re.IGNORECASE
)


def states_remainder(before: str) -> bool:
    """Whether a number after this text says how many are left besides those counted before."""
    return _REMAINDER.search(before) is not None


_AGES: Final = re.compile(
    r"\byears?[\s-]+old\b|\bages?\b|\baged\b|\bturn(?:s|ed|ing)? \d|\bolder\b|\byounger\b|"
    r"\bbirthday",
    re.IGNORECASE,
)


def about_ages(question: str) -> bool:
    """Whether a question speaks of people's ages."""
    return _AGES.search(question) is not None


_ASKED: Final = re.compile(r"\bhow\s+many\s+((?:[\w'’-]+\s+){0,2}[\w'’-]+)", re.IGNORECASE)
_FOLLOWING: Final = re.compile(r"[\s-]*((?:[\w'’-]+\s+)?[\w'’-]+)")


def same_things_asked(question: str, end: int) -> bool:
    """Whether the question asks how many of the very things that the number before `end` counts."""
    counted = _FOLLOWING.match(question, end)
    asked = _ASKED.search(question)
    if counted is None or asked is None:
        return False
    return bool(_nouns(counted[1]) & _nouns(asked[1]))


_LITTLE: Final = frozenset(
    (
        "a", "an", "and", "are", "at", "did", "do", "does", "each", "for", "from", "had", "has",
        "have", "he", "her", "his", "how", "in", "is", "it", "many", "more", "of", "on", "one",
        "other", "per", "she", "than", "that", "the", "their", "them", "there", "they", "to", "was",
        "were", "will", "with", "you",
    )
)  # fmt: skip


def _nouns(words: str) -> set[str]:
    """Words that may be nouns, without the ending of the plural."""
    return {word.removesuffix("s") for word in words.lower().split() if word not in _LITTLE}
