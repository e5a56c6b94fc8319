"""What the documentation quotes is what was committed, and follows from it with today's code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

PACKAGE = Path(__file__).parents[1]
SITE = PACKAGE.parents[1] / "docs" / "pages" / "sbattn"
OUTCOME = PACKAGE / "experiments" / "standard" / "sbattn" / "outcome.json"
TIMES = PACKAGE.parents[1] / "kernels" / "benchmarks" / "results"
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
    measured = f"{effect:g}"
    if not low == effect == high:
        measured = f"{effect:.3f} [{low:.3f}, {high:.3f}]"
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
    assert {"sbattn", "decapod", "numpy", "torch"} <= environment["packages"].keys()
    assert outcome["profile"] == "standard"


def test_committed_claims_were_recorded_before_the_run_and_are_todays(outcome: Any) -> None:
    pytest.importorskip("decapod")
    from sbattn.reproduce import CLAIMS

    assert not any(claim["changed"] for claim in outcome["claims"])
    recorded = {claim["id"]: claim["fingerprint"] for claim in outcome["claims"]}
    assert recorded == {claim.id: claim.fingerprint for claim in CLAIMS}


def test_committed_evidence_follows_from_the_committed_jobs_with_todays_code(outcome: Any) -> None:
    for package in ("decapod", "matplotlib"):
        pytest.importorskip(package)
    from decapod.jobs import Store
    from sbattn.reproduce import conclude, jobs

    done = Store(OUTCOME.parent / "jobs").done()
    findings = conclude("standard", [done[job.key] for job in jobs("standard")])
    for claim in outcome["claims"]:
        found = findings.evidence[claim["id"]]
        assert [found.effect, found.low, found.high] == pytest.approx(
            [claim["evidence"][key] for key in ("effect", "low", "high")], abs=1e-9
        )


def test_quoted_means_of_all_arms_are_those_of_the_committed_jobs() -> None:
    text = (SITE / "experiments.md").read_text(encoding="utf-8")
    assert [line for line in arm_rows() if line not in text] == []


def arm_rows() -> list[str]:
    """Lines of the tables of all arms: mean accuracy by length; mean loss near and far."""
    accuracy: dict[str, list[list[float]]] = {}
    loss: dict[str, list[list[float]]] = {}
    for line in (OUTCOME.parent / "jobs" / "jobs-0of1.jsonl").read_text("utf-8").splitlines():
        found = json.loads(line)["value"]
        purpose = found.get("purpose")
        if purpose == "recall":
            by_length = [entry["accuracy"] for entry in found["recall"]]
            accuracy.setdefault(found["attn"], []).append(by_length)
        elif purpose == "text":
            blocks = found["by_position"]  # of 128 bytes
            near_and_far = [blocks[1], sum(blocks[8:]) / len(blocks[8:])]
            loss.setdefault(found["attn"], []).append(near_and_far)
    lines = []
    for runs in (accuracy, loss):
        for attn, values in runs.items():
            means = [sum(column) / len(column) for column in zip(*values, strict=True)]
            lines.append(f"| {attn} | {' | '.join(f'{mean:.3f}' for mean in means)} |")
    return lines


@pytest.mark.parametrize("part", ["time", "memory"])
def test_quoted_measurements_on_the_cpu_are_the_committed_ones(part: str) -> None:
    found = json.loads((TIMES / f"cpu-{part}.json").read_text(encoding="utf-8"))
    text = (SITE / "benchmarks.md").read_text(encoding="utf-8")
    lines = {"time": time_rows, "memory": memory_rows}[part](found)
    assert [line for line in lines if line not in text] == []


def time_rows(found: dict[str, Any]) -> list[str]:
    """Lines of the table of times: kind of logits, arm, milliseconds, ratios to SDPA and naive."""
    names = {"skip": "skipping", "full": "no skipping", "naive": "naive", "sdpa": "softmax, SDPA"}
    lines = []
    for logits in ("mixed", "random", "far"):
        ratios = found[logits]["ratios with 95 % intervals"]
        for arm, median in found[logits]["medians"].items():
            beside = (ratios.get(f"{arm} / sdpa"), ratios.get(f"naive / {arm}"))
            cells = ("" if r is None else "{:.2f} [{:.2f}, {:.2f}]".format(*r) for r in beside)
            lines.append(f"| {logits} | {names[arm]} | {median:.0f} | {' | '.join(cells)} |")
    return lines


def memory_rows(found: dict[str, Any]) -> list[str]:
    """Lines of the table of memory: MiB at every length, and the exponent."""
    lines = []
    for arm, name in (("skip", "skipping"), ("full", "no skipping")):
        grown = " | ".join(f"{size / 2**20:.0f}" for size in found[arm]["bytes"])
        lines.append(f"| {name} | {grown} | {found[arm]['exponent']:.2f} |")
    return lines
