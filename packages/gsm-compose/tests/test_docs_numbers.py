"""Numbers on the documentation's pages, held against what they are quoted from.

Run as a script, it prints the tables as they should be.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from gsm_compose.engine.problems import load_gsm8k
from gsm_compose.engine.rules import DEFAULT_RULES
from gsm_compose.engine.value_rules import VALUE_RULES
from gsm_compose.engine.yields import Yields, count_yields

PACKAGE = Path(__file__).parents[1]
PAGES = PACKAGE.parents[1] / "docs" / "pages" / "gsm-compose"
RECORD = PACKAGE / "bench" / "results" / "coverage.json"
METHODS = {
    "multiway": "`multiway`, the default",
    "bootstrap": '`method="bootstrap"`',
    "items": "as if no two items shared a question, not offered",
    "pigeonhole": "first and last questions resampled apart, not offered",
}
pytestmark = pytest.mark.skipif(not PAGES.is_dir(), reason="the package without its repository")


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]], texts: int) -> str:
    """A table whose first `texts` columns are texts, and the others numbers."""
    rule = ["---"] * texts + ["---:"] * (len(columns) - texts)
    lines = [columns, rule, *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def programs(found: Yields) -> str:
    """The sentence under "Solutions as programs"."""
    return (
        f"In the test split {found.exact} of {found.annotations} annotations are exact, and "
        f"{found.programs} of {found.problems} rows have a program."
    )


def yields_table(found: Yields) -> str:
    columns = ["rule", "what it rejects, or why", "rejects", "left", "questions", "alone"]
    start = ["", "*numbers written in digits, in rows with a program*", "", str(found.numbers)]
    rows = [
        [line.rule, line.text, *map(str, (line.rejects, line.left, line.questions, line.alone))]
        for line in found.rules
    ]
    return markdown(columns, [[*start, "", ""], *rows], texts=2)


def values_table() -> str:
    rows = [[rule.name, rule.text] for rule in VALUE_RULES]
    return markdown(["rule", "what must hold"], rows, texts=2)


def coverage_table(record: dict[str, Any]) -> str:
    rows = []
    for name, label in METHODS.items():
        of = record["summary"][name]
        share = [f"{100 * of[key]:.1f} %" for key in ("delta_lowest", "delta_highest", "mean")]
        rows.append([label, *share, f"{of['cells'] - of['cells_outside']} of {of['cells']}"])
    columns = ["intervals", "Δ: lowest", "Δ: highest", "all: mean", "all: within 92 to 98 %"]
    return markdown(columns, rows, texts=1)


def read(page: str) -> str:
    return (PAGES / page).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def found() -> Yields:
    return count_yields(load_gsm8k("test"))


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8"))
    return loaded


def test_the_table_of_rules_has_todays_counts(found: Yields) -> None:
    assert [line.rule for line in found.rules] == [rule.name for rule in DEFAULT_RULES]
    assert yields_table(found) in read("method.md")
    assert programs(found) in " ".join(read("method.md").split())


def test_the_table_of_value_rules_names_them_all() -> None:
    assert values_table() in read("method.md")


def test_the_coverage_is_the_recorded_one(record: dict[str, Any]) -> None:
    text = " ".join(read("evaluate.md").split())
    draws = {row["draws"] for row in record["designs"]}
    assert coverage_table(record) in read("evaluate.md")
    assert f"{len(record['designs'])} designs" in text
    assert f"{max(draws):,} simulated evaluations for each of 100 items" in text
    assert f"{min(draws):,} for each of 1,200" in text
    assert f"largest bias of Δ is {record['largest_bias']:.4f}" in text


def test_the_cells_that_miss_are_named(record: dict[str, Any]) -> None:
    text = " ".join(read("evaluate.md").split())
    outside = [cell.rpartition(" ") for cell in record["summary"]["multiway"]["outside"]]
    shares = sorted({f"{100 * float(share):.1f} %" for *_, share in outside})
    assert len(outside) == 5
    for share in shares:
        assert share in text


def main() -> None:
    """Print the tables."""
    counted = count_yields(load_gsm8k("test"))
    recorded = json.loads(RECORD.read_text(encoding="utf-8"))
    tables = yields_table(counted), values_table(), coverage_table(recorded)
    print(programs(counted), *tables, sep="\n\n")


if __name__ == "__main__":
    main()
