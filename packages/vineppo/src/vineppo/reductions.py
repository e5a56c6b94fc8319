"""How losses of tokens become one number, such that parts of a batch sum to the whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

from vineppo.errors import one_of, positive
from vineppo.masks import check_mask

Reduction = Literal["token", "sequence", "sequence_sum"]

REDUCTIONS: Final[tuple[Reduction, ...]] = ("token", "sequence", "sequence_sum")


@dataclass(frozen=True)
class LossOutput:
    """A loss and what is reported beside it.

    Attributes:
        loss: (), with gradient.
        stats: () each, detached. Means over the tokens (or pairs) of this part of the batch, 0
            where it has none: weigh them by their number, and they add up to those of the whole.
            A name that ends in ``_max`` is a maximum.
    """

    loss: Tensor
    stats: Mapping[str, Tensor]


def count_for(mask: Tensor, reduction: Reduction) -> int:
    """What a reduction divides by: the tokens under the mask, or the rows that have one.

    Args:
        mask: (B, T) bool.
        reduction: see :func:`vineppo.losses.ppo_clip_loss`.
    """
    check_mask(mask)
    one_of("reduction", reduction, REDUCTIONS)
    return int(mask.sum()) if reduction == "token" else int(mask.any(1).sum())


def reduced(x: Tensor, mask: Tensor, reduction: Reduction, denominator: float | None) -> Tensor:
    """One number from (B, T): see :func:`vineppo.losses.ppo_clip_loss`.

    Args:
        x: (B, T), finite also outside the mask.
        mask: (B, T) bool.
        reduction: which mean.
        denominator: what the sum is divided by; None takes :func:`count_for` of this mask.
    """
    one_of("reduction", reduction, REDUCTIONS)
    x = torch.where(mask, x, 0.0)
    if reduction == "sequence":
        x = x.sum(1) / mask.sum(1).clamp(min=1)
    if denominator is not None:
        positive("denominator", denominator)
        return x.sum() / denominator
    # The same as count_for, but left on the device.
    here = mask.sum() if reduction == "token" else mask.any(1).sum()
    return x.sum() / here.clamp(min=1)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean under the mask, (), detached; 0 under an empty one."""
    x = torch.where(mask, x.detach().to(torch.promote_types(x.dtype, torch.float32)), 0.0)
    return x.sum() / mask.sum().clamp(min=1)
