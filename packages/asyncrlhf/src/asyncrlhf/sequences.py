"""Prompts and completions as tensors: padding, masks, log-probabilities, staleness, KL.

Prompts are padded on the left and completions on the right, so that the first token of every
completion stands in the same column. Masks come from lengths, never from the value of an id: the
padding id may be an ordinary token of the model, or the one that ends an answer.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from asyncrlhf.errors import InvalidInputError
from asyncrlhf.selective_log_softmax import selective_log_softmax

if TYPE_CHECKING:
    from asyncrlhf.engines.protocol import VersionSpan

LOG_RATIO_LIMIT = 20.0
"""Natural log-ratios are brought to ±20 before they are exponentiated; e^20 is about 4.9e8."""


@dataclass(frozen=True, eq=False)
class Batch:
    """n prompts (padded to P columns on the left) with their completions (to L on the right).

    Attributes:
        input_ids: (n, P + L) int64.
        attention_mask: (n, P + L) int64, 1 at tokens and 0 at padding.
        position_ids: (n, P + L) int64, from 0 at the first token of a prompt. Padding has the
            position of a token beside it, so that none is beyond what the model knows.
        completion_mask: (n, L) bool, True at tokens that were generated, up to and including the
            first that ends an answer; L is at least 1.
        has_eos: (n,) bool, whether a completion has such a token.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    completion_mask: Tensor
    has_eos: Tensor

    @property
    def completion_ids(self) -> Tensor:
        """(n, L) int64; padding outside ``completion_mask``."""
        return self.input_ids[:, -self.completion_mask.shape[1] :]

    @property
    def lengths(self) -> Tensor:
        """(n,) int64, the number of tokens in each completion."""
        return self.completion_mask.sum(1)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on a device."""
        return Batch(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})


def truncate_at_eos(ids: Sequence[int], eos_ids: Collection[int]) -> Sequence[int]:
    """The tokens up to and including the first that ends an answer; all if there is none."""
    for place, token in enumerate(ids):
        if token in eos_ids:
            return ids[: place + 1]
    return ids


def first_eos_mask(ids: Tensor, lengths: Tensor, eos_ids: Collection[int]) -> Tensor:
    """Which columns of right-padded completions count: up to and including the first EOS.

    Args:
        ids: (n, L) integers.
        lengths: (n,) integers, how many columns of each row are tokens; the rest is padding, even
            where it has the id of a token that ends an answer.
        eos_ids: the tokens that end an answer.

    Returns:
        (n, L) bool.
    """
    inside = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
    ends = torch.isin(ids, torch.tensor(sorted(eos_ids), dtype=ids.dtype, device=ids.device))
    ended_before = (ends & inside).cumsum(1) - (ends & inside).long() > 0
    return inside & ~ended_before


def pad_batch(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    pad_id: int,
    eos_ids: Collection[int] = (),
) -> Batch:
    """Tensors of prompts with their completions, truncated at the first EOS.

    Args:
        prompts: n rows of token ids, none of them empty.
        completions: as many rows; a row may be empty, then nothing of it is in the mask.
        pad_id: an id that the model's embedding has; it means nothing else.
        eos_ids: tokens that end an answer; by default nothing is truncated.

    Raises:
        InvalidInputError: no prompt, an empty one, or not one completion for each.
    """
    if not prompts:
        raise InvalidInputError("prompts: expected at least one, got none")
    if len(prompts) != len(completions):
        raise InvalidInputError(
            f"completions: expected one for each of {len(prompts)} prompts, got "
            f"{len(completions)}; repeat the prompt of each completion"
        )
    for row, prompt in enumerate(prompts):
        if not len(prompt):
            raise InvalidInputError(
                f"prompts: expected at least one token each, got none in row {row}; begin it with "
                "the tokenizer's BOS, so that there is something to predict from"
            )
    kept = [truncate_at_eos(completion, eos_ids) for completion in completions]
    left = max(map(len, prompts))
    right = max(1, *map(len, kept))
    input_ids = torch.full((len(prompts), left + right), pad_id)
    attention_mask = torch.zeros_like(input_ids)
    for row, (prompt, completion) in enumerate(zip(prompts, kept, strict=True)):
        columns = slice(left - len(prompt), left + len(completion))
        input_ids[row, columns] = torch.tensor([*prompt, *completion])
        attention_mask[row, columns] = 1
    return Batch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=(attention_mask.cumsum(1) - 1).clamp(min=0),
        completion_mask=attention_mask[:, left:].bool(),
        has_eos=torch.tensor([bool(len(row)) and row[-1] in eos_ids for row in kept]),
    )


def pad_values(values: Sequence[Sequence[float]], mask: Tensor) -> Tensor:
    """One number per token, such as an engine's log-probabilities, as a tensor.

    Args:
        values: n rows, each with at least as many numbers as its row of the mask has tokens;
            those of tokens behind the first EOS are left out.
        mask: ``completion_mask`` of the batch, (n, L).

    Returns:
        (n, L) float32 on the mask's device, 0 outside the mask.

    Raises:
        InvalidInputError: not n rows, or a row with fewer numbers than tokens.
    """
    lengths = mask.sum(1).tolist()
    if len(values) != len(lengths):
        raise InvalidInputError(f"values: expected {len(lengths)} rows, got {len(values)}")
    padded = torch.zeros(mask.shape)
    for row, (length, numbers) in enumerate(zip(lengths, values, strict=True)):
        if len(numbers) < length:
            raise InvalidInputError(
                f"values: expected a number for each of {length} tokens of row {row}, got "
                f"{len(numbers)}"
            )
        padded[row, :length] = torch.tensor(numbers[:length], dtype=torch.float32)
    return padded.to(mask.device)


def token_logps(model: Any, batch: Batch, temperature: float = 1.0) -> Tensor:
    """Log-probabilities of the completions' tokens, from one forward of the model.

    A row does not depend on the others, up to rounding. The softmax is taken in float32 (float64
    for a float64 model) by :func:`asyncrlhf.selective_log_softmax.selective_log_softmax`;
    differentiable once.

    Args:
        model: a causal language model of transformers, also one wrapped by PEFT or for training on
            several devices; it runs in the mode it is in.
        batch: on the model's device.
        temperature: what logits are divided by.

    Returns:
        (n, L) float32 or float64, natural logarithms; 0 outside ``completion_mask``.

    Raises:
        InvalidInputError: the temperature is not a positive number.
    """
    return _logps_and_entropy(model, batch, temperature, entropy=False)[0]


def token_logps_and_entropy(
    model: Any, batch: Batch, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """As :func:`token_logps`, and the entropy of the distribution that each token came from.

    Returns:
        Log-probabilities, (n, L), and entropies in nats, (n, L), without gradient; both 0 outside
        ``completion_mask``.
    """
    return _logps_and_entropy(model, batch, temperature, entropy=True)


def sequence_logps(logps: Tensor, mask: Tensor) -> Tensor:
    """Sum of log-probabilities over the mask: (n, L) and (n, L) bool to (n,)."""
    return torch.where(mask, logps, 0.0).sum(-1)


def bounded_exp(log_ratio: Tensor) -> Tensor:
    """e^x with x brought to ±:data:`LOG_RATIO_LIMIT` first; the gradient outside is 0."""
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def k3(log_ratio: Tensor) -> Tensor:
    """The estimator r − 1 − log r of KL(p || q) from a draw of p, with log r = log q − log p.

    It is never negative. A log-ratio above :data:`LOG_RATIO_LIMIT` is brought to it, and the
    gradient there is 0.
    """
    bounded = log_ratio.clamp(max=LOG_RATIO_LIMIT)
    return bounded.expm1() - bounded


@dataclass(frozen=True, eq=False)
class KLEstimates:
    """Estimates of KL(policy || reference) from tokens that the policy drew.

    Attributes:
        k1: (n, L), log π − log π_ref: unbiased, can be negative, varies much.
        k3: (n, L), π_ref/π − 1 − log(π_ref/π): unbiased, never negative, varies less.

    Both are 0 outside the mask. Their sums over a completion, averaged over completions, estimate
    the KL of whole sequences (for k3, the sum over positions of the KL of the next token). For
    tokens drawn by older weights they are biased.
    """

    k1: Tensor
    k3: Tensor

    @property
    def sequence_k1(self) -> Tensor:
        """(n,), the sum over each completion."""
        return self.k1.sum(-1)

    @property
    def sequence_k3(self) -> Tensor:
        """(n,), the sum over each completion."""
        return self.k3.sum(-1)


def kl_estimates(logps: Tensor, ref_logps: Tensor, mask: Tensor) -> KLEstimates:
    """Monte-Carlo estimates of the KL divergence from the reference, per token.

    Args:
        logps: (n, L) of the policy that drew the tokens.
        ref_logps: (n, L) of the reference.
        mask: (n, L) bool.
    """
    k1 = torch.where(mask, logps - ref_logps, 0.0)
    return KLEstimates(k1, k3(-k1))


def staleness(
    version_spans: Sequence[Sequence[VersionSpan]], lengths: Sequence[int], step: int
) -> Tensor:
    """How many optimizer steps lie between the oldest token of each completion and a step.

    Args:
        version_spans: which weights drew which tokens, for n completions.
        lengths: number of tokens in the loss, ``batch.lengths.tolist()``; tokens behind the first
            EOS do not count. A completion without any has staleness 0.
        step: number of optimizer steps that the weights to be updated have seen.

    Returns:
        (n,) int64.

    Raises:
        InvalidInputError: spans do not cover the tokens, or a version is newer than the step.
    """
    found = []
    for row, (spans, length) in enumerate(zip(version_spans, lengths, strict=True)):
        if length and (not spans or spans[-1][1] < length):
            raise InvalidInputError(
                f"version_spans: expected spans over {length} tokens of completion {row}, got "
                f"{[tuple(span) for span in spans]}"
            )
        oldest = min((v for start, end, v in spans if start < min(end, length)), default=step)
        if oldest > step:
            raise InvalidInputError(
                f"version_spans: expected versions up to step {step}, got {oldest} in completion "
                f"{row}; a completion cannot come from weights that are not there yet"
            )
        found.append(step - oldest)
    return torch.tensor(found, dtype=torch.int64)


def _logps_and_entropy(
    model: Any, batch: Batch, temperature: float, *, entropy: bool
) -> tuple[Tensor, Tensor]:
    if not (math.isfinite(temperature) and temperature > 0):
        raise InvalidInputError(
            f"temperature: expected a positive number, got {temperature}; log-probabilities of "
            "greedy answers are those at temperature 1"
        )
    width = batch.completion_mask.shape[1]
    # Nothing is predicted from the last column, so the model need not see it.
    output = model(
        input_ids=batch.input_ids[:, :-1],
        attention_mask=batch.attention_mask[:, :-1],
        position_ids=batch.position_ids[:, :-1],
        use_cache=False,
        **({"logits_to_keep": width} if _can_keep_logits(model) else {}),
    )
    logps, entropies = selective_log_softmax(
        output.logits[:, -width:], batch.completion_ids, temperature, entropy=entropy
    )
    mask = batch.completion_mask
    return logps.masked_fill(~mask, 0.0), entropies.masked_fill(~mask, 0.0)


def _can_keep_logits(model: Any) -> bool:
    """Whether the model computes logits of the last columns alone, if asked to."""
    # PEFT and the wrappers for several devices take any keyword and pass it on.
    while True:
        inside = [getattr(model, name, None) for name in ("module", "_orig_mod")]
        wrapped = [x for x in inside if isinstance(x, torch.nn.Module)]
        if wrapped:
            model = wrapped[0]
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            return "logits_to_keep" in inspect.signature(type(model).forward).parameters
