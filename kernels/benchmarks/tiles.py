"""Which tiles are fastest on this GPU: every candidate of the forward, then of the backward.

    python benchmarks/tiles.py --head-dim 128 --length 8192     # a GPU: results as JSON
    python benchmarks/tiles.py --dry-run                        # no GPU: one tiny candidate each

The defaults of `decapod_kernels.stickbreaking.configs` come from what the compiler says about the
kernels; this is how to replace that by times. Logits are standard normal with the mean `--mean`:
0 is a model at initialisation, -12 lets nothing be skipped.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import platform
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--mean", type=float, default=-12.0, help="of the logits")
    parser.add_argument("--dry-run", action="store_true", help="tiny, interpreted, nothing kept")
    return parser.parse_args()


def inputs(options: argparse.Namespace, device: str) -> tuple[torch.Tensor, ...]:
    shape = (options.batch, options.heads, options.length, options.head_dim)
    torch.manual_seed(0)
    q, k, v, d_out = (torch.randn(shape, device=device) for _ in range(4))
    q[..., 0] = options.mean * options.head_dim**0.5
    k[..., 0] = 1
    return tuple(x.to(getattr(torch, options.dtype)) for x in (q, k, v, d_out))


def forward_candidates(default: Any) -> Iterator[Any]:
    for block_q, block_k, warps, stages in itertools.product(
        (64, 128), (32, 64, 128), (4, 8), (2, 3, 4)
    ):
        yield replace(default, block_q=block_q, block_k=block_k, warps=warps, stages=stages)


def backward_candidates(default: Any) -> Iterator[Any]:
    for rows, keys, block_k, warps, stages in itertools.product(
        (32, 64, 128), (32, 64), (32, 64, 128), (4, 8), (1, 2, 3)
    ):
        if rows <= default.forward.block_q and block_k <= default.forward.block_k:
            yield replace(
                default,
                rows_block=rows,
                keys_block=keys,
                block_k=block_k,
                rows_warps=warps,
                rows_stages=stages,
                keys_warps=warps,
                keys_stages=stages,
            )


def sweep(candidates: list[Any], work: Callable[[Any], object], default: Any) -> list[Any]:
    """Time each candidate; those that do not fit on the device say so and have no time."""
    from triton import OutOfResources
    from triton.testing import do_bench

    found = []
    for number, config in enumerate(candidates, 1):
        entry: dict[str, Any] = {"config": asdict(config), "default": config == default}
        try:
            entry["milliseconds"] = do_bench(lambda c=config: work(c), return_mode="median")
        except OutOfResources as error:
            entry["refused"] = str(error)
        found.append(entry)
        shown = entry.get("milliseconds", math.nan)
        print(f"{number:3d}/{len(candidates)}  {shown:9.3f} ms  {config}", flush=True)
    return sorted(found, key=lambda e: e.get("milliseconds", math.inf))


def main() -> None:
    options = parse()
    dry = options.dry_run or not torch.cuda.is_available()
    if dry:
        # Read when Triton is imported, so before the kernels are.
        os.environ["TRITON_INTERPRET"] = "1"
        options.batch, options.heads, options.length, options.head_dim = 1, 1, 64, 16
        options.dtype = "float32"
        print("dry run: one tiny candidate through Triton's interpreter; no result is kept")
    from decapod_kernels.stickbreaking.backward import backward
    from decapod_kernels.stickbreaking.backward_plan import backward_config
    from decapod_kernels.stickbreaking.configs import forward_config
    from decapod_kernels.stickbreaking.forward import forward

    device = "cpu" if dry else "cuda"
    q, k, v, d_out = inputs(options, device)
    scale = options.head_dim**-0.5
    capability = None if dry else torch.cuda.get_device_capability()
    processors = 1 if dry else torch.cuda.get_device_properties(0).multi_processor_count
    first = forward_config(options.head_dim, q.dtype, capability, options.length)
    second = backward_config(options.head_dim, q.dtype, capability, first, processors=processors)
    done = forward(q, k, v, scale=scale, save=True, config=first)

    def run_forward(config: Any) -> object:
        return forward(q, k, v, scale=scale, save=True, config=config)

    def run_backward(config: Any) -> object:
        return backward(
            q, k, v, d_out, None, done.edges, done.stop, scale=scale, config=config
        )  # fmt: skip

    if dry:
        run_forward(first)
        run_backward(second)
        print("dry run passed")
        return
    result = {
        "command": vars(options),
        "gpu": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "commit": subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=RESULTS, capture_output=True, text=True, check=True
        ).stdout.strip(),
        "forward": sweep(list(forward_candidates(first)), run_forward, first),
        "backward": sweep(list(backward_candidates(second)), run_backward, second),
    }
    gpu = str(result["gpu"]).lower().replace(" ", "-")
    path = RESULTS / f"{gpu}-tiles-{options.head_dim}-{options.dtype}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
