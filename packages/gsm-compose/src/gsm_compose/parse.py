"""Answers in a model's text.

A text is read in this order, and the first kind that is there decides:

1. a final marker: ``The final answer is N`` (also ``Final answer: N``), ``#### N``, ``\\boxed{N}``;
   of several the last one that has a number;
2. a plain marker: ``The answer is N``, ``Answer: N``, ``The answer to Q2 is N``; likewise;
3. the last number of the text (`extract_answer` only).

If the number found is one that `gsm_compose.numerals` will not read, the answer is None: nothing
further is tried, because anything else would be a guess. An expression after a marker counts if it
is carried out there: ``The final answer is 6 * 8 = 48`` is 48, ``… is 6 * 8`` is None.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator
from fractions import Fraction

from gsm_compose.numerals import Numeral, normalise, numeral_at, numerals
from gsm_compose.sandbox import CodeResult, Isolation, Limits, run_many

_WINDOW = 200  # characters after a marker within which its number begins
_LAST = 50  # markers of a text that are looked at, from its end

_FINAL = re.compile(
    r"(?P<final>\bfinal\s+answer\b(?:[^\n.:=#]{0,40}?(?:\bis\b|[:=])|[ \t*]*\n))"
    r"|(?P<hashes>(?<!\#)\#\#\#\#(?!\#))"
    r"|(?P<boxed>\\boxed\s*\{)",
    re.IGNORECASE,
)
_PLAIN_MARKER = re.compile(
    r"(?<!q[0-9] )(?<!final )\banswer"
    r"(?:\s+(?:to|for|of)\s+(?:q[2-9]|the\s+(?:second|last)\s+question))?"
    r"\s*(?:\bis\b|[:=])",
    re.IGNORECASE,
)
_Q1_MARKER = re.compile(
    r"\bQ1(?:'s)?\s+(?:final\s+)?answer\s*(?:\bis\b|[:=])"
    r"|\banswer\s+(?:to|for|of)\s+Q1\s*(?:\bis\b|[:=])",
    re.IGNORECASE,
)
_X_IS = re.compile(r"(?<![A-Za-z0-9_])X[ \t*$]{0,4}(?:=|\bis\b|\bequals\b)")

_FILLER = re.compile(r"[\s*_:=~≈$\\(\[{>]{0,40}")  # between an announcement and its number
_X_FILLER = re.compile(r"(?:[\s*_~≈$\\(\[{]|boxed|text){0,20}")
_SENTENCE_END = re.compile(r"[.!?;](?=\s)|\n")
_OPERATOR_NEXT = re.compile(
    r"\s{0,4}(?:[+×·÷/^]|\*[ ]?[0-9($X\\]|\\(?:times|cdot|div)\b|-\s?[0-9($X]|of\s\$?[0-9])|\([0-9]"
)
_HASHES_TAIL = re.compile(r"[ \t]*(?:[^\W\d]{1,30})?[ \t.*$%)\\]{0,20}(?=\n|$)")
_OPERATOR_BEFORE = re.compile(r"[+/×·÷^][ ]?$|[\w)]\*$|[ ]\*[ ]$")
_OPERATORS = "+-*/×·÷^="
_LETTER_NEXT = re.compile(r"[A-Z]\b|[ ][W-Z]\b")
_CARRIED_OUT = re.compile(r"[-+*/×·÷^()0-9.,$%\s]{0,80}?=[\s$]{0,4}")


def extract_answer(text: str) -> Fraction | None:
    """The answer that a text arrives at: its marked answer, else its last number.

    Args:
        text: what a model wrote, of any length and content.

    Returns:
        The number, or None if there is none or it cannot be read with certainty.
    """
    normal = normalise(text)
    marked = _marked(normal)
    if marked is not None:
        return marked.value
    last = None
    for last in numerals(normal):  # noqa: B007 - the last one is what we are after
        pass
    return last.value if last else None


def extract_answer_strict(text: str) -> Fraction | None:
    """The answer behind a marker; None if there is no marker with a number.

    Args:
        text: what a model wrote.
    """
    marked = _marked(normalise(text))
    return marked.value if marked else None


def extract_q1(text: str) -> Fraction | None:
    """The answer to the first question inside a composition's solution.

    ``The Q1 answer is A`` (also ``The answer to Q1 is A``) decides, the last one that has a number.
    Without it, the *first* statement ``X = A`` or ``X is A`` does: later ones may use the letter
    anew. An equation about X (``X*4=24``, ``5X=30``, ``24 = 4 * X``) is not a statement of X.

    Args:
        text: what a model wrote.
    """
    normal = normalise(text)
    for match in _from_the_end(_Q1_MARKER, normal):
        numeral = _announced(normal, match.end())
        if numeral is not None:
            return numeral.value
    for match in _X_IS.finditer(normal):
        if _is_alone(normal, match.start()):
            numeral = _stated(normal, match.end())
            if numeral is not None:
                return numeral.value
    return None


def _from_the_end(pattern: re.Pattern[str], text: str) -> Iterator[re.Match[str]]:
    return reversed(deque(pattern.finditer(text), maxlen=_LAST))


def _marked(text: str) -> Numeral | None:
    for match in _from_the_end(_FINAL, text):
        if match["hashes"]:
            numeral = _after_hashes(text, match.end())
        elif match["boxed"]:
            numeral = _first(text, match.end(), _closing_brace(text, match.end()))
        else:
            numeral = _announced(text, match.end())
        if numeral is not None:
            return numeral
    for match in _from_the_end(_PLAIN_MARKER, text):
        numeral = _announced(text, match.end())
        if numeral is not None:
            return numeral
    return None


def _announced(text: str, place: int) -> Numeral | None:
    """The number that a marker which ends at `place` announces."""
    filler = _FILLER.match(text, place)
    start = filler.end() if filler else place
    end = _SENTENCE_END.search(text, start, start + _WINDOW)
    return _first(text, place, end.start() if end else min(len(text), start + _WINDOW))


def _first(text: str, start: int, end: int) -> Numeral | None:
    """The first number in a range; if it begins an expression, the number that it comes to."""
    # Where a number stands at once, its thousands may be separated by spaces.
    filler = _FILLER.match(text, start, end)
    at = filler.end() if filler else start
    numeral = next(
        (found for p in range(max(start, at - 2), at + 1) if (found := numeral_at(text, p))), None
    )
    if numeral is None:
        numeral = next(numerals(text, start, end), None)
    if numeral is None:
        return None
    inside = _OPERATOR_BEFORE.search(text[max(start, numeral.start - 3) : numeral.start])
    if not inside and not _OPERATOR_NEXT.match(text, numeral.end):
        return numeral
    equals = text.rfind("=", numeral.start, end)
    result = next(numerals(text, equals, end), None) if equals >= 0 else None
    if result is None or _OPERATOR_NEXT.match(text, result.end):
        return Numeral(numeral.start, numeral.end, None)
    return result


def _after_hashes(text: str, place: int) -> Numeral | None:
    """The number of a line ``#### N``; None for a heading of that level."""
    start = place
    while start < place + 20 and text[start : start + 1] in tuple(" \t*$\\("):
        start += 1
    numeral = numeral_at(text, start)
    if numeral is None or not _HASHES_TAIL.match(text, numeral.end):
        return None
    return numeral


