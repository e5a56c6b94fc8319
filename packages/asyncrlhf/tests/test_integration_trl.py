from __future__ import annotations

import asyncio
import contextlib
import inspect
import io
import math
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from asyncrlhf.errors import (
    ActorError,
    InvalidInputError,
    MissingExtraError,
    RewardError,
    WaitTimeoutError,
    WeightUpdateError,
)
from asyncrlhf.integrations import trl_contract

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # read when TRL is imported
pytest.importorskip("trl")
pytest.importorskip("decapod.lm")

from accelerate.state import PartialState
from datasets import Dataset
from transformers import MistralConfig, MistralForCausalLM
from trl.experimental.async_grpo import AsyncGRPOConfig, async_rollout_worker
from trl.experimental.async_grpo import async_grpo_trainer as theirs
from trl.experimental.async_grpo.packing import TreeRow

from asyncrlhf.engines import FakeEngine, HFEngine, VersionSpan
from asyncrlhf.engines.protocol import Completion
from asyncrlhf.integrations import trl_portable, trl_scoring
from asyncrlhf.integrations.trl_async_grpo import (
    EngineRolloutWorker,
    EngineWeightTransfer,
    TRLContractError,
    check_contract,
    portable_trainer,
)
from asyncrlhf.transport.shared_memory import SharedMemory
from asyncrlhf.transport.snapshot import checksum
from decapod.lm import build_model, build_tokenizer

pytestmark = [
    # TRL and PEFT use a name that transformers 5.23 calls old.
    pytest.mark.filterwarnings("ignore:.(is_)?gradient_checkpointing. is deprecated:FutureWarning"),
]
PAGE = Path(__file__).parents[3] / "docs" / "pages" / "asyncrlhf" / "trl.md"
PROMPTS = [{"prompt": "ab"}, {"prompt": "cd"}, {"prompt": "ef"}]
TOKENIZER = build_tokenizer(["abcdef"], chat=True)


def length_of(completions: list[Any], **_: Any) -> list[float]:
    return [float(len(completion)) for completion in completions]


def settings(folder: Path, **changes: Any) -> AsyncGRPOConfig:
    return AsyncGRPOConfig(
        str(folder / "out"),
        **{
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "num_generations": 4,
            "max_completion_length": 6,
            "max_staleness": 1,
            "token_budget": 0,
            "learning_rate": 1e-2,
            "use_cpu": True,
            "bf16": False,
            "report_to": "none",
            "save_strategy": "no",
            "logging_strategy": "no",
            "disable_tqdm": True,
            **changes,
        },
    )


class Loop:
    """Calls the plug-ins in the order in which TRL's trainer does, with training left out."""

    def __init__(self, folder: Path, engine: Any, *, read_ahead: int = 0, **changes: Any) -> None:
        mine = ("replayable", "groups_per_call", "first_group", "reward_funcs", "dataset")
        options = {name: changes.pop(name) for name in mine if name in changes}
        args = settings(folder, **changes)
        self.samples_per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps
        self.max_staleness = args.max_staleness
        self.read_ahead = read_ahead
        self.weights = EngineWeightTransfer(args)
        self.worker = EngineRolloutWorker(
            engine,
            self.weights,
            args=args,
            processing_class=TOKENIZER,
            **{"reward_funcs": length_of, "dataset": PROMPTS, **options},
        )
        self.parameters = {"w": torch.zeros(3)}
        self.version = 0
        self.taken: list[Any] = []
        self.trained: list[tuple[int, Any]] = []

    def __enter__(self) -> Loop:
        self.weights.init_weight_transfer()
        self.sync()
        self.worker.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.worker.stop()
        self.weights.destroy()

    def sync(self) -> None:
        self.weights.pause()
        self.weights.send_weights(iter(self.parameters.items()))
        self.weights.resume()
        self.version += 1
        self.worker.update_model_version(self.version)

    def take(self, count: int) -> None:
        while len(self.taken) < count:
            self.taken.append(self.worker.rollout_buffer.get(timeout=30))

    def step(self, seconds: float = 0.0) -> None:
        done = len(self.trained)
        self.take(done + self.samples_per_step + self.read_ahead)
        for sample in self.taken[done : done + self.samples_per_step]:
            self.trained.append((self.version, sample))
        time.sleep(seconds)
        self.parameters["w"] += 1
        self.sync()


