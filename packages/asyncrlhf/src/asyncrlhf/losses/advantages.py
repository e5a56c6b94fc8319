"""From scores to advantages of tokens: rewards with KL, GAE, whitening; all without gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from asyncrlhf.errors import InvalidInputError
from asyncrlhf.losses.inputs import at_least_float32, not_negative, per_token


def token_rewards(
    behaviour_logps: Tensor,
    ref_logps: Tensor,
    scores: Tensor,
    mask: Tensor,
    kl_coef: float = 0.05,
) -> Tensor:
    """Rewards −kl_coef (log π_b − log π_ref) at every token, with the score added at the last.

    Args:
        behaviour_logps: (n, L) of the sampler.
        ref_logps: (n, L) of the reference.
        scores: (n,); one of a completion without a token is not used and may be NaN.
        mask: (n, L) bool.
        kl_coef: price of one nat.

    Returns:
        (n, L), 0 outside the mask.

    Raises:
        InvalidInputError: shapes do not fit, or a score that is used is not finite.
    """
    not_negative("kl_coef", kl_coef)
    behaviour = per_token("behaviour_logps", behaviour_logps.detach(), mask)
    reference = per_token("ref_logps", ref_logps.detach(), mask)
    if scores.shape != mask.shape[:1]:
        raise InvalidInputError(
            f"scores: expected shape ({mask.shape[0]},), got {tuple(scores.shape)}"
        )
    scores = at_least_float32(scores.detach().to(mask.device))
    if not bool((scores.isfinite() | ~mask.any(1)).all()):
        raise InvalidInputError(
            "scores: expected finite numbers, got NaN or inf; exclude completions whose reward "
            "failed with mask & scores.isfinite()[:, None]"
        )
    after = mask.flip(1).cumsum(1).flip(1)
    is_last = mask & (after == 1)
    return -kl_coef * (behaviour - reference) + torch.where(is_last, scores[:, None], 0.0)


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates over the tokens of the mask.

        δ_t = r_t + γ V_{t+1} − V_t,   A_t = Σ_l (γ λ)^l δ_{t+l}

    V is 0 behind the last token: a completion that was cut off counts as ended, as in the
    reference code. Columns outside the mask are stepped over, also between tokens.

    Args:
        rewards: (n, L).
        values: (n, L), of the state before each token.
        mask: (n, L) bool.
        gamma: discount, 0 to 1.
        lam: λ, 0 to 1; 1 gives the return less the value.

    Returns:
        Advantages (n, L) and returns A + V, the critic's targets, (n, L); 0 outside the mask.

    Raises:
        InvalidInputError: shapes do not fit, or a factor is outside 0 to 1.

    Source: arXiv 1506.02438.
    """
    for name, factor in (("gamma", gamma), ("lam", lam)):
        if not 0 <= factor <= 1:
            raise InvalidInputError(f"{name}: expected a number from 0 to 1, got {factor}")
    r = per_token("rewards", rewards.detach(), mask)
    v = per_token("values", values.detach(), mask)
    columns = []
    next_value = torch.zeros_like(r[:, 0] + v[:, 0])
    advantage = torch.zeros_like(next_value)
    for t in reversed(range(r.shape[1])):
        inside = mask[:, t]
        delta = r[:, t] + gamma * next_value - v[:, t]
        advantage = torch.where(inside, delta + gamma * lam * advantage, advantage)
        next_value = torch.where(inside, v[:, t], next_value)
        columns.append(advantage)
    advantages = torch.where(mask, torch.stack(columns[::-1], 1), 0.0)
    return advantages, advantages + v


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Less the mean, over the (unbiased) standard deviation, of the tokens in the mask.

    Whiten the whole minibatch before it is cut into micro-batches. Equal numbers become exact
    zeros, and so does one alone.

    Args:
        x: (n, L).
        mask: (n, L) bool.

    Returns:
        (n, L), 0 outside the mask.

    Raises:
        InvalidInputError: shapes do not fit.
    """
    x = per_token("x", x.detach(), mask)
    if not bool(mask.any()):
        return x
    x = torch.where(mask, x - x[mask].min(), 0.0)
    count = mask.sum()
    centred = torch.where(mask, x - x.sum() / count, 0.0)
    variance = centred.square().sum() / (count - 1).clamp(min=1)
    return centred * torch.rsqrt(variance + 1e-8)
