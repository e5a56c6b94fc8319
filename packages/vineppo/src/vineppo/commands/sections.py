"""Sections of a recipe that have no class elsewhere: model, task, rollouts, evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal

from vineppo.commands.checking import check_value, made, refuse_unknown
from vineppo.errors import InvalidInputError, at_least, one_of, positive


@dataclass(frozen=True)
class Model:
    """The policy: one that exists, or a tiny one that is fine-tuned on the task.

    Attributes:
        path: folder or name of a causal language model.
        tokenizer: folder or name; None is the model's own.
        reference: folder or name of the policy that divergence is measured from; None is the model
            as it is at the start.
        dtype: of the weights that learn.
        parameters: how many it has, for the estimates of ``--dry-run`` where the model is absent.
        tiny: instead of ``path``, arguments of :meth:`vineppo.tasks.ChainArithmetic.sft_model`.
    """

    path: str | None = None
    tokenizer: str | None = None
    reference: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    parameters: float | None = None
    tiny: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if (self.path is None) == (self.tiny is None):
            raise InvalidInputError(
                "path: expected either the folder or name of a model, or settings for one that is "
                f"made, tiny: {{...}}, got {'none' if self.path is None else 'both'}"
            )
        if self.parameters is not None:
            positive("parameters", self.parameters)
        if self.tiny is not None and (self.tokenizer is not None or self.reference is not None):
            raise InvalidInputError(
                "tokenizer, reference: a tiny model comes with its own; leave them out"
            )


@dataclass(frozen=True)
class ChainArithmeticTask:
    """See :class:`vineppo.tasks.ChainArithmetic`.

    Attributes:
        operands: see there.
        modulus: see there.
        operations: see there.
        examples: how many prompts to train on.
        seed: of the stream of prompts.
    """

    operands: int = 8
    modulus: int = 10
    operations: str = "+-*"
    examples: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        at_least("examples", self.examples, 1)
        at_least("seed", self.seed, 0)


@dataclass(frozen=True)
class GSM8KTask:
    """See :class:`vineppo.tasks.GSM8K`.

    Attributes:
        path: see there; None is the copy that gsm-compose has with it.
        split: see there.
        validation: see there.
        seed: see there.
        examples: at most so many, the first ones; None takes all.
        rows: how many there are, for the estimates of ``--dry-run`` where the file is absent.
    """

    path: str | None = None
    split: Literal["train", "validation", "test"] = "train"
    validation: int = 373
    seed: int = 0
    examples: int | None = None
    rows: int | None = None

    def __post_init__(self) -> None:
        _counts(self.examples, self.rows)


@dataclass(frozen=True)
class DatasetTask:
    """Rows of a jsonl file.

    Attributes:
        path: of the file; one JSON object a line.
        reward: ``module:function``, or several; modules of the current folder and of ``modules``
            count. Each is called as in TRL: ``f(prompts, completions, completion_ids, **columns)``.
        prompt_column: a text, or messages.
        template: of a prompt that is a text; ``{prompt}`` stands for it.
        modules: folder of reward modules; None is that of the recipe.
        examples: at most so many, the first ones; None takes all.
        rows: how many there are, for the estimates of ``--dry-run`` where the file is absent.
    """

    path: str
    reward: str | list[str]
    prompt_column: str = "prompt"
    template: str = "{prompt}"
    modules: str | None = None
    examples: int | None = None
    rows: int | None = None

    def __post_init__(self) -> None:
        _counts(self.examples, self.rows)
        if "{prompt}" not in self.template:
            raise InvalidInputError(
                f"template: expected a text with {{prompt}} in it, got {self.template!r}"
            )
        for name in self.rewards:
            module, colon, function = name.partition(":")
            dotted = all(part.isidentifier() for part in module.split("."))
            if not (colon and dotted and function.isidentifier()):
                raise InvalidInputError(f"reward: expected module:function, got {name!r}")
        if not self.rewards:
            raise InvalidInputError("reward: expected at least one module:function, got none")

    @property
    def rewards(self) -> tuple[str, ...]:
        """All reward functions."""
        return (self.reward,) if isinstance(self.reward, str) else tuple(self.reward)


Task = ChainArithmeticTask | GSM8KTask | DatasetTask
TASKS: Final[Mapping[str, type[Task]]] = {
    "chain_arithmetic": ChainArithmeticTask,
    "gsm8k": GSM8KTask,
    "dataset": DatasetTask,
}


@dataclass(frozen=True)
class Evaluation:
    """What the policy is evaluated on, at the end and every ``training.eval_every`` iterations.

    Attributes:
        split: of a task that has them.
        path: of a file, where the task has one; None is the task's own for GSM8K.
        examples: at most so many; None takes 200 of chain arithmetic, and all of a file.
        seed: of the stream of prompts of chain arithmetic.
        rows: how many there are, for ``--dry-run`` where the file is absent.
    """

    split: Literal["validation", "test"] = "test"
    path: str | None = None
    examples: int | None = None
    seed: int = 0
    rows: int | None = None

    def __post_init__(self) -> None:
        _counts(self.examples, self.rows)
        at_least("seed", self.seed, 0)

    def check(self, task: Task) -> None:
        """Refuse what does not go with the task.

        Raises:
            InvalidInputError: with the key.
        """
        if isinstance(task, ChainArithmeticTask) and self.path is not None:
            raise InvalidInputError("evaluation.path: chain_arithmetic reads no file; leave it out")
        if isinstance(task, DatasetTask) and self.path is None:
            raise InvalidInputError("evaluation.path: expected a jsonl file, got none")
        own_file = isinstance(task, GSM8KTask) and task.path is not None
        if own_file and self.path is None and self.split == "test":
            raise InvalidInputError(
                "evaluation.path: expected the file of test questions, because task.path names "
                "that of the others, got none"
            )


KINDS: Final = ("transformers", "vllm", "servers", "ray")


@dataclass(frozen=True)
class Rollouts:
    """What samples.

    Attributes:
        kind: ``transformers``, with the model in training itself; ``vllm``, in the same process;
            ``servers``, several of vLLM's; ``ray``, actors of a cluster.
        options: of :class:`~vineppo.rollout.TransformersBackend`, ``vllm.LLM``,
            :class:`~vineppo.rollout_vllm.ServersBackend` or
            :class:`~vineppo.rollout_ray.RayBackend`.
    """

    kind: str = "transformers"
    options: Mapping[str, Any] = field(default_factory=dict)


def task_of(content: Any) -> Task:
    """The task of a section.

    Raises:
        InvalidInputError: no kind or an unknown one, or a field that does not fit.
    """
    kind, rest = _by_kind("task", content, tuple(TASKS))
    cls: Any = TASKS[kind]
    task: Task = made(cls, rest, "task")
    return task


def rollouts_of(content: Any) -> Rollouts:
    """What samples, of a section; None, or no kind, is ``transformers``.

    Raises:
        InvalidInputError: an unknown kind.
    """
    check_value("rollouts", content, Mapping[str, Any] | None)
    return Rollouts(*_by_kind("rollouts", {"kind": KINDS[0], **(content or {})}, KINDS))


def kind_of(task: Task) -> str:
    """The name of a task."""
    return next(kind for kind, cls in TASKS.items() if isinstance(task, cls))


def written(section: Task | Model | Evaluation) -> dict[str, Any]:
    """A section as a file holds it, with all defaults."""
    return asdict(section)


def _by_kind(section: str, content: Any, kinds: tuple[str, ...]) -> tuple[str, dict[str, Any]]:
    if not isinstance(content, Mapping) or "kind" not in content:
        if isinstance(content, Mapping) and content:
            refuse_unknown(f"{section}.", [next(iter(content))], ("kind",))
        raise InvalidInputError(
            f"{section}.kind: expected one of {', '.join(kinds)}, got {content!r:.60}"
        )
    one_of(f"{section}.kind", content["kind"], kinds)
    return content["kind"], {name: value for name, value in content.items() if name != "kind"}


def _counts(examples: int | None, rows: int | None) -> None:
    for name, value in (("examples", examples), ("rows", rows)):
        if value is not None:
            at_least(name, value, 1)
