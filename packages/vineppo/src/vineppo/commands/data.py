"""From the section task to rows and reward functions."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vineppo.commands.checking import named
from vineppo.commands.recipe import Recipe
from vineppo.commands.sections import ChainArithmeticTask, DatasetTask, Evaluation, GSM8KTask
from vineppo.errors import InvalidInputError
from vineppo.tasks import GSM8K, ChainArithmetic

Rows = list[dict[str, Any]]
_EVALUATED = 200  # prompts of chain arithmetic, where nothing else is said


@dataclass(frozen=True)
class Data:
    """What a run is trained and evaluated on.

    Attributes:
        train: rows with ``prompt`` and the columns of the rewards.
        evaluation: the same; None where nothing is evaluated.
        rewards: functions in TRL's signature.
    """

    train: Rows
    evaluation: Rows | None
    rewards: list[Callable[..., Any]]


def read_data(recipe: Recipe) -> Data:
    """Rows and reward functions.

    Raises:
        InvalidInputError: a file or function that is absent or does not fit.
    """
    evaluation = recipe.evaluation
    return Data(
        train_rows(recipe),
        None if evaluation is None else evaluation_rows(recipe, evaluation),
        rewards_of(recipe),
    )


def train_rows(recipe: Recipe) -> Rows:
    """Rows to train on.

    Raises:
        InvalidInputError: a file that is absent or does not fit.
    """
    task = recipe.task
    if isinstance(task, ChainArithmeticTask):
        return chain_of(task).examples(task.examples, task.seed)
    if isinstance(task, DatasetTask):
        return _read_jsonl("task.path", task.path, task, task.examples)
    return [dict(row) for row in _gsm8k(task).examples(task.examples)]


def evaluation_rows(recipe: Recipe, wanted: Evaluation) -> Rows:
    """Rows to evaluate on.

    Raises:
        InvalidInputError: a file that is absent or does not fit.
    """
    task = recipe.task
    if isinstance(task, ChainArithmeticTask):
        return chain_of(task).examples(wanted.examples or _EVALUATED, wanted.seed, wanted.split)
    if isinstance(task, DatasetTask):
        assert wanted.path is not None
        return _read_jsonl("evaluation.path", wanted.path, task, wanted.examples)
    with named("evaluation"):
        source = GSM8K(_path(task, wanted), wanted.split, task.validation, task.seed)
        return [dict(row) for row in source.examples(wanted.examples)]


def absent(recipe: Recipe, wanted: Evaluation | None = None) -> str | None:
    """Why rows cannot be read on this machine; None where their file is here, or none is needed.

    Args:
        recipe: whose task it is.
        wanted: rows to evaluate on; None asks for those to train on.
    """
    task = recipe.task
    if isinstance(task, ChainArithmeticTask):
        return None
    path = _path(task, wanted)
    if path is not None:
        return None if Path(path).is_file() else f"the file {path}"
    try:
        GSM8K(None, "test" if wanted is not None and wanted.split == "test" else "train")
    except InvalidInputError:
        return "the package gsm-compose with its copy of GSM8K, or the path of a file"
    return None


def rewards_of(recipe: Recipe) -> list[Callable[..., Any]]:
    """The reward functions of the task.

    Raises:
        InvalidInputError: a module or function that does not exist.
    """
    task = recipe.task
    if isinstance(task, ChainArithmeticTask):
        return [chain_of(task).reward]
    if isinstance(task, GSM8KTask):
        return [_gsm8k(task).reward]
    return [_function(name, Path(task.modules or ".")) for name in task.rewards]


def chain_of(task: ChainArithmeticTask) -> ChainArithmetic:
    """The task itself.

    Raises:
        InvalidInputError: a number out of its range.
    """
    with named("task"):
        return ChainArithmetic(task.operands, task.modulus, task.operations)


def _gsm8k(task: GSM8KTask) -> GSM8K:
    with named("task"):
        return GSM8K(task.path, task.split, task.validation, task.seed)


def _path(task: GSM8KTask | DatasetTask, wanted: Evaluation | None) -> str | None:
    """The file of rows; None is the copy of gsm-compose."""
    if wanted is None:
        return task.path
    if wanted.path is None and wanted.split == "validation":
        return task.path
    return wanted.path


def _function(name: str, folder: Path) -> Callable[..., Any]:
    module, _, attribute = name.partition(":")
    with _importable(folder, Path.cwd()):
        try:
            found = getattr(importlib.import_module(module), attribute)
        except Exception as error:
            raise InvalidInputError(
                f"task.reward: {name} cannot be loaded: {type(error).__name__}: {error}"
            ) from error
    if not callable(found):
        raise InvalidInputError(
            f"task.reward: expected a function, got {name}, a {type(found).__name__}"
        )
    function: Callable[..., Any] = found
    return function


@contextmanager
def _importable(*folders: Path) -> Iterator[None]:
    added = [str(folder.resolve()) for folder in folders]
    sys.path[:0] = added
    try:
        yield
    finally:
        for folder in added:
            sys.path.remove(folder)


def _read_jsonl(name: str, path: str, task: DatasetTask, limit: int | None) -> Rows:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"{name}: expected a jsonl file, got {path}: {error}") from error
    rows: Rows = []
    for number, line in enumerate(text.split("\n"), start=1):  # JSON may hold other line ends
        if len(rows) == limit:
            break
        if line.strip():
            rows.append(_row(line, task, f"{name}: {path}, line {number}"))
    if not rows:
        raise InvalidInputError(f"{name}: expected at least one row, got none in {path}")
    return rows


def _row(line: str, task: DatasetTask, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InvalidInputError(f"{where}: expected one JSON object, got {error}") from error
    prompt = row.pop(task.prompt_column, None) if isinstance(row, dict) else None
    if not (isinstance(prompt, str | list) and prompt):
        raise InvalidInputError(
            f"{where}: expected an object with a text or messages in {task.prompt_column!r}, got "
            f"{line.strip()[:60]!r}"
        )
    if isinstance(prompt, str):
        prompt = task.template.replace("{prompt}", prompt)
    return {**row, "prompt": prompt}
