"""What every engine must hold; the same tests for each of them."""

import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from asyncrlhf.engines import (
    Completion,
    FakeEngine,
    GenerationEngine,
    HFEngine,
    LocalEngine,
    VersionSpan,
)
from asyncrlhf.engines.remote import Served, SupervisedEngine
from asyncrlhf.errors import InvalidInputError, WaitTimeoutError, WeightUpdateError
from asyncrlhf.transport.shared_memory import SharedMemory
from decapod.lm import Request, RequestError, SamplingParams, build_model, sample_requests

VOCABULARY, EOS, POSITIONS = 20, 2, 40
SAMPLED = SamplingParams(max_new_tokens=16, temperature=0.7, logprobs_of="sampler")
GREEDY = replace(SAMPLED, temperature=0.0)
LIMIT = 60.0
Weights = list[tuple[str, Tensor]]


def a_model(seed: int = 0) -> LlamaForCausalLM:
    return build_model(VOCABULARY, 32, 2, 2, max_positions=POSITIONS, seed=seed, init_std=0.3)


def weights(seed: int) -> Weights:
    return list(a_model(seed).named_parameters())


def some_requests(params: SamplingParams = SAMPLED, seed: int = 0) -> list[Request]:
    """Two answers to each of eight prompts of 1 to 8 tokens."""
    rng = np.random.default_rng(5)
    prompts = [rng.integers(3, VOCABULARY, 1 + i).tolist() for i in range(8)]
    return sample_requests(prompts, params, seed=seed, n=2)


def generated(engine: GenerationEngine, *args: object, **named: object) -> list[Completion]:
    return list(engine.generate(some_requests(*args, **named)))  # type: ignore[arg-type]


@dataclass
class Subject:
    engine: GenerationEngine
    in_process: Callable[[], GenerationEngine]  # makes another of its kind, in this process
    model: bool = False  # whether it has one, whose weights count
    in_place: bool = False  # whether it reads a snapshot where it is


def hf(placement: str) -> HFEngine:
    engine = HFEngine(placement=placement, threads=1, max_batch_size=6)  # type: ignore[arg-type]
    engine.attach(a_model(), [EOS])
    return engine


@pytest.fixture(
    scope="module",
    params=["fake", "inline", "thread", "process", pytest.param("ray", marks=pytest.mark.ray)],
)
def subject(request: pytest.FixtureRequest) -> Iterator[Subject]:
    if request.param == "fake":
        fake = FakeEngine(vocab_size=VOCABULARY, eos_token_id=EOS)
        found = Subject(fake, lambda: FakeEngine(vocab_size=VOCABULARY, eos_token_id=EOS))
    elif request.param == "ray":
        pytest.importorskip("ray")
        from asyncrlhf.engines import RayEngine

        on_ray = RayEngine(max_batch_size=6)
        on_ray.attach(a_model(), [EOS])
        found = Subject(on_ray, lambda: hf("inline"), model=True)
    else:
        found = Subject(hf(request.param), lambda: hf("inline"), model=True, in_place=True)
    yield found
    found.engine.close()
    found.engine.close()


@pytest.fixture
def engine(subject: Subject) -> GenerationEngine:
    subject.engine.load_weights(weights(0), 0)
    return subject.engine


@pytest.fixture
def with_model(subject: Subject, engine: GenerationEngine) -> GenerationEngine:
    if not subject.model:
        pytest.skip("it has no model")
    return engine


class Failing:
    """Weights that cannot be read to their end."""

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        yield weights(1)[0]
        raise WeightUpdateError("the rest did not arrive")


# --- completions ----------------------------------------------------------------------------------


def test_it_fulfils_the_protocol(engine: GenerationEngine) -> None:
    assert isinstance(engine, GenerationEngine)
    assert engine.health() == ""


def test_completions_come_in_the_order_of_the_requests(engine: GenerationEngine) -> None:
    requests = [replace(r, id=f"name {r.id}") for r in reversed(some_requests())]
    assert [c.id for c in engine.generate(requests)] == [r.id for r in requests]
    assert list(engine.generate([])) == []


