"""What several test files share."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_numeric_thread() -> None:
    """As every process of a run on a CPU has; sums depend on their number."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny() -> Any:
    """The module `tiny_runs.py`, which scripts import too."""
    for package in ("accelerate", "decapod", "transformers"):
        pytest.importorskip(package)
    path = Path(__file__).with_name("tiny_runs.py")
    spec = importlib.util.spec_from_file_location("vineppo_tiny_runs", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
