"""One run of the controlled task: its setting as data, trained and measured along the way."""

from __future__ import annotations

import contextlib
import hashlib
import io
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from statistics import median
from typing import TYPE_CHECKING, Any, Final

from asyncrlhf.errors import InvalidInputError
from asyncrlhf.experiments.machine import kept_models
from asyncrlhf.tasks import SyntheticSummary

if TYPE_CHECKING:
    from asyncrlhf.engines import HFEngine
    from asyncrlhf.measured import RoundTimes

    Measure = Callable[[Sequence[Sequence[int]], Sequence[Sequence[int]]], Sequence[float]]

PILOT: Final[dict[str, Any]] = {
    "task": {"symbols": 12, "length": 5, "rule": "sort", "noise": 0.7},
    "model": {"width": 48, "layers": 2, "heads": 4},
    "fine_tuning": {"steps": 500, "batch_size": 96, "learning_rate": 2e-3},
    "training": {
        "max_steps": 192,
        "per_device_train_batch_size": 32,
        "gradient_accumulation_steps": 1,
        "num_generations": 2,
        "rounds_ahead": 0,
        "learning_rate": 2e-4,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "beta": 0.1,
        "kl_coef": 0.05,
        "cliprange": 0.2,
        "temperature": 0.7,
    },
    "evaluation": {"prompts": 512, "every": 24},
}
"""The setting that the experiments share; those of a pilot, but for the fine-tuning's rate.

The learning rate is constant: staleness then meets the same step size early and late, in every
arm. With 2e-3 the fine-tuned model scores 0.49 before training, near the pilot's 0.51; slower, it
has not finished after 500 steps.
"""


@dataclass(frozen=True)
class Setting:
    """A run but for its seed.

    Attributes:
        task: see :class:`~asyncrlhf.tasks.SyntheticSummary`.
        model: width, layers and heads of the policy.
        fine_tuning: steps, batch_size and learning_rate of the model that training starts from.
        training: fields of :class:`~asyncrlhf.AsyncRLHFConfig`.
        evaluation: number of ``prompts``, and after ``every`` how many optimizer steps the policy
            is measured; 0 measures at start and end only.
        decoding: sizes of the engine, such as ``max_batch_size``.

    Raises:
        InvalidInputError: a misspelt name, or no ``max_steps``.
    """

    task: SyntheticSummary
    model: Mapping[str, Any]
    fine_tuning: Mapping[str, Any]
    training: Mapping[str, Any]
    evaluation: Mapping[str, int]
    decoding: Mapping[str, Any] = field(default_factory=lambda: {"max_batch_size": 512})

    def __post_init__(self) -> None:
        for name, allowed in _NAMES.items():
            _only(name, getattr(self, name), allowed)
        if self.training.get("max_steps", 0) < 1:
            raise InvalidInputError(
                f"training: expected max_steps of at least 1, got {self.training.get('max_steps')}"
            )

    @classmethod
    def from_mapping(cls, content: Mapping[str, Any]) -> Setting:
        """From tables with the names of the attributes, as a file holds them.

        Raises:
            InvalidInputError: a misspelt or missing name.
        """
        _only("setting", content, [f.name for f in fields(cls)])
        missing = sorted({*_NAMES, "task", "training"} - {"decoding"} - content.keys())
        if missing:
            raise InvalidInputError(f"setting: expected also {', '.join(missing)}")
        _only("task", content["task"], [f.name for f in fields(SyntheticSummary)])
        return cls(**{**content, "task": SyntheticSummary(**content["task"])})

    @property
    def rounds(self) -> int:
        """Rounds of the run."""
        each = int(self._of("minibatches_per_round")) * int(self._of("epochs_per_round"))
        return int(self.training["max_steps"]) // each

    @property
    def prompts(self) -> int:
        """Prompts of the whole run; none comes twice."""
        each = self._of("per_device_train_batch_size") * self._of("gradient_accumulation_steps")
        return self.rounds * int(self._of("minibatches_per_round")) * int(each)

    def _of(self, name: str) -> Any:
        return self.training.get(name, 1)

    def start(self, seed: int) -> Any:
        """The fine-tuned model, bit for bit the same in every process; kept in the user's cache."""
        with _quiet():
            return self.task.sft_model(
                seed, **self.fine_tuning, **self.model, cache_dir=kept_models()
            )


_NAMES: Final = {
    "model": ("width", "layers", "heads"),
    "fine_tuning": ("steps", "batch_size", "learning_rate"),
    "evaluation": ("prompts", "every"),
    "decoding": ("max_batch_size", "max_batch_tokens"),
}


