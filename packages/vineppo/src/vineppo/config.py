"""Settings of the trainers, checked when they are made.

The defaults are those of the paper (Appendix C of arXiv 2410.01679, as its specification reads
them); where its repository differs, the field says so.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from vineppo.errors import InvalidInputError, at_least, fraction, one_of, positive

Whitening = Literal["batch", "std"]
KL = Literal["k1", "k2", "k3"]
Reduction = Literal["token", "sequence", "sequence_sum"]
KLReduction = Literal["token", "sequence_sum"]
Schedule = Literal["linear", "cosine", "constant"]
Precision = Literal["no", "bf16", "fp16"]


@dataclass(frozen=True)
class TrainerConfig:
    """What every trainer of the loop has.

    An iteration samples ``episodes_per_iteration`` answers, ``num_generations`` to a prompt, gives
    each token its credit, and takes optimizer steps on them.

    Attributes:
        output_dir: where checkpoints and the resolved settings go.
        iterations: of the whole run; 650 for GSM8K and 1000 for MATH in the paper.
        episodes_per_iteration: sampled answers of one iteration, over all processes.
        num_generations: answers per prompt.
        temperature: of sampling; log-probabilities of old, new and reference policy are those of
            logits divided by it.
        top_p: of sampling. Below 1 the sampler is not the tempered policy whose log-probabilities
            the loss uses, so the update is on-policy only up to the cut; 1 makes it exact. The
            repository of the paper uses 0.9, the paper names none.
        max_response_tokens: most tokens of an answer.
        stop: texts that end an answer.
        unfinished_score: of an answer that is cut by length, whatever a reward function says; None
            lets the reward functions decide.
        reward_weights: of several reward functions; None adds them.
        mini_batch_size: episodes of one optimizer step, over all processes.
        micro_batch_size: episodes that go through the model together, on one process.
        num_epochs: passes over the episodes of an iteration.
        learning_rate: of AdamW, at its peak.
        weight_decay: of AdamW, on matrices.
        adam_betas: of AdamW.
        adam_epsilon: of AdamW.
        lr_schedule: after the warm-up, over the progress of the run.
        warmup_ratio: share of the run in which the rate rises linearly.
        max_grad_norm: gradients are clipped to it.
        mixed_precision: of forward and backward passes.
        gradient_checkpointing: compute activations twice to save memory.
        eval_every: iterations between evaluations; 0 evaluates only when asked.
        eval_temperature: of evaluation; 0 is greedy.
        eval_top_p: of evaluation.
        eval_samples: answers per prompt in evaluation.
        save_every: iterations between checkpoints; 0 writes none.
        save_total_limit: checkpoints kept; None keeps all.
        log_every: iterations between logs.
        report_to: reporters of transformers, such as ``("tensorboard",)``.
        run_name: for reporters.
        progress: show a bar with the time that is left.
        seed: of prompts, sampling and shuffling.
        use_cpu: do not use an accelerator.

    Raises:
        InvalidInputError: a value out of its range; the message names it.
    """

    output_dir: str = "vineppo-output"
    iterations: int = 650
    episodes_per_iteration: int = 512
    num_generations: int = 8
    temperature: float = 0.6
    top_p: float = 0.9
    max_response_tokens: int = 1024
    stop: tuple[str, ...] = ()
    unfinished_score: float | None = 0.0
    reward_weights: tuple[float, ...] | None = None
    mini_batch_size: int = 64
    micro_batch_size: int = 8
    num_epochs: int = 2
    learning_rate: float = 1e-6
    weight_decay: float = 0.0
    adam_betas: tuple[float, float] = (0.9, 0.999)
    adam_epsilon: float = 1e-8
    lr_schedule: Schedule = "linear"
    warmup_ratio: float = 0.03
    max_grad_norm: float = 1.0
    mixed_precision: Precision = "no"
    gradient_checkpointing: bool = False
    eval_every: int = 0
    eval_temperature: float = 0.35
    eval_top_p: float = 0.9
    eval_samples: int = 16
    save_every: int = 0
    save_total_limit: int | None = None
    log_every: int = 1
    report_to: tuple[str, ...] = ()
    run_name: str | None = None
    progress: bool = True
    seed: int = 0
    use_cpu: bool = False

    def __post_init__(self) -> None:
        for name in ("stop", "report_to", "reward_weights", "adam_betas"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise InvalidInputError(
                    f"{name}: expected several values, got one text; write ({value!r},)"
                )
            if value is not None:
                object.__setattr__(self, name, tuple(value))
        counts = (
            "iterations", "episodes_per_iteration", "num_generations", "max_response_tokens",
            "mini_batch_size", "micro_batch_size", "num_epochs", "eval_samples", "log_every",
        )  # fmt: skip
        for name in counts:
            _whole(name, getattr(self, name), 1)
        for name in ("eval_every", "save_every", "seed"):
            _whole(name, getattr(self, name), 0)
        if self.save_total_limit is not None:
            _whole("save_total_limit", self.save_total_limit, 1)
        for name in ("learning_rate", "max_grad_norm", "adam_epsilon"):
            positive(name, getattr(self, name))
        at_least("weight_decay", self.weight_decay, 0)
        at_least("eval_temperature", self.eval_temperature, 0)
        fraction("warmup_ratio", self.warmup_ratio)
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise InvalidInputError(
                f"temperature: expected a finite number above 0, got {self.temperature}; answers "
                "that are not sampled have no policy gradient"
            )
        for name in ("top_p", "eval_top_p"):
            if not 0 < getattr(self, name) <= 1:
                raise InvalidInputError(
                    f"{name}: expected a number above 0 and at most 1, got {getattr(self, name)}"
                )
        if [0 <= beta < 1 for beta in self.adam_betas] != [True, True]:
            raise InvalidInputError(
                f"adam_betas: expected two numbers from 0 to below 1, got {self.adam_betas}"
            )
        if self.reward_weights is not None and not all(map(math.isfinite, self.reward_weights)):
            raise InvalidInputError(
                f"reward_weights: expected finite numbers, got {self.reward_weights}"
            )
        one_of("lr_schedule", self.lr_schedule, ("linear", "cosine", "constant"))
        one_of("mixed_precision", self.mixed_precision, ("no", "bf16", "fp16"))
        if self.unfinished_score is not None and not math.isfinite(self.unfinished_score):
            raise InvalidInputError(
                f"unfinished_score: expected a finite number or None, got {self.unfinished_score}"
            )
        if self.episodes_per_iteration % self.num_generations:
            raise InvalidInputError(
                f"episodes_per_iteration: expected a multiple of num_generations="
                f"{self.num_generations}, got {self.episodes_per_iteration}"
            )

    @property
    def prompts_per_iteration(self) -> int:
        """Prompts that are answered in one iteration, over all processes."""
        return self.episodes_per_iteration // self.num_generations

    def result_settings(self) -> dict[str, Any]:
        """What the result of a run depends on, by name, as JSON holds it."""
        return {
            f.name: list(value) if isinstance(value := getattr(self, f.name), tuple) else value
            for f in fields(self)
            if f.name not in _OF_THE_RIM
        }

    def to_dict(self) -> dict[str, Any]:
        """All settings by name."""
        return asdict(self)


# What a run may be resumed with other values of: where it writes and what it shows.
_OF_THE_RIM = frozenset(
    ("output_dir", "save_every", "save_total_limit", "log_every", "report_to", "run_name",
     "progress", "use_cpu", "eval_every", "eval_temperature", "eval_top_p", "eval_samples")
)  # fmt: skip


@dataclass(frozen=True)
class PolicyGradientConfig(TrainerConfig):
    """What PPO's loss has, whatever gives the advantages.

    Attributes:
        clip_range: of the ratio of new to old policy.
        whiten: ``"batch"`` centres and scales the advantages over the response tokens of each
            mini-batch, ``"std"`` only scales them, None leaves them, which alone keeps the gradient
            unbiased.
        pg_reduction: the policy loss is the mean over the tokens of a mini-batch (``"token"``), the
            mean over its sequences of token means (``"sequence"``) or of token sums
            (``"sequence_sum"``, the policy gradient proper).
        beta: weight of the divergence from the reference policy, which is a term of the loss.
        kl: its estimator.
        kl_clamp: upper bound of its value at a token.
        kl_reduction: a sum over the tokens of a sequence, averaged over sequences, so that its
            weight beside the policy loss grows with length, as in the paper's repository; or a mean
            over tokens.
        ratio_limit: a micro-batch whose mean ratio exceeds it does not count.
    """

    clip_range: float = 0.2
    whiten: Whitening | None = "batch"
    pg_reduction: Reduction = "token"
    beta: float = 1e-4
    kl: KL = "k3"
    kl_clamp: float = 10.0
    kl_reduction: KLReduction = "sequence_sum"
    ratio_limit: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("clip_range", self.clip_range)
        at_least("beta", self.beta, 0)
        positive("kl_clamp", self.kl_clamp)
        positive("ratio_limit", self.ratio_limit)
        one_of("whiten", self.whiten, ("batch", "std", None))
        one_of("kl", self.kl, ("k1", "k2", "k3"))
        one_of("pg_reduction", self.pg_reduction, ("token", "sequence", "sequence_sum"))
        one_of("kl_reduction", self.kl_reduction, ("token", "sequence_sum"))
        if self.kl == "k1" and self.beta > 0:
            raise InvalidInputError(
                "kl: k1 as a term of the loss has an expected gradient of zero; take 'k2', whose "
                "gradient is that of the divergence, or 'k3'"
            )


@dataclass(frozen=True)
class VinePPOConfig(PolicyGradientConfig):
    """VinePPO: values of intermediate states from rollouts (Eq. 5 and 6 of the paper).

    Attributes:
        num_rollouts: K, rollouts of each state; with ``adaptive_pilot``, the mean over states.
        segmenter: what a step is: ``"newline"``, ``"gsm8k"``, ``"latex"``, ``"token"``,
            ``"whole"``, ``"fixed:16"``. The trainer takes an object as well.
        max_value_steps: states beyond that many steps get no rollouts, and the value of the
            trajectory's own return; 25 for GSM8K in the paper's repository.
        gamma: discount per step.
        lam: of generalised advantages over steps; 0 is Eq. 6.
        adaptive_pilot: None gives every state K rollouts; a number gives each state that many at
            first and spends the rest where the outcome is uncertain, in each process by itself.
    """

    num_rollouts: int = 9
    segmenter: str = "newline"
    max_value_steps: int | None = None
    gamma: float = 1.0
    lam: float = 0.0
    adaptive_pilot: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _whole("num_rollouts", self.num_rollouts, 1)
        for name, least in (("max_value_steps", 1), ("adaptive_pilot", 2)):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), least)
        if self.adaptive_pilot is not None and self.adaptive_pilot >= self.num_rollouts:
            raise InvalidInputError(
                f"adaptive_pilot: expected fewer than num_rollouts={self.num_rollouts}, got "
                f"{self.adaptive_pilot}"
            )
        fraction("gamma", self.gamma)
        fraction("lam", self.lam)


@dataclass(frozen=True)
class PPOConfig(PolicyGradientConfig):
    """PPO with a critic, the baseline that VinePPO is compared with.

    Attributes:
        gamma: discount per token.
        lam: of generalised advantages over tokens; 1 is the best in the paper's search.
        critic: ``"copy"``, a scalar head on a full copy of the model, or ``"shared"``, a head on
            the policy's own last layer.
        critic_learning_rate: of the critic; None takes ``learning_rate``.
        value_coefficient: weight of the value loss.
        value_clip_range: how far a value may move from the old one before it counts no more.
        constant_value: instead of a critic, every state has this value; 0.5 in the ablation of the
            paper's repository.
    """

    gamma: float = 1.0
    lam: float = 1.0
    critic: Literal["copy", "shared"] = "copy"
    critic_learning_rate: float | None = None
    value_coefficient: float = 1.0
    value_clip_range: float = 0.2
    constant_value: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        fraction("gamma", self.gamma)
        fraction("lam", self.lam)
        one_of("critic", self.critic, ("copy", "shared"))
        positive("value_clip_range", self.value_clip_range)
        at_least("value_coefficient", self.value_coefficient, 0)
        if self.critic_learning_rate is not None:
            positive("critic_learning_rate", self.critic_learning_rate)
        if self.constant_value is not None and not math.isfinite(self.constant_value):
            raise InvalidInputError(
                f"constant_value: expected a finite number, got {self.constant_value}"
            )


@dataclass(frozen=True)
class RLOOConfig(PolicyGradientConfig):
    """RLOO: the score less the mean score of the other answers, for every token."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _several(self.num_generations, "RLOO")


