"""What the integration tests know of the packages: their installed metadata, nothing else."""

from __future__ import annotations

from importlib.metadata import Distribution, distributions

import pytest


def ours() -> list[Distribution]:
    """Installed distributions of this repository, told by the author field they share."""
    return sorted(
        (d for d in distributions() if d.metadata["Author"] == "The Decapod authors"),
        key=lambda d: d.metadata["Name"],
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "distribution" in metafunc.fixturenames:
        found = ours()
        metafunc.parametrize("distribution", found, ids=[d.metadata["Name"] for d in found])
