"""Where no GPU is, the kernels run in Triton's interpreter, which must be set before they load."""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@dataclass(frozen=True)
class BackendCase:
    """A backend, where it runs here, and how exact it is there."""

    name: str
    dtype: torch.dtype
    device: str
    tolerance: float

    def randn(self, *shape: int, seed: int = 0) -> Tensor:
        """Normal numbers; the same on every device and in every precision."""
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
        return drawn.to(self.device, self.dtype)

    def close(self, found: Tensor, expected: Tensor) -> None:
        """Assert that two tensors agree as far as this backend's precision goes."""
        torch.testing.assert_close(
            found.double(), expected.double(), rtol=self.tolerance, atol=self.tolerance
        )


@pytest.fixture(params=["naive", "chunked", "triton"])
def backend(request: pytest.FixtureRequest) -> BackendCase:
    """Every backend that this machine can run; Triton in the interpreter if there is no GPU."""
    if request.param != "triton":
        return BackendCase(request.param, torch.float64, "cpu", 1e-10)
    pytest.importorskip("decapod_kernels")
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return BackendCase("triton", torch.float32, device, 2e-5)
