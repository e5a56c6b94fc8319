"""Shapes, strides and dtypes of a decoding step, checked before any kernel runs."""

from __future__ import annotations

import torch
from torch import Tensor

from decapod_kernels.stickbreaking.layout import DTYPES, MAX_HEAD_DIM


def check_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    table: Tensor | None,
    window: int | None,
) -> None:
    """Refuse what the decode kernels cannot read; `decode` describes the arguments.

    Nothing here waits for the device: lengths and page numbers are not looked at.

    Raises:
        ValueError: an argument does not fit; the message names it.
    """
    for name, tensor in (("q", q), ("k_cache", k), ("v_cache", v)):
        if tensor.ndim != 4:
            raise ValueError(f"{name} must have 4 dimensions, got shape {tuple(tensor.shape)}")
        if tensor.dtype not in DTYPES or tensor.dtype != q.dtype:
            raise ValueError(
                f"q, k_cache and v_cache must all be float16, bfloat16 or float32, got "
                f"{q.dtype} for q and {tensor.dtype} for {name}"
            )
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(
                f"{name} must be contiguous in its last dimension, got strides {tensor.stride()}"
            )
        if not 1 <= tensor.shape[-1] <= MAX_HEAD_DIM:
            raise ValueError(
                f"{name} must have a head size of 1 to {MAX_HEAD_DIM}, got {tensor.shape[-1]}"
            )
    if k.shape[:3] != v.shape[:3] or k.shape[3] != q.shape[3]:
        raise ValueError(
            "k_cache must have v_cache's shape but for the head size, and q's head size, got "
            f"q {tuple(q.shape)}, k_cache {tuple(k.shape)}, v_cache {tuple(v.shape)}"
        )
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(
            "q must have a multiple of k_cache's heads (each key-value head serves as many query "
            f"heads), got {q.shape[2]} and {k.shape[2]}"
        )
    if table is None and k.shape[0] != q.shape[0]:
        raise ValueError(
            f"k_cache must have q's batch size {q.shape[0]} where there is no block_table, got "
            f"{k.shape[0]}"
        )
    _check_integers("cache_seqlens", lengths, q, rank=1)
    if table is not None:
        _check_integers("block_table", table, q, rank=2)
    for name, tensor in (("k_cache", k), ("v_cache", v)):
        if tensor.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {tensor.device}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 or None for all keys, got {window}")


def _check_integers(name: str, tensor: Tensor, q: Tensor, *, rank: int) -> None:
    if tensor.ndim != rank or tensor.shape[0] != q.shape[0]:
        raise ValueError(
            f"{name} must have {rank} dimension(s), the first of q's batch size {q.shape[0]}, got "
            f"shape {tuple(tensor.shape)}"
        )
    if tensor.dtype != torch.int32 or (tensor.stride(-1) != 1 and tensor.shape[-1] > 1):
        raise ValueError(
            f"{name} must be int32 and contiguous in its last dimension, got {tensor.dtype} with "
            f"strides {tensor.stride()}"
        )
    if tensor.device != q.device:
        raise ValueError(f"{name} must be on q's device {q.device}, got {tensor.device}")
