"""Bad input is refused by name before work starts, and nothing is left behind."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("decapod.lm")

import numpy as np

from asyncrlhf.engines import FakeEngine, HFEngine
from asyncrlhf.errors import ActorError, InvalidInputError, RewardError, WeightUpdateError
from asyncrlhf.trainer import AsyncRLHFTrainer
from asyncrlhf.transport.segment import create

# peft asks transformers by a name that newer releases warn of.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

Make = Callable[..., AsyncRLHFTrainer]
ROWS = [{"prompt": "a b c"}, {"prompt": "b c"}, {"prompt": "c"}, {"prompt": "d"}]


def children() -> set[int]:
    """Processes that this one has started."""
    found: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # a thread that has just ended
            found |= set(map(int, (task / "children").read_text().split()))
    tracker: Any = resource_tracker._resource_tracker  # type: ignore[attr-defined]
    return found - {tracker._pid}  # serves the whole process, once it is needed


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Neither files nor memory, processes or threads."""
    segments: list[str] = []

    def noted(*args: Any) -> Any:
        segment, memory = create(*args)
        segments.append(segment.name)
        return segment, memory

    monkeypatch.setattr("asyncrlhf.transport.shared_memory.create", noted)
    before, threads = children(), set(threading.enumerate())
    yield
    assert children() <= before
    assert [name for name in segments if Path("/dev/shm", name).exists()] == []
    assert {t for t in threading.enumerate() if t.name.startswith("asyncrlhf")} <= threads
    assert not (tmp_path / "out").exists()


@pytest.fixture
def made(replay: Any, tmp_path: Path) -> Make:
    def make(engine: Any = None, **changes: Any) -> AsyncRLHFTrainer:
        parts_of = (
            "policy", "callbacks", "reward_funcs", "train_dataset", "eval_dataset", "peft_config",
            "ref_model", "processing_class", "value_model",
        )  # fmt: skip
        parts = {name: changes.pop(name) for name in parts_of if name in changes}
        args = replay.settings(tmp_path / "out", **{"logging_steps": 1, **changes})
        run: AsyncRLHFTrainer = replay.trainer(args, engine or Counting(), **parts)
        return run

    return make


class Counting(HFEngine):
    """Knows whether it was asked for anything."""

    def __init__(self, **options: Any) -> None:
        super().__init__(placement="thread", **options)
        self.generated = 0

    def generate(self, requests: Any) -> Any:
        self.generated += 1
        return super().generate(requests)


def logged(run: AsyncRLHFTrainer, name: str) -> list[float]:
    return [row[name] for row in run.state.log_history if name in row]


# --- reward functions -----------------------------------------------------------------------------


def raising(completions: list[str], **_: Any) -> list[float]:
    raise KeyError("no judge")


def nan(completions: list[str], **_: Any) -> list[float]:
    return [math.nan] * len(completions)


def infinite(completions: list[str], **_: Any) -> Any:
    return np.full(len(completions), np.inf)


def too_few(completions: list[str], **_: Any) -> list[float]:
    return [1.0] * (len(completions) - 1)


def one_number(completions: list[str], **_: Any) -> float:
    return 1.0


def nothing(completions: list[str], **_: Any) -> list[None]:
    return [None] * len(completions)


def wrong_names(texts: list[str]) -> list[float]:
    return [1.0] * len(texts)


BAD = (raising, nan, infinite, too_few, one_number, nothing, wrong_names)


@pytest.mark.parametrize("function", BAD)
def test_a_reward_function_that_cannot_work_is_found_before_the_first_round(
    made: Make, function: Any
) -> None:
    run = made(reward_funcs=function)
    with pytest.raises(RewardError, match=function.__name__):
        run.train()
    assert run.engine.generated == 0
    assert run.state.global_step == 0


