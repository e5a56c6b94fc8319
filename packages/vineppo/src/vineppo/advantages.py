"""From values and rewards to advantages: of reasoning steps, of tokens, and of whole answers.

With S steps there are S + 1 states s_0 .. s_S. Step i leads from s_i to s_{i+1}; ``values[i]`` is
that of s_i, before the step, and the last state, the complete answer, has value 0, because its
score is the reward of the last step (as in Eq. 6 of arXiv 2410.01679):

    state    s_0 ──step 0──▶ s_1 ──step 1──▶ … ──step S−1──▶ s_S
    value    V_0             V_1                              0
    reward          0               0               R

Advantages of steps and of answers are NumPy arrays in float64, those of tokens of a padded batch
are tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vineppo.errors import InvalidInputError, at_least, fraction, one_of
from vineppo.masks import check_finite, on_mask

Floats = npt.NDArray[np.float64]
Whitening = Literal["batch", "std"] | None

WHITENINGS: Final[tuple[Whitening, ...]] = ("batch", "std", None)


class TokenAdvantages(NamedTuple):
    """What :func:`gae` gives.

    Attributes:
        advantages: (B, T), for the policy.
        returns: (B, T), advantages + values, the targets of the critic.
    """

    advantages: Tensor
    returns: Tensor


def step_rewards(score: float, steps: int) -> Floats:
    """Rewards of the steps of one answer: its score at the last, 0 before.

    Args:
        score: R(x; y) of the complete answer; finite.
        steps: S, at least 1.

    Returns:
        (S,).

    Raises:
        InvalidInputError: no step, or a score that is not finite.
    """
    if steps < 1:
        raise InvalidInputError(
            f"steps: expected at least 1, got {steps}; an empty answer has no step to reward, "
            "leave it out"
        )
    if not np.isfinite(score):
        raise InvalidInputError(f"score: expected a finite number, got {score}")
    rewards = np.zeros(steps)
    rewards[-1] = score
    return rewards


def step_advantages(
    values: npt.ArrayLike, rewards: npt.ArrayLike, gamma: float = 1.0, lam: float = 0.0
) -> Floats:
    """Advantages of the steps of one answer, by GAE over the values of their states.

        δ_i = r_i + γ V_{i+1} − V_i,   A_i = δ_i + γ λ A_{i+1},   V_S = 0

    λ=0 is Eq. 6 of arXiv 2410.01679, which with γ=1 telescopes: Σ_i A_i = R − V_0. λ=1 with γ=1
    is the return less the value, A_i = R − V_i.

    NaN stands for a state without an estimate, as beyond the paper's step cap. It is filled
    backwards from the trajectory itself, V_i = r_i + γ V_{i+1}, so that its step has δ_i = 0 and
    the last step before the cap answers for all that follows: R − V_i. The sum still telescopes.
    The steps beyond the cap learn nothing at λ=0, so the policy gradient is without bias only
    where no answer reaches the cap. With no estimate at all, every advantage is 0.

    Args:
        values: (S,) of the states before each step, NaN where there is none.
        rewards: (S,), see :func:`step_rewards`.
        gamma: discount per step, 0 to 1.
        lam: λ, 0 to 1.

    Returns:
        (S,).

    Raises:
        InvalidInputError: shapes differ or are empty, a reward is not finite, a value is inf, or a
            factor is outside 0 to 1.
    """
    fraction("gamma", gamma)
    fraction("lam", lam)
    v, r = np.array(values, dtype=np.float64), np.asarray(rewards, dtype=np.float64)
    if v.ndim != 1 or v.shape != r.shape or not len(v):
        raise InvalidInputError(
            f"values, rewards: expected the same shape (S,), S at least 1, got {v.shape} and "
            f"{r.shape}; the value of the last state is 0 and not passed"
        )
    _finite("rewards", r)
    if np.isinf(v).any():
        raise InvalidInputError(
            f"values: expected finite numbers, or NaN for no estimate, got "
            f"{v[np.isinf(v)][0]} at {int(np.isinf(v).argmax())}"
        )
    advantages = np.empty_like(v)
    next_value, next_advantage = 0.0, 0.0
    for i in reversed(range(len(v))):
        target = r[i] + gamma * next_value
        value = target if np.isnan(v[i]) else v[i]
        next_advantage = target - value + gamma * lam * next_advantage
        next_value = value
        advantages[i] = next_advantage
    return advantages


def to_token_advantages(step_advantages: npt.ArrayLike, borders: npt.ArrayLike) -> Floats:
    """Give each token the advantage of its step; all tokens of a step share it.

    Args:
        step_advantages: (S,).
        borders: (S + 1,) integers, the token at which each step starts, and last the number of
            tokens T, as :func:`vineppo.borders.token_borders` gives them.

    Returns:
        (T,).

    Raises:
        InvalidInputError: not one step between each two borders, or borders that do not start at 0
            and strictly increase.
    """
    steps, cuts = np.asarray(step_advantages, dtype=np.float64), np.asarray(borders)
    if steps.ndim != 1 or cuts.shape != (len(steps) + 1,):
        raise InvalidInputError(
            f"borders: expected one more than the steps, shape {steps.shape} and one, got "
            f"{cuts.shape}"
        )
    if not np.issubdtype(cuts.dtype, np.integer) or cuts[0] != 0 or (np.diff(cuts) < 1).any():
        raise InvalidInputError(
            f"borders: expected integers that start at 0 and strictly increase, got {cuts.tolist()}"
        )
    return np.repeat(steps, np.diff(cuts))


def gae(
    values: Tensor, rewards: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 1.0
) -> TokenAdvantages:
    """Generalised advantage estimates over the tokens of each answer, for a critic.

        δ_t = r_t + γ V_{t+1} − V_t,   A_t = δ_t + γ λ A_{t+1}

    ``values[b, t]`` is that of the state *before* token t, so for a head that reads a causal model
    it is the output at the token to the left. Behind the last token of an answer the value is 0,
    also where the answer was cut by length: the reference scores such an answer 0 and bootstraps
    nothing from where it stood. Places outside the mask are stepped over, also between tokens.
    λ=1 with γ=1 is the paper's setting and gives A_t = G_t − V_t.

    Args:
        values: (B, T), of the state before each token; no gradient flows through them.
        rewards: (B, T), 0 but for the score at the last token of each answer.
        mask: (B, T) bool, the tokens of the answers.
        gamma: discount per token, 0 to 1.
        lam: λ, 0 to 1.

    Returns:
        Advantages and returns, 0 outside the mask.

    Raises:
        InvalidInputError: shapes differ, or a factor is outside 0 to 1.
        NotFiniteError: a value or reward under the mask is not finite.

    Source: arXiv 1506.02438.
    """
    fraction("gamma", gamma)
    fraction("lam", lam)
    v, r = on_mask("values", values.detach(), mask), on_mask("rewards", rewards.detach(), mask)
    check_finite(mask, values=v, rewards=r)
    advantages = torch.zeros_like(v + r)
    advantage = torch.zeros_like(advantages[:, :1])
    next_value = torch.zeros_like(advantage)
    for t in reversed(range(mask.shape[1])):
        here, before = mask[:, t : t + 1], v[:, t : t + 1]
        delta = r[:, t : t + 1] + gamma * next_value - before
        advantage = torch.where(here, delta + gamma * lam * advantage, advantage)
        next_value = torch.where(here, before, next_value)
        advantages[:, t : t + 1] = torch.where(here, advantage, 0.0)
    return TokenAdvantages(advantages, advantages + v)


def rloo(rewards: npt.ArrayLike, groups: npt.ArrayLike) -> Floats:
    """Leave-one-out advantages of whole answers, R_i − mean of the others in the group.

    They sum to 0 in each group, and equal rewards give exact zeros.

    Args:
        rewards: (N,).
        groups: (N,) integers, equal for answers to the same prompt, in any order.

    Returns:
        (N,).

    Raises:
        InvalidInputError: shapes differ, a reward is not finite, or a group has one member.

    Source: arXiv 2402.14740.
    """
    centred, group, counts = _centred(rewards, groups, "RLOO")
    size = counts[group]
    return centred * (size / (size - 1))


def grpo(
    rewards: npt.ArrayLike, groups: npt.ArrayLike, eps: float = 1e-4, *, scale: bool = True
) -> Floats:
    """Group-relative advantages of whole answers, (R_i − mean) / (std + eps) of the group.

    The standard deviation is the unbiased one (divided by G − 1), as in TRL; the paper of GRPO
    leaves it open, and the biased one makes advantages larger by √(G / (G − 1)). A group of
    equal rewards gets zeros, whatever ``eps``.

    Args:
        rewards: (N,).
        groups: (N,) integers, equal for answers to the same prompt, in any order.
        eps: added to the standard deviation, from 0.
        scale: False only centres, which leaves out the weight that ``std`` gives to prompts that
            are almost always or almost never solved.

    Returns:
        (N,).

    Raises:
        InvalidInputError: shapes differ, a reward is not finite, or a group has one member, whose
            advantage would always be 0.

    Source: arXiv 2402.03300; without scale arXiv 2503.20783.
    """
    at_least("eps", eps, 0.0)
    centred, group, counts = _centred(rewards, groups, "GRPO")
    if not scale:
        return centred
    variance = np.bincount(group, centred**2, len(counts)) / (counts - 1)
    divisor = np.where(variance > 0, np.sqrt(variance) + eps, 1.0)
    return centred / divisor[group]


def whiten(
    advantages: Tensor,
    mask: Tensor,
    mode: Whitening = "batch",
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Bring the advantages of a mini-batch to a common scale, over all its response tokens.

    "batch" subtracts the mean and multiplies by rsqrt(var + 1e-8); "std" only multiplies; None
    leaves them as they are. The variance is the unbiased one, about the mean, in both. Whiten the
    whole mini-batch before it is cut into micro-batches. All but None give up the exact
    unbiasedness of the policy gradient.

    Mean and variance are taken in two passes in float64, so that a large common part costs no
    digits. With fewer than two tokens, or where all are equal, there is no scale: "batch" gives 0
    and "std" leaves them as they are.

    Args:
        advantages: (B, T).
        mask: (B, T) bool; a rank may hold no token.
        mode: see above.
        reduce: sums a float64 tensor over all ranks; called twice (not at all for None) with a
            shape that is the same everywhere. None for a single process.

    Returns:
        (B, T), 0 outside the mask.

    Raises:
        InvalidInputError: shapes differ, or the mode is unknown.
        NotFiniteError: an advantage under the mask is not finite. One rank that raises leaves the
            others waiting in ``reduce``, as any collective does.

    Source: the reference code of arXiv 2410.01679; "std" is its variant without centring.
    """
    one_of("mode", mode, WHITENINGS)
    x = on_mask("advantages", advantages.detach(), mask)
    check_finite(mask, advantages=x)
    if mode is None:
        return x
    total = reduce or (lambda sums: sums)
    exact = x.double()
    count, summed = total(torch.stack([mask.sum().double(), exact.sum()])).unbind()
    mean = summed / count.clamp(min=1)
    centred = torch.where(mask, exact - mean, 0.0)
    variance = total(centred.square().sum()[None])[0] / (count - 1).clamp(min=1)
    # Below this, what is left of the variance is the rounding of the mean.
    equal = variance <= (1e-12 * mean).square()
    scale = torch.rsqrt(variance + 1e-8)
    if mode == "batch":
        whitened = torch.where(equal, 0.0, centred * scale)
    else:
        whitened = torch.where(equal, exact, exact * scale)
    return whitened.to(x.dtype)


