"""Losses whose ratios are those of tokens: PPO with a critic, and GRPO without."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from asyncrlhf.errors import InvalidInputError
from asyncrlhf.losses.inputs import (
    Groups,
    at_least_float32,
    grouped,
    importance,
    not_negative,
    per_token,
    positive,
)
from asyncrlhf.losses.output import LossOutput, mean_over
from asyncrlhf.losses.surrogate import Surrogate, clipped_surrogate, drift
from asyncrlhf.sequences import kl_estimates

Average = Literal["sequence", "token"]


def ppo(
    logps: Tensor,
    behaviour_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip: float = 0.2,
    values: Tensor | None = None,
    old_values: Tensor | None = None,
    returns: Tensor | None = None,
    vf_coef: float = 0.1,
    value_clip: float = 0.2,
    *,
    proximal_logps: Tensor | None = None,
    weights: Tensor | None = None,
    normalizer: float | None = None,
) -> LossOutput:
    """Clipped policy loss per token, and the clipped loss of a critic if its values are given.

        −w min(ρ A, clip(ρ, 1 ± ε) A) + vf_coef ½ max((V − G)², (V_old + clip(V − V_old) − G)²)

    with ρ = π/π_b, its logarithm brought to ±20 first. Advantages and returns G come from
    :func:`asyncrlhf.losses.gae`; whiten advantages over the whole minibatch first, this function
    takes them as they are.

    Args:
        logps: (n, L) of the policy, with gradient.
        behaviour_logps: (n, L) of the sampler.
        advantages: (n, L).
        mask: (n, L) bool; a completion that must not count has an empty row.
        clip: ε of the policy.
        values: (n, L) of the critic, with gradient; needs ``old_values`` and ``returns``.
        old_values: (n, L), when the batch arrived.
        returns: (n, L).
        vf_coef: weight of the critic's loss.
        value_clip: how far a value may move from its old one.
        proximal_logps: (n, L) of the weights that the step started from, for the decoupled
            objective: ρ = π/π_prox, and the constant weight π_prox/π_b.
        weights: importance weights w, (n,) or (n, L), on the policy's term.
        normalizer: what the sum is divided by; None is the number of tokens in the mask.

    Returns:
        ``per_sequence`` has sums over tokens. Metrics over tokens: ``clip_fraction``,
        ``ratio_mean``, ``ratio_max`` (ρ), ``approx_kl`` (π/π_b − 1 − log π/π_b), ``policy_loss``,
        and with a critic ``value_loss`` (before ``vf_coef``) and ``value_clip_fraction``.

    Raises:
        InvalidInputError: shapes do not fit, an option is out of range, or some of the critic's
            three inputs are missing.

    Source: arXiv 1707.06347; the decoupled form is that of arXiv 2110.00641.
    """
    positive("clip", clip)
    positive("value_clip", value_clip)
    not_negative("vf_coef", vf_coef)
    a = per_token("advantages", advantages.detach(), mask)
    surrogate, metrics = _policy(logps, behaviour_logps, a, mask, clip, proximal_logps)
    losses = -surrogate.objective * importance(weights, mask)
    metrics["policy_loss"] = mean_over(losses, mask)
    critic = {"values": values, "old_values": old_values, "returns": returns}
    missing = [name for name, x in critic.items() if x is None]
    if missing and len(missing) < len(critic):
        raise InvalidInputError(
            f"{missing[0]}: expected together with values, old_values and returns, got None"
        )
    if values is not None and old_values is not None and returns is not None:
        v = per_token("values", values, mask)
        old = per_token("old_values", old_values.detach(), mask)
        target = per_token("returns", returns.detach(), mask)
        plain = (v - target).square()
        moved = v - old
        bounded = (old + moved.clamp(-value_clip, value_clip) - target).square()
        value_losses = 0.5 * torch.maximum(plain, bounded)
        losses = losses + vf_coef * value_losses
        stopped = (bounded > plain) & (moved.abs() > value_clip)
        metrics["value_loss"] = mean_over(value_losses, mask)
        metrics["value_clip_fraction"] = mean_over(stopped.to(v), mask)
    per_sequence = torch.where(mask, losses, 0.0).sum(1)
    return LossOutput.of(per_sequence, int(mask.sum()), normalizer, metrics)


def grpo(
    logps: Tensor,
    behaviour_logps: Tensor,
    scores: Tensor,
    group_ids: Tensor,
    mask: Tensor,
    clip: float = 0.2,
    scale_rewards: bool = True,
    *,
    average: Average = "sequence",
    ref_logps: Tensor | None = None,
    kl_coef: float = 0.0,
    proximal_logps: Tensor | None = None,
    weights: Tensor | None = None,
    valid: Tensor | None = None,
    normalizer: float | None = None,
) -> LossOutput:
    """Group-relative policy optimisation: the clipped loss of PPO with A = (score − mean) / std.

    Mean and (unbiased) standard deviation are those of the usable completions of a group; 1e-4 is
    added to the latter. A group of equal scores, or with one usable completion, contributes 0.

    Args:
        logps: (n, L) of the policy, with gradient.
        behaviour_logps: (n, L) of the sampler.
        scores: (n,), higher is better.
        group_ids: (n,) integers, equal for completions of the same prompt; in any order.
        mask: (n, L) bool; completions without a token in it count nowhere.
        clip: ε.
        scale_rewards: divide by the standard deviation.
        average: ``"sequence"``: each completion contributes the mean over its tokens, as in the
            original. ``"token"``: it contributes the sum, so that each token weighs the same.
        ref_logps: (n, L) of the reference, for a KL term in the loss.
        kl_coef: weight of its k3 estimate per token (:func:`asyncrlhf.sequences.kl_estimates`).
        proximal_logps: as in :func:`ppo`.
        weights: importance weights, (n,) or (n, L), on the policy's term.
        valid: (n,) bool, which completions count, such as those whose score is finite.
        normalizer: what the sum is divided by; None is n with ``average="sequence"``, and the
            number of unmasked tokens of usable completions with ``"token"``.

    Returns:
        Metrics over tokens as in :func:`ppo`, ``kl_ref`` (k3) with a reference, and
        ``advantage_abs`` over usable completions.

    Raises:
        InvalidInputError: shapes do not fit, K=1, a score that is not finite, an option out of
            range, or a KL term without a reference.

    Source: arXiv 2402.03300; ``average="token"`` is that of arXiv 2503.14476.
    """
    positive("clip", clip)
    not_negative("kl_coef", kl_coef)
    if average not in get_args(Average):
        raise InvalidInputError(
            f"average: expected one of {', '.join(get_args(Average))}, got {average!r}"
        )
    if kl_coef and ref_logps is None:
        raise InvalidInputError(f"ref_logps: expected with kl_coef={kl_coef}, got None")
    groups = grouped("grpo", scores, group_ids, mask, valid, logps.device)
    counted = mask & groups.usable[:, None]
    relative = _group_relative(groups, scale_rewards).to(at_least_float32(logps).dtype)
    a = relative[:, None].expand(mask.shape)
    surrogate, metrics = _policy(logps, behaviour_logps, a, counted, clip, proximal_logps)
    losses = -surrogate.objective * importance(weights, counted)
    metrics["policy_loss"] = mean_over(losses, counted)
    metrics["advantage_abs"] = mean_over(relative.abs(), groups.usable)
    if ref_logps is not None:
        reference = per_token("ref_logps", ref_logps.detach(), counted)
        k3 = kl_estimates(per_token("logps", logps, counted), reference, counted).k3
        losses = losses + kl_coef * k3
        metrics["kl_ref"] = mean_over(k3, counted)
    per_sequence = torch.where(counted, losses, 0.0).sum(1)
    if average == "sequence":
        per_sequence = per_sequence / counted.sum(1).clamp(min=1)
    default = len(per_sequence) if average == "sequence" else int(counted.sum())
    return LossOutput.of(per_sequence, default, normalizer, metrics)


def _policy(
    logps: Tensor,
    behaviour_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip: float,
    proximal_logps: Tensor | None,
) -> tuple[Surrogate, dict[str, Tensor]]:
    policy = per_token("logps", logps, mask)
    behaviour = per_token("behaviour_logps", behaviour_logps.detach(), mask)
    proximal = None
    if proximal_logps is not None:
        proximal = per_token("proximal_logps", proximal_logps.detach(), mask)
    surrogate = clipped_surrogate(policy, behaviour, advantages, clip, proximal)
    metrics = {**surrogate.metrics(mask), "approx_kl": drift(policy, behaviour, mask)}
    return surrogate, metrics


def _group_relative(groups: Groups, scale: bool) -> Tensor:
    table, count = groups.centred(groups.scores)
    centred = torch.where(groups.present, table - table.sum(1, keepdim=True) / count.clamp(1), 0.0)
    if scale:
        variance = centred.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)
        centred = centred / (variance.sqrt() + 1e-4)
    return groups.per_completion(torch.where(count >= 2, centred, 0.0))
