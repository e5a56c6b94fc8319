"""Supervised fine-tuning of small models on the CPU, and a folder that keeps the results."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from vineppo.errors import NotFiniteError, at_least, positive

_CLIP = 1.0
_IGNORED = -100
_WINDOW = 20  # steps


class Batch(NamedTuple):
    """Sequences of prompt and answer, padded on the right.

    Attributes:
        ids: ``[B, T]``, token ids.
        learnt: ``[B, T]``, True where the token is one of the answer.
    """

    ids: npt.NDArray[np.int64]
    learnt: npt.NDArray[np.bool_]


class StepDone(NamedTuple):
    """What is told after a step, counted from 1: its mean loss in nats per learnt token.

    ``steps`` and ``seconds_left`` are those of a training that takes all its steps.
    """

    step: int
    steps: int
    loss: float
    seconds_left: float


def fine_tune(
    model: Any,
    batch: Callable[[int], Batch],
    steps: int,
    learning_rate: float,
    until_loss: float = 0.0,
    on_step: Callable[[StepDone], None] | None = None,
) -> list[float]:
    """Train a model in place on answers, until it is good enough; prompts are given, not learnt.

    AdamW without weight decay, gradients cut to norm 1. The learning rate rises along a line over
    the first 20 steps and then stays, so that where training stops does not change its course.

    Args:
        model: a causal language model; in evaluation mode afterwards.
        batch: from the number of a step, from 0, to its sequences.
        steps: most optimizer steps.
        learning_rate: once it has risen.
        until_loss: training ends as soon as the mean loss of the last 20 steps is not above this;
            0 takes all steps.
        on_step: called after every step.

    Returns:
        The mean loss of every step, nats per learnt token.

    Raises:
        InvalidInputError: a number out of its range.
        NotFiniteError: a loss is not finite; the model is spoilt.
    """
    at_least("steps", steps, 1)
    positive("learning_rate", learning_rate)
    at_least("until_loss", until_loss, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    model.train()
    losses: list[float] = []
    begin = time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / _WINDOW)
        ids, learnt = (torch.as_tensor(part).to(model.device) for part in batch(step))
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(
            logits.float().flatten(0, 1),
            ids[:, 1:].masked_fill(~learnt[:, 1:], _IGNORED).flatten(),
            ignore_index=_IGNORED,
        )
        losses.append(loss.item())
        if not np.isfinite(losses[-1]):
            raise NotFiniteError(
                f"loss: expected a finite number, got {losses[-1]} in step {step + 1}; "
                "lower learning_rate"
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), _CLIP)
        optimizer.step()
        if on_step is not None:
            taken = time.perf_counter() - begin
            on_step(StepDone(step + 1, steps, losses[-1], taken / (step + 1) * (steps - step - 1)))
        if len(losses) >= _WINDOW and np.mean(losses[-_WINDOW:]) <= until_loss:
            break
    optimizer.zero_grad(set_to_none=True)  # whoever trains the model further starts without
    model.eval()
    return losses


def kept_or_trained(
    model: Any, folder: Path, settings: str, train: Callable[[Any], object]
) -> None:
    """Give a model the weights that an equal training gave before, or train it and keep them.

    Equal are trainings with equal settings under equal versions of this library, decapod, torch
    and transformers. Processes that ask at the same time each see a whole file or none.

    Args:
        model: as it is before the training; changed in place.
        folder: of all kept weights; made if absent.
        settings: all that the weights depend on beside the versions.
        train: trains the model in place.

    Raises:
        OSError: the folder cannot be written; nothing half-written is left in it.
    """
    versions = [
        f"{name} {importlib.metadata.version(name)}"
        for name in ("vineppo", "decapod", "torch", "transformers")
    ]
    key = hashlib.sha256("; ".join([settings, *versions]).encode()).hexdigest()[:20]
    kept = folder / f"sft-{key}.pt"
    if kept.is_file():
        model.load_state_dict(torch.load(kept, weights_only=True))
        model.eval()
        return
    folder.mkdir(parents=True, exist_ok=True)
    train(model)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".sft-", delete=False) as file:
        temporary = Path(file.name)
        try:
            torch.save(model.state_dict(), file)
            file.flush()
            os.fsync(file.fileno())
            temporary.replace(kept)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
