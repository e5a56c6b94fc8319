"""Read `nox --list --json`, print the test sessions of packages that changed since a commit.

A change outside `packages/` and `kernels/` touches every package; so does `decapod`, which all
extras build on. `kernels/` touches those that call the kernels, too.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import PurePosixPath


def touched_packages(paths: list[str]) -> set[str] | None:
    """Import names of the packages that hold `paths`; None stands for all."""
    names = set()
    for path in map(PurePosixPath, paths):
        if path.parts[0] == "kernels":
            names |= {"decapod_kernels", "sbattn"}
        elif path.parts[0] != "packages" or path.parts[1] == "decapod":
            return None
        else:
            names.add(path.parts[1].replace("-", "_"))
    return names or None


def main(base: str) -> None:
    """Print `tests=[…]`, the line that a workflow takes as an output."""
    sessions = [entry for entry in json.load(sys.stdin) if entry["name"] == "tests"]
    diff = subprocess.run(
        ["git", "diff", "--name-only", base, "HEAD"], capture_output=True, text=True, check=False
    )
    # A first push has no base to compare with: test everything.
    names = touched_packages(diff.stdout.split()) if diff.returncode == 0 else None
    chosen = [
        entry["session"]
        for entry in sessions
        if names is None or any(f"({name})" in entry["session"] for name in names)
    ]
    sys.stdout.write(f"tests={json.dumps(chosen)}\n")


if __name__ == "__main__":
    main(sys.argv[1])
