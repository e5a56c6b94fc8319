"""The decode kernels, run through the public function, against the definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sbattn.decode import decode_step, stickbreaking_decode
from sbattn.errors import UnsupportedError

pytest.importorskip("decapod_kernels")
pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def problem(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, 2, 4, 24, generator=generator)
    k = torch.randn(3, 160, 2, 24, generator=generator)
    v = torch.randn(3, 160, 2, 16, generator=generator)
    q[..., 0], k[..., 0] = 1.0, -4.0 * 24**0.5
    tensors = {"q": q.to(dtype), "k_cache": k.to(dtype), "v_cache": v.to(dtype)}
    tensors["cache_seqlens"] = torch.tensor([160, 0, 37], dtype=torch.int32)
    return {name: x.to(DEVICE) for name, x in tensors.items()}


def close(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], tolerance: float) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.device.type == DEVICE.type
        torch.testing.assert_close(a.cpu().double(), b.double(), rtol=tolerance, atol=tolerance)


def definition(inputs: dict[str, Any], **options: Any) -> tuple[Tensor, Tensor]:
    exact = {n: x.double() if x.is_floating_point() else x for n, x in inputs.items()}
    return stickbreaking_decode(
        **{n: x.cpu() for n, x in exact.items()}, **options, backend="naive"
    )


@pytest.mark.parametrize("options", [{}, {"attend_current": True}, {"window": 50}, {"skip_tol": 0}])
def test_kernels_equal_definition(options: dict[str, Any]) -> None:
    inputs = problem()
    found = stickbreaking_decode(**inputs, **options, backend="triton")
    close(found, definition(inputs, **options), 2e-5)


def test_kernels_read_pages_with_numbers_of_either_width() -> None:
    inputs = problem()
    expected = definition(inputs)
    pages = {n: inputs[n].unflatten(1, (10, 16)).flatten(0, 1) for n in ("k_cache", "v_cache")}
    table = torch.arange(30, device=DEVICE).view(3, 10)
    for dtype in (torch.int32, torch.int64):
        lengths = inputs["cache_seqlens"].to(dtype)
        found = stickbreaking_decode(
            **(inputs | pages | {"cache_seqlens": lengths}),
            block_table=table.to(dtype),
            backend="triton",
        )
        close(found, expected, 2e-5)


def test_bfloat16_keeps_its_dtype() -> None:
    inputs = problem(torch.bfloat16)
    found = stickbreaking_decode(**inputs, backend="triton")
    assert found[0].dtype == torch.bfloat16
    close(found, definition(inputs), 2e-2)


def test_the_operator_is_registered_soundly() -> None:
    inputs = problem()
    tensors = [inputs[n][:1] for n in ("q", "k_cache", "v_cache", "cache_seqlens")]
    torch.library.opcheck(decode_step, (*tensors, None, 0.2, False, None, 1e-6, False, "triton"))


def test_float64_is_refused_with_the_remedy() -> None:
    with pytest.raises(UnsupportedError, match='got float64; use "chunked"'):
        stickbreaking_decode(**problem(torch.float64), backend="triton")
