"""What the learner minimises on a mini-batch: PPO's loss, fine-tuning, or DPO-Positive."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from vineppo.advantages import whiten
from vineppo.batch import Response, Rows, at_tokens, collate
from vineppo.config import DPOPositiveConfig, PolicyGradientConfig, PPOConfig
from vineppo.losses import (
    dpo_positive_loss,
    kl_estimate,
    kl_loss,
    ppo_clip_loss,
    ratio_guard,
    sequence_logprobs,
    sft_loss,
    value_clip_loss,
)
from vineppo.reductions import LossOutput, masked_mean

Unit = tuple[Response, ...]
"""What stays together in a micro-batch: one response, or the two of a pair."""


@dataclass(frozen=True)
class Totals:
    """Of a mini-batch over all processes, so that its parts add up to one loss.

    Attributes:
        tokens: of responses.
        units: responses or pairs.
    """

    tokens: int
    units: int

    def of(self, reduction: str) -> int:
        """What a reduction of :mod:`vineppo.losses` divides by."""
        return self.tokens if reduction == "token" else self.units


class Objective(Protocol):
    """A loss on units.

    The contract: losses of the micro-batches of a mini-batch add up to its loss, however it is cut.

    Attributes:
        mean_over: what the statistics are means over, ``"token"`` or ``"unit"``.
    """

    mean_over: ClassVar[str]

    def prepared(self, units: Sequence[Unit]) -> Sequence[Unit]:
        """The units of a whole mini-batch before it is cut into micro-batches."""
        ...

    def loss(
        self, logprobs: Tensor, values: Tensor | None, rows: Rows, totals: Totals
    ) -> LossOutput:
        """The loss on the rows of some units, which stand one after the other."""
        ...


class PolicyGradient:
    """PPO's clipped loss, the divergence from the reference, and the critic's loss.

    Args:
        config: of a trainer.
    """

    mean_over: ClassVar[str] = "token"

    def __init__(self, config: PolicyGradientConfig) -> None:
        self._config = config

    def prepared(self, units: Sequence[Unit]) -> Sequence[Unit]:
        """Units with whitened advantages."""
        if self._config.whiten is None:
            return units
        responses = [response for (response,) in units]
        # Here each row is a response alone: nothing of the prompts is needed.
        rows = collate([replace(r, prompt_ids=(0,)) for r in responses], 0, torch.float64)
        whitened = whiten(rows.per_token["advantages"], rows.mask, self._config.whiten)
        return [
            (replace(response, advantages=advantages),)
            for response, advantages in zip(responses, at_tokens(whitened, rows.mask), strict=True)
        ]

    def loss(
        self, logprobs: Tensor, values: Tensor | None, rows: Rows, totals: Totals
    ) -> LossOutput:
        """The loss on some responses."""
        config, mask, given = self._config, rows.mask, rows.per_token
        policy = ppo_clip_loss(
            logprobs, given["old_logprobs"], given["advantages"], mask, config.clip_range,
            reduction=config.pg_reduction, denominator=totals.of(config.pg_reduction),
        )  # fmt: skip
        loss, stats = policy.loss, dict(policy.stats)
        if "ref_logprobs" in given:
            of_tokens = kl_estimate(
                logprobs, given["ref_logprobs"], config.kl, config.kl_clamp, mask=mask
            )
            stats["kl"] = masked_mean(of_tokens, mask)
            if config.beta > 0:
                loss = loss + config.beta * kl_loss(
                    of_tokens, mask, reduction=config.kl_reduction,
                    denominator=totals.of(config.kl_reduction),
                )  # fmt: skip
        if values is not None and isinstance(config, PPOConfig):
            fitted = value_clip_loss(
                values, given["old_values"], given["returns"], mask, config.value_clip_range,
                denominator=totals.tokens,
            )  # fmt: skip
            stats |= fitted.stats
            loss = loss + config.value_coefficient * fitted.loss
        return LossOutput(loss * ratio_guard(stats["ratio"], config.ratio_limit), stats)


class FineTuning:
    """Negative log-probability of right responses, the mean of their token means (RestEM)."""

    mean_over: ClassVar[str] = "token"

    def prepared(self, units: Sequence[Unit]) -> Sequence[Unit]:
        """The units as they are."""
        return units

    def loss(
        self,
        logprobs: Tensor,
        values: Tensor | None,  # noqa: ARG002 - there is no critic
        rows: Rows,
        totals: Totals,
    ) -> LossOutput:
        """The loss on some responses."""
        return sft_loss(logprobs, rows.mask, reduction="sequence", denominator=totals.units)


class DPOPositive:
    """DPO-Positive on pairs; the better response of a unit stands first.

    Args:
        config: of the trainer.
    """

    mean_over: ClassVar[str] = "unit"

    def __init__(self, config: DPOPositiveConfig) -> None:
        self._config = config

    def prepared(self, units: Sequence[Unit]) -> Sequence[Unit]:
        """The units as they are."""
        return units

    def loss(
        self,
        logprobs: Tensor,
        values: Tensor | None,  # noqa: ARG002 - there is no critic
        rows: Rows,
        totals: Totals,
    ) -> LossOutput:
        """The loss on some pairs."""
        sums = sequence_logprobs(logprobs, rows.mask)
        reference = sequence_logprobs(rows.per_token["ref_logprobs"], rows.mask)
        kept = rows.mask.any(1)[0::2]  # none in a pass for another process's sake
        chosen = _without_rounding(sums[0::2] * kept, reference[0::2])
        return dpo_positive_loss(
            chosen, sums[1::2] * kept, reference[0::2], reference[1::2],
            self._config.dpo_beta, self._config.dpo_lambda, denominator=totals.units,
        )  # fmt: skip


def _without_rounding(chosen: Tensor, reference: Tensor) -> Tensor:
    """Exactly the reference where the two differ by rounding alone; the gradient is as it was.

    That is so for all pairs before the first step, and there the penalty has its kink: with its
    weight of 50, the sign of a rounding error would decide on most of the gradient.
    """
    equal = (chosen - reference).abs() <= 256 * torch.finfo(chosen.dtype).eps * reference.abs()
    return torch.where(equal, reference + (chosen - chosen.detach()), chosen)
