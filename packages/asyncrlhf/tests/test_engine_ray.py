import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from asyncrlhf.engines import Completion, FakeEngine, GenerationEngine, HFEngine
from asyncrlhf.errors import ActorError, InvalidInputError, WaitTimeoutError, WeightUpdateError
from decapod.lm import Request, RequestError, SamplingParams, build_model, sample_requests

pytest.importorskip("ray")
pytestmark = pytest.mark.ray

import ray  # noqa: E402

from asyncrlhf.engines.on_ray import RayEngine  # noqa: E402

SAMPLED = SamplingParams(max_new_tokens=12, temperature=0.7, logprobs_of="sampler")
GREEDY = replace(SAMPLED, temperature=0.0)
LIMIT = 60.0


def a_model(seed: int = 0) -> Any:
    return build_model(20, 32, 2, 2, max_positions=40, seed=seed, init_std=0.3)


def weights(seed: int) -> list[tuple[str, Tensor]]:
    return list(a_model(seed).named_parameters())


def some_requests(params: SamplingParams = SAMPLED) -> list[Request]:
    rng = np.random.default_rng(5)
    prompts = [rng.integers(3, 16, 1 + i).tolist() for i in range(8)]
    return sample_requests(prompts, params, n=2)


def generated(engine: GenerationEngine, params: SamplingParams = SAMPLED) -> list[Completion]:
    return list(engine.generate(some_requests(params)))


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline, f"waited {LIMIT} s for {what}"
        time.sleep(0.05)


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """A real Ray cluster of two nodes with one CPU each."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    yield cluster
    cluster.shutdown()


def test_a_cluster_is_joined_and_left_again(nodes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", nodes.address)
    engine = RayEngine(engine_factory=FakeEngine, ray_init={"log_to_driver": False})
    engine.attach(None, [])  # type: ignore[arg-type]
    assert len(ray.nodes()) == 2
    assert generated(engine) == expected(version=0)
    engine.close()
    assert not ray.is_initialized()


@pytest.fixture(scope="module")
def cluster(nodes: Any) -> Iterator[None]:
    """A driver of the cluster, which engines use and must leave alone."""
    ray.init(address=nodes.address, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def pair(cluster: None) -> Iterator[RayEngine]:
    """Two actors, with a model, on two nodes."""
    engine = RayEngine(num_actors=2, num_cpus=0.5, strategy="STRICT_SPREAD")
    engine.attach(a_model(), [2])
    yield engine
    engine.close()
    engine.close()
    assert ray.is_initialized()


@pytest.fixture(scope="module")
def here() -> HFEngine:
    engine = HFEngine(placement="inline")
    engine.attach(a_model(), [2])
    return engine


def shares(engine: GenerationEngine, params: SamplingParams) -> list[Completion]:
    """What two actors give, computed here: each share alone."""
    requests = some_requests(params)
    half = len(requests) // 2
    return [*engine.generate(requests[:half]), *engine.generate(requests[half:])]


# --- with a model ---------------------------------------------------------------------------------


def test_actors_on_two_nodes_give_the_completions_of_this_process(
    pair: RayEngine, here: HFEngine
) -> None:
    assert len(set(pair.nodes)) == 2
    assert pair.health() == ""
    for version in (0, 3):
        if version:
            learned = weights(version)
            pair.load_weights(learned, version)
            here.load_weights(learned, version)
        assert [c.ids for c in generated(pair, GREEDY)] == [c.ids for c in generated(here, GREEDY)]
        for params in (SAMPLED, GREEDY):
            found = generated(pair, params)
            assert found == shares(here, params)  # bit for bit
            assert generated(pair, params) == found
            assert {c.oldest_version for c in found} == {version} == {pair.version}


# --- faults, with engines that need no model ------------------------------------------------------


class Drill:
    """What actors are to do, told by files that they look for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def factory(self) -> Callable[[], GenerationEngine]:
        folder = self.folder

        class Drilled(FakeEngine):
            def generate(self, requests: Any) -> Any:
                (folder / f"begun {os.getpid()}").touch()
                while (folder / f"hold {os.getpid()}").exists():
                    time.sleep(0.02)
                return super().generate(requests)

            def load_weights(self, source: Any, version: int) -> None:
                values = {name: value.tolist() for name, value in source}
                (folder / f"loaded {os.getpid()}").write_text(str(values))
                if (folder / f"fail {os.getpid()}").exists():
                    raise WeightUpdateError("this load was to fail")
                super().load_weights(source, version)

        return Drilled

    def begin(self, what: str, pid: int | None) -> None:
        (self.folder / f"begun {pid}").unlink(missing_ok=True)
        (self.folder / f"{what} {pid}").touch()

    def end(self, what: str, pid: int | None) -> None:
        (self.folder / f"{what} {pid}").unlink()

    def loaded(self, pid: int | None) -> str:
        return (self.folder / f"loaded {pid}").read_text()

    def begun(self, pid: int | None) -> bool:
        return (self.folder / f"begun {pid}").exists()


