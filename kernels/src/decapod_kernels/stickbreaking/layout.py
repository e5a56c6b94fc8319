"""Shapes and strides, checked once: dense batches and packed sequences look alike to the kernels.

A kernel sees pointers, three strides per tensor (batch, head, row; the last dimension is
contiguous), and for each batch row where its queries and keys begin, how many there are, which
keys are valid, and at which position among the keys the first query stands (`sequence`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 256
# Positions are 32-bit integers in the kernels; no sum of two of them may overflow.
_FAR = 2**30


@dataclass(frozen=True)
class Layout:
    """What the tensors of one call look like. Made by `describe`, which checks.

    Attributes:
        batch, q_heads, kv_heads, key_dim, value_dim: sizes; for packed sequences, `batch` is
            their number.
        max_q, max_k: lengths, the longest ones for packed sequences.
        offset: position of the first query among the keys (packed: each sequence's own).
        attend_current: whether a query sees the key of its own position.
        window: positions that a query looks back; a number beyond all lengths for "all".
        key_start, key_end: `[batch]` int32, the interval of valid keys, or None.
        cu_q, cu_k: `[batch + 1]` int32 starts of packed sequences, or None for dense tensors.
    """

    batch: int
    q_heads: int
    kv_heads: int
    max_q: int
    max_k: int
    key_dim: int
    value_dim: int
    offset: int
    attend_current: bool
    window: int
    key_start: Tensor | None
    key_end: Tensor | None
    cu_q: Tensor | None
    cu_k: Tensor | None

    @property
    def packed(self) -> bool:
        """Whether the sequences are packed one after the other."""
        return self.cu_q is not None

    @property
    def group(self) -> int:
        """Query heads per key-value head."""
        return self.q_heads // self.kv_heads

    def strides(self, x: Tensor) -> tuple[int, int, int]:
        """Strides of (batch, head, row) of `[B, H, L, ...]`, or of the packed `[total, H, ...]`."""
        if self.packed:
            return 0, x.stride(1), x.stride(0)
        return x.stride(0), x.stride(1), x.stride(2)


def describe(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    attend_current: bool = False,
    kv_offset: int | None = None,
    key_start: Tensor | None = None,
    key_end: Tensor | None = None,
    window: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
) -> Layout:
    """The layout of `q [B, Hq, Lq, Dk]`, `k [B, Hkv, Lk, Dk]`, `v [B, Hkv, Lk, Dv]`.

    With `cu_seqlens_q` and `cu_seqlens_k` (`[N + 1]` int32 that start at 0 and never decrease)
    the tensors are packed: `[total, heads, head size]`. Nothing here waits for the device: the
    values of `cu_seqlens`, `key_start` and `key_end` are looked at on the CPU only; see
    `check_cu_seqlens`.

    Raises:
        ValueError: an argument does not fit; the message names it.
    """
    packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    _check_tensors(q, k, v, rank=3 if packed else 4)
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 or None for all keys, got {window}")
    if packed:
        if kv_offset is not None or key_start is not None or key_end is not None:
            raise ValueError(
                "kv_offset, key_start and key_end are for dense tensors; packed sequences have "
                "their own lengths in cu_seqlens_q and cu_seqlens_k"
            )
        if cu_seqlens_q is None or cu_seqlens_k is None:
            raise ValueError("packed sequences need both cu_seqlens_q and cu_seqlens_k")
        if max_seqlen_q is None or max_seqlen_k is None:
            raise ValueError("packed sequences need both max_seqlen_q and max_seqlen_k")
        if len(cu_seqlens_q) != len(cu_seqlens_k):
            raise ValueError(
                "cu_seqlens_q and cu_seqlens_k must describe as many sequences, got "
                f"{len(cu_seqlens_q) - 1} and {len(cu_seqlens_k) - 1}"
            )
        for name, cu, x, longest in (
            ("cu_seqlens_q", cu_seqlens_q, q, max_seqlen_q),
            ("cu_seqlens_k", cu_seqlens_k, k, max_seqlen_k),
        ):
            check_cu_seqlens(
                name, cu, total=x.shape[0], longest=longest, validate=cu.device.type == "cpu"
            )
            _check_device(name, cu, q)
        batch, max_q, max_k, offset = len(cu_seqlens_q) - 1, max_seqlen_q, max_seqlen_k, 0
    else:
        if max_seqlen_q is not None or max_seqlen_k is not None:
            raise ValueError("max_seqlen_q and max_seqlen_k need cu_seqlens_q and cu_seqlens_k")
        batch, max_q, max_k = q.shape[0], q.shape[2], k.shape[2]
        offset = max_k - max_q if kv_offset is None else kv_offset
        for name, bound in (("key_start", key_start), ("key_end", key_end)):
            if bound is not None:
                _check_key_bound(name, bound, q)
    if abs(offset) >= _FAR or max(max_q, max_k) >= _FAR:
        raise ValueError(
            f"positions must stay below 2^30, got kv_offset={offset}, {max_q} queries and "
            f"{max_k} keys"
        )
    return Layout(
        batch=batch,
        q_heads=q.shape[1],
        kv_heads=k.shape[1],
        max_q=max_q,
        max_k=max_k,
        key_dim=q.shape[-1],
        value_dim=v.shape[-1],
        offset=offset,
        attend_current=attend_current,
        window=_FAR if window is None else min(window, _FAR),
        key_start=key_start,
        key_end=key_end,
        cu_q=cu_seqlens_q,
        cu_k=cu_seqlens_k,
    )


def check_cu_seqlens(
    name: str, cu_seqlens: Tensor, *, total: int, longest: int, validate: bool
) -> None:
    """Refuse starts of packed sequences that do not fit `total` rows and the longest length.

    `validate=False` looks at shape and dtype only: values on a GPU would have to be waited for.

    Raises:
        ValueError: not a vector of int32 that starts at 0, never decreases, and ends at `total`,
            or a sequence is longer than `longest`.
    """
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 1:
        raise ValueError(f"{name} must be a vector [N + 1], got shape {tuple(cu_seqlens.shape)}")
    if cu_seqlens.dtype != torch.int32:
        raise ValueError(f"{name} must be int32, got {cu_seqlens.dtype}; convert it with .int()")
    if not cu_seqlens.is_contiguous():
        raise ValueError(f"{name} must be contiguous; make it so with .contiguous()")
    if not validate:
        return
    lengths = cu_seqlens.diff()
    if cu_seqlens[0] != 0:
        raise ValueError(
            f"{name} must start at 0, got {int(cu_seqlens[0])}; it holds the start of every "
            "sequence and the end of the last"
        )
    if (lengths < 0).any():
        raise ValueError(f"{name} must not decrease, got {cu_seqlens.tolist()}")
    if cu_seqlens[-1] != total:
        raise ValueError(
            f"{name} must end at the number of packed rows, {total}, got {int(cu_seqlens[-1])}"
        )
    if len(lengths) and lengths.max() > longest:
        raise ValueError(
            f"max_seqlen{name.removeprefix('cu_seqlens')} must be at least the longest length in "
            f"{name}, {int(lengths.max())}, got {longest}"
        )


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, *, rank: int) -> None:
    shape = "[B, H, L, D]" if rank == 4 else "[total, H, D] with cu_seqlens"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != rank:
            raise ValueError(f"{name} must be {shape}, got shape {tuple(x.shape)}")
        if x.dtype not in DTYPES:
            raise ValueError(
                f"{name} must be float16, bfloat16 or float32, got {x.dtype}; these kernels have "
                "no other precision"
            )
        if x.dtype != q.dtype:
            raise ValueError(f"{name} must have q's dtype {q.dtype}, got {x.dtype}")
        _check_device(name, x, q)
        if not 1 <= x.shape[-1] <= MAX_HEAD_DIM:
            raise ValueError(
                f"{name} must have a head size of 1 to {MAX_HEAD_DIM}, got {x.shape[-1]}"
            )
        if x.stride(-1) != 1 and x.shape[-1] > 1 and x.numel():
            raise ValueError(
                f"{name} must be contiguous in its last dimension, got strides {x.stride()}; "
                f"it is never copied silently: pass {name}.contiguous()"
            )
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"k must have q's head size {q.shape[-1]}, got {k.shape[-1]}")
    if k.shape[:-1] != v.shape[:-1]:
        raise ValueError(
            f"v must have k's shape but for the head size, {tuple(k.shape[:-1])}, got "
            f"{tuple(v.shape[:-1])}"
        )
    if rank == 4 and k.shape[0] != q.shape[0]:
        raise ValueError(f"k must have q's batch size {q.shape[0]}, got {k.shape[0]}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            "q must have a multiple of k's heads (each key-value head serves as many query "
            f"heads), got {q.shape[1]} and {k.shape[1]}"
        )


def _check_device(name: str, x: Tensor, q: Tensor) -> None:
    if x.device != q.device:
        raise ValueError(f"{name} must be on q's device {q.device}, got {x.device}")


def _check_key_bound(name: str, bound: Tensor, q: Tensor) -> None:
    if bound.shape != (q.shape[0],) or bound.dtype != torch.int32 or not bound.is_contiguous():
        raise ValueError(
            f"{name} must be a contiguous vector [{q.shape[0]}] of int32, one key index per batch "
            f"row, got shape {tuple(bound.shape)} of {bound.dtype}"
        )
    _check_device(name, bound, q)


def device_capability(x: Tensor) -> tuple[int, int] | None:
    """Compute capability of the GPU that holds `x`; None for the interpreter's CPU."""
    if not x.is_cuda:
        return None
    major, minor = torch.cuda.get_device_capability(x.device)
    return major, minor


@triton.jit
def sequence(b, CuQ, CuK, KeyStart, KeyEnd, Lq, Lk, offset):
    """Where batch row `b` is: first query and key row, their numbers, valid keys, and offset.

    CuQ is None for dense tensors: their rows begin at 0 of the batch stride. KeyStart and KeyEnd
    are None where all keys are valid.
    """
    q_start = 0
    k_start = 0
    if CuQ is not None:
        q_start = tl.load(CuQ + b)
        k_start = tl.load(CuK + b)
        Lq = tl.load(CuQ + b + 1) - q_start
        Lk = tl.load(CuK + b + 1) - k_start
        offset = Lk - Lq
    first = 0
    last = Lk
    if KeyStart is not None:
        first = tl.maximum(tl.load(KeyStart + b), 0)
    if KeyEnd is not None:
        last = tl.minimum(tl.load(KeyEnd + b), Lk)
    return q_start, k_start, Lq, Lk, first, last, offset
