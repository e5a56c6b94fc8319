from __future__ import annotations

import io
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("decapod.report")

import matplotlib as mpl
from matplotlib.colors import to_hex
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

from decapod.report import palette
from vineppo.diagnostics import (
    Candidates,
    GroundTruth,
    ValueReport,
    evaluate_values,
    plots,
    train_test_curve,
)
from vineppo.diagnostics.state_samples import Alternatives
from vineppo.episodes import State
from vineppo.errors import InvalidInputError, MissingExtraError


def _reports(*, positions: bool = True, candidates: bool = True) -> dict[str, ValueReport]:
    rng = np.random.default_rng(0)
    states = [State(row, (1,), (2,) * depth) for row in range(12) for depth in range(5)]
    truth = GroundTruth.exact(rng.random(60))
    sets = [
        Alternatives(State(row, (1,)), tuple(State(row, (1,), (3, last)) for last in range(5)))
        for row in range(12)
    ]

    def noisy(spread: float) -> Callable[[Sequence[State]], Any]:
        return lambda some: np.clip(truth.values + spread * rng.normal(size=len(some)), 0, 1)

    return evaluate_values(
        {"vine": noisy(0.05), "critic": noisy(0.3)},
        states,
        truth,
        np.tile(np.arange(5) / 5, 12) if positions else None,
        candidates=Candidates(sets, truth) if candidates else None,
        resamples=100,
    )


@pytest.fixture(scope="module")
def reports() -> dict[str, ValueReport]:
    return _reports()


@pytest.fixture(scope="module")
def figures(reports: dict[str, ValueReport]) -> dict[str, Figure]:
    train = np.linspace(0.3, 0.6, 6)
    curves = {"vine": train_test_curve(train, 0.9 * train), "ppo": train_test_curve(train, train)}
    return {
        "scatter": plots.scatter(reports),
        "position": plots.error_by_position(reports),
        "calibration": plots.calibration_curve(reports),
        "ranking": plots.ranking_bars(reports),
        "train_test": plots.train_against_test(curves),
    }


def test_every_figure_draws_without_a_warning(figures: dict[str, Figure]) -> None:
    for figure in figures.values():
        assert isinstance(figure, Figure)
        figure.savefig(io.BytesIO(), format="svg")


def test_scatter_shows_every_state(
    figures: dict[str, Figure], reports: dict[str, ValueReport]
) -> None:
    axes = [axis for axis in figures["scatter"].axes if axis.get_visible()]
    for axis, (name, report) in zip(axes, reports.items(), strict=True):
        assert axis.get_title(loc="left").startswith(name)
        dots = next(line for line in axis.lines if line.get_marker() == "o")
        np.testing.assert_array_equal(dots.get_xdata(), report.points.truth)
        np.testing.assert_array_equal(dots.get_ydata(), report.points.predictions)


def _bars(container: ErrorbarContainer) -> np.ndarray:
    (lines,) = container.lines[2]
    return np.array([segment[:, 1] for segment in lines.get_segments()])


def test_error_bars_are_the_intervals(
    figures: dict[str, Figure], reports: dict[str, ValueReport]
) -> None:
    drawn = {
        "position": [[b.error for b in r.by_position] for r in reports.values()],
        "calibration": [[b.truth for b in r.calibration.bins] for r in reports.values()],
    }
    for kind, series in drawn.items():
        containers = figures[kind].axes[0].containers
        for container, intervals in zip(containers, series, strict=True):
            values = np.asarray(container.lines[0].get_ydata(), dtype=float)
            np.testing.assert_allclose(values, [x.value for x in intervals])
            ends = [(x.low, x.high) if math.isfinite(x.low) else (x.value,) * 2 for x in intervals]
            np.testing.assert_allclose(_bars(container), ends, atol=1e-12)


def test_ranking_shows_scores_beside_chance(
    figures: dict[str, Figure], reports: dict[str, ValueReport]
) -> None:
    top1, pairwise = figures["ranking"].axes
    for axis, field, chance in ((top1, "top1", 0.2), (pairwise, "pairwise", 0.5)):
        widths = [bar.get_width() for bar in axis.patches]
        assert widths == [getattr(report, field).value for report in reports.values()]
        ends = [list(line.get_xdata()) for line in axis.lines]
        assert [pytest.approx(chance)] * 2 in ends
    assert [label.get_text() for label in top1.get_yticklabels()] == list(reports)


def test_line_of_a_run_is_the_one_that_was_fitted(figures: dict[str, Figure]) -> None:
    axis = figures["train_test"].axes[0]
    line = axis.lines[1]
    np.testing.assert_allclose(np.array(line.get_ydata()), 0.9 * np.array(line.get_xdata()))
    labels = [text.get_text() for text in axis.get_legend().get_texts()]
    assert labels == ["vine, slope 0.90", "ppo, slope 1.00"]


def test_colours_are_those_that_reports_can_swap(figures: dict[str, Figure]) -> None:
    for figure in figures.values():
        for axis in figure.axes:
            for line in axis.lines:
                assert to_hex(line.get_color()) in palette.LIGHT.values()


def test_settings_of_the_caller_are_left_alone(reports: dict[str, ValueReport]) -> None:
    before = dict(mpl.rcParams)
    plots.scatter(reports)
    assert dict(mpl.rcParams) == before


def test_value_without_bounds_is_drawn_without_a_bar() -> None:
    one_prompt = evaluate_values(
        {"v": lambda _: [0.2, 0.4]},
        [State(0, (1,)), State(0, (1,), (2,))],
        GroundTruth.exact([0.5, 0.5]),
        [0.0, 0.5],
    )
    for figure in (plots.calibration_curve(one_prompt), plots.error_by_position(one_prompt)):
        figure.savefig(io.BytesIO(), format="svg")


def test_figures_name_what_a_report_lacks() -> None:
    bare = _reports(positions=False, candidates=False)
    with pytest.raises(InvalidInputError, match=r"^reports\['vine'\]: .*positions"):
        plots.error_by_position(bare)
    with pytest.raises(InvalidInputError, match=r"^reports\['vine'\]: .*candidates"):
        plots.ranking_bars(bare)
    for draw in (plots.scatter, plots.calibration_curve, plots.ranking_bars):
        with pytest.raises(InvalidInputError, match=r"^reports: "):
            draw({})
    with pytest.raises(InvalidInputError, match=r"^curves: "):
        plots.train_against_test({})


@pytest.mark.parametrize("package", ["matplotlib", "decapod.report"])
def test_missing_packages_name_their_extra(
    package: str, reports: dict[str, ValueReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=r"vineppo\[experiments\]"):
        plots.scatter(reports)


def test_drawing_does_not_start_pyplot() -> None:
    code = (
        "import sys\n"
        "from vineppo.diagnostics import plots, train_test_curve\n"
        "plots.train_against_test({'a': train_test_curve([0.1, 0.2], [0.1, 0.2])})\n"
        "print('matplotlib.pyplot' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
