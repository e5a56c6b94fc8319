"""The trainer: a transformers-style front of the loop in :mod:`asyncrlhf.loop`.

Walk a prompt through it: :class:`~asyncrlhf.dataset.Prompts` gives its token ids,
:class:`~asyncrlhf.rounds.Orders` its round and the seeds of its completions, the engine generates
them with weights g(k), the rewards score them, the learner takes N·T optimizer steps on the round,
the transport takes a snapshot, and the engine gets it for round k + 1 + D.
"""

from __future__ import annotations

import contextlib
import logging
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, get_scheduler
from transformers.trainer_utils import TrainOutput

from asyncrlhf import checkpoints, losses, transport
from asyncrlhf.callbacks import Callbacks
from asyncrlhf.config import AsyncRLHFConfig
from asyncrlhf.critic import Critic
from asyncrlhf.dataset import Prompts
from asyncrlhf.engines import HFEngine
from asyncrlhf.errors import InvalidInputError, MissingExtraError
from asyncrlhf.evaluate import evaluate_on
from asyncrlhf.learner import Learner, Step, param_groups
from asyncrlhf.loop import run_rounds
from asyncrlhf.measured import RoundTimes
from asyncrlhf.models import eos_token_ids, reference_of, without_dropout
from asyncrlhf.objectives import Objective
from asyncrlhf.processors import processor_share
from asyncrlhf.ranks import Ranks
from asyncrlhf.report import Report, round_metrics
from asyncrlhf.rewards import Rewards, RewardSuite, check_picklable
from asyncrlhf.rounds import Orders, Round
from asyncrlhf.scoring import ScoringProcess
from asyncrlhf.settings import IsCorrection, Scoring
from asyncrlhf.supply import Supply
from decapod.lm import SamplingParams