def test_equal_requests_and_weights_give_equal_completions_bit_for_bit(
    engine: GenerationEngine,
) -> None:
    first = generated(engine)
    assert generated(engine) == first
    assert generated(engine, seed=1) != first
    engine.load_weights(weights(1), 1)
    assert generated(engine) != first
    engine.load_weights(weights(0), 0)
    assert generated(engine) == first


def test_where_it_runs_changes_no_bit(subject: Subject, engine: GenerationEngine) -> None:
    here = subject.in_process()
    for version in (3, 4):
        for each in (engine, here):
            each.load_weights(weights(version), version)
        for params in (SAMPLED, GREEDY):
            with ThreadPoolExecutor(1) as pool:
                there = pool.submit(generated, engine, params)
                assert generated(here, params) == there.result(LIMIT)
    here.close()


def test_every_token_carries_the_version_that_was_loaded(engine: GenerationEngine) -> None:
    for version in (7, 9):
        engine.load_weights(weights(version), version)
        assert engine.version == version
        for completion in generated(engine):
            assert completion.version_spans == (VersionSpan(0, len(completion.ids), version),)
            assert completion.oldest_version == version
            assert len(completion.logprobs) == len(completion.ids)


def test_a_completion_ends_at_the_end_of_sequence_token_or_at_the_limit(
    engine: GenerationEngine,
) -> None:
    reasons = set()
    for completion in generated(engine):
        reasons.add(completion.finish_reason)
        assert EOS not in completion.ids[:-1]
        assert (completion.ids[-1] == EOS) == (completion.finish_reason == "stop")
        if completion.finish_reason == "length":
            assert len(completion.ids) == SAMPLED.max_new_tokens
    assert reasons == {"stop", "length"}
    for completion in generated(engine, replace(SAMPLED, ignore_eos=True)):
        assert completion.finish_reason == "length"
        assert len(completion.ids) == SAMPLED.max_new_tokens


def test_one_request_that_cannot_be_served_refuses_all_of_them(engine: GenerationEngine) -> None:
    before = generated(engine)
    good = some_requests()
    for prompt, problem in (((), "at least one token"), ((3, VOCABULARY), "expected ids in")):
        with pytest.raises(RequestError, match=problem) as refused:
            list(engine.generate([*good, Request(prompt, SAMPLED, id="bad")]))
        assert (refused.value.index, refused.value.id) == (len(good), "bad")
    assert generated(engine) == before


def test_a_prompt_that_is_too_long_with_its_answer_is_refused(
    with_model: GenerationEngine,
) -> None:
    longest = Request((3,) * (POSITIONS - SAMPLED.max_new_tokens), SAMPLED)
    assert len(list(with_model.generate([longest]))) == 1
    with pytest.raises(RequestError, match=f"more than the {POSITIONS} positions"):
        list(with_model.generate([replace(longest, prompt=(3, *longest.prompt))]))


@pytest.mark.parametrize("params", [SAMPLED, GREEDY], ids=["sampled", "greedy"])
def test_logprobs_are_those_of_a_teacher_forced_forward_divided_by_the_temperature(
    subject: Subject, engine: GenerationEngine, params: SamplingParams
) -> None:
    engine.load_weights(weights(2), 2)
    model = a_model(2)
    for request, completion in zip(some_requests(params), generated(engine, params), strict=True):
        if not subject.model:
            assert completion.logprobs == (-math.log(VOCABULARY),) * len(completion.ids)
            continue
        ids = torch.tensor([[*request.prompt, *completion.ids]])
        with torch.no_grad():
            logits = model(ids).logits[0, len(request.prompt) - 1 : -1]
        expected = (logits / (params.temperature or 1.0)).log_softmax(-1)
        expected = expected.gather(-1, torch.tensor(completion.ids)[:, None])[:, 0]
        np.testing.assert_allclose(completion.logprobs, expected, rtol=0, atol=1e-5)


# --- weights --------------------------------------------------------------------------------------


def test_a_failed_load_keeps_weights_and_version(engine: GenerationEngine) -> None:
    engine.load_weights(weights(0), 5)
    before = generated(engine)
    with pytest.raises(WeightUpdateError, match="the rest did not arrive"):
        engine.load_weights(Failing(), 6)
    assert engine.version == 5
    assert generated(engine) == before


