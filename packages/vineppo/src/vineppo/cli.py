"""The command ``vineppo``: train, eval-values, bench.

Exit codes: 0 when all went well, 1 when a run failed, 2 when what was asked for cannot be done, 130
after Ctrl-C.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from vineppo.errors import InvalidInputError, MissingExtraError, NotFiniteError, RewardError

_FAILED, _REFUSED, _INTERRUPTED = 1, 2, 130
_TRACEBACK = "VINEPPO_TRACEBACK"
_EXTRA_OF = {
    "rich": "cli", "tyro": "cli", "yaml": "cli",
    "accelerate": "train", "decapod": "train", "safetensors": "train", "transformers": "train",
    "httpx": "train", "matplotlib": "experiments", "peft": "peft", "ray": "ray", "vllm": "vllm",
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: words behind the command's name; None takes those of this process.

    Returns:
        The exit code.
    """
    for stream in (sys.stdout, sys.stderr):
        # Where a terminal lacks a sign such as ×, another is shown and the run goes on.
        getattr(stream, "reconfigure", lambda **_: None)(errors="replace")
    try:
        from vineppo.commands.options import command_of

        return command_of(sys.argv[1:] if argv is None else argv).run()
    except SystemExit as error:  # help, or words that tyro refuses and has told about
        return error.code if isinstance(error.code, int) else _REFUSED
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRA_OF:
            raise
        return _tell(MissingExtraError(package, _EXTRA_OF[package]), _REFUSED)
    except (InvalidInputError, MissingExtraError) as error:
        return _tell(error, _REFUSED)
    except KeyboardInterrupt as error:
        return _tell(error, _INTERRUPTED)
    except _failures() as error:
        if os.environ.get(_TRACEBACK):
            raise
        return _tell(error, _FAILED)


def _failures() -> tuple[type[Exception], ...]:
    """What may end a run without a mistake in this library; of modules that were imported."""
    found: list[type[Exception]] = [RewardError, NotFiniteError, OSError]
    for module, names in (
        ("decapod.lm.engine", ("EngineError", "RequestError")),
        ("torch", ("OutOfMemoryError",)),
    ):
        if (loaded := sys.modules.get(module)) is not None:
            found += [getattr(loaded, name) for name in names if hasattr(loaded, name)]
    return tuple(found)


def _tell(error: BaseException, code: int) -> int:
    text = str(error) or ("interrupted" if code == _INTERRUPTED else type(error).__name__)
    print(f"vineppo: {' '.join(text.split())}", file=sys.stderr)
    if code == _FAILED:
        print(f"vineppo: {_TRACEBACK}=1 shows where it was raised", file=sys.stderr)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
