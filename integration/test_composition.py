"""The packages together, from their wheels: a sweep, its score, a claim, and the report."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

import hpreliability as hpr
from decapod.claims import (
    Above,
    Claim,
    Evidence,
    Findings,
    Paper,
    Profile,
    Reproduction,
)
from decapod.jobs import Job, JobResult, run_jobs
from decapod.report import build
from decapod.reproductions import reproduce
from hpreliability.sweep import Sweep, SweepSpec


def train(config: Mapping[str, Any], task: str, seed: int, budget: int) -> float:
    """A task whose best rate is 1 for `plain` and 3 for `twisted`, seen through noise."""
    import numpy as np

    best = {"plain": 1.0, "twisted": 3.0, "flat": 2.0}[task]
    noise = np.random.default_rng(seed).normal(scale=0.1)
    return -abs(config["rate"] - best) * (task != "flat") * budget + float(noise)


SPEC = SweepSpec(
    name="composed",
    base={"rate": 2},
    hyperparameters={"rate": [1, 2, 3]},
    contexts={"task": ["plain", "twisted", "flat"]},
    seeds=4,
    budgets=1,
)


def claims_of_a_downstream_project() -> Reproduction:
    sweep = Sweep(SPEC)

    def jobs(profile: Profile) -> Sequence[Job]:
        return sweep.jobs(train)

    def conclude(profile: Profile, results: Sequence[JobResult]) -> Findings:
        rows = hpr.thc_score(
            sweep.tabulate(results).scores("rate", over="task").scores,
            uncertainty="bootstrap",
            null="permutation",
        )
        assert rows.null is not None
        assert rows.uncertainty is not None
        scale = 1 - rows.null.mean
        return Findings(
            evidence={
                "rate-depends-on-task": Evidence(
                    effect=rows.null.calibrated,
                    low=(rows.uncertainty.low - rows.null.mean) / scale,
                    high=(rows.uncertainty.high - rows.null.mean) / scale,
                    n=4,
                    unit="seeds",
                )
            }
        )

    return Reproduction(
        name="downstream",
        paper=Paper(
            "A downstream project", "Its authors", "Nowhere yet", 2026, "https://example.org"
        ),
        claims=(
            Claim(
                id="rate-depends-on-task",
                statement="Which rate is best depends on the task.",
                source="README",
                arms=(),
                metric="calibrated THC over tasks",
                rule=Above(0.0),
            ),
        ),
        jobs=jobs,
        conclude=conclude,
    )


@pytest.mark.integration
@pytest.mark.parametrize("executor", ["local", pytest.param("ray", marks=pytest.mark.ray)])
def test_a_sweep_becomes_a_claim_and_a_report(tmp_path: Path, executor: str) -> None:
    outcome = reproduce(
        claims_of_a_downstream_project(), "quick", tmp_path, executor, 2, progress=False
    )
    assert outcome.error == ""
    assert [claim.verdict for claim in outcome.claims] == ["shown"]
    build(tmp_path)
    assert "Which rate is best depends on the task." in (tmp_path / "report.html").read_text()


@pytest.mark.integration
def test_a_sweep_scores_the_same_whoever_runs_its_jobs(tmp_path: Path) -> None:
    sweep = Sweep(SPEC)
    sweep.run(train, n_jobs=2, directory=tmp_path / "sweep", progress=False)
    run_jobs(sweep.jobs(train), tmp_path / "jobs", n_jobs=2, progress=False)
    by_sweep = hpr.thc(sweep.results(directory=tmp_path / "sweep"), over="task")
    by_jobs = hpr.thc(sweep.results(directory=tmp_path / "jobs"), over="task")
    assert by_sweep.frame.equals(by_jobs.frame)


@pytest.mark.integration
def test_the_command_line_tools_are_installed_and_agree_on_what_there_is() -> None:
    tools = Path(sys.executable).parent
    listed = subprocess.run(
        [tools / "decapod", "list"], check=True, capture_output=True, text=True
    ).stdout
    assert "hpreliability" in listed
    rebuilt = subprocess.run(
        [tools / "hpreliability", "reproduce", "--permutations", "20"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert "41" in rebuilt


@pytest.mark.integration
def test_shards_made_apart_and_copied_together_conclude_without_running_again(
    tmp_path: Path,
) -> None:
    reproduction = claims_of_a_downstream_project()
    whole = tmp_path / "whole"
    for index in range(2):
        part = tmp_path / f"machine{index}"
        reproduce(reproduction, "quick", part, shard=(index, 2), progress=False)
        for file in (part / "downstream" / "jobs").glob("*.jsonl"):
            target = whole / "downstream" / "jobs" / file.name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    outcome = reproduce(reproduction, "quick", whole, progress=False)
    assert outcome.jobs_reused == outcome.jobs_done == 36
    saved = json.loads((whole / "downstream" / "outcome.json").read_text())
    assert saved["status"] == "concluded"