def late(after: int, bad: Any) -> Callable[..., Any]:
    """A reward function that becomes bad after so many calls."""
    calls = 0

    def turning(completion_ids: list[list[int]], **columns: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > after:
            return bad(**columns)
        return [float(sum(ids)) for ids in completion_ids]

    return turning


@pytest.mark.parametrize("function", [raising, nan, too_few])
def test_a_reward_function_that_fails_later_ends_the_run(made: Make, function: Any) -> None:
    run = made(reward_funcs=late(3, function))
    with pytest.raises(RewardError, match="turning"):
        run.train()
    assert run.state.global_step == 2  # a call was the probe


@pytest.mark.parametrize("loss", ["online_dpo", "ppo", "grpo"])
def test_failed_scores_are_left_out_and_reported(made: Make, caplog: Any, loss: str) -> None:
    def sometimes(completion_ids: list[list[int]], **_: Any) -> list[float]:
        scores = [float(sum(ids)) for ids in completion_ids]
        scores[0] = math.nan
        scores[5] = math.inf
        return scores

    run = made(reward_funcs=sometimes, on_reward_error="drop", loss=loss)
    output = run.train()
    assert output.global_step == 6
    assert logged(run, "reward/failed") == [2] * 6
    told = [r.getMessage() for r in caplog.records if r.name == "asyncrlhf.trainer"]
    assert len(told) == 12
    assert told[0].startswith("round 0: reward function sometimes: expected a finite number")
    assert all(math.isfinite(value) for value in logged(run, "loss") + logged(run, "reward"))


def test_what_failed_has_no_part_in_what_is_learnt(replay: Any, made: Make) -> None:
    """With the second of four prompts failed, its completions may be anything."""

    def failing(value: float) -> Callable[..., list[float]]:
        def score(completion_ids: list[list[int]], **_: Any) -> list[Any]:
            scores = [float(sum(ids)) for ids in completion_ids]
            scores[2:4] = [value, math.nan]
            return scores

        return score

    ends = []
    for value in (-1e6, 1e6):
        run = made(reward_funcs=failing(value), on_reward_error="drop", max_steps=2)
        run.train()
        ends.append(replay.digest(run.model))
    assert ends[0] == ends[1]


@pytest.mark.parametrize("loss", ["online_dpo", "ppo", "best_of_k"])
@pytest.mark.parametrize("function", [raising, nan, too_few])
def test_a_round_without_any_score_teaches_nothing_and_goes_on(
    replay: Any, made: Make, function: Any, loss: str
) -> None:
    run = made(reward_funcs=function, on_reward_error="drop", loss=loss, max_steps=3)
    assert run.train().global_step == 3
    assert logged(run, "reward/failed") == [8] * 3
    assert logged(run, "loss") == [0] * 3
    assert replay.digest(run.model) == replay.digest(replay.model())


def test_a_reward_that_cannot_be_sent_to_its_process_is_refused_by_name(made: Make) -> None:
    lock = threading.Lock()

    def guarded(completions: list[str], **_: Any) -> list[float]:
        with lock:
            return [1.0] * len(completions)

    with pytest.raises(InvalidInputError, match=r"reward_funcs: guarded: .*lock.*keep it in") as c:
        made(reward_funcs=[raising, guarded], scoring="process")
    assert "guarded" in str(c.value)
    made(reward_funcs=guarded, scoring="learner").train()


def test_no_reward_function_is_refused(made: Make) -> None:
    with pytest.raises(InvalidInputError, match="reward_funcs"):
        made(reward_funcs=[])


# --- data -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "train_dataset: expected at least one row, got none"),
        (None, "train_dataset: expected rows with a column 'prompt', got none"),
        ([{"question": "a"}], r"train_dataset: row 0 has neither 'prompt' .*\['question'\]"),
        ([*ROWS, {"prompt": ""}], "train_dataset: the prompt of row 4 is empty"),
        ([*ROWS, {"prompt": "a b c d e f g"}], "train_dataset: the prompt of row 4 has 13 tokens"),
        ([*ROWS, {"prompt_ids": []}], "train_dataset: the prompt of row 4 is empty"),
        ([*ROWS, {"prompt_ids": [3, 99]}], r"train_dataset: the prompt of row 4 .* 99"),
        ([*ROWS, {"prompt_ids": [-1]}], r"train_dataset: the prompt of row 4 .* -1"),
    ],
)
def test_bad_prompts_are_named_with_their_row(made: Make, rows: Any, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        made(train_dataset=rows)


def test_a_prompt_that_just_fits_is_taken(made: Make) -> None:
    # 16 positions, 5 of them for the answer.
    made(train_dataset=[{"prompt_ids": [3] * 11}] * 4).train()
    with pytest.raises(InvalidInputError, match=r"row 0 has 12 tokens; at most 11 leave room"):
        made(train_dataset=[{"prompt_ids": [3] * 12}] * 4)
    with pytest.raises(InvalidInputError, match=r"row 0 has 11 tokens; at most 10 "):
        made(train_dataset=[{"prompt_ids": [3] * 11}] * 4, max_prompt_length=10)


def test_bad_prompts_of_the_evaluation_set_are_named_too(made: Make) -> None:
    with pytest.raises(InvalidInputError, match="eval_dataset: row 0 has neither"):
        made(eval_dataset=[{"text": "a"}])


def test_fewer_prompts_than_one_round_are_refused(made: Make) -> None:
    with pytest.raises(InvalidInputError, match=r"one round takes 8 prompts.*of 4 rows are fewer"):
        made(
            train_dataset=ROWS, max_steps=-1, num_train_epochs=1, minibatches_per_round=2,
        )  # fmt: skip
    assert (
        made(train_dataset=ROWS, max_steps=-1, num_train_epochs=2, minibatches_per_round=2).rounds
        == 1
    )


def test_a_tokenizer_without_an_end_is_refused(replay: Any, made: Make) -> None:
    tokenizer, model = replay.tokenizer(), replay.model()
    tokenizer.eos_token = None
    model.generation_config.eos_token_id = None
    with pytest.raises(InvalidInputError, match=r"no EOS token.*set tokenizer.eos_token"):
        made(processing_class=tokenizer, policy=model)


def test_the_models_end_stands_in_for_that_of_the_tokenizer(replay: Any, made: Make) -> None:
    tokenizer, model = replay.tokenizer(), replay.model()
    tokenizer.eos_token = None
    model.generation_config.eos_token_id = [2, 3]
    made(processing_class=tokenizer, policy=model).train()


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "dpo"}, "loss: expected one of online_dpo, .*got 'dpo'"),
        ({"rounds_ahead": -1}, "ahead: .*-1"),
        ({"minibatches_per_round": 0}, "minibatches: .*0"),
        ({"epochs_per_round": 0}, "epochs: .*0"),
        ({"num_generations": 1}, "num_generations: online_dpo .*at least 2, got 1"),
        ({"num_generations": 0, "loss": "ppo"}, "num_generations: .*at least 1, got 0"),
        ({"max_steps": 7, "minibatches_per_round": 3}, "max_steps: .*multiple of the 3 .*9 is one"),
        ({"max_staleness": 2, "minibatches_per_round": 4}, "max_staleness: .*at least 3, got 2"),
        ({"max_staleness": -1}, "max_staleness: .*at least 0, got -1"),
        (
            {"max_staleness": 3, "minibatches_per_round": 4, "stale_policy": "drop"},
            "max_staleness: .*4, got 3; every minibatch would be staler",
        ),
        ({"stale_policy": "wait"}, "stale_policy: expected one of block, drop, got 'wait'"),
        ({"is_correction": "truncate_token"}, "is_correction: online_dpo has no importance ratio"),
        ({"is_correction": "tis", "loss": "ppo"}, "is_correction: expected one of truncate_token"),
        ({"temperature": 0.0}, "temperature: expected a number above 0, got 0"),
        ({"temperature": math.nan}, "temperature: expected a number above 0, got nan"),
        ({"beta": 0.0}, "beta: expected a number above 0"),
        ({"kl_coef": -0.1}, "kl_coef: expected at least 0"),
        ({"lam": 1.1}, "lam: expected a number from 0 to 1"),
        ({"scoring": "thread"}, "scoring: expected one of learner, process"),
        ({"on_reward_error": "ignore"}, "on_reward_error: expected one of raise, drop"),
        ({"max_completion_length": 0}, "max_completion_length: expected a number above 0"),
        ({"round_timeout": 0}, "round_timeout: expected a number above 0"),
        ({"save_strategy": "epoch"}, "save_strategy: expected one of no, steps, got 'epoch'"),
        ({"eval_strategy": "epoch"}, "eval_strategy: expected one of no, steps, got 'epoch'"),
        ({"logging_strategy": "epoch"}, "logging_strategy: expected one of no, steps"),
        ({"eval_strategy": "steps", "eval_steps": 1}, "eval_dataset: expected one, because"),
        ({"reward_weights": [1.0, 2.0]}, "reward_weights: expected one for each of 1"),
    ],
)
def test_bad_settings_are_refused_by_name(
    made: Make, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidInputError, match=message):
        made(**changes)


