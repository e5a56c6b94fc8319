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
# Bytes that do not fit the registers, all of them outside the loops over tiles but the last two's
# (float32 beyond a head size of 128). NOTES.md says what was tried.
SPILLED = {
    ("rows-bf16-128", 90): 40,
    ("rows-fp16-128", 90): 40,
    ("keys-bf16-128-partial", 80): 16,
    ("rows-fp32-256", 80): 512,
    ("rows-fp32-256", 90): 512,
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
        fast = capability == 90 and "256" not in name
        assert made.instructions.get("HGMMA" if fast else "HMMA"), f"{name} on sm_{capability}"
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
