"""Run by hand in an environment that holds this package alone: `python smoke.py`."""

import os

# Read when Triton is imported, so before the kernels are.
os.environ["TRITON_INTERPRET"] = "1"

import torch

import decapod_kernels
from decapod_kernels.stickbreaking.forward import forward


def definition(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Outputs of one head `[L, D]`, in float64."""
    q, k, v = (x.double() for x in (q, k, v))
    take = torch.sigmoid(0.25 * q @ k.T).tril(-1)
    left = (1 - take).flip(1).cumprod(1).flip(1) / (1 - take)
    return (take * left) @ v


def main() -> None:
    """A tiny forward pass through the interpreter, against the definition."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 48, 16, generator=generator) for _ in range(3))
    found = forward(q, k, v, scale=0.25)
    error = float((found.out[0, 0] - definition(q[0, 0], k[0, 0], v[0, 0])).abs().max())
    assert error < 2e-5, error
    print(f"decapod-kernels {decapod_kernels.__version__}: largest error {error:.0e}")


if __name__ == "__main__":
    main()
