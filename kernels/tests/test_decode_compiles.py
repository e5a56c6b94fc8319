"""The decode kernels compile for the GPUs we name, in their registers, and load ahead of use."""

from __future__ import annotations

import pytest

import compiled_decode
from compiled import SHARED, Resources, compile_in_subprocess, other_compiler
from compiled_decode import CASES

pytestmark = other_compiler


def compile_cases(capability: int, *names: str) -> dict[str, Resources]:
    return compile_in_subprocess(capability, *names, program=compiled_decode.__file__)


def check(name: str, made: Resources, capability: int) -> None:
    assert made.spilled == 0, f"{name} on sm_{capability}: {made}"
    assert made.shared <= SHARED[capability], f"{name} on sm_{capability}: {made.shared}"
    if name.startswith("segment"):
        # Asynchronous copies: the next tile's keys and values come while this one is worked on.
        assert made.instructions.get("LDGSTS"), f"{name} on sm_{capability}"
        if "fp32" not in name:
            assert made.instructions.get("HMMA"), f"{name} on sm_{capability}"


@pytest.mark.parametrize("capability", [80, 90])
def test_decode_kernels_compile_without_spills_and_load_ahead(capability: int) -> None:
    names = ["segment-bf16-128", "segment-bf16-128-contiguous", "merge-bf16-128"]
    made = compile_cases(capability, *names)
    assert list(made) == names
    for name, resources in made.items():
        check(name, resources, capability)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_all_decode_variants_compile_without_spills(capability: int) -> None:
    made = compile_cases(capability)
    assert made.keys() == CASES.keys()
    for name, resources in made.items():
        check(name, resources, capability)
