from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from decapod.claims import DataTable, Evidence, Figure, Paper
from decapod.report import ReportError, Section, build, palette, render_page, svg_from_matplotlib
from decapod.report.build import effect_text, headline
from decapod.report.figures import themed_svg
from decapod.report.glyph import glyph
from decapod.report.page import duration, number, table_text
from decapod.reproductions import Decided, Outcome

SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 10 10"><defs><clipPath id="c">'
    '<path d="M0 0h9v9z"/></clipPath></defs><g clip-path="url(#c)"><path id="p" d="M0 0h9" '
    f'style="stroke: {palette.SERIES[0]}"/></g></svg>'
)
VOID = {"meta", "link", "br", "hr", "img", "input"}
# Elements that end an open <p> if they start inside it: nested so, they are not where they seem.
CLOSES_P = {"div", "p", "ul", "dl", "table", "figure", "details", "section", "h1", "h2", "h3"}


def decided(id="gain", verdict="shown", low=0.1, high=0.3, region=(0.0, math.inf), **changes):
    fields = {
        "id": id,
        "statement": "Toys gain",
        "source": "Table 1",
        "arms": ("toy", "none"),
        "metric": "gain",
        "rule": "Shown if above 0.",
        "region": region,
        "fingerprint": "f" * 64,
        "changed": False,
        "verdict": verdict,
        "evidence": verdict
        and Evidence((low + high) / 2, low, high, 5, "seeds", {"toy": 1.2, "none": 1.0}),
    }
    return Decided(**(fields | changes))


def outcome(name="toy", claims=None, **changes) -> Outcome:
    fields = {
        "name": name,
        "profile": "quick",
        "paper": Paper(f"On {name}", "A. Author", "Venue", 2024, "https://example.org/toys"),
        "status": "concluded",
        "error": "",
        "claims": (decided(),) if claims is None else claims,
        "figures": (Figure("A figure", SVG, "What it shows.", "A line at 0."),) * 2,
        "tables": (DataTable("A table", ["arm", "gain"], [["toy", 1.25], ["none", None]]),),
        "notes": ("A note.",),
        "command": f"decapod reproduce {name} --profile quick",
        "finished": "2026-01-02T03:04:05+00:00",
        "seconds": 61.2,
        "job_seconds": 100.0,
        "jobs_done": 8,
        "jobs_reused": 3,
        "jobs_missing": 0,
        "environment": {"cpu_count": 2, "commit": "abc", "dirty": True, "packages": {"x": "1"}},
    }
    return Outcome(**(fields | changes))


ALL = (
    outcome(
        "toy",
        (
            decided("gain"),
            decided("level", "not shown", -0.1, 0.3, (-0.2, 0.2)),
            decided("loss", "reversed", 0.2, 0.4, (-math.inf, 0.0), changed=True),
            decided("cells", "shown", 41, 41, (41.0, 41.0)),
            decided(
                "own", "not shown", 1.0, math.inf, None, evidence=Evidence(2, 1, math.inf, 1, "x")
            ),
        ),
    ),
    outcome(
        "broken",
        (decided(verdict=None),),
        status="failed",
        error="Traceback\nRuntimeError: out of toys",
        figures=(),
        tables=(),
        notes=(),
    ),
)


def built(tmp_path, outcomes=ALL) -> str:
    for one in outcomes:
        (tmp_path / one.name).mkdir(exist_ok=True)
        one.save(tmp_path / one.name / "outcome.json")
    build(tmp_path)
    return (tmp_path / "report.html").read_text(encoding="utf-8")


