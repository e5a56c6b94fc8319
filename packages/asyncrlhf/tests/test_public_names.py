"""What `import asyncrlhf` promises."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import subprocess
import sys

import pytest

import asyncrlhf

LAZY = ("asyncrlhf", "asyncrlhf.engines", "asyncrlhf.losses", "asyncrlhf.tasks",
        "asyncrlhf.transport")  # fmt: skip


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
        except asyncrlhf.MissingExtraError as error:
            assert "asyncrlhf[" in str(error)  # noqa: PT017 - any extra may be missing here


def test_names_are_listed_once_and_in_order() -> None:
    assert asyncrlhf.__all__ == sorted(set(asyncrlhf.__all__))


@pytest.mark.parametrize("name", LAZY)
def test_an_unknown_name_is_an_attribute_error(name: str) -> None:
    assert not hasattr(importlib.import_module(name), "no_such_name")


def test_importing_the_package_loads_no_other_package() -> None:
    code = (
        "import sys; before = set(sys.modules); import asyncrlhf\n"
        "new = {m.partition('.')[0] for m in set(sys.modules) - before}\n"
        "print(*new - set(sys.stdlib_module_names))"
    )
    assert printed(code) == ["asyncrlhf"]


def test_schedules_gates_and_pictures_load_nothing_but_the_standard_library() -> None:
    code = (
        "import sys; before = set(sys.modules)\n"
        "from asyncrlhf import schedule, timeline\n"
        "from asyncrlhf.staleness import StalenessGate\n"
        "timeline.draw(schedule.simulate(g=1, t=1, rounds=4)); StalenessGate(2, 1).try_admit()\n"
        "new = {m.partition('.')[0] for m in set(sys.modules) - before}\n"
        "print(*new - set(sys.stdlib_module_names))"
    )
    assert printed(code) == ["asyncrlhf"]


BLOCKER = """\
import importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
"""
EXTRAS = ("accelerate", "cloudpickle", "datasets", "decapod", "httpx", "peft", "ray", "rich",
          "safetensors", "transformers", "trl", "tyro", "vllm", "yaml")  # fmt: skip


def test_without_any_extra_the_core_works_and_the_rest_names_its_extra() -> None:
    code = BLOCKER.format(absent=EXTRAS) + (
        "import asyncrlhf\n"
        "from asyncrlhf import corrections, engines, losses, sequences, transport\n"
        "from asyncrlhf.cli import main\n"
        "for get in (lambda: asyncrlhf.AsyncRLHFTrainer, lambda: asyncrlhf.AsyncRLHFConfig,\n"
        "            lambda: engines.VLLMServer, lambda: engines.RayEngine):\n"
        "    try:\n"
        "        get()\n"
        "        print('none')\n"
        "    except asyncrlhf.MissingExtraError as error:\n"
        "        print(str(error).rpartition('[')[2].partition(']')[0])\n"
        "sys.stderr = sys.stdout\n"
        "main(['simulate'])\n"
    )
    words = printed(code)
    assert words[:4] == ["train", "train", "train", "ray"]
    assert '"asyncrlhf[cli]"' in words
