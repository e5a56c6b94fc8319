from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vineppo.borders import decode, naive_token_starts, token_borders, token_starts
from vineppo.errors import InvalidInputError
from vineppo.segmenters import (
    FixedLengthSegmenter,
    GSM8KSegmenter,
    LatexSegmenter,
    NewlineSegmenter,
    Segmenter,
    TokenSegmenter,
    WholeResponseSegmenter,
)

pytest.importorskip("transformers")
tiny = pytest.importorskip("decapod.lm")
tokenizers = pytest.importorskip("tokenizers")

from tokenizers import (  # noqa: E402
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast  # noqa: E402

TEXTS = [
    "Tom has 3 bags, 3*4=12.\nSo 12-2=10 are left.\n#### 10",
    "Step one.\nStep two.\n\nStep three: naïve 字 😀\n",
    "The cat sat on the mat.\nThe cat ran.\n",
]
# Characters of one to four bytes, and the tokens' own.
written = st.lists(
    st.sampled_from([*"ab 3.\n#é字😀", "\n\n", "Step", " the", ".\n", "e\u0301", "\ufffd"])
).map("".join)


def fast(built: Tokenizer, **special: str) -> Any:
    return PreTrainedTokenizerFast(
        tokenizer_object=built, clean_up_tokenization_spaces=False, **special
    )


def merging() -> Any:
    """Byte-level BPE over whole texts, so that newlines are joined with what stands beside them."""
    built = Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    built.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<eos>", "<tool>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    built.train_from_iterator(TEXTS * 2, trainer)
    return fast(built, eos_token="<eos>")


def sentencepiece() -> Any:
    """As Llama's: spaces are `▁`, the first is dropped, unknown characters fall back to bytes."""
    built = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    built.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    built.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    built.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=[*special, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    built.train_from_iterator([text.replace("字", "").replace("😀", "") for text in TEXTS], trainer)
    plain = json.loads(built.to_str())
    plain["added_tokens"] = plain["added_tokens"][: len(special)]  # bytes are ordinary tokens
    return fast(Tokenizer.from_str(json.dumps(plain)), unk_token="<unk>", eos_token="</s>")


def metaspace() -> Any:
    """A unigram model whose decoder drops the space of the first token, whichever that is."""
    pieces = ["▁", "▁the", "▁▁", "\n", *"abtheSp3.#é字😀"]
    vocabulary = [("<unk>", 0.0), *((piece, -2.0 - i / 100) for i, piece in enumerate(pieces))]
    built = Tokenizer(models.Unigram(vocabulary, unk_id=0))
    built.pre_tokenizer = pre_tokenizers.Metaspace()
    built.decoder = decoders.Metaspace()
    built.add_special_tokens(["</s>"])
    return fast(built, unk_token="<unk>", eos_token="</s>")


def wordpiece() -> Any:
    """Words in parts, between which the decoder puts spaces."""
    vocabulary = ["[UNK]", "the", "cat", "##s", "a", "##b", ".", "\n", "3", "##字", "😀"]
    built = Tokenizer(models.WordPiece({t: i for i, t in enumerate(vocabulary)}, unk_token="[UNK]"))
    built.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    built.decoder = decoders.WordPiece()
    return fast(built, unk_token="[UNK]")


KINDS: dict[str, Callable[[], Any]] = {
    "bpe": lambda: tiny.build_tokenizer(TEXTS, "bpe", 300),
    "word": lambda: tiny.build_tokenizer(TEXTS, "word"),
    "char": lambda: tiny.build_tokenizer(TEXTS, "char", chat=True),
    "merging": merging,
    "sentencepiece": sentencepiece,
    "metaspace": metaspace,
    "wordpiece": wordpiece,
}
MADE = {name: make() for name, make in KINDS.items()}
BYTE_LEVEL = ["bpe", "merging"]


class Reader:
    """A tokenizer that can do nothing but decode, and counts what it decodes."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.tokens = 0

    def decode(self, token_ids: list[int], **options: bool) -> str:
        self.tokens += len(token_ids)
        return str(self.tokenizer.decode(token_ids, **options))

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"asked the tokenizer for {name}")

    def __call__(self, *_args: Any, **_options: Any) -> Any:
        raise AssertionError("encoded a text")


def encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@st.composite
def answers(draw: st.DrawFn, names: Sequence[str] = tuple(MADE)) -> tuple[Any, list[int]]:
    """A tokenizer and what may be sampled with it: ids of texts, of no text, and special ones."""
    tokenizer = MADE[draw(st.sampled_from(names))]
    some = st.lists(st.integers(0, len(tokenizer) - 1), max_size=6)
    parts = draw(st.lists(written.map(lambda text: encode(tokenizer, text)) | some, max_size=4))
    return tokenizer, [token for part in parts for token in part]


class EveryCharacter:
    """Cuts between any two characters, so that any cut is met."""

    def segment(self, text: str) -> list[int]:
        return list(range(len(text) + 1))


@given(answer=answers())
@settings(max_examples=200, deadline=None)
def test_starts_are_those_of_decoding_every_prefix(answer: tuple[Any, list[int]]) -> None:
    tokenizer, ids = answer
    starts = token_starts(ids, Reader(tokenizer))
    assert starts == naive_token_starts(ids, tokenizer)
    assert len(starts) == len(ids)
    assert not starts or starts[0] == 0
    assert all(left <= right for left, right in pairwise(starts))
    assert not starts or starts[-1] <= len(decode(ids, tokenizer))


def token_bytes(tokenizer: Any, ids: Sequence[int]) -> list[int]:
    """How many bytes each token of a byte-level vocabulary stands for: one per letter."""
    return [len(token) for token in tokenizer.convert_ids_to_tokens(ids)]


@given(name=st.sampled_from(BYTE_LEVEL), text=written)
@settings(max_examples=100, deadline=None)
def test_starts_are_those_of_counting_bytes(name: str, text: str) -> None:
    tokenizer = MADE[name]
    ids = encode(tokenizer, text)
    firsts = {len(text[:at].encode()): at for at in range(len(text))}  # bytes that begin characters
    expected: list[int] = []
    for place in np.cumsum([0, *token_bytes(tokenizer, ids)])[:-1].tolist():
        expected.append(firsts[place] if place in firsts else expected[-1])
    assert token_starts(ids, tokenizer) == expected


@given(name=st.sampled_from([*BYTE_LEVEL, "sentencepiece"]), text=written)
@settings(max_examples=100, deadline=None)
def test_no_state_ends_within_a_character(name: str, text: str) -> None:
    tokenizer = MADE[name]
    ids = encode(tokenizer, text)
    whole = decode(ids, tokenizer)
    for border in token_borders(EveryCharacter(), ids, Reader(tokenizer)):
        assert whole.startswith(decode(ids[:border], tokenizer))


@dataclass(frozen=True)
class OffsetsAlone:
    """A segmenter of which nothing but its offsets is known."""

    segmenter: Segmenter

    def segment(self, text: str) -> list[int]:
        return self.segmenter.segment(text)


@given(
    answer=answers(),
    segmenter=st.sampled_from(
        [OffsetsAlone(NewlineSegmenter()), GSM8KSegmenter(), EveryCharacter()]
    ),
)
@settings(max_examples=100, deadline=None)
def test_a_token_belongs_to_the_step_in_which_it_starts(
    answer: tuple[Any, list[int]], segmenter: Any
) -> None:
    tokenizer, ids = answer
    offsets = segmenter.segment(decode(ids, tokenizer))
    step = [bisect_right(offsets[:-1], start) for start in naive_token_starts(ids, tokenizer)]
    changes = [at for at, (left, right) in enumerate(pairwise(step), 1) if left != right]
    expected = [0, *changes, len(ids)] if ids else [0]
    assert token_borders(segmenter, ids, Reader(tokenizer)) == expected


def naive_line_borders(ids: Sequence[int], tokenizer: Any) -> list[int]:
    """A token begins a step if a line, not blank, has ended in the tokens since the last one."""
    if not ids:
        return [0]
    borders, ended = [0], 0
    for place in range(1, len(ids)):
        lines = decode(ids[:place], tokenizer).split("\n")[:-1]
        now = sum(bool(line.strip()) for line in lines)
        if now > ended:
            borders.append(place)
            ended = now
    return [*borders, len(ids)]


# In that of sentencepiece a byte undoes a newline that is a byte before it.
UNDOING_NOTHING = [name for name in MADE if name != "sentencepiece"]


@given(answer=answers(UNDOING_NOTHING), one=st.data())
@settings(max_examples=100, deadline=None)
def test_a_line_that_has_ended_is_a_step_whatever_token_comes(
    answer: tuple[Any, list[int]], one: st.DataObject
) -> None:
    """Also a special one: no border of lines is decided by what follows it."""
    tokenizer, ids = answer
    assert token_borders(NewlineSegmenter(), ids, Reader(tokenizer)) == naive_line_borders(
        ids, tokenizer
    )
    more = st.lists(st.integers(0, len(tokenizer) - 1), min_size=1, max_size=3)
    special = st.sampled_from(tokenizer.all_special_ids).map(lambda token: [token])
    found = []
    for _ in range(2):
        longer = [*ids, *one.draw(more | special)]
        borders = token_borders(NewlineSegmenter(), longer, Reader(tokenizer))
        found.append([border for border in borders if border <= len(ids)])
    assert found[0] == found[1]
    below = [border for border in found[0] if border < len(ids)]
    assert below == token_borders(NewlineSegmenter(), ids, Reader(tokenizer))[: len(below)]


@given(
    answer=answers(),
    segmenter=st.sampled_from(
        [
            *(NewlineSegmenter(), GSM8KSegmenter(), LatexSegmenter(), EveryCharacter()),
            *(TokenSegmenter(), FixedLengthSegmenter(3), WholeResponseSegmenter()),
        ]
    ),
)
@settings(max_examples=100, deadline=None)
def test_states_are_prefixes_of_what_was_sampled(
    answer: tuple[Any, list[int]], segmenter: Any
) -> None:
    tokenizer, ids = answer
    borders = token_borders(segmenter, ids, Reader(tokenizer))
    assert borders[0] == 0
    assert borders[-1] == len(ids)
    assert all(left < right for left, right in pairwise(borders))
    steps = [ids[left:right] for left, right in pairwise(borders)]
    assert [token for step in steps for token in step] == ids


@pytest.mark.parametrize("name", ["bpe", "word", "char", "sentencepiece"])
def test_steps_of_tokens_are_the_steps_of_the_text_where_newlines_are_tokens(name: str) -> None:
    tokenizer = MADE[name]
    ids = [*encode(tokenizer, TEXTS[0]), tokenizer.eos_token_id]
    for segmenter, steps in (
        (NewlineSegmenter(), ["Tom has 3 bags, 3*4=12.\n", "So 12-2=10 are left.\n", "#### 10"]),
        (GSM8KSegmenter(), ["Tom has 3 bags, 3*4=12.", "\nSo 12-2=10 are left.\n#### 10"]),
    ):
        borders = token_borders(segmenter, ids, Reader(tokenizer))
        assert [decode(ids[left:right], tokenizer) for left, right in pairwise(borders)] == steps
        assert borders[-1] == len(ids)  # the end of the answer belongs to its last step


class Pieces:
    """Reads ids as places in a list of texts; what has none is a special token."""

    def __init__(self, *pieces: str) -> None:
        self.pieces = pieces

    def decode(self, token_ids: list[int], **_options: bool) -> str:
        return "".join(self.pieces[token] for token in token_ids)


def test_the_example_of_the_documentation() -> None:
    pieces = ["It", " is", " 2", ".\n", "So", " 4", "\nAnd", " 6", ""]
    assert NewlineSegmenter().segment("".join(pieces)) == [0, 9, 14, 19]
    ids, tokenizer = list(range(len(pieces))), Pieces(*pieces)
    assert token_starts(ids, tokenizer) == [0, 2, 5, 7, 9, 11, 13, 17, 17]
    assert token_borders(NewlineSegmenter(), ids, tokenizer) == [0, 4, 7, 9]
    assert token_borders(NewlineSegmenter(), [*ids[:7], 8], tokenizer) == [0, 4, 7, 8]


def test_a_cut_inside_a_token_moves_behind_it() -> None:
    tokenizer = MADE["merging"]
    ids = encode(tokenizer, "Step one.\nStep two.\n\nStep three")
    texts = [tokenizer.decode([token]) for token in ids]
    assert texts == ["Step on", "e.\n", "Step two.\n", "\nStep t", "hr", "ee"]

    def steps(segmenter: Any, ids: list[int]) -> list[str]:
        borders = token_borders(segmenter, ids, Reader(tokenizer))
        return [decode(ids[left:right], tokenizer) for left, right in pairwise(borders)]

    # A newline that starts a step is inside "e.\n", one that ends it at its end.
    assert steps(GSM8KSegmenter(), ids) == ["Step one.\n", "Step two.\n", "\nStep three"]
    assert steps(NewlineSegmenter(), ids) == ["Step one.\n", "Step two.\n", "\nStep three"]
    # Inside "\nStep t" it is the other way round.
    ids = encode(tokenizer, "a\nStep three")
    assert [tokenizer.decode([token]) for token in ids] == ["a", "\nStep t", "hr", "ee"]
    assert steps(GSM8KSegmenter(), ids) == ["a", "\nStep three"]
    assert steps(NewlineSegmenter(), ids) == ["a\nStep t", "hree"]


# Tokens that lines end with, in, before and behind, and tokens without text.
LINES = Pieces("a", "\n", "\n\n", "a\n", "\na", "a\nb\n", "", "", " ")
A, LINE, BLANK, WITH, BEFORE, TWO, EOS, TOOL, SPACE = range(9)


@given(ids=st.lists(st.integers(0, 8), max_size=8))
@settings(max_examples=100, deadline=None)
def test_borders_of_lines_are_decided_by_the_tokens_before_them(ids: list[int]) -> None:
    found = {}
    for token in range(9):
        borders = token_borders(NewlineSegmenter(), [*ids, token], LINES)
        found[token] = [border for border in borders if border <= len(ids)]
    assert all(borders == found[EOS] for borders in found.values())
    for length in range(1, len(ids)):
        shorter = token_borders(NewlineSegmenter(), ids[:length], LINES)
        assert shorter[:-1] == [border for border in found[EOS] if border < length]


@pytest.mark.parametrize(
    ("ids", "borders"),
    [
        ([A, EOS], [0, 2]),
        ([A, LINE], [0, 2]),
        ([A, LINE, EOS], [0, 2, 3]),
        ([WITH, EOS], [0, 1, 2]),
        ([WITH, EOS, EOS], [0, 1, 3]),
        ([A, LINE, A, LINE, EOS, EOS], [0, 2, 4, 6]),
        ([A, BEFORE, EOS], [0, 2, 3]),  # a line has ended in the token before
        ([A, LINE, LINE, EOS], [0, 2, 4]),  # the blank line is a step, and the end is with it
        ([A, BLANK, EOS], [0, 2, 3]),
        ([A, BLANK], [0, 2]),
        ([A, LINE, SPACE, EOS], [0, 2, 4]),
        ([TWO, EOS], [0, 1, 2]),
        ([LINE, EOS], [0, 2]),
        ([BLANK, SPACE, EOS, EOS], [0, 4]),
        ([EOS, EOS], [0, 2]),
        ([TOOL, LINE, EOS, A, LINE, EOS], [0, 5, 6]),
        ([A, LINE, TOOL, A, EOS], [0, 2, 5]),  # wherever tokens without text stand
        ([A, LINE, TOOL, LINE, TOOL, A, EOS], [0, 2, 7]),
        ([A, TOOL, LINE, A], [0, 3, 4]),
    ],
)
def test_what_comes_behind_a_line_begins_a_step_with_text_or_without(
    ids: list[int], borders: list[int]
) -> None:
    assert token_borders(NewlineSegmenter(), ids, LINES) == borders


def test_segmenters_that_do_not_say_where_steps_end_leave_the_end_to_the_last_step() -> None:
    for ids, borders in (
        ([A, LINE, EOS], [0, 3]),
        ([A, LINE, A, LINE, EOS, EOS], [0, 2, 6]),
        ([A, BEFORE, EOS], [0, 3]),
        ([A, BLANK, EOS], [0, 3]),
        ([A, LINE, TOOL, A, EOS], [0, 3, 5]),
    ):
        assert token_borders(OffsetsAlone(NewlineSegmenter()), ids, LINES) == borders
    assert token_borders(GSM8KSegmenter(), [A, LINE, A, LINE, EOS], LINES) == [0, 1, 5]
    assert token_borders(LatexSegmenter(), [A, LINE, EOS], LINES) == [0, 3]


class AfterTheStop:
    """Steps end with a full stop whose bytes may be several tokens."""

    def segment(self, text: str) -> list[int]:
        ends = [place for place, one in enumerate(text, 1) if one == "。" and place < len(text)]
        return [0, *ends, len(text)] if text else [0]

    def ends_step(self, text: str) -> bool:
        return text.endswith("。")


def test_any_segmenter_may_say_that_a_step_has_ended() -> None:
    tokenizer = MADE["bpe"]
    eos = tokenizer.eos_token_id
    stop = ids_of_bytes(tokenizer, "。".encode())
    assert len(stop) == 3
    first, second = ids_of_bytes(tokenizer, b"ab"), ids_of_bytes(tokenizer, b"c")
    for rest in ([eos], [eos, eos], [*second], [eos, *second, eos]):
        ids = [*first, *stop, *rest]
        assert token_borders(AfterTheStop(), ids, Reader(tokenizer)) == [0, 5, len(ids)]
    cut_off = [*first, *stop[:2], eos]  # no stop
    assert token_borders(AfterTheStop(), cut_off, Reader(tokenizer)) == [0, 5]


def test_a_newline_that_is_a_byte_ends_no_line_while_what_follows_is_no_character() -> None:
    """What the borders then depend on is how the tokenizer reads, not which token follows."""
    tokenizer = MADE["sentencepiece"]
    letter = encode(tokenizer, "a")
    newline, eos = tokenizer.convert_tokens_to_ids("<0x0A>"), tokenizer.eos_token_id
    emoji = [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in "😀".encode()]
    line = [*letter, newline]
    for rest, behind in (([eos], True), (letter, True), (emoji, True), (emoji[:1], False)):
        ids = [*line, *rest]
        borders = token_borders(NewlineSegmenter(), ids, Reader(tokenizer))
        assert borders == ([0, len(line), len(ids)] if behind else [0, len(ids)])


def test_two_cuts_inside_a_token_are_one() -> None:
    tokenizer = MADE["merging"]
    ids = encode(tokenizer, "Step one.\nStep two.\n")
    starts = token_starts(ids, tokenizer)
    assert token_borders(EveryCharacter(), ids, Reader(tokenizer)) == [*range(len(ids) + 1)]
    assert len(ids) < starts[-1]


def test_encoding_the_text_of_a_state_again_would_give_another_state() -> None:
    tokenizer = MADE["merging"]
    text = "a\nStep three"
    ids = encode(tokenizer, text)
    cut = NewlineSegmenter().segment(text)[1]
    again = encode(tokenizer, text[:cut])
    assert again != ids[: len(again)]
    border = token_borders(NewlineSegmenter(), ids, Reader(tokenizer))[1]
    assert decode(ids[:border], tokenizer) == "a\nStep t" != text[:cut]


def ids_of_bytes(tokenizer: Any, data: bytes) -> list[int]:
    """A token for each byte, as a policy may sample them, whether they are characters or not."""
    prints = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))  # the letters of bytes that do not print
    letters = [chr(byte if byte in prints else next(others)) for byte in range(256)]
    return [tokenizer.convert_tokens_to_ids(letters[byte]) for byte in data]


def test_characters_of_several_tokens_are_not_split() -> None:
    tokenizer = MADE["bpe"]
    ids = ids_of_bytes(tokenizer, "a字😀b".encode())
    assert len(ids) == 1 + 3 + 4 + 1
    assert token_starts(ids, tokenizer) == [0, 1, 1, 1, 2, 2, 2, 2, 3]
    assert token_borders(EveryCharacter(), ids, Reader(tokenizer)) == [0, 1, 4, 8, 9]


def test_bytes_that_are_no_character_are_steps_of_the_text_they_are_read_as() -> None:
    tokenizer = MADE["bpe"]
    cut_off = ids_of_bytes(tokenizer, "a😀".encode())[:-1]
    assert decode(cut_off, tokenizer) == "a\ufffd"
    assert token_borders(EveryCharacter(), cut_off, Reader(tokenizer)) == [0, 1, 4]


def test_special_tokens_belong_to_the_step_before_them() -> None:
    tokenizer = MADE["bpe"]
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    first, second = encode(tokenizer, "a b\n"), encode(tokenizer, "c")
    ids = [bos, *first, bos, bos, *second, eos, eos]
    for segmenter, border in (
        (OffsetsAlone(NewlineSegmenter()), len(first) + 3),
        (NewlineSegmenter(), len(first) + 1),  # unless it has ended
    ):
        assert token_borders(segmenter, ids, Reader(tokenizer)) == [0, border, len(ids)]
    # Also where what follows is a character of several tokens.
    emoji = ids_of_bytes(tokenizer, "😀".encode())
    ids = [*first, bos, *emoji, bos]
    assert token_borders(EveryCharacter(), ids, Reader(tokenizer))[-2] == len(first) + 1


def test_an_answer_without_text_is_one_step() -> None:
    tokenizer = MADE["bpe"]
    assert token_borders(NewlineSegmenter(), [tokenizer.eos_token_id] * 3, tokenizer) == [0, 3]
    assert token_borders(NewlineSegmenter(), [], tokenizer) == [0]
    assert token_borders(TokenSegmenter(), []) == [0]
    assert token_starts([], tokenizer) == []


def test_a_leading_space_is_counted_only_where_it_is_read() -> None:
    tokenizer = MADE["sentencepiece"]
    ids = encode(tokenizer, "The cat")
    assert tokenizer.convert_ids_to_tokens(ids)[0].startswith("▁")
    text = decode(ids, tokenizer)
    assert text == "The cat"  # the first space is none
    starts = token_starts(ids, tokenizer)
    pieces = [text[left:right] for left, right in pairwise([*starts, len(text)])]
    read = [token.replace("▁", " ") for token in tokenizer.convert_ids_to_tokens(ids)]
    assert pieces == [read[0][1:], *read[1:]]


@pytest.mark.parametrize("name", MADE)
def test_few_tokens_are_decoded_for_each(name: str) -> None:
    tokenizer = MADE[name]
    lengths, decoded = [], []
    for repeats in (3, 24):
        ids = encode(tokenizer, "the cat 3. naïve 字 😀\n" * repeats)
        reader = Reader(tokenizer)
        token_starts(ids, reader)
        lengths.append(len(ids))
        decoded.append(reader.tokens)
    # Each token is decoded at most with a few others, however long the answer.
    assert decoded[0] <= 8 * lengths[0]
    assert decoded[1] <= 8 * lengths[1]
    naive = Reader(tokenizer)
    naive_token_starts(ids, naive)
    assert naive.tokens > lengths[1] ** 2 / 2


@pytest.mark.parametrize("repeated", [b"", b"\x80", b"\xf0", b"\xef\xbf\xbd", b"\xf0\x9f\x98"])
def test_what_a_collapsed_policy_repeats_is_decoded_as_cheaply(repeated: bytes) -> None:
    tokenizer = MADE["bpe"]
    unit = ids_of_bytes(tokenizer, repeated) or [tokenizer.eos_token_id]
    ids = [*encode(tokenizer, "ab"), *unit * 400, *encode(tokenizer, "\n")]
    reader = Reader(tokenizer)
    starts = token_starts(ids, reader)
    assert reader.tokens <= 20 * len(ids)
    assert starts == naive_token_starts(ids, tokenizer)


def test_special_tokens_after_bytes_that_are_no_character_cost_no_more() -> None:
    tokenizer = MADE["sentencepiece"]
    bad = tokenizer.convert_tokens_to_ids("<0x80>")
    the = encode(tokenizer, "The")  # with a space that is read unless nothing stands before it
    ids = [*[bad] * 8, *[tokenizer.eos_token_id] * 8, *the] * 15
    reader = Reader(tokenizer)
    starts = token_starts(ids, reader)
    assert reader.tokens <= 20 * len(ids)
    assert starts == naive_token_starts(ids, tokenizer)


class Thousands:
    """Reads ids as digits and groups them from the right: each new one moves all separators."""

    def decode(self, token_ids: list[int], **_options: bool) -> str:
        return f"{int(''.join(map(str, token_ids))):,}"


class Numbered:
    """Writes its place before each token, so that no token reads the same without those before."""

    def decode(self, token_ids: list[int], **_options: bool) -> str:
        return "".join(f"{place}:{token} " for place, token in enumerate(token_ids))


@pytest.mark.parametrize("tokenizer", [Thousands(), Numbered()])
@given(ids=st.lists(st.integers(1, 9), max_size=30))
@settings(max_examples=50, deadline=None)
def test_where_no_part_can_be_read_alone_every_prefix_is_decoded(
    tokenizer: Any, ids: list[int]
) -> None:
    assert token_starts(ids, tokenizer) == naive_token_starts(ids, tokenizer)


def test_segmenters_of_ids_are_asked_first_and_need_no_tokenizer() -> None:
    ids = [7, 7, 7, 7, 7]
    assert token_borders(TokenSegmenter(), ids) == [0, 1, 2, 3, 4, 5]
    assert token_borders(FixedLengthSegmenter(2), ids) == [0, 2, 4, 5]
    assert token_borders(WholeResponseSegmenter(), ids) == [0, 5]


def test_ids_may_be_an_array() -> None:
    tokenizer = MADE["bpe"]
    ids = encode(tokenizer, TEXTS[0])
    for segmenter in (NewlineSegmenter(), TokenSegmenter(), WholeResponseSegmenter()):
        borders = token_borders(segmenter, np.array(ids), tokenizer)  # type: ignore[arg-type]
        assert borders == token_borders(segmenter, ids, tokenizer)


def test_text_cannot_be_cut_without_a_tokenizer() -> None:
    with pytest.raises(InvalidInputError, match="tokenizer: expected one, as NewlineSegmenter"):
        token_borders(NewlineSegmenter(), [1, 2])


@pytest.mark.parametrize("segmenter", [None, "newline", len])
def test_what_is_no_segmenter_is_refused(segmenter: Any) -> None:
    with pytest.raises(InvalidInputError, match="segmenter: expected an object with a method"):
        token_borders(segmenter, [1, 2], MADE["bpe"])


class Unsorted:
    def segment(self, text: str) -> list[int]:
        return [0, 3, 2, len(text)]


class Incomplete:
    def segment_ids(self, ids: Sequence[int]) -> list[int]:
        return [0, len(ids) - 1]


def test_offsets_that_break_the_contract_are_refused() -> None:
    tokenizer = MADE["bpe"]
    ids = encode(tokenizer, "Step one.")
    with pytest.raises(InvalidInputError, match="segmenter: Unsorted returned 3 and then 2"):
        token_borders(Unsorted(), ids, tokenizer)
    with pytest.raises(InvalidInputError, match="segmenter: Incomplete returned offsets from 0"):
        token_borders(Incomplete(), ids, tokenizer)
