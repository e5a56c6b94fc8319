"""Where the kernels may run, and what is said where they may not."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from sbattn import on_triton
from sbattn.errors import MissingExtraError, UnsupportedError
from sbattn.functional import stickbreaking_attention


def test_without_the_extra_the_error_names_it_and_auto_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(on_triton, "INSTALLED", False)
    x = torch.randn(1, 1, 3, 4)
    with pytest.raises(MissingExtraError, match=r'decapod-kernels .* "sbattn\[triton\]"'):
        stickbreaking_attention(x, x, x, backend="triton")
    stickbreaking_attention(x, x, x)


def test_on_a_cpu_the_kernels_run_in_the_interpreter_only(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("decapod_kernels")
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x = torch.randn(1, 1, 3, 4)
    with pytest.raises(UnsupportedError, match=r"needs CUDA .* TRITON_INTERPRET=1 .* got cpu; use"):
        stickbreaking_attention(x, x, x, backend="triton")


def test_the_operator_works_where_triton_and_the_kernels_are_missing() -> None:
    program = """
import sys
sys.modules["triton"] = sys.modules["decapod_kernels"] = None
import torch
from sbattn.errors import MissingExtraError
from sbattn.functional import stickbreaking_attention
x = torch.randn(1, 1, 40, 8, requires_grad=True)
stickbreaking_attention(x, x, x)[0].sum().backward()
try:
    stickbreaking_attention(x, x, x, backend="triton")
except MissingExtraError:
    sys.exit(11)
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    assert subprocess.run([sys.executable, "-c", program], env=environment).returncode == 11


def test_head_dimensions_fit_the_kernels_own_limit() -> None:
    pytest.importorskip("triton")
    layout = pytest.importorskip("decapod_kernels.stickbreaking.layout")
    assert layout.MAX_HEAD_DIM == on_triton.LARGEST_HEAD


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_auto_on_a_gpu_takes_the_kernels_where_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    real = on_triton.dense_forward
    monkeypatch.setattr(
        on_triton, "dense_forward", lambda *a, **o: taken.append(a[0].dtype) or real(*a, **o)
    )
    for dtype in (torch.bfloat16, torch.float64):
        x = torch.randn(1, 1, 40, 64, device="cuda", dtype=dtype)
        stickbreaking_attention(x, x, x)
    assert taken == [torch.bfloat16]


def test_features_that_do_not_lie_side_by_side_are_refused_and_not_copied() -> None:
    pytest.importorskip("decapod_kernels")
    pytest.importorskip("triton")
    x = torch.randn(1, 1, 3, 16)
    turned = torch.randn(1, 1, 16, 3).transpose(2, 3)
    with pytest.raises(UnsupportedError, match=r"keys: .* stride 3 .*contiguous"):
        stickbreaking_attention(x, turned, x, backend="triton")
