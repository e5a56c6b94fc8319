"""A benchmark's result as a file, with what is needed to judge and repeat it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from sbattn.writing import whole_file

PACKAGES = ("sbattn", "decapod-kernels", "torch", "triton", "fla-core")


def record(path: Path, result: dict[str, Any]) -> None:
    """Write `result` and its circumstances as JSON, replacing an older file in one step."""
    document = {**circumstances(), **result}
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write((json.dumps(document, indent=1) + "\n").encode())


def circumstances() -> dict[str, Any]:
    """Command, commit, machine and versions of this process."""
    command = [Path(sys.argv[0]).name, *sys.argv[1:]]
    return {
        "command": " ".join(command),
        "commit": _commit(),
        "machine": {
            "cpu": _cpu(),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "platform": platform.platform(),
        },
        "versions": {"python": platform.python_version(), **_versions()},
    }


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _commit() -> str | None:
    """Of the checkout that this file is in; with `+` where it was changed; None outside of one."""
    here = Path(__file__).parent
    git = ["git", "-C", str(here)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        changes = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True
        )
    except FileNotFoundError:
        return None
    if head.returncode:
        return None
    return head.stdout.strip() + ("+" if changes.stdout.strip() else "")


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()
