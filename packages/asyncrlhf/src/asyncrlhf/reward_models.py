"""Reward models: preference pairs, their relabelling by a gold score, and Bradley-Terry training.

The proxy of the controlled experiments is made here: samples of the fine-tuned model in pairs, the
gold score says which is better (as the paper relabels its preferences by a larger model), and a
small sequence classifier learns it. A policy that optimises the proxy is then measured by gold.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from asyncrlhf.errors import InvalidInputError, MissingExtraError

if TYPE_CHECKING:
    from asyncrlhf.evaluate import GoldScore, Ids
    from asyncrlhf.tasks.fine_tuning import StepDone
    from asyncrlhf.tasks.synthetic_summary import SyntheticSummary

_CLIP = 1.0


class Pair(NamedTuple):
    """Token ids of a prompt and of two answers, the first of them preferred."""

    prompt: Ids
    chosen: Ids
    rejected: Ids


def sample_pairs(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.7,
    seed: int = 0,
) -> list[Pair]:
    """Two answers of a model to each prompt, not labelled yet: see :func:`relabel`.

    Args:
        model: a causal language model of transformers.
        prompts: token ids of each prompt.
        max_new_tokens: most tokens of an answer.
        temperature: of drawing.
        seed: root of the seeds of all answers.

    Raises:
        InvalidInputError: there is no prompt.
    """
    from asyncrlhf.evaluate import sample

    twice = [prompt for prompt in prompts for _ in range(2)]
    drawn = sample(model, twice, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    answers = drawn.completion_ids
    return [
        Pair(prompt, first, second)
        for prompt, first, second in zip(
            drawn.prompt_ids[::2], answers[::2], answers[1::2], strict=True
        )
    ]


def relabel(pairs: Sequence[Pair], gold: GoldScore) -> list[Pair]:
    """The pairs in the order that a gold score gives; pairs that it finds equal are left out.

    Args:
        pairs: whatever their labels are.
        gold: from prompt ids and completion ids to the score of each answer.

    Raises:
        InvalidInputError: scores that are not one finite number per answer.
    """
    prompts = [pair.prompt for pair in pairs]
    scores = []
    for name, answers in (("chosen", [p.chosen for p in pairs]),
                          ("rejected", [p.rejected for p in pairs])):  # fmt: skip
        found = np.asarray(gold(prompts, answers), dtype=np.float64)
        if found.shape != (len(pairs),) or not np.isfinite(found).all():
            raise InvalidInputError(
                f"gold: expected {len(pairs)} finite scores of the {name} answers, got "
                f"{found.tolist()[:8]} ... of shape {found.shape}"
            )
        scores.append(found)
    return [
        pair if first > second else Pair(pair.prompt, pair.rejected, pair.chosen)
        for pair, first, second in zip(pairs, *scores, strict=True)
        if first != second
    ]


@dataclass(frozen=True)
class RewardModelConfig:
    """How a reward model is trained.

    Attributes:
        epochs: passes over the pairs.
        batch_size: pairs per optimizer step.
        learning_rate: of AdamW without weight decay; it falls to 0 along half a cosine.
        seed: of the new weights and of the order of the pairs.

    Raises:
        InvalidInputError: a number out of its range.
    """

    epochs: int = 1
    batch_size: int = 64
    learning_rate: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise InvalidInputError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise InvalidInputError(
                f"learning_rate: expected a finite number above 0, got {self.learning_rate}"
            )


def train_reward_model(
    base: Any,
    pairs: Sequence[Pair],
    config: RewardModelConfig | None = None,
    *,
    from_scratch: bool = False,
    on_step: Callable[[StepDone], None] | None = None,
) -> Any:
    """A sequence classifier whose score prefers the chosen answers.

    The loss is Bradley and Terry's, -log sigmoid(score of chosen - score of rejected), on prompt
    and answer as token ids. Weights are a function of the arguments, bit for bit with one thread;
    the global random state of torch is left as it was.

    Args:
        base: a causal language model of transformers, whose body is copied and whose vocabulary the
            pairs have; its config says which token is padding.
        pairs: labelled, see :func:`relabel`.
        config: of the training.
        from_scratch: begin with random weights instead of those of ``base``: a weaker proxy.
        on_step: called after every step.

    Returns:
        A transformers model for sequence classification with one label, in float32 and evaluation
        mode, on the device of ``base``; it can be given as a reward function.

    Raises:
        InvalidInputError: no pair, or a base that has no padding token.
        FloatingPointError: a loss that is not finite.
    """
    config = RewardModelConfig() if config is None else config
    if not pairs:
        raise InvalidInputError("pairs: expected at least one, got none; were they all ties?")
    model = _new_classifier(base, config.seed, from_scratch=from_scratch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.0)
    steps = config.epochs * math.ceil(len(pairs) / config.batch_size)
    rng = np.random.default_rng(config.seed)
    model.train()
    begin = time.perf_counter()
    step = 0
    for _ in range(config.epochs):
        order = rng.permutation(len(pairs))
        for start in range(0, len(pairs), config.batch_size):
            batch = [pairs[i] for i in order[start : start + config.batch_size]]
            for group in optimizer.param_groups:
                share = 0.5 * (1 + math.cos(math.pi * step / steps))
                group["lr"] = config.learning_rate * share
            loss = bradley_terry(*_both_scores(model, batch))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), _CLIP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            value = float(loss.detach())
            if not math.isfinite(value):
                raise FloatingPointError(f"the loss of step {step} is {value}; lower learning_rate")
            if on_step is not None:
                from asyncrlhf.tasks.fine_tuning import StepDone

                left = (time.perf_counter() - begin) / step * (steps - step)
                on_step(StepDone(step, steps, value, left))
    return model.eval()


def train_proxy(
    task: SyntheticSummary,
    model: Any,
    *,
    pairs: int = 2048,
    seed: int = 0,
    config: RewardModelConfig | None = None,
    on_step: Callable[[StepDone], None] | None = None,
) -> Any:
    """The proxy reward of a task: a reward model that learns its gold score from pairs of samples.

    Args:
        task: draws the prompts and labels the pairs.
        model: whose samples are compared, the fine-tuned one.
        pairs: prompts that are answered twice; pairs of equal gold are left out. The fewer, the
            easier the proxy is to over-optimise.
        seed: of the prompts and the samples.
        config: of the training; None: eight epochs at a learning rate of 3e-3.
        on_step: called after every step.

    Returns:
        As :func:`train_reward_model`.

    Raises:
        InvalidInputError: ``pairs`` below 1, or all of them ties.
    """
    if config is None:
        config = RewardModelConfig(epochs=8, learning_rate=3e-3, seed=seed)
    prompts = [row["prompt_ids"] for row in task.prompts(pairs, seed, "reward_model")]
    drawn = sample_pairs(model, prompts, max_new_tokens=task.max_completion_length, seed=seed)
    return train_reward_model(model, relabel(drawn, task.gold_score), config, on_step=on_step)


def bradley_terry(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Mean of -log sigmoid(chosen - rejected) over ``[n]`` scores each."""
    return -F.logsigmoid(chosen - rejected).mean()


