"""A run as a file: what is trained, on what, by which engine, with which settings.

Everything about a recipe that can be checked without a weight and without a network is checked
before anything is loaded: by :meth:`Recipe.of`, which needs no heavy package, and by
:meth:`Recipe.settings` and :meth:`Recipe.check_parts`, which ask the classes that will be used.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, get_type_hints

from asyncrlhf.commands.checking import check_type, made, refuse_unknown
from asyncrlhf.commands.parts import ENGINES, TRANSPORTS, Part, check_engine, check_transport
from asyncrlhf.commands.sections import TASKS, TINY, JsonlTask, Model, SyntheticTask, Task, Timing
from asyncrlhf.commands.yaml_text import read_mapping, read_value
from asyncrlhf.errors import InvalidInputError, MissingExtraError
from asyncrlhf.settings import at_least, one_of

if TYPE_CHECKING:
    from asyncrlhf.config import AsyncRLHFConfig

_FUNCTION: Final = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
# Sections that may be written as one word, and what the word then is.
_SHORT: Final = {"model": "path", "task": "kind", "engine": "kind", "transport": "kind"}


@dataclass(frozen=True)
class Recipe:
    """A run, checked as far as that needs no heavy package.

    Attributes:
        task: where prompts come from.
        rewards: ``gold`` (the task's own), ``proxy`` (a reward model trained on gold labels; only
            for synthetic_summary), ``module:function``, or folder or name of a reward model.
        args: fields of :class:`asyncrlhf.AsyncRLHFConfig`.
        model: the policy.
        engine: what generates.
        transport: how weights travel.
        peft: fields of ``peft.LoraConfig``; None trains all weights.
        processes: of the learner; those of ``accelerate launch --num_processes``.
        timing: of a pilot.
    """

    task: Task
    rewards: tuple[str, ...]
    args: Mapping[str, Any]
    model: Model = field(default_factory=Model)
    engine: Part = field(default_factory=lambda: Part("hf"))
    transport: Part = field(default_factory=lambda: Part("shared_memory"))
    peft: Mapping[str, Any] | None = None
    processes: int = 1
    timing: Timing | None = None

    def __post_init__(self) -> None:
        at_least("processes", self.processes, 1)
        if not self.rewards:
            raise InvalidInputError(
                "rewards: expected at least one of gold, proxy, module:function or the folder of a "
                "reward model, got none"
            )
        for reward in self.rewards:
            if reward == "gold" and isinstance(self.task, JsonlTask):
                raise InvalidInputError(
                    "rewards: the task jsonl has no gold reward; give module:function or the "
                    "folder of a reward model"
                )
            synthetic = isinstance(self.task, SyntheticTask) and self.model.path == TINY
            if reward == "proxy" and not synthetic:
                raise InvalidInputError(
                    "rewards: proxy is made for the task synthetic_summary with the model tiny; "
                    "give the folder of a reward model"
                )

    @classmethod
    def of(cls, content: Mapping[str, Any], default_output: str = "runs/asyncrlhf") -> Recipe:
        """The recipe in a mapping, as YAML gives it.

        Args:
            content: sections by name; see the attributes of the class.
            default_output: of ``args.output_dir``.

        Raises:
            InvalidInputError: a key that is unknown or missing, or a value that does not fit.
        """
        sections = expanded(content)
        refuse_unknown("", sections, SECTIONS)
        for name in ("task", "rewards"):
            if sections.get(name) is None:
                raise InvalidInputError(f"{name}: expected a value, got none")
        rewards = sections["rewards"]
        rewards = (rewards,) if isinstance(rewards, str) else rewards
        check_type("rewards", rewards, list[str])
        for name in ("args", "peft", "timing"):
            check_type(name, sections.get(name), Mapping[str, Any] | None)
        processes = sections.get("processes", 1)
        check_type("processes", processes, int)
        args = {"output_dir": default_output, **(sections.get("args") or {})}
        timing = sections.get("timing")
        return cls(
            task=_task(sections["task"]),
            rewards=tuple(rewards),
            args=args,
            model=made(Model, sections.get("model", {}), "model."),
            engine=Part.of("engine", sections.get("engine", {"kind": "hf"}), ENGINES),
            transport=Part.of(
                "transport", sections.get("transport", {"kind": "shared_memory"}), TRANSPORTS
            ),
            peft=sections.get("peft"),
            processes=processes,
            timing=None if timing is None else made(Timing, timing, "timing."),
        )

    @classmethod
    def read(cls, path: Path, overrides: Sequence[tuple[str, str]] = ()) -> Recipe:
        """The recipe in a file, with some values replaced.

        Args:
            path: of a YAML file.
            overrides: names and values as text; see :func:`override`.

        Raises:
            InvalidInputError: there is no such file, or as :meth:`of`.
        """
        if not path.is_file():
            raise InvalidInputError(f"recipe: expected a YAML file, got {path}, which is no file")
        content = expanded(read_mapping(path.read_text(encoding="utf-8"), str(path)))
        for name, text in overrides:
            content = override(content, name, text)
        return cls.of(content, default_output=f"runs/{path.stem}")

    def content(self) -> dict[str, Any]:
        """The mapping that :meth:`of` takes, with all defaults; plain values."""
        kind = next(kind for kind, cls in TASKS.items() if isinstance(self.task, cls))
        found: dict[str, Any] = {
            "model": asdict(self.model),
            "task": {"kind": kind, **asdict(self.task)},
            "rewards": list(self.rewards),
            "processes": self.processes,
            "engine": {"kind": self.engine.kind, **self.engine.options},
            "transport": {"kind": self.transport.kind, **self.transport.options},
            "args": dict(self.args),
        }
        if self.peft is not None:
            found["peft"] = dict(self.peft)
        if self.timing is not None:
            found["timing"] = asdict(self.timing)
        return found

    def identity(self) -> dict[str, Any]:
        """What the result depends on, one level deep: neither where it is written nor by whom."""
        content = self.content()
        args = {name: value for name, value in content.pop("args").items() if name != "output_dir"}
        for name in ("engine", "transport", "timing"):
            content.pop(name, None)
        found: dict[str, Any] = {}
        for section, value in {**content, "args": args}.items():
            if isinstance(value, Mapping):
                found |= {f"{section}.{name}": inner for name, inner in value.items()}
            else:
                found[section] = value
        return found

    @property
    def output_dir(self) -> Path:
        """The folder of the run."""
        return Path(str(self.args["output_dir"])).expanduser()

    def in_folder(self, folder: Path | str) -> Recipe:
        """The same with another folder."""
        return replace(self, args={**self.args, "output_dir": str(folder)})

    def settings(self, *, on_cpu: bool = False) -> AsyncRLHFConfig:
        """The settings that ``args`` stands for.

        Args:
            on_cpu: as if ``use_cpu`` was set, to check settings for machines that this one is not.

        Raises:
            MissingExtraError: transformers is not installed.
            InvalidInputError: an unknown field, or a value that does not fit.
        """
        hints = _hints_of_args()
        refuse_unknown("args.", self.args, hints)
        for name, value in self.args.items():
            check_type(f"args.{name}", value, hints[name])
        from asyncrlhf.config import AsyncRLHFConfig

        given = {_newest(name, hints): value for name, value in self.args.items()}
        try:
            return AsyncRLHFConfig(**{**given, **({"use_cpu": True} if on_cpu else {})})
        except InvalidInputError as error:
            named = str(error).partition(":")[0] in hints
            raise InvalidInputError(f"args.{error}" if named else f"args: {error}") from error
        except (TypeError, ValueError) as error:
            raise InvalidInputError(f"args: {error}") from error

    def check_parts(self) -> None:
        """Hold the options of engine, transport and adapter against what takes them.

        Raises:
            MissingExtraError: what takes them is not installed.
            InvalidInputError: an option that is unknown or does not fit.
        """
        check_engine(self.engine, self.transport)
        check_transport(self.transport)
        if self.peft is not None:
            try:
                from peft import LoraConfig
            except ModuleNotFoundError as error:
                raise MissingExtraError("peft", "peft") from error
            from asyncrlhf.commands.checking import check_arguments

            check_arguments("peft.", LoraConfig, self.peft)


SECTIONS: Final = tuple(Recipe.__dataclass_fields__)


def is_function(reward: str) -> bool:
    """Whether a reward is given as ``module:function``."""
    return _FUNCTION.fullmatch(reward) is not None


def expanded(content: Mapping[str, Any]) -> dict[str, Any]:
    """The mapping with every section written out: ``engine: hf`` is ``engine: {kind: hf}``."""
    return {
        name: {_SHORT[name]: value} if name in _SHORT and isinstance(value, str) else value
        for name, value in content.items()
    }


def override(content: Mapping[str, Any], name: str, text: str) -> dict[str, Any]:
    """The mapping with one value replaced.

    Args:
        content: expanded.
        name: ``engine.placement``; a section, ``model``; or without a section a field of ``args``,
            ``learning_rate``. Hyphens count as underscores.
        text: the value in YAML.

    Raises:
        InvalidInputError: no such section, or no value.
    """
    path = name.replace("-", "_").split(".")
    if len(path) == 1 and path[0] not in SECTIONS:
        path = ["args", *path]
    value = read_value(text, f"--{name}")
    if len(path) == 1:
        return {**content, **expanded({path[0]: value})}
    section, *rest = path
    refuse_unknown("--", [section], SECTIONS)
    inner = content.get(section) or {}
    if len(rest) != 1 or not isinstance(inner, Mapping):
        raise InvalidInputError(f"--{name}: expected section.key, such as --engine.kind")
    return {**content, section: {**inner, rest[0]: value}}


def _task(content: Any) -> Task:
    if not isinstance(content, Mapping) or "kind" not in content:
        raise InvalidInputError(f"task: expected a kind of {', '.join(TASKS)}, got {content!r}")
    one_of("task.kind", content["kind"], TASKS)
    rest = {name: value for name, value in content.items() if name != "kind"}
    return made(TASKS[content["kind"]], rest, "task.")


def _newest(name: str, known: Mapping[str, Any]) -> str:
    """The name that the installed transformers prefers, so that a recipe works with all of them."""
    newer = name.replace("gradient_checkpointing", "activation_checkpointing")
    return newer if newer in known else name


@functools.cache
def _hints_of_args() -> Mapping[str, Any]:
    try:
        from asyncrlhf.config import AsyncRLHFConfig
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("transformers", "accelerate"):
            raise
        raise MissingExtraError(missing, "train") from error
    hints = get_type_hints(AsyncRLHFConfig)
    fields = AsyncRLHFConfig.__dataclass_fields__
    return {name: hints[name] for name, f in fields.items() if f.init}
