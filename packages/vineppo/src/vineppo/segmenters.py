"""What a step of an answer is.

VinePPO (arXiv 2410.01679) values the states between steps, so the unit of credit is whatever is
called a step. A segmenter says where steps begin, on text or on token ids. None loses anything: the
steps, put together, are the answer.

====================  ===========================================  ===================  ========
segmenter             a step                                       streams              exact
====================  ===========================================  ===================  ========
``"newline"``         a line with its newline; blank lines go      yes                  yes
                      with the next one
``"gsm8k"``           a newline and a line; the ``####`` line      but for a            no
                      with the last                                half-written #
``"latex"``           a sentence or a line of display math         no                   no
``"token"``           a token                                      yes                  yes
``"fixed:N"``         N tokens                                     yes                  yes
``"whole"``           the answer                                   yes                  yes
====================  ===========================================  ===================  ========

A segmenter *streams* if no border between two steps is withdrawn when the answer grows. Those that
do, and ``"gsm8k"``, also cut the text before one of their borders where they cut the whole text.
Steps are always cut in whole answers, so training needs none of it; whoever asks for values while
an answer is still being generated does. LaTeX looks ahead: a piece is short, or a long one is
balanced, because of what follows it.

A segmenter is *exact* if whether a border stands is decided by what has been written before it.
Then the expected VinePPO gradient (before whitening, without a step cap) is the true one however
few rollouts value a state. Where it is decided by what comes next (where a newline belongs to the
step that it starts, say), a state is valued only if a certain action is taken in it, and no number
of rollouts removes the bias. EOS has no text but is an action too, so an exact segmenter on text
also says whether a step has ended where the text does (:class:`PrefixSegmenter`). The exact bench
(:mod:`vineppo.experiments.exact`) says how large the bias is on random trees.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, Protocol, cast, runtime_checkable

from vineppo.errors import InvalidInputError
from vineppo.latex import LatexSegmenter

__all__ = [
    "SEGMENTERS",
    "FixedLengthSegmenter",
    "GSM8KSegmenter",
    "LatexSegmenter",
    "NewlineSegmenter",
    "PrefixSegmenter",
    "Segmenter",
    "TokenLevelSegmenter",
    "TokenSegmenter",
    "WholeResponseSegmenter",
    "check_offsets",
    "make_segmenter",
]


@runtime_checkable
class Segmenter(Protocol):
    """Cuts texts into steps.

    The contract, which :func:`check_offsets` holds it to: step i is ``text[offsets[i] :
    offsets[i + 1]]``; the first offset is 0, the last ``len(text)``, and they increase strictly. An
    empty text has no step and the one offset 0.
    """

    def segment(self, text: str) -> list[int]:
        """Where steps begin, in characters, and where the last one ends."""
        ...


@runtime_checkable
class PrefixSegmenter(Segmenter, Protocol):
    """Cuts texts where what has been written says so, whatever follows.

    No segmenter has to be one. With this method, tokens without text that come where a step has
    ended, such as EOS, begin a step, as any other token there. Without it they belong to the step
    before them, so that whether the state before EOS is valued depends on EOS being next.
    """

    def ends_step(self, text: str) -> bool:
        """Whether a step ends at the end of this text.

        Has to agree with ``segment``: it is true if every longer text that begins with this one is
        cut at its end, and false if none is. An empty text ends no step.
        """
        ...


@runtime_checkable
class TokenLevelSegmenter(Protocol):
    """Cuts token ids into steps; needs no tokenizer. The contract is that of text, in tokens."""

    def segment_ids(self, ids: Sequence[int]) -> list[int]:
        """Where steps begin, in tokens, and where the last one ends."""
        ...


@dataclass(frozen=True)
class NewlineSegmenter:
    """A step is a line that is not blank, with the newline that ends it.

    Blank lines belong to the step that they precede; those at the end of the text precede none and
    are a step of their own. A text of blank lines is one step.

    So a border is decided by what has been written, whatever comes next: an EOS directly behind the
    newline of a line that is not blank is a step, as any other token there would begin one. Behind
    a blank line it belongs to the step of that line, as any other token would. The paper's
    repository cuts otherwise; :class:`GSM8KSegmenter` is its rule.
    """

    def segment(self, text: str) -> list[int]:
        """See :class:`Segmenter`."""
        if not text:
            return [0]
        ends = (begin + len(line) + 1 for begin, line in _lines(text) if line.strip())
        return [0, *(end for end in ends if end < len(text)), len(text)]

    def ends_step(self, text: str) -> bool:
        """See :class:`PrefixSegmenter`: behind the newline of a line that is not blank."""
        return text.endswith("\n") and bool(text[text.rfind("\n", 0, -1) + 1 :].strip())


@dataclass(frozen=True)
class GSM8KSegmenter:
    """Steps as the repository of the paper (arXiv 2410.01679) cuts answers to GSM8K.

    A step is a line that is not blank, with the newline and the blank lines before it; those after
    the last step belong to that one. A line that begins with ``####``, as the one that gives the
    answer in GSM8K does, belongs to the step before it: who has got that far has nothing left to
    decide. A text of blank lines is one step.

    Tokens without text, such as EOS, belong to the step before them, whatever it ends with.

    Use it to compare with the paper. In principle it is biased, unlike :class:`NewlineSegmenter`,
    because a state is a border only if a newline is the next token. By how much depends on how
    likely the policy is to go on with a line where a newline could stand: little where it is all
    but certain whether one comes. The exact bench (:mod:`vineppo.experiments.exact`) measures it on
    random trees, where nothing is certain: "cut before mark" against "cut after mark".
    """

    def segment(self, text: str) -> list[int]:
        """See :class:`Segmenter`."""
        if not text:
            return [0]
        starts: list[int] = []
        end = 0  # of the last line that is not blank: what follows it belongs to the next step
        for begin, line in _lines(text):
            bare = line.strip()
            if not bare:
                continue
            if not starts or not bare.startswith("####"):
                starts.append(end)
            end = begin + len(line)
        return [*(starts or [0]), len(text)]


@dataclass(frozen=True)
class TokenSegmenter:
    """Each token is a step."""

    def segment_ids(self, ids: Sequence[int]) -> list[int]:
        """See :class:`TokenLevelSegmenter`."""
        return list(range(len(ids) + 1))


@dataclass(frozen=True)
class FixedLengthSegmenter:
    """Each ``tokens`` tokens are a step; the last one may be shorter.

    Raises:
        InvalidInputError: fewer than one token, or no whole number.
    """

    tokens: int

    def __post_init__(self) -> None:
        tokens: object = self.tokens  # comes from configurations too
        if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
            raise InvalidInputError(
                f"tokens: expected a whole number of at least 1, got {tokens!r}"
            )

    def segment_ids(self, ids: Sequence[int]) -> list[int]:
        """See :class:`TokenLevelSegmenter`."""
        return [*range(0, len(ids), self.tokens), len(ids)]


@dataclass(frozen=True)
class WholeResponseSegmenter:
    """The answer is one step, as in RLOO and GRPO. Works on text and on ids."""

    def segment(self, text: str) -> list[int]:
        """See :class:`Segmenter`."""
        return [0, len(text)] if text else [0]

    def segment_ids(self, ids: Sequence[int]) -> list[int]:
        """See :class:`TokenLevelSegmenter`."""
        return [0, len(ids)] if ids else [0]


SEGMENTERS: Final[dict[str, Callable[[], Segmenter | TokenLevelSegmenter]]] = {
    "newline": NewlineSegmenter,
    "gsm8k": GSM8KSegmenter,
    "latex": LatexSegmenter,
    "token": TokenSegmenter,
    "whole": WholeResponseSegmenter,
}
"""Segmenters by the names that configurations use; ``"fixed:N"`` is known beside them."""


def make_segmenter(spec: object) -> Segmenter | TokenLevelSegmenter:
    """The segmenter that a configuration means.

    Args:
        spec: a name in :data:`SEGMENTERS`, ``"fixed:N"`` with N tokens, or an object with a method
            ``segment`` or ``segment_ids``, which is given back as it is.

    Raises:
        InvalidInputError: none of these.
    """
    if isinstance(spec, str):
        name, colon, tokens = spec.partition(":")
        if name == "fixed" and tokens.isascii() and tokens.isdigit() and int(tokens):
            return FixedLengthSegmenter(int(tokens))
        if name in SEGMENTERS and not colon:
            return SEGMENTERS[name]()
    elif isinstance(spec, type):
        raise InvalidInputError(
            f"segmenter: expected a name or an object, got the class {spec.__name__}; "
            f"make an object of it: {spec.__name__}(...)"
        )
    elif callable(getattr(spec, "segment", None)) or callable(getattr(spec, "segment_ids", None)):
        return cast(Segmenter | TokenLevelSegmenter, spec)
    raise InvalidInputError(
        f"segmenter: expected one of {', '.join(SEGMENTERS)}, fixed:N with N tokens of at least 1, "
        f"or an object with a method segment(text) or segment_ids(ids), got {spec!r}"
    )


def check_offsets(offsets: object, length: int, segmenter: object) -> list[int]:
    """The offsets that a segmenter gave, as a list of ints, if they keep its contract.

    Args:
        offsets: any iterable of whole numbers, NumPy's and PyTorch's among them.
        length: of what was cut, in characters or tokens.
        segmenter: whose offsets they are, for the message.

    Raises:
        InvalidInputError: not whole numbers, not strictly increasing, or not from 0 to ``length``.
    """
    who = f"segmenter: {type(segmenter).__name__} returned"
    remedy = "a segmenter returns where each step begins and, last, the length of all"
    if isinstance(offsets, str | bytes) or not isinstance(offsets, Iterable):
        raise InvalidInputError(f"{who} {offsets!r}; expected a list of whole numbers; {remedy}")
    places = []
    for offset in offsets:
        try:
            place = operator.index(offset)
        except TypeError:
            place = None
        if place is None or isinstance(offset, bool):
            raise InvalidInputError(
                f"{who} {offset!r} among its offsets; expected whole numbers; {remedy}"
            )
        places.append(place)
    for left, right in pairwise(places):
        if not left < right:
            raise InvalidInputError(
                f"{who} {left} and then {right}; expected offsets that increase strictly; {remedy}"
            )
    if not places or places[0] != 0 or places[-1] != length:
        got = f"offsets from {places[0]} to {places[-1]}" if places else "no offset"
        raise InvalidInputError(f"{who} {got}; expected them to go from 0 to {length}; {remedy}")
    return places


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Each line without its newline, and where it begins."""
    begin = 0
    for line in text.split("\n"):
        yield begin, line
        begin += len(line) + 1
