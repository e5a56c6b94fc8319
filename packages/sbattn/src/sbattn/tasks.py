"""What the experiments train on: associative recall, bytes of text, files of tokens.

Every task draws batches from a numpy generator that the caller seeds, so a batch depends on
nothing but that seed. Targets are aligned with inputs; `IGNORED` marks positions that do not count.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from sbattn.errors import InvalidInputError

IGNORED: Final = -100
"""The target of a position that has none; `torch.nn.functional.cross_entropy` skips it."""

BYTES: Final = 256
"""Vocabulary of a text whose tokens are its bytes."""

Tokens = np.ndarray[Any, np.dtype[Any]]  # one dimension, whole numbers; perhaps on disk

_NOT_SOURCES: Final = frozenset(
    # Tests are data as often as they are code; tables of encodings and of help are generated.
    ("test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data")
)


class Batch(NamedTuple):
    """`[B, L]` int64 each: input tokens, and what to predict at each position or `IGNORED`."""

    inputs: Tensor
    targets: Tensor


class Task(Protocol):
    """What `sbattn.training.train` needs of a task.

    `label` says in words what the data are; it is kept in checkpoints, so that a run is never
    resumed on other data.
    """

    @property
    def vocab_size(self) -> int:
        """How many tokens there are."""
        ...

    @property
    def label(self) -> str:
        """What the data are."""
        ...

    def draw(self, rng: np.random.Generator, sequences: int, length: int) -> Batch:
        """A batch `[sequences, length]`; the same generator state gives the same batch."""
        ...


@dataclass(frozen=True)
class MQRAR:
    """Multi-query repeated associative recall: which value did this key get last?

    A sequence is `key value key value …`, keys and values drawn uniformly and independently. At
    every key that was seen before, the target is the value of its latest earlier pair; all other
    positions are `IGNORED`. Keys are the tokens 0 to `keys` − 1, values follow.

    Without `reassign` a key keeps its value throughout a sequence (MQAR, plain recall): then it
    does not matter which of its pairs is found.

    Attributes:
        keys: how many keys there are.
        values: how many values there are.
        reassign: whether a key gets a new value each time.

    Raises:
        InvalidInputError: fewer than one key or two values.
    """

    keys: int = 8
    values: int = 16
    reassign: bool = True

    def __post_init__(self) -> None:
        for name, least in (("keys", 1), ("values", 2)):
            if getattr(self, name) < least:
                raise InvalidInputError(
                    f"{name}: expected at least {least}, got {getattr(self, name)}"
                )

    @property
    def vocab_size(self) -> int:
        """Keys and values."""
        return self.keys + self.values

    @property
    def label(self) -> str:
        """The task and its sizes."""
        name = "MQRAR" if self.reassign else "MQAR"
        return f"{name}, {self.keys} keys, {self.values} values"

    @property
    def chance(self) -> float:
        """Accuracy of any guess that does not depend on the sequence: exactly 1 / values.

        A value is uniform and independent of everything that comes before it.
        """
        return 1 / self.values

    def draw(self, rng: np.random.Generator, sequences: int, length: int) -> Batch:
        """A batch; an odd length ends with a key.

        Raises:
            InvalidInputError: no sequence, or a length below 3, where nothing can be asked.
        """
        _check_size(sequences, length, least=3)
        pairs = (length + 1) // 2
        keys = rng.integers(self.keys, size=(sequences, pairs))
        if self.reassign:
            values = rng.integers(self.values, size=(sequences, pairs))
        else:
            bound = rng.integers(self.values, size=(sequences, self.keys))
            values = np.take_along_axis(bound, keys, axis=1)
        values = values + self.keys
        inputs = np.stack([keys, values], axis=2).reshape(sequences, 2 * pairs)
        targets = np.full_like(inputs, IGNORED)
        earlier = _previous_occurrence(keys)
        latest = np.take_along_axis(values, earlier.clip(min=0), axis=1)
        targets[:, ::2] = np.where(earlier >= 0, latest, IGNORED)
        return _batch(inputs[:, :length], targets[:, :length])


def _previous_occurrence(keys: Tokens) -> Tokens:
    """Where the same entry stood last in its row, or −1: shape and argument `[B, P]`."""
    order = np.argsort(keys, axis=1, kind="stable")  # equal keys stay in their order
    sorted_keys = np.take_along_axis(keys, order, axis=1)
    found = np.full_like(order, -1)
    found[:, 1:] = np.where(sorted_keys[:, 1:] == sorted_keys[:, :-1], order[:, :-1], -1)
    previous = np.empty_like(found)
    np.put_along_axis(previous, order, found, axis=1)
    return previous


@dataclass(frozen=True, eq=False)
class Text:
    """Windows of a long run of tokens; the target is the next token at every position.

    Attributes:
        tokens: `[N]` whole numbers; a memory-mapped file is read only where a window falls.
        vocab_size: how many tokens there are.
        label: what it is, and which version of it.
    """

    tokens: Tokens
    vocab_size: int
    label: str

    def draw(self, rng: np.random.Generator, sequences: int, length: int) -> Batch:
        """A batch of windows that start anywhere.

        Raises:
            InvalidInputError: no sequence, a length that the text does not hold, or a token
                outside the vocabulary.
        """
        _check_size(sequences, length, least=1)
        starts = len(self.tokens) - length
        if starts < 1:
            raise InvalidInputError(
                f"length: expected below the {len(self.tokens)} tokens of the text, got {length}"
            )
        windows = np.stack(
            [self.tokens[at : at + length + 1] for at in rng.integers(starts, size=sequences)]
        )
        if windows.max() >= self.vocab_size:
            raise InvalidInputError(
                f"vocab_size: expected above every token of {self.label}, got {self.vocab_size} "
                f"and the token {windows.max()}"
            )
        return _batch(windows[:, :-1], windows[:, 1:])


@dataclass(frozen=True, eq=False)
class Corpus:
    """A text to train on, and documents that it does not contain.

    Attributes:
        train: all training documents, one after the other.
        held_out: `[N]` tokens of each held-out document.
    """

    train: Text
    held_out: tuple[Tokens, ...]


def stdlib_corpus(max_bytes: int = 4_000_000) -> Corpus:
    """Sources of the running Python's standard library, as bytes.

    Files come in the order of the SHA-256 of their names, so that any cap takes a mixture; every
    tenth is held out, whole. Tests, generated tables and installed packages are left out. The
    label has the Python version and the SHA-256 of all bytes taken.

    Args:
        max_bytes: files are taken while they fit.

    Raises:
        InvalidInputError: there are no sources (a zipped or stripped installation).
    """
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(_sources(root), key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    digest, documents, size = hashlib.sha256(), [], 0
    for name in paths:
        content = (root / name).read_bytes()
        if size + len(content) > max_bytes:
            continue
        digest.update(content)
        documents.append(np.frombuffer(content, dtype=np.uint8))
        size += len(content)
    if len(documents) < 10:
        raise InvalidInputError(
            f"max_bytes: expected room for at least 10 source files under {root}, got "
            f"{len(documents)} of {len(paths)}; name a text file instead"
        )
    label = (
        f"standard library of Python {platform.python_version()}, {len(documents)} files, "
        f"{size} bytes, sha256 {digest.hexdigest()}"
    )
    train = [document for i, document in enumerate(documents) if i % 10 != 9]
    return Corpus(Text(np.concatenate(train), BYTES, label), tuple(documents[9::10]))


def _sources(root: Path) -> Iterator[str]:
    """Names of the source files below `root`, in no order."""
    for folder, folders, files in os.walk(root):
        # Site-packages lies below it and may be huge, so it is not even walked through.
        folders[:] = [name for name in folders if name not in _NOT_SOURCES]
        here = Path(folder).relative_to(root)
        yield from ((here / name).as_posix() for name in files if name.endswith(".py"))


def file_corpus(path: Path, held_out: float = 0.1) -> Corpus:
    """A text file, as bytes; its last part is held out.

    Raises:
        InvalidInputError: a share that is not between 0 and 1, or an empty file.
        OSError: the file cannot be read.
    """
    content = path.read_bytes()
    label = f"{path.name}, {len(content)} bytes, sha256 {hashlib.sha256(content).hexdigest()}"
    return _split(np.frombuffer(content, dtype=np.uint8), BYTES, label, held_out)


def token_corpus(
    path: Path, vocab_size: int, dtype: str = "uint16", held_out: float = 0.01
) -> Corpus:
    """A flat file of token ids, memory-mapped; its last part is held out.

    Documents must be joined already, with whatever separator the tokenizer has. The label has name
    and size, not a digest, which would read the whole file.

    Args:
        path: raw little-endian integers without a header.
        vocab_size: every id is below it (checked where tokens are read).
        dtype: of the ids.
        held_out: share at the end of the file.

    Raises:
        InvalidInputError: a size that `dtype` does not divide, or a share that is not between 0
            and 1.
        OSError: the file cannot be read.
    """
    kind = np.dtype(dtype).newbyteorder("<")
    size = path.stat().st_size
    if kind.kind not in "ui" or size == 0 or size % kind.itemsize:
        raise InvalidInputError(
            f"{path}: expected a filled file of {dtype} token ids, got {size} bytes; "
            "set dtype to what the file was written with"
        )
    tokens = np.memmap(path, dtype=kind, mode="r")
    return _split(tokens, vocab_size, f"{path.name}, {len(tokens)} tokens", held_out)


def _split(tokens: Tokens, vocab_size: int, label: str, held_out: float) -> Corpus:
    if not 0 < held_out < 1 or len(tokens) == 0:
        raise InvalidInputError(
            f"held_out: expected a share between 0 and 1 of a filled file, got {held_out} of "
            f"{len(tokens)} tokens"
        )
    cut = len(tokens) - int(held_out * len(tokens))
    return Corpus(Text(tokens[:cut], vocab_size, label), (tokens[cut:],))


def staggered_windows(
    documents: Sequence[Tokens], length: int, block: int, blocks: int, stretches: int
) -> Iterator[Tensor]:
    """Windows that show the same tokens at every distance from the start of the context.

    A stretch is `blocks` + `length`/`block` − 1 windows of `length` tokens, each one `block` later
    than the one before. So `blocks` consecutive blocks of its text fall once into each block of
    positions of a window: a loss by position then compares like with like, where plain windows
    would compare other tokens. No stretch spans two documents.

    Args:
        documents: `[N]` tokens each.
        length: of a window, a multiple of `block`.
        block: tokens per block.
        blocks: of text that are seen at every position.
        stretches: how many; spread evenly over all that the documents hold.

    Yields:
        `[windows, length + 1]` int64 per stretch; the last token is a target only.

    Raises:
        InvalidInputError: `block` does not divide `length`, or the documents are too short.
    """
    if block < 1 or length % block:
        raise InvalidInputError(f"block: expected a divisor of length {length}, got {block}")
    windows = blocks + length // block - 1
    span = (windows - 1) * block + length + 1
    places = [
        (document, start)
        for document in documents
        for start in range(0, len(document) - span + 1, span)
    ]
    if not 1 <= stretches <= len(places):
        raise InvalidInputError(
            f"stretches: expected 1 to {len(places)}, the stretches of {span} tokens that the "
            f"held-out documents have, got {stretches}; use fewer, or a shorter length"
        )
    for i in np.linspace(0, len(places) - 1, stretches).astype(int):
        document, start = places[i]
        stretch = np.asarray(document[start : start + span], dtype=np.int64)
        every = np.lib.stride_tricks.sliding_window_view(stretch, length + 1)[::block]
        yield torch.from_numpy(every.copy())


def _check_size(sequences: int, length: int, least: int) -> None:
    if sequences < 1 or length < least:
        raise InvalidInputError(
            f"sequences, length: expected at least 1 and {least}, got {sequences} and {length}"
        )


def _batch(inputs: Tokens, targets: Tokens) -> Batch:
    return Batch(
        torch.from_numpy(inputs.astype(np.int64)), torch.from_numpy(targets.astype(np.int64))
    )
