"""The public data of arXiv 2406.17523, as its authors pickled them."""

from __future__ import annotations

import functools
import io
import pickle
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hpreliability.errors import (
    EmptyInputError,
    ShapeError,
    SourceFormatError,
    UnsafePickleError,
)
from hpreliability.table import Table, from_frame

# fmt: off
ATARI_100K_GAMES = (
    "Alien", "Amidar", "Assault", "Asterix", "BankHeist", "BattleZone", "Boxing", "Breakout",
    "ChopperCommand", "CrazyClimber", "DemonAttack", "Freeway", "Frostbite", "Gopher", "Hero",
    "Jamesbond", "Kangaroo", "Krull", "KungFuMaster", "MsPacman", "Pong", "PrivateEye", "Qbert",
    "RoadRunner", "Seaquest", "UpNDown",
)
# fmt: on

Kind = Literal["final_perf", "human_normalized_curve"]


def from_consistent_hparams(
    directory: str | PathLike[str],
    *,
    kind: Kind = "final_perf",
    incomplete: Literal["raise", "leave_out"] = "raise",
) -> Table:
    """Scores of the 26 Atari-100k games, human-normalised, for every setting in the public data.

    Args:
        directory: the folder `data` of the repository `joaogui1/Consistent-Data-Analysis`, which
            holds `{100k,40M}_experiments/<kind>/<hyper-parameter>.pickle`.
        kind: final scores, or learning curves (then the table has `step`, from 0).
        incomplete: settings whose array does not have one column per game (there is one: DER with
            BatchNorm in dense layers at 40M has 25, and does not say which) are an error, or left
            out with a note.

    Returns:
        Table with contexts `env`, `agent`, `regime`; seeds are the rows of the arrays.

    Raises:
        FileNotFoundError: no such folder.
        EmptyInputError: no pickle where they are expected.
        UnsafePickleError: a pickle that asks for more than containers and NumPy arrays. The third
            folder of the repository, `curves_all_games`, holds pandas objects and is refused.
        SourceFormatError: an unexpected structure, naming the file and the key.
        ShapeError: an incomplete setting under `"raise"`.

    Source: layout as published; labels keep the part after `<agent>_<hyper-parameter>_` whole,
    where the authors' code keeps only what follows the last underscore.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}")
    files = sorted(folder.glob(f"*_experiments/{kind}/*.pickle"))
    if not files:
        raise EmptyInputError(f"no {folder}/<regime>_experiments/{kind}/*.pickle")
    parts, notes = [], []
    for file in files:
        regime = file.parent.parent.name.removesuffix("_experiments")
        for agent, value, array in _settings(file, load_arrays(file)):
            games = len(ATARI_100K_GAMES)
            if array.ndim not in (2, 3) or array.shape[1] != games:
                problem = (
                    f"{file}: {agent} {file.stem}={value} has shape {array.shape}, "
                    f"expected (runs, {games}) or (runs, {games}, points)"
                )
                if incomplete == "raise":
                    raise ShapeError(f'{problem}; incomplete="leave_out" reads the others')
                notes.append(f"left out: {problem}")
                continue
            labels = {"hyperparameter": file.stem, "value": value, "agent": agent, "regime": regime}
            parts.append(_rows(array).assign(**labels))
    if not parts:
        raise EmptyInputError(f"no complete setting in {folder}; {notes[0]}")
    step = "step" if kind == "human_normalized_curve" else None
    table = from_frame(
        pd.concat(parts, ignore_index=True), context=("env", "agent", "regime"), step=step
    )
    return replace(table, notes=tuple(notes))


def load_arrays(file: str | PathLike[str]) -> Any:
    """Unpickle containers, numbers, text and NumPy arrays; refuse everything else.

    Works on pickles of protocols 2 to 5 that any NumPy from 1.x on wrote.

    Raises:
        EmptyInputError: an empty file.
        UnsafePickleError: the pickle asks for another global; the message names it. Nothing has
            been imported or called by then.
        SourceFormatError: a damaged pickle.
    """
    data = Path(file).read_bytes()
    if not data:
        raise EmptyInputError(f"{file} is empty")
    try:
        return _ArrayUnpickler(io.BytesIO(data)).load()
    except UnsafePickleError as error:
        raise UnsafePickleError(f"{file} {error}") from None
    # A damaged stream can make the unpickler and NumPy fail in all of these ways.
    except (
        pickle.UnpicklingError,
        EOFError,
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        AttributeError,
        OverflowError,
        MemoryError,
    ) as error:
        raise SourceFormatError(f"{file} is not a readable pickle: {error!r}") from error


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        # Fresh partials: a pickle can set attributes on what it is given, and must not reach
        # functions that others use. The two types are immutable.
        safe: dict[tuple[str, str], Any] = {
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
            ("_codecs", "encode"): functools.partial(_bytes_of_text),
        }
        for core in ("numpy.core", "numpy._core"):
            safe[f"{core}.multiarray", "_reconstruct"] = functools.partial(_empty_array)
            safe[f"{core}.numeric", "_frombuffer"] = functools.partial(_array_of_buffer)
        known = safe.get((module, name))
        if known is None:
            raise UnsafePickleError(
                f"asks for {module}.{name}; only containers and NumPy arrays are read, because "
                "anything else could run code. If you trust the file, convert it to CSV yourself"
            )
        return known


def _empty_array(subtype: type, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    """NumPy's placeholder for an array whose state comes next."""
    if subtype is not np.ndarray or shape != (0,):
        raise ValueError(f"unexpected array placeholder {subtype} {shape}")
    return np.ndarray.__new__(np.ndarray, shape, dtype)


