"""Choices that settings and their users share, and their checks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from asyncrlhf.errors import InvalidInputError

StalePolicy = Literal["block", "drop"]
OnRewardError = Literal["raise", "drop"]
Scoring = Literal["learner", "process"]
IsCorrection = Literal[
    "truncate_token", "truncate_sequence", "mask_token", "mask_sequence", "decoupled"
]


def one_of(name: str, value: object, choices: Iterable[str]) -> None:
    """Refuse a value that is not among the choices."""
    allowed = list(choices)
    if value not in allowed:
        raise InvalidInputError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")


def positive(name: str, value: float) -> None:
    """Refuse what is not above 0."""
    if not value > 0:
        raise InvalidInputError(f"{name}: expected a number above 0, got {value}")


def at_least(name: str, value: float, least: float) -> None:
    """Refuse what is below ``least``."""
    if not value >= least:
        raise InvalidInputError(f"{name}: expected at least {least:g}, got {value}")
