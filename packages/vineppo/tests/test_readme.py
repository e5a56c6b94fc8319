"""Examples of README and documentation, run as a reader would: pasted into a script."""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1]
PAGES = PACKAGE.parents[1] / "docs" / "pages" / "vineppo"
# By page: what its examples need beside the package's own requirements. The pages on TRL and verl
# have tests of their own.
TRAIN = ("accelerate", "decapod.lm", "transformers")
NEEDS = {
    "alignment.md": (),
    "api.md": (),
    "choosing.md": (),
    "cli.md": (),
    "diagnostics.md": ("decapod.lm",),
    "exact.md": (),
    "experiments.md": (),
    "index.md": (),
    "rollouts.md": TRAIN,
    "trainers.md": TRAIN,
    "trl.md": None,
    "verl.md": None,
}
DECIMAL = re.compile(r"\d+\.\d+")


def blocks(page: Path, language: str) -> list[str]:
    """Fenced blocks without a title; those with one are formulas and files."""
    fence = rf"^```{language}\n(.*?)^```$"
    return re.findall(fence, page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


@pytest.fixture
def printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[list[str]], list[str]]:
    """Gives the lines that examples print, without the trainer's logs."""

    def run(examples: list[str]) -> list[str]:
        script = tmp_path / "example.py"
        script.write_text("\n".join(examples), encoding="utf-8")
        monkeypatch.chdir(tmp_path)
        # In this process, in which transformers is imported already.
        runpy.run_path(str(script), run_name="__main__")
        lines = capsys.readouterr().out.splitlines()
        return [line for line in lines if line.strip() and not line.startswith("{")]

    return run


def lines_of(texts: list[str]) -> list[str]:
    return [line for text in texts for line in text.splitlines() if line.strip()]


@pytest.mark.slow
def test_the_readme_trains_what_it_says_up_to_rounding(
    printed: Callable[[list[str]], list[str]],
) -> None:
    for package in TRAIN:
        pytest.importorskip(package)
    page = PACKAGE / "README.md"
    found = printed(blocks(page, "python")[:1])
    said = lines_of(blocks(page, "text")[:1])
    assert [DECIMAL.sub("#", line) for line in found] == [DECIMAL.sub("#", line) for line in said]
    for line, other in zip(found, said, strict=True):
        numbers = [[float(x) for x in DECIMAL.findall(text)] for text in (line, other)]
        assert numbers[0] == pytest.approx(numbers[1], abs=0.1), line


def test_the_readme_computes_what_it_says(printed: Callable[[list[str]], list[str]]) -> None:
    page = PACKAGE / "README.md"
    assert printed(blocks(page, "python")[1:]) == lines_of(blocks(page, "text")[1:])


def named_tests(text: str) -> list[tuple[str, str]]:
    return re.findall(r"`(test_\w+\.py)::(test_\w+)`", text)


def test_the_tests_that_the_readme_names_exist() -> None:
    named = named_tests((PACKAGE / "README.md").read_text(encoding="utf-8"))
    assert named
    for file, name in named:
        assert f"def {name}(" in (PACKAGE / "tests" / file).read_text(encoding="utf-8"), name


@pytest.mark.skipif(not PAGES.is_dir(), reason="the package without its repository")
def test_the_tests_that_a_page_names_exist() -> None:
    source = (PACKAGE / "tests" / "test_exact_gradients.py").read_text(encoding="utf-8")
    text = (PAGES / "exact.md").read_text(encoding="utf-8")
    for file, name in named_tests(text):
        assert f"def {name}(" in (PACKAGE / "tests" / file).read_text(encoding="utf-8"), name
    alone = re.findall(r"`(test_[a-z0-9_]+)`", text)
    assert alone
    assert [name for name in alone if f"def {name}(" not in source] == []


@pytest.mark.skipif(not PAGES.is_dir(), reason="the package without its repository")
def test_every_page_is_known() -> None:
    assert {path.name for path in PAGES.glob("*.md")} == set(NEEDS)


@pytest.mark.skipif(not PAGES.is_dir(), reason="the package without its repository")
@pytest.mark.parametrize("name", NEEDS)
def test_the_examples_of_a_page_print_what_it_says(
    name: str, printed: Callable[[list[str]], list[str]]
) -> None:
    needs = NEEDS[name]
    if needs is None or not blocks(PAGES / name, "python"):
        return
    for package in needs:
        pytest.importorskip(package)
    assert printed(blocks(PAGES / name, "python")) == lines_of(blocks(PAGES / name, "text"))
