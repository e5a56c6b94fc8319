"""Numbers that a text implies without writing them: *dozen* is 12, a *week* has 7 days.

Two lists, because they are asked two questions. What *may* explain a literal of a solution is read
broadly (`implied`). What makes a number of the question doubtful, since the solution's literal may
just as well be the implied one, is read narrowly (`strongly_implied`): a slot of 7 in a question
about weeks is, a slot of 4 in a question about chairs is not.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache
from typing import Final

# Word stems (a plural or other ending may follow where it says so) and the numbers they imply.
_IMPLIED: Final[tuple[tuple[str, tuple[int | str, ...]], ...]] = (
    (r"half|halves|halved", (2, "1/2", 50)),
    (r"twice|doubl\w*|pairs?|couples?|both|twins?|two-way|round[\s-]trips?|each way|either", (2,)),
    (r"second|other|another|one more|himself|herself|themselves|together|parents?|sides?", (2, 1)),
    (r"back|return\w*|again", (2,)),
    (r"thrice|tripl\w*|triples?|thirds?|trio|triangle\w*|triangular|tricycles?", (3, "1/3")),
    (r"quadrupl\w*|quarters?|fourths?|squares?|rectang\w*|quartet", (4, "1/4", 25, 15, 2)),
    (r"quintupl\w*|fifths?|nickels?", (5, "1/5")),
    (r"dozens?", (12, 6)),
    (r"score", (20,)),
    (r"dimes?", (10,)),
    (r"cents?|penn(?:y|ies)|dollars?|percent\w*|per cent|meters?|metres?|centi\w*", (100,)),
    (r"kilo\w*|kg|km|grams?|milli\w*|liters?|litres?|tons?|ml|thousands?", (1000,)),
    (r"minutes?|hours?|seconds?|mph|hourly", (60, 3600)),
    (r"days?|daily|every ?day|hours?|nights?", (24, 7)),
    (r"weeks?|weekly|daily|days?|every ?day|nights?", (7, 52)),
    (r"weekdays?|work ?weeks?|work ?days?|working days?|business days?|school days?", (5,)),
    (r"weekends?", (2, 5)),
    (r"fortnights?", (14, 2)),
    (r"months?|monthly|years?|yearly|annual\w*", (12, 4, 30, 31, 52, 365)),
    (r"days?|years?|leap", (365, 30, 366)),
    (r"decades?", (10,)),
    (r"centur\w*", (100,)),
    (r"inch\w*|foot|feet|ft", (12,)),
    (r"yards?", (3, 36)),
    (r"miles?", (5280,)),
    (r"ounces?|oz|pounds?|lbs?", (16,)),
    (r"gallons?|quarts?|pints?", (4, 8, 2)),
    (r"cups?", (16, 8, 2, 4)),
    (r"tablespoons?|teaspoons?", (3, 16)),
    (r"cars?|dogs?|cats?|cows?|horses?|legs?|wheels?|tires?|chairs?|tables?", (4,)),
    (r"bicycles?|bikes?|chickens?|birds?|ducks?|people|eyes?|feet|legs?|shoes?|hands?", (2,)),
    (r"spiders?|octopus\w*", (8,)),
    (r"insects?|ants?|cubes?|dice", (6,)),
    (r"fingers?|toes?|hands?", (5, 10)),
    (r"alphabet|letters?", (26,)),
    (r"angles?|degrees?|circle\w*|clock\w*", (360, 180, 90, 12)),
    (r"january|march|may|july|august|october|december", (31,)),
    (r"april|june|september|november", (30,)),
    (r"february", (28, 29)),
    (r"average\w*|mean", (2,)),
)
_PATTERNS: Final = tuple(
    (re.compile(rf"\b(?:{words})\b", re.IGNORECASE), tuple(Fraction(v) for v in values))
    for words, values in _IMPLIED
)
_DAY: Final = re.compile(r"\b(?:mon|tues|wednes|thurs|fri|satur|sun)days?\b", re.IGNORECASE)
# Arithmetic needs these everywhere: a whole is 1, a percentage is out of 100.
ALWAYS: Final = frozenset({Fraction(1), Fraction(100), Fraction(2), Fraction(0)})


@lru_cache(maxsize=32768)
def implied(text: str) -> frozenset[Fraction]:
    """All numbers that words of `text` imply, the number of weekdays it lists among them."""
    found: set[Fraction] = set()
    for pattern, values in _PATTERNS:
        if pattern.search(text):
            found.update(values)
    days = {match[0].lower().rstrip("s") for match in _DAY.finditer(text)}
    if days:
        found |= {Fraction(len(days)), Fraction(5), Fraction(7)}
    return frozenset(found)


_STRONG: Final[tuple[tuple[tuple[str, ...], tuple[int, ...]], ...]] = (
    ((r"half|halves|halved|twice|doubl\w*|pairs?|couples?|both|twins?|round[\s-]trips?",), (2,)),
    ((r"each way|two-way|one-way|weekends?",), (2,)),
    ((r"thrice|tripl\w*|thirds?",), (3,)),
    ((r"quadrupl\w*|quarters?|fourths?",), (4,)),
    ((r"quarters?", r"dollars?|cents?|coins?"), (25,)),
    ((r"nickels?",), (5,)),
    ((r"dimes?|decades?",), (10,)),
    ((r"dozens?",), (12,)),
    ((r"percent\w*|per cent|centur\w*|cents?|penn(?:y|ies)",), (100,)),
    ((r"weeks?|weekly|daily|every ?day",), (7,)),
    ((r"weekdays?|work ?weeks?|work ?days?|working days?|business days?|school days?",), (5,)),
    ((r"months?|monthly", r"weeks?|weekly"), (4,)),
    ((r"years?|yearly|annual\w*", r"weeks?|weekly"), (52,)),
    ((r"months?|monthly", r"days?|daily"), (30, 31)),
    ((r"months?|monthly|years?|yearly|annual\w*",), (12,)),
    ((r"years?|yearly|annual\w*", r"days?|daily"), (365,)),
    ((r"hours?|hourly|mph", r"minutes?|seconds?"), (60,)),
    ((r"minutes?", r"seconds?"), (60,)),
    ((r"hours?|hourly", r"days?|daily"), (24,)),
    ((r"foot|feet|ft", r"inch\w*"), (12,)),
    ((r"yards?", r"foot|feet|ft"), (3,)),
    ((r"pounds?|lbs?", r"ounces?|oz"), (16,)),
    ((r"meters?|metres?", r"centi\w*|cm"), (100,)),
    ((r"[kmgt]bs?|(?:kilo|mega|giga|tera)?bytes?",), (1000, 1024)),
    ((r"kilo\w*|kg|km|tons?|liters?|litres?",), (1000,)),
)
_STRONG_PATTERNS: Final = tuple(
    (tuple(re.compile(rf"\b(?:{words})\b", re.IGNORECASE) for words in all_of), values)
    for all_of, values in _STRONG
)


@lru_cache(maxsize=32768)
def strongly_implied(text: str) -> frozenset[Fraction]:
    """Numbers that words of `text` stand for, or that convert between units it names."""
    found = {
        Fraction(value)
        for patterns, values in _STRONG_PATTERNS
        for value in values
        if all(pattern.search(text) for pattern in patterns)
    }
    days = {match[0].lower().rstrip("s") for match in _DAY.finditer(text)}
    return frozenset(found | ({Fraction(len(days))} if len(days) > 1 else set()))
