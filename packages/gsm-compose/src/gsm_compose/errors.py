"""Errors that say what is wrong, where, and what to do about it.

Every error about input is a `ValueError`: code that does not care which one it is can catch that.
"""

from __future__ import annotations


class GSMComposeError(ValueError):
    """Root of all errors that this library raises about its input."""


class ExpressionError(GSMComposeError):
    """A calculator expression cannot be read, or divides by zero."""


class ProgramError(GSMComposeError):
    """A solution cannot be turned into a program; the message says which rule it breaks."""


class SourceFormatError(GSMComposeError):
    """A file of problems is not what the reader expects; the message has the line number."""


class BenchmarkFormatError(GSMComposeError):
    """A benchmark file is truncated, damaged, or of another schema version."""


class RejectedCompositionError(GSMComposeError):
    """A value may not take the place of a number; the message names the rule."""


class TooFewPairsError(GSMComposeError):
    """Fewer compositions exist than were asked for; the message has the largest number."""


class LeakError(GSMComposeError):
    """Training data would be made from a test split without saying so."""


class PromptError(GSMComposeError):
    """A prompt specification cannot be met."""


class EvaluationError(GSMComposeError):
    """A model's answers do not fit the questions, or a results file belongs to another run."""


class RewardError(GSMComposeError):
    """A reward function was called with columns that do not fit the completions."""


class StatisticsError(GSMComposeError):
    """An estimator was given arrays or settings that it cannot use."""


class IsolationError(GSMComposeError):
    """Model-written code cannot be run in the isolation that was asked for."""


class LearningError(GSMComposeError):
    """The learning experiment was given settings that make no run."""


class UsageError(GSMComposeError):
    """The command line asks for something that cannot be done; nothing was begun."""


class MissingExtraError(ImportError):
    """An optional package is not installed; the message names the extra that brings it."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f'{package} is not installed; this needs the extra: pip install "gsm-compose[{extra}]"'
        )
