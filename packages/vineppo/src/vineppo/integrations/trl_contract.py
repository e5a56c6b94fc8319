"""What :mod:`vineppo.integrations.trl` takes for granted about TRL, looked up when it is imported.

It overrides private methods of TRL's trainer, which may change in any release. A class that no
longer fits would fail in the middle of a run, or train on other numbers than it says; here it
fails at once, and says what differs.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from importlib import import_module, metadata
from typing import Any

from vineppo.errors import MissingExtraError

SERIES = (1, 16)
"""The releases of TRL whose contract is known: 1.16 and its corrections."""

METHODS = {
    "_generate_and_score_completions": ("inputs",),
    "_calculate_rewards": ("inputs", "prompts", "completions", "completion_ids_list"),
    "_compute_loss": ("model", "inputs"),
}
"""Methods of TRL's trainer that are overridden or relied on, with the names of their arguments."""

OUTPUT = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages")
"""Keys that are read from the batch which ``_generate_and_score_completions`` gives."""


class TRLContractError(ImportError):
    """The installed TRL is another one than the trainer was made for; the message says how."""


def check_contract() -> None:
    """Compare the installed TRL with what the trainer was made for.

    Raises:
        MissingExtraError: TRL is not installed.
        TRLContractError: its release or one of its methods differs.
    """
    try:
        version = metadata.version("trl")
    except metadata.PackageNotFoundError as error:
        raise MissingExtraError("trl", "trl") from error
    check_version(version)
    found = differences(import_module("trl").GRPOTrainer)
    if found:
        raise TRLContractError(
            f"trl {version}: its GRPOTrainer is not the one that VineGRPOTrainer extends: "
            f"{'; '.join(found)}; {_remedy()}, or look for a newer vineppo"
        )


def check_version(version: str) -> None:
    """Refuse another release.

    Raises:
        TRLContractError: as the name says.
    """
    if not version.startswith(f"{_dotted(SERIES)}."):
        raise TRLContractError(
            f"trl: expected a release {_dotted(SERIES)}.x, which VineGRPOTrainer was tested with, "
            f"got {version}; {_remedy()}"
        )


def differences(trainer: Any) -> list[str]:
    """What differs between TRL's trainer and what is known of it, in words.

    Args:
        trainer: the class ``GRPOTrainer``.
    """
    found = []
    for name, known in METHODS.items():
        method = getattr(trainer, name, None)
        got = None if method is None else tuple(inspect.signature(method).parameters)[1:]
        if got != known:
            what = "no such method" if got is None else f"({', '.join(got)})"
            found.append(f"{trainer.__name__}.{name}: expected ({', '.join(known)}), got {what}")
    return found


def check_output(keys: Iterable[str]) -> None:
    """Refuse a batch of TRL without the keys that are read from it.

    Raises:
        TRLContractError: as the name says.
    """
    got = set(keys)
    if missing := [key for key in OUTPUT if key not in got]:
        raise TRLContractError(
            f"trl: expected the keys {', '.join(OUTPUT)} in what _generate_and_score_completions "
            f"gives, got none of {', '.join(missing)}; {_remedy()}"
        )


def _remedy() -> str:
    return f'pip install "trl>={_dotted(SERIES)},<{_dotted((SERIES[0], SERIES[1] + 1))}"'


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
