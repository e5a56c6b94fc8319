"""One rank of the context-parallel tests: every case on its shards, results to a file.

Usage: context_parallel_worker.py FOLDER, with RANK and WORLD_SIZE in the environment.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sbattn.context_parallel import context_parallel_attention
from sbattn.errors import InvalidInputError

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "never skipping": {"skip_tol": 0},
    "attend current": {"attend_current": True},
    "window": {"window": 9},
    "grouped heads": {"enable_gqa": True},
    "short sticks": {"scale": 3.0},
    "naive": {"backend": "naive"},
}


def make_inputs(heads: int) -> dict[str, Tensor]:
    """The whole sequence, and a gradient for both results; the same in every process."""
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return {
        "q": draw(2, 2, 23, 4),
        "k": draw(2, heads, 23, 4),
        "v": draw(2, heads, 23, 3),
        "d_out": draw(2, 2, 23, 3),
        "d_rem": draw(2, 2, 23),
    }


def bounds(size: int) -> list[int]:
    """Where uneven shards of 23 positions begin and end."""
    return [0, 13, 23] if size == 2 else [0, 5, 16, 23]


def run(rank: int, size: int) -> dict[str, dict[str, Tensor]]:
    results = {}
    start, end = bounds(size)[rank : rank + 2]
    for name, options in CASES.items():
        whole = make_inputs(1 if options.get("enable_gqa") else 2)
        shard = {key: x[:, :, start:end].clone() for key, x in whole.items()}
        leaves = [shard[key].requires_grad_() for key in ("q", "k", "v")]
        out, rem = context_parallel_attention(*leaves, **options)
        torch.autograd.backward((out, rem), (shard["d_out"], shard["d_rem"]))
        results[name] = {"out": out.detach(), "rem": rem.detach()}
        results[name] |= {f"d_{key}": shard[key].grad for key in ("q", "k", "v")}
    return results


def far_poison(rank: int, size: int) -> Tensor:
    """A NaN in the first shard, behind keys that take every stick whole: is it ever looked at?"""
    start, end = bounds(size)[rank : rank + 2]
    q = torch.ones(1, 1, end - start, 2, dtype=torch.float64)
    v = torch.ones(1, 1, end - start, 2, dtype=torch.float64)
    if rank == 0:
        v[:] = torch.nan
    out, _ = context_parallel_attention(q, 40.0 * q, v, attend_current=True)
    return out


def under_autocast(rank: int, size: int) -> dict[str, Tensor]:
    """The forward pass under autocast, the backward pass after it, as training does."""
    start, end = bounds(size)[rank : rank + 2]
    whole = make_inputs(2)
    leaves = [whole[key][:, :, start:end].float().requires_grad_() for key in ("q", "k", "v")]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = context_parallel_attention(*leaves)
    out.float().backward(whole["d_out"][:, :, start:end].float())
    gradients = {f"d_{key}": x.grad for key, x in zip("qkv", leaves, strict=True)}
    return {"out": out.detach(), **gradients}


def misfit(rank: int) -> str:
    """Shards with different head dimensions: the same error on every rank, and no deadlock."""
    x = torch.ones(1, 1, 4, 2 + rank)
    try:
        context_parallel_attention(x, x, x)
    except InvalidInputError as error:
        return str(error)
    return ""


def main() -> None:
    folder = Path(sys.argv[1])
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=size
    )
    found = {
        "cases": run(rank, size),
        "poison": far_poison(rank, size),
        "autocast": under_autocast(rank, size),
        "misfit": misfit(rank),
    }
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