class Tree(HTMLParser):
    """Elements with their ancestors; complains of tags that do not close in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None], tuple[str, ...]]] = []
        self.text = ""
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        assert not ("p" in self.open and tag in CLOSES_P), (tag, self.open)
        assert not (tag in {"a", "button"} and {"a", "button"} & set(self.open)), self.open
        assert len({name for name, _ in attrs}) == len(attrs), (tag, attrs)
        self.elements.append((tag, dict(attrs), tuple(self.open)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), tuple(self.open)))

    def handle_endtag(self, tag):
        assert self.open[-1] == tag, (tag, self.open)
        self.open.pop()

    def handle_data(self, data):
        if not {"script", "style"} & set(self.open):
            self.text += data

    def all(self, tag):
        return [attrs for name, attrs, _ in self.elements if name == tag]


def page_of_everything() -> str:
    section = Section("Part", ["Words."], ALL[0].figures, ALL[0].tables)
    return render_page("A page", "A lead.", [section, section], kicker="toy")


@pytest.fixture(scope="module")
def report_html(tmp_path_factory):
    return built(tmp_path_factory.mktemp("report"))


@pytest.fixture(params=["report", "page"])
def html(request, report_html):
    return report_html if request.param == "report" else page_of_everything()


def test_elements_nest_and_ids_are_unique_and_referred_to(html):
    tree = Tree(html)
    ids = [attrs["id"] for _, attrs, _ in tree.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    for _, attrs, _ in tree.elements:
        for name in ("aria-labelledby", "href", "clip-path"):
            for target in re.findall(r"^(\w[\w-]*)$|#([\w-]+)", attrs.get(name) or ""):
                if not (attrs.get("href") or "").startswith(("http", "data:")):
                    assert "".join(target) in ids, attrs


def test_nothing_is_loaded_from_outside(html):
    tree = Tree(html)
    for tag, attrs, _ in tree.elements:
        assert tag not in {"img", "iframe", "object", "embed", "base"}
        assert "src" not in attrs
        if "href" in attrs and tag != "a":
            assert attrs["href"].startswith(("#", "data:"))
    assert not re.search(r"url\(\s*['\"]?(?!#)|@import", html)
    policy = next(
        a["content"] for a in tree.all("meta") if "content" in a and "src" in a["content"]
    )
    assert policy.startswith("default-src 'none'")


def test_every_picture_has_a_name_and_every_header_a_scope(html):
    tree = Tree(html)
    assert tree.all("svg")
    for attrs in tree.all("svg"):
        named = attrs.get("role") == "img" and attrs.get("aria-label")
        assert named or attrs.get("aria-hidden") == "true", attrs
    for attrs in tree.all("th"):
        assert attrs["scope"] in {"col", "row", "rowgroup"}
    for attrs in tree.all("table"):
        assert attrs["aria-labelledby"]


def test_page_has_one_heading_landmarks_and_a_way_to_skip_to_the_content(html):
    tree = Tree(html)
    assert len(tree.all("h1")) == len(tree.all("main")) == 1
    assert len(tree.all("footer")) == 1
    first_link = tree.all("a")[0]
    assert first_link["href"] == "#" + tree.all("main")[0]["id"]
    levels = [int(tag[1]) for tag, _, _ in tree.elements if re.fullmatch(r"h[1-6]", tag)]
    assert all(after <= before + 1 for before, after in pairwise(levels))
    for attrs in tree.all("html"):
        assert attrs["lang"] == "en"


def test_every_scrolling_box_can_be_reached_by_keyboard_and_is_named(html):
    boxes = [a for _, a, _ in Tree(html).elements if "scroll" in (a.get("class") or "").split()]
    assert boxes
    assert all(a["tabindex"] == "0" and a["role"] == "region" and a["aria-label"] for a in boxes)


def test_overview_says_all_that_a_claim_is_about(report_html):
    text = " ".join(Tree(report_html).text.split())
    for words in (
        "Two of six claims shown",
        "On toy",
        "Toys gain",
        "Table 1",
        "exact",
        "0.20",
        "[0.10, 0.30]",
        "5",
        "seeds",
        "1 min 1 s",
        "3 of 8 jobs reused",
        "decapod reproduce toy --profile quick",
        "quick profile: small, see standard results",
        "[1, ∞]",
        "rule not as recorded before the run",
        "RuntimeError: out of toys",
        "abc with uncommitted changes",
    ):
        assert words in text, words


def test_a_verdict_is_a_word_and_an_icon_never_colour_alone(report_html):
    for verdict in ("shown", "not shown", "reversed", "failed"):
        css = verdict.replace(" ", "-")
        assert re.search(
            rf'<span class="pill {css}"><svg [^>]*>.+?</svg>{verdict}</span>', report_html
        )


def test_text_from_a_library_cannot_become_markup(tmp_path):
    evil = "<script>alert(1)</script>"
    html = built(
        tmp_path,
        [
            outcome(
                claims=(decided(statement=evil, rule=evil, arms=(evil,)),),
                paper=Paper(evil, evil, evil, 2024, "javascript:alert(1)"),
                notes=(evil,),
                tables=(DataTable(evil, [evil], [[evil]], evil),),
                figures=(Figure(evil, SVG, evil, f'"{evil}'),),
                environment={evil: evil},
            )
        ],
    )
    assert "alert(1)</script>" not in html
    assert "javascript:alert" not in html
    assert Tree(html).text.count(evil) >= 8


def test_a_paper_that_is_nowhere_has_no_link(tmp_path):
    html = built(tmp_path, [outcome(paper=Paper("Own", "A. Author", "Composition", 2026, ""))])
    assert "read the paper" not in html
    assert "<>" not in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_a_figure_that_is_not_safe_is_named_and_the_rest_is_shown(tmp_path):
    bad = Figure("Bad one", "<svg><script>1</script></svg>", "c", "a")
    text = Tree(built(tmp_path, [outcome(figures=(bad, *ALL[0].figures))])).text
    assert "“Bad one” could not be drawn" in text
    assert "What it shows." in text


def test_an_outcome_that_cannot_be_read_is_named_and_hides_no_other(tmp_path):
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "outcome.json").write_text('{"schema": 1, "name"')
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "outcome.json").write_text('{"schema": 0}')
    text = Tree(built(tmp_path)).text
    assert "torn: its outcome could not be read" in text
    assert "expected an outcome of schema 1, got 0" in text
    assert "On toy" in text


def test_a_folder_without_outcomes_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(ReportError, match="decapod reproduce"):
        build(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_markdown_and_json_say_the_same_as_the_page(tmp_path):
    built(tmp_path, [outcome(claims=(decided(statement="a | b"),)), ALL[1]])
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    row = next(line for line in markdown.splitlines() if line.startswith("| On toy"))
    assert "✓ shown" in row
    assert "0.20 [0.10, 0.30]" in row
    cells = re.split(r"(?<!\\)\|", row.strip("|"))
    assert len(cells) == 7
    assert "✕ Failed" in markdown
    content = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert content["counts"] == {"shown": 1, "not shown": 0, "reversed": 0, "failed": 1}
    toy = next(entry for entry in content["outcomes"] if entry["name"] == "toy")
    assert toy["claims"][0]["evidence"]["high"] == 0.3
    assert "svg" not in toy["figures"][0]


def test_building_twice_gives_the_same_bytes(tmp_path):
    assert built(tmp_path) == built(tmp_path)


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def mixed(a: str, b: str, share: float) -> str:
    parts = [
        round(share * int(a[i : i + 2], 16) + (1 - share) * int(b[i : i + 2], 16))
        for i in (1, 3, 5)
    ]
    return "#" + "".join(f"{part:02x}" for part in parts)


@pytest.mark.parametrize(
    ("colours", "page"),
    [(palette.LIGHT, palette.PAGE_LIGHT), (palette.DARK, palette.PAGE_DARK)],
    ids=["light", "dark"],
)
def test_every_colour_for_text_has_a_contrast_of_four_and_a_half(colours, page):
    for name in colours.keys() - {"grid", "surface"}:
        assert contrast(colours[name], colours["surface"]) >= 4.5, name
    for name in ("ink", "muted", "accent"):
        assert contrast(colours[name], page) >= 4.5, name
    for name in ("good", "muted", "warn", "bad"):
        tint = mixed(colours[name], colours["surface"], 0.10)
        assert contrast(colours[name], tint) >= 4.5, name
    assert contrast(colours["ink"], mixed(colours["grid"], colours["surface"], 0.45)) >= 4.5


def test_themes_define_the_same_distinct_colours():
    assert palette.LIGHT.keys() == palette.DARK.keys()
    assert len(set(palette.LIGHT.values())) == len(palette.LIGHT)


@pytest.fixture
def figure():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib.figure import Figure as Canvas

    with matplotlib.rc_context(palette.RCPARAMS):
        canvas = Canvas(figsize=(4, 3))
        axes = canvas.subplots()
        axes.plot([0, 1], [1, 0], "o-", color=palette.SERIES[1], label="$x^2$ & more")
        axes.bar([0], [1], color="#123456")
        axes.imshow([[0, 1], [1, 0]], extent=(0, 1, 0, 1))
        axes.legend()
        axes.set_xlabel("steps")
    return canvas


def test_matplotlib_figure_follows_the_theme_and_keeps_other_colours(figure):
    svg = svg_from_matplotlib(figure)
    assert "var(--series2)" in svg
    assert "#123456" in svg
    assert "steps" in svg
    assert not any(colour in svg.lower() for colour in palette.LIGHT.values())
    assert "DejaVu" not in svg
    assert "#000000" not in svg
    for gone in ("<?xml", "<!DOCTYPE", "<metadata", "<style", "<!--", "xlink"):
        assert gone not in svg


def test_same_figure_gives_the_same_svg_and_ids_can_be_set_apart(figure):
    svg = svg_from_matplotlib(figure)
    assert svg_from_matplotlib(figure) == svg
    one, two = (themed_svg(svg, prefix=p, label="x") for p in ("a-", "b-"))
    ids = [set(re.findall(r'\bid="([^"]+)"', text)) for text in (one, two)]
    assert ids[0]
    assert not ids[0] & ids[1]
    for text, known in zip((one, two), ids, strict=True):
        assert set(re.findall(r'(?:url\(|href=")#([^)"]+)', text)) <= known


@pytest.mark.parametrize(
    ("svg", "words"),
    [
        ("<svg><script>1</script></svg>", "<script>"),
        ('<svg onload="x()"/>', "onload"),
        ('<svg><image href="https://example.org/x.png"/></svg>', "https://example.org"),
        ('<svg><path style="fill:url(https://example.org/x)"/></svg>', "outside"),
        ("<svg><foreignObject/></svg>", "foreignObject"),
        ('<!DOCTYPE s [<!ENTITY e "x">]><svg>&e;</svg>', "entity"),
        ("<svg><g></svg>", "well-formed"),
        ("<html/>", "<svg>"),
    ],
)
def test_active_or_reaching_svg_is_refused(svg, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        themed_svg(svg)


@pytest.mark.parametrize("low", [-3.0, 0.2, 5.0, -math.inf])
@pytest.mark.parametrize(
    "region", [(0.0, math.inf), (-math.inf, 2.0), (1.0, 3.0), (5.0, 5.0), None]
)
def test_threshold_is_in_the_middle_and_order_is_kept(low, region):
    evidence = Evidence(max(low, -4) + 1, low, max(low, -4) + 2, 3, "seeds")
    g = glyph(decided(region=region, evidence=evidence))
    assert sum(at for at, _ in g.edges) / len(g.edges) == pytest.approx(50, abs=0.01)
    assert 0 <= g.low <= g.effect <= g.high <= 100
    assert g.open_low == math.isinf(low)


@pytest.mark.parametrize(
    ("counts", "line"),
    [
        ((0, 0, 0, 0), "No claim tested"),
        ((1, 0, 0, 0), "The claim is shown"),
        ((0, 1, 0, 0), "No of one claim shown"),
        ((3, 0, 0, 0), "All three claims shown"),
        ((3, 0, 1, 0), "Three of four claims shown"),
        ((20, 1, 0, 0), "20 of 21 claims shown"),
    ],
)
def test_headline_counts_in_words(counts, line):
    verdicts = ("shown", "not shown", "reversed", "failed")
    assert headline(dict(zip(verdicts, counts, strict=True))) == line


def test_only_a_recomputed_count_is_called_exact_not_runs_that_happen_to_agree():
    assert effect_text(decided(low=41, high=41, region=(41.0, 41.0))) == "41 exact"
    assert effect_text(decided(low=0.5, high=0.5)) == "0.5 [0.5, 0.5]"


def test_numbers_are_written_for_people():
    assert [number(x) for x in (0.123456, -2.0, 12345.6, 1e-7, math.inf, math.nan)] == [
        "0.1235",
        "−2",
        "12,346",
        "1e−07",
        "∞",
        "–",
    ]
    assert number(-0.001, 2) == "0.00"
    assert [duration(s) for s in (0.01, 8.21, 48, 200, 7500)] == [
        "under 0.1 s",
        "8.2 s",
        "48 s",
        "3 min 20 s",
        "2 h 5 min",
    ]


def test_numbers_of_a_column_share_their_decimals():
    text = table_text(
        DataTable("t", ["name", "x", "n", "mixed"], [["a", 0.5, 1, 1], ["b", 12.25, None, "many"]])
    )
    assert text.numeric == (False, True, True, False)
    assert text.rows == (("a", "0.50", "1", "1"), ("b", "12.25", "–", "many"))


@pytest.mark.slow
@pytest.mark.parametrize("width", [375, 1280])
def test_a_real_browser_shows_it_without_sideways_scrolling(tmp_path, width):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium here")
    built(tmp_path)
    (tmp_path / "frame.html").write_text(
        f'<iframe src="report.html" style="width:{width}px;height:800px" onload="'
        "const d=this.contentDocument.documentElement;"
        "document.title='overflow='+(d.scrollWidth-d.clientWidth)\"></iframe>"
    )
    done = subprocess.run(
        [
            browser,
            *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            *("--allow-file-access-from-files", "--virtual-time-budget=2000"),
            *(f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"),
            (tmp_path / "frame.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "HOME": str(tmp_path)},
    )
    assert "<title>overflow=0</title>" in done.stdout