def _only(name: str, given: Mapping[str, Any], allowed: Sequence[str]) -> None:
    unknown = sorted(given.keys() - set(allowed))
    if unknown:
        raise InvalidInputError(
            f"{name}: expected some of {', '.join(allowed)}, got {', '.join(unknown)} too"
        )


@dataclass(frozen=True)
class Trained:
    """A run that is done.

    Attributes:
        curve: one row per evaluation, the first before training: ``step``, what
            :func:`~asyncrlhf.evaluate.evaluate_policy` gives, and means of further measures.
        times: measured seconds of every round.
        weights: SHA-256 of the final parameters.
        staleness: mean over the optimizer steps.
    """

    curve: list[dict[str, float]]
    times: tuple[RoundTimes, ...]
    weights: str
    staleness: float

    def seconds(self) -> dict[str, Any]:
        """Median seconds per round of g, r, t and w; evaluations along the way do not move them."""
        return {name: median(getattr(x, of) for x in self.times) for name, of in STAGES.items()}


STAGES: Final = {"g": "generate", "r": "score", "t": "train", "w": "publish"}


def train(
    setting: Setting,
    seed: int,
    engine: HFEngine,
    *,
    start: Any = None,
    reward: Any = None,
    measures: Mapping[str, Measure] | None = None,
    **changes: Any,
) -> Trained:
    """Train and measure a policy.

    Weights and samples are functions of setting and seed. Runs of one seed start from the same
    model, train on the same prompts in the same order, and are measured on the same prompts with
    the same noise, so that they compare in pairs.

    Args:
        setting: of the run.
        seed: of the fine-tuned model, the prompts and all sampling.
        engine: generates.
        start: the model to start from; trained in place. None is ``setting.start(seed)``.
        reward: what is optimised; None is the gold reward.
        measures: further scores of the answers at every evaluation, by name.
        changes: to ``setting.training``.
    """
    from transformers import TrainerCallback

    from asyncrlhf.config import AsyncRLHFConfig
    from asyncrlhf.evaluate import evaluate_policy
    from asyncrlhf.trainer import AsyncRLHFTrainer

    task = setting.task
    policy = setting.start(seed) if start is None else start
    asked = [row["prompt_ids"] for row in task.prompts(setting.evaluation["prompts"], seed, "eval")]
    curve: list[dict[str, float]] = []

    def measure(step: int) -> None:
        further: dict[str, float] = {}

        def gold(prompts: Any, answers: Any) -> Any:
            for name, of in (measures or {}).items():
                scores = of(prompts, answers)
                further[name] = float(sum(scores)) / len(scores)
            return task.gold_score(prompts, answers)

        row = evaluate_policy(
            trainer.model, trainer.ref_model, gold, asked,
            max_new_tokens=task.max_completion_length, temperature=args.temperature, seed=seed,
            batch_size=512,
        )  # fmt: skip
        curve.append({"step": step, **row, **further})

    class Measuring(TrainerCallback):
        """Measures after so many optimizer steps."""

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002 - the interface of transformers
            every = setting.evaluation["every"]
            if every and state.global_step % every == 0 and state.global_step < state.max_steps:
                measure(state.global_step)

    with tempfile.TemporaryDirectory() as folder, _quiet():
        args = AsyncRLHFConfig(
            output_dir=folder,
            **{
                "max_completion_length": task.max_completion_length,
                "missing_eos_score": task.penalty,
                "seed": seed,
                "use_cpu": True,
                "verify_weights": False,
                "logging_steps": 10**9,
                "report_to": "none",
                "save_strategy": "no",
                "disable_tqdm": True,
                **setting.training,
                **changes,
            },
        )
        trainer = AsyncRLHFTrainer(
            model=policy,
            reward_funcs=task.gold if reward is None else reward,
            args=args,
            train_dataset=task.prompts(setting.prompts, seed),
            processing_class=task.tokenizer(),
            engine=engine,
            callbacks=[Measuring()],
        )
        measure(0)
        trainer.train()
        measure(int(args.max_steps))
    report = trainer.report()
    stale = sum(s * n for s, n in report.staleness.items()) / sum(report.staleness.values())
    return Trained(curve, tuple(report.times), _digest(trainer.model), stale)


def inline(setting: Setting) -> HFEngine:
    """The engine that generates in this process, where a round is ordered."""
    from asyncrlhf.engines import HFEngine

    return HFEngine(placement="inline", **setting.decoding)


def _digest(model: Any) -> str:
    found = hashlib.sha256()
    for name, value in model.named_parameters():
        found.update(name.encode())
        found.update(value.detach().numpy().tobytes())
    return found.hexdigest()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the bars and the lines that transformers prints; a job shows its result."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """One numeric thread, on which sums, and so weights, are the same in every process."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
