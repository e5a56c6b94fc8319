"""The backward kernels compile for the GPUs we name, in their registers, on their tensor cores."""

from __future__ import annotations

import pytest

import compiled_backward
from compiled import SHARED, Resources, compile_in_subprocess, other_compiler
from compiled_backward import CASES

pytestmark = other_compiler

# Bytes that do not fit the registers, and are not touched often: NOTES.md has what was tried.
SPILLED = {
    ("rows-bf16-64", 90): 16,
    ("rows-fp16-64", 90): 16,
    ("rows-bf16-128", 90): 16,
    ("rows-fp16-128", 90): 16,
    ("rows-bf16-256", 90): 328,
    ("rows-fp16-256", 90): 328,
    ("keys-bf16-128", 90): 48,
    ("keys-fp16-128", 90): 48,
    ("keys-bf16-128-skip", 90): 224,
    ("keys-bf16-128-partial", 90): 176,
    ("keys-bf16-256", 90): 136,
    ("keys-fp16-256", 90): 136,
    ("rows-bf16-128", 80): 264,
    ("rows-fp16-128", 80): 264,
    ("keys-bf16-128", 80): 16,
    ("keys-fp16-128", 80): 16,
    ("keys-bf16-128-skip", 80): 32,
    ("keys-bf16-128-partial", 80): 176,
    ("rows-fp32-128", 90): 8,
    ("rows-fp32-256", 80): 392,
    ("rows-fp32-256", 90): 392,
}


def compile_cases(capability: int, *names: str) -> dict[str, Resources]:
    return compile_in_subprocess(capability, *names, program=compiled_backward.__file__)


def check(name: str, made: Resources, capability: int) -> None:
    assert made.spilled <= SPILLED.get((name, capability), 0), f"{name} on {capability}: {made}"
    assert made.shared <= SHARED[capability], f"{name} on sm_{capability}: {made.shared}"
    if "fp32" not in name:
        tensor_core = "HGMMA" if capability == 90 else "HMMA"
        assert made.instructions.get(tensor_core), f"{name} on sm_{capability}"
        # Rounding to bfloat16 and back would go through the special-function unit.
        assert not made.instructions.get("F2F"), f"{name} on sm_{capability}"


@pytest.mark.parametrize("capability", [80, 90])
def test_backward_kernels_compile_in_registers(capability: int) -> None:
    names = ["rows-bf16-128", "keys-bf16-128"]
    made = compile_cases(capability, *names)
    assert list(made) == names
    for name, resources in made.items():
        check(name, resources, capability)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_all_backward_variants_compile(capability: int) -> None:
    made = compile_cases(capability)
    assert made.keys() == CASES.keys()
    for name, resources in made.items():
        check(name, resources, capability)
