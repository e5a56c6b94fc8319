"""The command `asyncrlhf`.

Exit codes: 0 if all went well, 1 if a run failed, 2 if what was asked for cannot be done, 130 after
Ctrl-C.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from asyncrlhf.errors import (
    ActorError,
    InvalidInputError,
    MissingExtraError,
    RewardError,
    WaitTimeoutError,
    WeightUpdateError,
)

_FAILED, _USAGE, _INTERRUPTED = 1, 2, 130
_EXTRAS = {
    **dict.fromkeys(("rich", "tyro", "yaml"), "cli"),
    **dict.fromkeys(("accelerate", "decapod", "safetensors", "transformers"), "train"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    for stream in (sys.stdout, sys.stderr):
        # A console that lacks a sign such as × shows a placeholder instead of stopping the run.
        getattr(stream, "reconfigure", lambda **_: None)(errors="replace")
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        from asyncrlhf.commands.options import parsed

        return parsed(arguments).run()
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRAS:
            raise
        return _complain(MissingExtraError(package, _EXTRAS[package]), _USAGE)
    except (InvalidInputError, MissingExtraError) as error:
        return _complain(error, _USAGE)
    except KeyboardInterrupt as error:
        return _complain(error, _INTERRUPTED)
    except _failures() as error:
        if "ASYNCRLHF_TRACEBACK" in os.environ:
            raise
        return _complain(error, _FAILED)


def _failures() -> tuple[type[Exception], ...]:
    """What a run may end by that is no mistake of this library."""
    known: list[type[Exception]] = [ActorError, RewardError, WaitTimeoutError, WeightUpdateError]
    known += [FloatingPointError, OSError]
    if engine := sys.modules.get("decapod.lm.engine"):
        known += [engine.EngineError, engine.RequestError]
    if jobs := sys.modules.get("decapod.jobs.running"):
        known.append(jobs.JobsFailedError)
    return tuple(known)


def _complain(error: BaseException, code: int) -> int:
    # Notes say where it happened; those of several lines are traces from other processes.
    notes = [note for note in getattr(error, "__notes__", ()) if "\n" not in note]
    text = str(error) or ("interrupted" if code == _INTERRUPTED else type(error).__name__)
    said = f"{text} ({'; '.join(notes)})" if notes else text
    print(f"asyncrlhf: {said}", file=sys.stderr)
    if code == _FAILED:
        print("asyncrlhf: ASYNCRLHF_TRACEBACK=1 shows where it was raised.", file=sys.stderr)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