def test_weights_that_do_not_fit_are_refused_and_change_nothing(
    with_model: GenerationEngine,
) -> None:
    with_model.load_weights(weights(0), 5)
    before = generated(with_model)
    name, value = weights(1)[-1]
    for wrong, problem in (
        ([*weights(1), ("head.bias", value)], "no parameter 'head.bias'"),
        ([*weights(1)[:-1], (name, value[:-1])], "expected shape"),
    ):
        with pytest.raises(WeightUpdateError, match=problem):
            with_model.load_weights(wrong, 6)
        assert with_model.version == 5
        assert generated(with_model) == before


def test_a_learner_that_goes_on_changes_no_loaded_weights(engine: GenerationEngine) -> None:
    learned = weights(1)
    engine.load_weights(learned, 1)
    before = generated(engine)
    for _, value in learned:
        value.data.zero_()
    assert generated(engine) == before


class Mortal:
    """What a process is to an engine, without the seconds that one takes to start."""

    pid = None
    starts = 0
    served: Served | None = None

    @property
    def alive(self) -> bool:
        return self.served is not None

    def start(self) -> None:
        self.served = Served(LocalEngine(a_model(), [EOS]))
        self.starts += 1

    def call(self, method: str, *args: object, timeout: float) -> Any:  # noqa: ARG002
        return getattr(self.served, method)(*args)

    def close(self) -> None:
        self.served = None


def test_a_process_that_is_started_again_gets_the_weights_as_they_were() -> None:
    process = Mortal()
    engine = SupervisedEngine(process, what="the engine")
    learned = weights(1)
    engine.load_weights(learned, 1)
    before = generated(engine)
    for _, value in learned:
        value.data.zero_()
    process.close()
    assert generated(engine) == before
    process.close()
    engine.start()
    assert generated(engine) == before
    assert (engine.restarts, process.starts) == (2, 3)


def test_a_snapshot_in_shared_memory_is_as_good_as_its_values(
    subject: Subject, engine: GenerationEngine
) -> None:
    with SharedMemory(slots=2) as memory:
        for version in (1, 2, 3):
            engine.load_weights(memory.publish(weights(version), version), version)
            found = generated(engine)
            engine.load_weights(weights(version), version)  # not into the snapshot's memory
            assert generated(engine) == found
            engine.load_weights(memory.snapshot(version), version)
            assert generated(engine) == found
        for version in (4, 5):
            memory.publish(weights(version), version)
        if not subject.in_place:
            assert {c.oldest_version for c in generated(engine)} == {3}
        else:  # version 3 is no more
            with pytest.raises(WeightUpdateError, match="version 3 were overwritten by version 5"):
                generated(engine)
        engine.load_weights(memory.snapshot(5), 5)
        found = generated(engine)
        engine.load_weights(weights(5), 5)
        assert generated(engine) == found


def test_the_weights_that_learn_are_enough(with_model: GenerationEngine) -> None:
    whole = generated(with_model)
    other = dict(weights(1))
    some = [name for name in other if "mlp" in name]
    with_model.load_weights([(name, other[name]) for name in some], 1)
    assert generated(with_model) != whole
    with_model.load_weights([(n, v) for n, v in weights(0) if n in some], 2)
    assert [c.ids for c in generated(with_model)] == [c.ids for c in whole]


# --- control --------------------------------------------------------------------------------------


def test_a_paused_engine_holds_requests_back_until_it_is_resumed(
    engine: GenerationEngine,
) -> None:
    expected = generated(engine)
    found: list[Completion] = []
    engine.pause()
    engine.pause()
    waiting = threading.Thread(target=lambda: found.extend(generated(engine)))
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive()
    assert engine.health() == ""
    engine.load_weights(weights(0), 0)  # weights may come meanwhile
    engine.resume()
    engine.resume()
    waiting.join(LIMIT)
    assert found == expected


def test_a_pause_is_not_waited_for_without_limit() -> None:
    paused = FakeEngine(pause_timeout=0.05)
    paused.pause()
    with pytest.raises(WaitTimeoutError, match=r"waited 0.05 s for the paused engine"):
        list(paused.generate([]))


def test_an_engine_without_a_model_says_what_to_do() -> None:
    empty = HFEngine(placement="inline")
    assert empty.health() == "no model attached"
    with pytest.raises(InvalidInputError, match="call attach"):
        empty.load_weights([], 0)
    empty.close()
