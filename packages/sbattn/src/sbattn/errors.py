"""Errors that say what is wrong, where, and what to do about it."""

from __future__ import annotations


class InvalidInputError(ValueError):
    """An argument does not fit; the message has its name, what was expected, and what was got."""


class UnsupportedError(NotImplementedError):
    """Something that this library does not do, said before any work starts, with the remedy."""


class MissingExtraError(ImportError):
    """An optional package is not installed; the message names the extra that brings it."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f'{package} is not installed; this needs the extra: pip install "sbattn[{extra}]"'
        )