def score_ids(
    model: Any, sequences: Sequence[Sequence[int]], batch_size: int = 64
) -> npt.NDArray[np.float64]:
    """Scores that a reward model gives to token ids of prompt and answer.

    Args:
        model: of transformers, for sequence classification with one label; it is put into
            evaluation mode.
        sequences: not empty.
        batch_size: sequences per pass.

    Returns:
        ``[n]`` float64.
    """
    model.eval()
    found = []
    with torch.no_grad():
        for start in range(0, len(sequences), batch_size):
            logits = _logits(model, sequences[start : start + batch_size])
            found.append(logits.double().cpu().numpy())
    return np.concatenate(found) if found else np.zeros(0)


def preference_accuracy(model: Any, pairs: Sequence[Pair]) -> float:
    """Share of pairs whose chosen answer scores higher; equal scores count half.

    Raises:
        InvalidInputError: there is no pair.
    """
    if not pairs:
        raise InvalidInputError("pairs: expected at least one, got none")
    chosen = score_ids(model, [(*pair.prompt, *pair.chosen) for pair in pairs])
    rejected = score_ids(model, [(*pair.prompt, *pair.rejected) for pair in pairs])
    return float(((chosen > rejected) + 0.5 * (chosen == rejected)).mean())


def _both_scores(model: Any, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    sequences = [(*pair.prompt, *pair.chosen) for pair in pairs]
    sequences += [(*pair.prompt, *pair.rejected) for pair in pairs]
    chosen, rejected = _logits(model, sequences).split(len(pairs))
    return chosen, rejected


def _logits(model: Any, sequences: Sequence[Sequence[int]]) -> Tensor:
    """``[n]`` float32 scores, of each sequence at its last token."""
    pad = model.config.get_text_config().pad_token_id
    longest = max(map(len, sequences))
    ids = torch.tensor([[*row, *[pad] * (longest - len(row))] for row in sequences])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in sequences])
    # The model looks for the last token that is no padding; what it reads there is all before it.
    logits: Tensor = model(
        input_ids=ids.to(model.device), attention_mask=mask.to(model.device)
    ).logits
    return logits[:, 0].float()


def _new_classifier(base: Any, seed: int, *, from_scratch: bool) -> Any:
    try:
        from transformers import AutoModelForSequenceClassification
    except ModuleNotFoundError as error:
        raise MissingExtraError("transformers", "train") from error
    config = copy.deepcopy(base.config)
    config.num_labels = 1
    if config.get_text_config().pad_token_id is None:
        raise InvalidInputError(
            "base: its config has no pad_token_id, which tells where an answer ends; set it to a "
            "token that no text has"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_config(config).float()
    if not from_scratch:
        model.base_model.load_state_dict(base.base_model.state_dict())
    # A head near zero: no answer is preferred before anything was learnt.
    torch.nn.init.zeros_(model.score.weight)
    return model.to(base.device)