@pytest.fixture(scope="module")
def drill(tmp_path_factory: pytest.TempPathFactory) -> Drill:
    return Drill(tmp_path_factory.mktemp("drill"))


@pytest.fixture(scope="module")
def drilled(cluster: None, drill: Drill) -> Iterator[RayEngine]:
    engine = RayEngine(
        num_actors=2, engine_factory=drill.factory(), num_cpus=0.2, strategy="STRICT_SPREAD"
    )
    engine.attach(None, [])  # type: ignore[arg-type]
    yield engine
    engine.close()


def expected(version: int) -> list[Completion]:
    engine = FakeEngine()
    engine.load_weights([], version)
    return generated(engine)


@pytest.mark.parametrize("how", ["SIGKILL", "ray.kill"])
def test_an_actor_that_dies_in_mid_call_is_placed_again_and_changes_nothing(
    drilled: RayEngine, drill: Drill, how: str
) -> None:
    drilled.load_weights([("w", torch.ones(3))], 7)
    pid, other = drilled.pids
    assert pid is not None
    restarts, again = drilled.restarts, drilled.regenerated
    drill.begin("hold", pid)

    def kill() -> None:
        wait_until(lambda: drill.begun(pid), "the call to begin")
        if how == "SIGKILL":
            os.kill(pid, signal.SIGKILL)
        else:
            ray.kill(drilled._processes[0]._actor)

    killer = threading.Thread(target=kill)
    killer.start()
    found = generated(drilled)
    killer.join(LIMIT)
    assert found == expected(version=7)
    assert (drilled.restarts, drilled.regenerated) == (restarts + 1, again + 1)
    assert drilled.pids[0] != pid
    assert drill.loaded(drilled.pids[0]) == "{'w': [1.0, 1.0, 1.0]}"
    assert drilled.pids[1] == other
    assert len(set(drilled.nodes)) == 2
    assert drilled.health() == ""
    wait_until(lambda: gone(pid), "the actor's process to end")


def test_an_actor_that_died_idle_is_placed_again_before_the_next_call(drilled: RayEngine) -> None:
    drilled.load_weights([], 8)
    restarts, again = drilled.restarts, drilled.regenerated
    ray.kill(drilled._processes[1]._actor)
    assert "actor 1 of 2 on Ray was lost (ActorDiedError" in drilled.health()
    assert generated(drilled) == expected(version=8)
    assert (drilled.restarts, drilled.regenerated) == (restarts + 1, again)
    assert drilled.health() == ""


def test_an_update_that_does_not_reach_all_actors_never_advances_the_version(
    drilled: RayEngine, drill: Drill
) -> None:
    drilled.load_weights([], 3)
    for pid in drilled.pids:
        drill.begin("fail", pid)
    with pytest.raises(WeightUpdateError, match="reached 0 of 2 replicas"):
        drilled.load_weights([], 4)
    assert drilled.version == 3
    assert generated(drilled) == expected(version=3)  # both have the old weights still
    drill.end("fail", drilled.pids[0])
    with pytest.raises(WeightUpdateError, match=r"reached 1 of 2 replicas.* was to fail"):
        drilled.load_weights([], 4)
    assert drilled.version == 3
    with pytest.raises(WeightUpdateError, match="replicas hold different weights"):
        generated(drilled)
    assert "different weights" in drilled.health()
    drill.end("fail", drilled.pids[1])
    drilled.load_weights([], 5)
    assert drilled.version == 5
    assert generated(drilled) == expected(version=5)


def test_weights_are_stored_once_for_all_actors_also_from_a_source_that_ends(
    drilled: RayEngine, drill: Drill, monkeypatch: pytest.MonkeyPatch
) -> None:
    puts: list[Any] = []
    put = ray.put
    monkeypatch.setattr(ray, "put", lambda value: puts.append(put(value)) or puts[-1])
    values = {
        "whole": torch.arange(6).reshape(2, 3),
        "half": torch.tensor([1.5], dtype=torch.bfloat16),
        "one": torch.tensor(2.0),
        "none": torch.zeros(0, 4),
    }
    drilled.load_weights(((name, value.t()) for name, value in values.items()), 6)
    assert len(puts) == 1
    for pid in drilled.pids:
        assert drill.loaded(pid) == str({n: v.t().tolist() for n, v in values.items()})


def test_refused_requests_keep_their_place_among_all(drilled: RayEngine) -> None:
    bad = Request((99,), SAMPLED, id="bad")
    requests = [*some_requests(), bad]
    with pytest.raises(RequestError, match="expected ids in") as refused:
        list(drilled.generate(requests))
    assert (refused.value.index, refused.value.id) == (len(requests) - 1, "bad")


def test_a_call_that_takes_too_long_names_the_actor(cluster: None, drill: Drill) -> None:
    engine = RayEngine(engine_factory=drill.factory(), num_cpus=0.1, timeout=0.5, max_restarts=0)
    engine.attach(None, [])  # type: ignore[arg-type]
    try:
        drill.begin("hold", engine.pids[0])
        with pytest.raises(
            ActorError, match=r"waited 0.5 s for actor 0 of 1 on Ray to finish generate"
        ):
            generated(engine)
    finally:
        engine.close()


