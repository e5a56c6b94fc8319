"""Without an optional package, a reader names the extra that brings it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hpreliability.errors import MissingExtraError
from hpreliability.readers import from_hydra, from_optuna, from_tensorboard, read


@pytest.mark.parametrize(
    ("package", "extra", "call"),
    [
        ("pyarrow", "parquet", lambda at: read(at / "r.parquet")),
        ("optuna", "optuna", lambda _: from_optuna(None, params=["lr"], context=["env"])),
        (
            "tensorboard.backend.event_processing.event_accumulator",
            "tensorboard",
            lambda at: from_tensorboard(
                at, tag="r", layout="{hyperparameter}/{value}/{env}/{seed}"
            ),
        ),
        ("yaml", "hydra", lambda at: from_hydra(at, score="r")),
    ],
)
def test_a_missing_package_is_an_import_error_with_the_command_to_run(
    package: str,
    extra: str,
    call: Callable[[Path], object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "r.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, package, None)  # the import system then raises ImportError
    with pytest.raises(MissingExtraError, match=rf'pip install "hpreliability\[{extra}\]"'):
        call(tmp_path)


def test_importing_the_readers_imports_no_optional_package() -> None:
    code = (
        "import sys, hpreliability.readers; "
        "print({'optuna', 'ray', 'tensorboard', 'torch', 'wandb', 'yaml'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "set()\n"