def _closing_brace(text: str, place: int) -> int:
    depth = 1
    end = min(len(text), place + _WINDOW)
    for here in range(place, end):
        depth += {"{": 1, "}": -1}.get(text[here], 0)
        if depth == 0:
            return here
    return end


def _is_alone(text: str, place: int) -> bool:
    """Whether the X at `place` begins a statement, rather than being a term of something."""
    before = text[max(0, place - 8) : place]
    if before.endswith("**") and not before[:-2][-1:].isalnum():
        return True  # emphasis
    line = before.rpartition("\n")[2].rstrip(" \t$\\(")
    if not line or line.strip(" \t*-+") == "":
        return True  # the beginning of a line, or of a list's entry
    return line[-1] not in _OPERATORS and not line[-1].isdigit()


def _stated(text: str, place: int) -> Numeral | None:
    """The number that stands directly behind ``X =``, or that the expression there comes to."""
    filler = _X_FILLER.match(text, place)
    start = filler.end() if filler else place
    # The filler takes a currency sign for LaTeX; a minus sign may stand before it.
    numeral = numeral_at(text, start)
    if numeral is None:
        return None
    while (
        _OPERATOR_NEXT.match(text, numeral.end)
        or text[numeral.end : numeral.end + 2].lstrip()[:1] == "="
    ):
        carried_out = _CARRIED_OUT.match(text, numeral.end)
        result = numeral_at(text, carried_out.end()) if carried_out else None
        if result is None:
            return None
        numeral = result
    return None if _LETTER_NEXT.match(text, numeral.end) else numeral


