from __future__ import annotations

from dataclasses import replace
from importlib.metadata import entry_points
from typing import Any

import numpy as np
import pytest

pytest.importorskip("decapod.claims")
pytest.importorskip("matplotlib")
pytest.importorskip("transformers")

from decapod.claims import Findings
from decapod.jobs import JobResult
from gsm_compose import reproduce
from gsm_compose.learning.findings import SCALES
from gsm_compose.recovery import QUANTITIES, REASONERS, recover
from gsm_compose.reproduce import CLAIMS, REPRODUCTION, conclude, jobs, recovery_columns


@pytest.fixture(scope="module")
def findings() -> Findings:
    """The quick profile, cut down until it takes seconds: every job is real."""
    with pytest.MonkeyPatch.context() as patch:
        learning = replace(SCALES["quick"], steps=4, pairs=12)
        patch.setitem(reproduce._SCALES, "quick", reproduce._Scale(2, 20, learning))
        patch.setattr(reproduce, "_CHUNK", 10)
        patch.setattr(reproduce, "_ITEMS", 40)
        results = [
            JobResult(job.key, job.label, job.arguments, "done", job.function(**job.arguments))
            for job in jobs("quick")
        ]
        return conclude("quick", results)


def test_the_entry_point_leads_to_the_reproduction() -> None:
    (entry,) = [e for e in entry_points(group="decapod.reproductions") if e.name == "gsm-compose"]
    assert entry.load() is REPRODUCTION


def test_every_claim_gets_evidence_and_nothing_else_does(findings: Findings) -> None:
    assert set(findings.evidence) == {claim.id for claim in CLAIMS}


def test_facts_come_out_of_the_jobs(findings: Findings) -> None:
    assert findings.evidence["annotations"].effect == 4282
    assert findings.evidence["figure-2"].effect == 48
    assert findings.evidence["labels"].effect == findings.evidence["labels"].n == 40


def test_an_item_with_a_fault_is_not_counted_as_whole() -> None:
    built: Any = {
        "composed": [1, 2, 3],
        "faults": {"a": ["wrong"]},
        "executed": 3,
        "settings": {"max_reuse": 1},
    }
    assert reproduce._labels(built).effect == 2


def test_figures_are_drawn_and_tables_have_rows(findings: Findings) -> None:
    assert len(findings.figures) == 4
    assert all(figure.svg.startswith("<svg") for figure in findings.figures)
    assert all(table.rows for table in findings.tables)


def test_draws_of_two_jobs_join_to_those_of_one() -> None:
    whole = recovery_columns([recover("weak", 0, 8)])
    parts = recovery_columns([recover("weak", 0, 5), recover("weak", 5, 3)])
    for name in QUANTITIES:
        for key in ("estimates", "low", "high"):
            np.testing.assert_array_equal(whole["weak"][name][key], parts["weak"][name][key])


@pytest.mark.parametrize("reasoner", REASONERS)
def test_known_gaps_are_recovered_without_bias(reasoner: str) -> None:
    found = recovery_columns([recover(reasoner, 0, 200)])[reasoner]
    for name in QUANTITIES:
        assert abs(found[name]["estimates"].mean() - found[name]["truth"]) < 0.005
    share = np.mean(
        (found["delta"]["low"] <= found["delta"]["truth"])
        & (found["delta"]["truth"] <= found["delta"]["high"])
    )
    assert 0.92 <= share <= 0.98


def test_jobs_of_a_profile_differ() -> None:
    for profile in ("quick", "standard"):
        keys = [job.key for job in jobs(profile)]  # type: ignore[arg-type]
        assert len(set(keys)) == len(keys)
