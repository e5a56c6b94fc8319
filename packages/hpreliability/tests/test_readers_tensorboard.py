"""Event files that the real TensorBoard writers wrote."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hpreliability.errors import EmptyInputError, MissingColumnError, SourceFormatError
from hpreliability.readers import from_tensorboard

pytest.importorskip("tensorboard")

LAYOUT = "{hyperparameter}={value}/{env}/{seed}"


def write(folder: Path, curve: list[float], tag: str = "eval/return") -> None:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(str(folder))
    for step, value in enumerate(curve):
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
        writer.add_event(Event(step=step * 100, wall_time=0.0, summary=summary))
    writer.close()


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for lr in ("1e-3", "1e-4"):
        for env in ("A", "B"):
            for seed in range(2):
                write(tmp_path / "runs" / f"lr={lr}" / env / str(seed), [seed, 1.5, float(lr)])
    return tmp_path / "runs"


def test_every_point_of_every_run_is_read(runs: Path) -> None:
    table = from_tensorboard(runs, tag="eval/return", layout=LAYOUT)
    assert table.contexts == ("env",)
    assert table.values("lr") == ("1e-4", "1e-3")
    assert len(table.frame) == 2 * 2 * 2 * 3
    run = table.select(value="1e-3", env="B", seed="1").frame
    assert run["step"].tolist() == [0, 100, 200]
    np.testing.assert_allclose(run["score"], [1, 1.5, 1e-3], rtol=1e-6)
    final = table.reduce("final").frame
    np.testing.assert_allclose(final["score"], final["value"].astype(float), rtol=1e-6)


def test_long_curves_are_not_thinned_out(tmp_path: Path) -> None:
    write(tmp_path / "lr=1/A/0", list(range(11_000)))  # TensorBoard keeps 10,000 unless told
    table = from_tensorboard(tmp_path, tag="eval/return", layout=LAYOUT)
    assert len(table.frame) == 11_000


def test_a_pattern_and_a_layout_that_does_not_name_the_hyperparameter(runs: Path) -> None:
    table = from_tensorboard(
        str(runs / "**"), tag="eval/return", layout="lr={value}/{env}/{seed}", hyperparameter="rate"
    )
    assert table.hyperparameters == ("rate",)
    assert len(table.frame) == 24


def test_torch_writers_files_are_read(tmp_path: Path) -> None:
    tensorboard_of_torch = pytest.importorskip("torch.utils.tensorboard")
    for value in "12":
        with tensorboard_of_torch.SummaryWriter(str(tmp_path / f"lr={value}/A/0")) as writer:
            writer.add_scalar("r", float(value), 7)
    table = from_tensorboard(tmp_path, tag="r", layout=LAYOUT)
    assert table.frame[["step", "score"]].to_numpy().tolist() == [[7, 1], [7, 2]]


def test_a_run_that_never_logged_the_tag_is_a_failed_run_with_a_note(runs: Path) -> None:
    write(runs / "lr=1e-3/A/9", [1.0], tag="other")
    table = from_tensorboard(runs, tag="eval/return", layout=LAYOUT)
    assert table.select(seed="9").frame["score"].isna().all()
    assert "1 runs never logged 'eval/return'" in table.notes[0]


def test_an_unknown_tag_lists_the_known(runs: Path) -> None:
    with pytest.raises(MissingColumnError, match=r"'loss'.*'eval/return'"):
        from_tensorboard(runs, tag="loss", layout=LAYOUT)


def test_a_folder_that_does_not_fit_the_layout_is_refused(runs: Path) -> None:
    write(runs / "misc", [1.0])
    with pytest.raises(SourceFormatError, match="misc does not end like"):
        from_tensorboard(runs, tag="eval/return", layout="runs/" + LAYOUT)


def test_no_event_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EmptyInputError, match="events"):
        from_tensorboard(tmp_path, tag="r", layout=LAYOUT)
    with pytest.raises(FileNotFoundError):
        from_tensorboard(tmp_path / "gone", tag="r", layout=LAYOUT)


@pytest.mark.parametrize(
    ("layout", "problem"),
    [
        ("{hyperparameter}={value}/{env}", "seed"),
        ("{hyperparameter}/{env}/{seed}", "value"),
        ("{value}/{env}/{seed}", "hyper-parameter once"),
        ("{hyperparameter}={value}/{seed}", "context"),
        ("{hyperparameter}={value}/{env}/{env}/{seed}", "twice"),
    ],
)
def test_an_incomplete_layout_is_refused(runs: Path, layout: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        from_tensorboard(runs, tag="eval/return", layout=layout)