def _centred(
    rewards: npt.ArrayLike, groups: npt.ArrayLike, method: str
) -> tuple[Floats, npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Rewards less the mean of their group; the group of each; the size of each group."""
    r, ids = np.asarray(rewards, dtype=np.float64), np.asarray(groups)
    if r.ndim != 1 or r.shape != ids.shape:
        raise InvalidInputError(
            f"rewards, groups: expected the same shape (N,), got {r.shape} and {ids.shape}"
        )
    if len(r) and not np.issubdtype(ids.dtype, np.integer):
        raise InvalidInputError(f"groups: expected integers, got {ids.dtype}")
    _finite("rewards", r)
    found, group, counts = np.unique(ids, return_inverse=True, return_counts=True)
    if (counts < 2).any():
        raise InvalidInputError(
            f"groups: expected at least 2 answers per prompt for {method}, got 1 in group "
            f"{found[counts.argmin()]}; set num_generations to 2 or more"
        )
    # Less the smallest first: equal rewards become exact zeros, and a common part costs no digits.
    least = np.full(len(found), np.inf)
    np.minimum.at(least, group, r)
    above = r - least[group]
    mean = np.bincount(group, above, len(found)) / counts
    return above - mean[group], group, counts


def _finite(name: str, x: Floats) -> None:
    bad = ~np.isfinite(x)
    if bad.any():
        raise InvalidInputError(
            f"{name}: expected finite numbers, got {x[bad][0]} at {int(bad.argmax())}"
        )
