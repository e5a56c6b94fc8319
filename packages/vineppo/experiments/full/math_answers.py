r"""The reward of math-rho-1b.yaml: 1 where the last \boxed{} holds the right answer, else 0.

Answers are compared as texts, after spellings of the same thing were made equal. An answer that is
right in another form (0.5 for \frac{1}{2}) counts as wrong.
"""

from __future__ import annotations

import re

_SPACES = re.compile(r"\\[,;:! ]|\\q?quad\b|~|\s+")
_WRAPPER = re.compile(r"\\(?:text|textbf|mathrm|mbox)\{([^{}]*)\}")
_SHORT_FRACTION = re.compile(r"\\frac(\d)(\d)")
_EQUAL = {
    "\\dfrac": "\\frac", "\\tfrac": "\\frac", "\\left": "", "\\right": "", "^\\circ": "",
    "^{\\circ}": "", "\\$": "", "$": "", "\\%": "", "%": "",
}  # fmt: skip


def reward(completions: list[str], answer: list[str], **_: object) -> list[float]:
    """Scores of completions against the column ``answer``."""
    return [
        float((given := boxed(text)) is not None and plain(given) == plain(wanted))
        for text, wanted in zip(completions, answer, strict=True)
    ]


def boxed(text: str) -> str | None:
    r"""What stands in the last \boxed{...} whose braces close; None without one."""
    place = text.rfind("\\boxed{")
    if place < 0:
        return None
    start = place + len("\\boxed{")
    depth = 1
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start:end]
    return None


def plain(answer: str) -> str:
    """The answer without spaces, units of layout, and other spellings of the same sign."""
    for spelling, meant in _EQUAL.items():
        answer = answer.replace(spelling, meant)
    answer = _SPACES.sub("", answer)
    answer = _WRAPPER.sub(r"\1", answer)
    answer = _SHORT_FRACTION.sub(r"\\frac{\1}{\2}", answer)
    return answer.rstrip(".")
