"""Losses that look only at the best and the worst completion of a prompt.

No log-probability of the sampler enters, so they take stale completions as they are. Of completions
with equal scores the first in the batch is taken.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from asyncrlhf.errors import InvalidInputError
from asyncrlhf.losses.inputs import Groups, grouped, per_sequence, positive
from asyncrlhf.losses.output import LossOutput, mean_over

Ties = Literal["drop", "keep"]


def online_dpo(
    logps: Tensor,
    ref_logps: Tensor,
    scores: Tensor,
    group_ids: Tensor,
    beta: float = 0.1,
    ties: Ties = "drop",
    mask: Tensor | None = None,
    normalizer: float | None = None,
    *,
    valid: Tensor | None = None,
) -> LossOutput:
    """Direct preference optimisation on the best and worst of K completions.

        d = (h⁺ − hr⁺) − (h⁻ − hr⁻),   loss = −log σ(β d)

    with h the log-probability of a completion under the policy and hr under the reference. At
    policy = reference the loss is ln 2 and its gradients are −β/2 and +β/2.

    Args:
        logps: (n,) of completions, or (n, L) of tokens, to be summed over the mask; with gradient.
        ref_logps: (n,) or (n, L).
        scores: (n,), higher is better.
        group_ids: (n,) integers, equal for completions of the same prompt; in any order.
        beta: how strongly the policy is held to the reference.
        ties: a group whose scores are all equal has no pair. ``"drop"``: it contributes 0. It stays
            in the normalizer, so ties make steps smaller. ``"keep"``: its first completion is
            compared with itself, which adds ln 2 to the loss and nothing to the gradient.
        mask: (n, L) bool; completions without a token in it are not paired.
        normalizer: what the sum is divided by; None is the number of groups.
        valid: (n,) bool, which completions may be paired, such as those whose score is finite. A
            group with fewer than two contributes 0.

    Returns:
        ``per_sequence`` has a pair's loss at its chosen completion. Metrics: ``margin`` (β d),
        ``accuracy`` (d > 0), ``reward_chosen``, ``reward_rejected`` (implicit, β (h − hr)),
        ``score_gap``, over pairs; ``ties_fraction`` and ``skipped_fraction`` (fewer than two to
        compare), over groups; ``kl_ref`` (h − hr), over usable completions.

    Raises:
        InvalidInputError: shapes do not fit, K=1, a score that is not finite, or an option out of
            range.

    Source: arXiv 2410.18252, with the loss of arXiv 2305.18290.
    """
    positive("beta", beta)
    groups, pairs = _pairs("online_dpo", logps, scores, group_ids, ties, mask, valid)
    gained = _gained(logps, ref_logps, mask, groups)
    d = gained[pairs.best] - gained[pairs.worst]
    return _pair_output(-logsigmoid(beta * d), d, beta, gained, pairs, groups, normalizer)


def ipo(
    logps: Tensor,
    ref_logps: Tensor,
    scores: Tensor,
    group_ids: Tensor,
    beta: float = 0.1,
    ties: Ties = "drop",
    mask: Tensor | None = None,
    normalizer: float | None = None,
    *,
    valid: Tensor | None = None,
) -> LossOutput:
    """Squared form of :func:`online_dpo`: loss = (d − 1/(2β))².

    Arguments, result and errors are those of :func:`online_dpo`; with ``ties="keep"`` a tied group
    adds 1/(4β²). Source: arXiv 2310.12036.
    """
    positive("beta", beta)
    groups, pairs = _pairs("ipo", logps, scores, group_ids, ties, mask, valid)
    gained = _gained(logps, ref_logps, mask, groups)
    d = gained[pairs.best] - gained[pairs.worst]
    return _pair_output((d - 0.5 / beta).square(), d, beta, gained, pairs, groups, normalizer)


def best_of_k(
    logps: Tensor,
    scores: Tensor,
    group_ids: Tensor,
    mask: Tensor | None = None,
    ties: Ties = "drop",
    normalizer: float | None = None,
    *,
    valid: Tensor | None = None,
) -> LossOutput:
    """Supervised loss −h⁺ on the best of K completions, summed over its tokens.

    Args:
        logps: (n,) or (n, L), as in :func:`online_dpo`; so are all that follow.
        scores: (n,).
        group_ids: (n,) integers.
        mask: (n, L) bool.
        ties: ``"drop"``: a group whose scores are all equal contributes 0; ``"keep"``: its first
            completion is learnt.
        normalizer: what the sum is divided by; None is the number of groups.
        valid: (n,) bool.

    Returns:
        ``per_sequence`` has −h⁺ at the best completion. Metrics: ``nll_chosen``, ``nll_rejected``
        (−h of the worst), ``score_gap``, over pairs; ``ties_fraction``, ``skipped_fraction``.

    Raises:
        InvalidInputError: as in :func:`online_dpo`.

    Source: the best-of-2 baseline of arXiv 2410.18252.
    """
    groups, pairs = _pairs("best_of_k", logps, scores, group_ids, ties, mask, valid)
    h = per_sequence("logps", logps, mask, groups.usable)
    metrics = {
        "nll_chosen": mean_over(-h[pairs.best], pairs.used),
        "nll_rejected": mean_over(-h[pairs.worst], pairs.used),
        **pairs.metrics,
    }
    placed = _at_best(-h[pairs.best], pairs, groups)
    return LossOutput.of(placed, len(groups), normalizer, metrics)


class _Pairs(NamedTuple):
    """Per group: the best and the worst completion, and whether the pair counts."""

    best: Tensor
    worst: Tensor
    used: Tensor
    metrics: dict[str, Tensor]


def _pairs(
    loss: str,
    logps: Tensor,
    scores: Tensor,
    group_ids: Tensor,
    ties: Ties,
    mask: Tensor | None,
    valid: Tensor | None,
) -> tuple[Groups, _Pairs]:
    if ties not in get_args(Ties):
        raise InvalidInputError(f"ties: expected one of {', '.join(get_args(Ties))}, got {ties!r}")
    groups = grouped(loss, scores, group_ids, mask, valid, logps.device)
    high = groups.table(groups.scores, -torch.inf)
    low = groups.table(groups.scores, torch.inf)
    rows = torch.arange(len(groups), device=logps.device)
    best, worst = groups.members[rows, high.argmax(1)], groups.members[rows, low.argmin(1)]
    comparable = groups.present.sum(1) >= 2
    gap = groups.scores[best] - groups.scores[worst]
    tied = comparable & (gap == 0)
    used = comparable if ties == "keep" else comparable & ~tied
    everywhere = torch.ones_like(used)
    metrics = {
        "score_gap": mean_over(gap, used),
        "ties_fraction": mean_over(tied.to(gap), everywhere),
        "skipped_fraction": mean_over((~comparable).to(gap), everywhere),
    }
    return groups, _Pairs(best, worst, used, metrics)


def _gained(logps: Tensor, ref_logps: Tensor, mask: Tensor | None, groups: Groups) -> Tensor:
    """h − hr, (n,)."""
    h = per_sequence("logps", logps, mask, groups.usable)
    return h - per_sequence("ref_logps", ref_logps.detach(), mask, groups.usable)


def _pair_output(
    losses: Tensor,
    d: Tensor,
    beta: float,
    gained: Tensor,
    pairs: _Pairs,
    groups: Groups,
    normalizer: float | None,
) -> LossOutput:
    metrics = {
        "margin": mean_over(beta * d, pairs.used),
        "accuracy": mean_over((d > 0).to(d), pairs.used),
        "reward_chosen": mean_over(beta * gained[pairs.best], pairs.used),
        "reward_rejected": mean_over(beta * gained[pairs.worst], pairs.used),
        "kl_ref": mean_over(gained, groups.usable),
        **pairs.metrics,
    }
    return LossOutput.of(_at_best(losses, pairs, groups), len(groups), normalizer, metrics)


def _at_best(losses: Tensor, pairs: _Pairs, groups: Groups) -> Tensor:
    """Losses of groups, (groups,), as contributions of their best completions, (n,)."""
    counted = torch.where(pairs.used, losses, 0.0)
    return losses.new_zeros(len(groups.usable)).scatter(0, pairs.best, counted)