def test_a_reference_that_is_the_model_is_refused(replay: Any, made: Make) -> None:
    model = replay.model()
    with pytest.raises(InvalidInputError, match="ref_model: it is the very model"):
        made(policy=model, ref_model=model)
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    with pytest.raises(InvalidInputError, match="ref_model: it is the very model"):
        made(policy=model, ref_model=model, peft_config=config)


def test_evaluating_without_data_is_refused(made: Make) -> None:
    with pytest.raises(InvalidInputError, match="eval_dataset: expected one"):
        made().evaluate()


def test_an_unknown_number_format_of_the_actor_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="dtype: expected one of torch, got 'bf8'"):
        HFEngine(dtype="bf8")


# --- engines and callbacks ------------------------------------------------------------------------


def test_an_engine_of_another_model_is_refused_before_it_generates(replay: Any, made: Make) -> None:
    from decapod.lm import build_model

    class Other(Counting):
        def attach(self, _: Any, eos_token_ids: Any) -> None:
            other = build_model(len(replay.tokenizer()), hidden_size=8, layers=1, heads=2)
            super().attach(other, eos_token_ids)

    run = made(Other())
    with pytest.raises(WeightUpdateError, match="expected shape") as caught:
        run.train()
    assert "while round 0 was generated" in caught.value.__notes__
    assert run.engine.generated == 0


