"""The authors' pickles: same structure, written by the real NumPy and pickle."""

from __future__ import annotations

import os
import pickle
import pickletools
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from hpreliability.errors import (
    EmptyInputError,
    ShapeError,
    SourceFormatError,
    UnsafePickleError,
)
from hpreliability.readers.consistent_hparams import (
    ATARI_100K_GAMES,
    from_consistent_hparams,
    load_arrays,
)


def settings(agent: str, name: str, values: list[str], *shape: int) -> dict[str, Any]:
    rng = np.random.default_rng(len(agent + name))
    key = f"{agent}_{name}"
    return {key: {f"{key}_{v}": rng.normal(size=shape).astype(np.float32) for v in values}}


def write(folder: Path, regime: str, name: str, content: Any, kind: str = "final_perf") -> Path:
    file = folder / f"{regime}_experiments" / kind / f"{name}.pickle"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content))
    return file


def old_names(data: bytes) -> bytes:
    """The same pickle as NumPy before 2 wrote it, which called its core `numpy.core`."""
    for core in (b"multiarray", b"numeric"):
        new = b"numpy._core." + core
        old = b"numpy.core." + core
        # Protocols from 4 on put the length before the text; 2 and 3 end it with a newline.
        data = data.replace(bytes([len(new)]) + new, bytes([len(old)]) + old)
        data = data.replace(b"c" + new + b"\n", b"c" + old + b"\n")
    # A frame's length would be wrong by the letters that went.
    return b"".join(unframed(data))


def unframed(data: bytes) -> list[bytes]:
    position, parts = 0, []
    while (at := data.find(pickle.FRAME, position)) >= 0 and at <= 2:
        parts.append(data[position:at])
        position = at + 9
    return [*parts, data[position:]]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("old", [False, True])
def test_arrays_survive_every_protocol_and_both_names_of_numpy(
    tmp_path: Path, protocol: int, old: bool
) -> None:
    content = settings("DER", "widths", ["128", "256"], 5, 26, 3)
    content["DER_widths"]["fortran"] = np.asfortranarray(np.arange(12.0).reshape(3, 4))
    data = pickle.dumps(content, protocol=protocol)
    if old:
        data = old_names(data)
        assert b"numpy.core" in data
        assert b"numpy._core" not in data
        list(pickletools.genops(data))  # raises if the surgery left it malformed
    (tmp_path / "x.pickle").write_bytes(data)
    loaded = load_arrays(tmp_path / "x.pickle")
    assert list(loaded) == list(content)
    for key, array in content["DER_widths"].items():
        np.testing.assert_array_equal(loaded["DER_widths"][key], array)
        assert loaded["DER_widths"][key].dtype == array.dtype


def test_final_scores_land_in_their_cells(tmp_path: Path) -> None:
    der = settings("DER", "normalizations", ["non_normalization", "BatchNorm"], 5, 26)
    drq = settings("DrQ_eps", "normalizations", ["non_normalization", "BatchNorm"], 5, 26)
    write(tmp_path, "100k", "normalizations", der | drq)
    write(tmp_path, "40M", "normalizations", der)
    table = from_consistent_hparams(tmp_path)
    assert table.contexts == ("env", "agent", "regime")
    assert len(table.frame) == 3 * 2 * 5 * 26
    assert set(table.frame["agent"]) == {"DER", "DrQ_eps"}
    assert set(table.frame["regime"]) == {"100k", "40M"}
    # The authors' code would shorten this to "normalization".
    assert table.values("normalizations") == ("BatchNorm", "non_normalization")
    cell = table.select(
        value="non_normalization", agent="DrQ_eps", regime="100k", env="Qbert", seed="3"
    )
    array = drq["DrQ_eps_normalizations"]["DrQ_eps_normalizations_non_normalization"]
    assert cell.frame["score"].tolist() == [array[3, ATARI_100K_GAMES.index("Qbert")]]


def test_curves_become_steps(tmp_path: Path) -> None:
    content = settings("DER", "gammas", ["0.9", "0.99"], 2, 26, 4)
    write(tmp_path, "100k", "gammas", content, kind="human_normalized_curve")
    table = from_consistent_hparams(tmp_path, kind="human_normalized_curve")
    run = table.select(value="0.99", env="Pong", seed="1").frame
    array = content["DER_gammas"]["DER_gammas_0.99"][1, ATARI_100K_GAMES.index("Pong")]
    np.testing.assert_array_equal(run["score"], array)
    assert run["step"].tolist() == [0, 1, 2, 3]


