"""One root seed, any number of named and independent random streams.

A stream is known by its name, not by how many were made before it: adding an arm to an experiment
does not change what the other arms draw. Names become spawn keys of
:class:`numpy.random.SeedSequence` through SHA-256, so streams are the same in every process, on
every platform and under every ``PYTHONHASHSEED``.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

Name = str | int
_WORDS_PER_NAME = 4


@dataclass(frozen=True)
class Seeds:
    """A node in the tree of streams under one root seed.

    Attributes:
        root: a whole number of at least 0, of any size.
        path: the names that lead here; made by :meth:`child`.

    Raises:
        TypeError: ``root`` or a name is of the wrong type.
        ValueError: ``root`` is negative.
    """

    root: int
    path: tuple[Name, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.root, bool) or not isinstance(self.root, int | np.integer):
            raise TypeError(
                f"root: expected a whole number, got {self.root!r} of type "
                f"{type(self.root).__name__}"
            )
        if self.root < 0:
            raise ValueError(f"root: expected at least 0, got {self.root}; drop the sign")
        object.__setattr__(self, "root", int(self.root))
        object.__setattr__(self, "path", tuple(_checked(name) for name in self.path))

    def child(self, *names: Name) -> Seeds:
        """The node below this one; ``child("a", 1)`` is ``child("a").child(1)``.

        Args:
            names: text or whole numbers; the text ``"1"`` and the number 1 are different names.

        Raises:
            TypeError: a name is neither.
        """
        return Seeds(self.root, (*self.path, *names))

    def sequence(self, *names: Name) -> np.random.SeedSequence:
        """The seed sequence of this node, or of the one below it with these names."""
        path = (*self.path, *(_checked(name) for name in names))
        key = [word for name in path for word in _words(name)]
        return np.random.SeedSequence(self.root, spawn_key=key)

    def generator(self, *names: Name) -> np.random.Generator:
        """A new PCG64 generator at the start of the stream."""
        return np.random.Generator(np.random.PCG64(self.sequence(*names)))

    def integer(self, *names: Name) -> int:
        """A number in [0, 2**32) for libraries that take a seed and nothing else.

        32 bits are few: among 10,000 of them, two are equal with a chance of 1 %.
        """
        return int(self.sequence(*names).generate_state(1, np.uint32)[0])

    def torch_generator(self, *names: Name, device: str = "cpu") -> torch.Generator:
        """A new torch generator at the start of the stream, seeded with 64 bits.

        Args:
            names: as in :meth:`child`.
            device: where the numbers are drawn; streams of different devices differ.

        Raises:
            ImportError: torch is not installed.
        """
        try:
            import torch
        except ImportError as error:
            raise ImportError(
                "torch_generator needs torch, which is not installed; run "
                '`pip install "decapod[torch]"`, or use generator() for a numpy stream'
            ) from error
        generator = torch.Generator(device=device)
        generator.manual_seed(int(self.sequence(*names).generate_state(1, np.uint64)[0]))
        return generator


def _checked(name: Name) -> Name:
    if isinstance(name, bool) or not isinstance(name, str | int | np.integer):
        raise TypeError(
            f"names: expected text or whole numbers, got {name!r} of type {type(name).__name__}; "
            "format it as text"
        )
    return str.__str__(name) if isinstance(name, str) else int(name)


def _words(name: Name) -> tuple[int, ...]:
    """128 bits of the name's hash as 32-bit words, what a spawn key is made of."""
    tagged = f"s:{name}" if isinstance(name, str) else f"i:{name}"
    digest = hashlib.sha256(tagged.encode("utf-8", "surrogatepass")).digest()
    return tuple(
        int.from_bytes(digest[4 * i : 4 * i + 4], "little") for i in range(_WORDS_PER_NAME)
    )
