"""The trainer: a transformers-style front of the loop in :mod:`asyncrlhf.loop`.

Walk a prompt through it: :class:`~asyncrlhf.dataset.Prompts` gives its token ids,
:class:`~asyncrlhf.rounds.Orders` its round and the seeds of its completions, the engine generates
them with weights g(k), the rewards score them, the learner takes N·T optimizer steps on the round,
the transport takes a snapshot, and the engine gets it for round k + 1 + D.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, get_scheduler
from transformers.trainer_utils import TrainOutput

from asyncrlhf import checkpoints, losses, transport
from asyncrlhf.callbacks import Callbacks
from asyncrlhf.config import AsyncRLHFConfig
from asyncrlhf.critic import Critic
from asyncrlhf.dataset import Prompts
from asyncrlhf.engines import HFEngine
from asyncrlhf.errors import InvalidInputError, MissingExtraError, WeightUpdateError
from asyncrlhf.evaluate import kl, sample, sample_logps
from asyncrlhf.learner import Learner, Step, param_groups, reference_model
from asyncrlhf.loop import run_rounds
from asyncrlhf.models import eos_token_ids, reference_of, without_dropout
from asyncrlhf.objectives import Objective
from asyncrlhf.pipeline import Pipeline
from asyncrlhf.processors import processor_share
from asyncrlhf.report import Report, round_metrics
from asyncrlhf.rewards import RewardSuite
from asyncrlhf.rounds import Orders, Round
from asyncrlhf.schedule import RoundTimes
from asyncrlhf.scoring import ScoringProcess
from asyncrlhf.settings import IsCorrection, Scoring
from decapod.lm import SamplingParams

if TYPE_CHECKING:
    from asyncrlhf.engines import GenerationEngine
    from asyncrlhf.transport import Snapshot, Transport

_LOG = logging.getLogger(__name__)


class AsyncRLHFTrainer:
    """Online preference learning and RL with generation that runs ahead of learning.

    The result is a function of model, data and settings alone: with a deterministic engine it is
    the same, bit for bit, wherever generation runs, however long anything takes, and whether or
    not the actor was killed on the way.

    Args:
        model: causal language model of transformers, or a path.
        ref_model: frozen reference; None takes the model as it is now (with ``peft_config``, the
            model without its adapter).
        reward_funcs: TRL's signature ``f(prompts, completions, completion_ids, **columns)``, or
            sequence-classification models with one label; one or several, weighted by
            ``args.reward_weights``.
        args: the settings.
        train_dataset: rows with ``prompt`` (text or messages) or ``prompt_ids``; other columns
            go to the reward functions.
        eval_dataset: the same, for :meth:`evaluate`.
        processing_class: tokenizer; None loads the model's.
        reward_processing_classes: tokenizers of reward models, where they are not their own.
        engine: what generates; None is :class:`~asyncrlhf.engines.HFEngine` on the CPU.
        transport: how weights travel; None is shared memory.
        peft_config: trains an adapter.
        value_model: critic of ppo; None starts one from the policy.
        callbacks: of transformers.
        optimizers: optimizer and scheduler, instead of those of ``args``.

    Raises:
        InvalidInputError: something does not fit; raised before the first round, with the remedy.
    """

    def __init__(
        self,
        model: Any,
        ref_model: Any | None = None,
        reward_funcs: Any = (),
        args: AsyncRLHFConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        engine: GenerationEngine | None = None,
        transport: Transport | None = None,
        peft_config: Any = None,
        value_model: Critic | None = None,
        callbacks: Sequence[Any] = (),
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        self.args = args = AsyncRLHFConfig() if args is None else args
        self.accelerator = Accelerator(
            cpu=args.use_cpu, mixed_precision="bf16" if args.bf16 else "fp16" if args.fp16 else "no"
        )
        if processing_class is None:
            path = model if isinstance(model, str) else model.config.name_or_path
            processing_class = AutoTokenizer.from_pretrained(path, padding_side="left")
        self.processing_class = processing_class
        if isinstance(model, str):
            model = AutoModelForCausalLM.from_pretrained(model)
        if peft_config is not None:
            try:
                from peft import get_peft_model
            except ImportError as error:
                raise MissingExtraError("peft", "peft") from error
            model = get_peft_model(model, peft_config)
        self.model = without_dropout(model, args.gradient_checkpointing)
        self.ref_model = reference_of(self.model, ref_model)
        self.schedule = args.schedule()
        if self.schedule.ahead < args.rounds_ahead:
            _LOG.warning(
                "max_staleness=%d is kept by running %d instead of %d rounds ahead",
                args.max_staleness, self.schedule.ahead, args.rounds_ahead,
            )  # fmt: skip
        self._eos = eos_token_ids(self.model, processing_class)
        self._train_prompts = self._prompts("train_dataset", train_dataset)
        self._eval_prompts = (
            None if eval_dataset is None else self._prompts("eval_dataset", eval_dataset)
        )
        self._rounds = self._number_of_rounds()
        self._rewards = RewardSuite(
            reward_funcs,
            weights=args.reward_weights,
            tokenizer=processing_class,
            reward_tokenizers=reward_processing_classes,
            on_error=args.on_reward_error,
            missing_eos_score=args.missing_eos_score,
        )
        self._scorer = (
            ScoringProcess(self._rewards, timeout=args.round_timeout)
            if args.scoring == "process" and self.accelerator.is_main_process
            else None
        )
        self.engine = HFEngine() if engine is None else engine
        self._transport = transport
        self._critic = self._with_critic(value_model)
        self._optimizers = optimizers
        self._callbacks = Callbacks(args, callbacks, self.model, processing_class)
        self._report = Report(self.schedule, cast(Scoring, args.scoring))
        self._learner: Learner | None = None
        self._snapshots: dict[int, Snapshot] = {}

    # --- what people call -------------------------------------------------------------------------

    @property
    def state(self) -> Any:
        """transformers' ``TrainerState``: steps, log history."""
        return self._callbacks.state

    @property
    def rounds(self) -> int:
        """Rounds of the whole run."""
        return self._rounds

    def report(self) -> Report:
        """Timing measured against predicted, staleness and sample size, so far; prints as text."""
        return self._report

    def add_callback(self, callback: Any) -> None:
        """Add a callback of transformers."""
        self._callbacks.add(callback)

    def train(self, resume_from_checkpoint: str | bool | None = None) -> TrainOutput:
        """Run all rounds.

        Args:
            resume_from_checkpoint: a checkpoint's folder, or True for the newest in
                ``args.output_dir``.

        Raises:
            InvalidInputError: the checkpoint is of another run.
            ActorError: the actor failed for good.
            RewardError: a reward function failed, with ``on_reward_error="raise"``.
            WaitTimeoutError: something took too long; the message names it.
            KeyboardInterrupt: passed on after everything that was started has been ended.
        """
        with processor_share(self.args, self.engine):
            return self._train(resume_from_checkpoint)

    def evaluate(self) -> dict[str, float]:
        """Scores, KL and length of completions of ``eval_dataset`` under the weights as they are.

        Raises:
            InvalidInputError: there is no ``eval_dataset``.
        """
        if self._eval_prompts is None:
            raise InvalidInputError("eval_dataset: expected one for evaluation, got none")
        prompts, args = self._eval_prompts, self.args
        samples = sample(
            self.model,
            prompts.ids,
            max_new_tokens=args.max_completion_length,
            temperature=args.eval_temperature,
            seed=args.seed,
            eos_token_ids=self._eos,
            batch_size=args.per_device_eval_batch_size,
        )
        rewards = self._rewards(
            prompts=prompts.prompts,
            prompt_ids=prompts.ids,
            completion_ids=samples.completion_ids,
            has_eos=samples.finished,
            columns=prompts.columns,
        )
        scoring: dict[str, Any] = {
            "temperature": args.eval_temperature or 1.0,
            "pad_id": self._pad_id,
            "batch_size": args.per_device_eval_batch_size,
        }
        logps, mask = sample_logps(self.model, samples, **scoring)
        with reference_model(self.model, self.ref_model) as reference:
            ref_logps, _ = sample_logps(reference, samples, **scoring)
        found = {
            "reward": float(rewards.scores[rewards.valid].mean()),
            "kl": kl(logps, ref_logps, mask).k1.value,
            "length": float(mask.sum(1).double().mean()),
            "ended": sum(samples.finished) / len(samples.finished),
        }
        metrics = {f"eval_{name}": value for name, value in found.items()}
        self._callbacks.log(metrics)
        self._callbacks.event("on_evaluate", metrics=metrics)
        return metrics

    def save_model(self, folder: str | None = None) -> None:
        """Write policy and tokenizer, for ``from_pretrained``."""
        path = Path(folder or self.args.output_dir)
        path.mkdir(parents=True, exist_ok=True)
        self.model.save_pretrained(path)
        self.processing_class.save_pretrained(path)

    # --- the run, top to bottom -------------------------------------------------------------------

    def _train(self, resume_from_checkpoint: str | bool | None) -> TrainOutput:
        args, schedule, main = self.args, self.schedule, self.accelerator.is_main_process
        resumed = self._resumed(resume_from_checkpoint)
        set_seed(args.seed)
        self._learner = learner = self._built_learner()
        first = 0
        if resumed is not None:
            first = resumed.rounds_done
            self._restore(learner, resumed)
        pipeline: Pipeline | None = None
        medium: Transport | None = None
        started = time.perf_counter()
        try:
            if main:
                self._probe_rewards()
                medium = self._transport or transport.SharedMemory(
                    slots=max(2, schedule.ahead + 1), checksum=args.verify_weights
                )
                if hasattr(self.engine, "attach"):
                    self.engine.attach(self.model, self._eos)
                score = None if self._scorer is None else self._score_remotely
                pipeline = Pipeline(self.engine, score, timeout=args.round_timeout)
                self._publish_first(medium, learner, resumed)
            orders = Orders(
                self._train_prompts.ids, self._sampling(), seed=args.seed,
                per_round=args.prompts_per_step * schedule.minibatches,
                samples=args.num_generations, shuffle=args.shuffle_prompts,
            )  # fmt: skip
            known = self._put_back(pipeline, orders, resumed)
            self._callbacks.begin(
                learner, self._rounds * schedule.steps_per_round, first * schedule.steps_per_round
            )

            def order(index: int) -> None:
                version = schedule.generation_version(index)
                if pipeline is not None and index not in known:
                    pipeline.submit(orders.order(index, version), self._snapshots[version])

            def take(index: int) -> Round:
                box = [pipeline.take(index) if pipeline is not None else None]
                if self.accelerator.num_processes > 1:
                    broadcast_object_list(box)
                assert box[0] is not None
                return self._checked(box[0])

            def publish(version: int) -> None:
                if medium is not None:
                    self._snapshots[version] = medium.publish(
                        learner.parameters_to_publish(), version
                    )

            def done(index: int, times: RoundTimes) -> bool:
                oldest = schedule.generation_version(index + 1)
                self._snapshots = {v: s for v, s in self._snapshots.items() if v >= oldest}
                self._report.add(times)
                self._report.restarts = getattr(self.engine, "restarts", 0)
                self._report.regenerated = getattr(self.engine, "regenerated", 0)
                self._callbacks.round_ended(self._report, self._rounds - index - 1)
                control = self._callbacks.control
                if control.should_save or index + 1 == self._rounds:
                    self._save(learner, index + 1, pipeline)
                return not control.should_training_stop

            run_rounds(
                schedule, self._rounds, first=first,
                order=order, take=take, learn=self._learn, publish=publish, done=done,
            )  # fmt: skip
            return self._callbacks.end(time.perf_counter() - started)
        finally:
            self._callbacks.stop()
            if pipeline is not None:
                pipeline.close()
            if self._scorer is not None:
                self._scorer.close()
            self._snapshots.clear()
            if medium is not None:
                medium.close()

    def _learn(self, done: Round) -> float:
        """Score if that was not done on the way, then train; seconds of scoring."""
        started = time.perf_counter()
        seconds = 0.0
        if done.rewards is None:
            done = self._scored(done)
            seconds = time.perf_counter() - started
        assert self._learner is not None
        described = round_metrics(done)
        limit = self.args.max_staleness if self.args.stale_policy == "drop" else None
        steps = self._learner.learn(
            done,
            self.schedule,
            start=done.order.index * self.schedule.steps_per_round,
            max_staleness=limit,
        )
        for step in steps:
            self._report.step(step)
            self._after(step, described)
        return seconds

    def _after(self, step: Step, described: Mapping[str, float]) -> None:
        metrics = {**described, **step.metrics}
        metrics["staleness"] = float(step.staleness)
        metrics["staleness/dropped"] = float(step.dropped)
        control = self._callbacks.step_ended(step.number + 1, metrics)
        if control.should_evaluate:
            self.evaluate()
            control.should_evaluate = False

    # --- rewards ----------------------------------------------------------------------------------

    def _probe_rewards(self) -> None:
        """Find a reward function that cannot work before anything was generated."""
        if self.args.on_reward_error == "raise" and self.args.probe_rewards:
            prompts = self._train_prompts
            row = {name: values[0] for name, values in prompts.columns.items()}
            self._rewards.probe(prompts.prompts[0], prompts.ids[0], row)

    def _score_remotely(self, done: Round) -> Any:
        assert self._scorer is not None
        return self._scorer(**self._to_score(done))

    def _scored(self, done: Round) -> Round:
        box: list[Any] = [None]
        if self.accelerator.is_main_process:
            box = [self._rewards(**self._to_score(done))]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(box)
        return replace(done, rewards=box[0])

    def _to_score(self, done: Round) -> dict[str, Any]:
        """Arguments of the reward suite: one row per completion."""
        samples = self.args.num_generations
        rows = [row for row in done.order.rows for _ in range(samples)]
        return {
            "prompts": [self._train_prompts.prompts[row] for row in rows],
            "prompt_ids": [list(self._train_prompts.ids[row]) for row in rows],
            "completion_ids": [list(completion.ids) for completion in done.completions],
            "has_eos": [completion.finish_reason == "stop" for completion in done.completions],
            "columns": {
                name: [values[row] for row in rows]
                for name, values in self._train_prompts.columns.items()
            },
        }

    # --- weights ----------------------------------------------------------------------------------

    def _publish_first(
        self, medium: Transport, learner: Learner, resumed: checkpoints.Resumed | None
    ) -> None:
        """Publish what the first rounds need: the weights as they are; on resuming, older ones."""
        if resumed is None:
            self._snapshots[0] = medium.publish(learner.parameters_to_publish(), 0)
            return
        names = [name for name, _ in learner.parameters_to_publish()]
        for version in resumed.versions:
            weights = resumed.weights(version)
            # In the learner's order, which checksums depend on.
            self._snapshots[version] = medium.publish(
                [(name, weights[name]) for name in names], version
            )

    def _checked(self, done: Round) -> Round:
        """The round, if the weights that generated it are those that it was ordered with."""
        version = done.order.version
        snapshot = self._snapshots.get(version)
        wrong = [c for c in done.completions if c.oldest_version < version]
        if wrong or (snapshot is not None and snapshot.checksum != done.checksum):
            raise WeightUpdateError(
                f"round {done.order.index} was to be generated by weights {version}, but was not; "
                "the engine broke its contract"
            )
        return done

    # --- checkpoints ------------------------------------------------------------------------------

    def _resumed(self, wanted: str | bool | None) -> checkpoints.Resumed | None:
        if not wanted:
            return None
        folder = checkpoints.newest(Path(self.args.output_dir)) if wanted is True else Path(wanted)
        if folder is None:
            raise InvalidInputError(
                f"resume_from_checkpoint: no checkpoint in {self.args.output_dir!r}; start anew "
                "without it"
            )
        return checkpoints.load(folder, self._settings())

    def _restore(self, learner: Learner, resumed: checkpoints.Resumed) -> None:
        weights = resumed.weights(resumed.versions[-1])
        with torch.no_grad():
            for name, value in learner.parameters_to_publish():
                value.copy_(weights[name])
        learner.optimizer.load_state_dict(resumed.state["optimizer"])
        learner.scheduler.load_state_dict(resumed.state["scheduler"])
        if self._critic is not None:
            self._critic.load_state_dict(resumed.state["critic"])
        torch.set_rng_state(resumed.state["rng"])
        self._callbacks.restore(resumed.folder / "trainer_state.json")

    def _put_back(
        self, pipeline: Pipeline | None, orders: Orders, resumed: checkpoints.Resumed | None
    ) -> set[int]:
        """Hand rounds that a checkpoint holds to the pipeline; their numbers."""
        if resumed is None or pipeline is None:
            return set()
        for record in resumed.finished:
            index = record["index"]
            order = orders.order(index, self.schedule.generation_version(index))
            completions = checkpoints.restored_completions(record)
            pipeline.put_back(
                Round(
                    order, completions, record["checksum"], record["generate"], 0.0,
                    time.perf_counter(),
                )
            )  # fmt: skip
        return {record["index"] for record in resumed.finished}

    def _save(self, learner: Learner, rounds_done: int, pipeline: Pipeline | None) -> None:
        args = self.args
        if args.save_strategy == "no" or pipeline is None:
            return
        step = rounds_done * self.schedule.steps_per_round
        current: dict[int, Any] = {step: list(learner.parameters_to_publish())}
        state = {
            "optimizer": learner.optimizer.state_dict(),
            "scheduler": learner.scheduler.state_dict(),
            "rng": torch.get_rng_state(),
        }
        if self._critic is not None:
            state["critic"] = self._critic.state_dict()
        output = Path(args.output_dir)

        def write_model(folder: Path) -> None:
            self.save_model(str(folder))
            self.state.save_to_json(str(folder / "trainer_state.json"))

        checkpoints.save(
            output / f"checkpoint-{step}",
            rounds_done=rounds_done,
            snapshots={**self._snapshots, **current},
            finished=pipeline.finished(),
            settings=self._settings(),
            state=state,
            write_model=write_model,
        )
        checkpoints.prune(output, args.save_total_limit)
        self._callbacks.saved()

    def _settings(self) -> dict[str, Any]:
        """What must be equal for a run to be resumed: all that its result depends on."""
        args = self.args
        return {
            **asdict(self._objective()),
            "num_generations": args.num_generations,
            "minibatches_per_round": args.minibatches_per_round,
            "epochs_per_round": args.epochs_per_round,
            "rounds_ahead": self.schedule.ahead,
            "max_staleness": args.max_staleness,
            "stale_policy": args.stale_policy,
            "prompts_per_step": args.prompts_per_step,
            "temperature": args.temperature,
            "max_completion_length": args.max_completion_length,
            "missing_eos_score": args.missing_eos_score,
            "learning_rate": args.learning_rate,
            "lr_scheduler_type": str(args.lr_scheduler_type.value),
            "optim": str(args.optim.value),
            "max_grad_norm": args.max_grad_norm,
            "weight_decay": args.weight_decay,
            "seed": args.seed,
            "rounds": self._rounds,
            "prompts": len(self._train_prompts),
            "parameters": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            "model": type(self.model).__name__,
        }

    # --- making the parts -------------------------------------------------------------------------

    def _prompts(self, name: str, dataset: Any) -> Prompts:
        if dataset is None:
            raise InvalidInputError(f"{name}: expected rows with a column 'prompt', got none")
        config = self.model.config.get_text_config(decoder=True)
        return Prompts.of(
            dataset,
            self.processing_class,
            name=name,
            max_prompt_length=self.args.max_prompt_length,
            max_new_tokens=self.args.max_completion_length,
            positions=getattr(config, "max_position_embeddings", None),
        )

    def _number_of_rounds(self) -> int:
        args, steps = self.args, self.schedule.steps_per_round
        if args.max_steps > 0:
            rounds, rest = divmod(args.max_steps, steps)
            if rest:
                raise InvalidInputError(
                    f"max_steps: expected a multiple of the {steps} steps of a round "
                    f"(minibatches_per_round * epochs_per_round), got {args.max_steps}; "
                    f"{(rounds + 1) * steps} is one"
                )
            return rounds
        per_round = args.prompts_per_step * self.schedule.minibatches
        rounds = int(args.num_train_epochs * len(self._train_prompts)) // per_round
        if rounds < 1:
            raise InvalidInputError(
                f"train_dataset: one round takes {per_round} prompts, and num_train_epochs="
                f"{args.num_train_epochs:g} of {len(self._train_prompts)} rows are fewer; give "
                "more rows, set max_steps, or make batches smaller"
            )
        return rounds

    @property
    def _pad_id(self) -> int:
        # Never read where it stands for padding: masks come from lengths.
        pad = self.processing_class.pad_token_id
        return self._eos[0] if pad is None else int(pad)

    def _sampling(self) -> SamplingParams:
        return SamplingParams(
            max_new_tokens=self.args.max_completion_length,
            temperature=self.args.temperature,
            stop_token_ids=self._eos,
            logprobs_of="sampler",
        )

    def _objective(self) -> Objective:
        args = self.args
        return Objective(
            args.loss, args.beta, args.kl_coef, args.cliprange, args.gamma, args.lam,
            args.vf_coef, cast(IsCorrection | None, args.is_correction), args.is_cap,
        )  # fmt: skip

    def _with_critic(self, value_model: Critic | None) -> Critic | None:
        if not losses.INFO[self.args.loss].needs_critic:
            return None
        return Critic.from_policy(self.model) if value_model is None else value_model

    def _built_learner(self) -> Learner:
        args = self.args
        optimizer, scheduler = self._optimizers
        modules = [self.model] if self._critic is None else [self.model, self._critic]
        if optimizer is None:
            kind, settings = Trainer.get_optimizer_cls_and_kwargs(args, self.model)
            optimizer = kind(param_groups(modules, args.weight_decay), **settings)
        if scheduler is None:
            total = self._rounds * self.schedule.steps_per_round
            scheduler = get_scheduler(
                args.lr_scheduler_type,
                optimizer,
                num_warmup_steps=args.get_warmup_steps(total),
                num_training_steps=total,
                scheduler_specific_kwargs=args.lr_scheduler_kwargs,
            )
        if self.ref_model is not None:
            self.ref_model.to(self.accelerator.device)
        return Learner(
            model=self.model,
            reference=self.ref_model,
            critic=self._critic,
            objective=self._objective(),
            accelerator=self.accelerator,
            optimizer=optimizer,
            scheduler=scheduler,
            pad_id=self._pad_id,
            temperature=args.temperature,
            samples=args.num_generations,
            prompts_per_part=args.per_device_train_batch_size,
            max_grad_norm=args.max_grad_norm,
        )
