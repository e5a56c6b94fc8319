"""A run as a file: method, model, task, settings, what samples.

Whatever can be checked without a weight and without a network is checked when a recipe is read or
by :meth:`Recipe.check_parts`, before anything is loaded.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from vineppo import config
from vineppo.commands import sections
from vineppo.commands.backends import check_rollouts
from vineppo.commands.checking import check_arguments, check_value, made, refuse_unknown
from vineppo.commands.sections import Evaluation, Model, Rollouts, Task
from vineppo.commands.yaml_text import mapping_of, value_of
from vineppo.config import TrainerConfig, VinePPOConfig
from vineppo.errors import InvalidInputError, MissingExtraError, one_of
from vineppo.segmenters import make_segmenter

if TYPE_CHECKING:
    from vineppo.trainer import EpisodeTrainer

METHODS: Final[Mapping[str, tuple[type[TrainerConfig], str]]] = {
    "vineppo": (config.VinePPOConfig, "VinePPOTrainer"),
    "ppo": (config.PPOConfig, "PPOTrainer"),
    "rloo": (config.RLOOConfig, "RLOOTrainer"),
    "grpo": (config.GRPOConfig, "GRPOTrainer"),
    "restem": (config.RestEMConfig, "RestEMTrainer"),
    "dpo_positive": (config.DPOPositiveConfig, "DPOPositiveTrainer"),
}
"""Settings and trainer of each method."""

SECTIONS: Final = ("method", "model", "task", "training", "rollouts", "peft", "evaluation")
# Sections that may be one word, and what that word is.
_WORDS: Final = {"task": "kind", "rollouts": "kind"}


@dataclass(frozen=True)
class Recipe:
    """A run.

    Attributes:
        method: of :data:`METHODS`.
        model: the policy.
        task: prompts and rewards.
        training: settings of the method's trainer.
        rollouts: what samples.
        peft: fields of ``peft.LoraConfig``; None trains all weights.
        evaluation: what the policy is evaluated on; None: nothing.
    """

    method: str
    model: Model
    task: Task
    training: TrainerConfig
    rollouts: Rollouts = field(default_factory=Rollouts)
    peft: Mapping[str, Any] | None = None
    evaluation: Evaluation | None = None

    @classmethod
    def of(cls, content: Mapping[str, Any], folder: Path = Path(), name: str = "vineppo") -> Recipe:
        """The recipe in a mapping.

        Args:
            content: sections by name; see the attributes.
            folder: of its file, where modules of reward functions are looked for.
            name: of the folder that the run goes into, below ``runs``, unless
                ``training.output_dir`` names one.

        Raises:
            InvalidInputError: a name that is unknown or missing, or a value that does not fit.
        """
        given = expanded(content)
        refuse_unknown("", given, SECTIONS)
        for section in ("method", "model", "task"):
            if given.get(section) is None:
                raise InvalidInputError(f"{section}: expected a value, got none")
        one_of("method", given["method"], METHODS)
        for section in ("model", "training", "peft", "evaluation"):
            check_value(section, given.get(section), Mapping[str, Any] | None)
        training = {"output_dir": f"runs/{name}", **(given.get("training") or {})}
        settings = made(METHODS[given["method"]][0], training, "training")
        task = sections.task_of(given["task"])
        if isinstance(task, sections.DatasetTask) and task.modules is None:
            task = replace(task, modules=str(folder.resolve()))  # wherever it is written to
        evaluation = given.get("evaluation")
        found = cls(
            given["method"],
            made(Model, given["model"], "model"),
            task,
            settings,
            sections.rollouts_of(given.get("rollouts")),
            given.get("peft"),
            None if evaluation is None else made(Evaluation, evaluation, "evaluation"),
        )
        found._check()
        return found

    @classmethod
    def read(cls, path: Path, overrides: Sequence[str] = ()) -> Recipe:
        """The recipe in a file, with some values replaced.

        Args:
            path: of a YAML file.
            overrides: such as ``training.learning_rate=1e-6``; see :func:`overridden`.

        Raises:
            InvalidInputError: there is no such file, or as :meth:`of`.
        """
        return cls.of(read_content(path, overrides), path.parent, path.stem)

    def content(self) -> dict[str, Any]:
        """The mapping that :meth:`of` takes, with all defaults."""
        found: dict[str, Any] = {
            "method": self.method,
            "model": sections.written(self.model),
            "task": {"kind": sections.kind_of(self.task), **sections.written(self.task)},
            "training": self.training.to_dict(),
            "rollouts": {"kind": self.rollouts.kind, **self.rollouts.options},
        }
        if self.peft is not None:
            found["peft"] = dict(self.peft)
        if self.evaluation is not None:
            found["evaluation"] = sections.written(self.evaluation)
        return found

    def identity(self) -> dict[str, Any]:
        """What the result depends on: not where it is written, nor what is shown, nor by whom."""
        content = self.content()
        found: dict[str, Any] = {"method": self.method, "peft": content.get("peft")}
        for section, values in (
            ("model", content["model"]),
            ("task", content["task"]),
            ("training", self.training.result_settings()),
        ):
            found |= {f"{section}.{name}": value for name, value in values.items()}
        for name in ("model.parameters", "task.rows", "task.modules"):  # nothing hangs on them
            found.pop(name, None)
        return found

    @property
    def output_dir(self) -> Path:
        """The folder of the run."""
        return Path(self.training.output_dir).expanduser()

    def with_model(self, path: Path | str) -> Recipe:
        """The same with another model, such as a checkpoint of it."""
        return replace(self, model=replace(self.model, path=str(path), tokenizer=None, tiny=None))

    def trainer_class(self) -> type[EpisodeTrainer]:
        """The trainer of the method.

        Raises:
            MissingExtraError: the extra ``train`` is not installed.
        """
        found: type[EpisodeTrainer] = getattr(
            importlib.import_module("vineppo"), METHODS[self.method][1]
        )
        return found

    def check_parts(self) -> None:
        """Hold options of backend, tiny model and adapter against what takes them.

        Raises:
            MissingExtraError: what takes them is not installed.
            InvalidInputError: an option that is unknown or does not fit.
        """
        check_rollouts(self.rollouts)
        if self.peft is not None:
            try:
                from peft import LoraConfig
            except ImportError as error:
                raise MissingExtraError("peft", "peft") from error
            check_arguments("peft", LoraConfig, self.peft)

    def _check(self) -> None:
        settings, task = self.training, self.task
        if isinstance(settings, VinePPOConfig):
            try:
                make_segmenter(settings.segmenter)
            except InvalidInputError as error:
                raise InvalidInputError(f"training.{error}") from error
        if settings.eval_every and self.evaluation is None:
            raise InvalidInputError(
                f"training.eval_every: expected a section evaluation beside it, got none; add "
                f"'evaluation: {{}}', or leave out eval_every={settings.eval_every}"
            )
        if self.evaluation is not None:
            self.evaluation.check(task)
        if self.model.tiny is not None:
            if not isinstance(task, sections.ChainArithmeticTask):
                raise InvalidInputError(
                    "model.tiny: chain_arithmetic alone makes a model, the task is "
                    f"{sections.kind_of(task)}; give model.path"
                )
            from vineppo.tasks import ChainArithmetic

            check_arguments("model.tiny", ChainArithmetic.sft_model, self.model.tiny, ("on_step",))
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        if processes > 1 and self.rollouts.kind != "transformers":
            raise InvalidInputError(
                f"rollouts.kind: expected transformers in a run of {processes} processes, got "
                f"{self.rollouts.kind}, which a run of one process shares out itself"
            )


def read_content(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A file's mapping, with some values replaced.

    Raises:
        InvalidInputError: there is no such file, it is no YAML, or an override does not fit.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"config: expected a YAML file, got {path}: {error}") from error
    content = expanded(mapping_of(text, str(path)))
    for word in overrides:
        content = overridden(content, word)
    return content


def expanded(content: Mapping[str, Any]) -> dict[str, Any]:
    """The mapping with short forms written out.

    ``task: gsm8k`` is ``task: {kind: gsm8k}``; ``model: tiny`` and ``model: folder`` are
    ``model: {tiny: {}}`` and ``model: {path: folder}``.
    """
    found = dict(content)
    for section, name in _WORDS.items():
        if isinstance(found.get(section), str):
            found[section] = {name: found[section]}
    if isinstance(found.get("model"), str):
        word = found["model"]
        found["model"] = {"tiny": {}} if word == "tiny" else {"path": word}
    return found


def overridden(content: Mapping[str, Any], word: str) -> dict[str, Any]:
    """The mapping with one value replaced.

    Args:
        content: expanded.
        word: ``section.name=value`` in YAML, such as ``training.learning_rate=1e-6``,
            ``model.tiny.steps=100`` or ``method=rloo``.

    Raises:
        InvalidInputError: it is no such word, or its value is no YAML.
    """
    key, equals, text = word.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise InvalidInputError(
            f"--set {word}: expected name=value, such as training.learning_rate=1e-6"
        )
    return expanded(_replaced(content, path, value_of(text, f"--set {key}"), key))


def _replaced(
    content: Mapping[str, Any], path: Sequence[str], value: Any, key: str
) -> dict[str, Any]:
    head, *rest = path
    if not rest:
        return {**content, head: value}
    inner = {} if content.get(head) is None else content[head]
    if not isinstance(inner, Mapping):
        raise InvalidInputError(f"--set {key}: {head} has no names below it, it is {inner!r:.60}")
    return {**content, head: _replaced(inner, rest, value, key)}