if TYPE_CHECKING:
    from asyncrlhf.engines import GenerationEngine
    from asyncrlhf.transport import Transport

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
        if self.accelerator.distributed_type in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
            raise InvalidInputError(
                f"accelerate: expected whole copies of the model on every process (DDP), got "
                f"{self.accelerator.distributed_type}; train an adapter if a copy does not fit"
            )
        if processing_class is None:
            path = model if isinstance(model, str) else model.config.name_or_path
            processing_class = AutoTokenizer.from_pretrained(path, padding_side="left")
        self.processing_class = processing_class
        set_seed(args.seed)  # an adapter starts at random
        if isinstance(model, str):
            model = AutoModelForCausalLM.from_pretrained(model)
        if peft_config is not None:
            try:
                from peft import get_peft_model
            except ImportError as error:
                raise MissingExtraError("peft", "peft") from error
            model = get_peft_model(model, peft_config)
        self.model = without_dropout(
            model, args.gradient_checkpointing, args.gradient_checkpointing_kwargs
        )
        self.ref_model = reference_of(self.model, ref_model)
        self._ranks = Ranks(self.accelerator)
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
        if args.eval_strategy.value != "no" and self._eval_prompts is None:
            raise InvalidInputError(
                f"eval_dataset: expected one, because eval_strategy={args.eval_strategy.value!r}"
            )
        self._rounds = self._number_of_rounds()
        self._rewards = RewardSuite(
            reward_funcs,
            weights=args.reward_weights,
            tokenizer=processing_class,
            reward_tokenizers=reward_processing_classes,
            on_error=args.on_reward_error,
            missing_eos_score=args.missing_eos_score,
            device=str(self.accelerator.device),
        )
        if args.scoring == "process":
            check_picklable(self._rewards)
        half = "bfloat16" if args.bf16 else "float16" if args.fp16 else None
        self.engine = HFEngine(dtype=half) if engine is None else engine
        self._transport = transport
        self._critic = self._with_critic(value_model)
        self._optimizers = optimizers
        self._callbacks = Callbacks(args, callbacks, self.model, processing_class)
        self._report = Report(self.schedule, cast(Scoring, args.scoring))
        self._learner: Learner | None = None

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
        args = self.args
        found = self._ranks.shared(
            partial(
                evaluate_on,
                self.model,
                self.ref_model,
                self._eval_prompts,
                self._rewards,
                eos_token_ids=self._eos,
                pad_id=self._pad_id,
                temperature=args.eval_temperature,
                max_new_tokens=args.max_completion_length,
                seed=args.seed,
                batch_size=args.per_device_eval_batch_size,
            )
        )
        metrics = {f"eval_{name}": value for name, value in found.items()}
        self._callbacks.log(metrics)
        self._callbacks.event("on_evaluate", metrics=metrics)
        return metrics

    def save_model(self, folder: str | None = None) -> None:
        """Write policy and tokenizer, for ``from_pretrained``."""
        if not self._ranks.first:
            return
        path = Path(folder or self.args.output_dir)
        path.mkdir(parents=True, exist_ok=True)
        self.model.save_pretrained(path)
        self.processing_class.save_pretrained(path)

    # --- the run, top to bottom -------------------------------------------------------------------

    def _train(self, resume_from_checkpoint: str | bool | None) -> TrainOutput:
        args, schedule = self.args, self.schedule
        resumed = self._resumed(resume_from_checkpoint)
        first = 0 if resumed is None else resumed.rounds_done
        started = time.perf_counter()
        with contextlib.ExitStack() as stack:
            supply = self._supply(stack)
            stack.callback(self._callbacks.stop)
            shared = self._ranks.shared
            shared(lambda: self._begin(supply))
            set_seed(args.seed)
            self._learner = learner = self._built_learner()
            stack.callback(learner.release)
            if resumed is not None:
                self._restore(learner, resumed)
            shared(lambda: supply.publish_first(learner.parameters_to_publish(), resumed))
            self._callbacks.begin(
                learner, self._rounds * schedule.steps_per_round, first * schedule.steps_per_round
            )

            def publish(version: int) -> None:
                shared(lambda: supply.publish(learner.parameters_to_publish(), version))

            def done(index: int, times: RoundTimes) -> bool:
                supply.forget(schedule.generation_version(index + 1))
                self._report.add(times)
                self._report.restarts = supply.restarts
                self._report.regenerated = supply.regenerated
                self._callbacks.round_ended(self._report, self._rounds - index - 1)
                if shared(lambda: self._save_if_due(learner, index + 1, supply)):
                    self._callbacks.saved()
                return not shared(lambda: bool(self._callbacks.control.should_training_stop))

            run_rounds(
                schedule, self._rounds, first=first,
                order=lambda index: shared(lambda: supply.order(index)),
                take=lambda index: shared(lambda: supply.take(index)),
                learn=self._learn, publish=publish, done=done,
            )  # fmt: skip
            return self._callbacks.end(time.perf_counter() - started)

    def _learn(self, done: Round) -> float:
        """Score if that was not done on the way, then train; seconds of scoring."""
        started = time.perf_counter()
        seconds = 0.0
        if done.rewards is None:
            done = self._scored(done)
            seconds = time.perf_counter() - started
        assert self._learner is not None
        assert done.rewards is not None
        for problem in done.rewards.problems:
            _LOG.warning("round %d: %s", done.order.index, problem)
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

    def _scored(self, done: Round) -> Round:
        return replace(
            done, rewards=self._ranks.shared(lambda: self._rewards(**self._to_score(done)))
        )

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

    # --- where rounds come from -------------------------------------------------------------------

    def _supply(self, stack: contextlib.ExitStack) -> Supply:
        args = self.args
        orders = Orders(
            self._train_prompts.ids, self._sampling(), seed=args.seed,
            per_round=args.prompts_per_step * self.schedule.minibatches,
            samples=args.num_generations, shuffle=args.shuffle_prompts,
        )  # fmt: skip
        medium = self._transport or transport.SharedMemory(
            slots=max(2, self.schedule.ahead + 1), checksum=args.verify_weights
        )
        score: Callable[[Round], Rewards] | None = None
        scorer: ScoringProcess | None = None
        if args.scoring == "process":
            scorer = ScoringProcess(self._rewards, timeout=args.round_timeout)

            def score(done: Round) -> Rewards:
                return scorer(**self._to_score(done))

        supply = Supply(
            self.engine, medium, orders, self.schedule, score=score, timeout=args.round_timeout,
            vocab_size=self._vocab_size,
        )  # fmt: skip
        stack.callback(supply.close)
        if scorer is not None:  # closed first: a thread of the supply may wait for it
            stack.callback(scorer.close)
        return supply

    def _begin(self, supply: Supply) -> None:
        self._probe_rewards()
        # Before the model is prepared for mixed precision: then it could not be sent anywhere.
        supply.begin(self.model, self._eos)

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
        self._callbacks.restore(resumed.folder / checkpoints.STATE_FILE)

    def _save_if_due(self, learner: Learner, rounds_done: int, supply: Supply) -> bool:
        args = self.args
        due = self._callbacks.control.should_save or rounds_done == self._rounds
        if args.save_strategy == "no" or not due:
            return False
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
            self.state.save_to_json(str(folder / checkpoints.STATE_FILE))

        written = output / f"checkpoint-{step}"
        checkpoints.save(
            written,
            rounds_done=rounds_done,
            snapshots={**supply.snapshots, **current},
            finished=supply.finished(),
            settings=self._settings(),
            state=state,
            write_model=write_model,
        )
        checkpoints.prune(output, args.save_total_limit, written)
        return True

    def _settings(self) -> dict[str, Any]:
        """What must be equal for a run to be resumed: all that its result depends on."""
        args, prompts = self.args, self._train_prompts.ids
        return {
            **args.result_settings(),
            "rounds_ahead": self.schedule.ahead,
            "warmup_steps": args.get_warmup_steps(self._rounds * self.schedule.steps_per_round),
            "rounds": self._rounds,
            "reward_funcs": self._rewards.names,
            "train_dataset": f"{len(prompts)} prompts {zlib.crc32(repr(prompts).encode()):08x}",
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
            vocab_size=self._vocab_size,
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
            return int(rounds)
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
    def _vocab_size(self) -> int:
        return int(self.model.get_input_embeddings().num_embeddings)

    @property
    def _pad_id(self) -> int:
        # Never read where it stands for padding: masks come from lengths.
        pad = self.processing_class.pad_token_id
        return int(self._eos[0] if pad is None else pad)

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
