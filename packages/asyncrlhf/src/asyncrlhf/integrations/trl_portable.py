"""TRL's AsyncGRPOTrainer where there is no FlashAttention-3, such as on a CPU.

TRL 1.16 packs the answers of a micro-batch into a prefix tree and attends to it with a kernel of
FlashAttention-3, which it asks the Hub for; and its constructor asks CUDA for the name of the
device. This module gives the same attention in plain PyTorch and does without the name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from asyncrlhf.errors import InvalidInputError
from asyncrlhf.integrations.trl_contract import check_contract

ATTENTION = "asyncrlhf_tree"
_TRAINER = "trl.experimental.async_grpo.async_grpo_trainer"


def portable_trainer(**arguments: Any) -> Any:
    """TRL's own ``AsyncGRPOTrainer``, able to train on any device.

    Two things differ from calling the class. The model's attention is :func:`tree_attention`,
    chosen through the public interface of transformers. While the constructor runs, its look-up of
    the peak speed of a CUDA device gives None for other devices, as TRL itself does for devices it
    does not know; the MFU metrics are then left out.

    Args:
        arguments: those of ``trl.experimental.async_grpo.AsyncGRPOTrainer``.

    Raises:
        MissingExtraError: TRL is not installed.
        TRLContractError: it is another release of TRL than the one this was made for.
    """
    check_contract()
    with _no_peak_speed_without_cuda():
        trainer = import_module(_TRAINER).AsyncGRPOTrainer(**arguments)
    attend_anywhere(trainer.accelerator.unwrap_model(trainer.model))
    return trainer


def attend_anywhere(model: Any) -> None:
    """Switch a transformers model to :func:`tree_attention`, registered as ``asyncrlhf_tree``."""
    transformers: Any = import_module("transformers")
    masking: Any = import_module("transformers.masking_utils")
    transformers.AttentionInterface.register(ATTENTION, tree_attention)
    # Who may attend to whom is in the arguments of the attention; a mask would be wrong.
    masking.AttentionMaskInterface.register(ATTENTION, _no_mask)
    model.set_attn_implementation(ATTENTION)


def tree_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001 - the signature is that of transformers
    *,
    tree_kv_index: Tensor,
    tree_cu_seqlens_q: Tensor,
    tree_cu_seqlens_k: Tensor,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention over a prefix tree that is laid out as one row of segments.

    A segment is a run of tokens without a fork. Its queries see its path, from the root of the tree
    to itself: the last query the whole path, each one before it one key fewer.

    Args:
        module: of the model; not used.
        query: (1, query heads, tokens, width).
        key: (1, key heads, tokens, width); query heads are a multiple of key heads.
        value: (1, key heads, tokens, width).
        attention_mask: not used.
        tree_kv_index: (keys,) places in the row of the tokens of all paths, one path after another.
        tree_cu_seqlens_q: (segments + 1,) where each segment begins in the row.
        tree_cu_seqlens_k: (segments + 1,) where each path begins in ``tree_kv_index``.
        scaling: factor on the scores; None means 1 / sqrt(width).
        sliding_window: number of keys that a query sees, itself among them; None means all.
        softcap: refused.

    Returns:
        (1, tokens, query heads, width), and None for the weights of the attention.

    Raises:
        InvalidInputError: the model caps its scores.
    """
    if softcap:
        raise InvalidInputError(
            f"softcap: expected none, got {softcap}; a model that caps its scores "
            f"({type(module).__name__}) needs TRL's own attention"
        )
    scaling = 1 / math.sqrt(query.shape[-1]) if scaling is None else scaling
    starts, paths = tree_cu_seqlens_q.tolist(), tree_cu_seqlens_k.tolist()
    outputs = []
    for segment in range(len(starts) - 1):
        rows = slice(starts[segment], starts[segment + 1])
        path = tree_kv_index[paths[segment] : paths[segment + 1]]
        count, length = rows.stop - rows.start, len(path)
        seen = torch.ones(count, length, dtype=torch.bool, device=query.device)
        seen = seen.tril(length - count)
        if sliding_window:
            seen = seen.triu(length - count - sliding_window + 1)
        outputs.append(
            scaled_dot_product_attention(
                query[:, :, rows],
                key.index_select(2, path),
                value.index_select(2, path),
                attn_mask=seen,
                scale=scaling,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _no_mask(**_: Any) -> None:
    return None


@contextmanager
def _no_peak_speed_without_cuda() -> Iterator[None]:
    module: Any = import_module(_TRAINER)
    theirs = module.get_peak_flops_per_device

    def peak_speed(accelerator: Any, dtype: str) -> Any:
        return theirs(accelerator, dtype) if accelerator.device.type == "cuda" else None

    module.get_peak_flops_per_device = peak_speed
    try:
        yield
    finally:
        module.get_peak_flops_per_device = theirs
