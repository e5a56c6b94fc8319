from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hpreliability.scoring import THCTable, thc
from hpreliability.table import Table, from_frame

pytest.importorskip("decapod.report")
pytest.importorskip("matplotlib")

from hpreliability.report import write_report


def _table(*, broken: bool = False) -> Table:
    rng = np.random.default_rng(1)
    rows = [
        {
            "hyperparameter": name,
            "value": str(value),
            "env": env,
            "seed": seed,
            "score": rng.normal() + (3 * value * sign if name == "<turning & co>" else 0),
        }
        for name in ("<turning & co>", "idle")
        for value in range(4)
        for env, sign in (("Up", 1), ("Down", -1))
        for seed in range(4)
    ]
    if broken:
        rows[5]["score"] = float("nan")
    return from_frame(pd.DataFrame(rows))


def _scored(table: Table, **options: object) -> THCTable:
    return thc(table, permutations=50, uncertainty="bootstrap", replicates=50, **options)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("report") / "report.html"
    table = _table(broken=True).settle("worst")
    write_report(table, path, result=_scored(table), names={"idle": "Idle knob"}, title="My runs")
    return path.read_text(encoding="utf-8")


class _Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.loads: list[str] = []
        self.open_tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")
        self.open_tags.append(tag)
        self.loads += [v or "" for k, v in attrs if k in ("src", "href", "srcset")]

    def handle_data(self, data: str) -> None:
        if self.rows and self.rows[-1] and data.strip():
            self.rows[-1][-1] += data.strip()


def test_page_has_every_group_with_score_null_and_both_ties(page: str) -> None:
    parser = _Text()
    parser.feed(page)
    for name in ("<turning & co>", "Idle knob"):
        assert sum(row[:1] == [name] for row in parser.rows) == 3, name
    for text in ("symmetric", "Null 5–95", "Effect size", "Safe values", "Mean regret"):
        assert text in page


def test_page_loads_nothing(page: str) -> None:
    parser = _Text()
    parser.feed(page)
    outside = [link for link in parser.loads if not link.startswith(("#", "data:"))]
    assert outside == []
    assert not re.search(r"@import|url\(\s*['\"]?(?:https?:)?//", page)


def test_labels_from_the_data_cannot_become_markup(page: str) -> None:
    parser = _Text()
    parser.feed(page)
    assert "turning" not in parser.open_tags
    assert "&lt;turning &amp; co&gt;" in page


def test_every_replaced_run_is_on_the_page(page: str) -> None:
    assert "1 of 64 scores were not finite and count as the worst" in page


def test_a_table_without_losses_says_so(tmp_path: Path) -> None:
    table = _table()
    write_report(table, tmp_path / "r.html", result=_scored(table))
    assert "No run was dropped or replaced." in (tmp_path / "r.html").read_text("utf-8")


def test_scores_without_a_null_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    table = _table()
    with pytest.raises(ValueError, match='null="permutation"'):
        write_report(table, tmp_path / "r.html", result=thc(table, null=None))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    table = _table()
    with pytest.raises(OSError, match="absent"):
        write_report(table, tmp_path / "absent" / "r.html", result=_scored(table))
    assert not list(tmp_path.iterdir())


def test_without_decapod_the_error_names_the_extra() -> None:
    code = (
        "import sys; sys.modules['decapod.report'] = None\n"
        "from hpreliability.report import write_report; write_report(None, 'r.html')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert 'pip install "hpreliability[report]"' in done.stderr.splitlines()[-1]
