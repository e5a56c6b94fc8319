"""Every kernel compiles for the GPUs we name, in its registers, on their tensor cores."""

from __future__ import annotations

import pytest

from compiled import CASES, SHARED, Resources, compile_in_subprocess, other_compiler

pytestmark = other_compiler

TENSOR_CORE = {80: "HMMA", 90: "HGMMA"}
# Bytes that do not fit the registers; half the tile does not help.
SPILLED = {
    ("forward-fp32-64", 80): 16,
    ("forward-fp32-80", 80): 16,
    ("forward-fp32-128", 80): 16,
    ("forward-fp32-256", 80): 24,
}


def check(name: str, made: Resources, capability: int) -> None:
    assert made.spilled <= SPILLED.get((name, capability), 0), f"{name} on {capability}: {made}"
    assert made.registers <= 255
    assert made.shared <= SHARED[capability], f"{name} on sm_{capability}: {made.shared}"
    if "fp32" not in name:
        assert made.instructions.get(TENSOR_CORE[capability]), f"{name} on sm_{capability}"
    if name.startswith("forward") and capability == 90 and "fp32" not in name:
        # A wait for each matrix instruction: the compiler took a loop's end for divergent.
        assert made.instructions["WARPGROUP"] < made.instructions["HGMMA"], f"{name}: {made}"


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_without_spills_and_use_tensor_cores(capability: int) -> None:
    names = [name for name in CASES if name.endswith("bf16-128")]
    assert names
    for name, made in compile_in_subprocess(capability, *names).items():
        check(name, made, capability)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_all_variants_compile_with_no_spills_but_the_known(capability: int) -> None:
    made = compile_in_subprocess(capability)
    assert made.keys() == CASES.keys()
    for name, resources in made.items():
        check(name, resources, capability)