# --- the real trainer ----------------------------------------------------------------------------


def blocks(language: str) -> list[str]:
    text = PAGE.read_text(encoding="utf-8")
    return [part.split("```")[0] for part in text.split(f"```{language}\n")[1:]]


def test_the_page_runs_and_says_what_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for block in blocks("python"):
            exec(compile(block, str(PAGE), "exec"), {"__name__": "page"})  # noqa: S102
    for expected in blocks("text"):
        assert expected in printed.getvalue()


class Slowed:
    """An engine that takes now and then longer."""

    def __init__(self, engine: Any, seed: int) -> None:
        self.engine, self.random = engine, random.Random(seed)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def generate(self, requests: Any) -> Iterator[Completion]:
        time.sleep(self.random.choice([0.0, 0.0, 0.15]))
        return self.engine.generate(requests)


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., Any]:
    model = build_model(len(TOKENIZER), hidden_size=16, heads=2, max_positions=32, init_std=0.1)
    model.save_pretrained(tmp_path / "tiny")
    TOKENIZER.save_pretrained(tmp_path / "tiny")

    def run(
        engine: Any = None,
        *,
        replayable: bool = True,
        transport: Any = None,
        peft_config: Any = None,
        **changes: Any,
    ) -> Any:
        args = settings(tmp_path, **changes)
        if engine is None:
            engine = HFEngine("cpu", "inline")
        if isinstance(getattr(engine, "engine", engine), HFEngine):
            engine.attach(model, [TOKENIZER.eos_token_id])
        weights = EngineWeightTransfer(args, transport)
        worker = EngineRolloutWorker(
            engine,
            weights,
            args=args,
            dataset=PROMPTS,
            processing_class=TOKENIZER,
            reward_funcs=length_of,
            replayable=replayable,
        )
        trainer = portable_trainer(
            model=str(tmp_path / "tiny"),
            args=args,
            train_dataset=Dataset.from_list(PROMPTS),
            processing_class=TOKENIZER,
            rollout_worker=worker,
            weight_transfer=weights,
            peft_config=peft_config,
        )
        trainer.plugged_in = worker, weights
        return trainer

    return run


def test_a_training_repeats_bit_for_bit_however_long_generation_takes(
    train: Callable[..., Any],
) -> None:
    results = []
    for seed in range(3):
        trainer = train(Slowed(HFEngine("cpu", "inline"), seed))
        trainer.train()
        worker, _ = trainer.plugged_in
        assert worker.gate.counts.late == 0
        results.append(checksum(trainer.model.named_parameters()))
    assert len(set(results)) == 1


@pytest.mark.parametrize("replayable", [True, False])
def test_trl_never_finds_a_sample_that_is_too_stale(
    train: Callable[..., Any], replayable: bool
) -> None:
    trainer = train(
        replayable=replayable,
        max_steps=6,
        max_staleness=2,
        weight_sync_steps=2,
        logging_strategy="steps",
        logging_steps=1,
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "ratio" in entry]
    assert len(logs) == 6
    assert max(entry["sample/staleness_max"] for entry in logs) <= 2
    assert not any("sample/dropped_stale_total" in entry for entry in logs)
    worker, weights = trainer.plugged_in
    assert worker.gate.counts.late == 0
    assert weights.version == trainer.model_version == 1 + 6 // 2