def test_tokens_that_the_model_does_not_have_are_refused(made: Make) -> None:
    run = made(FakeEngine(vocab_size=16))
    with pytest.raises(ActorError, match=r"round 0: .*token 1[345] of 13"):
        run.train()


def test_an_engine_that_gives_too_little_is_refused(made: Make) -> None:
    class Short(Counting):
        def generate(self, requests: Any) -> Any:
            return super().generate(requests[:-1])

    run = made(Short())
    with pytest.raises(ActorError, match=r"round 0: .*8 completions.*got 7"):
        run.train()


@pytest.mark.parametrize("event", ["on_train_begin", "on_step_end", "on_log", "on_train_end"])
def test_a_callback_that_raises_leaves_nothing_behind(replay: Any, made: Make, event: str) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("callback")

    callback = type("Failing", (replay.TrainerCallback,), {event: fail})()
    run = made(callbacks=[callback])
    with pytest.raises(OSError, match="callback"):
        run.train()


def test_a_loss_that_is_not_finite_ends_the_run(made: Make) -> None:
    def huge(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [1e38 * (i % 2) * 3 for i in range(len(completion_ids))]

    run = made(reward_funcs=huge, loss="rloo")
    with pytest.raises(FloatingPointError, match=r"step \d: the loss is .*look for non-finite"):
        run.train()
