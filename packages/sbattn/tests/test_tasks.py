from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sbattn.errors import InvalidInputError
from sbattn.tasks import (
    BYTES,
    IGNORED,
    MQRAR,
    Text,
    file_corpus,
    staggered_windows,
    stdlib_corpus,
    token_corpus,
)

SEEDS = st.integers(0, 2**32 - 1)


@settings(deadline=None)
@given(
    keys=st.integers(1, 9),
    values=st.integers(2, 9),
    length=st.integers(3, 40),
    seed=SEEDS,
    reassign=st.booleans(),
)
def test_the_target_is_the_latest_value_of_a_key_seen_before(
    keys: int, values: int, length: int, seed: int, reassign: bool
) -> None:
    task = MQRAR(keys, values, reassign)
    inputs, targets = task.draw(np.random.default_rng(seed), 3, length)
    assert inputs.shape == targets.shape == (3, length)
    for row, wanted in zip(inputs.tolist(), targets.tolist(), strict=True):
        latest: dict[int, int] = {}
        for at in range(0, length, 2):
            assert 0 <= row[at] < keys
            assert wanted[at] == latest.get(row[at], IGNORED)
            if at + 1 < length:
                assert keys <= row[at + 1] < task.vocab_size
                assert wanted[at + 1] == IGNORED
                assert reassign or latest.get(row[at], row[at + 1]) == row[at + 1]
                latest[row[at]] = row[at + 1]


@settings(deadline=None)
@given(seed=SEEDS)
def test_a_batch_depends_on_the_seed_alone(seed: int) -> None:
    task = MQRAR()
    first, again = (task.draw(np.random.default_rng((seed, 7)), 2, 32) for _ in range(2))
    other = task.draw(np.random.default_rng((seed, 8)), 2, 32)
    assert torch.equal(first.inputs, again.inputs)
    assert torch.equal(first.targets, again.targets)
    assert not torch.equal(first.inputs, other.inputs)


def test_a_guess_is_right_as_often_as_chance_says() -> None:
    task = MQRAR(keys=5, values=4)
    _, targets = task.draw(np.random.default_rng(0), 400, 101)
    asked = targets[targets != IGNORED]
    deviation = (task.chance * (1 - task.chance) / len(asked)) ** 0.5
    for value in range(task.keys, task.vocab_size):
        share = float((asked == value).float().mean())
        assert abs(share - task.chance) < 4 * deviation


def test_windows_of_a_text_are_runs_of_it_with_the_next_token_as_target() -> None:
    text = Text(np.arange(100, 200, dtype=np.uint8), BYTES, "counting")
    inputs, targets = text.draw(np.random.default_rng(0), 2000, 7)
    assert torch.equal(inputs[:, 1:], inputs[:, :-1] + 1)
    assert torch.equal(targets, inputs + 1)
    assert inputs.min() == 100  # both ends are reached
    assert targets.max() == 199


def test_the_standard_library_is_split_by_file_the_same_way_every_time() -> None:
    corpus, again = stdlib_corpus(200_000), stdlib_corpus(200_000)
    assert corpus.train.label == again.train.label
    assert "Python 3." in corpus.train.label
    assert "sha256" in corpus.train.label
    np.testing.assert_array_equal(corpus.train.tokens, again.train.tokens)
    size = len(corpus.train.tokens) + sum(map(len, corpus.held_out))
    assert 100_000 < size <= 200_000
    training = corpus.train.tokens.tobytes()
    for document in corpus.held_out:
        assert len(document) < 200 or document.tobytes() not in training


def test_a_text_file_is_read_as_bytes_and_its_end_is_held_out(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("äbcdefghi" * 10, encoding="utf-8")
    corpus = file_corpus(path, held_out=0.2)
    whole = np.concatenate([corpus.train.tokens, corpus.held_out[0]])
    assert whole.tobytes().decode() == "äbcdefghi" * 10
    assert len(corpus.held_out[0]) == 20
    with pytest.raises(InvalidInputError, match="held_out"):
        file_corpus(path, held_out=1.0)


def test_token_files_are_mapped_and_wrong_ones_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokens.bin"
    np.arange(1000, dtype="<u2").tofile(path)
    corpus = token_corpus(path, vocab_size=1000, held_out=0.1)
    assert isinstance(corpus.train.tokens, np.memmap)
    inputs, targets = corpus.train.draw(np.random.default_rng(0), 4, 16)
    assert torch.equal(targets, inputs + 1)
    assert corpus.held_out[0][0] == 900
    with pytest.raises(InvalidInputError, match="vocab_size"):
        token_corpus(path, vocab_size=5).train.draw(np.random.default_rng(0), 4, 16)
    path.write_bytes(b"odd")
    with pytest.raises(InvalidInputError, match="dtype"):
        token_corpus(path, vocab_size=1000)


@settings(deadline=None)
@given(
    block=st.integers(1, 4),
    per_window=st.integers(1, 5),
    blocks=st.integers(1, 5),
    extra=st.integers(0, 30),
)
def test_staggered_windows_show_the_same_tokens_in_every_block_of_positions(
    block: int, per_window: int, blocks: int, extra: int
) -> None:
    length = block * per_window
    span = (blocks + per_window - 2) * block + length + 1
    document = np.arange(span + extra)
    (windows,) = staggered_windows([document, np.arange(3)[:0]], length, block, blocks, 1)
    assert windows.shape == (blocks + per_window - 1, length + 1)
    assert torch.equal(windows[:, 1:], windows[:, :-1] + 1)
    shown = [
        {
            int(token)
            for w in range(per_window - 1 - k, len(windows) - k)
            for token in windows[w, k * block : (k + 1) * block]
        }
        for k in range(per_window)
    ]
    assert all(tokens == shown[0] for tokens in shown)
    assert len(shown[0]) == blocks * block


def test_stretches_stay_inside_documents_and_are_spread_over_them() -> None:
    documents = [np.full(40, value) for value in range(5)]
    found = list(staggered_windows(documents, 16, 8, 2, 5))  # 33 tokens each
    assert [int(windows[0, 0]) for windows in found] == [0, 1, 2, 3, 4]
    assert all(len(windows.unique()) == 1 for windows in found)
    for stretches, length in ((6, 16), (1, 40)):
        with pytest.raises(InvalidInputError, match="stretches"):
            list(staggered_windows(documents, length, 8, 2, stretches))
    with pytest.raises(InvalidInputError, match="block"):
        list(staggered_windows(documents, 16, 5, 2, 1))


def test_sizes_that_make_no_sense_are_refused() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(InvalidInputError, match="keys"):
        MQRAR(keys=0)
    with pytest.raises(InvalidInputError, match="values"):
        MQRAR(values=1)
    for sequences, length in ((0, 8), (1, 2)):
        with pytest.raises(InvalidInputError, match="sequences, length"):
            MQRAR().draw(rng, sequences, length)
    with pytest.raises(InvalidInputError, match="length"):
        Text(np.zeros(8, dtype=np.uint8), BYTES, "short").draw(rng, 1, 8)
