"""Compile kernels for GPUs that are not here, and read what the compiler made of them.

Kernels that were defined for the interpreter cannot be compiled, so this runs as a program:
`python compiled.py 90 forward-bf16-128 …` (no names: all) prints one JSON object per case.
To add a kernel, write a function that returns its `Case` and give it a name in `CASES`.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import pytest

# What a program may use on compute capability 8.0 and 9.0, in bytes.
SHARED = {80: 163 * 1024, 90: 227 * 1024}
# Another compiler uses other registers.
other_compiler = pytest.mark.skipif(
    not version("triton").startswith("3.9."), reason="resources were counted with Triton 3.9"
)


@dataclass(frozen=True)
class Case:
    """One kernel, its arguments' types and its options.

    Attributes:
        kernel: the jitted function.
        types: Triton's names of the types of arguments that are neither `i32` nor constants:
            "*bf16", "*fp32", "fp32", ….
        constants: values of the arguments that are compiled in; None for an absent pointer.
        warps, stages: launch options.
        registers: the launch option `maxnreg`.
    """

    kernel: object
    types: Mapping[str, str]
    constants: Mapping[str, object]
    warps: int
    stages: int
    registers: int | None = None


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel uses: per thread registers and bytes spilled, bytes of shared memory.

    `instructions` counts machine instructions by their first name (HGMMA, HMMA, MUFU, SHFL, …) as
    they stand in the program, not as often as they run.
    """

    registers: int
    spilled: int
    shared: int
    instructions: dict[str, int]


def forward(dtype: str, head_dim: int, *, capability: int, packed: bool = False) -> Case:
    import torch

    from decapod_kernels.stickbreaking.configs import forward_config
    from decapod_kernels.stickbreaking.forward import _forward_kernel

    torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    config = forward_config(head_dim, torch_dtype, divmod(capability, 10), 16384)
    return Case(
        kernel=_forward_kernel,
        types={
            **dict.fromkeys(("Q", "K", "V", "Out"), f"*{dtype}"),
            **dict.fromkeys(("LogRem", "Edges"), "*fp32"),
            **dict.fromkeys(("Stop", "CuQ", "CuK", "KeyStart", "KeyEnd"), "*i32"),
            "c": "fp32",
            "log2_tol": "fp32",
        },
        constants={
            **dict.fromkeys(("KeyStart", "KeyEnd") if packed else ("CuQ", "CuK")),
            **dict.fromkeys(("DK", "DV"), head_dim),
            **dict.fromkeys(("BDK", "BDV"), padded(head_dim)),
            "BM": config.block_q,
            "BN": config.block_k,
            "TILES": config.superblock // config.block_k,
            "SAVE": True,
            "UPCAST": False,
        },
        warps=config.warps,
        stages=config.stages,
        registers=config.registers,
    )


CASES: dict[str, Callable[..., Case]] = {
    f"forward-{dtype}-{dim}": partial(forward, dtype, dim)
    for dtype in ("bf16", "fp16", "fp32")
    for dim in (64, 80, 128, 256)
}
CASES["forward-packed-bf16-128"] = partial(forward, "bf16", 128, packed=True)


def padded(size: int) -> int:
    """The power of two that a head size is padded to."""
    return max(16, 1 << (size - 1).bit_length())


def compile_kernel(case: Case, capability: int) -> Resources:
    """Compile for compute capability `capability` (80, 90); raises what the compiler raises."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    signature = {
        name: "constexpr" if name in case.constants else case.types.get(name, "i32")
        for name in names
    }
    # Pointers and strides are multiples of 16 in real calls, and the compiler is told so there.
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*")
        or (name.startswith("stride_") and signature[name] == "i32")
    }
    program = triton.compile(
        ASTSource(case.kernel, signature, constexprs=dict(case.constants), attrs=aligned),
        target=GPUTarget("cuda", capability, 32),
        options={
            "num_warps": case.warps,
            "num_stages": case.stages,
            "maxnreg": case.registers,
        },
    )
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(program.asm["cubin"])
        usage = _output(tools / "cuobjdump", "-res-usage", cubin)
        assembly = _output(tools / "nvdisasm", "-c", cubin)
    used = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    instructions = Counter(
        re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", assembly)
    )
    return Resources(
        registers=used["REG"],
        spilled=used["STACK"] + used["LOCAL"],
        shared=program.metadata.shared,
        instructions=dict(instructions),
    )


def _output(*command: object) -> str:
    return subprocess.run(
        [str(part) for part in command], check=True, capture_output=True, text=True
    ).stdout


def compile_in_subprocess(
    capability: int, *names: str, program: str = __file__
) -> dict[str, Resources]:
    """Resources of the named cases of a program, run by a process without the interpreter."""
    environment = dict(os.environ) | {"TRITON_DEFAULT_FP_FUSION": "1"}
    environment.pop("TRITON_INTERPRET", None)
    lines = subprocess.run(
        [sys.executable, program, str(capability), *names],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ).stdout.splitlines()
    results = [json.loads(line) for line in lines]
    return {result.pop("name"): Resources(**result) for result in results}


if __name__ == "__main__":
    target = int(sys.argv[1])
    for case_name in sys.argv[2:] or CASES:
        made = compile_kernel(CASES[case_name](capability=target), target)
        print(json.dumps({"name": case_name, **asdict(made)}), flush=True)
