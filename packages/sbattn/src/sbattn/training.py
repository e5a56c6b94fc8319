"""One training loop for every experiment.

The batch of a step depends on the seed and the number of the step alone, and a checkpoint holds
everything else, so a run that was interrupted ends where an undisturbed one would have ended.
"""

from __future__ import annotations

import math
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sbattn.errors import InvalidInputError
from sbattn.tasks import IGNORED, Batch, Task
from sbattn.writing import whole_file

if TYPE_CHECKING:
    from sbattn.model import CausalLM

Precision = Literal["float32", "bfloat16"]
_TRAINING: Final = 0  # a stream of random numbers; measuring has another


@dataclass(frozen=True)
class TrainingConfig:
    """A training run.

    Attributes:
        steps: optimizer steps.
        batch_size: sequences per step.
        length: tokens per sequence.
        learning_rate: of AdamW, at its highest.
        warm_up: share of the steps in which the rate rises from a 25th; then it falls to zero along
            half a cosine (one cycle).
        betas: of AdamW.
        weight_decay: of AdamW, on matrices only.
        clip: gradients are scaled down to this norm.
        seed: of the batches. That of the weights is the caller's.
        dtype: of activations; weights and optimizer stay in float32 (autocast).
        device: where torch trains.
        micro_batch: sequences per pass; gradients of a step's passes are summed. None: all at once.
        save_every: steps between checkpoints.

    Raises:
        InvalidInputError: a number out of its range, or an unknown precision.
    """

    steps: int = 600
    batch_size: int = 64
    length: int = 64
    learning_rate: float = 3e-3
    warm_up: float = 0.1
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01
    clip: float = 1.0
    seed: int = 0
    dtype: Precision = "float32"
    device: str = "cpu"
    micro_batch: int | None = None
    save_every: int = 200

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "length", "micro_batch", "save_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidInputError(f"{name}: expected at least 1, got {value!r}")
        for name in ("learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise InvalidInputError(f"{name}: expected above 0, got {getattr(self, name)!r}")
        if not 0 <= self.warm_up <= 1 or self.weight_decay < 0 or self.seed < 0:
            raise InvalidInputError(
                "warm_up, weight_decay, seed: expected a share from 0 to 1 and two numbers of at "
                f"least 0, got {self.warm_up!r}, {self.weight_decay!r} and {self.seed!r}"
            )
        if self.dtype not in get_args(Precision):
            raise InvalidInputError(
                f"dtype: expected one of {list(get_args(Precision))}, got {self.dtype!r}"
            )

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        risen = self.warm_up * self.steps
        if step < risen:
            return self.learning_rate * (1 + 24 * step / risen) / 25
        fallen = (step - risen) / (self.steps - risen)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * fallen))


class StepDone(NamedTuple):
    """What `train` tells after a step, which is counted from 1."""

    step: int
    steps: int
    loss: float
    rate: float
    tokens_per_second: float
    seconds_left: float


def train(
    model: CausalLM,
    task: Task,
    config: TrainingConfig,
    *,
    checkpoint: Path | None = None,
    on_step: Callable[[StepDone], None] | None = None,
) -> list[float]:
    """Train in place.

    Args:
        model: takes `[B, L]` tokens and gives `[B, L, vocab_size]` logits.
        task: draws the batches.
        config: of the run.
        checkpoint: a file to resume from if it exists, and to write every `save_every` steps and at
            the end. None: nothing is written.
        on_step: called after every step.

    Returns:
        The loss of every step, mean over its targets, those before the interruption included.

    Raises:
        InvalidInputError: the checkpoint is of another run, or damaged; or there is no such device.
        FloatingPointError: a loss that is not finite; the last checkpoint is kept.
        OSError: the checkpoint cannot be read or written.
    """
    device = torch.device(config.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InvalidInputError(f"device: {config.device} was asked for, and no GPU is here")
    model.to(device).train()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
        lr=config.learning_rate,
        betas=config.betas,
        weight_decay=config.weight_decay,
    )
    losses: list[float] = []
    if checkpoint is not None and checkpoint.exists():
        losses = _resume(checkpoint, model, optimizer, task, config)
    begin, first = time.perf_counter(), len(losses)

    for step in range(first, config.steps):
        rng = np.random.default_rng((config.seed, _TRAINING, step))
        batch = task.draw(rng, config.batch_size, config.length)
        for group in optimizer.param_groups:
            group["lr"] = config.rate(step)
        loss = _backward(model, batch, config, device)
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss of step {step + 1} is {loss}; lower learning_rate or clip"
            )
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss)
        done = step + 1
        if checkpoint is not None and (done % config.save_every == 0 or done == config.steps):
            _save(checkpoint, model, optimizer, task, config, losses)
        if on_step is not None:
            pace = (time.perf_counter() - begin) / (done - first)
            tokens = config.batch_size * config.length / pace
            left = pace * (config.steps - done)
            on_step(StepDone(done, config.steps, loss, config.rate(step), tokens, left))
    return losses


