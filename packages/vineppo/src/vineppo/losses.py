"""Losses as pure functions of what models and samplers give per token.

Each gives a :class:`LossOutput`, whose ``loss`` is a sum over tokens or answers, divided by how
many there are. Pass ``denominator``, the number in the *whole* mini-batch over all ranks
(:func:`count_for` gives a part's share of it), and the losses of micro-batches and ranks sum to
that of the whole, as do their gradients. Where a wrapper averages gradients over ranks, as DDP
does, multiply the loss by their number.

Places outside a mask may hold anything, inf and NaN included. They change neither loss nor
gradient. Numbers under the mask that are not finite raise, at the price named in
:func:`vineppo.masks.check_finite`. All arithmetic is in float32, or float64 if an input is.
"""

from __future__ import annotations

from typing import Final, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from vineppo.errors import InvalidInputError, at_least, one_of, positive
from vineppo.masks import check_finite, on_mask
from vineppo.reductions import (
    REDUCTIONS,
    LossOutput,
    Reduction,
    count_for,
    masked_mean,
    reduced,
)

__all__ = [
    "KL_KINDS",
    "REDUCTIONS",
    "KLKind",
    "LossOutput",
    "Reduction",
    "count_for",
    "dpo_positive_loss",
    "kl_estimate",
    "kl_loss",
    "ppo_clip_loss",
    "ratio_guard",
    "sequence_logprobs",
    "sft_loss",
    "value_clip_loss",
]

KLKind = Literal["k1", "k2", "k3"]

KL_KINDS: Final[tuple[KLKind, ...]] = ("k1", "k2", "k3")

_LARGEST_LOG_RATIO: Final = 20.0  # 5e8, fifty million times what the ratio guard lets pass
_LARGEST_EXPONENT: Final = 60.0  # 1e26, whose sums over tokens are still finite in float32


def ppo_clip_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_range: float = 0.2,
    *,
    reduction: Reduction = "token",
    denominator: float | None = None,
) -> LossOutput:
    """The clipped surrogate: max(−A ρ, −A clip(ρ, 1 − ε, 1 + ε)), ρ = exp(logprobs − old_logprobs).

    Reductions, each over the whole of what ``denominator`` counts:

    - "token": mean over all tokens, as in the reference. Long answers weigh more.
    - "sequence": mean over answers of the mean over their tokens.
    - "sequence_sum": mean over answers of the sum over their tokens. With ρ = 1 its gradient is
      that of the policy gradient theorem, −(1/B) Σ_b Σ_t A ∇log π; the other two rescale it by
      lengths, which are random, and so bias it.

    A row without a token counts nowhere. Log-ratios are bounded by 20 from above: no ratio
    overflows, and the gradient beyond is 0. (In the reference it overflows to inf, and inf times
    the zero of its ratio guard is NaN.)

    Args:
        logprobs: (B, T) of the policy that learns, with gradient.
        old_logprobs: (B, T) of the policy that sampled, computed as ``logprobs`` are, with the same
            temperature; no gradient.
        advantages: (B, T), no gradient.
        mask: (B, T) bool, the response tokens; EOS belongs to them if the answer is finished.
        clip_range: ε.
        reduction: see above.
        denominator: tokens ("token") or rows with a token (otherwise) of the whole mini-batch; None
            takes those here.

    Returns:
        The loss; ``stats`` are ratio, ratio_max, clip_fraction (share of tokens whose gradient
        the clipping stops) and approx_kl (mean of ρ − 1 − log ρ, nats per token).

    Raises:
        InvalidInputError: shapes differ, an unknown reduction, or a number out of its range.
        NotFiniteError: a number under the mask is not finite.

    Source: arXiv 1707.06347; reductions and defaults as the reference code of arXiv 2410.01679.
    """
    positive("clip_range", clip_range)
    new, old = on_mask("logprobs", logprobs, mask), on_mask("old_logprobs", old_logprobs, mask)
    advantage = on_mask("advantages", advantages, mask).detach()
    check_finite(mask, logprobs=new, old_logprobs=old, advantages=advantage)
    log_ratio = (new - old.detach()).clamp(max=_LARGEST_LOG_RATIO)
    ratio = log_ratio.exp()
    unclipped = -advantage * ratio
    clipped = -advantage * ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = reduced(torch.maximum(unclipped, clipped), mask, reduction, denominator)
    with torch.no_grad():
        stats = {
            "ratio": masked_mean(torch.where(mask, ratio, 0.0), mask),
            # With a 0 behind, as there may be no token at all.
            "ratio_max": F.pad(torch.where(mask, ratio, 0.0).flatten(), (0, 1)).max(),
            "clip_fraction": masked_mean(clipped > unclipped, mask),
            "approx_kl": masked_mean(torch.expm1(log_ratio) - log_ratio, mask),
        }
    return LossOutput(loss, stats)