class Recording:
    """A transport that keeps everything."""

    def __init__(self) -> None:
        self.inner = SharedMemory(2)
        self.published: list[dict[str, torch.Tensor]] = []

    def publish(self, weights: Any, version: int) -> Any:
        snapshot = self.inner.publish(weights, version)
        self.published.append({name: value.clone() for name, value in snapshot})
        return snapshot

    def close(self) -> None:
        self.inner.close()


def test_an_adapter_is_published_merged_into_the_weights_of_the_engine(
    train: Callable[..., Any],
) -> None:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    transport = Recording()
    trainer = train(transport=transport, peft_config=lora, logging_strategy="steps")
    trainer.train()
    transport.close()  # its maker's, so it was still open
    first, last = transport.published[0], transport.published[-1]
    assert len(transport.published) == 1 + 4
    changed = {name for name in first if not torch.equal(first[name], last[name])}
    assert changed == {f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)}
    with torch.no_grad():
        trainer.model.merge_adapter()
        for name in changed:
            own = trainer.model.get_base_model().get_parameter(
                name.replace("q_proj", "q_proj.base_layer")
            )
            assert torch.equal(own, last[name])
    ratios = [entry["ratio"] for entry in trainer.state.log_history if "ratio" in entry]
    assert ratios[0] == pytest.approx(1, abs=1e-4)


WITH_TWO_PROCESSES = """
import os, sys, torch
from datasets import Dataset
from decapod.lm import build_tokenizer
from transformers import AutoModelForCausalLM
from trl.experimental.async_grpo import AsyncGRPOConfig
from asyncrlhf.engines import HFEngine
from asyncrlhf.integrations.trl_async_grpo import *
from asyncrlhf.transport.snapshot import checksum

torch.set_num_threads(1)
folder = sys.argv[1]
tokenizer = build_tokenizer(["abcdef"], chat=True)
prompts = Dataset.from_dict({"prompt": ["ab", "cd", "ef"]})
args = AsyncGRPOConfig(
    folder + "/out", max_steps=3, per_device_train_batch_size=4, num_generations=4,
    max_completion_length=6, max_staleness=1, token_budget=0, learning_rate=1e-2, use_cpu=True,
    bf16=False, report_to="none", save_strategy="no", disable_tqdm=True,
)
weights = EngineWeightTransfer(args)
worker = None
if os.environ["RANK"] == "0":
    engine = HFEngine("cpu", "inline")
    engine.attach(AutoModelForCausalLM.from_pretrained(folder + "/tiny"), [2])
    worker = EngineRolloutWorker(
        engine, weights, args=args, dataset=prompts, processing_class=tokenizer,
        reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
    )
trainer = portable_trainer(
    model=folder + "/tiny", args=args, train_dataset=prompts, processing_class=tokenizer,
    rollout_worker=worker, weight_transfer=weights,
)
trainer.train()
found = checksum(trainer.accelerator.unwrap_model(trainer.model).named_parameters())
with open(f"{folder}/rank{os.environ['RANK']}", "w") as file:
    file.write(f"{found} {trainer.state.global_step} {worker.gate.batch_size if worker else 0}")
"""


@pytest.mark.slow
def test_several_trainer_processes_share_one_worker(
    train: Callable[..., Any], tmp_path: Path
) -> None:
    assert train  # which has saved the model
    script = tmp_path / "script.py"
    script.write_text(WITH_TWO_PROCESSES)
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
    ]
    subprocess.run(
        [*launch, str(script), str(tmp_path)],
        check=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
    )
    ranks = [(tmp_path / f"rank{rank}").read_text().split() for rank in range(2)]
    assert ranks[0][:2] == ranks[1][:2]
    assert ranks[0][1:] == ["3", "2"]  # two processes, twice the groups of a step


def test_a_failing_engine_ends_the_training_with_its_error(train: Callable[..., Any]) -> None:
    trainer = train(FakeEngine(fail_at=[2], vocab_size=len(TOKENIZER)))
    with pytest.raises(ActorError, match=r"the rollout worker failed.*was to fail") as caught:
        trainer.train()
    assert "EngineError" in type(caught.value.__cause__).__name__
    assert trainer.state.global_step >= 1
    worker, _ = trainer.plugged_in
    assert not worker._thread.is_alive()


