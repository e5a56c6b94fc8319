"""The options of every command as dataclasses, from which the command line is made."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.table import Table

from asyncrlhf.commands.output import say, show, tell
from asyncrlhf.errors import InvalidInputError

_File = tyro.conf.Positional[Path]
_FAILED = 1
_SHOWN = ("gold", "kl", "win_rate", "eval_reward", "eval_kl", "length", "train_seconds")


@dataclass(frozen=True)
class Train:
    """Train as a recipe says.

    Every key of the recipe can be replaced by --section.key VALUE, and those of its section args by
    --key VALUE: --engine.placement inline --learning_rate 1e-5.
    """

    recipe: _File
    """A YAML file."""
    dry_run: bool = False
    """Check everything but the weights, print the plan, and stop; needs no GPU and no network."""
    resume: bool = False
    """Go on in a folder that holds a part of this run."""

    def run(self, overrides: Sequence[tuple[str, str]]) -> int:
        """Exit code."""
        from asyncrlhf.commands.recipe import Recipe

        recipe = Recipe.read(self.recipe, overrides)
        if self.dry_run:
            _print_plan(recipe)
            return 0
        from transformers.utils.logging import disable_progress_bar

        from asyncrlhf.commands.reporting import write_report
        from asyncrlhf.commands.running import train

        # Bars for every file that is read or written would hide the one of the run.
        disable_progress_bar()
        speaks = os.environ.get("RANK", "0") == "0"
        train(recipe, resume=self.resume, tell=tell if speaks else lambda _: None)
        if speaks:
            say(write_report(recipe.output_dir))
            say(recipe.output_dir)
        return 0


@dataclass(frozen=True)
class Sweep:
    """Train all combinations of some values; the same command again runs what is missing.

    Other keys of the recipe can be replaced as with train.
    """

    recipe: _File
    """A YAML file."""
    over: tuple[str, ...]
    """Keys with values: loss=online_dpo,proximal_rloo minibatches_per_round=1,4 seed=0,1,2."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("runs/sweep")
    """A folder; every run has its own in it."""
    jobs: int = 1
    """Runs at the same time. Each has a learner and, with placement process, an actor."""

    def run(self, overrides: Sequence[tuple[str, str]]) -> int:
        """Exit code."""
        from asyncrlhf.commands import sweeping
        from asyncrlhf.commands.recipe import expanded, override
        from asyncrlhf.commands.yaml_text import read_mapping

        if self.jobs < 1:
            raise InvalidInputError(f"jobs: expected at least 1, got {self.jobs}")
        if not self.recipe.is_file():
            raise InvalidInputError(f"recipe: expected a YAML file, got {self.recipe}")
        content = expanded(read_mapping(self.recipe.read_text(encoding="utf-8"), str(self.recipe)))
        for name, text in overrides:
            content = override(content, name, text)
        grid = sweeping.axes(self.over)
        wanted = sweeping.cells(content, grid, self.out)
        rows, failed = sweeping.sweep(wanted, self.out, jobs=self.jobs)
        show(_results(rows, list(grid)))
        say(self.out / sweeping.RESULTS)
        for line in failed:
            tell(f"failed: {line}")
        return _FAILED if failed else 0


@dataclass(frozen=True)
class Simulate:
    """Predict how long rounds take, who waits, and what running ahead gains."""

    g: float
    """Seconds to generate a round."""
    t: float
    """Seconds to train on it, all epochs."""
    r: float = 0.0
    """Seconds to score it."""
    w: float = 0.0
    """Seconds of the learner to publish the weights."""
    ahead: tuple[int, ...] = (1,)
    """D, rounds that generation may run ahead; several are compared. 0 always is."""
    rounds: int = 256
    """Rounds of the run."""
    minibatches: int = 1
    """N, in a round."""
    epochs: int = 1
    """T, over a round."""
    stages: Literal["learner", "process"] = "learner"
    """Who scores: the learner, or a process of its own."""
    svg: Path | None = None
    """Also draw the first rounds into this file."""
    draw: int = 6
    """Rounds that are drawn."""

    def run(self, overrides: Sequence[tuple[str, str]]) -> int:
        """Exit code."""
        from asyncrlhf.commands import simulation

        _refuse(overrides, self)
        found = simulation.timelines(
            g=self.g,
            r=self.r,
            t=self.t,
            w=self.w,
            ahead=self.ahead,
            rounds=self.rounds,
            minibatches=self.minibatches,
            epochs=self.epochs,
            stages=self.stages,
        )
        show(simulation.table(found))
        if self.svg is not None:
            simulation.write_svg(self.svg, simulation.picture(found, self.draw))
            say(self.svg)
        return 0


@dataclass(frozen=True)
class Report:
    """Say what a run did: result, times against the prediction, staleness, learning curves."""

    folder: _File
    """Of a run, done or not; report.md and timeline.svg are written into it."""

    def run(self, overrides: Sequence[tuple[str, str]]) -> int:
        """Exit code."""
        from asyncrlhf.commands.reporting import TEXT, write_report

        _refuse(overrides, self)
        say(write_report(self.folder))
        say(self.folder / TEXT)
        return 0


Command = (
    Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Sweep, tyro.conf.subcommand("sweep")]
    | Annotated[Simulate, tyro.conf.subcommand("simulate")]
    | Annotated[Report, tyro.conf.subcommand("report")]
)


@dataclass(frozen=True)
class Parsed:
    """A command, and the options that are keys of its recipe."""

    command: Train | Sweep | Simulate | Report
    overrides: tuple[tuple[str, str], ...]

    def run(self) -> int:
        """Exit code."""
        return self.command.run(self.overrides)


def parsed(arguments: Sequence[str]) -> Parsed:
    """The command that the words stand for.

    Raises:
        InvalidInputError: a word that belongs to no option.
        SystemExit: after help, or where tyro refuses.
    """
    command, rest = tyro.cli(
        Command,
        prog="asyncrlhf",
        description="Asynchronous RLHF: train, compare, predict, report.",
        args=list(arguments),
        return_unknown_args=True,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    return Parsed(command, tuple(_pairs(rest)))


def _pairs(words: Sequence[str]) -> list[tuple[str, str]]:
    found = []
    left = list(words)
    while left:
        word = left.pop(0)
        name, sign, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not name or not (sign or left):
            raise InvalidInputError(f"{word!r}: expected --key VALUE")
        found.append((name, value if sign else left.pop(0)))
    return found


def _refuse(overrides: Sequence[tuple[str, str]], command: Any) -> None:
    for name, _ in overrides:
        known = [field.replace("_", "-") for field in type(command).__dataclass_fields__]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean --{near[0]}?" if near else ""
        raise InvalidInputError(f"--{name}: there is no such option{hint}")


def _print_plan(recipe: Any) -> None:
    from asyncrlhf.commands import plan, simulation

    found = plan.plan(recipe)
    show(plan.table(found))
    pilot = recipe.timing is not None
    show(simulation.table(found.timelines(), "s" if pilot else "g"))
    if not pilot:
        say(
            "No pilot: as if generating and training on a round took equally long, and scoring and "
            "publishing no time. `asyncrlhf report` of a short run has the seconds for `timing`."
        )


def _results(rows: Sequence[dict[str, Any]], keys: Sequence[str]) -> Table:
    shown = Table()
    columns = [*keys, *(name for name in _SHOWN if any(name in row for row in rows))]
    for name in columns:
        shown.add_column(name, justify="left" if name in keys else "right")
    for row in rows:
        shown.add_row(
            *(
                f"{value:.4g}" if isinstance(value := row.get(name, ""), float) else str(value)
                for name in columns
            )
        )
    return shown
