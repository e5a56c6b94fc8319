"""The verdicts that the documentation quotes are those of the committed standard run."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from gsm_compose.building import build_benchmark
from gsm_compose.engine.problems import load_gsm8k

PACKAGE = Path(__file__).parents[1]
OUTCOME = PACKAGE / "experiments" / "standard" / "gsm-compose" / "outcome.json"
PAGES = (
    PACKAGE / "README.md",
    PACKAGE.parents[1] / "docs" / "pages" / "gsm-compose" / "index.md",
)


@pytest.fixture(scope="module")
def outcome() -> Any:
    return json.loads(OUTCOME.read_text(encoding="utf-8"))


def row(claim: dict[str, Any]) -> str:
    """A claim's line in the table of verdicts."""
    evidence = claim["evidence"]
    effect, low, high = (evidence[key] for key in ("effect", "low", "high"))
    if low == effect == high:
        measured = f"{effect:.0f}"
    else:
        places = 4 if claim["id"] == "bias" else 3
        measured = f"{effect:.{places}f} [{low:.{places}f}, {high:.{places}f}]"
    number = f"{evidence['n']} {evidence['unit']}"
    text = f"| {claim['statement']} | {claim['verdict']} | {measured} | {number} |"
    return text.replace("-0.", "\N{MINUS SIGN}0.")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_quoted_verdicts_are_those_of_the_committed_run(page: Path, outcome: Any) -> None:
    text = page.read_text(encoding="utf-8")
    missing = [line for line in map(row, outcome["claims"]) if line not in text]
    assert missing == []


def test_the_committed_run_names_its_machine_versions_and_commit(outcome: Any) -> None:
    environment = outcome["environment"]
    assert environment["dirty"] is False
    assert len(environment["commit"]) == 40
    assert {"gsm-compose", "decapod", "numpy", "torch"} <= environment["packages"].keys()
    assert outcome["profile"] == "standard"


def test_committed_claims_were_recorded_before_the_run_and_are_todays(outcome: Any) -> None:
    pytest.importorskip("decapod")
    from gsm_compose.reproduce import CLAIMS

    assert not any(claim["changed"] for claim in outcome["claims"])
    recorded = {claim["id"]: claim["fingerprint"] for claim in outcome["claims"]}
    assert recorded == {claim.id: claim.fingerprint for claim in CLAIMS}


def test_committed_evidence_follows_from_the_committed_jobs_with_todays_code(outcome: Any) -> None:
    for package in ("decapod", "matplotlib", "torch", "transformers"):
        pytest.importorskip(package)
    from decapod.jobs import Store
    from gsm_compose.reproduce import conclude, jobs

    done = Store(OUTCOME.parent / "jobs").done()
    findings = conclude("standard", [done[job.key] for job in jobs("standard")])
    for claim in outcome["claims"]:
        found = findings.evidence[claim["id"]]
        assert [found.effect, found.low, found.high] == pytest.approx(
            [claim["evidence"][key] for key in ("effect", "low", "high")], abs=1e-9
        )


def test_todays_builder_makes_the_benchmark_of_the_committed_results(tmp_path: Path) -> None:
    pytest.importorskip("decapod")
    from decapod.jobs import Store
    from gsm_compose.reproduce import jobs

    job = jobs("standard")[0]
    built: Any = Store(OUTCOME.parent / "jobs").done()[job.key].value
    benchmark = build_benchmark(load_gsm8k("test"), n=1200, seed=0)
    assert [item.x for item in benchmark] == built["first"]
    assert [item.gold for item in benchmark] == built["composed"]
    benchmark.to_jsonl(tmp_path / "benchmark.jsonl")
    timed = json.loads((PACKAGE / "bench" / "results" / "build.json").read_text(encoding="utf-8"))
    digest = hashlib.sha256((tmp_path / "benchmark.jsonl").read_bytes()).hexdigest()
    assert digest == timed["sha256"]
