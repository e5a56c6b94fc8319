"""From a loss's name to what a minibatch needs before the first gradient, and to its loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from torch import Tensor

from asyncrlhf import losses
from asyncrlhf.corrections import Level, Mode, importance_weights
from asyncrlhf.losses import LossOutput
from asyncrlhf.minibatch import Minibatch
from asyncrlhf.sequences import sequence_logps
from asyncrlhf.settings import IsCorrection


@dataclass(frozen=True)
class Objective:
    """A loss with its constants.

    Attributes:
        loss: a name in :data:`asyncrlhf.losses.INFO`.
        beta, kl_coef, clip, gamma, lam, vf_coef: see :class:`~asyncrlhf.AsyncRLHFConfig`.
        correction: see there.
        cap: largest importance weight.
    """

    loss: str
    beta: float = 0.1
    kl_coef: float = 0.05
    clip: float = 0.2
    gamma: float = 1.0
    lam: float = 0.95
    vf_coef: float = 0.1
    correction: IsCorrection | None = None
    cap: float = 2.0

    @property
    def needs_critic(self) -> bool:
        """Whether :meth:`prepared` reads values."""
        return losses.INFO[self.loss].needs_critic

    @property
    def needs_proximal(self) -> bool:
        """Whether the learner's log-probabilities at the round's arrival are read."""
        return self.correction is not None

    def prepared(
        self, batch: Minibatch, whiten: Callable[[Tensor, Tensor], Tensor] = losses.whiten
    ) -> Minibatch:
        """The minibatch with weights and advantages; no gradient flows through them.

        Args:
            batch: with ``ref_logps``, and where needed ``proximal_logps`` and ``values``.
            whiten: normalises advantages over the mask of the whole minibatch.
        """
        weights, advantages, returns = None, None, None
        if self.correction is not None and self.correction != "decoupled":
            mode, level = _MODES[self.correction]
            assert batch.proximal_logps is not None
            weights = importance_weights(
                batch.proximal_logps, batch.behaviour_logps, batch.mask,
                level=level, mode=mode, cap=self.cap,
            )  # fmt: skip
        if self.needs_critic:
            # What a reward failed for teaches nothing: its tokens leave the mask.
            batch = replace(batch, mask=batch.mask & batch.valid[:, None])
            assert batch.ref_logps is not None
            assert batch.values is not None
            rewards = losses.token_rewards(
                batch.behaviour_logps, batch.ref_logps, batch.scores, batch.mask, self.kl_coef
            )
            raw, returns = losses.gae(rewards, batch.values, batch.mask, self.gamma, self.lam)
            advantages = whiten(raw, batch.mask)
        return replace(batch, weights=weights, advantages=advantages, returns=returns)

    def normalizer(self, batch: Minibatch) -> float:
        """What the loss of these rows is divided by: groups, completions or tokens."""
        match losses.INFO[self.loss].normalized_by:
            case "groups":
                return float(batch.group_ids.unique().numel())
            case "sequences":
                return float(len(batch))
            case "tokens":
                return float(batch.mask.sum())

    def __call__(
        self,
        batch: Minibatch,
        logps: Tensor,
        values: Tensor | None = None,
        normalizer: float | None = None,
    ) -> LossOutput:
        """The loss of some rows of a prepared minibatch.

        Args:
            batch: the rows.
            logps: (n, L) of the policy that learns.
            values: (n, L) of the critic that learns.
            normalizer: what the sum is divided by; None takes the rows' own.
        """
        mask, scores, groups = batch.mask, batch.scores, batch.group_ids
        ref = batch.ref_logps
        # The weights are π_prox/π_b, so what they multiply has the ratio π/π_prox.
        anchor = batch.behaviour_logps if batch.weights is None else batch.proximal_logps
        decoupled: dict[str, Any] = {
            "proximal_logps": batch.proximal_logps if self.correction == "decoupled" else None
        }
        rest: dict[str, Any] = {"valid": batch.valid, "normalizer": normalizer}
        match self.loss:
            case "online_dpo":
                return losses.online_dpo(
                    logps, ref, scores, groups, beta=self.beta, mask=mask, **rest
                )
            case "ipo":
                return losses.ipo(logps, ref, scores, groups, beta=self.beta, mask=mask, **rest)
            case "best_of_k":
                return losses.best_of_k(logps, scores, groups, mask=mask, **rest)
            case "copg":
                return losses.copg(
                    logps, ref, scores, groups, kl_coef=self.kl_coef, mask=mask, **rest
                )
            case "rloo":
                return losses.rloo(
                    logps, batch.behaviour_logps, ref, scores, groups,
                    kl_coef=self.kl_coef, mask=mask, weights=batch.weights, **rest,
                )  # fmt: skip
            case "proximal_rloo":
                return losses.proximal_rloo(
                    logps, anchor, ref, scores, groups, kl_coef=self.kl_coef,
                    clip=self.clip, mask=mask, weights=batch.weights, **decoupled, **rest,
                )  # fmt: skip
            case "grpo":
                return losses.grpo(
                    logps, anchor, scores, groups, mask, clip=self.clip,
                    ref_logps=ref, kl_coef=self.kl_coef, weights=batch.weights,
                    **decoupled, **rest,
                )  # fmt: skip
            case "ppo":
                return losses.ppo(
                    logps, anchor, batch.advantages, mask, clip=self.clip,
                    values=values, old_values=batch.values, returns=batch.returns,
                    vf_coef=self.vf_coef, weights=batch.weights, normalizer=normalizer,
                    **decoupled,
                )  # fmt: skip
        raise AssertionError(f"unknown loss {self.loss!r}")


_MODES: Final[Mapping[str, tuple[Mode, Level]]] = {
    "truncate_token": ("truncate", "token"),
    "truncate_sequence": ("truncate", "sequence"),
    "mask_token": ("mask", "token"),
    "mask_sequence": ("mask", "sequence"),
}


def log_ratio(batch: Minibatch, logps: Tensor) -> Tensor:
    """(n,) log of the probability ratio of learner to behaviour, without gradient."""
    return sequence_logps(logps.detach() - batch.behaviour_logps, batch.mask)
