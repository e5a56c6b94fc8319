"""Rollouts by actors of a real local Ray: the same as without it, also after one was killed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("decapod")
pytest.importorskip("transformers")
pytest.importorskip("ray")

import ray

from decapod.lm import EngineError, SamplingParams, build_model
from vineppo.backend import Usage
from vineppo.episodes import Rollout
from vineppo.errors import InvalidInputError, NotFiniteError
from vineppo.rollout import TransformersBackend
from vineppo.rollout_ray import RayBackend

pytestmark = pytest.mark.ray
VOCAB = 24
DRAWN = SamplingParams(6, 0.9)
PROMPTS = [[5, 6, 7, *range(8, end)] for end in (8, 10, 13, 20)] + [[9, 4, 3], [9, 4, 3, 11]]
SEEDS = [31 * i for i in range(len(PROMPTS))]


def tiny(seed: int = 0) -> Any:
    """In double precision, with tied embeddings."""
    return build_model(
        VOCAB, 16, layers=1, heads=2, max_positions=64, seed=seed, init_std=0.2,
        tie_embeddings=True,
    ).double()  # fmt: skip


def ids(rollouts: list[list[Rollout]]) -> list[list[tuple[int, ...]]]:
    return [[rollout.token_ids for rollout in some] for some in rollouts]


def drawn(backend: Any) -> list[list[tuple[int, ...]]]:
    return ids(backend.generate(PROMPTS, 3, DRAWN, SEEDS))


@pytest.fixture(scope="module")
def model() -> Any:
    torch.set_num_threads(1)
    return tiny()


@pytest.fixture(scope="module")
def backend(model: Any) -> Iterator[RayBackend]:
    """Two actors for all tests here: they take seconds to start."""
    with RayBackend(
        model, actors=2, num_cpus=0.5, ray_init={"log_to_driver": False, "num_cpus": 2}
    ) as made:
        yield made
    assert not ray.is_initialized()
    with pytest.raises(EngineError, match=r"ended by close\(\)"):
        made.generate([[5]], 1, DRAWN, [1])


def test_actors_give_the_rollouts_of_one_process_and_count_what_was_reused(
    backend: RayBackend, model: Any
) -> None:
    here = TransformersBackend(model)
    before = backend.usage
    assert len(backend.nodes) == 2
    assert drawn(backend) == drawn(here)
    used = backend.usage - before
    assert (used.requests, used.prompt_tokens) == (18, here.usage.prompt_tokens)
    assert used.generated_tokens == here.usage.generated_tokens
    # The cut between two actors costs at most the prefix that both compute.
    lost = here.usage.reused_tokens - used.reused_tokens
    assert 0 <= lost <= max(map(len, PROMPTS))
    assert ids(backend.generate([[5, 6]], 1, DRAWN, [4])) == ids(
        here.generate([[5, 6]], 1, DRAWN, [4])
    )
    assert backend.generate([], 1, DRAWN, []) == []


def test_weights_go_into_the_store_once_per_update_and_reach_all_also_after_a_death(
    backend: RayBackend, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    puts: list[Any] = []
    put = ray.put
    monkeypatch.setattr(ray, "put", lambda value: puts.append(value) or put(value))
    other = tiny(1)
    backend.load_weights(other)
    expected = drawn(TransformersBackend(other))
    assert drawn(backend) == expected
    assert drawn(backend) == expected
    [pieces] = puts
    # Tied weights are sent once.
    assert {name for name, *_ in pieces} == set(dict(other.named_parameters()))
    ray.kill(backend._actors[0], no_restart=False)
    assert drawn(backend) == expected
    backend.load_weights(model)
    assert drawn(backend) == drawn(TransformersBackend(model))


def test_log_probabilities_that_are_not_numbers_are_an_error(
    backend: RayBackend, model: Any
) -> None:
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.norm.weight[3] = float("nan")
    backend.load_weights(broken)
    with pytest.raises(NotFiniteError, match=r"^logprobs of rollouts: .*NaN"):
        drawn(backend)
    backend.load_weights(model)
    assert drawn(backend) == drawn(TransformersBackend(model))


def test_bad_arguments_are_refused_in_the_caller(backend: RayBackend) -> None:
    before = backend.usage
    for changes, message in (
        ({"n": 0}, r"^n: expected at least 1"),
        ({"prompts": [[]]}, r"^prompts\[0\]: expected at least one token"),
        ({"prompts": [[VOCAB]]}, r"^prompts\[0\]: expected ids in \[0, 24\)"),
        ({"prompts": [[5] * 60]}, r"^prompts\[0\]: 60 tokens and max_new_tokens=6"),
        ({"seeds": []}, r"^seeds: expected one per prompt, 1, got 0"),
    ):
        call = {"prompts": [[5]], "n": 1, "params": DRAWN, "seeds": [1], **changes}
        with pytest.raises(InvalidInputError, match=message):
            backend.generate(**call)
    assert backend.usage - before == Usage()
    wider = build_model(VOCAB, 32, layers=1, heads=2, max_positions=64).double()
    with pytest.raises(InvalidInputError, match=r"^model: expected the names and shapes"):
        backend.load_weights(wider)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"actors": 0}, r"^actors: expected at least 1, got 0"),
        ({"threads": 0}, r"^threads: expected at least 1"),
        ({"timeout": 0}, r"^timeout: expected a number above 0"),
        ({"device": "cuda"}, r"^num_gpus: expected a number above 0 for device='cuda'"),
        ({"max_batch_size": 0}, r"^max_batch_size: expected at least 1"),
    ],
)
def test_bad_options_are_refused_before_ray_starts(
    model: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidInputError, match=message):
        RayBackend(model, **options)
