"""How good a policy is and how far it has moved: gold score, win-rate, divergence, perplexity.

The numbers come from :class:`Samples` and from log-probabilities ``[n, L]`` of their tokens with a
mask, True up to and including the end-of-sequence token. :func:`sample` and :func:`sample_logps`
run a model, the ``evaluate_...`` functions put all together, the others are pure.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from asyncrlhf.divergence import KL, Mean, kl, mean_of, reference_perplexity
from asyncrlhf.errors import InvalidInputError, MissingExtraError
from asyncrlhf.pareto import gold_at_matched_kl, pareto, write_pareto
from asyncrlhf.sequences import pad_batch, token_logps
from asyncrlhf.win_rates import WinRate, compare_scores, finite_scores

if TYPE_CHECKING:
    from asyncrlhf.dataset import Prompts
    from asyncrlhf.rewards import RewardSuite

__all__ = [
    "KL",
    "Mean",
    "Samples",
    "WinRate",
    "compare_scores",
    "evaluate_on",
    "evaluate_policy",
    "gold_at_matched_kl",
    "kl",
    "pareto",
    "reference_perplexity",
    "sample",
    "sample_logps",
    "win_rate",
    "write_pareto",
]

Ids = tuple[int, ...]
GoldScore = Callable[[Sequence[Ids], Sequence[Ids]], npt.ArrayLike]


@dataclass(frozen=True)
class Samples:
    """Answers of one model to a list of prompts.

    Attributes:
        prompt_ids: of each answer.
        completion_ids: of each answer, the end-of-sequence token included.
        finished: whether each ended by itself, not at the limit of tokens.
        temperature: with which they were drawn; 0 is greedy.
    """

    prompt_ids: tuple[Ids, ...]
    completion_ids: tuple[Ids, ...]
    finished: tuple[bool, ...]
    temperature: float


def sample(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.7,
    seed: int = 0,
    eos_token_ids: Collection[int] | None = None,
    batch_size: int = 256,
) -> Samples:
    """One answer to each prompt.

    The answer to a prompt depends on the weights, the prompt, its place and ``seed`` alone (up to
    the rounding of batches): two models that are asked the same draw with the same noise.

    Args:
        model: a causal language model of transformers.
        prompts: token ids of each prompt.
        max_new_tokens: most tokens of an answer.
        temperature: 0 takes the most probable token.
        seed: root of the seeds of all answers.
        eos_token_ids: tokens that end an answer; None: the model's own.
        batch_size: answers that are drawn together.

    Raises:
        InvalidInputError: there is no prompt.
        decapod.lm.RequestError: a prompt cannot be served.
        decapod.lm.EngineError: the model gives numbers that are not finite.
    """
    try:
        from decapod.lm import SamplingParams, TransformersEngine, sample_requests
    except ImportError as error:
        raise MissingExtraError("decapod", "train") from error
    if not prompts:
        raise InvalidInputError("prompts: expected at least one, got none")
    engine = TransformersEngine(model, eos_token_ids=eos_token_ids, max_batch_size=batch_size)
    params = SamplingParams(max_new_tokens=max_new_tokens, temperature=temperature)
    answers = engine.generate(sample_requests(prompts, params, seed))
    return Samples(
        tuple(tuple(int(i) for i in prompt) for prompt in prompts),
        tuple(answer.token_ids for answer in answers),
        tuple(answer.finish_reason == "stop" for answer in answers),
        temperature,
    )


def sample_logps(
    model: Any,
    samples: Samples,
    *,
    temperature: float = 1.0,
    pad_id: int = 0,
    batch_size: int = 256,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the tokens of answers, by one pass over prompt and answer.

    Args:
        model: a causal language model of transformers; dropout is off, its mode is kept.
        samples: of this or of another model.
        temperature: logits are divided by it; above 0.
        pad_id: any id that the model has an embedding for.
        batch_size: answers per pass.

    Returns:
        ``[n, L]`` natural log-probabilities, 0 outside the mask, and the ``[n, L]`` bool mask of
        the tokens that there are; without gradient, on the CPU.

    Raises:
        InvalidInputError: the temperature is not positive.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    parts = []
    try:
        with torch.no_grad():
            for start in range(0, len(samples.prompt_ids), batch_size):
                rows = slice(start, start + batch_size)
                batch = pad_batch(samples.prompt_ids[rows], samples.completion_ids[rows], pad_id)
                batch = batch.to(model.device)
                logps = token_logps(model, batch, temperature)
                parts.append((logps.cpu(), batch.completion_mask.cpu()))
    finally:
        for module, training in modes:
            module.training = training
    longest = max(mask.shape[1] for _, mask in parts)
    widened = [
        [torch.nn.functional.pad(part, (0, longest - part.shape[1])) for part in pair]
        for pair in parts
    ]
    return torch.cat([logps for logps, _ in widened]), torch.cat([mask for _, mask in widened])


def win_rate(
    gold: GoldScore, policy: Samples, reference: Samples, *, level: float = 0.95
) -> WinRate:
    """Win-rate of a policy by gold score.

    Args:
        gold: from prompt ids and completion ids to the score of each answer.
        policy: answers of the policy.
        reference: answers of the reference to the same prompts.
        level: confidence level of the interval.

    Raises:
        InvalidInputError: the prompts differ, or a score is not finite.
    """
    if policy.prompt_ids != reference.prompt_ids:
        raise InvalidInputError(
            "policy, reference: expected answers to the same prompts in the same order"
        )
    return compare_scores(
        gold(policy.prompt_ids, policy.completion_ids),
        gold(reference.prompt_ids, reference.completion_ids),
        level=level,
    )


def evaluate_policy(
    policy: Any,
    reference: Any | None,
    gold: GoldScore,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.7,
    seed: int = 0,
    reference_samples: Samples | None = None,
    batch_size: int = 256,
) -> dict[str, float]:
    """One row of numbers about a policy.

    Args:
        policy: a causal language model of transformers.
        reference: the model it started from; None: the policy with its adapter switched off.
        gold: from prompt ids and completion ids to the score of each answer.
        prompts: token ids of each prompt.
        max_new_tokens: most tokens of an answer.
        temperature: of drawing.
        seed: see :func:`sample`.
        reference_samples: answers of the reference to the same prompts; None leaves the win-rate
            out.
        batch_size: answers per pass.

    Returns:
        ``gold``, ``ppl`` (of the reference at temperature 1), and ``kl`` (k1) and ``kl_k3`` of
        the distributions at ``temperature``, each with ``..._se``, its standard error; ``length``
        (tokens), ``eos_rate``; and perhaps ``win_rate`` with ``win_rate_low`` and
        ``win_rate_high``. At temperature 0 there is no divergence: the ``kl`` are left out.

    Raises:
        InvalidInputError: no prompt, or scores that are not finite.
    """
    samples = sample(
        policy,
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        batch_size=batch_size,
    )
    scores = finite_scores("gold", gold(samples.prompt_ids, samples.completion_ids))
    row: dict[str, float] = {}
    row["gold"], row["gold_se"] = mean_of(torch.from_numpy(scores))
    row |= _drift(policy, reference, samples, pad_id=0, batch_size=batch_size)
    if reference_samples is not None:
        rate = win_rate(gold, samples, reference_samples).rate
        row |= {"win_rate": rate.value, "win_rate_low": rate.low, "win_rate_high": rate.high}
    return row


def evaluate_on(
    model: Any,
    reference: Any | None,
    prompts: Prompts,
    rewards: RewardSuite,
    *,
    eos_token_ids: Collection[int],
    pad_id: int,
    temperature: float,
    max_new_tokens: int,
    seed: int,
    batch_size: int,
) -> dict[str, float]:
    """One row of numbers about the policy of a run, by its own rewards.

    Args:
        model: a causal language model of transformers.
        reference: the model it started from; None: the policy with its adapter switched off.
        prompts: of the evaluation set.
        rewards: of the run.
        eos_token_ids: tokens that end an answer.
        pad_id: any id that the models have an embedding for.
        temperature: of drawing; 0 is greedy, and leaves the ``kl`` out.
        max_new_tokens: most tokens of an answer.
        seed: see :func:`sample`.
        batch_size: answers per pass.

    Returns:
        ``reward`` and ``rewards/<function>`` (means over answers that have one), ``reward_failed``
        (answers without), and what :func:`evaluate_policy` says of ``kl``, ``ppl``, ``length`` and
        ``eos_rate``.

    Raises:
        RewardError: a reward function failed, with ``on_error="raise"``.
    """
    samples = sample(
        model,
        prompts.ids,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        eos_token_ids=eos_token_ids,
        batch_size=batch_size,
    )
    found = rewards(
        prompts=prompts.prompts,
        prompt_ids=prompts.ids,
        completion_ids=samples.completion_ids,
        has_eos=samples.finished,
        columns=prompts.columns,
    )
    row = {"reward_failed": float((~found.valid).sum())}
    for name, values in (
        ("reward", found.scores),
        *((f"rewards/{name}", values) for name, values in found.table.items()),
    ):
        known = values[~np.isnan(values)]
        if known.size:
            row[name] = float(known.mean())
    return row | _drift(model, reference, samples, pad_id=pad_id, batch_size=batch_size)


def _drift(
    policy: Any, reference: Any | None, samples: Samples, *, pad_id: int, batch_size: int
) -> dict[str, float]:
    """Distance from the reference, lengths and ends of a policy's own samples."""

    def logps(model: Any, temperature: float) -> tuple[Tensor, Tensor]:
        return sample_logps(
            model, samples, temperature=temperature, pad_id=pad_id, batch_size=batch_size
        )

    row: dict[str, float] = {}
    with _reference_of(policy, reference) as model:
        at_one, mask = logps(model, 1.0)
        row["ppl"], row["ppl_se"] = reference_perplexity(at_one, mask)
        if samples.temperature == 1:
            theirs = at_one
        elif samples.temperature > 0:
            theirs, _ = logps(model, samples.temperature)
    if samples.temperature > 0:
        ours, _ = logps(policy, samples.temperature)
        divergence = kl(ours, theirs, mask)
        row["kl"], row["kl_se"] = divergence.k1
        row["kl_k3"], row["kl_k3_se"] = divergence.k3
    row["length"] = float(mask.sum(dim=1).double().mean())
    row["eos_rate"] = sum(samples.finished) / len(samples.finished)
    return row


@contextlib.contextmanager
def _reference_of(policy: Any, reference: Any | None) -> Iterator[Any]:
    if reference is not None:
        yield reference
    else:
        with policy.disable_adapter():
            yield policy
