"""The labels that were read one by one, held against today's code."""

from __future__ import annotations

import json
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from gsm_compose.engine.problems import Problem, load_gsm8k
from gsm_compose.engine.rules import DEFAULT_RULES
from gsm_compose.engine.slots import Slot, candidates, explain
from gsm_compose.engine.value_rules import VALUE_RULES, reject_values

FOLDER = Path(__file__).parents[1] / "audit"
NAMES = {rule.name for rule in DEFAULT_RULES} | {rule.name for rule in VALUE_RULES}


@pytest.fixture(scope="module")
def read() -> list[dict[str, Any]]:
    lines = (FOLDER / "labels.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def rows() -> dict[str, Problem]:
    return {row.id: row for split in ("test", "train") for row in load_gsm8k(split)}


def slot_of(record: dict[str, Any], rows: dict[str, Problem]) -> Slot:
    return next(s for s in candidates(rows[record["q2"]]) if s.start == record["start"])


def rejections(record: dict[str, Any], rows: dict[str, Problem]) -> list[str]:
    """Names of the rules that reject the replacement now."""
    slot = slot_of(record, rows)
    reasons = explain(slot)
    if not reasons:
        reason = reject_values([slot], [record["x"]], Fraction(3))
        reasons = [] if reason is None else [reason]
    return [reason.partition(":")[0] for reason in reasons]


def test_at_least_a_hundred_items_of_the_test_split_were_read(read: list[dict[str, Any]]) -> None:
    assert len({r["item"] for r in read if "/test/" in r["q2"]}) >= 100
    assert {r["grade"] for r in read} <= {"ok", "odd", "wrong", "impossible"}


def test_every_label_found_wrong_is_now_rejected_by_the_rule_it_names(
    read: list[dict[str, Any]], rows: dict[str, Problem]
) -> None:
    bad = [r for r in read if r["grade"] in ("wrong", "impossible")]
    assert bad
    for record in bad:
        assert record["rejected_by"] in NAMES
        assert record["rejected_by"] in rejections(record, rows)


def test_every_label_found_right_still_stands_or_is_rejected(
    read: list[dict[str, Any]], rows: dict[str, Problem]
) -> None:
    kept = 0
    for record in read:
        if record["grade"] in ("ok", "odd") and not rejections(record, rows):
            slot = slot_of(record, rows)
            assert slot.problem.program.evaluate({slot: record["x"]}) == record["gold"]
            kept += 1
    assert kept > 300


def test_the_page_about_the_audit_counts_what_the_file_has(read: list[dict[str, Any]]) -> None:
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    counts = Counter((r["round"], r["grade"]) for r in read)
    for round_ in sorted({r["round"] for r in read}):
        total = sum(n for (r, _), n in counts.items() if r == round_)
        cells = [counts[round_, grade] for grade in ("ok", "odd", "impossible", "wrong")]
        assert f"| {round_} | {total} | {' | '.join(map(str, cells))} |" in text
