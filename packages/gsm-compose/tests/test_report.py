"""Reports have the library's numbers, escape what models write, and load nothing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import pytest

from gsm_compose.benchmark import Benchmark
from gsm_compose.building import build_benchmark
from gsm_compose.engine.problems import load_gsm8k
from gsm_compose.errors import EvaluationError
from gsm_compose.evaluation import evaluate
from gsm_compose.prompts import Prompt, PromptSpec
from gsm_compose.report import report_json, report_markdown, write_report
from gsm_compose.results import Results, best_of
from gsm_compose.simulate import SimulatedReasoner
from gsm_compose.tables import TextTable, gap_table, percent, points

_PAPER = ("original", "modified", "compositional")
_SHORT = PromptSpec(shots=0)


@pytest.fixture(scope="module")
def asked() -> Benchmark:
    return build_benchmark(load_gsm8k()[:150], 24)


def _simulated(asked: Benchmark, spec: PromptSpec = _SHORT, **parameters: float) -> Results:
    reasoner = SimulatedReasoner(**parameters)
    model = reasoner.generate_for(asked, spec)
    return evaluate(asked, model, "all", spec, label="simulated", progress=False)


@pytest.fixture(scope="module")
def results(asked: Benchmark) -> dict[str, Results]:
    bad = {"e1": 0.3, "e2": 0.4, "ignore_x": 0.2, "lucky": 0.4, "unparsable": 0.2}
    return {
        "<weak> & co": _simulated(asked, **bad),
        "strong": _simulated(asked, e1=0.05, e2=0.05),
        "plain": _simulated(asked, PromptSpec(shots=0, preamble=False), e1=0.1, e2=0.1),
    }


def _writing(asked: Benchmark, text: str, conditions: Sequence[str] = _PAPER) -> Results:
    """A model that always writes the same."""

    def generate(prompts: Sequence[Prompt]) -> list[str]:
        return [text] * len(prompts)

    return evaluate(asked, generate, conditions, _SHORT, progress=False)  # type: ignore[arg-type]


class _Page(HTMLParser):
    """Rows of tables, paragraphs, scripts, and what the page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.loads: list[str] = []
        self.text: list[str] = []
        self.cell = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.cell = True
        for name, value in attrs:
            if name in ("src", "href", "srcset") and value and not value.startswith("#"):
                self.loads.append(value)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self.cell = False

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if self.cell:
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def page(results: dict[str, Results], tmp_path_factory: pytest.TempPathFactory) -> str:
    pytest.importorskip("decapod.report")
    pytest.importorskip("matplotlib")
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(results, path, title="Gaps of <three>")
    return path.read_text(encoding="utf-8")


def _parsed(page: str) -> _Page:
    parser = _Page()
    parser.feed(page)
    return parser


def test_page_has_the_gap_of_every_model(page: str, results: dict[str, Results]) -> None:
    rows = _parsed(page).rows
    for name, found in results.items():
        gap = found.gap()
        numbers = [points(gap.delta), points(gap.delta_paired), points(gap.relative)]
        assert any(row[:4] == [name, *numbers] for row in rows)


def test_page_loads_nothing_and_escapes_names(page: str) -> None:
    assert [link for link in _parsed(page).loads if not link.startswith("data:")] == []
    assert "<weak>" not in page
    assert "<three>" not in page
    assert "&lt;weak&gt; &amp; co" in page


def test_page_shows_an_example_of_every_kind_of_error_that_occurs(
    page: str, results: dict[str, Results]
) -> None:
    kinds = {k for r in results.values() for k in r.outcomes().category.tolist()} - {"correct"}
    assert {"X ignored", "wrong X", "unparsable"} <= kinds
    assert set(re.findall(r"Example: ([^<]+)</h2>", page)) == kinds


def test_what_a_model_writes_cannot_become_part_of_the_page(
    asked: Benchmark, tmp_path: Path
) -> None:
    pytest.importorskip("decapod.report")
    pytest.importorskip("matplotlib")
    hostile = "<script>alert(1)</script>\x00\ud800 & </p> final answer is 1\n" + "long " * 2000
    write_report({"m\x07": _writing(asked, hostile)}, tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f]", page)
    assert "long " * 400 not in page


