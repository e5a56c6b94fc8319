"""The verdicts that the documentation quotes are those of the committed standard run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hpreliability.published import load_published, load_scores, recompute

PACKAGE = Path(__file__).parents[1]
OUTCOME = PACKAGE / "experiments" / "standard" / "hpreliability" / "outcome.json"
PAGES = (
    PACKAGE / "README.md",
    PACKAGE.parents[1] / "docs" / "pages" / "hpreliability" / "index.md",
)


@pytest.fixture(scope="module")
def outcome() -> Any:
    return json.loads(OUTCOME.read_text(encoding="utf-8"))


def row(claim: dict[str, Any]) -> str:
    evidence = claim["evidence"]
    effect, low, high = (
        f"{evidence[key]:.2f}".replace("-", "\N{MINUS SIGN}") for key in ("effect", "low", "high")
    )
    measured = (
        f"{evidence['effect']:.0f} of {evidence['n']}"
        if evidence["unit"] == "cells"
        else f"{effect} [{low}, {high}]"
    )
    number = f"{evidence['n']} {evidence['unit']}"
    return f"| {claim['statement']} | {claim['verdict']} | {measured} | {number} |"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_quoted_verdicts_are_those_of_the_committed_run(page: Path, outcome: Any) -> None:
    text = page.read_text(encoding="utf-8")
    missing = [line for line in map(row, outcome["claims"]) if line not in text]
    assert missing == []


def test_the_committed_run_names_its_machine_versions_and_commit(outcome: Any) -> None:
    environment = outcome["environment"]
    assert environment["dirty"] is False
    assert len(environment["commit"]) == 40
    assert {"hpreliability", "decapod", "numpy", "torch"} <= environment["packages"].keys()
    assert outcome["profile"] == "standard"


def test_committed_claims_were_recorded_before_the_run_and_are_todays(outcome: Any) -> None:
    pytest.importorskip("decapod")
    from hpreliability.reproduce import CLAIMS

    assert not any(claim["changed"] for claim in outcome["claims"])
    recorded = {claim["id"]: claim["fingerprint"] for claim in outcome["claims"]}
    assert recorded == {claim.id: claim.fingerprint for claim in CLAIMS}


def test_committed_evidence_follows_from_the_committed_jobs_with_todays_code(outcome: Any) -> None:
    for package in ("decapod", "matplotlib", "stable_baselines3", "yaml"):
        pytest.importorskip(package)
    from decapod.jobs import Store
    from hpreliability.reproduce import conclude, jobs

    done = Store(OUTCOME.parent / "jobs").done()
    findings = conclude("standard", [done[job.key] for job in jobs("standard")])
    for claim in outcome["claims"]:
        found = findings.evidence[claim["id"]]
        assert [found.effect, found.low, found.high] == pytest.approx(
            [claim["evidence"][key] for key in ("effect", "low", "high")], abs=1e-9
        )


def test_the_published_table_is_complete() -> None:
    assert len(load_published()) == len(recompute(load_scores()).frame) == 41
