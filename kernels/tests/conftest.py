"""Without a GPU the kernels run in Triton's interpreter, which must be asked for early."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # Read when Triton is imported and when a kernel is defined: no test module is imported yet.
    os.environ["TRITON_INTERPRET"] = "1"

# Tests are imported without a package (importlib mode): the modules they share need a path.
sys.path.insert(0, str(Path(__file__).parent))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if HAS_GPU:
        return
    skip = pytest.mark.skip(reason="needs a GPU")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture
def device() -> torch.device:
    """Where kernels run natively, or the CPU for the interpreter."""
    return torch.device("cuda" if HAS_GPU else "cpu")
