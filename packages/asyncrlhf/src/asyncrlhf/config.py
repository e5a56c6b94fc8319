"""The settings of a run: transformers' own, and those of asynchronous RLHF."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final, get_args

from transformers import TrainingArguments

from asyncrlhf import losses
from asyncrlhf.errors import InvalidInputError
from asyncrlhf.schedule import RoundSchedule
from asyncrlhf.settings import (
    IsCorrection,
    OnRewardError,
    Scoring,
    StalePolicy,
    at_least,
    one_of,
    positive,
)

_OF_RESULT: Final = (
    "loss", "beta", "kl_coef", "cliprange", "gamma", "lam", "vf_coef", "is_correction", "is_cap",
    "num_generations", "minibatches_per_round", "epochs_per_round", "max_staleness", "stale_policy",
    "prompts_per_step", "temperature", "max_completion_length", "missing_eos_score",
    "reward_weights", "on_reward_error", "shuffle_prompts", "seed", "learning_rate",
    "lr_scheduler_type", "lr_scheduler_kwargs", "optim", "optim_args", "adam_beta1", "adam_beta2",
    "adam_epsilon", "weight_decay", "max_grad_norm", "bf16", "fp16",
)  # fmt: skip
_FOREVER = 10**8  # seconds


def _help(*lines: str) -> dict[str, str]:
    return {"help": " ".join(lines)}


@dataclass
class AsyncRLHFConfig(TrainingArguments):
    """What :class:`~asyncrlhf.AsyncRLHFTrainer` does; every field of ``TrainingArguments`` too.

    Counting: a minibatch of one optimizer step has ``per_device_train_batch_size ×
    gradient_accumulation_steps × processes`` *prompts* (B), each with ``num_generations``
    completions (K). A round has ``minibatches_per_round`` minibatches (N) and is trained on
    ``epochs_per_round`` times (T). The actor runs ``rounds_ahead`` rounds ahead (D): 0 is
    synchronous, 1 is the paper's asynchronous mode.

    Raises:
        InvalidInputError: a value out of range, or values that do not go together.
    """

    loss: str = field(
        default="online_dpo", metadata=_help("One of " + ", ".join(losses.INFO) + ".")
    )
    beta: float = field(
        default=0.1, metadata=_help("Strength of the pull to the reference in online_dpo and ipo.")
    )
    kl_coef: float = field(
        default=0.05, metadata=_help("Weight of the KL penalty in the rewards of the other losses.")
    )
    cliprange: float = field(
        default=0.2, metadata=_help("Half width of the clipping range of the probability ratio.")
    )
    gamma: float = field(default=1.0, metadata=_help("Discount (ppo)."))
    lam: float = field(
        default=0.95, metadata=_help("Decay of generalised advantage estimation (ppo).")
    )
    vf_coef: float = field(default=0.1, metadata=_help("Weight of the value loss (ppo)."))
    num_generations: int = field(default=2, metadata=_help("K: completions per prompt."))
    minibatches_per_round: int = field(
        default=1, metadata=_help("N: minibatches generated per round.")
    )
    epochs_per_round: int = field(default=1, metadata=_help("T: passes over a round."))
    rounds_ahead: int = field(
        default=1, metadata=_help("D: rounds that generation may run ahead; 0 is synchronous.")
    )
    max_staleness: int | None = field(
        default=None,
        metadata=_help(
            "Most optimizer steps between the weights that generate and those that are updated."
        ),
    )
    stale_policy: str = field(
        default="block",
        metadata=_help(
            "block: run fewer rounds ahead to keep max_staleness; drop: skip staler minibatches."
        ),
    )
    is_correction: str | None = field(
        default=None,
        metadata=_help(
            "Correction of policy-gradient losses for sampler against learner: truncate_token, "
            "truncate_sequence, mask_token, mask_sequence, or decoupled."
        ),
    )
    is_cap: float = field(default=2.0, metadata=_help("Largest importance weight."))
    temperature: float = field(
        default=0.7, metadata=_help("Sampling temperature; log-probabilities use it, too.")
    )
    max_prompt_length: int | None = field(
        default=None,
        metadata=_help(
            "Longest prompt in tokens; longer ones are refused. None: what the model allows."
        ),
    )
    max_completion_length: int = field(default=53, metadata=_help("Most tokens of a completion."))
    missing_eos_score: float | None = field(
        default=-1.0,
        metadata=_help("Score of a completion without end of sequence; None keeps its own."),
    )
    reward_weights: list[float] | None = field(
        default=None, metadata=_help("Weight of each reward function; None: 1.")
    )
    on_reward_error: str = field(
        default="raise",
        metadata=_help("raise: stop at a bad score; drop: leave its group out and report it."),
    )
    probe_rewards: bool = field(
        default=True,
        metadata=_help(
            "Call the reward functions with an empty completion before the first round."
        ),
    )
    scoring: str = field(
        default="learner",
        metadata=_help(
            "Where rewards are computed: learner, or process (a third stage of its own)."
        ),
    )
    shuffle_prompts: bool = field(
        default=True, metadata=_help("Draw a new order of the prompts for every pass.")
    )
    eval_temperature: float = field(
        default=0.0, metadata=_help("Temperature of evaluation; 0 is greedy.")
    )
    round_timeout: float = field(
        default=3600.0, metadata=_help("Seconds to wait for a round before giving up.")
    )
    learner_threads: int | None = field(
        default=None,
        metadata=_help(
            "Numeric threads of the learner on a CPU; None: half of the cores where a process of "
            "the actor shares the machine, else as set."
        ),
    )
    learner_cores: list[int] | None = field(
        default=None, metadata=_help("CPU cores that the learner is pinned to.")
    )
    verify_weights: bool = field(
        default=True,
        metadata=_help(
            "Checksum every published version, and compare it with what the actor used."
        ),
    )
    logging_steps: float = field(default=10, metadata=_help("Optimizer steps between two logs."))

    def __post_init__(self) -> None:
        positive("round_timeout", self.round_timeout)
        # Other ranks wait for a round inside a broadcast, which must not give up before.
        patience = int(min(self.round_timeout, _FOREVER)) + 60
        self.ddp_timeout: int = max(self.ddp_timeout, patience)
        super().__post_init__()
        one_of("loss", self.loss, losses.INFO)
        one_of("stale_policy", self.stale_policy, get_args(StalePolicy))
        one_of("on_reward_error", self.on_reward_error, get_args(OnRewardError))
        one_of("scoring", self.scoring, get_args(Scoring))
        for name in ("save_strategy", "eval_strategy", "logging_strategy"):
            one_of(name, getattr(self, name).value, ("no", "steps"))  # prompts have no epochs
        if self.is_correction is not None:
            one_of("is_correction", self.is_correction, get_args(IsCorrection))
            if self.loss in ("online_dpo", "ipo", "best_of_k", "copg"):
                raise InvalidInputError(
                    f"is_correction: {self.loss} has no importance ratio to correct; leave it None"
                )
            useless = {"rloo": ("decoupled",), "proximal_rloo": ("truncate_token", "mask_token")}
            if self.is_correction in useless.get(self.loss, ()):
                raise InvalidInputError(
                    f"is_correction: {self.is_correction} does not go with {self.loss}, whose "
                    "ratio, if any, is that of whole sequences; take truncate_sequence or "
                    "mask_sequence"
                )
        info = losses.INFO[self.loss]
        if self.num_generations < info.min_completions:
            raise InvalidInputError(
                f"num_generations: {self.loss} compares completions of one prompt and needs at "
                f"least {info.min_completions}, got {self.num_generations}"
            )
        for name in ("beta", "temperature", "is_cap", "max_completion_length"):
            positive(name, getattr(self, name))
        for name in ("kl_coef", "cliprange", "vf_coef", "eval_temperature"):
            at_least(name, getattr(self, name), 0)
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise InvalidInputError(
                    f"{name}: expected a number from 0 to 1, got {getattr(self, name)}"
                )
        self.schedule()  # refuses N, T, D and max_staleness that do not go together

    def schedule(self) -> RoundSchedule:
        """N, T and D; with ``stale_policy="block"``, the largest D that keeps ``max_staleness``.

        Raises:
            InvalidInputError: no D keeps it.
        """
        schedule = RoundSchedule(
            self.minibatches_per_round, self.epochs_per_round, self.rounds_ahead
        )
        if self.max_staleness is None:
            return schedule
        if self.stale_policy == "drop":
            least = schedule.ahead * schedule.steps_per_round
            if self.max_staleness < least:
                raise InvalidInputError(
                    f"max_staleness: expected at least D*N*T={least}, got {self.max_staleness}; "
                    "every minibatch would be staler and dropped. Lower rounds_ahead, or set "
                    "stale_policy='block'"
                )
            return schedule
        try:
            return schedule.with_max_staleness(self.max_staleness)
        except InvalidInputError as error:
            raise InvalidInputError(f"max_staleness: {error}") from None

    def result_settings(self) -> dict[str, Any]:
        """What the result of a run depends on, by name, as JSON holds it."""
        values = {name: getattr(self, name) for name in _OF_RESULT}
        return {k: v.value if isinstance(v, Enum) else v for k, v in values.items()}

    @property
    def prompts_per_step(self) -> int:
        """B: prompts of one optimizer step, over all processes."""
        per_device = self.per_device_train_batch_size * self.gradient_accumulation_steps
        return int(per_device * self.world_size)
