"""Queries, keys and values to time attention on.

How fast stick-breaking attention is depends on its logits: they decide how far a row looks before
its stick is used up. So a timing names them:

- `random`: `z` is standard normal. `beta` is near one half, and about 25 keys use up the stick:
  what a model looks like at initialisation, and the best case of skipping.
- `mixed`: `z` is normal with standard deviation 1 around a mean of its own per head, evenly spaced
  from -1 to -5. From one head to the next, rows then reach from tens of keys to thousands, as
  heads of trained models differ, too.
- `far`: as `mixed` with the mean -12 for every head. Nothing is ever used up: the worst case.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from sbattn.errors import InvalidInputError

Logits = Literal["random", "mixed", "far"]


@dataclass(frozen=True)
class Problem:
    """One attention problem.

    Attributes:
        batch: sequences.
        heads: query heads.
        kv_heads: key and value heads, a divisor of `heads`.
        length: queries, and keys.
        head_dim: of queries, keys and values.
        dtype: of all inputs: `float32`, `bfloat16`, `float16` or `float64`.
        logits: `random`, `mixed` or `far`; see the module.
        seed: of the random numbers.
    """

    batch: int = 1
    heads: int = 8
    kv_heads: int = 8
    length: int = 4096
    head_dim: int = 64
    dtype: str = "float32"
    logits: Logits = "mixed"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch", "heads", "kv_heads", "length", "head_dim"):
            if getattr(self, name) < 1:
                raise InvalidInputError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.heads % self.kv_heads:
            raise InvalidInputError(
                f"kv_heads: expected a divisor of heads = {self.heads}, got {self.kv_heads}"
            )
        if self.dtype not in ("float16", "bfloat16", "float32", "float64"):
            raise InvalidInputError(f"dtype: expected a floating type by name, got {self.dtype!r}")
        if self.logits not in get_args(Logits):
            raise InvalidInputError(
                f"logits: expected one of {', '.join(get_args(Logits))}, got {self.logits!r}"
            )

    @property
    def causal_flops(self) -> int:
        """Of one matrix product over the visible half of the logits."""
        return self.batch * self.heads * self.length**2 * self.head_dim

    def to_dict(self) -> dict[str, Any]:
        """The fields, for a record."""
        return dict(vars(self))


def make_inputs(problem: Problem, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`q`, `k`, `v` and the gradient of the output, `[B, H, L, D]`, for the default scale.

    Made in float32 on the CPU, so that the same problem is the same on every device. The mean of
    the logits is carried by the first feature: 1 in every key, the same number in all queries of
    a head.
    """
    generator = torch.Generator().manual_seed(problem.seed)

    def normal(heads: int) -> Tensor:
        shape = (problem.batch, heads, problem.length, problem.head_dim)
        return torch.randn(shape, generator=generator)

    q, k = normal(problem.heads), normal(problem.kv_heads)
    v, d_out = normal(problem.kv_heads), normal(problem.heads)
    if problem.logits != "random":
        means = torch.full((problem.heads,), -12.0)
        if problem.logits == "mixed":
            means = torch.linspace(-1, -5, problem.heads)
        q[..., 0] = means[:, None] * problem.head_dim**0.5
        k[..., 0] = 1
    dtype = getattr(torch, problem.dtype)
    q, k, v, d_out = (x.to(device=device, dtype=dtype) for x in (q, k, v, d_out))
    return q, k, v, d_out