@pytest.mark.parametrize(
    "text", ["", "no number here", "The Q1 answer is 1. The final answer is 1."]
)
def test_a_model_that_gets_nothing_right_still_has_a_report(
    asked: Benchmark, tmp_path: Path, text: str
) -> None:
    pytest.importorskip("decapod.report")
    pytest.importorskip("matplotlib")
    results = {"m": _writing(asked, text)}
    write_report(results, tmp_path / "r.html")
    assert "S1·S2 is zero" in (tmp_path / "r.html").read_text(encoding="utf-8")
    report_json(results)
    report_markdown(results)


def test_one_model_alone_is_not_compared(asked: Benchmark, results: dict[str, Results]) -> None:
    alone = report_markdown({"strong": results["strong"]})
    assert "Do the gaps differ" not in alone
    fewer = Benchmark(asked.items[:12])
    other = {"strong": results["strong"], "few": _simulated(fewer, e1=0.2)}
    assert "different items" in report_markdown(other)
    assert json.loads(report_json(other))["comparisons"] == []


def test_json_has_the_reports_of_the_library(results: dict[str, Results]) -> None:
    found = json.loads(report_json(results, level=0.9))
    assert list(found["models"]) == list(results)
    gap = results["strong"].gap(0.9)
    assert found["models"]["strong"]["report"] == json.loads(json.dumps(gap.to_dict()))
    assert len(found["comparisons"]) == 3


def test_excluded_items_are_shown_with_and_without(results: dict[str, Results]) -> None:
    strong = results["strong"]
    out = [item.id for item in strong.benchmark.items[:2]]
    kept = strong.gap(exclude=out).without_excluded
    assert kept is not None
    text = report_markdown({"strong": strong}, exclude=out)
    assert f"| strong, 2 left out | {points(kept.delta)} |" in text


def test_two_settings_of_the_preamble_are_set_side_by_side(asked: Benchmark) -> None:
    with_it = _simulated(asked, e1=0.2)
    without = _simulated(asked, PromptSpec(shots=0, preamble=False), e1=0.4)
    text = report_markdown({"a": with_it, "a, no preamble": without})
    numbers = [f"{100 * value:.1f}" for value in best_of(with_it, without).accuracy("original")]
    assert f"| simulated | original | {' | '.join(numbers)} |" in text
    # Another model that was asked without the preamble is not its counterpart.
    assert "With and without" not in report_markdown({"a": with_it, "b": _simulated(asked)})


def test_a_condition_that_is_missing_is_said(asked: Benchmark, tmp_path: Path) -> None:
    part = _writing(asked, "1", ("original",))
    for write in (report_json, report_markdown):
        with pytest.raises(EvaluationError, match="was not asked"):
            write({"m": part})
    with pytest.raises(EvaluationError, match="at least one"):
        report_json({})


def test_without_decapod_the_error_names_the_extra_and_nothing_is_written(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['decapod'] = None\n"
        "from gsm_compose.report import write_report; write_report({}, sys.argv[1])"
    )
    path = tmp_path / "r.html"
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert 'pip install "gsm-compose[report]"' in done.stderr.splitlines()[-1]
    assert not path.exists()


def test_tables_of_text_line_up_and_escape_bars() -> None:
    table = TextTable("T", ["name", "n"], [["a|b", "1"], ["long name", "10"]], "Why.")
    assert table.to_text().splitlines() == ["name        n", "a|b         1", "long name  10"]
    assert table.to_markdown() == (
        "## T\n\n| name | n |\n| --- | ---: |\n| a\\|b | 1 |\n| long name | 10 |\n\nWhy.\n"
    )


def test_rates_are_in_percent_with_a_real_minus(results: dict[str, Results]) -> None:
    gap = results["<weak> & co"].gap()
    assert percent(gap.s1) == f"{100 * gap.s1.value:.1f} [{100 * gap.s1.low:.1f}, " + (
        f"{100 * gap.s1.high:.1f}]"
    )
    assert "-" not in points(gap.delta)
    assert points(None) == percent(None) == "–"
    row = gap_table({"m": gap}).rows[0]
    assert row[5] == f"{100 * gap.s1.value * gap.s2.value:.1f}"
