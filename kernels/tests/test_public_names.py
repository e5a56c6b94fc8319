"""What `import decapod_kernels` promises."""

from __future__ import annotations

import subprocess
import sys

import pytest

import decapod_kernels


@pytest.mark.parametrize("package", ["decapod_kernels", "decapod_kernels.stickbreaking"])
def test_importing_the_package_loads_neither_torch_nor_triton(package: str) -> None:
    code = (
        f"import sys; before = set(sys.modules); import {package}\n"
        "new = {m.partition('.')[0] for m in set(sys.modules) - before}\n"
        "print(*new - set(sys.stdlib_module_names))"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.split()
    assert loaded == ["decapod_kernels"]


def test_the_package_exports_its_version_alone() -> None:
    assert decapod_kernels.__all__ == ["__version__"]
    assert decapod_kernels.__version__