@dataclass(frozen=True)
class GRPOConfig(PolicyGradientConfig):
    """GRPO: the score less the mean of the group, divided by its deviation, for every token.

    Attributes:
        scale: divide by the deviation.
    """

    scale: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _several(self.num_generations, "GRPO")


@dataclass(frozen=True)
class RestEMConfig(TrainerConfig):
    """RestEM: fine-tuning on the policy's own right answers.

    Attributes:
        iterations: rounds of sampling and fine-tuning.
        num_epochs: most passes over the right answers of an iteration.
        correct_above: a score above it is right.
        max_correct_per_prompt: right answers kept per prompt; None keeps all.
        validation_share: of the prompts, whose right answers are held out; fine-tuning of an
            iteration stops when their loss rises, and goes back to the best epoch. 0 never stops.
        restart: start the fine-tuning of every iteration from the model as it was given.
    """

    iterations: int = 10
    num_epochs: int = 8
    correct_above: float = 0.5
    max_correct_per_prompt: int | None = None
    validation_share: float = 0.1
    restart: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.validation_share < 1:
            raise InvalidInputError(
                f"validation_share: expected a number from 0 to below 1, got "
                f"{self.validation_share}"
            )
        if self.max_correct_per_prompt is not None:
            _whole("max_correct_per_prompt", self.max_correct_per_prompt, 1)


