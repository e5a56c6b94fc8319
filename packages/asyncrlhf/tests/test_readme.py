"""Examples of README and documentation, run as a reader would: pasted into a script."""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1]
PAGES = PACKAGE.parents[1] / "docs" / "pages" / "asyncrlhf"
# By page: what its examples need beside the package's own requirements. The page on TRL has a test
# of its own.
NEEDS = {
    "api.md": (),
    "choosing.md": (),
    "experiments.md": (),
    "faults.md": ("decapod.lm", "transformers"),
    "index.md": (),
    "ray.md": (),
    "recipes.md": (),
    "timeline.md": (),
    "transformers.md": ("accelerate", "decapod.lm", "peft", "transformers"),
    "trl.md": None,
    "vllm.md": (),
}
# PEFT asks transformers for names that it has renamed since.
pytestmark = pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed:FutureWarning")
DECIMAL = re.compile(r"\d+\.\d+")


def blocks(page: Path, language: str) -> list[str]:
    """Fenced blocks without a title; those with one are formulas and files."""
    fence = rf"^```{language}\n(.*?)^```$"
    return re.findall(fence, page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


@pytest.fixture
def printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[Path], list[str]]:
    """Gives the lines that a page's examples print, without the trainer's logs."""

    def run(page: Path) -> list[str]:
        script = tmp_path / "example.py"
        script.write_text("\n".join(blocks(page, "python")), encoding="utf-8")
        monkeypatch.chdir(tmp_path)
        # In this process, in which transformers is imported already.
        runpy.run_path(str(script), run_name="__main__")
        lines = capsys.readouterr().out.splitlines()
        return [line for line in lines if line.strip() and not line.startswith("{")]

    return run


def promised(page: Path) -> list[str]:
    return [line for block in blocks(page, "text") for line in block.splitlines() if line.strip()]


@pytest.mark.slow
def test_the_readme_prints_what_it_says_up_to_rounding(
    printed: Callable[[Path], list[str]],
) -> None:
    for package in ("accelerate", "decapod.lm", "transformers"):
        pytest.importorskip(package)
    page = PACKAGE / "README.md"
    found, said = printed(page), promised(page)
    assert [DECIMAL.sub("#", line) for line in found] == [DECIMAL.sub("#", line) for line in said]
    for line, other in zip(found, said, strict=True):
        numbers = [[float(x) for x in DECIMAL.findall(text)] for text in (line, other)]
        assert numbers[0] == pytest.approx(numbers[1], abs=0.1), line


def test_the_tests_that_the_readme_names_exist() -> None:
    named = re.findall(
        r"`(test_\w+\.py)::(test_\w+)`", (PACKAGE / "README.md").read_text(encoding="utf-8")
    )
    assert named
    for file, name in named:
        assert f"def {name}(" in (PACKAGE / "tests" / file).read_text(encoding="utf-8"), name


@pytest.mark.skipif(not PAGES.is_dir(), reason="the package without its repository")
def test_every_page_is_known() -> None:
    assert {path.name for path in PAGES.glob("*.md")} == set(NEEDS)


@pytest.mark.skipif(not PAGES.is_dir(), reason="the package without its repository")
@pytest.mark.parametrize("name", NEEDS)
def test_the_examples_of_a_page_print_what_it_says(
    name: str, printed: Callable[[Path], list[str]]
) -> None:
    needs = NEEDS[name]
    if needs is None or not blocks(PAGES / name, "python"):
        return
    for package in needs:
        pytest.importorskip(package)
    assert printed(PAGES / name) == promised(PAGES / name)
