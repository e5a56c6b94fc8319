"""``vineppo train``: a run in a folder, with all that is needed to make it again.

=================  ================================================================================
``config.yaml``    the recipe with overrides and defaults; ``vineppo train --config`` takes it again
``run.json``       what the result depends on; command, commit, machine, versions of packages
``metrics.jsonl``  a line per log
``result.json``    when the run is done
``checkpoint-…``   of the trainer
``model``          the policy at the end, for ``from_pretrained``
=================  ================================================================================
"""

from __future__ import annotations

import json
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from transformers import TrainerCallback

from decapod.jsonl import FileInUseError
from decapod.runs import METRICS_FILE, RECORD_FILE, Run, RunExistsError
from decapod.writing import write_text
from vineppo import checkpoints
from vineppo.commands.building import Tell, build_trainer
from vineppo.commands.output import speaks
from vineppo.commands.recipe import Recipe
from vineppo.commands.yaml_text import text_of
from vineppo.errors import InvalidInputError

if TYPE_CHECKING:
    from vineppo.trainer import EpisodeTrainer

CONFIG: Final = "config.yaml"
RESULT: Final = "result.json"
MODEL: Final = "model"
_PACKAGES: Final = ("vineppo", "torch", "transformers", "accelerate", "peft", "vllm", "ray")


def train(recipe: Recipe, tell: Tell, *, resume: bool) -> dict[str, Any]:
    """Run a recipe in its folder.

    Args:
        recipe: as it was read.
        tell: called with what is done next.
        resume: go on from the newest checkpoint in the folder, or begin where there is none.

    Returns:
        What ``result.json`` holds.

    Raises:
        InvalidInputError: something does not fit, or the folder holds another run.
        KeyboardInterrupt: with what to do next.
        Exception: as :meth:`vineppo.trainer.EpisodeTrainer.train`.
    """
    recipe.check_parts()
    folder = recipe.output_dir
    done = _result_in(folder)
    if done is not None and resume:
        tell(f"{folder} is done already")
        return done
    _refuse_what_would_be_lost(folder, resume=resume)
    checkpoint = checkpoints.newest(folder) if resume else None
    if resume and checkpoint is None:
        tell(f"there is no checkpoint in {folder}; beginning")
    with ExitStack() as stack:
        trainer: EpisodeTrainer | None = None
        try:
            trainer = build_trainer(recipe, tell, stack)
            # From here on something is written: everything that can be refused was.
            if speaks():
                run = stack.enter_context(_record(recipe))
                write_text(folder / CONFIG, text_of(recipe.content()))
                trainer.add_callback(_Log(run))
            return _trained(recipe, trainer, checkpoint, tell)
        except KeyboardInterrupt as error:
            raise KeyboardInterrupt(_how_to_go_on(folder, trainer)) from error


class _Log(TrainerCallback):
    """What the trainer logs, into the record."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:  # noqa: ARG002 - transformers' names
        self._run.log(logs or {}, step=state.global_step)


def _trained(
    recipe: Recipe, trainer: EpisodeTrainer, checkpoint: Path | None, tell: Tell
) -> dict[str, Any]:
    config, folder = recipe.training, recipe.output_dir
    on = "" if checkpoint is None else f", on from {checkpoint.name}"
    tell(f"{recipe.method}, {config.iterations} iterations{on}")
    started = time.perf_counter()
    outcome = trainer.train(None if checkpoint is None else checkpoint)
    seconds = time.perf_counter() - started
    found: dict[str, Any] = {
        "method": recipe.method,
        "iterations": outcome.iterations,
        "steps": outcome.steps,
        "seconds": round(seconds, 3),
        "first": outcome.history[0],
        "last": outcome.history[-1],
    }
    if recipe.evaluation is not None:
        found["evaluation"] = _evaluated(trainer, outcome.iterations, tell)
    trainer.save_model(folder / MODEL)
    if speaks():
        write_text(folder / RESULT, json.dumps(found, indent=1) + "\n")
    return found


def _evaluated(trainer: EpisodeTrainer, iterations: int, tell: Tell) -> dict[str, float]:
    every = trainer.args.eval_every
    logged = [log for log in trainer.state.log_history if "eval_reward" in log]
    if every and iterations % every == 0 and logged and logged[-1]["epoch"] == iterations:
        return {name: v for name, v in logged[-1].items() if name.startswith("eval_")}
    tell("evaluating")
    return trainer.evaluate()


def _result_in(folder: Path) -> dict[str, Any] | None:
    path = folder / RESULT
    if not path.is_file():
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidInputError(
            f"training.output_dir: {path} is damaged ({error}); remove it to go on"
        ) from error
    return found


def _refuse_what_would_be_lost(folder: Path, *, resume: bool) -> None:
    """Refuse a folder that holds something else, or a run that would be begun again.

    A run that was stopped before its first checkpoint holds nothing to go on from, so the same
    command begins it again.
    """
    if folder.exists() and not folder.is_dir():
        raise InvalidInputError(f"training.output_dir: expected a folder, got the file {folder}")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    elsewhere = "name another one by --set training.output_dir=..."
    if not _is_run(folder):
        raise InvalidInputError(
            f"training.output_dir: expected an empty folder or that of a run, but {folder} holds "
            f"other files; {elsewhere}"
        )
    if resume:
        return
    if (folder / RESULT).is_file():
        raise InvalidInputError(
            f"training.output_dir: {folder} holds a run that is done; {elsewhere}"
        )
    if checkpoints.newest(folder) is not None:
        raise InvalidInputError(
            f"training.output_dir: {folder} holds a run with checkpoints; go on with it by "
            f"--resume, or {elsewhere}"
        )


def _record(recipe: Recipe) -> Run:
    folder = recipe.output_dir

    def opened() -> Run:
        return Run.create(
            folder,
            config=recipe.identity(),
            seed=recipe.training.seed,
            packages=_PACKAGES,
            resume=_is_run(folder),
        )

    try:
        try:
            return opened()
        except ValueError:
            # Of other settings, and no other process writes it. Where nothing was measured, nothing
            # is lost: the first batch may have shown that a setting did not fit.
            if (folder / METRICS_FILE).stat().st_size or checkpoints.newest(folder) is not None:
                raise
            (folder / RECORD_FILE).unlink()
            return opened()
    except (RunExistsError, ValueError, FileInUseError) as error:
        raise InvalidInputError(f"training.output_dir: {error}") from error


def _is_run(folder: Path) -> bool:
    return (folder / RECORD_FILE).is_file() or (folder / METRICS_FILE).is_file()


def _how_to_go_on(folder: Path, trainer: EpisodeTrainer | None) -> str:
    checkpoint = checkpoints.newest(folder)
    where = "" if trainer is None else f" after iteration {len(trainer.history)}"
    if checkpoint is None:
        return f"interrupted{where}, before the first checkpoint; the same command begins again"
    return f"interrupted{where}; the same command with --resume goes on from {checkpoint}"
