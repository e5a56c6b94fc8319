"""What `import vineppo` promises."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import vineppo

LAZY = ("vineppo", "vineppo.diagnostics", "vineppo.tasks")


def printed(code: str) -> list[str]:
    """Words that a fresh process prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("name", LAZY)
def test_no_public_name_is_hidden_by_a_module_of_its_name(name: str) -> None:
    # Importing a submodule sets an attribute of the package.
    package = importlib.import_module(name)
    modules = {module.name for module in pkgutil.iter_modules(package.__path__)}
    for shared in modules & set(package.__all__):
        assert inspect.ismodule(getattr(package, shared)), shared


@pytest.mark.parametrize("name", LAZY)
def test_every_public_name_resolves(name: str) -> None:
    package = importlib.import_module(name)
    for public in package.__all__:
        try:
            getattr(package, public)
        except vineppo.MissingExtraError as error:
            assert "vineppo[" in str(error)  # noqa: PT017 - any extra may be missing here


@pytest.mark.parametrize("name", LAZY)
def test_names_are_listed_once(name: str) -> None:
    names = importlib.import_module(name).__all__
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", LAZY)
def test_an_unknown_name_is_an_attribute_error(name: str) -> None:
    assert not hasattr(importlib.import_module(name), "no_such_name")


def test_importing_the_package_loads_no_other_package() -> None:
    code = (
        "import sys; before = set(sys.modules); import vineppo\n"
        "new = {m.partition('.')[0] for m in set(sys.modules) - before}\n"
        "print(*new - set(sys.stdlib_module_names))"
    )
    assert printed(code) == ["vineppo"]


BLOCKER = """\
import importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
"""
EXTRAS = ("accelerate", "datasets", "decapod", "httpx", "matplotlib", "peft", "ray", "rich",
          "safetensors", "scipy", "transformers", "trl", "tyro", "verl", "vllm",
          "yaml")  # fmt: skip


def test_without_any_extra_the_core_works_and_the_rest_names_its_extra() -> None:
    smoke = Path(__file__).with_name("smoke.py")
    code = BLOCKER.format(absent=EXTRAS) + (
        f"import runpy; runpy.run_path({str(smoke)!r}, run_name='__main__')\n"
        "import vineppo\n"
        "from vineppo import borders, budget, exact, latex, logprobs\n"
        "from vineppo.cli import main\n"
        "for name in ('VinePPOTrainer', 'PPOTrainer', 'rollout'):\n"
        "    try:\n"
        "        getattr(vineppo, name)\n"
        "        print('none')\n"
        "    except vineppo.MissingExtraError as error:\n"
        "        print(str(error).rpartition('[')[2].partition(']')[0])\n"
        "sys.stderr = sys.stdout\n"
        "main(['bench'])\n"
    )
    words = printed(code)
    assert words[0] == "vineppo"  # of smoke.py
    assert [word for word in words if word in ("train", "none")] == ["train"] * 3
    assert '"vineppo[cli]"' in words
