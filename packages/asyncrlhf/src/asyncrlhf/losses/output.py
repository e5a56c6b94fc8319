"""What a loss returns, and what each loss needs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from asyncrlhf.errors import InvalidInputError


@dataclass(frozen=True, eq=False)
class LossOutput:
    """A loss with its parts.

    Attributes:
        loss: 0-d, ``per_sequence.sum() / normalizer``.
        per_sequence: (n,), what each completion contributes before the division. A pair contributes
            at its chosen completion.
        normalizer: what the sum was divided by.
        metrics: 0-d tensors without gradient, means over this call's completions, pairs or tokens;
            0 where there is none.
    """

    loss: Tensor
    per_sequence: Tensor
    normalizer: float
    metrics: Mapping[str, Tensor]

    @classmethod
    def of(
        cls,
        per_sequence: Tensor,
        default: float,
        normalizer: float | None,
        metrics: Mapping[str, Tensor],
    ) -> LossOutput:
        """Divide by the normalizer, or by the default (at least 1) if it is None.

        Raises:
            InvalidInputError: the normalizer is not a positive number.
        """
        divisor = max(1.0, float(default)) if normalizer is None else float(normalizer)
        if not (math.isfinite(divisor) and divisor > 0):
            raise InvalidInputError(f"normalizer: expected a positive number, got {normalizer}")
        return cls(per_sequence.sum() / divisor, per_sequence, divisor, metrics)


@dataclass(frozen=True, kw_only=True)
class LossInfo:
    """What a loss needs from those who call it.

    Attributes:
        min_completions: smallest K, completions per prompt.
        normalized_by: what the default normalizer counts: groups, tied ones and those without a
            pair included; sequences, unusable ones included; or unmasked tokens.
        token_level: whether log-probabilities must be given per token, (n, L).
        needs_behaviour: whether the sampler's log-probabilities enter.
        needs_reference: whether a reference model's log-probabilities enter; for ``"ppo"`` through
            :func:`asyncrlhf.losses.token_rewards`. ``"grpo"`` can do with or without.
        needs_critic: whether values enter; for ``"ppo"`` through :func:`asyncrlhf.losses.gae`.
    """

    min_completions: int = 2
    normalized_by: Literal["groups", "sequences", "tokens"]
    token_level: bool = False
    needs_behaviour: bool = False
    needs_reference: bool = False
    needs_critic: bool = False


INFO: Mapping[str, LossInfo] = MappingProxyType(
    {
        "online_dpo": LossInfo(normalized_by="groups", needs_reference=True),
        "ipo": LossInfo(normalized_by="groups", needs_reference=True),
        "best_of_k": LossInfo(normalized_by="groups"),
        "rloo": LossInfo(normalized_by="sequences", needs_behaviour=True, needs_reference=True),
        "proximal_rloo": LossInfo(
            normalized_by="sequences", needs_behaviour=True, needs_reference=True
        ),
        "copg": LossInfo(normalized_by="sequences", needs_reference=True),
        "ppo": LossInfo(
            min_completions=1,
            normalized_by="tokens",
            token_level=True,
            needs_behaviour=True,
            needs_reference=True,
            needs_critic=True,
        ),
        "grpo": LossInfo(normalized_by="sequences", token_level=True, needs_behaviour=True),
    }
)
"""What each loss of :mod:`asyncrlhf.losses` needs, by its name."""


def mean_over(x: Tensor, where: Tensor) -> Tensor:
    """Mean of entries, without gradient; 0 where none is selected."""
    return torch.where(where, x.detach(), 0.0).sum() / where.sum().clamp(min=1)


def max_over(x: Tensor, where: Tensor) -> Tensor:
    """Largest of entries that are not negative, without gradient; 0 where none is selected."""
    return torch.where(where, x.detach(), 0.0).amax()