def test_a_setting_without_all_games_is_an_error_or_a_note(tmp_path: Path) -> None:
    content = settings("DER", "normalizations", ["LayerNorm", "none"], 5, 26)
    content["DER_normalizations"]["DER_normalizations_BatchNorm"] = np.zeros((5, 25), np.float32)
    write(tmp_path, "40M", "normalizations", content)
    with pytest.raises(ShapeError, match=r"BatchNorm has shape \(5, 25\)"):
        from_consistent_hparams(tmp_path)
    table = from_consistent_hparams(tmp_path, incomplete="leave_out")
    assert table.values("normalizations") == ("LayerNorm", "none")
    assert "BatchNorm" in table.notes[0]


class Evil:
    """What an attacker would pickle: calls a function of choice on loading."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize(
    ("evil", "name"),
    [
        (lambda at: Evil(os.system, f"touch {at}"), "posix.system"),
        (lambda at: Evil(eval, f"open({str(at)!r}, 'w')"), r"(builtins|__builtin__)\.eval"),
        (lambda at: Evil(Path.touch, at), r"\.getattr|pathlib"),
        (lambda at: Evil(np.save, str(at), np.zeros(1)), "numpy"),
        (lambda at: Evil(np.fromfile, str(at)), "numpy"),
        (lambda _: pd.DataFrame({"a": [1]}), "pandas"),
    ],
    ids=["os.system", "eval", "pathlib", "numpy.save", "numpy.fromfile", "pandas"],
)
def test_a_pickle_that_calls_anything_is_refused_by_name_and_nothing_runs(
    tmp_path: Path, evil: Any, name: str, protocol: int
) -> None:
    at = tmp_path / "pwned"
    content = {"DER_widths": {"DER_widths_1": evil(at)}}
    file = write(tmp_path, "100k", "widths", pickle.dumps(content, protocol=protocol))
    with pytest.raises(UnsafePickleError, match=name) as caught:
        from_consistent_hparams(tmp_path)
    assert str(file) in str(caught.value)
    assert not at.exists()


@pytest.mark.parametrize("cut", [1, 10, 200, 400])
def test_a_cut_pickle_is_refused_by_name(tmp_path: Path, cut: int) -> None:
    data = pickle.dumps(settings("DER", "widths", ["1", "2"], 5, 26))
    file = write(tmp_path, "100k", "widths", data[:-cut])
    with pytest.raises(SourceFormatError, match=str(file)):
        from_consistent_hparams(tmp_path)


def test_random_damage_never_escapes_the_typed_errors(tmp_path: Path) -> None:
    data = bytearray(pickle.dumps(settings("DER", "widths", ["1"], 2, 3)))
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(data)
        for place in rng.integers(0, len(data), size=3):
            damaged[place] = rng.integers(0, 256)
        file = write(tmp_path, "100k", "widths", bytes(damaged))
        try:
            load_arrays(file)
        except (SourceFormatError, UnsafePickleError, EmptyInputError):
            refused += 1
    assert refused > 100


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ([1, 2], "expected a dict"),
        ({"DER_depths": {"x": 1}}, "DER_depths"),
        ({"DER_widths": {"DER_depths_1": np.zeros((5, 26))}}, "DER_depths_1"),
        ({"DER_widths": {"DER_widths_1": [1.0]}}, "DER_widths_1"),
        ({"DER_widths": {"DER_widths_1": np.array([["a"]])}}, "not numbers"),
        ({"DER_widths": {}}, "DER_widths"),
    ],
)
def test_another_structure_is_refused_with_file_and_key(
    tmp_path: Path, content: Any, problem: str
) -> None:
    write(tmp_path, "100k", "widths", content)
    with pytest.raises(SourceFormatError, match=problem):
        from_consistent_hparams(tmp_path)


def test_a_folder_without_pickles_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EmptyInputError, match="final_perf"):
        from_consistent_hparams(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        from_consistent_hparams(tmp_path / "gone")
