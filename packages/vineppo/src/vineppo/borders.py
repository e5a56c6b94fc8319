"""From steps on text to steps on token ids, without ever encoding a text.

A rollout restarts from the very ids that were sampled, so a step must end between two tokens.
Encoding the text of a prefix again may give other ids than those the policy drew (a tokenizer that
joins a newline with what follows it does so at every line), and then the rollout continues another
state than the one of the trajectory. So the ids stay what they are, and it is the cut that moves::

    tokens   "It"  " is"  " 2"  ".\\n"  "So"  " 4"  "\\nAnd"  " 6"  <eos>
    starts     0      2     5       7     9    11       13    17     17    characters
    offsets    0                          9               14         19    a newline ends a step
    borders    0                          4                    7      9    14 is inside "\\nAnd"

A token belongs to the step in which its first character lies, as in the code of VinePPO
(arXiv 2410.01679). Special tokens, which have no text, belong to the step of the token before them,
and so do the further tokens of a character whose bytes are several tokens: no state ends within a
character. A step whose every token went to another one is no step any more.

A segmenter that says where a step has ended whatever follows
(:class:`vineppo.segmenters.PrefixSegmenter`) is taken at its word: special tokens that come after
the token in which a step ends belong to the next step, or are one. Above, an EOS in place of
``" 6"`` would be a step. Then whether the state before a token is a border does not depend on that
token, special or not, so that the end of an answer biases nothing. (That takes a tokenizer which
reads the first ids of an answer as the beginning of its text, up to a character that is not
complete. One whose newline is a byte among others, as in Llama 2, undoes it while the bytes behind
it are no character.)
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Final, Protocol

from vineppo.errors import InvalidInputError
from vineppo.segmenters import PrefixSegmenter, Segmenter, TokenLevelSegmenter, check_offsets

_INCOMPLETE: Final = "\ufffd"  # stands for bytes that are no character, or not yet
# Tokens that wait for a character to be completed; more than any character has bytes.
_PATIENCE: Final = 8


class Decoder(Protocol):
    """What is needed of a tokenizer; those of transformers have it."""

    def decode(
        self,
        token_ids: list[int],
        *,
        skip_special_tokens: bool,
        clean_up_tokenization_spaces: bool,
    ) -> str:
        """The text of token ids."""
        ...


def decode(ids: Sequence[int], tokenizer: Decoder) -> str:
    """The text of token ids, without special tokens and with every space that they stand for."""
    if not len(ids):
        return ""
    return tokenizer.decode(
        [int(token) for token in ids], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


def token_borders(
    segmenter: Segmenter | TokenLevelSegmenter,
    response_ids: Sequence[int],
    tokenizer: Decoder | None = None,
) -> list[int]:
    """Step borders in tokens: step i is ``response_ids[borders[i] : borders[i + 1]]``.

    The state before step i is the prompt with ``response_ids[: borders[i]]``, a prefix of what was
    sampled whatever the tokenizer does.

    Args:
        segmenter: on ids if it can be, else on text. If it has the method ``ends_step`` of
            :class:`vineppo.segmenters.PrefixSegmenter`, no border depends on what follows it.
        response_ids: T token ids of an answer, special tokens included.
        tokenizer: reads the ids; needed by segmenters on text alone.

    Returns:
        S + 1 strictly increasing places, the first 0 and the last T; ``[0]`` if T is 0.

    Raises:
        InvalidInputError: a segmenter that is none, or whose offsets break its contract; one on
            text without a tokenizer.
    """
    ids = [int(token) for token in response_ids]
    if isinstance(segmenter, TokenLevelSegmenter):
        return check_offsets(segmenter.segment_ids(ids), len(ids), segmenter)
    if not isinstance(segmenter, Segmenter):
        raise InvalidInputError(
            "segmenter: expected an object with a method segment(text) or segment_ids(ids), got "
            f"{segmenter!r}; make_segmenter makes one of a name"
        )
    if tokenizer is None:
        raise InvalidInputError(
            f"tokenizer: expected one, as {type(segmenter).__name__} works on text, got None; "
            "give the tokenizer, or a segmenter on token ids"
        )
    text = decode(ids, tokenizer)
    offsets = check_offsets(segmenter.segment(text), len(text), segmenter)
    if not ids:
        return [0]
    ends = offsets[1:-1]
    prefix = segmenter if isinstance(segmenter, PrefixSegmenter) else None
    if prefix is not None and text and prefix.ends_step(text):
        ends.append(len(text))
    starts = _starts(ids, text, tokenizer) if ends else []
    cuts = {bisect_left(starts, end) for end in ends}
    if prefix is not None:
        cuts = {_before_textless(ids, cut, starts, tokenizer) for cut in cuts}
    return [0, *sorted(cuts - {len(ids)}), len(ids)]


def _before_textless(
    ids: Sequence[int], place: int, starts: Sequence[int], tokenizer: Decoder
) -> int:
    """The first place from which only tokens without text lead to this one."""
    # One that starts where the token before it does has no text, or more bytes of its character.
    while place > 1 and starts[place - 1] == starts[place - 2]:
        if decode(ids[place - 1 : place], tokenizer):
            break
        place -= 1
    return place


def token_starts(ids: Sequence[int], tokenizer: Decoder) -> list[int]:
    """The character of the decoded text at which each token starts.

    Decodes few tokens at a time: a token together with the ones just before it, which settle
    whether a leading space is kept, and with those of the same character. What they come to is held
    against the text of all ids; if a tokenizer reads ids so that they do not agree,
    :func:`naive_token_starts` answers instead.

    Args:
        ids: T token ids.
        tokenizer: reads them.

    Returns:
        T characters, not decreasing, the first 0. A token in which no character starts, or whose
        first bytes belong to a character that started before it, has that of the token before it.
    """
    return _starts(ids, decode(ids, tokenizer), tokenizer)


def naive_token_starts(ids: Sequence[int], tokenizer: Decoder) -> list[int]:
    """What :func:`token_starts` gives, by decoding every prefix.

    A token starts where the text of the ids before it ends. If that is not the beginning of the
    whole text, it ends with bytes that are no character yet, and the token goes on with them.
    """
    text = decode(ids, tokenizer)
    starts: list[int] = []
    before = ""
    for place in range(len(ids)):
        after = decode(ids[: place + 1], tokenizer)
        start = starts[-1] if starts else 0
        begins = after != before and text.startswith(before)
        starts.append(max(start, len(before)) if begins else start)
        before = after
    return starts


def _starts(ids: Sequence[int], text: str, tokenizer: Decoder) -> list[int]:
    starts: list[int] = []
    held: list[int] = []  # tokens that are decoded with the next one: settled ones, then others
    settled = 0  # how many of them are settled
    known = ""  # what the settled ones are
    base = 0  # characters of `text` that are settled
    window = ""  # what the held tokens are
    agrees = True  # with `text`

    for token in ids:
        longer = decode([*held, token], tokenizer)
        start = starts[-1] if starts else 0
        begins = longer != window and agrees
        starts.append(max(start, base + len(window) - len(known)) if begins else start)
        if longer == window and known and agrees and not window.endswith(_INCOMPLETE):
            continue  # it has no text, and nothing after it can give it one: need not be held
        held.append(token)
        window = longer
        # Some tokenizers take bytes for characters or not all together: one that is incomplete
        # undoes those before it, until it is complete.
        agrees = window.startswith(known) and text.startswith(window[len(known) :], base)
        waits = window.endswith(_INCOMPLETE) and len(held) - settled < _PATIENCE
        if not agrees or waits:
            continue
        base += len(window) - len(known)
        alone = decode(held[settled:], tokenizer)
        if alone:  # else the next token would be read as the first of all
            held, window = held[settled:], alone
        settled, known = len(held), window
    if not agrees or base + len(window) - len(known) != len(text):
        return naive_token_starts(ids, tokenizer)
    return starts
