"""Figures show the numbers that they are given, in the report's colours, and nothing else."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from dataclasses import replace

import matplotlib as mpl
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text

from gsm_compose import plot
from gsm_compose.errors import StatisticsError
from gsm_compose.gap import GapReport, gap_report
from gsm_compose.simulate import Pairing, SimulatedReasoner


def _report(**parameters: float) -> GapReport:
    return gap_report(SimulatedReasoner(**parameters).outcomes(Pairing.distinct(200)))


@pytest.fixture(scope="module")
def reports() -> dict[str, GapReport]:
    return {
        "weak": _report(e1=0.4, e2=0.5, distraction=0.2, second_hop=0.2, lucky=0.3),
        "organisation/a-model-with-quite-a-long-name-Instruct": _report(e1=0.2, e2=0.2),
        "costs $5_and_$6": _report(e1=0.02, e2=0.02, unparsable=0.1),
    }


def _all_figures(reports: dict[str, GapReport]) -> list[Figure]:
    return [
        plot.plot_gap(reports),
        *(plot.plot_decomposition(report) for report in reports.values()),
        plot.plot_expected(reports),
        plot.plot_leakage(reports),
        plot.plot_taxonomy(reports),
        plot.plot_taxonomy({"weak": reports["weak"]}),
    ]


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg")
    return buffer.getvalue()


def _texts(figure: Figure) -> list[str]:
    return [text.get_text() for axis in figure.axes for text in axis.texts]


def _bars(figure: Figure) -> list[tuple[float, float]]:
    """Where bars begin and end."""
    patches = figure.axes[0].patches
    return [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in patches]


def test_palette_is_that_of_the_report_so_that_figures_follow_its_theme() -> None:
    palette = pytest.importorskip("decapod.report.palette")
    for name in ("INK", "MUTED", "GRID", "SURFACE", "ACCENT", "SERIES"):
        assert getattr(plot, name) == getattr(palette, name), name


def test_figures_use_palette_colours_only_and_hold_no_raster(
    reports: dict[str, GapReport],
) -> None:
    known = {plot.INK, plot.MUTED, plot.GRID, plot.SURFACE, plot.ACCENT, *plot.SERIES}
    # What matplotlib draws invisible things in; reports map these two as well.
    known |= {"#000000", "#ffffff"}
    for figure in _all_figures(reports):
        svg = _svg(figure)
        assert set(re.findall(r"#[0-9a-f]{6}\b", svg)) <= known
        assert "<image" not in svg


def test_figures_are_as_wide_as_a_phone(reports: dict[str, GapReport]) -> None:
    for figure in _all_figures(reports):
        assert figure.get_figwidth() * 96 < 345  # CSS pixels of a phone less the page's margins


def test_plotting_leaves_pyplot_and_global_settings_alone(reports: dict[str, GapReport]) -> None:
    before = dict(mpl.rcParams)
    _all_figures(reports)
    assert dict(mpl.rcParams) == before
    code = (
        "import sys; from gsm_compose import plot\n"
        "from gsm_compose.gap import gap_report\n"
        "from gsm_compose.simulate import SimulatedReasoner\n"
        "assert 'matplotlib' not in sys.modules\n"
        "plot.plot_gap({'m': gap_report(SimulatedReasoner().outcomes(20))})\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_matplotlib_the_error_names_the_extra() -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from gsm_compose import plot; plot.plot_gap({})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert 'pip install "gsm-compose[plot]"' in done.stderr.splitlines()[-1]


def test_gap_bars_end_at_delta_and_are_in_the_order_given(reports: dict[str, GapReport]) -> None:
    figure = plot.plot_gap(reports)
    ends = [end for _, end in _bars(figure)]
    assert ends == pytest.approx([100 * report.delta.value for report in reports.values()])
    low, high = figure.axes[0].get_xlim()
    for report in reports.values():
        for interval in (report.delta, report.delta_paired):
            assert low < 100 * interval.low
            assert 100 * interval.high < high
    names = [text for text in _texts(figure) if not text.startswith("Δ")]
    assert [name[:4] for name in names] == ["weak", "orga", "cost"]


def test_decomposition_goes_from_expected_to_measured_without_a_break(
    reports: dict[str, GapReport],
) -> None:
    for report in reports.values():
        bars = _bars(plot.plot_decomposition(report))
        at = 100 * report.s1.value * report.s2.value
        terms = (report.distraction_term, report.second_hop_term, report.lucky)
        for (begin, end), term in zip(bars, terms, strict=True):
            assert begin == pytest.approx(at)
            at += 100 * term.value
            assert end == pytest.approx(at)
        assert at == pytest.approx(100 * report.s_comp.value)


def test_scatters_place_every_model_at_its_numbers(reports: dict[str, GapReport]) -> None:
    expected, leakage = plot.plot_expected(reports), plot.plot_leakage(reports)

    def dots(figure: Figure) -> list[tuple[float, float]]:
        lines = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
        return [(line.get_xdata()[0], line.get_ydata()[0]) for line in lines]

    for (x, y), report in zip(dots(expected), reports.values(), strict=True):
        assert (x, y) == pytest.approx(
            (100 * report.s1.value * report.s2.value, 100 * report.s_comp.value)
        )
    for (x, y), report in zip(dots(leakage), reports.values(), strict=True):
        assert report.leakage is not None
        assert (x, y) == pytest.approx((100 * report.s2.value, 100 * report.leakage.original.value))


@pytest.mark.parametrize("rates", [[0.1] * 5, [0.02] * 5, [0.6] * 5, [0.5, 0.1, 0.11, 0.12, 0.9]])
def test_names_of_dots_stay_inside_and_do_not_lie_over_each_other(rates: list[float]) -> None:
    names = [f"model-number-{index}" for index in range(len(rates))]
    reports = {name: _report(e1=rate, e2=rate) for name, rate in zip(names, rates, strict=True)}
    figure = plot.plot_expected(reports)
    figure.draw_without_rendering()
    (axis,) = figure.axes
    labels = [text for text in axis.texts if isinstance(text, Annotation)]
    assert sorted(label.get_text() for label in labels) == names
    # An annotation's own extent has its line in it.
    boxes = [Text.get_window_extent(label) for label in labels]
    frame = axis.get_window_extent()
    for index, box in enumerate(boxes):
        assert frame.x0 <= box.x0
        assert box.x1 <= frame.x1
        assert frame.y0 <= box.y0
        assert box.y1 <= frame.y1
        assert not any(box.overlaps(other) for other in boxes[:index])


def test_taxonomy_bars_have_the_shares_of_every_kind_that_occurs(
    reports: dict[str, GapReport],
) -> None:
    weak = reports["weak"]
    shares = [share for kind, share in weak.taxonomy.items() if share and kind != "correct"]
    assert [end for _, end in _bars(plot.plot_taxonomy({"weak": weak}))] == pytest.approx(
        [100 * share for share in shares]
    )
    legend = plot.plot_taxonomy(reports).legends[0]
    assert len(legend.get_texts()) == len(reports)


def test_a_model_without_errors_has_a_taxonomy_that_says_so() -> None:
    assert "every answer is correct" in _texts(plot.plot_taxonomy({"m": _report(e1=0, e2=0)}))


def test_dollar_signs_in_names_are_not_read_as_mathematics(reports: dict[str, GapReport]) -> None:
    assert "costs $5_and_$6" in _svg(plot.plot_gap(reports))


def test_figures_refuse_what_they_cannot_show(reports: dict[str, GapReport]) -> None:
    with pytest.raises(StatisticsError, match="at least one"):
        plot.plot_gap({})
    many = {str(index): reports["weak"] for index in range(7)}
    with pytest.raises(StatisticsError, match="at most 6"):
        plot.plot_taxonomy(many)
    with pytest.raises(StatisticsError, match="original-q2"):
        plot.plot_leakage({"m": replace(reports["weak"], leakage=None)})
