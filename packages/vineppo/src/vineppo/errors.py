"""Errors that say what is wrong, where, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable


class InvalidInputError(ValueError):
    """An argument does not fit; the message has its name, what was expected, and what was got."""


class MissingExtraError(ImportError):
    """An optional package is not installed; the message names the extra that brings it."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f'{package} is not installed; this needs the extra: pip install "vineppo[{extra}]"'
        )


class RewardError(ValueError):
    """A reward function raised, or gave scores that cannot be used; the message names it."""


class NotFiniteError(ArithmeticError):
    """Log-probabilities, values or gradients are not finite; the message says which."""


def one_of(name: str, value: object, choices: Iterable[object]) -> None:
    """Refuse a value that is not among the choices."""
    allowed = list(choices)
    if value not in allowed:
        raise InvalidInputError(
            f"{name}: expected one of {', '.join(map(str, allowed))}, got {value!r}"
        )


def positive(name: str, value: float) -> None:
    """Refuse what is not above 0."""
    if not value > 0:
        raise InvalidInputError(f"{name}: expected a number above 0, got {value}")


def at_least(name: str, value: float, least: float) -> None:
    """Refuse what is below ``least``."""
    if not value >= least:
        raise InvalidInputError(f"{name}: expected at least {least:g}, got {value}")


def fraction(name: str, value: float) -> None:
    """Refuse what is not from 0 to 1."""
    if not 0 <= value <= 1:
        raise InvalidInputError(f"{name}: expected a number from 0 to 1, got {value}")
