"""Which weights a vLLM holds, and the way back when an update fails.

vLLM loads weights layer by layer, in place. One that failed half-way has layers without values, and
ends its whole process when it is asked to generate. So whoever breaks it must mend it, or keep
everybody away from it.
"""

from __future__ import annotations

import logging
from typing import Protocol

from asyncrlhf.errors import WeightUpdateError
from asyncrlhf.transport.routes import Receiver, Update

_LOG = logging.getLogger(__name__)


class Holder(Receiver, Protocol):
    """A vLLM that can be held while its weights change."""

    def hold(self) -> None:
        """Stop generating; nothing else changes."""
        ...

    def settle(self, version: int) -> None:
        """Forget what was computed with other weights, take the label, and generate again."""
        ...

    def mend(self) -> None:
        """Make ready for another try what a failed one has left."""
        ...


class LoadedWeights:
    """Weights that are in use, with their version, and why they cannot be used.

    Args:
        holder: what holds them.
        start: brings back the weights that it began with; None when nothing does.
        what: the holder in words.
    """

    def __init__(self, holder: Holder, start: Update | None, what: str) -> None:
        self.version = 0
        """Of the weights in use, or of those that were before ``problem``."""
        self.problem = ""
        """Why nothing may be generated; empty when all is well."""
        self._holder = holder
        self._good: tuple[Update, int] | None = None if start is None else (start, 0)
        self._what = what

    def replace(self, update: Update, version: int) -> None:
        """Load an update; if that fails, load what was there before.

        Raises:
            WeightUpdateError: it failed. The old version stays, and its weights are in use again;
                where they could not be brought back, ``problem`` says so.
        """
        broken, touched = bool(self.problem), False
        self.problem = (
            f"{self._what} is being updated to version {version}, or that was interrupted"
        )
        try:
            self._holder.hold()
            touched = True
            if broken:
                self._holder.mend()
            update.send(self._holder, version)
            self._holder.settle(version)
        except Exception as error:
            failed = f"weights of version {version} were not loaded by {self._what}: {error}"
            _LOG.warning("%s; going back to version %d", failed, self.version)
            back = self._go_back() if touched or broken else self._let_go()
            self.problem = f"{failed}; {back}" if back else ""
            kept = self.problem or f"{failed}; version {self.version} is in use as before"
            raise WeightUpdateError(kept) from error
        self.version, self.problem = version, ""
        self._good = (update, version) if update.repeatable else None

    def refuse_if_broken(self) -> None:
        """Raise if nothing may be generated.

        Raises:
            WeightUpdateError: with the reason.
        """
        if self.problem:
            raise WeightUpdateError(
                f"{self.problem}. Nothing is generated until weights are loaded again"
            )

    def _go_back(self) -> str:
        """Why the weights before could not be brought back; empty when they were."""
        if self._good is None:
            return (
                f"version {self.version} could not be brought back, since its weights were not "
                "published as a snapshot that can be read again"
            )
        again, version = self._good
        try:
            self._holder.mend()
            again.send(self._holder, version)
            self._holder.settle(version)
        except Exception as error:  # noqa: BLE001 - told, and everybody kept away
            return f"nor could version {version} be brought back: {error}"
        return ""

    def _let_go(self) -> str:
        """Why it cannot go on after an update that had not begun; empty when it can."""
        try:
            self._holder.settle(self.version)
        except Exception as error:  # noqa: BLE001 - told, and everybody kept away
            return f"nor does it go on with version {self.version}: {error}"
        return ""