# Code ---------------------------------------------------------------------------------------------

_FENCE = re.compile(r"^[ \t]*```[ \t]*([A-Za-z0-9_+-]*)[^\n]*$", re.MULTILINE)
_DEFINES = r"def \w+[ ]*\(|import [\w., ]+$|from [\w.]+ import |class \w+[ ]*[:(]|@\w"
_CODE_LINE = re.compile(_DEFINES)
# Words of Python that begin an English sentence too are followed by fewer words in a program.
_MORE_CODE = re.compile(
    _DEFINES
    + r"|(?:if|elif|else|for|while|try|except|finally|with|return|print|assert|pass|raise|global)\b"
    r"(?![ ][a-z]+[ ][a-z]+[ ][a-z]+)"
    r"|[A-Za-z_][A-Za-z0-9_.]*[ ]*(?:[-+*/]?=|\(|\[|:[ ]*[A-Za-z_.\[\]]+[ ]*=)"
    r"|[#@)\]}\s]|\"\"\"|'''|$"
)


def find_code(text: str) -> str | None:
    """The Python program in a model's text; None if there is none.

    All fenced blocks that define or import something, one after another (a later definition
    replaces an earlier one); a fence that is never closed ends with the text. Without a fence, the
    lines from the first one that defines or imports something up to the next line of prose.

    Args:
        text: what a model wrote.
    """
    blocks = []
    fences = list(_FENCE.finditer(text))
    for opening in range(0, len(fences), 2):
        if fences[opening][1].lower() in ("", "python", "py", "python3"):
            end = fences[opening + 1].start() if opening + 1 < len(fences) else len(text)
            block = text[fences[opening].end() : end].strip("\n")
            if any(map(_CODE_LINE.match, block.splitlines())):
                blocks.append(block)
    if blocks:
        return "\n\n".join(blocks) + "\n"
    lines = text[: fences[0].start()].splitlines() if len(fences) == 1 else text.splitlines()
    first = next((i for i, line in enumerate(lines) if _CODE_LINE.match(line)), None)
    if first is None:
        return None
    last = next((i for i in range(first, len(lines)) if not _MORE_CODE.match(lines[i])), len(lines))
    return "\n".join(lines[first:last]).rstrip() + "\n"


def run_code_solutions(
    texts: Iterable[str],
    call: tuple[str, ...] = ("solve_q1", "solution"),
    limits: Limits | None = None,
    isolation: Isolation = "auto",
    workers: int = 2,
) -> list[CodeResult]:
    """Run the programs in a model's texts; the results are in the order of `texts`.

    A text without a program gives the error ``"no function"``.

    Args:
        texts: what a model wrote, not trusted.
        call: functions to call: for a composition the first question's and the last one's.
        limits: what each program may use; `Limits()` if not given.
        isolation: see `gsm_compose.sandbox`.
        workers: programs that run at the same time.

    Raises:
        IsolationError: the isolation that was asked for does not work here.
    """
    return run_many([find_code(text) or "" for text in texts], call, limits, isolation, workers)


def run_code_solution(
    text: str,
    call: tuple[str, ...] = ("solve_q1", "solution"),
    limits: Limits | None = None,
    isolation: Isolation = "auto",
) -> CodeResult:
    """Run the program in a model's text; see `run_code_solutions`, which is quicker for many."""
    return run_code_solutions([text], call, limits, isolation, workers=1)[0]