@dataclass(frozen=True)
class DPOPositiveConfig(TrainerConfig):
    """DPO-Positive on pairs of a right and a wrong answer of the policy.

    Attributes:
        iterations: rounds of sampling and training; one in the paper.
        num_generations: answers per prompt; 64 in the paper.
        num_epochs: passes over the pairs.
        dpo_beta: 0.1 for MATH and 0.3 for GSM8K with RhoMath in the paper's repository.
        dpo_lambda: weight of the penalty that keeps the right answer probable; 0 is DPO.
        max_pairs_per_prompt: most pairs of a prompt.
        correct_above: a score above it is right.
    """

    iterations: int = 1
    num_generations: int = 64
    num_epochs: int = 3
    dpo_beta: float = 0.1
    dpo_lambda: float = 50.0
    max_pairs_per_prompt: int = 64
    correct_above: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("dpo_beta", self.dpo_beta)
        at_least("dpo_lambda", self.dpo_lambda, 0)
        _whole("max_pairs_per_prompt", self.max_pairs_per_prompt, 1)
        _several(self.num_generations, "DPO-Positive")


def _whole(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InvalidInputError(
            f"{name}: expected a whole number of at least {least}, got {value!r}"
        )


def _several(number: int, method: str) -> None:
    if number < 2:
        raise InvalidInputError(
            f"num_generations: {method} compares answers to one prompt and needs at least 2, got "
            f"{number}"
        )