def ratio_guard(mean_ratio: Tensor, limit: float = 10.0) -> Tensor:
    """1, or 0 for a micro-batch whose mean ratio exceeds the limit: its loss is multiplied by it.

    The optimiser still steps, as in the reference. The guard looks at micro-batches one by one, so
    where it acts, losses of micro-batches no longer sum to that of the whole.

    Args:
        mean_ratio: (), or (2,), the sum and count in ``stats["ratio"]``.
        limit: largest mean ratio that counts.

    Returns:
        (), without gradient.

    Source: the reference code of arXiv 2410.01679.
    """
    positive("limit", limit)
    return (mean_ratio.detach() <= limit).to(mean_ratio.dtype)


def value_clip_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    clip_range: float = 0.2,
    *,
    denominator: float | None = None,
) -> LossOutput:
    """The critic's loss, ½ mean of max((V − G)², (clip(V, V_old ± ε) − G)²) over tokens.

    Args:
        values: (B, T) of the critic that learns, with gradient.
        old_values: (B, T) at the time of sampling.
        returns: (B, T), :attr:`vineppo.advantages.TokenAdvantages.returns`.
        mask: (B, T) bool.
        clip_range: ε; inf turns clipping off.
        denominator: tokens of the whole mini-batch; None takes those here.

    Returns:
        The loss; ``stats`` are value_mean, value_error (mean |V − G|) and value_clip_fraction
        (share of tokens whose gradient the clipping stops).

    Raises:
        InvalidInputError: shapes differ or a number is out of its range.
        NotFiniteError: a number under the mask is not finite.

    Source: the reference code of arXiv 2410.01679.
    """
    positive("clip_range", clip_range)
    v, target = on_mask("values", values, mask), on_mask("returns", returns, mask).detach()
    old = on_mask("old_values", old_values, mask).detach()
    check_finite(mask, values=v, old_values=old, returns=target)
    unclipped = (v - target).square()
    bounded = v.clamp(old - clip_range, old + clip_range)
    clipped = (bounded - target).square()
    loss = reduced(0.5 * torch.maximum(unclipped, clipped), mask, "token", denominator)
    with torch.no_grad():
        stats = {
            "value_mean": masked_mean(v, mask),
            "value_error": masked_mean((v - target).abs(), mask),
            "value_clip_fraction": masked_mean(clipped > unclipped, mask),
        }
    return LossOutput(loss, stats)


def kl_estimate(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    kind: KLKind = "k3",
    clamp: float = 10.0,
    *,
    mask: Tensor | None = None,
) -> Tensor:
    """Estimates of KL(π ‖ π_ref) from each token that π sampled. With d = ref_logprobs − logprobs:

        k1 = −d,   k2 = d² / 2,   k3 = exp(d) − d − 1

    k1 and k3 are unbiased, k2 and k3 are never negative, and k3 is the paper's. Values above
    ``clamp`` are set to it and lose their gradient. k1 has no lower bound: under samples of π,
    k1 < −c happens with probability below exp(−c), so there is no tail to cut, and a floor would
    only lift the mean.

    What they do as a *loss*, differentiated through ``logprobs`` at samples of π:

    - k1: E[∇k1] = E[∇log π] = 0. It only adds noise; it belongs into rewards, not into a loss.
    - k2: E[∇k2] = E[−d ∇log π] = ∇KL(π ‖ π_ref) of the token's distribution.
    - k3: E[∇k3] = E[(1 − exp(d)) ∇log π] = ∇KL(π_ref ‖ π), the other direction; both agree near
      π = π_ref.

    Args:
        logprobs: any shape, of the policy.
        ref_logprobs: the same shape, of the reference at the same temperature; no gradient.
        kind: see above.
        clamp: upper bound in nats; inf for none. The exponent is bounded by 60 in any case.
        mask: (B, T) bool for log-probabilities of (B, T). Outside it estimate and gradient are 0,
            whatever stands there, and inside it numbers are checked. Without one, what is not
            finite stays so, in the gradient too.

    Returns:
        The same shape.

    Raises:
        InvalidInputError: shapes differ, an unknown kind, or ``clamp`` is not above 0.
        NotFiniteError: a log-probability under the mask is not finite.

    Source: Eq. 1 and the reference code of arXiv 2410.01679; joschu.net/blog/kl-approx.html.
    """
    one_of("kind", kind, KL_KINDS)
    positive("clamp", clamp)
    if logprobs.shape != ref_logprobs.shape:
        raise InvalidInputError(
            f"logprobs, ref_logprobs: expected the same shape, got {tuple(logprobs.shape)} and "
            f"{tuple(ref_logprobs.shape)}"
        )
    if mask is not None:
        logprobs = on_mask("logprobs", logprobs, mask)
        ref_logprobs = on_mask("ref_logprobs", ref_logprobs, mask)
        check_finite(mask, logprobs=logprobs, ref_logprobs=ref_logprobs)
    dtype = torch.promote_types(logprobs.dtype, torch.float32)
    d = ref_logprobs.detach().to(dtype) - logprobs.to(dtype)
    if kind == "k1":
        estimate = -d
    elif kind == "k2":
        estimate = d.square() / 2
    else:
        # Unbounded, exp overflows to inf, and the clamp's zero times that is a NaN gradient.
        d = d.clamp(max=_LARGEST_EXPONENT)
        estimate = torch.expm1(d) - d
    return estimate.clamp(max=clamp)


