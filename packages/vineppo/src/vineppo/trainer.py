"""One loop for all methods: sample, score, give credit, learn.

Walk a prompt through it: :class:`~vineppo.dataset.Prompts` gives its ids, the backend samples G
answers, :class:`~vineppo.rewards.RewardSuite` scores them, the method turns the batch into a
:class:`Lesson` (for VinePPO: borders → states → K rollouts each → values → advantages of steps → of
tokens), and :class:`~vineppo.learner.Learner` takes optimizer steps on it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from vineppo import checkpoints
from vineppo._version import __version__
from vineppo.backend import RolloutBackend, Usage
from vineppo.batch import EpisodeBatch, Response
from vineppo.config import TrainerConfig
from vineppo.dataset import Prompts
from vineppo.episodes import Episode
from vineppo.errors import InvalidInputError, MissingExtraError
from vineppo.learner import Learner
from vineppo.objectives import Objective, Unit
from vineppo.policy import PolicyWithCritic, Reference, eos_token_ids, without_dropout
from vineppo.ranks import Ranks
from vineppo.reporters import Reporters, transformers_arguments
from vineppo.rewards import RewardSuite
from vineppo.rollout import TransformersBackend
from vineppo.schedule import rate_factor

if TYPE_CHECKING:
    from decapod.seeding import Seeds


@dataclass(frozen=True)
class Lesson:
    """What an iteration teaches.

    Attributes:
        units: responses, or pairs of them.
        objective: the loss on them.
        held_out: units whose loss ends the epochs when it rises; the best epoch's weights stay.
        restart: begin from the weights that the trainer was given.
        metrics: of the credit.
    """

    units: Sequence[Unit]
    objective: Objective
    held_out: Sequence[Unit] = ()
    restart: bool = False
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class TrainResult:
    """What :meth:`EpisodeTrainer.train` did.

    Attributes:
        iterations: done, those before a resumed start included.
        steps: optimizer steps, likewise.
        history: metrics of every iteration.
    """

    iterations: int
    steps: int
    history: list[dict[str, float]]


class EpisodeTrainer:
    """The loop that the trainers share; take one of the subclasses.

    The result is a function of model, data and settings: seeds belong to prompts and states, not to
    the order in which anything is generated, and a run that was resumed equals one that was not.

    Args:
        model: causal language model of transformers, or a path.
        ref_model: the frozen policy that divergence is measured from; None takes the model as it is
            now (with ``peft_config``, the model without its adapter).
        reward_funcs: one or several in TRL's signature ``f(prompts, completions, completion_ids,
            **columns)``.
        train_dataset: rows with ``prompt`` (text or messages) or ``prompt_ids``; other columns go
            to the reward functions.
        processing_class: tokenizer; None loads the model's.
        args: the settings.
        rollout_backend: what samples; None samples with the model itself, in this process.
        eval_dataset: the same, for :meth:`evaluate`.
        peft_config: trains an adapter.
        callbacks: of transformers.

    Raises:
        InvalidInputError: something does not fit; raised before anything is sampled.
    """

    config_class: ClassVar[type[TrainerConfig]] = TrainerConfig
    uses_reference: ClassVar[bool] = True

    def __init__(
        self,
        model: Any,
        ref_model: Any | None = None,
        reward_funcs: Any = (),
        train_dataset: Any = None,
        processing_class: Any = None,
        args: Any = None,
        rollout_backend: RolloutBackend | None = None,
        *,
        eval_dataset: Any = None,
        peft_config: Any = None,
        callbacks: Sequence[Any] = (),
    ) -> None:
        from accelerate import Accelerator
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.args: Any = self.config_class() if args is None else args
        if not isinstance(self.args, self.config_class):
            raise InvalidInputError(
                f"args: expected a {self.config_class.__name__}, got {type(args).__name__}"
            )
        config: TrainerConfig = self.args
        arguments = transformers_arguments(config)
        precision = config.mixed_precision
        self.accelerator = Accelerator(cpu=config.use_cpu, mixed_precision=precision)
        if self.accelerator.distributed_type in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
            raise InvalidInputError(
                "accelerate: expected whole copies of the model on every process (DDP), got "
                f"{self.accelerator.distributed_type}; train an adapter if a copy does not fit"
            )
        self._ranks = Ranks(self.accelerator)
        if processing_class is None:
            path = model if isinstance(model, str | Path) else model.config.name_or_path
            processing_class = AutoTokenizer.from_pretrained(path)
        self.processing_class = processing_class
        torch.manual_seed(config.seed)  # an adapter starts at random
        if isinstance(model, str | Path):
            model = AutoModelForCausalLM.from_pretrained(model)
        self._eos = eos_token_ids(model, processing_class)
        reference = None
        if peft_config is not None:
            try:
                from peft import get_peft_model
            except ImportError as error:
                raise MissingExtraError("peft", "peft") from error
            model = get_peft_model(model, peft_config)
        model = without_dropout(model, gradient_checkpointing=config.gradient_checkpointing)
        self.model = model.to(self.accelerator.device)
        if self.uses_reference:
            reference = Reference(self.model, ref_model)
            if ref_model is not None:
                reference.model.to(self.accelerator.device)
        self._reference = reference
        text_config = model.config.get_text_config(decoder=True)
        self._positions = getattr(text_config, "max_position_embeddings", None)
        self.prompts = self._prompts("train_dataset", train_dataset)
        self.eval_prompts = (
            None if eval_dataset is None else self._prompts("eval_dataset", eval_dataset)
        )
        if config.eval_every and self.eval_prompts is None:
            raise InvalidInputError(
                f"eval_dataset: expected one, because eval_every={config.eval_every}"
            )
        self._reward_funcs = reward_funcs
        self.reward = self._reward_of(self.prompts)
        self.backend: RolloutBackend = rollout_backend or TransformersBackend(
            self.model, processing_class if config.stop else None, eos_token_ids=self._eos
        )
        pad = getattr(processing_class, "pad_token_id", None)
        module = PolicyWithCritic(self.model, self._critic())
        self._learner = Learner(
            self.accelerator, module, config, min(self._eos) if pad is None else pad
        )
        self._start = self._learner.parameters() if self._restarts() else None
        self._reporters = Reporters(
            config, arguments, callbacks, self.model, processing_class, main=self._ranks.first
        )
        self.history: list[dict[str, float]] = []
        self._spent = {"generated_tokens": 0.0, "seconds": 0.0, "cpu_seconds": 0.0}

    # --- what differs between methods -------------------------------------------------------------

    def _critic(self) -> str | None:
        """The kind of critic that the module has."""
        return None

    def _restarts(self) -> bool:
        """Whether lessons may go back to the first weights."""
        return False

    def _lesson(self, batch: EpisodeBatch, iteration: int) -> Lesson:
        """What an iteration's episodes teach."""
        raise NotImplementedError

    # --- what people call -------------------------------------------------------------------------

    @property
    def state(self) -> Any:
        """transformers' ``TrainerState``: steps and log history."""
        return self._reporters.state

    @property
    def module(self) -> PolicyWithCritic:
        """Policy and critic."""
        return self._learner.module

    def train(self, resume_from_checkpoint: str | Path | bool | None = None) -> TrainResult:
        """Run all iterations.

        Args:
            resume_from_checkpoint: a checkpoint's folder, or True for the newest in
                ``args.output_dir``.

        Raises:
            InvalidInputError: the checkpoint is of another run, or the first batch shows that
                settings do not fit.
            RewardError: a reward function failed.
            NotFiniteError: log-probabilities or gradients are not finite.
            KeyboardInterrupt: passed on; checkpoints that were written stay whole.
        """
        config = self.args
        done = self._resume(resume_from_checkpoint)
        if self._ranks.first:
            self._write_settings()
        self._reporters.begin(done, self._learner.steps)
        try:
            self.backend.load_weights(self.model)
            for iteration in range(done, config.iterations):
                metrics = self._iterate(iteration)
                done = iteration + 1
                self.history.append(metrics)
                log = done % config.log_every == 0 or done == config.iterations
                self._reporters.iteration_ended(done, metrics, log=log)
                if config.eval_every and done % config.eval_every == 0:
                    self.evaluate()
                stop = self._reporters.should_stop
                if config.save_every and (done % config.save_every == 0 or stop):
                    self._save(done)
                if stop:
                    break
        finally:
            self._reporters.end()
        return TrainResult(done, self._learner.steps, self.history)

    def evaluate(self) -> dict[str, float]:
        """Mean score, share of finished answers and mean length on ``eval_dataset``.

        Raises:
            InvalidInputError: there is no ``eval_dataset``.
        """
        if self.eval_prompts is None:
            raise InvalidInputError("eval_dataset: expected one for evaluation, got none")
        config, prompts = self.args, self.eval_prompts
        params = self._params(config.eval_temperature, config.eval_top_p)
        samples = config.eval_samples if config.eval_temperature > 0 else 1
        rows = list(range(len(prompts)))
        with self._reporters.stage("evaluating"):
            episodes = self._sample(prompts, rows, samples, params, self._seeds("evaluation"))
            scores = self._scores(self._reward_of(prompts), episodes)
        metrics = {
            "eval_reward": float(scores.mean()),
            "eval_finished": float(np.mean([e.finished for e in episodes])),
            "eval_length": float(np.mean([len(e.response_ids) for e in episodes])),
        }
        self._reporters.evaluated(metrics)
        return metrics

    def save_model(self, folder: str | Path | None = None) -> None:
        """Write policy and tokenizer, for ``from_pretrained``."""
        if self._ranks.first:
            path = Path(folder or self.args.output_dir)
            path.mkdir(parents=True, exist_ok=True)
            self._write_model(path)

    def add_callback(self, callback: Any) -> None:
        """Add a callback of transformers."""
        self._reporters.add(callback)

    # --- an iteration, top to bottom --------------------------------------------------------------

    def _iterate(self, iteration: int) -> dict[str, float]:
        config = self.args
        clock = _Clock()
        used = self.backend.usage
        with self._reporters.stage("sampling"), clock("sample"):
            rows = self._rows_of(iteration)
            params = self._params(config.temperature, config.top_p)
            seeds = self._seeds("episodes", iteration)
            episodes = self._sample(self.prompts, rows, config.num_generations, params, seeds)
        self._check_first(episodes)
        with self._reporters.stage("scoring"), clock("score"):
            scores = self._scores(self.reward, episodes)
        groups = np.repeat(np.arange(len(rows)), config.num_generations)
        with self._reporters.stage("giving credit"), clock("credit"):
            lesson = self._lesson(EpisodeBatch(episodes, scores, groups), iteration)
        usage = self.backend.usage - used
        with self._reporters.stage("learning"), clock("learn"):
            learned = self._learn(lesson, iteration)
        with clock("publish"):
            self.backend.load_weights(self.model)
        generated, prompted, reused = self._over_ranks(usage)
        self._spent["generated_tokens"] += generated
        self._spent["seconds"] += clock.total
        self._spent["cpu_seconds"] += clock.cpu
        lengths = [len(e.response_ids) for e in episodes]
        return {
            "reward": float(scores.mean()),
            "reward_std": float(scores.std()),
            "finished": float(np.mean([e.finished for e in episodes])),
            "length": float(np.mean(lengths)),
            **lesson.metrics,
            **learned,
            "episodes": float(len(episodes)),
            "hit_rate": reused / prompted if prompted else 0.0,
            **{f"seconds_{name}": seconds for name, seconds in clock.seconds.items()},
            **{f"total_{name}": value for name, value in self._spent.items()},
        }

    def _learn(self, lesson: Lesson, iteration: int) -> dict[str, float]:
        config, learner = self.args, self._learner
        if lesson.units and lesson.restart and self._start is not None:
            learner.load_parameters(self._start)
            learner.forget_moments()
        size = config.mini_batch_size
        planned = config.num_epochs * -(-len(lesson.units) // size)
        means: list[dict[str, float]] = []
        best: tuple[float, Any] | None = None
        epochs = 0
        for epoch in range(config.num_epochs if lesson.units else 0):
            order = (
                self._seeds("order", iteration, epoch).generator().permutation(len(lesson.units))
            )
            for start in range(0, len(order), size):
                progress = (iteration + (len(means) + 0.5) / planned) / config.iterations
                factor = rate_factor(progress, config.lr_schedule, config.warmup_ratio)
                units = [lesson.units[i] for i in order[start : start + size]]
                means.append(learner.step(units, lesson.objective, factor))
                self._reporters.step_ended(learner.steps)
            epochs += 1
            if lesson.held_out:
                loss = learner.loss_of(lesson.held_out, lesson.objective)
                if best is not None and loss >= best[0]:
                    learner.load_parameters(best[1])
                    break
                best = (loss, learner.parameters())
        names = sorted({name for step in means for name in step})
        return {
            **{name: float(np.mean([s[name] for s in means if name in s])) for name in names},
            "steps": float(len(means)),
            "epochs": float(epochs),
            "total_steps": float(learner.steps),
        }

    # --- its parts --------------------------------------------------------------------------------

    def _prompts(self, name: str, rows: Any) -> Prompts:
        return Prompts(
            name, rows, self.processing_class, self._positions, self.args.max_response_tokens
        )

    def _reward_of(self, prompts: Prompts) -> RewardSuite:
        config = self.args
        return RewardSuite(
            self._reward_funcs, prompts, self.processing_class, config.reward_weights,
            config.unfinished_score,
        )  # fmt: skip

    def _seeds(self, *names: str | int) -> Seeds:
        from decapod.seeding import Seeds

        return Seeds(self.args.seed).child("vineppo", *names)

    def _seed(self, *names: str | int) -> int:
        """63 bits."""
        words = self._seeds(*names).sequence().generate_state(1, np.uint64)
        return int(words[0] >> np.uint64(1))

    def _params(self, temperature: float, top_p: float) -> Any:
        from decapod.lm import SamplingParams

        return SamplingParams(
            max_new_tokens=self.args.max_response_tokens,
            temperature=temperature,
            top_p=top_p,
            stop=self.args.stop,
            stop_token_ids=tuple(sorted(self._eos)),
        )

    def _rows_of(self, iteration: int) -> list[int]:
        """Prompts of an iteration: one pass after the other, each in an order of its own."""
        size, total = self.args.prompts_per_iteration, len(self.prompts)
        found: list[int] = []
        for number in range(iteration * size, (iteration + 1) * size):
            passed, place = divmod(number, total)
            if not found or place == 0:
                order = self._seeds("prompts", passed).generator().permutation(total)
            found.append(int(order[place]))
        return found

    def _sample(
        self, prompts: Prompts, rows: Sequence[int], samples: int, params: Any, seeds: Seeds
    ) -> list[Episode]:
        """Episodes of all processes, in the order of the rows, each of which has ``samples``."""
        # A place may repeat a row, as where a pass over few prompts ends and the next begins.
        words = seeds.sequence().generate_state(len(rows), np.uint64)

        def mine() -> list[Episode]:
            places = self._ranks.share(list(range(len(rows))))
            if not places:
                return []
            with self.accelerator.autocast():
                found = self.backend.generate(
                    [prompts.ids[rows[place]] for place in places],
                    samples,
                    params,
                    [int(words[place] >> np.uint64(1)) for place in places],
                )
            return [
                Episode(rows[place], prompts.ids[rows[place]], rollout.token_ids, rollout.finished)
                for place, rollouts in zip(places, found, strict=True)
                for rollout in rollouts
            ]

        return self._ranks.gathered(mine)

    def _scores(self, reward: RewardSuite, episodes: Sequence[Episode]) -> Any:
        return np.array(self._ranks.gathered(lambda: list(reward(self._ranks.share(episodes)))))

    def _check_first(self, episodes: Sequence[Episode]) -> None:
        """Refuse what no method can learn from, before the first step."""
        empty = [e.row for e in episodes if not e.response_ids]
        if empty:
            raise InvalidInputError(
                f"rollout_backend: expected at least one token of every answer, got none for row "
                f"{empty[0]} of train_dataset; an answer holds the token that ended it"
            )
        one_score = self.args.unfinished_score is not None
        if one_score and not self.history and not any(e.finished for e in episodes):
            raise InvalidInputError(
                f"max_response_tokens: all {len(episodes)} answers of the first iteration were cut "
                f"at {self.args.max_response_tokens} tokens and score the same; raise it, or "
                "check that the model was fine-tuned to end its answers with EOS"
            )

    def _over_ranks(self, usage: Usage) -> tuple[int, int, int]:
        every = self._ranks.gather(
            [(usage.generated_tokens, usage.prompt_tokens, usage.reused_tokens)]
        )
        generated, prompted, reused = (sum(column) for column in zip(*every, strict=True))
        return generated, prompted, reused

    def _read_policy(self, responses: Sequence[Response]) -> list[Any]:
        return self._learner.read(responses, self._learner.module)

    def _read_reference(self, responses: Sequence[Response]) -> list[Any] | None:
        if self._reference is None:
            return None
        with self._reference() as module:
            return [logprobs for logprobs, _ in self._learner.read(responses, module)]

    # --- on disk ----------------------------------------------------------------------------------

    def _write_model(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        self.processing_class.save_pretrained(folder)

    def _write_settings(self) -> None:
        """Settings and versions, so that any number can be made again."""
        import accelerate
        import transformers

        folder = Path(self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        content = {
            "trainer": type(self).__name__,
            "config": type(self.args).__name__,
            "settings": self.args.to_dict(),
            "versions": {
                "vineppo": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "accelerate": accelerate.__version__,
            },
        }
        temporary = folder / ".settings.json.partial"
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        temporary.replace(folder / "settings.json")

    def _settings(self) -> dict[str, Any]:
        return {"trainer": type(self).__name__, **self.args.result_settings()}

    def _save(self, iterations: int) -> None:
        if self._ranks.first:
            checkpoints.save(
                Path(self.args.output_dir),
                iterations,
                parameters=self._learner.parameters(),
                state=self._learner.state(),
                record={
                    "history": self.history,
                    "spent": self._spent,
                    "log_history": self.state.log_history,
                },
                settings=self._settings(),
                write_model=self._write_model,
                keep=self.args.save_total_limit,
            )
            self._reporters.saved()
        self._ranks.wait()

    def _resume(self, asked: str | Path | bool | None) -> int:
        """Iterations that are done already."""
        if not asked:
            return 0
        folder = checkpoints.newest(Path(self.args.output_dir)) if asked is True else Path(asked)
        if folder is None:
            raise InvalidInputError(
                f"resume_from_checkpoint: expected a checkpoint in {self.args.output_dir}, got "
                "none; set save_every, or start without it"
            )
        resumed = checkpoints.load(folder, self._settings())
        self._learner.load_parameters(resumed.parameters)
        self._learner.load_state(resumed.state)
        self.history = list(resumed.record["history"])
        self._spent = dict(resumed.record["spent"])
        self.state.log_history = list(resumed.record["log_history"])
        return resumed.iterations


class _Clock:
    """Seconds of the stages of an iteration."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.cpu = 0.0

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.seconds[name] = time.perf_counter() - wall
        self.cpu += time.process_time() - cpu
