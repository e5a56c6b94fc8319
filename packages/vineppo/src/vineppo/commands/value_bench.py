"""``vineppo eval-values``: Monte-Carlo values, critic and group mean against a truth."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from vineppo.backend import RolloutBackend
from vineppo.borders import token_borders
from vineppo.commands.building import Tell, load_model
from vineppo.commands.data import evaluation_rows, rewards_of, train_rows
from vineppo.commands.exact_bench import require_matplotlib
from vineppo.commands.recipe import Recipe
from vineppo.config import VinePPOConfig
from vineppo.dataset import Prompts
from vineppo.diagnostics import (
    Candidates,
    Predictor,
    StateSample,
    ValueReport,
    alternatives,
    collect_states,
    comparison_table,
    evaluate_values,
    ground_truth,
    states_of,
)
from vineppo.diagnostics.truth import stream_seed
from vineppo.episodes import Episode, State
from vineppo.errors import InvalidInputError, at_least
from vineppo.rewards import RewardSuite
from vineppo.segmenters import make_segmenter
from vineppo.values import (
    ConstantValueEstimator,
    GroupMeanValueEstimator,
    MonteCarloValueEstimator,
    state_seed,
)

if TYPE_CHECKING:
    from decapod.lm import SamplingParams

_CHOICES = 5  # next steps that are ranked, in Sec. 7 of arXiv 2410.01679
_CONSTANT = 0.5


@dataclass(frozen=True)
class ValueBench:
    """An evaluation of values; the attributes are the options of the command.

    Raises:
        InvalidInputError: one that does not fit.
    """

    recipe: Recipe
    checkpoint: Path | None
    critic: bool
    k: tuple[int, ...]
    truth_rollouts: int
    states: int
    prompts: int
    answers: int
    alternatives: int
    segmenter: str | None
    data: Literal["evaluation", "train"]
    seed: int

    def __post_init__(self) -> None:
        for name, least in (
            ("truth_rollouts", 2), ("states", 1), ("prompts", 1), ("answers", 1),
            ("alternatives", 0), ("seed", 0),
        ):  # fmt: skip
            at_least(f"--{name.replace('_', '-')}", getattr(self, name), least)
        for k in self.k:
            at_least("--k", k, 1)
        if self.checkpoint is not None and not (self.checkpoint / "vineppo.json").is_file():
            raise InvalidInputError(
                f"--checkpoint: expected a folder checkpoint-N of a run, got {self.checkpoint}"
            )
        if self.critic and self.checkpoint is None:
            raise InvalidInputError(
                "--critic: expected --checkpoint with it, the folder that holds the critic"
            )
        if not self.k and not self.critic:
            raise InvalidInputError("--k: expected at least one number, or --critic")
        self._segmenter()
        self.recipe.check_parts()

    # --- what is found out ------------------------------------------------------------------------

    def reports(self, tell: Tell) -> dict[str, ValueReport]:
        """Judge all value functions.

        Args:
            tell: called with what is done next.

        Raises:
            InvalidInputError: something cannot be loaded, or no state is found.
            RewardError: a reward function failed.
        """
        with ExitStack() as stack:
            return self._reports(tell, stack)

    def text(self, reports: Mapping[str, ValueReport]) -> str:
        """The comparison and every report, for people."""
        return "\n\n".join([comparison_table(reports), *map(str, reports.values())])

    def files(self, out: Path, plots: Path | None, form: str) -> Files:
        """What will be written, checked before any work.

        Raises:
            InvalidInputError: a folder that is none.
            MissingExtraError: figures need matplotlib.
        """
        if out.is_dir() or not out.absolute().parent.is_dir():
            raise InvalidInputError(f"--out: expected a file in a folder that exists, got {out}")
        if plots is not None:
            if plots.exists() and not plots.is_dir():
                raise InvalidInputError(f"--plots: expected a folder, got the file {plots}")
            require_matplotlib()
        return Files(out, plots, form)

    def _reports(self, tell: Tell, stack: ExitStack) -> dict[str, ValueReport]:
        import torch

        config = self.recipe.training
        rows = self._rows()
        model, tokenizer = self._model(tell)
        on_gpu = torch.cuda.is_available() and not config.use_cpu
        backend = self._backend(model, tokenizer, stack, on_gpu=on_gpu)
        positions = getattr(
            model.config.get_text_config(decoder=True), "max_position_embeddings", None
        )
        prompts = Prompts("task", rows, tokenizer, positions, config.max_response_tokens)
        reward = RewardSuite(
            rewards_of(self.recipe), prompts, tokenizer, config.reward_weights,
            config.unfinished_score,
        )  # fmt: skip
        params = self._params(model, tokenizer)
        autocast = (
            torch.autocast("cuda" if on_gpu else "cpu", dtype=torch.bfloat16)
            if config.mixed_precision == "bf16"
            else nullcontext()
        )
        with autocast:
            return self._judged(model, tokenizer, backend, prompts, reward, params, tell)

    def _judged(
        self,
        model: Any,
        tokenizer: Any,
        backend: RolloutBackend,
        prompts: Prompts,
        reward: RewardSuite,
        params: SamplingParams,
        tell: Tell,
    ) -> dict[str, ValueReport]:
        most = self.recipe.training.max_response_tokens
        segmenter = self._segmenter()

        def borders(ids: Sequence[int]) -> list[int]:
            return token_borders(segmenter, ids, tokenizer)

        tell(f"sampling {self.answers} answers to each of {len(prompts)} prompts")
        episodes = self._episodes(backend, prompts, params)
        scores = reward(episodes)
        sample = collect_states(episodes, borders, limit=self.states, seed=self.seed)
        tell(f"true values of {len(sample)} states, by {self.truth_rollouts} rollouts each")
        truth = ground_truth(
            backend, reward, sample.states, self.truth_rollouts, self.seed, params=params,
            max_response_tokens=most,
        )  # fmt: skip
        candidates = self._candidates(backend, reward, sample, borders, params, tell)
        predictors: dict[str, Predictor] = {
            f"K = {k}": MonteCarloValueEstimator(
                backend, reward, k, params=params, max_response_tokens=most
            )
            for k in self.k
        }
        if self.critic:
            from vineppo.commands.critic import critic_of

            assert self.checkpoint is not None
            batch = self.recipe.training.micro_batch_size
            predictors["critic"] = critic_of(self.checkpoint, model, batch)
        by_row = {
            row: float(np.mean([s for e, s in zip(episodes, scores, strict=True) if e.row == row]))
            for row in range(len(prompts))
        }
        predictors["group mean"] = GroupMeanValueEstimator(by_row)
        predictors[f"constant {_CONSTANT:g}"] = ConstantValueEstimator(_CONSTANT)
        tell(f"values by {', '.join(predictors)}")
        return evaluate_values(
            predictors, sample.states, truth, sample.positions, sample.clusters,
            candidates=candidates, seed=self.seed,
        )  # fmt: skip

    def _candidates(
        self,
        backend: RolloutBackend,
        reward: RewardSuite,
        sample: StateSample,
        borders: Any,
        params: SamplingParams,
        tell: Tell,
    ) -> Candidates | None:
        if not self.alternatives:
            return None
        origins = list(dict.fromkeys(sample.states))
        rng = np.random.default_rng(stream_seed("origins", self.seed))
        chosen = [origins[i] for i in np.sort(rng.permutation(len(origins))[: self.alternatives])]
        most = self.recipe.training.max_response_tokens
        sets = alternatives(
            backend, chosen, borders, _CHOICES, self.seed, params=params, max_response_tokens=most
        )
        if not sets:
            tell("no state has two different next steps, so none are ranked")
            return None
        states = states_of(sets)
        tell(f"true values of {len(states)} next steps from {len(sets)} states")
        truth = ground_truth(
            backend, reward, states, self.truth_rollouts, self.seed, params=params,
            max_response_tokens=most,
        )  # fmt: skip
        return Candidates(sets, truth)

    def _episodes(
        self, backend: RolloutBackend, prompts: Prompts, params: SamplingParams
    ) -> list[Episode]:
        root = stream_seed("episodes", self.seed)
        states = [State(row, ids, ()) for row, ids in enumerate(prompts.ids)]
        seeds = [state_seed(root, state, "episodes") for state in states]
        found = backend.generate(prompts.ids, self.answers, params, seeds)
        return [
            Episode(state.row, state.prompt_ids, rollout.token_ids, rollout.finished)
            for state, rollouts in zip(states, found, strict=True)
            for rollout in rollouts
        ]

    # --- its parts --------------------------------------------------------------------------------

    def _segmenter(self) -> Any:
        config = self.recipe.training
        default = config.segmenter if isinstance(config, VinePPOConfig) else "newline"
        try:
            return make_segmenter(self.segmenter or default)
        except InvalidInputError as error:
            raise InvalidInputError(f"--{error}") from error

    def _rows(self) -> list[dict[str, Any]]:
        wanted = self.recipe.evaluation
        if self.data == "train" or wanted is None:
            rows = train_rows(self.recipe)
        else:
            rows = evaluation_rows(self.recipe, wanted)
        rng = np.random.default_rng(stream_seed("prompts", self.seed))
        return [rows[i] for i in np.sort(rng.permutation(len(rows))[: self.prompts])]

    def _model(self, tell: Tell) -> tuple[Any, Any]:
        recipe, checkpoint = self.recipe, self.checkpoint
        if checkpoint is None:
            return load_model(recipe, tell)
        if not (checkpoint / "adapter_config.json").is_file():
            return load_model(recipe.with_model(checkpoint), tell)
        from peft import PeftModel

        model, tokenizer = load_model(recipe, tell)
        return PeftModel.from_pretrained(model, checkpoint), tokenizer

    def _backend(
        self, model: Any, tokenizer: Any, stack: ExitStack, *, on_gpu: bool
    ) -> RolloutBackend:
        from vineppo.commands.backends import build_backend, set_limits
        from vineppo.policy import eos_token_ids, without_dropout
        from vineppo.rollout import TransformersBackend

        model = without_dropout(model, gradient_checkpointing=False)
        recipe = self.recipe
        made = build_backend(recipe.rollouts, recipe.model, model, tokenizer, stack)
        if on_gpu:
            model.to("cuda")
        if made is not None:
            made.load_weights(model)
            return made
        own = TransformersBackend(
            model,
            tokenizer if recipe.training.stop else None,
            eos_token_ids=eos_token_ids(model, tokenizer),
        )
        set_limits(own, recipe.rollouts)
        return own

    def _params(self, model: Any, tokenizer: Any) -> SamplingParams:
        from decapod.lm import SamplingParams
        from vineppo.policy import eos_token_ids

        config = self.recipe.training
        return SamplingParams(
            max_new_tokens=config.max_response_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            stop=config.stop,
            stop_token_ids=tuple(sorted(eos_token_ids(model, tokenizer))),
        )


@dataclass(frozen=True)
class Files:
    """Where an evaluation goes."""

    out: Path
    plots: Path | None
    form: str

    def write(self, bench: ValueBench, reports: Mapping[str, ValueReport]) -> list[Path]:
        """Write the report, and figures if they are wanted; each file whole or not at all.

        Returns:
            The files.
        """
        from decapod.writing import write_text

        content = {
            "recipe": bench.recipe.content(),
            "checkpoint": None if bench.checkpoint is None else str(bench.checkpoint),
            "k": list(bench.k),
            "truth_rollouts": bench.truth_rollouts,
            "seed": bench.seed,
            "reports": {name: report.to_json() for name, report in reports.items()},
        }
        write_text(self.out, json.dumps(content, indent=1) + "\n")
        return [self.out, *self._draw(reports)]

    def _draw(self, reports: Mapping[str, ValueReport]) -> list[Path]:
        if self.plots is None:
            return []
        from vineppo.diagnostics import plots

        drawn = {
            "scatter": plots.scatter,
            "error-by-position": plots.error_by_position,
            "calibration": plots.calibration_curve,
        }
        if all(report.top1 is not None for report in reports.values()):
            drawn["ranking"] = plots.ranking_bars
        self.plots.mkdir(parents=True, exist_ok=True)
        found = []
        for name, draw in drawn.items():
            path = self.plots / f"{name}.{self.form}"
            temporary = path.with_name(f".{path.name}.partial")
            draw(reports).savefig(temporary, format=self.form)
            temporary.replace(path)
            found.append(path)
        return found
