"""Facts about the vendored GSM8K, as they were counted independently of this code."""

from __future__ import annotations

import gzip
import hashlib
from fractions import Fraction
from importlib.resources import files

import pytest

from gsm_compose.building import compose
from gsm_compose.engine.problems import Problem, load_gsm8k
from gsm_compose.engine.slots import Slot, candidates, explain
from gsm_compose.engine.value_rules import reject_values
from gsm_compose.engine.yields import count_yields
from gsm_compose.errors import ProgramError, RejectedCompositionError


@pytest.fixture(scope="module")
def test_rows() -> list[Problem]:
    return load_gsm8k("test")


def number(problem: Problem, text: str) -> Slot:
    (found,) = [slot for slot in candidates(problem) if slot.text == text]
    return found


@pytest.mark.parametrize(
    ("split", "digest"),
    [
        ("train", "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465"),
        ("test", "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14"),
    ],
)
def test_the_vendored_files_are_the_published_ones(split: str, digest: str) -> None:
    packed = files("gsm_compose").joinpath("data", f"gsm8k-{split}.jsonl.gz").read_bytes()
    assert hashlib.sha256(gzip.decompress(packed)).hexdigest() == digest


def programs(rows: list[Problem]) -> int:
    found = 0
    for row in rows:
        try:
            assert row.program.steps
        except ProgramError:
            continue
        found += 1
    return found


def test_as_many_rows_become_programs_as_were_counted(test_rows: list[Problem]) -> None:
    assert len(test_rows) == 1319
    assert sum(row.final > 0 for row in test_rows) == 1317
    assert programs(test_rows) == 1208


def test_as_many_train_rows_become_programs_as_were_counted() -> None:
    rows = load_gsm8k("train")
    assert (len(rows), programs(rows)) == (7473, 7012)


def test_every_annotation_of_the_test_split_is_exact(test_rows: list[Problem]) -> None:
    counted = count_yields(test_rows, ())
    assert (counted.annotations, counted.exact) == (4282, 4282)


def test_the_example_of_the_papers_figure_2_gives_48(test_rows: list[Problem]) -> None:
    slot = number(test_rows[418], "5")
    assert explain(slot) == []
    assert test_rows[418].program.evaluate({slot: Fraction(6)}) == 48
    item = compose(test_rows[136], test_rows[418], slot)
    assert (item.x, item.gold, item.ignored) == (6, 48, 40)


def test_a_row_without_annotations_can_be_first_but_has_no_program(
    test_rows: list[Problem],
) -> None:
    with pytest.raises(ProgramError, match="no annotation"):
        assert test_rows[136].program.steps


def test_an_x_that_leaves_a_fraction_is_rejected(test_rows: list[Problem]) -> None:
    slot = number(test_rows[558], "24")
    reason = reject_values([slot], [6], Fraction(3))
    assert reason is not None
    assert reason.startswith("fraction appears")
    first = next(row for row in test_rows if row.final == 6)
    with pytest.raises(RejectedCompositionError, match="fraction appears"):
        compose(first, test_rows[558], slot)
