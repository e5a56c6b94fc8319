"""A benchmark as a folder that another tool reads; the command line's ``export``."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from gsm_compose.benchmark import Benchmark
from gsm_compose.errors import UsageError
from gsm_compose.prompts import Condition, PromptSpec

if TYPE_CHECKING:
    import datasets

Format = Literal["hf", "parquet", "lm-eval", "inspect", "trl", "sft", "verl", "open-instruct"]
TRAINING: Final = frozenset(("trl", "sft", "verl", "open-instruct"))
PROMPTS: Final = TRAINING | {"lm-eval"}  # hold prompts; the others hold questions

_INSPECT_TASK: Final = '''"""inspect eval {name} --model …"""

from pathlib import Path

from inspect_ai import Task, task

from gsm_compose.integrations.inspect_task import compositional_gsm as build


@task
def compositional_gsm(
    condition: str | list[str] = "all",
    shots: int = 8,
    preamble: bool = True,
    chat: bool = True,
    max_tokens: int = 1024,
) -> Task:
    path = str(Path(__file__).with_name("benchmark.jsonl"))
    return build(path, condition, shots, preamble, chat, max_tokens)
'''


@dataclass(frozen=True)
class Asking:
    """How the prompts of an export are put.

    Attributes:
        spec: None for the default of the format: no exemplars for training, eight otherwise.
        conditions: None for the default: compositions for training, the paper's three otherwise.
        allow_test_data: see `gsm_compose.exports.require_training_split`.
    """

    spec: PromptSpec | None = None
    conditions: tuple[Condition, ...] | None = None
    allow_test_data: bool = False


def export_folder(
    benchmark: Benchmark, to: Format, folder: Path, asking: Asking, *, force: bool = False
) -> list[Path]:
    """Write the folder, whole or not at all.

    Args:
        benchmark: what to export.
        to: the tool that will read it.
        folder: may exist if it is empty.
        asking: for formats that hold prompts.
        force: write into a folder that has files; those of the same names are replaced.

    Returns:
        The files, sorted.

    Raises:
        UsageError: the folder has files, or there is more than one condition where rows of one kind
            are wanted.
        LeakError: training data would be made of test questions.
        PromptError, MissingExtraError: see the format's module in `gsm_compose.integrations`.
        OSError: the folder cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"out: expected a folder, {folder} is a file.")
    taken = folder.is_dir() and any(folder.iterdir())
    if taken and not force:
        raise UsageError(f"out: {folder} has files already. Give another folder, or --force.")
    if to in TRAINING and asking.conditions is not None and len(asking.conditions) != 1:
        raise UsageError(f"conditions: expected one for {to}, got {len(asking.conditions)}.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        made = Path(temporary) / "made"
        made.mkdir()
        _WRITERS[to](benchmark, made, asking)
        found = sorted(path.relative_to(made) for path in made.rglob("*") if path.is_file())
        if taken:
            shutil.copytree(made, folder, dirs_exist_ok=True)
        else:
            if folder.is_dir():
                folder.rmdir()  # empty; not every system renames onto one
            made.rename(folder)
    return [folder / path for path in found]


def _hf(benchmark: Benchmark, folder: Path, _: Asking) -> None:
    from gsm_compose.exports import write_dataset_folder

    write_dataset_folder(benchmark, folder)


def _parquet(benchmark: Benchmark, folder: Path, _: Asking) -> None:
    from gsm_compose.exports import to_parquet, write_license

    to_parquet(benchmark, folder / f"{benchmark.split}.parquet")
    write_license(folder)


def _lm_eval(benchmark: Benchmark, folder: Path, asking: Asking) -> None:
    from gsm_compose.integrations.lm_harness import write_task_folder

    write_task_folder(benchmark, folder, **_given(asking.spec, conditions=asking.conditions))


def _inspect(benchmark: Benchmark, folder: Path, _: Asking) -> None:
    from gsm_compose.exports import write_license
    from gsm_compose.writing import write_text

    name = "compositional_gsm.py"
    benchmark.to_jsonl(folder / "benchmark.jsonl")
    write_text(folder / name, _INSPECT_TASK.format(name=name))
    write_license(folder)


def _trl(benchmark: Benchmark, folder: Path, asking: Asking) -> None:
    from gsm_compose.integrations.trl_data import grpo_dataset

    _write_dataset(grpo_dataset(benchmark, **_training(asking)), benchmark, folder)


def _sft(benchmark: Benchmark, folder: Path, asking: Asking) -> None:
    from gsm_compose.integrations.trl_data import sft_dataset

    _write_dataset(sft_dataset(benchmark, **_training(asking)), benchmark, folder)


def _verl(benchmark: Benchmark, folder: Path, asking: Asking) -> None:
    from gsm_compose.exports import write_license
    from gsm_compose.integrations.verl_data import write_verl_parquet

    write_verl_parquet(benchmark, folder / f"{benchmark.split}.parquet", **_training(asking))
    write_license(folder)


def _open_instruct(benchmark: Benchmark, folder: Path, asking: Asking) -> None:
    from gsm_compose.exports import write_license
    from gsm_compose.integrations.open_instruct_data import write_open_instruct_jsonl

    write_open_instruct_jsonl(benchmark, folder / f"{benchmark.split}.jsonl", **_training(asking))
    write_license(folder)


def _write_dataset(found: datasets.Dataset, benchmark: Benchmark, folder: Path) -> None:
    """A Parquet file whose name says the split, as `datasets.load_dataset(folder)` reads it."""
    from gsm_compose.exports import write_license, write_table

    write_table(found.with_format("arrow")[:], folder / f"{benchmark.split}.parquet")
    write_license(folder)


def _training(asking: Asking) -> dict[str, Any]:
    condition = asking.conditions[0] if asking.conditions else None
    return _given(asking.spec, condition=condition) | {"allow_test_data": asking.allow_test_data}


def _given(spec: PromptSpec | None, **options: Any) -> dict[str, Any]:
    """Arguments that were given; the formats have defaults of their own for the others."""
    return {name: value for name, value in {"spec": spec, **options}.items() if value is not None}


_WRITERS: Final[Mapping[Format, Callable[[Benchmark, Path, Asking], None]]] = {
    "hf": _hf,
    "parquet": _parquet,
    "lm-eval": _lm_eval,
    "inspect": _inspect,
    "trl": _trl,
    "sft": _sft,
    "verl": _verl,
    "open-instruct": _open_instruct,
}


def spec_of(
    to: Format, style: str | None, shots: int | None, *, preamble: bool, chat: bool
) -> PromptSpec | None:
    """The specification that options ask for; None where all are left at the format's default."""
    if to not in PROMPTS and (style, shots, preamble, chat) != (None, None, True, False):
        raise UsageError(f"style, shots, preamble, chat: {to} holds questions, not prompts.")
    if (style, shots, preamble, chat) == (None, None, True, False):
        return None
    shots = shots if shots is not None else (0 if to in TRAINING else 8)
    return PromptSpec("code" if style == "code" else "cot", shots, preamble, chat)