def _array_of_buffer(
    buffer: bytes, dtype: np.dtype[Any], shape: tuple[int, ...], order: Literal["C", "F"]
) -> NDArray[Any]:
    """An array in protocol 5, whose numbers come as one buffer."""
    return np.frombuffer(buffer, dtype=dtype).reshape(shape, order=order)


def _bytes_of_text(text: str, encoding: str) -> bytes:
    """Bytes in protocol 2, which spells them as Latin-1 text."""
    if encoding != "latin1":
        raise ValueError(f"unexpected encoding {encoding}")
    return text.encode("latin1")


def _settings(file: Path, content: Any) -> list[tuple[str, str, NDArray[np.float64]]]:
    """(agent, value, array) for every setting in a file of one hyper-parameter."""
    if not isinstance(content, dict) or not content:
        raise SourceFormatError(f"{file}: expected a dict of agents, got {type(content).__name__}")
    found = []
    for key, settings in content.items():
        agent = str(key).removesuffix(f"_{file.stem}")
        if agent == str(key) or not isinstance(settings, dict) or not settings:
            raise SourceFormatError(
                f"{file}: expected <agent>_{file.stem} with a dict of settings, got {key!r} with "
                f"{type(settings).__name__}"
            )
        for setting, array in settings.items():
            value = str(setting).removeprefix(f"{key}_")
            if value == str(setting) or not isinstance(array, np.ndarray):
                raise SourceFormatError(
                    f"{file}: expected {key}_<value> with an array, got {setting!r} with "
                    f"{type(array).__name__}"
                )
            if array.dtype.kind not in "fiu":
                raise SourceFormatError(f"{file}: {setting} holds {array.dtype}, not numbers")
            found.append((agent, value, array.astype(np.float64)))
    return found


def _rows(array: NDArray[np.float64]) -> pd.DataFrame:
    """One row per entry of an array (runs, games) or (runs, games, points)."""
    axes = [range(array.shape[0]), ATARI_100K_GAMES, *(range(n) for n in array.shape[2:])]
    names = ["seed", "env", "step"][: array.ndim]
    index = pd.MultiIndex.from_product(axes, names=names)
    return index.to_frame(index=False).assign(score=array.ravel())
