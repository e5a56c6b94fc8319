"""Each wheel, as installed: what it imports is what it declares, and never a sibling."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, packages_distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from conftest import ours

HEAVY = (
    *("torch", "triton", "transformers", "vllm", "matplotlib", "ray"),
    *("pandas", "polars", "pyarrow", "gymnasium", "optuna"),
)


def modules(distribution: Distribution) -> list[Path]:
    return [
        Path(str(distribution.locate_file(file)))
        for file in distribution.files or []
        if file.suffix == ".py"
    ]


def import_name(distribution: Distribution) -> str:
    (name,) = {file.parts[0] for file in distribution.files or [] if file.name == "py.typed"}
    return name


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Top-level names that a module imports, and whether that happens as soon as it is imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    lazy = {
        id(node)
        for outer in ast.walk(tree)
        if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef)
        or (isinstance(outer, ast.If) and "TYPE_CHECKING" in ast.unparse(outer.test))
        for node in ast.walk(outer)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [node.module]
        else:
            continue
        for name in names:
            yield name.split(".")[0], id(node) not in lazy


def declared(distribution: Distribution, *, with_extras: bool) -> set[str]:
    requirements = map(Requirement, distribution.requires or [])
    return {
        canonicalize_name(r.name)
        for r in requirements
        if with_extras or "extra" not in str(r.marker or "")
    }


def test_modules_come_from_site_packages_and_not_from_the_checkout(
    distribution: Distribution,
) -> None:
    for path in modules(distribution):
        assert "site-packages" in path.parts, path
    assert "direct_url.json" not in {f.name for f in distribution.files or []} or (
        '"editable"' not in (distribution.read_text("direct_url.json") or "")
    )


def test_every_import_is_a_declared_dependency(distribution: Distribution) -> None:
    providers = packages_distributions()
    own = import_name(distribution)
    allowed = declared(distribution, with_extras=True)
    undeclared = {
        f"{path.name}: {name}"
        for path in modules(distribution)
        for name, _ in imports(path)
        if name not in {*sys.stdlib_module_names, own, "_typeshed"}
        and not {canonicalize_name(p) for p in providers.get(name, [name])} & allowed
    }
    assert undeclared == set()


def test_what_the_top_level_import_loads_is_declared_without_any_extra(
    distribution: Distribution,
) -> None:
    own = import_name(distribution)
    code = f"import sys, {own}; print(*{{m.partition('.')[0] for m in list(sys.modules)}})"
    loaded = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.split()
    siblings = {import_name(d) for d in ours()} - {own}
    assert not siblings & set(loaded)
    assert not set(HEAVY) & set(loaded)


def test_libraries_never_name_one_another(distribution: Distribution) -> None:
    shared = {"decapod", "decapod-kernels"}
    names = {canonicalize_name(d.metadata["Name"]) for d in ours()} - shared
    others = names - {canonicalize_name(distribution.metadata["Name"])}
    assert not declared(distribution, with_extras=True) & others


def test_the_common_package_is_never_a_required_dependency(distribution: Distribution) -> None:
    assert "decapod" not in declared(distribution, with_extras=False)


def test_wheels_carry_types_licence_and_nothing_of_the_tests(distribution: Distribution) -> None:
    files = [file.as_posix() for file in distribution.files or []]
    assert any(file.endswith("/py.typed") for file in files)
    assert any("licenses/LICENSE" in file for file in files)
    assert not any(file.startswith("tests/") or "/tests/" in file for file in files)
