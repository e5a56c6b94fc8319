"""Logs to transformers' callbacks and reporters, and a bar with the time that is left."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from vineppo.config import TrainerConfig


def transformers_arguments(config: TrainerConfig) -> Any:
    """What callbacks of transformers are given.

    Make it before the accelerator, whose state it resets.
    """
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=config.output_dir,
        report_to=list(config.report_to) or "none",
        run_name=config.run_name,
        use_cpu=config.use_cpu,
        disable_tqdm=True,
        seed=config.seed,
        learning_rate=config.learning_rate,
    )


class Reporters:
    """Callbacks of transformers around our loop; they see optimizer steps as global steps.

    Args:
        config: of the trainer.
        arguments: :func:`transformers_arguments` of it.
        callbacks: the caller's own, classes or objects.
        model: the policy.
        tokenizer: of the policy.
        main: whether this process is the one that reports.
    """

    def __init__(
        self,
        config: TrainerConfig,
        arguments: Any,
        callbacks: Sequence[Any],
        model: Any,
        tokenizer: Any,
        *,
        main: bool,
    ) -> None:
        from transformers.integrations import get_reporting_integration_callbacks
        from transformers.trainer_callback import (
            CallbackHandler,
            DefaultFlowCallback,
            TrainerControl,
            TrainerState,
        )

        class Flow(DefaultFlowCallback):
            """Leaves it to the loop when to log, to save and to end."""

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:  # noqa: ARG002
                """Of transformers, which counts steps; here iterations count."""
                return control

            on_epoch_end = on_step_end

        self._args = arguments
        own = get_reporting_integration_callbacks(list(config.report_to)) if main else []
        self._handler = CallbackHandler([Flow(), *own, *callbacks], model, tokenizer, None, None)
        self.state = TrainerState(
            is_local_process_zero=main, is_world_process_zero=main, stateful_callbacks=[]
        )
        self.control = TrainerControl()
        self._iterations = config.iterations
        self._bar = _Bar(config.iterations) if config.progress and main else None
        self._running = False
        self._event("on_init_end")

    @property
    def should_stop(self) -> bool:
        """Whether a callback asks for the end of the run."""
        return bool(self.control.should_training_stop)

    def add(self, callback: Any) -> None:
        """Add a callback of transformers."""
        self._handler.add_callback(callback)

    def begin(self, iterations_done: int, steps_done: int) -> None:
        """The run starts, or goes on."""
        self.state.global_step = steps_done
        self.state.epoch = float(iterations_done)
        self.state.num_train_epochs = self._iterations
        self._running = True
        if self._bar is not None:
            self._bar.begin(iterations_done)
        self._event("on_train_begin")

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Shows what is going on."""
        if self._bar is not None:
            self._bar.say(name)
        yield

    def step_ended(self, step: int) -> None:
        """An optimizer step is done."""
        self.state.global_step = step
        self._event("on_step_end")

    def iteration_ended(
        self, iterations_done: int, metrics: Mapping[str, float], *, log: bool
    ) -> None:
        """An iteration is done; its metrics are logged if it is time."""
        self.state.epoch = float(iterations_done)
        if self._bar is not None:
            self._bar.advance(metrics)
        if log:
            self.log(metrics)

    def log(self, metrics: Mapping[str, float]) -> None:
        """Into the history and to the reporters."""
        logs = {**metrics, "epoch": self.state.epoch}
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self._event("on_log", logs=logs)

    def evaluated(self, metrics: Mapping[str, float]) -> None:
        """An evaluation is done."""
        self.log(metrics)
        self._event("on_evaluate", metrics=dict(metrics))

    def saved(self) -> None:
        """A checkpoint was written."""
        self._event("on_save")

    def end(self) -> None:
        """Let callbacks close what they opened; also after an error."""
        if self._bar is not None:
            self._bar.close()
        if self._running:
            self._running = False
            self._event("on_train_end")

    def _event(self, name: str, **values: Any) -> None:
        logs = values.pop("logs", None)
        arguments = (self._args, self.state, self.control)
        if logs is not None:
            self.control = self._handler.on_log(*arguments, logs)
        else:
            self.control = getattr(self._handler, name)(*arguments, **values)


class _Bar:
    """Iterations with the time that is left, what is going on, and the newest scores."""

    def __init__(self, iterations: int) -> None:
        self._iterations = iterations
        self._bar: Any = None
        self._stage = ""
        self._scores = ""

    def begin(self, done: int) -> None:
        from tqdm import tqdm

        self._bar = tqdm(total=self._iterations, initial=done, unit="it", dynamic_ncols=True)

    def say(self, stage: str) -> None:
        self._stage = stage
        self._show()

    def advance(self, metrics: Mapping[str, float]) -> None:
        self._scores = f"reward {metrics['reward']:.3f}"
        if self._bar is not None:
            self._bar.update()
        self._show()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _show(self) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(filter(None, (self._scores, self._stage))))
