"""transformers' callbacks, logs and reporters around our loop."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import (
    CallbackHandler,
    DefaultFlowCallback,
    PrinterCallback,
    ProgressCallback,
    TrainerControl,
    TrainerState,
)
from transformers.trainer_utils import TrainOutput

if TYPE_CHECKING:
    from asyncrlhf.config import AsyncRLHFConfig
    from asyncrlhf.learner import Learner
    from asyncrlhf.report import Report


_WATCHED: Final = frozenset(
    (
        "epoch",
        "ess",
        "eval_kl",
        "eval_ppl",
        "eval_reward",
        "kl",
        "learning_rate",
        "loss",
        "reward",
        "staleness",
        "train_runtime",
    )
)


class RoundProgress(ProgressCallback):
    """The progress bar, with who waits and when the run ends as the timing model predicts it.

    Of the logs it shows what one watches; the history and the reporters have all of them.
    """

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **rest: Any
    ) -> None:
        """Write one line above the bar."""
        shown = {name: value for name, value in (logs or {}).items() if name in _WATCHED}
        super().on_log(args, state, control, logs=shown, **rest)

    def round_ended(self, report: Report, rounds_left: int) -> None:
        """Show the prediction."""
        if self.training_bar is None:
            return
        seconds = report.remaining(rounds_left)
        end = datetime.now().astimezone() + timedelta(seconds=seconds)
        waiting = report.waiting()
        self.training_bar.set_postfix_str(f"ends {end:%H:%M:%S}, {waiting} waits")


class Callbacks:
    """State, control, and the callbacks that see them.

    Args:
        args: the settings.
        callbacks: the caller's own.
        model: the policy.
        tokenizer: of the policy.
    """

    def __init__(
        self, args: AsyncRLHFConfig, callbacks: Sequence[Any], model: Any, tokenizer: Any
    ) -> None:
        self._args = args
        self._progress = None if args.disable_tqdm else RoundProgress()
        standard = [DefaultFlowCallback, *get_reporting_integration_callbacks(args.report_to)]
        self._handler = CallbackHandler(
            [*standard, *callbacks, self._progress or PrinterCallback], model, tokenizer, None, None
        )
        self.state = self._new_state()
        self.control = TrainerControl()
        self._model = model
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._losses: list[float] = []
        self._running = False
        self.control = self._handler.on_init_end(args, self.state, self.control)

    def _new_state(self) -> Any:
        main = self._args.process_index == 0
        local = self._args.local_process_index == 0
        stateful = [c for c in self._handler.callbacks if hasattr(c, "state")]
        return TrainerState(
            is_local_process_zero=local, is_world_process_zero=main, stateful_callbacks=stateful
        )

    def add(self, callback: Any) -> None:
        """Add one."""
        self._handler.add_callback(callback)

    def begin(self, learner: Learner, steps: int, done: int) -> None:
        """The run starts, or goes on after ``done`` steps."""
        state, args = self.state, self._args
        state.max_steps = steps
        state.num_train_epochs = math.ceil(args.num_train_epochs)
        state.train_batch_size = args.per_device_train_batch_size
        state.compute_steps(args, steps)
        state.global_step = done
        self._handler.optimizer = learner.optimizer
        self._handler.lr_scheduler = learner.scheduler
        self._scheduler = learner.scheduler
        self._running = True
        self.control = self._handler.on_train_begin(args, state, self.control)

    def step_ended(self, step: int, metrics: Mapping[str, float]) -> Any:
        """An optimizer step is done: log if it is time; the control says what else to do."""
        args, state = self._args, self.state
        for name, value in metrics.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0) + 1
        if "loss" in metrics:
            self._losses.append(metrics["loss"])
        state.global_step = step
        state.epoch = args.num_train_epochs * step / max(1, state.max_steps)
        # Both wait for the end of the round, and no later step of it takes them back.
        save, stop = self.control.should_save, self.control.should_training_stop
        self.control = self._handler.on_step_end(args, state, self.control)
        self.control.should_save |= save
        self.control.should_training_stop |= stop
        if self.control.should_log:
            means = {name: total / self._counts[name] for name, total in self._sums.items()}
            rate = self._scheduler.get_last_lr()[0]
            self._sums.clear()
            self._counts.clear()
            self.log({**means, "learning_rate": rate})
        return self.control

    def log(self, metrics: Mapping[str, float]) -> None:
        """Into the history, to the bar and to the reporters."""
        logs = {**metrics, "epoch": self.state.epoch}
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self.control = self._handler.on_log(self._args, self.state, self.control, logs)

    def event(self, name: str, **values: Any) -> None:
        """Any other event of transformers' callbacks that carries metrics."""
        self.control = getattr(self._handler, name)(self._args, self.state, self.control, **values)

    def round_ended(self, report: Report, rounds_left: int) -> None:
        """A round is done."""
        if self._progress is not None:
            self._progress.round_ended(report, rounds_left)

    def saved(self) -> None:
        """A checkpoint was written."""
        self.control.should_save = False
        self.control = self._handler.on_save(self._args, self.state, self.control)

    def restore(self, path: Path) -> None:
        """Take up the state that a checkpoint holds."""
        self.state = TrainerState.load_from_json(str(path))
        self.state.is_world_process_zero = self._args.process_index == 0
        self.state.is_local_process_zero = self._args.local_process_index == 0

    def end(self, seconds: float) -> TrainOutput:
        """The run is done."""
        mean = sum(self._losses) / len(self._losses) if self._losses else 0.0
        metrics = {"train_runtime": seconds, "train_loss": mean}
        self.log(metrics)
        self.stop()
        return TrainOutput(self.state.global_step, mean, metrics)

    def stop(self) -> None:
        """Let the callbacks close what they opened; also after an error."""
        if self._running:
            self._running = False
            self.control = self._handler.on_train_end(self._args, self.state, self.control)
