"""The clipped surrogate of PPO, for ratios of tokens or of sequences."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from asyncrlhf.losses.output import max_over, mean_over
from asyncrlhf.sequences import bounded_exp, k3


class Surrogate(NamedTuple):
    """Objectives, to be made large, with what to watch."""

    objective: Tensor
    ratio: Tensor
    clipped: Tensor

    def metrics(self, where: Tensor) -> dict[str, Tensor]:
        """Means over the selected entries."""
        return {
            "clip_fraction": mean_over(self.clipped.to(self.ratio), where),
            **ratio_metrics(self.ratio, where),
        }


def clipped_surrogate(
    logps: Tensor,
    behaviour_logps: Tensor,
    advantages: Tensor,
    clip: float,
    proximal_logps: Tensor | None,
) -> Surrogate:
    """min(ρ A, clip(ρ, 1 ± ε) A) with ρ = π/π_b, all of one shape.

    With proximal log-probabilities, ρ = π/π_prox and the objective has the constant weight
    π_prox/π_b: the clip then holds the policy to where the step began rather than to the sampler
    ("decoupled", arXiv 2110.00641). With π_prox = π_b it is the plain one, bit for bit.
    """
    anchor = behaviour_logps if proximal_logps is None else proximal_logps
    ratio = bounded_exp(logps - anchor.detach())
    plain = ratio * advantages
    bounded = ratio.clamp(1 - clip, 1 + clip) * advantages
    objective = torch.minimum(plain, bounded)
    if proximal_logps is not None:
        objective = objective * bounded_exp((proximal_logps - behaviour_logps).detach())
    return Surrogate(objective, ratio.detach(), (bounded < plain).detach())


def ratio_metrics(ratio: Tensor, where: Tensor) -> dict[str, Tensor]:
    """Mean and largest ratio over the selected entries."""
    return {"ratio_mean": mean_over(ratio, where), "ratio_max": max_over(ratio, where)}


def drift(logps: Tensor, behaviour_logps: Tensor, where: Tensor) -> Tensor:
    """Mean of ρ − 1 − log ρ with ρ = π/π_b: how far the policy has moved from the sampler."""
    return mean_over(k3((logps - behaviour_logps).detach()), where)
