"""Packed sequences one at a time: each as a dense batch of one, a view of the packed tensors.

For the backends that know dense batches only. Learning where the sequences begin means reading
their offsets, for which an accelerator is waited for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sbattn.naive import naive_attention
from sbattn.visibility import Visibility


@dataclass(frozen=True)
class Packing:
    """Where the sequences are: offsets `[N + 1]` int32 and longest lengths, as FlashAttention's."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int


def spans(packing: Packing) -> Iterator[tuple[slice, slice]]:
    """Rows of the queries and of the keys of each sequence."""
    starts_q, starts_k = packing.cu_seqlens_q.tolist(), packing.cu_seqlens_k.tolist()
    for n in range(len(starts_q) - 1):
        yield slice(starts_q[n], starts_q[n + 1]), slice(starts_k[n], starts_k[n + 1])


def as_dense(packed: Tensor, rows: slice) -> Tensor:
    """Rows of `[total, H, D]` as `[1, H, L, D]`, or of `[total, H]` as `[1, H, L]`; a view."""
    return packed[rows].transpose(0, 1)[None]


def naive_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packing: Packing,
    *,
    scale: float,
    attend_current: bool,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """The definition, sequence by sequence: outputs `[total_q, Hq, Dv]`, log remainders."""
    outs, log_rems = [], []
    for rows, keys in list(spans(packing)) or [(slice(0, 0), slice(0, 0))]:
        out, log_rem = naive_attention(
            *(as_dense(x, span) for x, span in ((q, rows), (k, keys), (v, keys))),
            scale=scale,
            visibility=sequence_visibility(rows, keys, attend_current, window),
        )
        outs.append(out[0].transpose(0, 1))
        log_rems.append(log_rem[0].transpose(0, 1))
    return torch.cat(outs), torch.cat(log_rems)


def sequence_visibility(
    rows: slice, keys: slice, attend_current: bool, window: int | None
) -> Visibility:
    """Visibility in one sequence, whose last query is its last key's token."""
    offset = (keys.stop - keys.start) - (rows.stop - rows.start)
    return Visibility(offset, attend_current, window)
