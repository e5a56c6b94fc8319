"""VinePPO in TRL (1.16): its GRPO trainer with an advantage for every token.

TRL samples, scores, shuffles, accumulates and steps as ever. In between, rollouts from the states
in the middle of each answer tell what its steps are worth, and the advantages of the group, one per
answer, make room for those of the steps, one per token::

    trainer = VineGRPOTrainer(
        model, reward_funcs, args=GRPOConfig(...), train_dataset=dataset, num_rollouts=9
    )
    trainer.train()
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vineppo.advantages import WHITENINGS, Whitening, whiten
from vineppo.backend import RolloutBackend, Usage
from vineppo.errors import InvalidInputError, one_of
from vineppo.integrations.trl_contract import TRLContractError, check_contract, check_output
from vineppo.integrations.trl_rewards import TrainerReward, rows_of, weighted
from vineppo.integrations.trl_settings import (
    check_parts,
    check_settings,
    check_shared_vllm,
    check_text_only,
    sampling_params,
)
from vineppo.values import ConstantValueEstimator, MonteCarloValueEstimator, ValueEstimator
from vineppo.vines import VineCredit, VineValues

check_contract()

from trl import GRPOTrainer  # noqa: E402 - another release is refused before its names are used
from trl.models.utils import unwrap_model_for_generation  # noqa: E402

__all__ = ["TRLContractError", "VineBatch", "VineGRPOTrainer"]


@dataclass(frozen=True)
class VineBatch:
    """The answers of a generation batch of one process, as they were sampled, and their credit.

    Attributes:
        prompt_ids: of each answer, without padding.
        completion_ids: of each answer, without padding.
        finished: of each answer, whether an EOS token ended it.
        rows: of each answer, the place of the first one to the same row of the data set.
        seed: of the rollouts.
        credit: before whitening.
    """

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    finished: list[bool]
    rows: list[int]
    seed: int
    credit: VineCredit


@dataclass(frozen=True)
class _Scored:
    """What TRL handed to its reward functions, and got."""

    inputs: Sequence[dict[str, Any]]
    prompts: Sequence[Any]
    completion_ids: Sequence[Sequence[int]]
    rewards: Tensor


class VineGRPOTrainer(GRPOTrainer):
    """TRL's ``GRPOTrainer`` with advantages of steps (Eq. 6 of arXiv 2410.01679) for tokens.

    Takes all arguments of ``GRPOTrainer`` and those below. In evaluation nothing is rolled out, and
    the loss there is GRPO's. ``scale_rewards`` has no effect: ``whiten`` stands in its place.

    Args:
        num_rollouts: K, from each state.
        segmenter: what a step is, by name or an object (:mod:`vineppo.segmenters`).
        max_value_steps: states beyond that many steps take the return of their own trajectory;
            None is no cap.
        lam: λ over steps; 0 is the paper's.
        whiten: brings the advantages to a common scale over the tokens of all processes that were
            generated together: "batch", "std", or None (:func:`vineppo.advantages.whiten`).
        rollout_backend: samples from states; its ``load_weights`` gets the policy after each
            optimizer step, unless it holds the vLLM engine that TRL itself keeps up to date. A
            function is called with the trainer, when that is made, and gives the backend. None
            generates with the policy itself by :class:`vineppo.rollout.TransformersBackend`.
        value_estimator: gives the values of states in place of K rollouts. It gets states whose
            ``row`` is a place in the batch.

    Attributes:
        last_vines: what the last generation batch was credited with; None before the first.

    Raises:
        InvalidInputError: settings of TRL that token advantages or rollouts cannot keep, tools,
            images, or an argument out of its range; the message has the remedy.
    """

    def __init__(
        self,
        *positional: Any,
        num_rollouts: int = 9,
        segmenter: Any = "newline",
        max_value_steps: int | None = None,
        lam: float = 0.0,
        whiten: Whitening = "batch",
        rollout_backend: RolloutBackend | Callable[[Any], RolloutBackend] | None = None,
        value_estimator: ValueEstimator | None = None,
        **named: Any,
    ) -> None:
        given = inspect.signature(GRPOTrainer.__init__).bind(self, *positional, **named).arguments
        one_of("whiten", whiten, WHITENINGS)
        check_parts(given)
        if given.get("args") is not None:
            check_settings(given["args"])
        if value_estimator is not None and rollout_backend is not None:
            raise InvalidInputError(
                "rollout_backend: expected None beside a value_estimator, which has its own, got "
                f"{type(rollout_backend).__name__}"
            )
        columns = getattr(given.get("train_dataset"), "column_names", None) or ()
        check_text_only(columns, vision=False)
        # Whatever can be refused is refused before a model is loaded: the segmenter, caps and λ.
        VineValues(
            ConstantValueEstimator(), segmenter=segmenter, max_value_steps=max_value_steps, lam=lam
        )
        super().__init__(*positional, **named)
        check_text_only((), vision=self._is_vlm)
        self._whiten = whiten
        self._reward = TrainerReward(self)
        self._backend: RolloutBackend | None = None
        if value_estimator is None:
            self._backend = self._made(rollout_backend)
            value_estimator = MonteCarloValueEstimator(
                self._backend,
                self._reward,
                num_rollouts,
                params=sampling_params(self.args, self.eos_token_ids, self._backend),
                max_response_tokens=self.max_completion_length,
            )
        self._vines = VineValues(
            value_estimator,
            tokenizer=self._tokenizer,
            segmenter=segmenter,
            max_value_steps=max_value_steps,
            lam=lam,
        )
        self._scored: _Scored | None = None
        self._loaded_at = -1
        self._batch_of_step = (-1, 0)
        self.last_vines: VineBatch | None = None

    def _made(
        self, backend: RolloutBackend | Callable[[Any], RolloutBackend] | None
    ) -> RolloutBackend:
        if backend is None:
            if self._dist.is_fsdp or (
                self._dist.is_zero3 and not self.args.ds3_gather_for_generation
            ):
                raise InvalidInputError(
                    "rollout_backend: expected one that generates outside the sharded model, got "
                    "None; processes have different numbers of rollouts, and a forward pass of "
                    "sharded weights waits for all of them. Pass a VLLMBackend or ServersBackend"
                )
            from vineppo.rollout import TransformersBackend

            return TransformersBackend(
                self.accelerator.unwrap_model(self.model),
                self._tokenizer,
                eos_token_ids=self.eos_token_ids,
            )
        made: Any = backend
        if not hasattr(made, "generate") and callable(made):
            made = made(self)
        if not hasattr(made, "generate"):
            raise InvalidInputError(
                "rollout_backend: expected a RolloutBackend, a function of the trainer that makes "
                f"one, or None, got {type(made).__name__}"
            )
        if self._is_of_trl(made):
            check_shared_vllm(self.args)
        return made  # type: ignore[no-any-return]

    def _is_of_trl(self, backend: Any) -> bool:
        """Whether the backend generates by the vLLM engine that TRL itself samples with."""
        engine = getattr(getattr(self, "vllm_generation", None), "llm", None)
        return engine is not None and getattr(backend, "llm", None) is engine

    def _calculate_rewards(
        self,
        inputs: Sequence[dict[str, Any]],
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids_list: Sequence[Sequence[int]],
    ) -> Tensor:
        """TRL's rewards (all processes, functions); what they are of is kept for the rollouts."""
        rewards: Tensor = super()._calculate_rewards(
            inputs, prompts, completions, completion_ids_list
        )
        first = self.accelerator.process_index * len(prompts)
        mine = rewards[first : first + len(prompts)]
        self._scored = _Scored(inputs, prompts, completion_ids_list, mine)
        return rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's batch, with ``advantages`` (B, T) of steps in training."""
        check_text_only(inputs[0], vision=False)
        batch: dict[str, Any] = super()._generate_and_score_completions(inputs)
        if not self.model.training:
            return batch
        check_output(batch)
        if "tool_mask" in batch:
            raise InvalidInputError(
                "rollout_func: expected answers that the policy alone wrote, got an env_mask; a "
                "state in the middle of such an answer cannot be restarted from its tokens"
            )
        before = self._backend.usage if self._backend is not None else Usage()
        self.last_vines = vines = self._credited(batch)
        used = self._backend.usage - before if self._backend is not None else None
        mask = batch["completion_mask"].bool().cpu()
        advantages = vines.credit.padded(mask.shape[1])
        self._log_vines(vines, advantages, mask, used)
        advantages = whiten(advantages, mask, self._whiten, self._summed)
        old: Tensor = batch["advantages"]
        batch["advantages"] = advantages.to(device=old.device, dtype=old.dtype)
        self._show_advantages(batch["advantages"], mask)
        return batch

    def _credited(self, batch: dict[str, Any]) -> VineBatch:
        """The credit of the batch's answers, by their ids as they were sampled."""
        scored, self._scored = self._scored, None
        assert scored is not None, "TRL scores every batch it generates"
        prompt_ids = [
            ids[mask.bool()].tolist()
            for ids, mask in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)
        ]
        # Not from the padded batch: TRL can mask whole answers there.
        completion_ids = [list(map(int, ids)) for ids in scored.completion_ids]
        eos = set(self.eos_token_ids)
        finished = [bool(ids) and ids[-1] in eos for ids in completion_ids]
        rows = rows_of(scored.inputs, prompt_ids)
        scores = weighted(scored.rewards, self.reward_weights)
        # Nothing is learned from answers that TRL masks, so nothing is spent on them.
        scores[~batch["completion_mask"].bool().any(dim=1).cpu().numpy()] = np.nan
        self._reward.of_batch(scored.inputs, scored.prompts)
        seed = self._next_seed()
        with self._policy_for_rollouts():
            credit = self._vines(
                prompt_ids, completion_ids, finished, rows, scores=scores.tolist(), seed=seed
            )
        return VineBatch(prompt_ids, completion_ids, finished, rows, seed, credit)

    def _next_seed(self) -> int:
        """Another one for each batch, the same for it in a run that is repeated or resumed."""
        step, index = self._batch_of_step
        index = index + 1 if step == self.state.global_step else 0
        self._batch_of_step = (self.state.global_step, index)
        text = f"{self.args.seed}|{self.state.global_step}|{index}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1

    @contextmanager
    def _policy_for_rollouts(self) -> Iterator[None]:
        """The policy as TRL generates with it, handed to the backend after each optimizer step."""
        if self._backend is None:
            yield
            return
        with (
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as policy,
            torch.no_grad(),
            self._dist.summon_full_params(self.model_wrapped, recurse=False),
        ):
            if self.state.global_step != self._loaded_at and not self._is_of_trl(self._backend):
                self._backend.load_weights(policy)
                self._loaded_at = self.state.global_step
            yield

    def _summed(self, numbers: Tensor) -> Tensor:
        """A float64 tensor, summed over all processes."""
        if self.accelerator.num_processes == 1:
            return numbers
        total: Tensor = self.accelerator.reduce(numbers.to(self.accelerator.device), "sum")
        return total.cpu()

    def _log_vines(
        self, vines: VineBatch, advantages: Tensor, mask: Tensor, used: Usage | None
    ) -> None:
        values = np.concatenate(vines.credit.step_values)
        known = values[~np.isnan(values)]
        sums = {
            "values": float(known.sum()),
            "states": float(len(known)),
            "advantages": float(advantages[mask].abs().sum()),
            "learned": float(mask.sum()),
            "steps": float(len(values)),
            "answers": float(len(vines.credit.scores)),
        }
        if used is not None:
            sums |= {
                "rollouts": float(used.requests),
                "tokens": float(used.generated_tokens),
                "prompt": float(used.prompt_tokens),
                "reused": float(used.reused_tokens),
                "seconds": used.seconds,
            }
        found = self._summed(torch.tensor(list(sums.values()), dtype=torch.float64)).tolist()
        total = dict(zip(sums, found, strict=True))
        metrics = {
            "value_mean": total["values"] / max(total["states"], 1),
            "advantage_abs_mean": total["advantages"] / max(total["learned"], 1),
            "steps_mean": total["steps"] / total["answers"],
            "states": total["states"],
        }
        if used is not None:
            metrics |= {
                "rollouts": total["rollouts"],
                "generated_tokens": total["tokens"],
                "hit_rate": total["reused"] / max(total["prompt"], 1),
                "seconds": total["seconds"] / self.accelerator.num_processes,
            }
        for name, value in metrics.items():
            self._metrics["train"][f"vine/{name}"].append(value)

    def _show_advantages(self, advantages: Tensor, mask: Tensor) -> None:
        """Put the mean over its tokens in each answer's line of TRL's table of completions."""
        on = mask.to(advantages.device)
        means = (advantages * on).sum(1) / on.sum(1).clamp(min=1)
        shown = self.accelerator.gather(means).tolist()
        table = self._logs["advantages"]
        for _ in range(min(len(shown), len(table))):
            table.pop()
        table.extend(shown)