def test_closing_ends_a_call_under_way(cluster: None, drill: Drill) -> None:
    engine = RayEngine(engine_factory=drill.factory(), num_cpus=0.1)
    engine.attach(None, [])  # type: ignore[arg-type]
    (pid,) = engine.pids
    assert pid is not None
    drill.begin("hold", pid)
    errors: list[BaseException] = []

    def work() -> None:
        try:
            generated(engine)
        except ActorError as error:
            errors.append(error)

    waiting = threading.Thread(target=work)
    waiting.start()
    wait_until(lambda: drill.begun(pid), "the call to begin")
    engine.close()
    waiting.join(LIMIT)
    assert "was closed" in str(errors[0])
    wait_until(lambda: gone(pid), "the actor's process to end")
    assert engine.health() == "no actors placed"
    with pytest.raises(InvalidInputError, match="call attach"):
        generated(engine)


# --- starting -------------------------------------------------------------------------------------


def test_a_factory_that_raises_gives_its_traceback(cluster: None) -> None:
    def broken() -> GenerationEngine:
        raise LookupError("no such model")

    engine = RayEngine(engine_factory=broken, num_cpus=0.1)
    with pytest.raises(ActorError, match="raised LookupError: no such model") as caught:
        engine.attach(None, [])  # type: ignore[arg-type]
    assert "in broken" in str(caught.value)
    assert engine.health() == "no actors placed"


def test_a_cluster_without_room_is_not_waited_for_without_limit(cluster: None) -> None:
    engine = RayEngine(num_actors=3, start_timeout=0.5, engine_factory=FakeEngine)
    with pytest.raises(WaitTimeoutError, match=r"Ray to reserve 3 x \{'CPU': 1.0\} by SPREAD"):
        engine.attach(None, [])  # type: ignore[arg-type]


def test_bad_arguments_are_refused_before_anything_starts() -> None:
    for arguments, problem in (
        ({"num_actors": 0}, "num_actors: expected at least 1, got 0"),
        ({"strategy": "NEAR"}, "strategy: expected one of PACK"),
        ({"num_cpus": -1.0}, "reserved CPU: expected at least 0"),
        ({"num_cpus": 0.0}, "expected one above 0 to place actors by"),
        ({"device": "cuda"}, "num_gpus: expected a number above 0 for device='cuda'"),
        ({"timeout": 0.0}, "timeout: expected a number above 0"),
    ):
        with pytest.raises(InvalidInputError, match=problem):
            RayEngine(**arguments)  # type: ignore[arg-type]
    lock = threading.Lock()
    with pytest.raises(InvalidInputError, match="cannot be sent to another process"):
        RayEngine(engine_factory=lambda: lock).attach(None, [])  # type: ignore[arg-type, return-value]


# --- slow -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_with_an_actor_on_ray_that_is_killed_ends_as_the_plain_loop_does(
    cluster: None, replay: Any, tmp_path: Path
) -> None:
    from transformers import TrainerCallback

    class Killer(TrainerCallback):
        def on_step_end(self, _args: Any, state: Any, *_: Any, **__: Any) -> None:
            if state.global_step == 3:
                os.kill(engine.pids[0], signal.SIGKILL)

    settings = replay.settings(tmp_path, rounds_ahead=1)
    plain = replay.trainer(settings, HFEngine(placement="inline"))
    plain.train()
    engine = RayEngine(num_cpus=0.2)
    run = replay.trainer(settings, engine, callbacks=[Killer()])
    run.train()
    assert replay.digest(run.model) == replay.digest(plain.model)
    assert run.report().restarts == 1


@pytest.mark.slow
def test_a_lost_node_changes_no_completion(cluster: None, nodes: Any) -> None:  # the last test
    spread, strict = (
        RayEngine(num_actors=2, engine_factory=FakeEngine, num_cpus=0.1, strategy=strategy)
        for strategy in ("SPREAD", "STRICT_SPREAD")
    )
    try:
        for engine in (spread, strict):
            engine.attach(None, [])  # type: ignore[arg-type]
            engine.load_weights([], 2)
            assert len(set(engine.nodes)) == 2
        nodes.remove_node(nodes.worker_nodes.copy().pop())
        # The actor finds a place beside the other, or there is none and the other does all.
        assert generated(spread) == expected(version=2)
        assert spread.restarts == 1
        assert len(set(spread.nodes)) == 1
        for process in strict._processes:
            process._start_timeout = 1.0
        assert generated(strict) == expected(version=2)
        assert strict.restarts == 0
        assert "does not run" in strict.health()
        with pytest.raises(WeightUpdateError, match=r"waited 1 s for actor \d of 2 .*to start"):
            strict.load_weights([], 3)
    finally:
        spread.close()
        strict.close()
