"""Weights as files: one folder per version, which a reader sees whole or not at all.

Folders are written under a temporary name, flushed to the disk and renamed, so the writer can be
killed at any moment and readers may be on other machines that share the file system.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from secrets import token_hex
from typing import Any, Final, Self

from torch import Tensor

from asyncrlhf.errors import (
    InvalidInputError,
    MissingExtraError,
    WaitTimeoutError,
    WeightUpdateError,
)
from asyncrlhf.settings import at_least, positive
from asyncrlhf.transport.folder import MANIFEST, DirectorySnapshot, open_folder, write_manifest
from asyncrlhf.transport.layout import check_version, listed

MODEL_FILE: Final = "model.safetensors"
ADAPTER_FILE: Final = "adapter_model.safetensors"
_RESERVED: Final = (MANIFEST, MODEL_FILE, ADAPTER_FILE, "adapter_config.json")


class SafetensorsDir:
    """Publishes weights as safetensors files, also to other machines that share the file system.

    One process publishes under one path and prefix; any number read, each through a
    ``SafetensorsDir`` of its own or through the pickled snapshots.

    Args:
        path: folder of the versions' folders; made when first needed.
        keep: how many versions are kept; when rounds run D ahead, ``max(2, D + 1)``.
        prefix: version 8 is the folder ``<prefix>-0000000008``.
        extra_files: put beside the weights of each version, such as the configuration and the
            tokenizer that ``from_pretrained`` needs; read now.

    Raises:
        InvalidInputError: a ``keep`` below 1, a prefix that is no plain file name, or extra files
            that are not there or would overwrite something.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        keep: int = 2,
        prefix: str = "weights",
        *,
        extra_files: Iterable[str | os.PathLike[str]] = (),
    ) -> None:
        at_least("keep", keep, 1)
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", prefix):
            raise InvalidInputError(
                f"prefix: expected letters, digits, '.', '_' and '-', got {prefix!r}"
            )
        self.path = Path(path).absolute()
        self.keep = keep
        self.prefix = prefix
        self._extra = _contents(extra_files)
        self._started = False
        self._own: set[int] = set()

    @property
    def versions(self) -> tuple[int, ...]:
        """Versions that are there now, oldest first."""
        pattern = re.compile(rf"{re.escape(self.prefix)}-(\d{{10,}})")
        try:
            found = [pattern.fullmatch(path.name) for path in self.path.iterdir()]
        except FileNotFoundError:
            return ()
        return tuple(sorted(int(match[1]) for match in found if match))

    def publish(self, weights: Iterable[tuple[str, Tensor]], version: int) -> DirectorySnapshot:
        """Write the weights, then remove all but the newest versions.

        Args:
            weights: names and parameters, of any device. A tensor under two names is stored twice.
            version: larger than every one that is there.

        Raises:
            MissingExtraError: safetensors is not installed.
            InvalidInputError: the version is not larger, or these are not weights.
            WeightUpdateError: reading or writing them failed; no reader sees the version.
        """
        self._start(version)
        pairs = listed(weights, version)

        def write(folder: Path) -> tuple[str, Iterable[tuple[str, Tensor]]]:
            from safetensors.torch import save_file

            plain = _plain(pairs)
            save_file(plain, folder / MODEL_FILE, metadata={"format": "pt"})
            return MODEL_FILE, plain.items()

        return self._publish(version, write)

    def publish_adapter(self, model: Any, version: int) -> DirectorySnapshot:
        """Write the adapter ``default`` of a PEFT model as a folder that PEFT and vLLM load.

        The snapshot's names are those of the file. Embeddings are left out unless the adapter
        trains them.

        Args:
            model: a ``PeftModel``.
            version: larger than every one that is there.

        Raises:
            MissingExtraError: safetensors is not installed.
            InvalidInputError: the version is not larger, or the model has no such adapter.
            WeightUpdateError: writing failed; no reader sees the version.
        """
        if "default" not in getattr(model, "peft_config", ()):
            raise InvalidInputError(
                f"model: expected a PeftModel with an adapter 'default', got {type(model).__name__}"
            )
        self._start(version)

        def write(folder: Path) -> tuple[str, Iterable[tuple[str, Tensor]]]:
            from safetensors.torch import load_file

            # To find out whether to save embeddings, PEFT would ask a server for the base model.
            model.save_pretrained(
                folder, selected_adapters=["default"], save_embedding_layers=False
            )
            return ADAPTER_FILE, load_file(folder / ADAPTER_FILE).items()

        return self._publish(version, write)

    def snapshot(self, version: int) -> DirectorySnapshot:
        """A version that is there.

        Raises:
            WeightUpdateError: it is not, or no longer, there, or its manifest is damaged.
        """
        try:
            return open_folder(self._folder(version), version)
        except OSError as error:
            raise WeightUpdateError(
                f"weights of version {version} are not in {self.path} ({error}); versions "
                f"{list(self.versions)} are"
            ) from error

    def latest(self) -> DirectorySnapshot | None:
        """The newest version; None before the first.

        Raises:
            WeightUpdateError: its manifest is damaged.
        """
        while versions := self.versions:
            try:
                return self.snapshot(versions[-1])
            except WeightUpdateError:
                if versions[-1] in self.versions:  # not just replaced
                    raise
        return None

    def wait(self, version: int, timeout: float = 600.0, poll: float = 0.2) -> DirectorySnapshot:
        """A version, as soon as it is there.

        Args:
            version: which one.
            timeout: seconds that it may take.
            poll: seconds between looks.

        Raises:
            WaitTimeoutError: it did not come in time.
            WeightUpdateError: it will not come, because newer ones are there; or it is damaged.
        """
        at_least("timeout", timeout, 0)
        positive("poll", poll)
        deadline = time.monotonic() + timeout
        while True:
            versions = self.versions
            if versions and versions[-1] >= version:
                return self.snapshot(version)
            left = deadline - time.monotonic()
            if left <= 0:
                raise WaitTimeoutError(
                    f"weights of version {version} in {self.path}",
                    timeout,
                    f"versions {list(versions)} are there; look whether the learner runs and "
                    "writes to the same file system",
                )
            time.sleep(min(poll, left))

    def rewind(self, version: int) -> None:
        """Remove all newer versions: a run that goes on from this one publishes them again.

        A run that goes on from a checkpoint publishes its versions anew: ``rewind(-1)``.
        """
        for newer in self.versions:
            if newer > version:
                self._remove(newer)

    def close(self) -> None:
        """Remove the versions that this object has published; can be called twice."""
        for version in self._own & set(self.versions):
            self._remove(version)
        self._own.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _folder(self, version: int) -> Path:
        return self.path / f"{self.prefix}-{version:010d}"

    def _temporary(self, version: int) -> Path:
        return self.path / f".{self.prefix}-{version:010d}.{token_hex(4)}.tmp"

    def _start(self, version: int) -> None:
        try:
            import safetensors  # noqa: F401 - to say that it is missing before any work
        except ModuleNotFoundError as error:
            raise MissingExtraError("safetensors", "train") from error
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            there = self.versions
        except OSError as error:
            raise WeightUpdateError(f"{self.path} cannot be written: {error}") from error
        try:
            check_version(version, max(there, default=None))
        except InvalidInputError as error:
            if self._own or not there:
                raise
            raise InvalidInputError(
                f"{error}, in {self.path}: left by another run; use an empty folder, or call "
                "rewind(version) with the one that this run goes on from"
            ) from error
        if not self._started:
            leftover = re.compile(rf"\.{re.escape(self.prefix)}-\d+\.[0-9a-f]{{8}}\.tmp")
            for path in self.path.iterdir():
                if leftover.fullmatch(path.name):
                    shutil.rmtree(path, ignore_errors=True)
            self._started = True

    def _publish(
        self,
        version: int,
        write: Callable[[Path], tuple[str, Iterable[tuple[str, Tensor]]]],
    ) -> DirectorySnapshot:
        temporary, final = self._temporary(version), self._folder(version)
        try:
            temporary.mkdir()
            write_manifest(temporary, version, *write(temporary))
            for name, content in self._extra.items():
                (temporary / name).write_bytes(content)
            _flush(temporary)
            temporary.rename(final)
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if isinstance(error, Exception):
                raise WeightUpdateError(
                    f"weights of version {version} could not be written to {self.path}: "
                    f"{type(error).__name__}: {error}"
                ) from error
            raise
        _flush_folder(self.path)
        self._own.add(version)
        for old in self.versions[: -self.keep]:
            self._remove(old)
        return self.snapshot(version)

    def _remove(self, version: int) -> None:
        # Gone at once under its name; a reader never finds half of it.
        gone = self._temporary(version)
        with suppress(FileNotFoundError):
            self._folder(version).rename(gone)
            shutil.rmtree(gone, ignore_errors=True)
        self._own.discard(version)


def _contents(files: Iterable[str | os.PathLike[str]]) -> Mapping[str, bytes]:
    contents: dict[str, bytes] = {}
    for file in map(Path, files):
        if file.name in _RESERVED or file.name in contents:
            raise InvalidInputError(
                f"extra_files: expected each name once and none of {', '.join(_RESERVED)}, got "
                f"{file}"
            )
        try:
            contents[file.name] = file.read_bytes()
        except OSError as error:
            raise InvalidInputError(f"extra_files: cannot read {file}: {error}") from error
    return contents


def _plain(pairs: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Contiguous on the CPU; those that share memory are copied, since safetensors refuses them."""
    plain: dict[str, Tensor] = {}
    memories: set[int] = set()
    for name, tensor in pairs:
        value = tensor.detach().cpu().contiguous()
        if value.untyped_storage().data_ptr() in memories:
            value = value.clone()
        memories.add(value.untyped_storage().data_ptr())
        plain[name] = value
    return plain


def _flush(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    _flush_folder(folder)


def _flush_folder(folder: Path) -> None:
    # Some network file systems cannot do this with a folder; the names are then as durable as
    # they make them.
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
