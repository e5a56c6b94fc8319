"""Errors that say what is wrong, where, and what to do about it."""

from __future__ import annotations


class InvalidInputError(ValueError):
    """An argument does not fit; the message has its name, what was expected, and what was got."""


class MissingExtraError(ImportError):
    """An optional package is not installed; the message names the extra that brings it."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f'{package} is not installed; this needs the extra: pip install "asyncrlhf[{extra}]"'
        )


class WaitTimeoutError(TimeoutError):
    """A wait took longer than its limit; the message names what was waited for."""

    def __init__(self, what: str, seconds: float, remedy: str = "") -> None:
        tail = f"; {remedy}" if remedy else ""
        super().__init__(f"waited {seconds:g} s for {what}{tail}")
        self.what = what
        self.seconds = seconds


class WeightUpdateError(RuntimeError):
    """Weights were not published or not loaded; the version that counts is still the old one."""


class ActorError(RuntimeError):
    """An actor failed for good: it raised, or it died more often than it may be started again."""


class RewardError(ValueError):
    """A reward function raised, or gave scores that cannot be used; the message names it."""
