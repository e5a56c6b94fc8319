"""What TRL's settings mean for whoever produces its samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from asyncrlhf.errors import InvalidInputError

if TYPE_CHECKING:
    from decapod.lm import SamplingParams


@dataclass(frozen=True)
class Plan:
    """Counts and sampling settings, from an ``AsyncGRPOConfig``.

    Attributes:
        per_group: K, completions per prompt.
        per_version: B, prompt groups that TRL trains on between two weight updates.
        max_staleness: eta, updates that weights may be behind those of the optimizer step.
        params: how completions are drawn; their log-probabilities are those TRL trains against.
        seed: of the run.
        template: arguments of the chat template.
    """

    per_group: int
    per_version: int
    max_staleness: int
    params: SamplingParams
    seed: int
    template: dict[str, Any]

    @classmethod
    def of(cls, args: Any) -> Plan:
        """Read the settings.

        Args:
            args: ``trl.experimental.async_grpo.AsyncGRPOConfig``, the one the trainer gets.

        Raises:
            InvalidInputError: a setting that cannot be kept; the message has the remedy.
        """
        from decapod.lm import SamplingParams

        if args.token_budget is None or args.token_budget > 0:
            raise InvalidInputError(
                f"token_budget: expected 0, got {args.token_budget}; with a budget of tokens the "
                "number of samples of a step is not known before it, so no bound on staleness "
                "holds, and None asks a vLLM server for its size"
            )
        if args.max_staleness < 1:
            raise InvalidInputError(
                f"max_staleness: expected at least 1, got {args.max_staleness}; TRL's loader reads "
                "a micro-batch ahead of the step that trains on it, so with 0 it would wait for "
                "samples of weights that do not exist yet"
            )
        if args.repetition_penalty != 1 or args.min_p:
            raise InvalidInputError(
                "repetition_penalty, min_p: expected 1 and None, got "
                f"{args.repetition_penalty} and {args.min_p}; these engines draw with temperature, "
                "top_k and top_p"
            )
        samples = (
            args.per_device_train_batch_size
            * args.gradient_accumulation_steps
            * args.world_size
            * args.weight_sync_steps
        )
        if args.num_generations < 1 or samples % args.num_generations:
            raise InvalidInputError(
                f"num_generations: expected a divisor of the {samples} samples between two weight "
                "updates (per_device_train_batch_size x gradient_accumulation_steps x processes x "
                f"weight_sync_steps), got {args.num_generations}"
            )
        return cls(
            per_group=args.num_generations,
            per_version=samples // args.num_generations,
            max_staleness=args.max_staleness,
            params=SamplingParams(
                max_new_tokens=args.max_completion_length,
                temperature=args.temperature,
                top_p=args.top_p,
                top_k=args.top_k,
                logprobs_of="sampler",
            ),
            seed=args.seed,
            template=dict(args.chat_template_kwargs or {}),
        )

    def version_of(self, group: int) -> int:
        """Weight updates before the step that trains on a group; the first groups have 0."""
        return group // self.per_version

    def scheduled_version(self, group: int) -> int:
        """Weight updates seen by the weights that generate it: as old as may be, never older."""
        return max(0, self.version_of(group) - self.max_staleness)
