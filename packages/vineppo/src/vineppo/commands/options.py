"""The options of every command as dataclasses, from which the command line is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from vineppo.commands.output import say, show, speaks, tell

_Set = Annotated[
    tuple[str, ...], tyro.conf.arg(name="set", metavar="NAME=VALUE"), tyro.conf.UseAppendAction
]


@dataclass(frozen=True)
class Train:
    """Train as a recipe says."""

    config: Path
    """A recipe in YAML."""
    overrides: _Set = ()
    """Replaces a value of the recipe: --set training.learning_rate=1e-6. May come several times."""
    dry_run: bool = False
    """Check everything but the weights, print what the run will do, cost and need, and stop."""
    resume: bool = False
    """Go on from the newest checkpoint in the folder of the run."""

    def run(self) -> int:
        """Exit code."""
        from vineppo.commands.recipe import Recipe

        recipe = Recipe.read(self.config, self.overrides)
        if self.dry_run:
            from vineppo.commands.plan import plan_of, table

            show(table(plan_of(recipe)))
            return 0
        _quiet()
        from vineppo.commands.running import train

        found = train(recipe, tell, resume=self.resume)
        last = found["last"]
        say(
            f"{found['iterations']} iterations, {found['steps']} optimizer steps; reward "
            f"{found['first']['reward']:.3f} at first, {last['reward']:.3f} at the end; "
            f"{last['total_generated_tokens']:,.0f} tokens generated, "
            f"{last['total_seconds']:.0f} s"
        )
        if "evaluation" in found:
            say(f"reward of the evaluation: {found['evaluation']['eval_reward']:.3f}")
        say(recipe.output_dir)
        return 0


@dataclass(frozen=True)
class EvalValues:
    """Judge value estimates of a policy against many independent rollouts."""

    config: Path
    """The recipe that the policy was trained by, or will be: model, task, sampling."""
    overrides: _Set = ()
    """Replaces a value of the recipe, as with train."""
    checkpoint: Path | None = None
    """A checkpoint of the run; without one, the model that the recipe starts from."""
    critic: bool = False
    """Also judge the critic of the checkpoint, one of PPO."""
    k: tuple[int, ...] = (1, 3, 9)
    """Numbers of rollouts to judge."""
    truth_rollouts: int = 256
    """Rollouts behind each true value."""
    states: int = 128
    """States that are valued, at most."""
    prompts: int = 64
    """Prompts that they come from, at most."""
    answers: int = 2
    """Answers to each prompt, whose steps begin in these states."""
    alternatives: int = 32
    """States from which up to 5 next steps are ranked; 0 ranks none."""
    segmenter: str | None = None
    """What a step is; without it, as the recipe says for VinePPO, else newline."""
    data: Literal["evaluation", "train"] = "evaluation"
    """Rows that prompts come from; those of training where the recipe has no evaluation."""
    seed: int = 0
    """Of prompts, answers, truth and estimates."""
    out: Path = Path("values.json")
    """The report, in JSON."""
    plots: Path | None = None
    """A folder for figures."""
    plot_format: Literal["svg", "png"] = "svg"
    """Of the figures."""

    def run(self) -> int:
        """Exit code."""
        from vineppo.commands.recipe import Recipe
        from vineppo.commands.value_bench import ValueBench

        recipe = Recipe.read(self.config, self.overrides)
        bench = ValueBench(
            recipe, self.checkpoint, self.critic, self.k, self.truth_rollouts, self.states,
            self.prompts, self.answers, self.alternatives, self.segmenter, self.data, self.seed,
        )  # fmt: skip
        files = bench.files(self.out, self.plots, self.plot_format)
        _quiet()
        reports = bench.reports(tell)
        say(bench.text(reports))
        for path in files.write(bench, reports):
            say(path)
        return 0


@dataclass(frozen=True)
class Bench:
    """Compare gradient estimators exactly, on token trees; no model is needed."""

    config: Path | None = None
    """YAML with families, seeds, group, batches; without it, one tree of each family."""
    overrides: _Set = ()
    """Sets or replaces a value: --set seeds=3."""
    out: Path | None = None
    """A folder for results.json and figures."""

    def run(self) -> int:
        """Exit code."""
        from vineppo.commands import exact_bench

        bench = exact_bench.read(self.config, self.overrides)
        results = exact_bench.results(bench, self.out)
        for table in exact_bench.tables(results):
            show(table)
        return 0


Command = (
    Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[EvalValues, tyro.conf.subcommand("eval-values")]
    | Annotated[Bench, tyro.conf.subcommand("bench")]
)


def command_of(arguments: Sequence[str]) -> Train | EvalValues | Bench:
    """The command that the words stand for.

    Raises:
        SystemExit: after help, or where tyro refuses.
    """
    return tyro.cli(
        Command,
        prog="vineppo",
        description="Credit assignment for language models: train, judge values, compare exactly.",
        args=list(arguments),
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def _quiet() -> None:
    """No bars for every file that is read or written; they would hide that of the run."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    if not speaks():
        logging.set_verbosity_error()
