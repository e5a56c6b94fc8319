"""`asyncrlhf train`: a run in a folder, with everything that is needed to make it again."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from transformers import TrainerCallback

from asyncrlhf import checkpoints
from asyncrlhf.commands import run_folder
from asyncrlhf.commands.building import Built, Tell, build
from asyncrlhf.commands.recipe import Recipe
from asyncrlhf.commands.yaml_text import written
from asyncrlhf.errors import InvalidInputError
from asyncrlhf.learner import reference_model
from asyncrlhf.writing import whole_file
from decapod.jsonl import FileInUseError
from decapod.runs import Run, RunExistsError

if TYPE_CHECKING:
    from asyncrlhf.config import AsyncRLHFConfig

_PACKAGES: Final = ("asyncrlhf", "torch", "transformers", "accelerate", "datasets", "peft", "vllm")


def train(recipe: Recipe, *, resume: bool = False, tell: Tell = lambda _: None) -> dict[str, Any]:
    """Run a recipe in its folder.

    Args:
        recipe: as it was read.
        resume: go on in a folder that holds a part of this run, from its newest checkpoint, or from
            the beginning where there is none. A run that is done is not repeated.
        tell: called with what is done next.

    Returns:
        What ``result.json`` holds.

    Raises:
        InvalidInputError: the recipe does not fit, or the folder holds another run.
        KeyboardInterrupt: with what to do next.
        Exception: as :meth:`asyncrlhf.AsyncRLHFTrainer.train`.
    """
    args = recipe.settings()
    recipe.check_parts()
    if args.world_size != recipe.processes:
        raise InvalidInputError(
            f"processes: the recipe is for {recipe.processes}, and this run has {args.world_size}; "
            f"start it with `accelerate launch --num_processes {recipe.processes} -m asyncrlhf "
            f"train ...`, or give --processes {args.world_size}, which changes the batch"
        )
    folder = recipe.output_dir
    finished = run_folder.read(folder / run_folder.RESULT)
    if finished is not None and resume:
        tell(f"{folder} is done")
        found: dict[str, Any] = finished
        return found
    main = args.process_index == 0
    with _record(recipe, args, resume=resume) if main else nullcontext() as run:
        built = build(recipe, args, tell)
        if main:
            with whole_file(folder / run_folder.RECIPE) as file:
                file.write(written(recipe.content()).encode())
        return _run(built, args, folder, run, resume=resume, tell=tell)


class _Log(TrainerCallback):
    """What the trainer logs, into the record; and times, whenever there is a checkpoint."""

    def __init__(self, run: Run, save: Callable[[], None]) -> None:
        self._run = run
        self._save = save

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:  # noqa: ARG002 - transformers' names
        self._run.log(logs or {}, step=state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002 - transformers' names
        self._save()


def _record(recipe: Recipe, args: AsyncRLHFConfig, *, resume: bool) -> Run:
    folder = recipe.output_dir
    try:
        return Run.create(
            folder, config=recipe.identity(), seed=args.seed, packages=_PACKAGES, resume=resume
        )
    except RunExistsError as error:
        remedy = "name an empty one by --output_dir"
        if (folder / run_folder.METRICS).is_file() and not resume:
            remedy = f"go on with it by --resume, or {remedy}"
        raise InvalidInputError(f"args.output_dir: {folder} is not empty; {remedy}") from error
    except (ValueError, FileInUseError) as error:
        raise InvalidInputError(f"args.output_dir: {error}") from error


def _run(
    built: Built, args: AsyncRLHFConfig, folder: Path, run: Run | None, *, resume: bool, tell: Tell
) -> dict[str, Any]:
    trainer = built.trainer
    before = (run_folder.read(folder / run_folder.TIMING) or {"attempts": []})["attempts"]

    def save_times() -> None:
        if run is not None and trainer.report().times:
            attempts = [*before, run_folder.attempt_of(trainer.report())]
            run_folder.write(folder / run_folder.TIMING, {"attempts": attempts})

    if run is not None:
        trainer.add_callback(_Log(run, save_times))
    checkpoint = checkpoints.newest(folder) if resume else None
    tell(
        f"training: {trainer.rounds} rounds"
        + (f", on from {checkpoint.name}" if checkpoint is not None else "")
    )
    started = time.perf_counter()
    try:
        output = trainer.train(None if checkpoint is None else str(checkpoint))
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(_how_to_go_on(folder, trainer.state.global_step)) from error
    finally:
        save_times()
    seconds = time.perf_counter() - started
    tell("evaluating")
    found = {
        "steps": trainer.state.global_step,
        "train_loss": output.training_loss,
        "train_seconds": seconds,
        **_evaluated(built, args),
    }
    if run is not None:
        trainer.save_model(str(folder / run_folder.MODEL))
        run_folder.write(folder / run_folder.RESULT, found)
    return found


def _evaluated(built: Built, args: AsyncRLHFConfig) -> dict[str, Any]:
    """What the policy scores at the end; on every process alike, so that none waits for another."""
    trainer, task = built.trainer, built.synthetic
    if task is None:
        return {} if built.eval_rows is None else {"policy": trainer.evaluate()}
    from asyncrlhf.evaluate import evaluate_policy, sample

    assert built.eval_rows is not None
    prompts = [row["prompt_ids"] for row in built.eval_rows]
    drawn: Mapping[str, Any] = {
        "max_new_tokens": args.max_completion_length,
        "temperature": args.temperature,
        "seed": args.seed,
    }
    with reference_model(trainer.model, trainer.ref_model) as reference:
        samples = sample(reference, prompts, **drawn)
    policy = evaluate_policy(
        trainer.model, trainer.ref_model, task.gold_score, prompts, **drawn,
        reference_samples=samples,
    )  # fmt: skip
    gold = task.gold_score(samples.prompt_ids, samples.completion_ids)
    return {"policy": policy, "reference": {"gold": float(gold.mean())}}


def _how_to_go_on(folder: Path, step: int) -> str:
    checkpoint = checkpoints.newest(folder)
    told = f"interrupted after step {step}; the same command with --resume "
    if checkpoint is None:
        return told + "begins again, because no checkpoint was written yet (args.save_steps)"
    return told + f"goes on from {os.fspath(checkpoint)}"
