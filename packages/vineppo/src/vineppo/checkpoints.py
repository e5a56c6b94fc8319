"""A run on disk, whole or not at all."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from vineppo.errors import InvalidInputError

_FORMAT: Final = 1
_NAME: Final = re.compile(r"checkpoint-(\d+)")
_RECORD: Final = "vineppo.json"
_STATE: Final = "state.pt"
_PARAMETERS: Final = "trained.safetensors"


@dataclass(frozen=True)
class Resumed:
    """What a checkpoint holds.

    Attributes:
        iterations: done.
        parameters: of policy and critic, those that learn.
        state: of the optimizer.
        record: metrics so far, and whatever else the trainer counts.
    """

    iterations: int
    parameters: dict[str, Tensor]
    state: dict[str, Any]
    record: dict[str, Any]


def save(
    output_dir: Path,
    iterations: int,
    *,
    parameters: Mapping[str, Tensor],
    state: Mapping[str, Any],
    record: Mapping[str, Any],
    settings: Mapping[str, Any],
    write_model: Callable[[Path], None],
    keep: int | None,
) -> Path:
    """Write ``checkpoint-<iterations>`` under a temporary name, then rename it.

    Args:
        output_dir: of the run.
        iterations: done.
        parameters: those that learn.
        state: what :func:`torch.save` stores.
        record: JSON.
        settings: what must be the same when the run is resumed.
        write_model: writes policy and tokenizer into a folder, for people to load.
        keep: checkpoints that stay, the newest; None keeps all.
    """
    from safetensors.torch import save_file

    folder = output_dir / f"checkpoint-{iterations}"
    temporary = output_dir / f".checkpoint-{iterations}.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write_model(temporary)
    save_file(dict(parameters), temporary / _PARAMETERS)
    torch.save(dict(state), temporary / _STATE)
    content = {
        "format": _FORMAT, "iterations": iterations, "settings": settings, "record": record,
    }  # fmt: skip
    text = json.dumps(content, indent=1) + "\n"
    (temporary / _RECORD).write_text(text, encoding="utf-8")
    if folder.exists():
        shutil.rmtree(folder)
    temporary.replace(folder)
    if keep is not None:
        older = [path for path in _all(output_dir) if path != folder]
        for path in older[: max(0, len(older) - (keep - 1))]:
            shutil.rmtree(path)
    return folder


def load(folder: Path, settings: Mapping[str, Any]) -> Resumed:
    """Read a checkpoint.

    Raises:
        InvalidInputError: it is none, it is damaged, or it was made with other settings; the
            message names them.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        content = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        version, saved = content["format"], dict(content["settings"])
        parameters = load_file(folder / _PARAMETERS)
        state = torch.load(folder / _STATE, map_location="cpu", weights_only=True)
        resumed = Resumed(int(content["iterations"]), parameters, state, content["record"])
    except (
        OSError, ValueError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError,
        SafetensorError,
    ) as error:  # fmt: skip
        raise InvalidInputError(
            f"resume_from_checkpoint: {folder} is no whole checkpoint of vineppo "
            f"({type(error).__name__}: {error}); name another one, or start anew in an empty "
            "output_dir"
        ) from error
    if version != _FORMAT:
        raise InvalidInputError(
            f"resume_from_checkpoint: {folder} has format {version!r}, expected {_FORMAT}; resume "
            "it with the version of vineppo that wrote it"
        )
    now = json.loads(json.dumps(settings))
    differ = sorted(name for name in saved.keys() | now.keys() if saved.get(name) != now.get(name))
    if differ:
        told = ", ".join(f"{n} was {saved.get(n)!r} and is {now.get(n)!r}" for n in differ[:6])
        raise InvalidInputError(
            f"resume_from_checkpoint: {folder} was made with other settings: {told}; give the same "
            "settings, or start anew in another output_dir"
        )
    return resumed


def newest(output_dir: Path) -> Path | None:
    """The checkpoint of the most iterations in a folder; None when there is none."""
    found = _all(output_dir)
    return found[-1] if found else None


def _all(output_dir: Path) -> list[Path]:
    if not output_dir.is_dir():
        return []
    numbered = [
        (int(match[1]), path)
        for path in output_dir.iterdir()
        if (match := _NAME.fullmatch(path.name)) and (path / _RECORD).is_file()
    ]
    return [path for _, path in sorted(numbered)]
