"""Errors that say what is wrong, where, and what to do about it.

Every error is a `ValueError`, so code that does not care which one it is can catch that.
"""

from __future__ import annotations


class HPReliabilityError(ValueError):
    """Root of all errors that this library raises about its input."""


class EmptyInputError(HPReliabilityError):
    """A file or table has no rows."""


class MissingColumnError(HPReliabilityError):
    """A named column is not in the data."""


class DuplicateKeyError(HPReliabilityError):
    """Two rows claim to be the same run."""


class NonFiniteScoreError(HPReliabilityError):
    """A score is NaN or infinite and no rule for it was chosen."""


class MissingContextError(HPReliabilityError):
    """A value has no run in a context in which its siblings have some."""


class TooFewValuesError(HPReliabilityError):
    """A hyper-parameter has a single value, so there is nothing to rank."""


class TooFewRunsError(HPReliabilityError):
    """A method needs more runs than a cell has."""


class ShapeError(HPReliabilityError):
    """An array has the wrong shape, or rows of unequal length."""


class UnsafePickleError(HPReliabilityError):
    """A pickle asks for something other than plain containers and NumPy arrays."""


class SourceFormatError(HPReliabilityError):
    """A file is not what the reader for it expects."""


class SweepConfigError(HPReliabilityError):
    """A sweep's description is wrong; the message begins with the offending key."""


class SweepResultError(HPReliabilityError):
    """What `train` returned does not have what the sweep asks for."""


class IncompleteSweepError(HPReliabilityError):
    """Some runs of a sweep have no result yet."""


class MissingExtraError(ImportError):
    """An optional package is not installed; the message names the extra that brings it."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"{package} is not installed; this needs the extra: "
            f'pip install "hpreliability[{extra}]"'
        )
