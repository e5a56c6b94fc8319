"""One version of weights as a folder: a safetensors file and a manifest."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from asyncrlhf.errors import WeightUpdateError
from asyncrlhf.transport.layout import TensorSpec, from_json, specs_of, to_json
from asyncrlhf.transport.snapshot import checksum as checksum_of

MANIFEST: Final = "manifest.json"
_FORMAT: Final = 1


@dataclass(frozen=True)
class DirectorySnapshot:
    """Weights of one version in a folder.

    Attributes:
        path: the folder. That of a model with its configuration among the ``extra_files`` is one
            for ``from_pretrained``; that of an adapter is one for PEFT and vLLM.
        version: number of optimizer steps these weights have seen.
        checksum: of names and values.
        file: name of the safetensors file in it.
        specs: names, dtypes and shapes in the order in which they were published.
    """

    path: Path
    version: int
    checksum: str
    file: str
    specs: tuple[TensorSpec, ...]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Names and values, read into memory and compared with the checksum before the first.

        Raises:
            WeightUpdateError: the folder was pruned, or the file is damaged.
        """
        try:
            weights = list(self._read())
        except OSError as error:
            raise WeightUpdateError(
                f"weights of version {self.version} cannot be read from {self.path} ({error}); "
                "if they were pruned, read sooner or keep more versions"
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise WeightUpdateError(f"{self.path / self.file} is damaged: {error!r}") from error
        got = checksum_of(weights)
        if got != self.checksum:
            raise WeightUpdateError(
                f"{self.path / self.file} is damaged: expected checksum {self.checksum}, got {got}"
            )
        yield from weights

    def _read(self) -> Iterator[tuple[str, Tensor]]:
        # Read rather than mapped: when another machine prunes a mapped file, the next access ends
        # this process.
        with (self.path / self.file).open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > os.fstat(file.fileno()).st_size:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(file.read(length))
            for spec in self.specs:
                begin, end = header[spec.name]["data_offsets"]
                flat = torch.empty(spec.nbytes, dtype=torch.uint8)
                file.seek(8 + length + begin)
                if end - begin != spec.nbytes or file.readinto(flat.numpy()) != spec.nbytes:
                    raise ValueError(f"{spec.name} has not {spec.nbytes} bytes")
                yield spec.name, spec.of_bytes(flat)


def write_manifest(
    folder: Path, version: int, file: str, weights: Iterable[tuple[str, Tensor]]
) -> None:
    """Describe the weights that were written to ``folder / file``, in their order."""
    pairs = list(weights)
    manifest = {
        "format": _FORMAT,
        "version": version,
        "checksum": checksum_of(pairs),
        "file": file,
        "tensors": to_json(specs_of(pairs)),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


def open_folder(folder: Path, version: int) -> DirectorySnapshot:
    """The version that a folder holds; its weights are read when they are asked for.

    Raises:
        OSError: the folder or its manifest is not there.
        WeightUpdateError: the manifest is damaged, or of another version or release.
    """
    text = (folder / MANIFEST).read_bytes()
    try:
        found = json.loads(text)
        if found["format"] != _FORMAT or found["version"] != version:
            raise ValueError(f"format {found['format']}, version {found['version']}")
        return DirectorySnapshot(
            folder, version, found["checksum"], found["file"], from_json(found["tensors"])
        )
    except (ValueError, KeyError, TypeError) as error:
        raise WeightUpdateError(f"{folder / MANIFEST} is damaged: {error!r}") from error