def test_a_second_training_is_refused_instead_of_waiting(train: Callable[..., Any]) -> None:
    trainer = train(FakeEngine(vocab_size=len(TOKENIZER)), max_steps=1)
    trainer.train()
    worker, _ = trainer.plugged_in
    with pytest.raises(ActorError, match="does not run"):
        worker.check_health(300)
    with pytest.raises(ActorError, match="make worker, weight transfer and trainer anew"):
        worker.start()


# --- staleness, provenance, replay ---------------------------------------------------------------


@pytest.mark.parametrize("replayable", [True, False])
@pytest.mark.parametrize(
    ("max_staleness", "seconds", "latency"), [(1, 0.0, 0.01), (2, 0.01, 0.0), (3, 0.004, 0.004)]
)
def test_staleness_at_the_step_stays_within_the_bound(
    tmp_path: Path, replayable: bool, max_staleness: int, seconds: float, latency: float
) -> None:
    loop = Loop(
        tmp_path,
        FakeEngine(latency, vocab_size=len(TOKENIZER)),
        read_ahead=4,
        replayable=replayable,
        max_staleness=max_staleness,
        groups_per_call=1,
    )
    with loop:
        for _ in range(8):
            loop.step(seconds)
    staleness = [version - sample.model_version for version, sample in loop.trained]
    assert min(staleness) >= 0
    assert max(staleness) <= max_staleness
    assert [s.group_id for _, s in loop.trained] == [i // 4 for i in range(8 * 8)]
    if replayable:  # as stale as the bound allows, once it can be
        assert staleness == [min(i // 8, max_staleness) for i in range(8 * 8)]


def test_samples_carry_the_log_probabilities_of_the_version_that_they_name(tmp_path: Path) -> None:
    model = build_model(len(TOKENIZER), hidden_size=16, heads=2, max_positions=32, init_std=0.1)
    engine = HFEngine("cpu", "inline")
    engine.attach(model, [TOKENIZER.eos_token_id])
    loop = Loop(tmp_path, engine, replayable=False, temperature=0.7)
    loop.parameters = {name: value.detach().clone() for name, value in model.named_parameters()}
    loop.parameters["w"] = loop.parameters.pop("model.norm.weight")  # what a step changes
    at_version = {}

    def named() -> dict[str, torch.Tensor]:
        found = dict(loop.parameters)
        found["model.norm.weight"] = found.pop("w")
        at_version[loop.version + 1] = {name: v.clone() for name, v in found.items()}
        return found

    plain = loop.weights.send_weights
    loop.weights.send_weights = lambda _: plain(iter(named().items()))  # type: ignore[method-assign]
    with loop:
        for _ in range(3):
            loop.step()
    assert len({sample.model_version for _, sample in loop.trained}) > 1
    for _, sample in loop.trained:
        model.load_state_dict(at_version[sample.model_version], strict=False)
        ids = torch.from_numpy(sample.input_ids)[None]
        with torch.no_grad():
            logps = (model(ids).logits[0, :-1].double() / 0.7).log_softmax(-1)
        logps = logps.gather(-1, ids[0, 1:, None])[:, 0]
        mask = torch.from_numpy(sample.completion_mask).bool()
        torch.testing.assert_close(
            torch.from_numpy(sample.old_log_probs).double()[mask], logps[mask[1:]],
            atol=1e-5, rtol=0,
        )  # fmt: skip
        assert not sample.old_log_probs[~mask.numpy()].any()


def test_a_run_can_go_on_where_another_ended(tmp_path: Path) -> None:
    def stream(first: int, count: int) -> list[tuple[int, list[int]]]:
        loop = Loop(tmp_path, FakeEngine(vocab_size=len(TOKENIZER)), first_group=first)
        with loop:
            loop.take(count)
        return [(sample.group_id, sample.input_ids.tolist()) for sample in loop.taken]

    whole = stream(0, 16)
    assert stream(2, 8) == whole[8:]
    assert len({tuple(ids) for _, ids in whole}) > 8  # the members of a group differ


def test_no_group_begins_with_the_newest_weights_while_they_are_replaced(tmp_path: Path) -> None:
    weights = EngineWeightTransfer(settings(tmp_path))
    weights.init_weight_transfer()
    weights.send_weights(iter({"w": torch.zeros(2)}.items()))
    weights.pause()
    with pytest.raises(WaitTimeoutError, match="the trainer to resume"):
        weights.newest(0.01)
    assert weights.at(1).version == 1
    weights.send_weights(iter({"w": torch.ones(2)}.items()))
    weights.resume()
    assert weights.newest(0.0).version == 2
    for version in (3, 4):
        weights.send_weights(iter({"w": torch.ones(2)}.items()))
        assert weights.version == version
    with pytest.raises(WeightUpdateError, match=r"expected one of \[3, 4\]"):
        weights.at(2)
    weights.destroy()
    weights.destroy()
    with pytest.raises(WeightUpdateError, match="init_weight_transfer"):
        weights.send_weights(iter(()))


# --- nothing hangs -------------------------------------------------------------------------------


def raises(**_: Any) -> list[float]:
    raise KeyError("solution")


def too_few(**_: Any) -> list[float]:
    return [1.0]


@pytest.mark.parametrize(
    ("engine", "reward", "cause", "message"),
    [
        ({"fail_at": [0]}, length_of, None, "call 0"),
        ({"fail_load_at": [0]}, length_of, WeightUpdateError, "load 0"),
        ({}, raises, RewardError, "raises raised KeyError"),
        ({}, too_few, RewardError, "too_few: expected 4 values.*got 1"),
    ],
)
def test_errors_of_the_thread_reach_who_waits_for_samples(
    tmp_path: Path, engine: dict[str, Any], reward: Any, cause: Any, message: str
) -> None:
    fake = FakeEngine(vocab_size=len(TOKENIZER), **engine)
    with Loop(tmp_path, fake, reward_funcs=reward) as loop:
        for _ in range(2):  # and whoever asks again
            with pytest.raises(ActorError, match=message) as caught:
                loop.take(1)
        assert cause is None or isinstance(caught.value.__cause__, cause)
        with pytest.raises(ActorError, match=message):
            loop.worker.check_health(300)


def test_an_engine_that_gives_too_few_completions_is_an_error(tmp_path: Path) -> None:
    class Short(FakeEngine):
        def generate(self, requests: Any) -> Iterator[Completion]:
            yield from list(super().generate(requests))[:-1]

    with Loop(tmp_path, Short(vocab_size=len(TOKENIZER))) as loop:
        loop.take(4)
        with pytest.raises(ActorError, match="expected 8, got 7"):
            loop.take(8)


def test_a_wait_of_both_sides_for_each_other_is_found(tmp_path: Path) -> None:
    with Loop(tmp_path, FakeEngine(vocab_size=len(TOKENIZER))) as loop:
        loop.take(16)  # as if TRL had thrown them away
        wait_for(lambda: loop.worker._at_gate)
        with pytest.raises(ActorError, match="4 groups were delivered, and 0 weight updates"):
            loop.worker.check_health(300)


def test_silence_of_the_engine_is_found_and_stopping_does_not_hang(tmp_path: Path) -> None:
    hold = threading.Event()

    class Hung(FakeEngine):
        def generate(self, requests: Any) -> Iterator[Completion]:
            hold.wait(20)
            return super().generate(requests)

    loop = Loop(tmp_path, Hung(vocab_size=len(TOKENIZER)))
    loop.worker._stop_timeout = 0.05
    with loop:
        wait_for(lambda: not loop.worker._at_gate)
        loop.worker.check_health(300)
        time.sleep(0.02)
        with pytest.raises(ActorError, match="no sign of life"):
            loop.worker.check_health(0.01)
    assert loop.worker._thread is not None
    assert loop.worker._thread.is_alive()  # said in the log
    hold.set()
    loop.worker._thread.join(10)
    assert not loop.worker._thread.is_alive()


def test_plugins_of_different_trainers_are_noticed(tmp_path: Path) -> None:
    loop = Loop(tmp_path, FakeEngine())
    with pytest.raises(ActorError, match="another weight transfer"):
        loop.worker.start()
    with pytest.raises(InvalidInputError, match=r"expected 0, .*got 1"):
        loop.worker.update_model_version(1)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# --- rewards and samples, against TRL's own worker -----------------------------------------------


def of_columns(
    prompts: Any, completions: Any, completion_ids: Any, wanted: Any, **_: Any
) -> list[float | None]:
    assert len(prompts) == len(completions) == len(completion_ids) == len(wanted)
    values: list[float | None] = [
        w + len(ids) for w, ids in zip(wanted, completion_ids, strict=True)
    ]
    return [values[0], None, *values[2:]]


async def later(completions: Any, **_: Any) -> list[float | None]:
    await asyncio.sleep(0)
    return [None if i < 2 else len(message[0]["content"]) for i, message in enumerate(completions)]


def nothing(completions: Any, **_: Any) -> list[None]:
    return [None] * len(completions)


@pytest.mark.parametrize("funcs", [[of_columns], [of_columns, later], [nothing], [nothing, later]])
def test_samples_equal_those_of_trls_own_worker(funcs: list[Any]) -> None:
    PartialState()  # for TRL's logger
    row = {"prompt": [{"role": "user", "content": "ab"}], "wanted": 0.5}
    prompt_ids = (5, 7, 8, 2, 6)
    texts = ("a", "bc", "def", "")
    completions = tuple(
        Completion(tuple(range(7, 7 + n)), (-0.5,) * n, (VersionSpan(0, n, 3 + n),), "length", n)
        for n in range(1, 5)
    )
    group = trl_scoring.Group(11, row, prompt_ids, completions, texts)
    ours = trl_scoring.samples(
        group, trl_scoring.rewards(group, trl_scoring.checked_rewards(funcs))
    )

    messages = [[{"role": "assistant", "content": text}] for text in texts]
    turns = [
        async_rollout_worker.TurnRecord(list(prompt_ids), list(c.ids), list(c.logprobs))
        for c in completions
    ]
    expected = asyncio.run(
        async_rollout_worker._AsyncRolloutLoop._score_group(
            SimpleNamespace(
                reward_funcs=funcs,
                reward_func_names=[func.__name__ for func in funcs],
                _env_reward_types=[],
                _provides_rollout_reward=False,
            ),
            async_rollout_worker.RolloutGroup(
                prompts=[row["prompt"]] * 4,
                reward_kwargs={"wanted": [0.5] * 4},
                completions=messages,
                completions_ids=[list(c.ids) for c in completions],
                completions_sequences=[
                    async_rollout_worker._chain_to_sequences([turn], "", 1024)[0] for turn in turns
                ],
                tool_call_counts=[0] * 4,
                tool_failure_counts=[0] * 4,
                model_version=4,
                group_id=11,
                env_rewards=[None] * 4,
                rollout_rewards=[None] * 4,
            ),
        )
    )
    for mine, his in zip(ours, expected, strict=True):
        for name in ("prompt", "completion", "model_version", "group_id", "advantage"):
            assert getattr(mine, name) == getattr(his, name), name
        for name in ("input_ids", "completion_mask", "old_log_probs"):
            np.testing.assert_array_equal(getattr(mine, name), getattr(his, name))
            assert getattr(mine, name).dtype == getattr(his, name).dtype
        assert mine.metrics.keys() == his.metrics.keys()
        np.testing.assert_array_equal(list(mine.metrics.values()), list(his.metrics.values()))


def test_prompts_that_are_texts_give_texts_to_rewards(tmp_path: Path) -> None:
    seen: list[Any] = []

    def look(prompts: Any, completions: Any, **_: Any) -> list[float]:
        seen.append((prompts[0], completions))
        return [0.0] * len(prompts)

    engine = FakeEngine(vocab_size=len(TOKENIZER))
    chat = [{"prompt": [{"role": "user", "content": "cd"}]}]
    with Loop(tmp_path, engine, reward_funcs=look, dataset=[PROMPTS[0], *chat]) as loop:
        loop.take(8)
    assert seen[0][0] == "ab"
    assert all(isinstance(completion, str) for completion in seen[0][1])
    assert [message["role"] for (message,) in seen[1][1]] == ["assistant"] * 4
    prompt = TOKENIZER("ab")["input_ids"]
    assert loop.taken[0].input_ids[: len(prompt)].tolist() == prompt
    rendered = TOKENIZER.apply_chat_template(chat[0]["prompt"], add_generation_prompt=True)
    rendered = rendered["input_ids"] if not isinstance(rendered, list) else rendered
    assert loop.taken[4].input_ids[: len(rendered)].tolist() == rendered


# --- the contract --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "protocol"),
    [
        (EngineRolloutWorker, theirs.RolloutWorkerProtocol),
        (EngineWeightTransfer, theirs.WeightTransferProtocol),
    ],
)
def test_plugins_have_every_method_of_trls_protocols_with_its_arguments(
    ours: Any, protocol: Any
) -> None:
    methods = {n: m for n, m in vars(protocol).items() if inspect.isfunction(m) and n[0] != "_"}
    assert methods
    for name, method in methods.items():
        if name.startswith("_"):
            continue
        asked = list(inspect.signature(method).parameters)
        assert list(inspect.signature(getattr(ours, name)).parameters) == asked, name


def test_the_worker_has_the_queues_that_trl_reads(tmp_path: Path) -> None:
    worker = Loop(tmp_path, FakeEngine()).worker
    for name in theirs.RolloutWorkerProtocol.__annotations__:
        queue = getattr(worker, name)
        assert all(callable(getattr(queue, method)) for method in ("get", "put_nowait", "qsize"))


@pytest.mark.parametrize("version", ["1.15.4", "1.17.0", "1.160.0", "2.0.0"])
def test_another_release_of_trl_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr(metadata, "version", lambda _: version)
    with pytest.raises(TRLContractError, match=rf'got {version}; pip install "trl>=1.16,<1.17"'):
        check_contract()


def test_a_missing_trl_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(MissingExtraError, match=r"asyncrlhf\[trl\]"):
        EngineWeightTransfer(settings(tmp_path))


def test_a_changed_protocol_is_refused_with_what_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    class RolloutWorkerProtocol:
        rollout_buffer: Any

        def start(self) -> None: ...

        def stop(self, timeout: float) -> None: ...

        def update_model_version(self, model_version: int) -> None: ...

        def check_health(self, stale_after_s: float) -> None: ...

        def drain(self) -> None: ...

    monkeypatch.setattr(theirs, "RolloutWorkerProtocol", RolloutWorkerProtocol)
    with pytest.raises(TRLContractError) as caught:
        check_contract()
    message = str(caught.value)
    assert "RolloutWorkerProtocol.stop: expected (), got (timeout)" in message
    assert "RolloutWorkerProtocol.drain: expected no such method, got ()" in message
    assert "expected rollout_buffer, metrics_queue, got rollout_buffer" in message


def test_what_is_known_of_trl_is_what_is_installed() -> None:
    check_contract()
    assert not trl_contract.differences(
        theirs.RolloutWorkerProtocol, theirs.WeightTransferProtocol, theirs.RolloutSample
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_budget": None}, "token_budget: expected 0, got None"),
        ({"token_budget": 512}, "token_budget: expected 0, got 512"),
        ({"max_staleness": 0}, "max_staleness: expected at least 1, got 0"),
        ({"num_generations": 3}, "num_generations: expected a divisor of the 8 samples"),
        ({"min_p": 0.1}, "min_p"),
        ({"repetition_penalty": 1.1}, "repetition_penalty"),
        ({"groups_per_call": 3}, "groups_per_call: expected a divisor of the 2 groups"),
        ({"first_group": -1}, "first_group: expected at least 0"),
        ({"dataset": [{"question": "?"}]}, r"expected a column 'prompt', got \['question'\]"),
        ({"dataset": iter(PROMPTS)}, "dataset: expected rows that can be counted"),
        ({"reward_funcs": []}, "reward_funcs: expected one or more"),
        ({"reward_funcs": [length_of, length_of]}, "names of their own"),
    ],
)
def test_settings_that_cannot_be_kept_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidInputError, match=message):
        Loop(tmp_path, FakeEngine(), **changes)


