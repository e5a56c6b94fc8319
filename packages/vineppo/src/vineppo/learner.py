"""Optimizer steps on mini-batches, over as many processes as there are."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from vineppo.batch import Floats, Response, at_tokens, collate
from vineppo.config import PPOConfig, TrainerConfig
from vineppo.errors import InvalidInputError, NotFiniteError
from vineppo.objectives import Objective, Totals, Unit
from vineppo.policy import PolicyWithCritic
from vineppo.ranks import Ranks
from vineppo.reductions import LossOutput

if TYPE_CHECKING:
    from accelerate import Accelerator


class Learner:
    """The policy in training, its optimizer, and the arithmetic of a step.

    Args:
        accelerator: device, precision and processes.
        module: policy and critic.
        config: of the trainer.
        pad_id: any token of the model.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        module: PolicyWithCritic,
        config: TrainerConfig,
        pad_id: int,
    ) -> None:
        self._accelerator = accelerator
        self._ranks = Ranks(accelerator)
        self._config = config
        self._pad_id = pad_id
        groups = _parameter_groups(module, config)
        optimizer = torch.optim.AdamW(groups, betas=config.adam_betas, eps=config.adam_epsilon)
        self._rates = [float(group["lr"]) for group in optimizer.param_groups]
        # What trained the model before may have left its last gradient there.
        optimizer.zero_grad()
        self.module = module
        self.wrapped, self.optimizer = accelerator.prepare(module, optimizer)
        self._parameters = [p for group in groups for p in group["params"]]
        self.dtype = torch.promote_types(self._parameters[0].dtype, torch.float32)
        self.steps = 0

    # --- reading ----------------------------------------------------------------------------------

    def read(
        self, responses: Sequence[Response], module: PolicyWithCritic
    ) -> list[tuple[Floats, Floats | None]]:
        """Log-probabilities, and values where there is a critic, at the tokens of each response.

        Args:
            responses: each process reads its share, all of them get everything.
            module: policy or reference.

        Raises:
            NotFiniteError: a log-probability or value is not finite; the model is damaged.
        """
        return self._ranks.gathered(lambda: self._read(self._ranks.share(responses), module))

    def _read(
        self, responses: Sequence[Response], module: PolicyWithCritic
    ) -> list[tuple[Floats, Floats | None]]:
        # Alike in length, so that little is padded.
        order = sorted(
            range(len(responses)),
            key=lambda i: len(responses[i].prompt_ids) + len(responses[i].response_ids),
        )
        found: dict[int, tuple[Floats, Floats | None]] = {}
        for indices in _cut(order, 4 * self._config.micro_batch_size):
            rows = collate([responses[i] for i in indices], self._pad_id).to(
                self._accelerator.device
            )
            with torch.no_grad(), self._accelerator.autocast():
                logprobs, values = module(
                    rows.input_ids, rows.attention_mask, self._config.temperature
                )
            of_policy = at_tokens(logprobs, rows.mask)
            of_critic = [None] * len(indices) if values is None else at_tokens(values, rows.mask)
            for index, one, other in zip(indices, of_policy, of_critic, strict=True):
                _check("log-probabilities of the model", one)
                if other is not None:
                    _check("values of the critic", other)
                found[index] = (one, other)
        return [found[i] for i in range(len(responses))]

    def loss_of(self, units: Sequence[Unit], objective: Objective) -> float:
        """The loss on units as one mini-batch, without a step."""
        totals = _totals(units)
        shares = []
        for micro in _cut(self._ranks.share(list(units)), self._config.micro_batch_size):
            with torch.no_grad():
                shares.append(float(self._loss(micro, objective, totals, counts=True).loss))
        return math.fsum(self._ranks.gather(shares))

    # --- stepping ---------------------------------------------------------------------------------

    def step(
        self, units: Sequence[Unit], objective: Objective, rate_factor: float
    ) -> dict[str, float]:
        """One optimizer step on a mini-batch.

        Args:
            units: of the mini-batch, the same on every process, each of which takes its share.
            objective: gives the loss.
            rate_factor: the learning rates' share of their peaks.

        Returns:
            Means over the mini-batch.

        Raises:
            NotFiniteError: the gradient is not finite; no step was taken.
        """
        units = objective.prepared(units)
        totals = _totals(units)
        size = self._config.micro_batch_size
        # Every process must take part in as many backward passes.
        passes = math.ceil(math.ceil(len(units) / self._ranks.count) / size)
        mine = list(self._ranks.share(list(units)))
        micros = _cut(mine, max(1, math.ceil(len(mine) / passes))) if mine else []
        parts: list[dict[str, float]] = []
        for number in range(passes):
            counts = number < len(micros)
            micro = micros[number] if counts else units[:1]
            last = number == passes - 1
            quiet = contextlib.nullcontext() if last else self._accelerator.no_sync(self.wrapped)
            with quiet:
                found = self._loss(micro, objective, totals, counts=counts)
                # Gradients are averaged over processes; the shares are to be added.
                self._accelerator.backward(found.loss * self._ranks.count)
            if counts:
                share = _totals(micro).of(objective.mean_over) / totals.of(objective.mean_over)
                stats = {
                    name: float(stat) * (1 if name.endswith("_max") else share)
                    for name, stat in found.stats.items()
                }
                parts.append({"loss": float(found.loss.detach()), **stats})
        norm = self._accelerator.clip_grad_norm_(self._parameters, self._config.max_grad_norm)
        if not bool(torch.isfinite(norm)) and self._accelerator.scaler is None:
            self.optimizer.zero_grad()
            raise NotFiniteError(
                f"gradient: expected finite numbers in step {self.steps}, got a norm of "
                f"{float(norm)}; lower learning_rate, or look for rewards that are very large"
            )
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * rate_factor
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1
        return {**_together(self._ranks.gather(parts)), "grad_norm": float(norm)}

    def _loss(
        self, units: Sequence[Unit], objective: Objective, totals: Totals, *, counts: bool
    ) -> LossOutput:
        responses = [response for unit in units for response in unit]
        rows = collate(responses, self._pad_id, self.dtype).to(self._accelerator.device)
        if not counts:  # a pass for the others' sake
            rows = replace(rows, mask=torch.zeros_like(rows.mask))
        # Where nothing is learnt, processes may have unequal numbers of passes, of which the
        # wrapper would synchronise buffers.
        module = self.wrapped if torch.is_grad_enabled() else self.module
        logprobs, values = module(rows.input_ids, rows.attention_mask, self._config.temperature)
        return objective.loss(logprobs, values, rows, totals)

    # --- state ------------------------------------------------------------------------------------

    def parameters(self) -> dict[str, Tensor]:
        """Copies of what is trained, on the CPU."""
        return {
            name: value.detach().cpu().clone()
            for name, value in self.module.named_parameters()
            if value.requires_grad
        }

    def load_parameters(self, values: dict[str, Tensor]) -> None:
        """Put back what :meth:`parameters` gave.

        Raises:
            InvalidInputError: names or shapes are others.
        """
        own = {n: p for n, p in self.module.named_parameters() if p.requires_grad}
        if own.keys() != values.keys() or any(own[n].shape != values[n].shape for n in own):
            raise InvalidInputError(
                "parameters: expected those of this model, got other names or shapes"
            )
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(values[name])

    def state(self) -> dict[str, Any]:
        """Optimizer, scaler and the number of steps, for :func:`torch.save`."""
        scaler = self._accelerator.scaler
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "steps": self.steps,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Put back what :meth:`state` gave."""
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"] is not None and self._accelerator.scaler is not None:
            self._accelerator.scaler.load_state_dict(state["scaler"])
        self.steps = int(state["steps"])

    def forget_moments(self) -> None:
        """Start the optimizer anew, as for a model whose weights were put back."""
        self.optimizer.state.clear()


def _parameter_groups(module: PolicyWithCritic, config: TrainerConfig) -> list[dict[str, Any]]:
    """Matrices decay, vectors do not; the critic may have a rate of its own."""
    critic = {name for name, _ in module.critic_parameters()}
    rates = {False: config.learning_rate, True: config.learning_rate}
    if isinstance(config, PPOConfig) and config.critic_learning_rate is not None:
        rates[True] = config.critic_learning_rate
    found: dict[tuple[bool, bool], list[Any]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            found.setdefault((name in critic, parameter.ndim > 1), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": rates[of_critic],
            "weight_decay": config.weight_decay if matrices else 0.0,
        }
        for (of_critic, matrices), parameters in found.items()
    ]


def _totals(units: Iterable[Unit]) -> Totals:
    units = list(units)
    return Totals(sum(len(r.response_ids) for unit in units for r in unit), len(units))


def _together(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Shares add up; maxima do not."""
    return {
        name: (max if name.endswith("_max") else math.fsum)(part[name] for part in parts)
        for name in parts[0]
    }


def _cut(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def _check(what: str, values: Floats) -> None:
    bad = ~np.isfinite(values)
    if bad.any():
        raise NotFiniteError(
            f"{what}: expected finite numbers, got {values[bad][0]} at response token "
            f"{int(bad.argmax())}; look for NaN or infinite values among the weights"
        )
