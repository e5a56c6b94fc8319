"""Supervised fine-tuning of small models: one loop, and a folder that keeps weights."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from asyncrlhf.errors import InvalidInputError
from asyncrlhf.writing import whole_file

IntArray = npt.NDArray[np.int64]
_CLIP = 1.0


class StepDone(NamedTuple):
    """What training tells after a step, counted from 1: its mean loss in nats per token."""

    step: int
    steps: int
    loss: float
    seconds_left: float


def new_model(config: Any, seed: int) -> Any:
    """A causal language model with random weights, in float32 and evaluation mode on the CPU.

    The global random state of torch is left as it was.

    Args:
        config: of transformers.
        seed: of the weights.
    """
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).float().eval()


def fine_tune(
    model: Any,
    batch: Callable[[int], tuple[IntArray, IntArray]],
    steps: int,
    learning_rate: float,
    pad_token_id: int,
    on_step: Callable[[StepDone], None] | None = None,
) -> list[float]:
    """Train in place on answers; prompts are given and not learnt.

    Args:
        model: a causal language model.
        batch: from the number of a step to prompts ``[B, P]`` of one length and answers ``[B, A]``
            padded on the right.
        steps: optimizer steps of AdamW without weight decay.
        learning_rate: of the first step; it falls to 0 along a line.
        pad_token_id: of answers; does not count.
        on_step: called after every step.

    Returns:
        The mean loss of every step, nats per token.

    Raises:
        InvalidInputError: a number out of its range.
        FloatingPointError: a loss that is not finite.
    """
    if steps < 1 or not learning_rate > 0:
        raise InvalidInputError(
            f"steps, learning_rate: expected at least 1 and above 0, got {steps} and "
            f"{learning_rate}"
        )
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    model.train()
    losses: list[float] = []
    begin = time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * (1 - step / steps)
        prompts, answers = (torch.as_tensor(part).to(model.device) for part in batch(step))
        logits = model(input_ids=torch.cat([prompts, answers[:, :-1]], dim=1)).logits
        loss = F.cross_entropy(
            logits[:, prompts.shape[1] - 1 :].float().flatten(0, 1),
            answers.flatten(),
            ignore_index=pad_token_id,
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), _CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(
                f"the loss of step {step + 1} is {losses[-1]}; lower learning_rate"
            )
        if on_step is not None:
            left = (time.perf_counter() - begin) / (step + 1) * (steps - step - 1)
            on_step(StepDone(step + 1, steps, losses[-1], left))
    model.eval()
    return losses


def cached_weights(model: Any, folder: Path, identity: str, train: Callable[[Any], object]) -> None:
    """Train a model, or load the weights that an equal training gave before.

    Versions of torch and transformers are part of the identity. Several processes may ask at the
    same time: each sees a whole file or none.

    Args:
        model: as it is before the training.
        folder: of all kept weights; made if absent.
        identity: all that the weights depend on.
        train: trains the model in place.

    Raises:
        OSError: the folder cannot be written.
    """
    import transformers

    identity = f"{identity}; torch {torch.__version__}; transformers {transformers.__version__}"
    kept = folder / f"sft-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.pt"
    if kept.is_file():
        model.load_state_dict(torch.load(kept, weights_only=True))
        return
    folder.mkdir(parents=True, exist_ok=True)
    train(model)
    with whole_file(kept) as file:
        torch.save(model.state_dict(), file)