# --- attention over a prefix tree ----------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 3])
def test_tree_attention_gives_each_sample_what_it_would_get_alone(window: int | None) -> None:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=12, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=window,
        attn_implementation="sdpa", pad_token_id=0,
    )  # fmt: skip
    model = MistralForCausalLM(config).double().eval()
    samples = [
        [1, 2, 3, 4, 5, 6],
        [1, 2, 3, 4, 7, 8, 9],
        [1, 2, 3, 10],
        [5, 2, 3, 4, 5, 6],
        [1, 2, 3, 4, 7, 8],
    ]
    row = TreeRow()
    for number, ids in enumerate(samples):
        row.add(
            {
                "input_ids": np.array(ids),
                "completion_mask": np.array([0] + [1] * (len(ids) - 1)),
                "old_log_probs": np.zeros(len(ids)),
                "advantage": 0.0,
                "group_id": number,
            }
        )
    packed = row.pack()
    assert len(packed["input_ids"]) < sum(map(len, samples))  # something is shared
    expected = []
    with torch.no_grad():
        for ids in samples:
            tokens = torch.tensor([ids])
            logps = model(tokens).logits[0, :-1].log_softmax(-1)
            expected += logps.gather(-1, tokens[0, 1:, None])[:, 0].tolist()
        trl_portable.attend_anywhere(model)
        queries, keys = packed.pop("tree_max_seqlens").tolist()
        logits = model(
            packed["input_ids"][None],
            position_ids=packed["position_ids"][None],
            tree_kv_index=packed["tree_kv_index"],
            tree_cu_seqlens_q=packed["tree_cu_seqlens_q"],
            tree_cu_seqlens_k=packed["tree_cu_seqlens_k"],
            tree_max_seqlen_q=queries,
            tree_max_seqlen_k=keys,
        ).logits[0]
    labels = torch.tensor([token for ids in samples for token in ids[1:]])
    logps = logits[packed["token_index"]].log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    torch.testing.assert_close(logps, torch.tensor(expected, dtype=torch.double))


def test_capped_scores_are_refused_rather_than_left_uncapped() -> None:
    with pytest.raises(InvalidInputError, match="softcap: expected none, got 50"):
        trl_portable.tree_attention(
            None, *[torch.zeros(1, 1, 1, 2)] * 3, None, softcap=50.0, tree_kv_index=torch.zeros(1),
            tree_cu_seqlens_q=torch.zeros(2), tree_cu_seqlens_k=torch.zeros(2),
        )  # fmt: skip


def test_what_is_replaced_in_trl_is_put_back(train: Callable[..., Any]) -> None:
    before = theirs.get_peak_flops_per_device
    trainer = train(FakeEngine())
    assert theirs.get_peak_flops_per_device is before
    assert type(trainer) is theirs.AsyncGRPOTrainer
    assert math.isclose(trainer.temperature, 1.0)
