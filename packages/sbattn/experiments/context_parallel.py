"""Attention over a sequence that is sharded across processes, against one process.

    torchrun --nproc-per-node 2 packages/sbattn/experiments/context_parallel.py --length 4096

Every rank makes the same whole sequence, keeps its shard, and attends with the others; rank 0
collects outputs and gradients, computes the same alone, and prints the largest difference.
Float64, on the CPU, over gloo; on GPUs only the device and the group's backend differ.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from torch import Tensor

from sbattn.context_parallel import context_parallel_attention
from sbattn.functional import stickbreaking_attention


def with_gradients(results: tuple[Tensor, Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Outputs, remainders, and the gradients of a loss that uses both."""
    out, rem = results
    loss = out.square().sum() + rem.sum()
    return [out.detach(), rem.detach(), *torch.autograd.grad(loss, inputs)]


def main() -> None:
    """Run as one rank, as `torchrun` starts it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=1024, help="positions of the sequence")
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=32)
    parser.add_argument("--init-method", default="env://", help="where the ranks meet")
    options = parser.parse_args()
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=options.init_method, rank=rank, world_size=size)

    generator = torch.Generator().manual_seed(0)
    shape = (1, options.heads, options.length, options.head_dim)
    whole = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)]

    shard = [x.tensor_split(size, dim=2)[rank].clone().requires_grad_() for x in whole]
    mine = with_gradients(context_parallel_attention(*shard), shard)

    everyone: list[list[Tensor]] | None = [[] for _ in range(size)] if rank == 0 else None
    dist.gather_object(mine, everyone)
    if everyone is not None:
        together = [torch.cat(parts, dim=2) for parts in zip(*everyone, strict=True)]
        leaves = [x.requires_grad_() for x in whole]
        alone = with_gradients(stickbreaking_attention(*leaves), leaves)
        worst = max((a - b).abs().max().item() for a, b in zip(together, alone, strict=True))
        print(f"{size} ranks, {options.length} positions")
        print(f"largest difference, forward and gradients: {worst:.1e}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
