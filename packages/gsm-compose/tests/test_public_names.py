"""What `import gsm_compose` promises."""

from __future__ import annotations

import subprocess
import sys

import gsm_compose as gc


def test_every_public_name_resolves_and_no_function_is_hidden_by_a_module_of_its_name() -> None:
    # Importing a submodule sets an attribute of the package, so names must be tried after all
    # modules are loaded, in a process where nothing else has been looked up before.
    code = (
        "import inspect, pkgutil, importlib, gsm_compose as h\n"
        "for m in pkgutil.walk_packages(h.__path__, 'gsm_compose.'):\n"
        "    if not m.name.endswith('__main__'): importlib.import_module(m.name)\n"
        "print(*(n for n in h.__all__ if inspect.ismodule(getattr(h, n))))"
    )
    modules = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.split()
    assert modules == list(gc._MODULES)


def test_names_are_listed_once() -> None:
    assert len(set(gc.__all__)) == len(gc.__all__)
    assert dir(gc) == sorted(gc.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(gc, "no_such_name")


def test_importing_the_package_loads_no_other_package() -> None:
    code = (
        "import sys; before = set(sys.modules); import gsm_compose\n"
        "new = {m.partition('.')[0] for m in set(sys.modules) - before}\n"
        "print(*new - set(sys.stdlib_module_names))"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.split()
    assert loaded == ["gsm_compose"]
