"""What `import sbattn` promises."""

from __future__ import annotations

import subprocess
import sys

import sbattn


def printed(code: str) -> list[str]:
    """Words that a fresh process prints."""
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.split()


def test_every_public_name_resolves_and_none_is_hidden_by_a_module_of_its_name() -> None:
    # Importing a submodule sets an attribute of the package, so names must be tried after all
    # modules are loaded, in a process where nothing else has been looked up before.
    code = (
        "import inspect, pkgutil, importlib, sbattn as s\n"
        "optional = {'decapod', 'decapod_kernels', 'matplotlib', 'rich', 'transformers',\n"
        "            'triton', 'tyro', 'vllm'}\n"
        "for m in pkgutil.walk_packages(s.__path__, 'sbattn.'):\n"
        "    try:\n"
        "        importlib.import_module(m.name)\n"
        "    except ModuleNotFoundError as error:\n"
        "        assert error.name.partition('.')[0] in optional, (m.name, error)\n"
        "print(*(n for n in s.__all__ if inspect.ismodule(getattr(s, n))))"
    )
    assert printed(code) == []


def test_names_are_listed_once_and_in_order() -> None:
    assert sbattn.__all__ == sorted(set(sbattn.__all__))
    assert dir(sbattn) == sbattn.__all__


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(sbattn, "no_such_name")


def test_importing_the_package_loads_no_other_package() -> None:
    code = (
        "import sys; before = set(sys.modules); import sbattn\n"
        "new = {m.partition('.')[0] for m in set(sys.modules) - before}\n"
        "print(*new - set(sys.stdlib_module_names))"
    )
    assert printed(code) == ["sbattn"]


def test_attending_on_a_cpu_loads_no_optional_package() -> None:
    code = (
        "import sys, torch, sbattn\n"
        "before = set(sys.modules)\n"
        "x = torch.ones(1, 1, 4, 8)\n"
        "sbattn.stickbreaking_attention(x, x, x)\n"
        "optional = {'decapod', 'decapod_kernels', 'transformers', 'matplotlib', 'vllm', 'tyro'}\n"
        "print(*optional & ({m.partition('.')[0] for m in set(sys.modules) - before}))"
    )
    assert printed(code) == []
