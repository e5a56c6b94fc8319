"""Training a small Llama from scratch on freshly drawn examples.

Every batch is new, so there is no training set to fit by heart: what is held out is never drawn.
The loss is that of the answers; the prompts are only read.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from gsm_compose.errors import LearningError, MissingExtraError
from gsm_compose.learning.examples import EOS_ID, PAD_ID, Example, Mixture, Style, encode, words
from gsm_compose.learning.examples import draw_examples as draw

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM

_LONGEST = 128  # positions of the model; the longest composition has about 100 tokens


@dataclass(frozen=True)
class TrainingConfig:
    """A training run; the defaults take about a minute on one core.

    Attributes:
        steps: optimizer steps of the first half; the whole run has twice as many.
        batch_size: examples per step.
        learning_rate: of AdamW, after the warm-up.
        warm_up: steps over which the learning rate rises from zero.
        decay: share of the run, at its end, over which it falls to zero.
        weight_decay: of AdamW.
        clip: gradients are clipped to this norm.
        hidden_size: width of the model.
        layers: decoder layers.
        heads: attention heads.
        intermediate: width of the feed-forward part.
        init_std: standard deviation of the initial weights.
        device: where torch trains; on a CPU one thread is used.

    Raises:
        LearningError: a number out of its range.
    """

    steps: int = 300
    batch_size: int = 64
    learning_rate: float = 3e-3
    warm_up: int = 100
    decay: float = 0.3
    weight_decay: float = 0.01
    clip: float = 1.0
    hidden_size: int = 64
    layers: int = 2
    heads: int = 4
    intermediate: int = 192
    init_std: float = 0.04
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name != "device" and not (value >= 0 if name in _MAY_BE_ZERO else value > 0):
                least = "of at least 0" if name in _MAY_BE_ZERO else "above 0"
                raise LearningError(f"{name}: expected a number {least}, got {value!r}")
        if self.decay > 1:
            raise LearningError(f"decay: expected a share of at most 1, got {self.decay}")

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 1."""
        left = (2 * self.steps - step + 1) / max(1.0, self.decay * 2 * self.steps)
        return self.learning_rate * min(1.0, step / max(1, self.warm_up), left)


_MAY_BE_ZERO = ("warm_up", "decay", "weight_decay")


def build(config: TrainingConfig, seed: int) -> LlamaForCausalLM:
    """The untrained model.

    Raises:
        MissingExtraError: decapod, torch or transformers is not installed.
    """
    try:
        from decapod.lm import build_model
    except ImportError as error:
        raise MissingExtraError("decapod[lm]", "experiments") from error
    model: Any = build_model(
        len(words()),
        hidden_size=config.hidden_size,
        layers=config.layers,
        heads=config.heads,
        intermediate=config.intermediate,
        max_positions=_LONGEST,
        seed=seed,
        init_std=config.init_std,
    )
    built: LlamaForCausalLM = model.to(config.device)
    return built


def train(
    model: LlamaForCausalLM,
    config: TrainingConfig,
    mixtures: tuple[Mixture, Mixture],
    style: Style,
    seed: int,
) -> Iterator[tuple[int, float]]:
    """Train in place, step by step; the caller may measure the model between steps.

    Args:
        model: as `build` makes it.
        config: of the run.
        mixtures: of the first and of the second half. Runs with the same first one, style and seed
            are the same run up to its end.
        style: of the answers.
        seed: of the examples.

    Yields:
        The number of each step, from 1, and its loss (mean over the tokens of all answers).
    """
    import torch

    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.98), weight_decay=config.weight_decay
    )
    rng = random.Random(f"examples of {seed}")
    for step in range(1, 2 * config.steps + 1):
        mixture = mixtures[0] if step <= config.steps else mixtures[1]
        for group in optimizer.param_groups:
            group["lr"] = config.rate(step)
        loss = backward(model, draw(rng, mixture, style, config.batch_size))
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad()
        yield step, loss


def backward(model: LlamaForCausalLM, examples: Sequence[Example]) -> float:
    """Add the gradient of the mean loss over all answer tokens; returns that mean.

    Short and long examples go through the model apart, which saves a third of the time that
    padding would cost.
    """
    sequences = sorted((_sequence(example) for example in examples), key=lambda s: len(s[0]))
    total = sum(len(ids) - start for ids, start in sequences)
    widths = [len(ids) for ids, _ in sequences]
    # Where to cut so that the two rectangles are smallest.
    cut = min(
        range(1, len(widths) + 1),
        key=lambda i: i * widths[i - 1] + (len(widths) - i) * widths[-1],
    )
    loss = 0.0
    for part in filter(None, (sequences[:cut], sequences[cut:])):
        summed = _summed_loss(model, part) / total
        summed.backward()
        loss += float(summed.detach())
    return loss


def _sequence(example: Example) -> tuple[list[int], int]:
    """Token ids of prompt and answer, and where the answer starts."""
    prompt = encode(example.prompt)
    return [*prompt, *encode(example.target), EOS_ID], len(prompt)


def _summed_loss(model: Any, sequences: Sequence[tuple[list[int], int]]) -> torch.Tensor:
    import torch

    width = max(len(ids) for ids, _ in sequences)
    padded = [ids + [PAD_ID] * (width - len(ids)) for ids, _ in sequences]
    ids = torch.tensor(padded, device=model.device)
    # Padding stands on the right, where no answer can see it; no attention mask is needed.
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    place = torch.arange(1, width, device=ids.device)
    starts = torch.tensor([start for _, start in sequences], device=ids.device)
    ends = torch.tensor([len(row) for row, _ in sequences], device=ids.device)
    is_answer = (place >= starts[:, None]) & (place < ends[:, None])
    logits = model.lm_head(hidden[is_answer])
    return torch.nn.functional.cross_entropy(logits, ids[:, 1:][is_answer], reduction="sum")
