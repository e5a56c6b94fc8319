"""Drawing one token per row, with noise that is a function of seed, step and token alone.

The noise is counter-based: no generator has a state, so it is the same whatever rows stand beside
each other, in which order, and on which device. Tokens are drawn by the Gumbel-max rule
(argmax of log-probability plus Gumbel noise), because a rounding error of size e in the logits then
changes a draw with a chance of about e; walking along a cumulative sum, the chance would grow with
the size of the vocabulary.
"""

from __future__ import annotations

import torch

# Constants of SplitMix64: Steele, Lea and Flood, "Fast splittable pseudorandom number generators",
# OOPSLA 2014; the mixer is Stafford's variant 13.
_GAMMA = 0x9E3779B97F4A7C15
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


def _signed(word: int) -> int:
    """The int64 with the bits of a 64-bit word."""
    return word - 2**64 if word >= 2**63 else word


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Right shift that brings in zeros; torch's own repeats the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: torch.Tensor) -> torch.Tensor:
    for bits, factor in _MIX:
        x = (x ^ _shift(x, bits)) * _signed(factor)
    return x ^ _shift(x, 31)


def uniform(seeds: torch.Tensor, step: int, size: int) -> torch.Tensor:
    """Uniform numbers of the streams of ``seeds`` at one step.

    Args:
        seeds: (rows,) int64.
        step: number of the token in its answer, from 0.
        size: how many numbers per row.

    Returns:
        (rows, size) float64, strictly between 0 and 1, on the device of ``seeds``.
    """
    gamma = _signed(_GAMMA)
    stream = _mix(_mix(seeds * gamma + gamma) + _signed((step + 1) * _GAMMA % 2**64))
    tokens = torch.arange(1, size + 1, device=seeds.device)
    bits = _shift(_mix(stream[:, None] + tokens * gamma), 11)
    # 52 of the 53 bits: with all of them the largest number would be rounded to 1.
    return ((bits >> 1).to(torch.float64) + 0.5) * 2.0**-52


def allowed(scores: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Which tokens ``top_k`` and then ``top_p`` leave; of equal scores, lower ids come first.

    Args:
        scores: (rows, vocabulary), log-probabilities or logits after temperature.
        top_k: (rows,) int64; 0 keeps all.
        top_p: (rows,) floating; 1 keeps all. The kept set is the smallest of the most probable
            tokens whose share of what ``top_k`` left is at least ``top_p``; it is never empty.

    Returns:
        (rows, vocabulary) bool.
    """
    ordered, order = scores.double().sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(scores.shape[-1], device=scores.device)
    outside = (top_k[:, None] > 0) & (rank >= top_k[:, None])
    shares = ordered.masked_fill(outside, -torch.inf).softmax(-1)
    before = shares.cumsum(-1) - shares
    # The comparison alone would also drop tokens of share zero at top_p = 1.
    beyond = (before >= top_p[:, None].double()) & (top_p[:, None] < 1)
    kept = ~(outside | beyond)
    kept[:, 0] = True
    return torch.zeros_like(kept).scatter(-1, order, kept)


def choose(
    logprobs: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    seeds: torch.Tensor,
    step: int,
) -> torch.Tensor:
    """Draw a token for each row.

    Args:
        logprobs: (rows, vocabulary) of the model.
        temperature: (rows,) float64; 0 takes the most probable token.
        top_k: (rows,) int64, as in :func:`allowed`.
        top_p: (rows,) float64, as in :func:`allowed`.
        seeds: (rows,) int64.
        step: number of the token in its answer.

    Returns:
        (rows,) int64 token ids.
    """
    greedy = temperature == 0
    if bool(greedy.all()):
        return logprobs.argmax(-1)
    scores = _reshaped(logprobs, temperature, top_k, top_p)
    noisy = scores - torch.log(-torch.log(uniform(seeds, step, scores.shape[-1])))
    return torch.where(greedy, logprobs.argmax(-1), noisy.argmax(-1))


def sampler_logprobs(
    logprobs: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
) -> torch.Tensor:
    """Log-probabilities of the distribution that :func:`choose` draws from.

    Args:
        logprobs: (rows, vocabulary) of the model.
        temperature: (rows,) float64; 0 leaves the model's distribution as it is.
        top_k: (rows,) int64, as in :func:`allowed`.
        top_p: (rows,) float64, as in :func:`allowed`.

    Returns:
        (rows, vocabulary) float64; minus infinity for what is cut.
    """
    return _reshaped(logprobs, temperature, top_k, top_p).log_softmax(-1)


def _reshaped(
    logprobs: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor
) -> torch.Tensor:
    """Divided by the temperature and cut, not renormalised, float64."""
    greedy = temperature == 0
    scores = logprobs.double() / torch.where(greedy, 1.0, temperature)[:, None]
    cut = ((top_k > 0) | (top_p < 1)) & ~greedy
    if bool(cut.any()):
        kept = allowed(scores[cut], top_k[cut], top_p[cut])
        scores[cut] = scores[cut].masked_fill(~kept, -torch.inf)
    return scores
