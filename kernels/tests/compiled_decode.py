"""The decode kernels as `compiled.py` compiles them; run as a program: `… 90 segment-bf16-128 …`.

Their cases stand apart because a block of 16 rows is too short for the tensor-core instructions
of compute capability 9.0: both targets use those of 8.0.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

from compiled import Case, compile_kernel, padded


def segment(
    dtype: str,
    key_dim: int,
    value_dim: int | None = None,
    *,
    paged: bool = True,
    full: bool = False,
) -> Case:
    """The kernel of a segment. `full`: with as many rows as a block may have, else with 16."""
    import torch

    from decapod_kernels.stickbreaking.decode import segment_kernel
    from decapod_kernels.stickbreaking.decode_plan import decode_config

    value_dim = key_dim if value_dim is None else value_dim
    torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    config = decode_config(max(key_dim, value_dim), torch_dtype)
    return Case(
        kernel=segment_kernel,
        types={
            **dict.fromkeys(("Q", "K", "V"), f"*{dtype}"),
            **dict.fromkeys(("TABLE", "LENGTHS"), "*i32"),
            **dict.fromkeys(("RHO", "PART"), "*fp32"),
            "scale": "fp32",
            "stop": "fp32",
        },
        constants={
            **({} if paged else {"TABLE": None}),
            "ATTEND_CURRENT": 0,
            "DK": key_dim,
            "DV": value_dim,
            "BM": config.block_q if full else 16,
            "BN": config.block_k,
            "BDK": padded(key_dim),
            "BDV": padded(value_dim),
            "BS": 32,
            "STEP": config.step,
            "STAGES": config.stages,
            "UPCAST": False,
        },
        warps=config.warps,
        stages=config.stages,
    )


def merge(dtype: str, value_dim: int) -> Case:
    from decapod_kernels.stickbreaking.decode import merge_kernel

    return Case(
        kernel=merge_kernel,
        types={"RHO": "*fp32", "PART": "*fp32", "OUT": f"*{dtype}", "REM": "*fp32", "tol": "fp32"},
        constants={"DV": value_dim, "BDV": padded(value_dim), "BS": 32},
        warps=4,
        stages=3,
    )


CASES: dict[str, Callable[[], Case]] = {
    **{
        f"segment-{dtype}-{dim}{'-full' if full else ''}": partial(segment, dtype, dim, full=full)
        for dtype in ("bf16", "fp16", "fp32")
        for dim in (64, 128, 256)
        for full in (False, True)
        if not (full and dtype == "fp32")  # its blocks are never longer than 16 rows
        if dtype != "fp16" or dim == 128
    },
    "segment-bf16-128-contiguous": partial(segment, "bf16", 128, paged=False),
    "segment-fp32-128-contiguous": partial(segment, "fp32", 128, paged=False),
    "segment-bf16-100-72": partial(segment, "bf16", 100, 72),
    "merge-bf16-128": partial(merge, "bf16", 128),
    "merge-fp32-256": partial(merge, "fp32", 256),
}

if __name__ == "__main__":
    target = int(sys.argv[1])
    for name in sys.argv[2:] or CASES:
        print(json.dumps({"name": name, **asdict(compile_kernel(CASES[name](), target))}))
