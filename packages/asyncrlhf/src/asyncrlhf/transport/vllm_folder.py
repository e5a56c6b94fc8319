"""Weights come into vLLM through a folder that learner and workers both can read."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asyncrlhf.errors import InvalidInputError, WeightUpdateError
from asyncrlhf.transport.directory import SafetensorsDir
from asyncrlhf.transport.folder import DirectorySnapshot
from asyncrlhf.transport.model_folder import ModelFolder, read
from asyncrlhf.transport.routes import Receiver, Weights, verify


@dataclass(frozen=True)
class ReloadFolder:
    """An update that lies in a folder which the receiver can read."""

    folder: Path
    sent: Callable[[], None] = lambda: None
    repeatable: bool = True

    def send(self, receiver: Receiver, version: int) -> None:  # noqa: ARG002 - has no label
        """See :class:`Update`."""
        receiver.reload(self.folder)
        self.sent()


class VLLMFolder:
    """Sends weights through a folder that learner and vLLM both can read.

    A snapshot of :class:`~asyncrlhf.transport.SafetensorsDir` that holds all weights of the model
    is loaded from where it lies; anything else is written first. One object may serve several
    engines: a version is written once.

    Args:
        path: where versions are written; the newest two that were loaded stay.

    Raises:
        InvalidInputError: the path is not absolute, which to a server would mean another one.
    """

    def __init__(self, path: str | Path) -> None:
        if not Path(path).is_absolute():
            raise InvalidInputError(f"path: expected an absolute path, got {str(path)!r}")
        self._written = SafetensorsDir(path, keep=2, prefix="vllm")
        self._busy = threading.Lock()
        self._last: tuple[Any, int, ReloadFolder] | None = None
        self._loaded: int | None = None

    def prepare(self, source: Weights, version: int, start: ModelFolder | None) -> ReloadFolder:
        """See :class:`Route`."""
        with self._busy:
            if self._last is not None and self._last[0] is source and self._last[1] == version:
                return self._last[2]
            update = self._there(source, start) or self._write(source, version, start)
            self._last = (source, version, update)
            return update

    def close(self) -> None:
        """Remove what was written; can be called twice."""
        self._last = None
        self._written.close()

    def _there(self, source: Weights, start: ModelFolder | None) -> ReloadFolder | None:
        if not isinstance(source, DirectorySnapshot):
            return None
        if start is not None and not start.check((s.name, s.shape) for s in source.specs):
            return None
        return ReloadFolder(source.path)

    def _write(self, source: Weights, version: int, start: ModelFolder | None) -> ReloadFolder:
        weights = read(source) if start is None else start.complete(source)
        # A run that goes on from an earlier version publishes the later ones again. And a version
        # that nobody could load must not push out the one to go back to.
        newest = version - 1 if self._loaded is None else min(version - 1, self._loaded)
        self._written.rewind(newest)
        try:
            snapshot = self._written.publish(weights, version)
        except InvalidInputError as error:
            raise WeightUpdateError(str(error)) from error
        verify(source)

        def sent() -> None:
            self._loaded = version

        return ReloadFolder(snapshot.path, sent)
