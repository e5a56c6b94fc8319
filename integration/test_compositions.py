"""Each composition in a size of seconds: it runs from wheels, and every claim is decided."""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path

import pytest

import compositions
from decapod.claims import Reproduction
from decapod.reproductions import reproduce

NAMES = sorted(
    entry.name
    for entry in entry_points(group="decapod.reproductions")
    if entry.value.startswith("compositions.")
)


def composed(name: str) -> Reproduction:
    (entry,) = entry_points(group="decapod.reproductions", name=name)
    found = entry.load()
    assert isinstance(found, Reproduction)
    return found


def test_compositions_are_installed_as_a_wheel() -> None:
    assert "site-packages" in Path(compositions.__file__).parts
    assert NAMES


@pytest.mark.integration
@pytest.mark.parametrize("name", NAMES)
def test_a_composition_runs_and_decides_its_claims(name: str, tmp_path: Path) -> None:
    outcome = reproduce(composed(name), "quick", tmp_path, n_jobs=2, progress=False)
    assert outcome.error == ""
    assert outcome.jobs_missing == 0
    assert all(claim.verdict and claim.evidence for claim in outcome.claims)
    assert all(
        set(claim.evidence.arms) <= set(claim.arms) for claim in outcome.claims if claim.evidence
    )
    assert outcome.figures
