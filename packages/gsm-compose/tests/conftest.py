from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from gsm_compose.benchmark import Benchmark
    from gsm_compose.items import Item

# A slow machine must not fail a property, so there is no deadline per example.
settings.register_profile("gsm_compose", deadline=None, max_examples=60)
settings.load_profile("gsm_compose")


@pytest.fixture(scope="session")
def benchmark() -> Benchmark:
    """Three items written by hand."""
    path = Path(__file__).with_name("hand_made.py")
    spec = importlib.util.spec_from_file_location("gsm_compose_hand_made", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: Benchmark = module.BENCHMARK
    return found


@pytest.fixture
def items(benchmark: Benchmark) -> tuple[Item, ...]:
    return benchmark.items
