"""The backward kernels as `compiled.py` compiles them; run as a program: `… 90 rows-bf16-128 …`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

from compiled import Case, compile_kernel, padded


def backward(
    owner: str,
    dtype: str,
    dim: int,
    *,
    skip: bool = False,
    partial_sums: bool = False,
    capability: int,
) -> Case:
    """The kernel of the `rows` or of the `keys`, with the tiles chosen for the device."""
    import torch

    from decapod_kernels.stickbreaking.backward_keys import keys_kernel
    from decapod_kernels.stickbreaking.backward_plan import backward_config
    from decapod_kernels.stickbreaking.backward_rows import rows_kernel
    from decapod_kernels.stickbreaking.configs import forward_config

    torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    device = divmod(capability, 10)
    tiles = forward_config(dim, torch_dtype, device, 16384)
    config = backward_config(dim, torch_dtype, device, tiles)
    rows = owner == "rows"
    sums = "*fp32" if partial_sums else f"*{dtype}"
    return Case(
        kernel=rows_kernel if rows else keys_kernel,
        types={
            **dict.fromkeys(("Q", "K", "V", "DO"), f"*{dtype}"),
            **dict.fromkeys(("DKeys", "DValues"), sums),
            **dict.fromkeys(("DQ", "Far", "Edges", "EdgeAcc", "EdgeFar"), "*fp32"),
            "Stop": "*i32",
            **dict.fromkeys(("scale", "scale_log2"), "fp32"),
        },
        constants={
            **dict.fromkeys(("CuQ", "CuK", "KeyStart", "KeyEnd")),
            "GROUP": 1,
            "ATTEND_CURRENT": 0,
            "DK": dim,
            "DV": dim,
            "BDK": padded(dim),
            "BDV": padded(dim),
            "BM": config.rows_block if rows else config.keys_block,
            "BN": config.block_k,
            "TILES": tiles.superblock // config.block_k,
            "STOP_ROWS": tiles.block_q,
            "UPCAST": False,
            **({"far_l": 1} if rows else {"BS": 64, "SKIP": skip, "PARTIAL": partial_sums}),
        },
        warps=config.rows_warps if rows else config.keys_warps,
        stages=config.rows_stages if rows else config.keys_stages,
    )


CASES: dict[str, Callable[..., Case]] = {
    **{
        f"{owner}-{dtype}-{dim}": partial(backward, owner, dtype, dim)
        for owner in ("rows", "keys")
        for dtype in ("bf16", "fp16", "fp32")
        for dim in (64, 128, 256)
    },
    "keys-bf16-128-skip": partial(backward, "keys", "bf16", 128, skip=True),
    "keys-bf16-128-partial": partial(backward, "keys", "bf16", 128, partial_sums=True),
}


if __name__ == "__main__":
    target = int(sys.argv[1])
    for case_name in sys.argv[2:] or CASES:
        made = compile_kernel(CASES[case_name](capability=target), target)
        print(json.dumps({"name": case_name, **asdict(made)}), flush=True)
