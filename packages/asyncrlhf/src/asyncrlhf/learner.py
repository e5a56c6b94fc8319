"""Optimizer steps on a round: the learner's half of the loop, on one process or several."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from asyncrlhf import corrections
from asyncrlhf.minibatch import Minibatch, minibatches
from asyncrlhf.objectives import Objective, log_ratio
from asyncrlhf.sequences import kl_estimates, pad_batch, token_logps

if TYPE_CHECKING:
    from accelerate import Accelerator

    from asyncrlhf.critic import Critic
    from asyncrlhf.rounds import Round
    from asyncrlhf.schedule import RoundSchedule


@dataclass(frozen=True)
class Step:
    """One optimizer step.

    Attributes:
        number: u, from 0.
        staleness: u minus the oldest version among the minibatch's tokens.
        dropped: whether it was left out as too stale; the weights then stay as they were.
        metrics: means over the minibatch, over all processes.
    """

    number: int
    staleness: int
    dropped: bool
    metrics: dict[str, float]


class Learner:
    """Model, reference, critic and optimizer.

    Args:
        model: the policy, unwrapped; its parameters that require gradients learn.
        reference: frozen model, or None: the policy with its adapter switched off.
        critic: for ppo.
        objective: the loss.
        accelerator: wraps model and optimizer, and adds up over processes.
        optimizer: over the parameters that learn.
        scheduler: of the learning rate, stepped once per optimizer step.
        pad_id: an id that the embedding has.
        temperature: of sampling; logits are divided by it.
        samples: completions per prompt, K.
        prompts_per_part: prompts of one forward and backward pass on one process.
        max_grad_norm: of clipping; 0 is off.
    """

    def __init__(
        self,
        *,
        model: Any,
        reference: Any | None,
        critic: Critic | None,
        objective: Objective,
        accelerator: Accelerator,
        optimizer: Any,
        scheduler: Any,
        pad_id: int,
        temperature: float,
        samples: int,
        prompts_per_part: int,
        max_grad_norm: float,
    ) -> None:
        self.unwrapped = model
        self.reference = reference
        self.objective = objective
        self.accelerator = accelerator
        if critic is None:
            self.model, self.optimizer = accelerator.prepare(model, optimizer)
            self.critic = None
        else:
            self.model, self.critic, self.optimizer = accelerator.prepare(model, critic, optimizer)
        self.scheduler = scheduler
        self._pad_id = pad_id
        self._temperature = temperature
        self._samples = samples
        self._part = prompts_per_part * samples
        self._max_grad_norm = max_grad_norm

    def release(self) -> None:
        """Give model and critic back as they were before they were prepared for training."""
        for module in filter(None, (self.model, self.critic)):
            self.accelerator.unwrap_model(module, keep_fp32_wrapper=False)

    def parameters_to_publish(self) -> Iterator[tuple[str, Tensor]]:
        """Names and values of the parameters that learn, in a fixed order."""
        for name, value in self.unwrapped.named_parameters():
            if value.requires_grad:
                yield name, value

    def learn(
        self,
        done: Round,
        schedule: RoundSchedule,
        *,
        start: int,
        max_staleness: int | None,
    ) -> Iterator[Step]:
        """Train on a scored round; yields after every optimizer step.

        Args:
            done: the round; the same on every process.
            schedule: N and T.
            start: number of the first step.
            max_staleness: staler minibatches are left out; None trains on all.

        Raises:
            FloatingPointError: the loss or the gradient is not finite.
        """
        accelerator = self.accelerator
        share = accelerator.process_index, accelerator.num_processes
        batches = [
            self._ready(batch.to(accelerator.device))
            for batch in minibatches(
                done, count=schedule.minibatches, samples=self._samples, share=share
            )
        ]
        oldest = [
            min(c.oldest_version for c in part)
            for part in _split(done.completions, schedule.minibatches)
        ]
        number = start
        for _ in range(schedule.epochs):
            for batch, version in zip(batches, oldest, strict=True):
                staleness = number - version
                dropped = max_staleness is not None and staleness > max_staleness
                metrics = {} if dropped else self._step(batch, number)
                # Also after a dropped minibatch: versions and the schedule count steps.
                self.scheduler.step()
                yield Step(number, staleness, dropped, metrics)
                number += 1

    def logps(self, model: Any, batch: Minibatch) -> Tensor:
        """(n, L) log-probabilities of the completions under a causal model."""
        padded = pad_batch(batch.prompts, batch.completions, self._pad_id)
        return token_logps(model, padded.to(self.accelerator.device), self._temperature)

    def reference_logps(self, batch: Minibatch) -> Tensor:
        """(n, L) under the reference, without gradient."""
        with (
            torch.no_grad(),
            self.accelerator.autocast(),  # as the policy: else they differ where they are equal
            reference_model(self.unwrapped, self.reference) as reference,
        ):
            return self._in_parts(batch, lambda part: self.logps(reference, part))

    def _ready(self, batch: Minibatch) -> Minibatch:
        """With everything that is computed once, when the round arrives."""
        batch = replace(batch, ref_logps=self.reference_logps(batch))
        with torch.no_grad():
            if self.objective.needs_proximal:
                now = self._in_parts(batch, lambda part: self.logps(self.unwrapped, part))
                batch = replace(batch, proximal_logps=now)
            if self.critic is not None:
                batch = replace(batch, values=self._in_parts(batch, self._values))
        return self.objective.prepared(batch, self._whiten)

    def _step(self, batch: Minibatch, number: int) -> dict[str, float]:
        started = time.perf_counter()
        accelerator = self.accelerator
        parts = [batch.rows(i, i + self._part) for i in range(0, len(batch), self._part)]
        total = max(1.0, self._summed(float(sum(self._weight(part) for part in parts))))
        outputs, ratios = [], []
        for place, part in enumerate(parts):
            with contextlib.ExitStack() as quiet:
                if place + 1 < len(parts):  # processes exchange gradients once, with the last part
                    for module in filter(None, (self.model, self.critic)):
                        quiet.enter_context(accelerator.no_sync(module))
                logps = self.logps(self.model, part)
                values = None if self.critic is None else self._values(part)
                output = self.objective(part, logps, values, normalizer=total)
                # Processes average their gradients; the loss is divided by the whole's number.
                accelerator.backward(output.loss * accelerator.num_processes)
            outputs.append(output)
            ratios.append((part, logps.detach()))
        loss = self._summed(sum(float(output.loss.detach()) for output in outputs))
        norm = self._clipped()
        # In half precision the scaler leaves out a step whose gradient overflows.
        if not (_finite(loss) and (_finite(norm) or accelerator.scaler is not None)):
            raise FloatingPointError(
                f"step {number}: the loss is {loss} and the gradient's norm {norm}; lower "
                "learning_rate, look for non-finite rewards, or set is_correction"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {
            "loss": loss,
            "grad_norm": norm,
            **self._described(batch, outputs, ratios),
            "time/step": time.perf_counter() - started,
        }

    def _clipped(self) -> float:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        limit = self._max_grad_norm or float("inf")
        return float(self.accelerator.clip_grad_norm_(parameters, limit))

    def _values(self, part: Minibatch) -> Tensor:
        padded = pad_batch(part.prompts, part.completions, self._pad_id)
        assert self.critic is not None
        values: Tensor = self.critic(padded.to(self.accelerator.device))
        return values

    def _weight(self, part: Minibatch) -> float:
        return self.objective.normalizer(part)

    def _in_parts(self, batch: Minibatch, function: Callable[[Minibatch], Tensor]) -> Tensor:
        """(n, L) of a function of rows, a part at a time."""
        result = torch.zeros(batch.mask.shape, device=batch.mask.device)
        for i in range(0, len(batch), self._part):
            part = function(batch.rows(i, i + self._part))
            result[i : i + len(part), : part.shape[1]] = part
        return result

    def _summed(self, value: float) -> float:
        if self.accelerator.num_processes == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=self.accelerator.device)
        return float(self.accelerator.reduce(tensor, "sum"))

    def _whiten(self, x: Tensor, mask: Tensor) -> Tensor:
        """Mean 0 and variance 1 over the mask of the minibatch on all processes."""
        kept = x[mask].double()
        count = max(1.0, self._summed(float(kept.numel())))
        mean = self._summed(float(kept.sum())) / count
        variance = self._summed(float((kept - mean).square().sum())) / max(count - 1, 1)
        return torch.where(mask, (x - mean) * (variance + 1e-8) ** -0.5, 0.0)

    def _described(
        self,
        batch: Minibatch,
        outputs: Sequence[Any],
        ratios: Sequence[tuple[Minibatch, Tensor]],
    ) -> dict[str, float]:
        """Means over the minibatch of what the losses report, and of what is known without them.

        What ends in ``max`` is the largest instead.
        """
        found: dict[str, list[float]] = {}
        for output in outputs:
            for name, value in output.metrics.items():
                found.setdefault(f"loss/{name}", []).append(float(value))
        metrics = {name: _merged(name, values) for name, values in found.items()}
        with torch.no_grad():
            log_weights = torch.cat([log_ratio(part, logps) for part, logps in ratios])
            kls = []
            for part, logps in ratios:
                assert part.ref_logps is not None
                kls.append(kl_estimates(logps, part.ref_logps, part.mask).k1.sum(1))
            # Of the whole minibatch; shares of its parts have no mean that says anything.
            everywhere = self.accelerator.gather(log_weights)
            metrics["ess"] = float(corrections.effective_sample_size(everywhere))
            metrics["ratio/log_mean"] = float(log_weights.mean())
            metrics["kl"] = float(torch.cat(kls).mean())
            if batch.ref_logps is not None:
                behind = kl_estimates(batch.behaviour_logps, batch.ref_logps, batch.mask)
                metrics["kl/behaviour"] = float(behind.k1.sum(1).mean())
        here = torch.tensor(list(metrics.values()), dtype=torch.float64)
        table = self.accelerator.gather(here.to(self.accelerator.device)[None])
        return {
            name: _merged(name, values)
            for name, values in zip(metrics, table.T.tolist(), strict=True)
        }


@contextlib.contextmanager
def reference_model(model: Any, reference: Any | None) -> Iterator[Any]:
    """The reference, or, where there is none, the model with its adapter switched off."""
    if reference is not None:
        yield reference
        return
    with model.disable_adapter():
        yield model


def param_groups(modules: Iterable[Any], weight_decay: float) -> list[dict[str, Any]]:
    """Parameters that learn; those with fewer than two dimensions are not decayed."""
    learning = [p for module in modules for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in learning if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in learning if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _merged(name: str, values: Sequence[float]) -> float:
    """What parts of equal size say together."""
    return max(values) if name.endswith("max") else sum(values) / len(values)


def _finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")


def _split(items: Sequence[Any], count: int) -> list[Sequence[Any]]:
    size = len(items) // count
    return [items[i * size : (i + 1) * size] for i in range(count)]