def kl_loss(
    estimates: Tensor,
    mask: Tensor,
    *,
    reduction: Reduction = "sequence_sum",
    denominator: float | None = None,
) -> Tensor:
    """Divergence from the reference as a term of the loss, before it is multiplied by β.

    The paper's code sums it over the tokens of an answer and averages over answers, whereas its
    policy term is a mean over tokens: the longer the answers, the stronger a given β. "token" puts
    both on one scale.

    Args:
        estimates: (B, T), :func:`kl_estimate` of kind k2 or k3; k1 has no gradient on average.
        mask: (B, T) bool, the response tokens.
        reduction: see :func:`ppo_clip_loss`.
        denominator: see :func:`ppo_clip_loss`.

    Returns:
        (), with gradient.

    Raises:
        InvalidInputError: shapes differ, an unknown reduction, or a denominator not above 0.
        NotFiniteError: an estimate under the mask is not finite.
    """
    found = on_mask("estimates", estimates, mask)
    check_finite(mask, estimates=found)
    return reduced(found, mask, reduction, denominator)


def sequence_logprobs(logprobs: Tensor, mask: Tensor) -> Tensor:
    """Log-probability of each answer: the sum over its tokens, (B, T) to (B,)."""
    return on_mask("logprobs", logprobs, mask).sum(1)


def dpo_positive_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float = 0.1,
    lam: float = 50.0,
    *,
    denominator: float | None = None,
) -> LossOutput:
    """DPO-Positive (DPO+): DPO that does not let the chosen answer become less likely.

        −log σ(β [(w − w_ref) − (l − l_ref) − λ max(0, w_ref − w)])

    with w and l the log-probabilities of whole answers, chosen and rejected. λ=0 is DPO; at
    π = π_ref the loss is log 2. There the penalty has a kink, and its gradient is taken to be 0.

    Args:
        chosen: (N,) of the policy, with gradient; see :func:`sequence_logprobs`.
        rejected: (N,) of the policy, with gradient.
        ref_chosen: (N,) of the reference.
        ref_rejected: (N,) of the reference.
        beta: β; 0.1 for MATH and 0.3 for GSM8K in the reference.
        lam: λ.
        denominator: pairs of the whole mini-batch; None takes those here.

    Returns:
        The loss; ``stats`` are margin (mean of β [(w − w_ref) − (l − l_ref)]), accuracy (share of
        pairs where it is above 0; ties count half) and penalised (share where w < w_ref).

    Raises:
        InvalidInputError: shapes differ, or a number is out of its range.
        NotFiniteError: a log-probability is not finite.

    Source: arXiv 2402.13228, as used by arXiv 2410.01679.
    """
    positive("beta", beta)
    at_least("lam", lam, 0.0)
    shapes = [tuple(x.shape) for x in (chosen, rejected, ref_chosen, ref_rejected)]
    if chosen.ndim != 1 or len(set(shapes)) > 1:
        raise InvalidInputError(
            "chosen, rejected, ref_chosen, ref_rejected: expected the same shape (N,), got "
            f"{', '.join(map(str, shapes))}; sum over tokens with sequence_logprobs"
        )
    pairs = torch.ones_like(chosen, dtype=torch.bool)
    check_finite(
        pairs, chosen=chosen, rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected
    )
    dtype = torch.promote_types(chosen.dtype, torch.float32)
    gain = chosen.to(dtype) - ref_chosen.detach().to(dtype)
    margin = beta * (gain - (rejected.to(dtype) - ref_rejected.detach().to(dtype)))
    losses = -F.logsigmoid(margin - beta * lam * F.relu(-gain))
    with torch.no_grad():
        stats = {
            "margin": masked_mean(margin, pairs),
            "accuracy": masked_mean((margin.sign() + 1) / 2, pairs),
            "penalised": masked_mean(gain < 0, pairs),
        }
    return LossOutput(reduced(losses[:, None], pairs[:, None], "token", denominator), stats)


def sft_loss(
    logprobs: Tensor,
    mask: Tensor,
    *,
    reduction: Reduction = "token",
    denominator: float | None = None,
) -> LossOutput:
    """Negative log-likelihood of given answers.

    "token" is the mean over all tokens; "sequence" the mean over answers of token means, as in the
    reference's fine-tuning before RL.

    Args:
        logprobs: (B, T) of the policy, with gradient.
        mask: (B, T) bool, the tokens to learn.
        reduction: see :func:`ppo_clip_loss`.
        denominator: see :func:`ppo_clip_loss`.

    Returns:
        The loss; ``stats`` has nll, nats per token.

    Raises:
        InvalidInputError: shapes differ, an unknown reduction, or a denominator not above 0.
        NotFiniteError: a log-probability under the mask is not finite.
    """
    new = on_mask("logprobs", logprobs, mask)
    check_finite(mask, logprobs=new)
    return LossOutput(reduced(-new, mask, reduction, denominator), {"nll": masked_mean(-new, mask)})
