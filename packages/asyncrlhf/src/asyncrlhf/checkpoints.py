"""A run on disk: weights, optimizer and the rounds in flight, whole or not at all."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from asyncrlhf.engines.protocol import Completion, VersionSpan
from asyncrlhf.errors import InvalidInputError
from asyncrlhf.rounds import Round

_FORMAT: Final = 1
_NAME: Final = re.compile(r"checkpoint-(\d+)")
_RECORD: Final = "asyncrlhf.json"
STATE_FILE: Final = "trainer_state.json"
"""What transformers calls the state of its callbacks; ``write_model`` writes it, too."""


class _OtherFormatError(Exception):
    pass


@dataclass(frozen=True)
class Resumed:
    """What a checkpoint says.

    Attributes:
        folder: where it is.
        rounds_done: how many rounds were trained on.
        versions: of the weights that later rounds need, in ascending order; the last one is the
            learner's.
        finished: rounds that were generated but not trained on.
        state: optimizer, scheduler and random numbers.
    """

    folder: Path
    rounds_done: int
    versions: tuple[int, ...]
    finished: tuple[dict[str, Any], ...]
    state: Mapping[str, Any]

    def weights(self, version: int) -> dict[str, Tensor]:
        """The parameters that learn, as they were at a version."""
        from safetensors.torch import load_file

        weights: dict[str, Tensor] = load_file(_weights_file(self.folder, version))
        return weights


def save(
    folder: Path,
    *,
    rounds_done: int,
    snapshots: Mapping[int, Iterable[tuple[str, Tensor]]],
    finished: Sequence[Round],
    settings: Mapping[str, Any],
    state: Mapping[str, Any],
    write_model: Any,
) -> None:
    """Write a checkpoint under a temporary name, then rename.

    Args:
        folder: its final name.
        rounds_done: how many rounds were trained on.
        snapshots: weights by version that rounds in flight need; the largest is the learner's.
        finished: rounds that were generated but not trained on.
        settings: what must be the same when the run is resumed.
        state: what :func:`torch.save` stores.
        write_model: writes the model into a folder, for people to load.
    """
    from safetensors.torch import save_file

    temporary = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write_model(temporary)
    for version, weights in snapshots.items():
        values = {name: value.detach().cpu().contiguous().clone() for name, value in weights}
        save_file(values, _weights_file(temporary, version))
    torch.save(dict(state), temporary / "state.pt")
    record = {
        "format": _FORMAT,
        "rounds_done": rounds_done,
        "versions": sorted(snapshots),
        "settings": settings,
        "finished": [_written(done) for done in finished],
    }
    (temporary / _RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if folder.exists():
        shutil.rmtree(folder)
    temporary.replace(folder)


def load(folder: Path, settings: Mapping[str, Any]) -> Resumed:
    """Read a checkpoint.

    Raises:
        InvalidInputError: it is none, it is damaged, or it was made with other settings; the
            message names them.
    """
    from safetensors import SafetensorError, safe_open

    try:
        record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        if record["format"] != _FORMAT:
            raise _OtherFormatError
        saved = dict(record["settings"])
        versions = tuple(map(int, record["versions"]))
        state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        for version in versions:
            with safe_open(_weights_file(folder, version), "pt"):  # reads the header alone
                pass
        resumed = Resumed(
            folder, int(record["rounds_done"]), versions, tuple(record["finished"]), state
        )
    except _OtherFormatError:
        raise InvalidInputError(
            f"resume_from_checkpoint: {folder} has format {record['format']!r}, expected "
            f"{_FORMAT}; resume it with the version of asyncrlhf that wrote it"
        ) from None
    except (
        OSError, ValueError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError,
        SafetensorError,
    ) as error:  # fmt: skip
        raise InvalidInputError(
            f"resume_from_checkpoint: {folder} is no whole checkpoint of asyncrlhf "
            f"({type(error).__name__}: {error}); name another one, or start anew in an empty "
            "output_dir"
        ) from error
    now = json.loads(json.dumps(settings))
    differ = sorted(name for name in saved.keys() | now.keys() if saved.get(name) != now.get(name))
    if differ:
        told = ", ".join(f"{n} was {saved.get(n)!r} and is {now.get(n)!r}" for n in differ[:6])
        raise InvalidInputError(
            f"resume_from_checkpoint: {folder} was made with other settings: {told}; give the "
            "same settings, or start anew in another output_dir"
        )
    return resumed


def newest(output_dir: Path) -> Path | None:
    """The checkpoint of the most steps in a folder; None when there is none."""
    found = _all(output_dir)
    return found[-1] if found else None


def prune(output_dir: Path, keep: int | None, written: Path) -> None:
    """Remove all but ``keep`` checkpoints, those of most steps; None keeps all.

    The one that was just ``written`` stays, also where an earlier run left some of more steps.
    """
    if keep is not None and keep > 0:
        others = [folder for folder in _all(output_dir) if folder != written]
        for folder in others[: max(0, len(others) - (keep - 1))]:
            shutil.rmtree(folder)


def restored_completions(record: Mapping[str, Any]) -> tuple[Completion, ...]:
    """The completions of one entry of :attr:`Resumed.finished`."""
    return tuple(
        Completion(
            tuple(row["ids"]),
            tuple(row["logprobs"]),
            tuple(VersionSpan(*span) for span in row["version_spans"]),
            row["finish_reason"],
            row["id"],
        )
        for row in record["completions"]
    )


def _weights_file(folder: Path, version: int) -> Path:
    return folder / f"weights-{version}.safetensors"


def _written(done: Round) -> dict[str, Any]:
    return {
        "index": done.order.index,
        "checksum": done.checksum,
        "generate": done.generate,
        "completions": [
            {
                "ids": completion.ids,
                "logprobs": completion.logprobs,
                "version_spans": completion.version_spans,
                "finish_reason": completion.finish_reason,
                "id": completion.id,
            }
            for completion in done.completions
        ],
    }


def _all(output_dir: Path) -> list[Path]:
    if not output_dir.is_dir():
        return []
    numbered = [
        (int(match[1]), path)
        for path in output_dir.iterdir()
        if (match := _NAME.fullmatch(path.name)) and (path / _RECORD).is_file()
    ]
    return [path for _, path in sorted(numbered)]
