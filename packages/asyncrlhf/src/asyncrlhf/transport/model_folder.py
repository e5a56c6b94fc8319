"""The weights that an engine starts with: what published ones must fit, and are completed from."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import Tensor

from asyncrlhf.errors import WeightUpdateError

_SHOWN = 3


class ModelFolder:
    """The safetensors files of a model's folder, as ``save_pretrained`` writes them.

    Only names and shapes are read before a value is needed.

    Args:
        path: the folder.

    Raises:
        OSError: it cannot be read.
        WeightUpdateError: it holds no safetensors files, or damaged ones.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self._homes: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Shape of every tensor by its name."""
        files = sorted(self.path.glob("*.safetensors"))
        if not files:
            raise WeightUpdateError(f"{self.path} holds no safetensors files")
        for file in files:
            for name, shape in _shapes(file):
                self._homes[name], self.shapes[name] = file, shape

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """All names and values."""
        yield from self._values(self._homes)

    def check(self, shapes: Iterable[tuple[str, tuple[int, ...]]]) -> bool:
        """Refuse what does not fit; whether it is all there is.

        Args:
            shapes: names of published weights with their shapes.

        Raises:
            WeightUpdateError: a name is unknown or comes twice, or a shape differs.
        """
        seen: set[str] = set()
        unknown = []
        for name, shape in shapes:
            if name in seen:
                raise WeightUpdateError(f"weights: expected each name once, got {name!r} twice")
            seen.add(name)
            expected = self.shapes.get(name)
            if expected is None:
                unknown.append(name)
            elif expected != tuple(shape):
                raise WeightUpdateError(
                    f"weights[{name!r}]: expected shape {expected}, got {tuple(shape)}"
                )
        if unknown:
            raise WeightUpdateError(
                f"weights: {len(unknown)} of {len(seen)} names are not in {self.path}, such as "
                f"{unknown[:_SHOWN]}; publish under the names of the model's own files, which "
                f"are like {list(self.shapes)[:_SHOWN]}"
            )
        return len(seen) == len(self.shapes)

    def complete(self, weights: Iterable[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
        """Published weights in the order of the folder, with its own values for those not given.

        vLLM fuses matrices when it loads them: of those that belong together it needs all.

        Args:
            weights: all weights, or those that learn; read to the end.

        Raises:
            WeightUpdateError: reading them raised, or as :meth:`check` says.
        """
        pairs = read(weights)
        given = dict(pairs)
        if not self.check((name, tuple(value.shape)) for name, value in pairs):
            missing = {name: file for name, file in self._homes.items() if name not in given}
            given.update(self._values(missing))
        return [(name, given[name]) for name in self._homes]

    def _values(self, homes: dict[str, Path]) -> Iterator[tuple[str, Tensor]]:
        from safetensors import safe_open

        for file in dict.fromkeys(homes.values()):
            with safe_open(file, framework="pt") as opened:
                for name, home in homes.items():
                    if home == file:
                        yield name, opened.get_tensor(name)


def read(weights: Iterable[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """All weights of a source, read to the end before anything is done with the first.

    Raises:
        WeightUpdateError: reading them raised, or there are none.
    """
    try:
        pairs = list(weights)
    except WeightUpdateError:
        raise
    except Exception as error:
        raise WeightUpdateError(
            f"reading the weights raised {type(error).__name__}: {error}; nothing was loaded"
        ) from error
    if not pairs:
        raise WeightUpdateError("weights: expected at least one tensor, got none")
    return pairs


def _shapes(file: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        try:
            header = json.loads(opened.read(min(size, file.stat().st_size)))
            for name, entry in header.items():
                if name != "__metadata__":
                    yield name, tuple(int(length) for length in entry["shape"])
        except (ValueError, KeyError, TypeError) as error:
            raise WeightUpdateError(f"{file} is damaged: {error!r}") from error
