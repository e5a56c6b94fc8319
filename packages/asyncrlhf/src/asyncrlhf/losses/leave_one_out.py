"""Policy gradients of whole sequences with the other completions of a prompt as baseline.

    A_i = R_i − mean_{j ≠ i} R_j

over the usable completions of a group; advantages of a group sum to 0, and for K=2 they are
R_1 − R_2 and R_2 − R_1. A group with one usable completion has no baseline and contributes 0. h, hb
and hr are the log-probabilities of a completion under the policy, the sampler and the reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from asyncrlhf.errors import InvalidInputError
from asyncrlhf.losses.inputs import (
    Groups,
    grouped,
    importance,
    not_negative,
    per_sequence,
    per_token,
    positive,
)
from asyncrlhf.losses.output import LossOutput, mean_over
from asyncrlhf.losses.surrogate import clipped_surrogate, drift, ratio_metrics
from asyncrlhf.sequences import bounded_exp


def rloo(
    logps: Tensor,
    behaviour_logps: Tensor,
    ref_logps: Tensor,
    scores: Tensor,
    group_ids: Tensor,
    kl_coef: float = 0.05,
    mask: Tensor | None = None,
    *,
    weights: Tensor | None = None,
    valid: Tensor | None = None,
    normalizer: float | None = None,
) -> LossOutput:
    """REINFORCE with a leave-one-out baseline: loss = −A h, R = score − kl_coef (hb − hr).

    Right for completions of the current policy only; on stale ones it is biased, unless weights
    correct it or :func:`proximal_rloo` is used.

    Args:
        logps: (n,) of completions, or (n, L) of tokens, to be summed over the mask; with gradient.
        behaviour_logps: (n,) or (n, L), of the sampler.
        ref_logps: (n,) or (n, L), of the reference.
        scores: (n,), higher is better.
        group_ids: (n,) integers, equal for completions of the same prompt; in any order.
        kl_coef: price of one nat of log(π/π_ref).
        mask: (n, L) bool; completions without a token in it count nowhere.
        weights: importance weights of :mod:`asyncrlhf.corrections`, (n,), or (n, L) with logps per
            token; the loss is then −A Σ_t w_t log π_t.
        valid: (n,) bool, which completions count, such as those whose score is finite.
        normalizer: what the sum is divided by; None is n.

    Returns:
        Metrics over usable completions: ``reward`` (R), ``kl_ref`` (hb − hr), ``advantage_abs``,
        ``approx_kl`` (ρ − 1 − log ρ with ρ = exp(h − hb)), ``ratio_mean``, ``ratio_max`` (ρ).

    Raises:
        InvalidInputError: shapes do not fit, K=1, a score that is not finite, or an option out of
            range.

    Source: arXiv 2402.14740.
    """
    not_negative("kl_coef", kl_coef)
    groups = grouped("rloo", scores, group_ids, mask, valid, logps.device)
    h = per_sequence("logps", logps, mask, groups.usable)
    hb = per_sequence("behaviour_logps", behaviour_logps.detach(), mask, groups.usable)
    hr = per_sequence("ref_logps", ref_logps.detach(), mask, groups.usable)
    advantages, metrics = _advantages(groups, hb - hr, kl_coef)
    weighted = _weighted(h, logps, weights, mask, groups.usable)
    metrics["approx_kl"] = drift(h, hb, groups.usable)
    metrics.update(ratio_metrics(bounded_exp((h - hb).detach()), groups.usable))
    return LossOutput.of(-advantages.to(h) * weighted, len(h), normalizer, metrics)


def proximal_rloo(
    logps: Tensor,
    behaviour_logps: Tensor,
    ref_logps: Tensor,
    scores: Tensor,
    group_ids: Tensor,
    kl_coef: float = 0.05,
    clip: float = 0.2,
    mask: Tensor | None = None,
    *,
    proximal_logps: Tensor | None = None,
    weights: Tensor | None = None,
    valid: Tensor | None = None,
    normalizer: float | None = None,
) -> LossOutput:
    """RLOO with the clipped ratio of sequences: loss = −min(ρ A, clip(ρ, 1 ± ε) A).

    ρ = exp(h − hb), with the log-ratio brought to ±20 first. At h = hb the gradient is that of
    :func:`rloo`; it is 0 where A > 0 and ρ > 1 + ε, and where A < 0 and ρ < 1 − ε.

    Args:
        logps: as in :func:`rloo`, like all that is not named here.
        behaviour_logps: (n,) or (n, L).
        ref_logps: (n,) or (n, L).
        scores: (n,).
        group_ids: (n,) integers.
        kl_coef: price of one nat of log(π/π_ref).
        clip: ε.
        mask: (n, L) bool.
        proximal_logps: (n,) or (n, L) of the weights that the step started from, for the decoupled
            objective: ρ = π/π_prox, and the constant weight π_prox/π_b.
        weights: importance weights, (n,); a ratio of sequences has no use for those of tokens.
        valid: (n,) bool.
        normalizer: what the sum is divided by; None is n.

    Returns:
        Metrics of :func:`rloo`, with the ratio that is clipped, and ``clip_fraction``.

    Raises:
        InvalidInputError: as :func:`rloo`, or weights per token.

    Source: arXiv 2410.18252; the decoupled form is that of arXiv 2110.00641.
    """
    not_negative("kl_coef", kl_coef)
    positive("clip", clip)
    groups = grouped("proximal_rloo", scores, group_ids, mask, valid, logps.device)
    h = per_sequence("logps", logps, mask, groups.usable)
    hb = per_sequence("behaviour_logps", behaviour_logps.detach(), mask, groups.usable)
    hr = per_sequence("ref_logps", ref_logps.detach(), mask, groups.usable)
    hp = None
    if proximal_logps is not None:
        hp = per_sequence("proximal_logps", proximal_logps.detach(), mask, groups.usable)
    advantages, metrics = _advantages(groups, hb - hr, kl_coef)
    surrogate = clipped_surrogate(h, hb, advantages.to(h), clip, hp)
    objective = surrogate.objective
    if weights is not None:
        objective = objective * _sequence_weights(weights, groups.usable)
    metrics["approx_kl"] = drift(h, hb, groups.usable)
    metrics.update(surrogate.metrics(groups.usable))
    return LossOutput.of(-objective, len(h), normalizer, metrics)


def copg(
    logps: Tensor,
    ref_logps: Tensor,
    scores: Tensor,
    group_ids: Tensor,
    kl_coef: float = 0.05,
    mask: Tensor | None = None,
    *,
    weights: Tensor | None = None,
    valid: Tensor | None = None,
    normalizer: float | None = None,
) -> LossOutput:
    """Contrastive policy gradient: RLOO whose rewards R' = score − kl_coef (h − hr) use π itself.

    loss = −A' h, where A' is the leave-one-out advantage of R' and carries no gradient. There is no
    importance ratio. Because Σ_i A'_i h_i = 1/(K−1) Σ_{i<j} (R'_i − R'_j)(h_i − h_j), and the
    derivative of (R'_i − R'_j)² is −2 kl_coef (R'_i − R'_j) (∂h_i − ∂h_j), the gradient of the
    contributions of a group with K usable completions equals that of

        1 / (2 kl_coef (K−1)) · Σ_{i<j} (R'_i − R'_j)²

    (K=2: 1/(2 kl_coef) times the one square; with the default normalizer, the number of sequences,
    the loss has 1/(4 kl_coef) times the gradient of the mean square over groups). The square is 0
    at the policy π ∝ π_ref exp(score / kl_coef), whoever drew the completions. None of this holds
    with ``kl_coef=0`` or with weights.

    Args:
        logps: as in :func:`rloo`, like all that follow.
        ref_logps: (n,) or (n, L).
        scores: (n,).
        group_ids: (n,) integers.
        kl_coef: price of one nat of log(π/π_ref).
        mask: (n, L) bool.
        weights: importance weights, (n,), or (n, L) with logps per token.
        valid: (n,) bool.
        normalizer: what the sum is divided by; None is n.

    Returns:
        Metrics over usable completions: ``reward`` (R'), ``kl_ref`` (h − hr), ``advantage_abs``.

    Raises:
        InvalidInputError: as in :func:`rloo`.

    Source: arXiv 2406.19185.
    """
    not_negative("kl_coef", kl_coef)
    groups = grouped("copg", scores, group_ids, mask, valid, logps.device)
    h = per_sequence("logps", logps, mask, groups.usable)
    hr = per_sequence("ref_logps", ref_logps.detach(), mask, groups.usable)
    advantages, metrics = _advantages(groups, h.detach() - hr, kl_coef)
    weighted = _weighted(h, logps, weights, mask, groups.usable)
    return LossOutput.of(-advantages.to(h) * weighted, len(h), normalizer, metrics)


def _advantages(groups: Groups, kl_ref: Tensor, kl_coef: float) -> tuple[Tensor, dict[str, Tensor]]:
    rewards = groups.scores - kl_coef * kl_ref
    table, count = groups.centred(rewards)
    others = (table.sum(1, keepdim=True) - table) / (count - 1).clamp(min=1)
    advantages = groups.per_completion(torch.where(count >= 2, table - others, 0.0))
    return advantages, {
        "reward": mean_over(rewards, groups.usable),
        "kl_ref": mean_over(kl_ref, groups.usable),
        "advantage_abs": mean_over(advantages.abs(), groups.usable),
    }


def _weighted(
    h: Tensor, logps: Tensor, weights: Tensor | None, mask: Tensor | None, usable: Tensor
) -> Tensor:
    """w h for weights of sequences, Σ_t w_t log π_t for those of tokens; (n,)."""
    if weights is None:
        return h
    if logps.ndim == 2 and mask is not None:
        counted = mask & usable[:, None]
        tokens = per_token("logps", logps, counted)
        return (tokens * importance(weights, counted)).sum(1)
    return h * _sequence_weights(weights, usable)


def _sequence_weights(weights: Tensor, usable: Tensor) -> Tensor:
    """Importance weights of sequences, without gradient; 0 where not usable."""
    if weights.shape != usable.shape:
        raise InvalidInputError(
            f"weights: expected shape {tuple(usable.shape)} for ratios or log-probabilities of "
            f'sequences, got {tuple(weights.shape)}; take importance weights with level="sequence"'
        )
    return torch.where(usable, weights.detach(), 0.0)
