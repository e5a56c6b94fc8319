"""The documentation's examples, each page run from top to bottom in an empty folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SITE = "docs/pages/"
# By page: what its examples need beside the package's own requirements.
NEEDS = {
    "kernels/README.md": ("decapod_kernels", "triton"),
    f"{SITE}kernels.md": ("decapod_kernels", "triton"),
    f"{SITE}sbattn/api.md": (),
    f"{SITE}sbattn/benchmarks.md": (),
    f"{SITE}sbattn/decoding.md": (),
    f"{SITE}sbattn/experiments.md": (),
    f"{SITE}sbattn/index.md": (),
    f"{SITE}sbattn/layers.md": (),
    f"{SITE}sbattn/maths.md": (),
    f"{SITE}sbattn/skipping.md": (),
    f"{SITE}sbattn/transformers.md": ("transformers",),
    f"{SITE}sbattn/vllm.md": (),
}
pytestmark = pytest.mark.skipif(
    not (ROOT / SITE).is_dir(), reason="the package without its repository"
)


def blocks(page: str, language: str) -> list[str]:
    """Fenced blocks without a title; those with one are formulas and files."""
    fence = rf"^```{language}\n(.*?)^```$"
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(fence, text, flags=re.DOTALL | re.MULTILINE)


def test_every_page_is_known() -> None:
    found = {f"{SITE}sbattn/{path.name}" for path in (ROOT / SITE / "sbattn").glob("*.md")}
    assert found == {page for page in NEEDS if page.startswith(f"{SITE}sbattn/")}


@pytest.mark.parametrize("page", NEEDS)
def test_the_examples_print_what_the_page_says(page: str, tmp_path: Path) -> None:
    examples = blocks(page, "python")
    if not examples:
        assert not blocks(page, "text")
        return
    for package in NEEDS[page]:
        pytest.importorskip(package)
    script = tmp_path / "example.py"
    script.write_text("\n".join(examples), encoding="utf-8")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-X", "utf8", script],
        cwd=tmp_path,
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == "".join(blocks(page, "text"))
