"""What the documentation quotes is what was committed, and follows from it with today's code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

PACKAGE = Path(__file__).parents[1]
SITE = PACKAGE.parents[1] / "docs" / "pages" / "vineppo"
OUTCOME = PACKAGE / "experiments" / "standard" / "vineppo" / "outcome.json"
PAGES = (PACKAGE / "README.md", SITE / "index.md")
pytestmark = pytest.mark.skipif(
    not OUTCOME.exists(), reason="the package without its committed results"
)


@pytest.fixture(scope="module")
def outcome() -> Any:
    return json.loads(OUTCOME.read_text(encoding="utf-8"))


def row(claim: dict[str, Any]) -> str:
    """A claim's line in the table of verdicts."""
    evidence = claim["evidence"]
    effect, low, high = (evidence[key] for key in ("effect", "low", "high"))
    measured = f"{effect:.2g}"
    if not low == effect == high:
        measured = f"{effect:.3f} [{low:.3f}, {high:.3f}]"
    number = f"{evidence['n']} {evidence['unit']}"
    text = f"| {claim['statement']} | {claim['verdict']} | {measured} | {number} |"
    return text.replace("-0.", "\N{MINUS SIGN}0.").replace("-1.", "\N{MINUS SIGN}1.")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_quoted_verdicts_are_those_of_the_committed_run(page: Path, outcome: Any) -> None:
    text = page.read_text(encoding="utf-8")
    missing = [line for line in map(row, outcome["claims"]) if line not in text]
    assert missing == []


def test_quoted_tables_are_those_of_the_committed_run(outcome: Any) -> None:
    """A table is quoted where its column heads are; then it is quoted whole."""
    text = (SITE / "experiments.md").read_text(encoding="utf-8")

    def line(cells: list[Any]) -> str:
        return f"| {' | '.join(map(str, cells))} |"

    quoted = [table for table in outcome["tables"] if line(table["columns"]) in text]
    assert quoted
    lines = [line(cells) for table in quoted for cells in table["rows"]]
    assert [one for one in lines if one not in text] == []


def test_the_committed_run_names_its_machine_versions_and_commit(outcome: Any) -> None:
    environment = outcome["environment"]
    assert environment["dirty"] is False
    assert len(environment["commit"]) == 40
    assert {"vineppo", "decapod", "numpy", "torch"} <= environment["packages"].keys()
    assert outcome["profile"] == "standard"


def test_committed_claims_were_recorded_before_the_run_and_are_todays(outcome: Any) -> None:
    pytest.importorskip("decapod")
    from vineppo.reproduce import CLAIMS

    assert not any(claim["changed"] for claim in outcome["claims"])
    recorded = {claim["id"]: claim["fingerprint"] for claim in outcome["claims"]}
    assert recorded == {claim.id: claim.fingerprint for claim in CLAIMS}


def test_committed_evidence_follows_from_the_committed_jobs_with_todays_code(outcome: Any) -> None:
    for package in ("accelerate", "decapod", "matplotlib"):
        pytest.importorskip(package)
    from decapod.jobs import Store
    from vineppo.reproduce import evidence, jobs

    done = Store(OUTCOME.parent / "jobs").done()
    found = evidence("standard", [done[job.key] for job in jobs("standard")])
    for claim in outcome["claims"]:
        again = found[claim["id"]]
        assert [again.effect, again.low, again.high] == pytest.approx(
            [claim["evidence"][key] for key in ("effect", "low", "high")], abs=1e-9
        )


def test_the_price_of_rollouts_is_beside_what_they_buy(outcome: Any) -> None:
    """A report at equal gradient steps alone would be misleading."""
    verdicts = {claim["id"] for claim in outcome["claims"]}
    assert {"vine-rloo", "vine-tokens", "vine-variance", "vine-variance-tokens"} <= verdicts