def _backward(model: CausalLM, batch: Batch, config: TrainingConfig, device: torch.device) -> float:
    """Add the gradient of the mean loss over all targets of the batch; returns that mean."""
    count = int((batch.targets != IGNORED).sum())
    size = config.micro_batch or config.batch_size
    total = torch.zeros((), device=device)
    for inputs, targets in zip(batch.inputs.split(size), batch.targets.split(size), strict=True):
        with torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
            logits = model(inputs.to(device))
        loss = token_losses(logits, targets.to(device)).sum() / count
        loss.backward()
        total += loss.detach()
    return float(total)


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats of every position, `[B, L]`; 0 where the target is `IGNORED`."""
    flat = F.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), reduction="none", ignore_index=IGNORED
    )
    return flat.view(targets.shape)


# --- checkpoints ----------------------------------------------------------------------------------

# Where and in which portions a run computes may change between two sittings.
_MAY_CHANGE: Final = ("device", "micro_batch", "save_every")


def _identity(model: CausalLM, task: Task, config: TrainingConfig) -> dict[str, str]:
    fixed = {name: value for name, value in asdict(config).items() if name not in _MAY_CHANGE}
    return {"model": repr(model.config), "data": task.label, "training": repr(fixed)}


def _save(
    path: Path,
    model: CausalLM,
    optimizer: torch.optim.Optimizer,
    task: Task,
    config: TrainingConfig,
    losses: list[float],
) -> None:
    state = {
        "identity": _identity(model, task, config),
        "losses": losses,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(),
    }
    with whole_file(path) as file:
        torch.save(state, file)


def _resume(
    path: Path,
    model: CausalLM,
    optimizer: torch.optim.Optimizer,
    task: Task,
    config: TrainingConfig,
) -> list[float]:
    if not zipfile.is_zipfile(path):  # as torch writes them; the index is at the end
        raise InvalidInputError(
            f"checkpoint: {path} is damaged, or no checkpoint. Name another file, or delete it."
        )
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    ours = _identity(model, task, config)
    for name, value in ours.items():
        if state["identity"][name] != value:
            raise InvalidInputError(
                f"checkpoint: expected one of this run, got {path} of another: its {name} is "
                f"{state['identity'][name]}, not {value}. Name another file, or delete it."
            )
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["rng"])
    losses: list[float] = state["losses"]
    return losses


def lines(every: float = 5.0) -> Callable[[StepDone], None]:
    """An `on_step` that writes a line on standard error every few seconds, and at the end."""
    last = time.monotonic()

    def tell(done: StepDone) -> None:
        nonlocal last
        if done.step < done.steps and time.monotonic() - last < every:
            return
        last = time.monotonic()
        left = round(done.seconds_left)
        sys.stderr.write(
            f"step {done.step}/{done.steps}  loss {done.loss:.4f}  rate {done.rate:.2e}  "
            f"{done.tokens_per_second:.0f} tokens/s  {left // 3600}:{left // 60 % 60:02d}:"
            f"{left % 60:02d} left\n"
        )
        sys.stderr.flush()

    return tell
