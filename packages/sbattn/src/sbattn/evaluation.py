"""What is measured of a trained model: recall by length, loss by position in the context."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sbattn.errors import InvalidInputError
from sbattn.tasks import IGNORED, MQRAR
from sbattn.training import Precision, token_losses

if TYPE_CHECKING:
    from sbattn.model import CausalLM

_TOKENS_AT_ONCE: Final = 16384  # a forward pass of small models
_EVALUATION: Final = 1  # a stream of random numbers; training has another


class RecallScore(NamedTuple):
    """Share of right answers, mean loss in nats, and how many questions they are of."""

    accuracy: float
    loss: float
    questions: int


def evaluate_recall(
    model: CausalLM, task: MQRAR, lengths: Iterable[int], *, sequences: int = 64, seed: int = 0
) -> dict[int, RecallScore]:
    """How well questions are answered in fresh sequences, by their length.

    Args:
        model: a trained model.
        task: what it was trained on; all its tokens count as possible answers.
        lengths: tokens per sequence.
        sequences: per length.
        seed: of the sequences; never those of a training run, whatever its seed.
    """
    device = next(model.parameters()).device
    model.eval()
    found = {}
    for length in lengths:
        rng = np.random.default_rng((seed, _EVALUATION, length))
        batch = task.draw(rng, sequences, length)
        size = max(1, _TOKENS_AT_ONCE // length)
        right, loss = 0, 0.0
        for inputs, targets in zip(
            batch.inputs.split(size), batch.targets.to(device).split(size), strict=True
        ):
            with torch.no_grad():
                logits = model(inputs.to(device))
            right += int((logits.argmax(dim=-1) == targets).sum())
            loss += float(token_losses(logits, targets).sum())
        questions = int((batch.targets != IGNORED).sum())
        found[length] = RecallScore(right / questions, loss / questions, questions)
    return found


def loss_by_position(
    model: CausalLM,
    stretches: Iterable[Tensor],
    block: int,
    *,
    dtype: Precision = "float32",
    at_once: int = _TOKENS_AT_ONCE,
) -> list[float]:
    """Mean loss in nats per token of the same tokens, by where in the context they stand.

    Args:
        model: a trained model.
        stretches: as `sbattn.tasks.staggered_windows` yields them.
        block: theirs.
        dtype: of activations.
        at_once: tokens per forward pass (at least one window).

    Returns:
        One value per block of positions, from the start of the context.
    """
    device = next(model.parameters()).device
    model.eval()
    sums: list[Tensor] = []
    for windows in stretches:
        length = windows.shape[1] - 1
        rows = []
        for part in windows.split(max(1, at_once // length)):
            part = part.to(device)
            with (
                torch.no_grad(),
                torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"),
            ):
                logits = model(part[:, :-1])
            rows.append(
                token_losses(logits, part[:, 1:]).unflatten(1, (-1, block)).mean(dim=2).cpu()
            )
        by_window = torch.cat(rows).double()  # [windows, blocks of positions]
        count, positions = by_window.shape
        # Window w shows at its block of positions k the block w + k of the text; kept are those
        # that every k shows.
        seen = [by_window[positions - 1 - k : count - k, k].mean() for k in range(positions)]
        sums.append(torch.stack(seen))
    return [float(value) for value in torch.stack(sums).mean(dim=0)]


def between(losses: Sequence[float], block: int, start: int, end: int) -> float:
    """Mean of what `loss_by_position` gave over positions `start` to `end` − 1.

    Raises:
        InvalidInputError: bounds that are not whole blocks of it.
    """
    if start % block or end % block or not 0 <= start < end <= block * len(losses):
        raise InvalidInputError(
            f"start, end: expected multiples of {block} up to {block * len(losses)}, got {start} "
            f"and {end}"
        )
    return float(np.mean(losses[start // block : end // block]))
