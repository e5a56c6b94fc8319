from __future__ import annotations

import io
import re
import subprocess
import sys
from dataclasses import replace

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from hpreliability import plot
from hpreliability.errors import EmptyInputError, MissingColumnError, ShapeError
from hpreliability.scoring import THCTable, thc
from hpreliability.table import Table, from_frame
from hpreliability.transfer import transfer


def _runs() -> Table:
    rng = np.random.default_rng(0)
    turning = {"a": [0.0, 3.0, 6.0, 9.0], "b": [9.0, 6.0, 3.0, 0.0], "c": [0.0, 3.0, 6.0, 9.0]}
    rows = [
        {
            "hyperparameter": name,
            "value": f"{10.0**-v:g}",
            "env": env,
            "agent": agent,
            "budget": budget,
            "seed": seed,
            "score": (turning[env][v] if name == "turning" else 0.0) + rng.normal(),
        }
        for name in ("turning", "idle")
        for v in range(4)
        for env in turning
        for agent in ("one", "two")
        for budget in (100, 2000)
        for seed in range(4)
    ]
    return from_frame(pd.DataFrame(rows), context=("env", "agent", "budget"))


@pytest.fixture(scope="module")
def table() -> Table:
    return _runs()


@pytest.fixture(scope="module")
def result(table: Table) -> THCTable:
    return thc(
        table,
        over="env",
        by=("hyperparameter", "agent"),
        interval="mean_std",
        uncertainty="bootstrap",
        replicates=50,
        permutations=100,
    )


def _all_figures(table: Table, result: THCTable) -> list[Figure]:
    small = table.select(agent="one")
    return [
        plot.thc_bars(result),
        plot.rank_heatmap(result, {"hyperparameter": "turning", "agent": "one"}),
        plot.intervals(table, "turning", agent="one", columns=2),
        plot.transfer_matrix(table, "env"),
        plot.transfer_matrix(table, "env", measure="correlation"),
        plot.regret(transfer(table, "agent")),
        plot.response(small, "turning"),
    ]


def _texts(figure: Figure) -> list[str]:
    return [text.get_text() for axis in figure.axes for text in axis.texts]


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg")
    return buffer.getvalue()


def test_palette_is_that_of_the_report_so_that_figures_follow_its_theme() -> None:
    palette = pytest.importorskip("decapod.report.palette")
    for name in ("INK", "MUTED", "GRID", "SURFACE", "ACCENT", "SERIES"):
        assert getattr(plot, name) == getattr(palette, name), name


@pytest.fixture(scope="module")
def drawn(table: Table, result: THCTable) -> list[str]:
    return [_svg(figure) for figure in _all_figures(table, result)]


def test_figures_use_palette_colours_only(drawn: list[str]) -> None:
    known = {plot.INK, plot.MUTED, plot.GRID, plot.SURFACE, plot.ACCENT, *plot.SERIES}
    # What matplotlib draws invisible things in; reports map these two as well.
    known |= {"#000000", "#ffffff"}
    for svg in drawn:
        assert set(re.findall(r"#[0-9a-f]{6}\b", svg)) <= known


def test_figures_hold_no_raster(drawn: list[str]) -> None:
    assert not [svg for svg in drawn if "<image" in svg]


def test_plotting_leaves_pyplot_and_global_settings_alone(table: Table, result: THCTable) -> None:
    before = dict(mpl.rcParams)
    _all_figures(table, result)
    assert dict(mpl.rcParams) == before
    code = (
        "import sys; from test_plot import _runs; from hpreliability import plot\n"
        "plot.transfer_matrix(_runs(), 'env')\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=__file__.rpartition("/")[0])


def test_without_matplotlib_the_error_names_the_extra() -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from hpreliability import plot; plot.transfer_matrix(None, 'env')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert 'pip install "hpreliability[plot]"' in done.stderr.splitlines()[-1]


def test_bars_are_sorted_by_calibrated_score_with_the_least_consistent_on_top(
    result: THCTable,
) -> None:
    labels = [text.get_text() for text in plot.thc_bars(result).axes[0].get_yticklabels()]
    assert labels == ["idle", "turning"]
    turned = replace(result, frame=result.frame.assign(calibrated=-result.frame["calibrated"]))
    labels = [text.get_text() for text in plot.thc_bars(turned).axes[0].get_yticklabels()]
    assert labels == ["turning", "idle"]


def test_bars_are_filled_exactly_where_the_null_is_rejected(result: THCTable) -> None:
    figure = plot.thc_bars(result)
    for axis, (_, panel) in zip(figure.axes, result.frame.groupby("agent"), strict=True):
        dots = [line for line in axis.lines if line.get_marker() == "o"]
        filled = {
            float(dot.get_xdata()[0]): to_hex(dot.get_markerfacecolor()) == plot.ACCENT
            for dot in dots
        }
        for row in panel.to_dict("records"):
            assert filled[row["score"]] == (row["p_value"] <= 0.05)


def test_bars_work_without_null_and_interval(table: Table) -> None:
    bare = thc(table, over="env", by=("hyperparameter",), uncertainty=None, null=None)
    legend = plot.thc_bars(bare).legends[0]
    assert "null mean" not in [text.get_text() for text in legend.get_texts()]


def test_heatmap_prints_the_rank_of_every_value_in_every_context(result: THCTable) -> None:
    group = {"hyperparameter": "turning", "agent": "one"}
    ranks = result.ranks
    for column, text in group.items():
        ranks = ranks[ranks[column] == text]
    shown = _texts(plot.rank_heatmap(result, group))
    assert sorted(shown) == sorted(f"{rank:g}" for rank in ranks["rank"])


def test_heatmap_refuses_a_group_that_is_not_exactly_one(result: THCTable) -> None:
    with pytest.raises(EmptyInputError, match="picks 2"):
        plot.rank_heatmap(result, {"hyperparameter": "turning"})
    with pytest.raises(EmptyInputError, match="picks 0"):
        plot.rank_heatmap(result, {"hyperparameter": "absent"})
    with pytest.raises(MissingColumnError, match="nothing"):
        plot.rank_heatmap(result, {"nothing": "x"})


def test_intervals_have_a_panel_per_context(table: Table) -> None:
    figure = plot.intervals(table, "turning", agent="one", columns=2)
    titles = [axis.get_title(loc="left") for axis in figure.axes if axis.get_visible()]
    assert titles == ["a", "b", "c"]


def test_transfer_matrix_prints_nothing_lost_on_its_diagonal(table: Table) -> None:
    texts = np.array(_texts(plot.transfer_matrix(table, "env"))).reshape(3, 3)
    assert np.diag(texts).tolist() == [".00"] * 3
    assert texts[0, 1] != ".00"


def test_figures_for_few_contexts_refuse_many(table: Table) -> None:
    with pytest.raises(ShapeError, match="transfer_matrix"):
        plot.regret(transfer(table, ("env", "budget")))


def test_response_draws_one_line_per_budget_in_numeric_order(table: Table) -> None:
    figure = plot.response(table.select(agent="one"), "turning")
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["budget 100", "budget 2000"]
