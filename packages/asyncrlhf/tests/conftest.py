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
def replay() -> Any:
    """The module `replay_run.py`, which is also a script."""
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    name = "asyncrlhf_replay_run"
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("replay_run.py"))
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
