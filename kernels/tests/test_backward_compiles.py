"""The backward kernels compile for the GPUs we name, in their registers, on their tensor cores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from compiled import Resources
from compiled_backward import CASES

# What a program may use on compute capability 8.0 and 9.0, in bytes.
SHARED = {80: 163 * 1024, 90: 227 * 1024}
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
    """Compiled by a process without the interpreter."""
    environment = dict(os.environ) | {"TRITON_DEFAULT_FP_FUSION": "1"}
    environment.pop("TRITON_INTERPRET", None)
    program = str(Path(__file__).with_name("compiled_backward.py"))
    lines = subprocess.run(
        [sys.executable, program, str(capability), *names],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ).stdout.splitlines()
    results = [json.loads(line) for line in lines]
    return {result.pop("name"): Resources(**result) for result in results}


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
