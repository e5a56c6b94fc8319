"""What made a file of answers: kept beside it, and held against when the run is continued.

The answers themselves say which model was asked what (`gsm_compose.journal`), not how they were
drawn. Continued at another temperature, a file would be half of each.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from gsm_compose.commands.engines import Engine, Sampling
from gsm_compose.errors import UsageError
from gsm_compose.writing import write_text

_PACKAGES: Final = ("gsm-compose", "decapod", "numpy", "torch", "transformers", "vllm")


def record_path(answers: Path) -> Path:
    """Where the record of a file of answers is."""
    return answers.with_name(f"{answers.name}.run.json")


def check_record(answers: Path, sampling: Sampling) -> None:
    """Refuse to go on with answers that were drawn in another way.

    Args:
        answers: file that the answers go to; all is well where it or its record is not there.
        sampling: how answers are to be drawn.

    Raises:
        UsageError: something differs, or the record cannot be understood.
        OSError: the record cannot be read.
    """
    path = record_path(answers)
    if not (answers.exists() and path.exists()):
        return
    try:
        before = dict(json.loads(path.read_text(encoding="utf-8"))["sampling"])
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"out: {path} is not the record of a run. Give another --out, or delete both files."
        ) from error
    for name, value in asdict(sampling).items():
        if before.get(name) != value:
            raise UsageError(
                f"out: the answers in {answers} were drawn with {name} {before.get(name)!r}, "
                f"got {value!r}. Go on with the same value, or give another --out."
            )


def write_record(
    answers: Path, engine: Engine, sampling: Sampling, benchmark: Path, settings: Mapping[str, Any]
) -> None:
    """Write the record of a run that begins; that of one that goes on stays as it is.

    Args:
        answers: file that the answers go to.
        engine: what answers.
        sampling: how.
        benchmark: file of what is asked.
        settings: anything else worth keeping (JSON values).

    Raises:
        OSError: the record cannot be written.
    """
    path = record_path(answers)
    if answers.exists() and path.exists():
        return
    content = {
        "engine": f"{engine.kind}:{engine.where}",
        "sampling": asdict(sampling),
        "benchmark": {"file": str(benchmark), "sha256": sha256(benchmark)},
        **settings,
        "python": platform.python_version(),
        "versions": {name: found for name in _PACKAGES if (found := _version(name))},
    }
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def sha256(path: Path) -> str:
    """Hash of a file's bytes, in hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
