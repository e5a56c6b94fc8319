"""Rollouts with a transformers model: exact restarts, shared prefixes, seeds, counts, refusals."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("decapod")
pytest.importorskip("transformers")

from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2_contingency, chisquare

from decapod.lm import Request, SamplingParams, build_model, build_tokenizer
from vineppo.backend import Usage, sample_seeds
from vineppo.episodes import Rollout
from vineppo.errors import InvalidInputError, NotFiniteError
from vineppo.rollout import TransformersBackend, adjacent_shares, merged

# PEFT asks models for what transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
VOCAB, EOS = 24, 2
GREEDY = SamplingParams(10, 0.0)
DRAWN = SamplingParams(8, 0.9)


@pytest.fixture(scope="module", autouse=True)
def one_numeric_thread() -> None:
    torch.set_num_threads(1)


def tiny(seed: int = 0, init_std: float = 0.2) -> Any:
    """In double precision, so that no rounding decides between two tokens."""
    return build_model(
        VOCAB, 32, layers=2, heads=2, max_positions=96, seed=seed, init_std=init_std
    ).double()


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny()


@pytest.fixture
def backend(model: Any) -> TransformersBackend:
    return TransformersBackend(model)


def random_ids(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, VOCAB, length).tolist()


def states(trajectories: int = 3) -> list[list[int]]:
    """Successive states of trajectories of one problem: prompt, and 1, 3, 6, 10 tokens more."""
    prompt = random_ids(9)
    ends = (0, 1, 3, 6, 10)
    return [
        prompt + random_ids(10, seed=1 + number)[:end]
        for number in range(trajectories)
        for end in ends
    ]


def seeds_of(prompts: Any) -> list[int]:
    return [1000 + 7 * i for i in range(len(prompts))]


def ids(rollouts: list[list[Rollout]]) -> list[list[tuple[int, ...]]]:
    return [[rollout.token_ids for rollout in some] for some in rollouts]


@contextmanager
def forward_shapes(model: torch.nn.Module) -> Iterator[list[tuple[int, int]]]:
    """(rows, tokens) of each forward pass."""
    shapes: list[tuple[int, int]] = []

    def note(_module: Any, _args: Any, kwargs: Any) -> None:
        shapes.append(tuple(kwargs["input_ids"].shape))

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    yield shapes
    handle.remove()


def generated_by_transformers(model: Any, prompt: list[int], **options: Any) -> list[list[int]]:
    """New tokens of one ``generate`` call for one state, up to and with EOS."""
    given_ids = torch.tensor([prompt])
    out = model.generate(
        given_ids, attention_mask=torch.ones_like(given_ids), pad_token_id=0, eos_token_id=EOS,
        **options,
    )  # fmt: skip
    rows = out[:, len(prompt) :].tolist()
    return [row[: row.index(EOS) + 1] if EOS in row else row for row in rows]


# --- what is sampled ------------------------------------------------------------------------------


def test_greedy_rollouts_equal_one_generate_call_per_state(model: Any, backend: Any) -> None:
    prompts = [*states(), *[random_ids(length, seed=50 + length) for length in (1, 2, 30)]]
    rollouts = backend.generate(prompts, 2, GREEDY, seeds_of(prompts))
    for prompt, some in zip(prompts, rollouts, strict=True):
        [expected] = generated_by_transformers(model, prompt, do_sample=False, max_new_tokens=10)
        assert [list(rollout.token_ids) for rollout in some] == [expected] * 2
        assert {rollout.finished for rollout in some} == {expected[-1] == EOS}
    assert {rollout.finished for some in rollouts for rollout in some} == {True, False}


def test_a_padded_rollout_equals_the_same_one_alone(backend: Any) -> None:
    prompts = states()
    together = backend.generate(prompts, 3, DRAWN, seeds_of(prompts))
    for prompt, seed, some in zip(prompts, seeds_of(prompts), together, strict=True):
        [alone] = backend.generate([prompt], 3, DRAWN, [seed])
        assert [a.token_ids for a in alone] == [b.token_ids for b in some]
        for a, b in zip(alone, some, strict=True):
            np.testing.assert_allclose(a.logprobs, b.logprobs, rtol=0, atol=1e-6)


def exact(model: Any, prompt: list[int], temperature: float) -> np.ndarray:
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, -1]
    return (logits / temperature).softmax(-1).numpy()


def counted(tokens: list[int]) -> np.ndarray:
    return np.bincount(tokens, minlength=VOCAB)


def pooled(observed: np.ndarray, expected: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cells that expect less than 5 are taken together."""
    few = expected < 5
    if not few.any():
        return observed, expected
    return tuple(np.append(x[~few], x[few].sum()) for x in (observed, expected))  # type: ignore[return-value]


def test_first_and_second_tokens_have_the_exact_distribution_at_states_of_a_trajectory() -> None:
    # Flatter weights than elsewhere: many tokens then have a chance worth counting.
    model = tiny(init_std=0.1)
    backend = TransformersBackend(model, max_batch_size=4096, max_batch_tokens=10**6)
    prompts = states(1)[::2]
    size = 1500
    params = SamplingParams(2, 0.7, ignore_eos=True)
    rollouts = backend.generate(prompts, size, params, seeds_of(prompts))
    for prompt, some in zip(prompts, rollouts, strict=True):
        first = [rollout.token_ids[0] for rollout in some]
        test = chisquare(*pooled(counted(first), exact(model, prompt, 0.7) * size))
        assert test.pvalue > 1e-4
        usual = int(np.argmax(counted(first)))
        second = [r.token_ids[1] for r in some if r.token_ids[0] == usual]
        expected = exact(model, [*prompt, usual], 0.7) * len(second)
        assert chisquare(*pooled(counted(second), expected)).pvalue > 1e-4


def test_rollouts_have_the_distribution_of_unshared_generation() -> None:
    model = tiny(init_std=0.1)
    prompt = states(1)[2]
    size = 1500
    [ours] = TransformersBackend(model, max_batch_size=size).generate(
        [prompt], size, SamplingParams(3, 0.7), [3]
    )
    torch.manual_seed(0)
    theirs = generated_by_transformers(
        model, prompt, do_sample=True, temperature=0.7, top_k=0, max_new_tokens=3,
        num_return_sequences=size,
    )  # fmt: skip
    # Of the last token: a function of the whole rollout.
    table = np.stack(
        [counted([r.token_ids[-1] for r in ours]), counted([row[-1] for row in theirs])]
    )
    assert chi2_contingency(table[:, table.sum(0) > 10]).pvalue > 1e-4


def test_logprobs_are_those_of_the_model_or_the_sampler_as_asked(model: Any, backend: Any) -> None:
    prompt = random_ids(7)
    for of, temperature in (("model", 1.0), ("sampler", 0.6)):
        params = SamplingParams(6, 0.6, logprobs_of=of)  # type: ignore[arg-type]
        [[rollout]] = backend.generate([prompt], 1, params, [5])
        whole = torch.tensor([[*prompt, *rollout.token_ids]])
        with torch.no_grad():
            logits = model(whole).logits[0, len(prompt) - 1 : -1]
        found = (logits / temperature).log_softmax(-1)
        expected = found.gather(-1, torch.tensor(rollout.token_ids)[:, None])[:, 0]
        np.testing.assert_allclose(rollout.logprobs, expected.numpy(), rtol=0, atol=1e-6)


def test_params_of_each_prompt_are_its_own(backend: Any) -> None:
    prompts = states(1)
    params = [SamplingParams(2 + i, 0.0, ignore_eos=True) for i in range(len(prompts))]
    rollouts = backend.generate(prompts, 1, params, seeds_of(prompts))
    assert [len(some[0].token_ids) for some in rollouts] == [2, 3, 4, 5, 6]
    assert not any(some[0].finished for some in rollouts)


def test_stop_texts_end_rollouts_and_are_the_only_use_of_a_tokenizer(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = build_tokenizer(["abcdefghijklmnopqrst"])
    assert len(tokenizer) == VOCAB

    def encoded(*_: Any, **__: Any) -> Any:
        raise AssertionError("a text was encoded")

    for name in ("__call__", "encode", "_encode_plus"):
        monkeypatch.setattr(type(tokenizer), name, encoded)
    backend = TransformersBackend(model, tokenizer)
    prompt = random_ids(5)
    free = SamplingParams(20, 1.0, ignore_eos=True)
    [[rollout]] = backend.generate([prompt], 1, free, [1])
    letter = tokenizer.decode([rollout.token_ids[4]])
    stopped = SamplingParams(20, 1.0, ignore_eos=True, stop=(letter,))
    [[short]] = backend.generate([prompt], 1, stopped, [1])
    end = rollout.token_ids.index(rollout.token_ids[4]) + 1
    assert short.token_ids == rollout.token_ids[:end]
    assert short.finished


# --- seeds ----------------------------------------------------------------------------------------


def splitmix(x: int) -> int:
    """The finaliser of SplitMix64, in plain numbers."""
    word = 2**64 - 1
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & word
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & word
    return x ^ (x >> 31)


@given(st.lists(st.tuples(st.integers(0, 2**63 - 1), st.integers(0, 5)), max_size=6))
def test_sample_seeds_equal_two_plain_rounds_of_splitmix(given_: list[tuple[int, int]]) -> None:
    gamma, word = 0x9E3779B97F4A7C15, 2**64 - 1
    found = sample_seeds([seed for seed, _ in given_], [count for _, count in given_])
    assert found == [
        [
            splitmix((splitmix((seed + 1) * gamma & word) + (j + 1) * gamma) & word) >> 1
            for j in range(count)
        ]
        for seed, count in given_
    ]


def test_sample_seeds_of_neighbouring_seeds_do_not_meet() -> None:
    found = sample_seeds(range(2000), [50] * 2000)
    assert len({seed for some in found for seed in some}) == 100_000
    bits = np.unpackbits(np.array(found, dtype=">u8").view(np.uint8)).reshape(-1, 64)[:, 1:]
    assert abs(bits.mean(0) - 0.5).max() < 5 * 0.5 / 100_000**0.5


WARM = SamplingParams(5, 1.1)


@lru_cache
def reference() -> tuple[TransformersBackend, list[list[Rollout]]]:
    """A backend, and four rollouts of all states at once."""
    backend = TransformersBackend(tiny())
    prompts = states(2)
    return backend, backend.generate(prompts, 4, WARM, seeds_of(prompts))


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_a_rollout_depends_on_its_state_seed_and_number_alone(data: st.DataObject) -> None:
    prompts = states(2)
    seeds = seeds_of(prompts)
    backend, whole = reference()
    # Some of them, in any order, some twice, with other numbers of samples, in other batches.
    chosen = data.draw(st.lists(st.sampled_from(range(len(prompts))), min_size=1, max_size=8))
    counts = data.draw(st.lists(st.integers(0, 4), min_size=len(chosen), max_size=len(chosen)))
    other = TransformersBackend(
        backend.model,
        max_batch_size=data.draw(st.integers(1, 9)),
        max_batch_tokens=data.draw(st.sampled_from([1, 60, 10_000])),
    )
    found = other.generate([prompts[i] for i in chosen], counts, WARM, [seeds[i] for i in chosen])
    for i, count, some in zip(chosen, counts, found, strict=True):
        assert ids([some]) == ids([whole[i][:count]])
        for a, b in zip(some, whole[i], strict=False):
            np.testing.assert_allclose(a.logprobs, b.logprobs, rtol=0, atol=1e-6)


def test_samples_of_a_state_and_equal_states_with_other_seeds_differ(backend: Any) -> None:
    prompt = random_ids(6)
    params = SamplingParams(12, 1.3, ignore_eos=True)
    first, second, again = backend.generate([prompt] * 3, 4, params, [1, 2, 1])
    assert len({r.token_ids for r in first + second}) == 8
    assert first == again


# --- sharing --------------------------------------------------------------------------------------


def test_one_call_computes_a_trajectory_once_for_all_states_and_samples(
    model: Any, backend: Any
) -> None:
    prompts = states(2)
    params = SamplingParams(4, ignore_eos=True)
    with forward_shapes(model) as shapes:
        backend.generate(prompts, 9, params, seeds_of(prompts))
    # Two contexts of 19 - 1 tokens, then 2 x 5 states x 9 samples, a token each.
    assert shapes == [(2, 18), *[(90, 1)] * 4]


def test_requests_are_prefixes_of_their_trajectory_and_no_text_is_encoded(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = build_tokenizer(["ab abc abcd bcd cd d\n"] * 5, "bpe", 262)
    # The tokens of the text would be others: the trajectory was not tokenised, it was sampled.
    pieces = [tokenizer(piece)["input_ids"] for piece in ("ab", "c", "d\nab", "cd")]
    trajectory = [token % VOCAB for piece in pieces for token in piece]
    sent: list[Request] = []
    backend = TransformersBackend(model)
    generate = backend.engine.generate

    def recorded(requests: Any) -> Any:
        sent.extend(requests)
        return generate(requests)

    monkeypatch.setattr(backend.engine, "generate", recorded)
    borders = [1, 3, 4, len(trajectory)]
    backend.generate([trajectory[:end] for end in borders], 2, DRAWN, [4, 3, 2, 1])
    assert [request.prompt for request in sent] == [
        tuple(trajectory[:end]) for end in borders for _ in range(2)
    ]
    assert all(isinstance(token, int) for request in sent for token in request.prompt)


def test_usage_of_a_call_by_hand(backend: Any) -> None:
    shared, other = random_ids(6), random_ids(4, seed=9)
    assert shared[0] != other[0]
    params = SamplingParams(3, ignore_eos=True)
    prompts = [shared[:2], shared, other]
    assert backend.usage == Usage()
    backend.generate(prompts, [2, 1, 3], params, [1, 2, 3])
    first = backend.usage
    assert (first.requests, first.generated_tokens) == (6, 18)
    assert first.prompt_tokens == 2 * 2 + 6 + 3 * 4
    # Computed are the contexts of 5 and 3 tokens, and the last token of each of the six.
    assert first.reused_tokens == 22 - (5 + 3 + 6)
    assert first.hit_rate == 8 / 22
    assert first.seconds > 0
    backend.generate([other], 1, params, [1])
    second = backend.usage - first
    assert (second.requests, second.generated_tokens) == (1, 3)
    assert (second.prompt_tokens, second.reused_tokens, second.hit_rate) == (4, 0, 0.0)
    assert first + second == backend.usage


def test_nine_samples_along_a_trajectory_reuse_almost_everything(backend: Any) -> None:
    prompts = states(1)
    backend.generate(prompts, 9, GREEDY, seeds_of(prompts))
    total = 9 * sum(map(len, prompts))
    assert backend.usage.hit_rate == (total - 18 - 45) / total


def test_usage_counts_only_what_was_generated_up_to_the_end(backend: Any) -> None:
    prompts = states()
    rollouts = backend.generate(prompts, 3, DRAWN, seeds_of(prompts))
    lengths = [len(rollout.token_ids) for some in rollouts for rollout in some]
    assert backend.usage.generated_tokens == sum(lengths)
    assert min(lengths) < max(lengths)


@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 3), min_size=1, max_size=4), st.integers(1, 50)),
        max_size=20,
    ),
    st.integers(1, 6),
)
def test_shares_hold_every_request_once_in_order_and_are_about_equal(
    given_: list[tuple[list[int], int]], shares: int
) -> None:
    requests = [Request(tuple(prompt), SamplingParams(new)) for prompt, new in given_]
    found = adjacent_shares(requests, shares)
    places = [place for share in found for place in share]
    assert sorted(places) == list(range(len(requests)))
    assert [requests[i].prompt for i in places] == sorted(r.prompt for r in requests)
    assert len(found) <= shares
    assert all(found)
    total = sum(new for _, new in given_)
    longest = max((new for _, new in given_), default=0)
    for share in found:
        assert sum(requests[i].params.max_new_tokens for i in share) <= total / shares + longest


# --- weights --------------------------------------------------------------------------------------


def with_lora(model: Any) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(4)
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False, lora_alpha=8
    )
    return peft.get_peft_model(copy.deepcopy(model), config).double()


def test_a_model_wrapped_by_peft_generates_as_its_merged_copy_does(model: Any) -> None:
    wrapped = with_lora(model)
    before = {name: value.clone() for name, value in wrapped.state_dict().items()}
    prompts = states(1)
    plain = TransformersBackend(merged(wrapped))
    expected = ids(plain.generate(prompts, 2, DRAWN, seeds_of(prompts)))
    found = ids(TransformersBackend(wrapped).generate(prompts, 2, DRAWN, seeds_of(prompts)))
    assert found == expected
    original = TransformersBackend(model).generate(prompts, 2, DRAWN, seeds_of(prompts))
    assert ids(original) != expected
    for name, value in wrapped.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("adapters", [False, True])
def test_loaded_weights_are_those_that_generate(model: Any, adapters: bool) -> None:
    other = with_lora(tiny(1)) if adapters else tiny(1)
    own = copy.deepcopy(model)
    backend = TransformersBackend(own)
    prompts = states(1)
    backend.load_weights(other)
    found = backend.generate(prompts, 2, DRAWN, seeds_of(prompts))
    expected = TransformersBackend(other).generate(prompts, 2, DRAWN, seeds_of(prompts))
    assert ids(found) == ids(expected)
    assert backend.model is own


def test_the_very_same_model_needs_no_loading_and_keeps_its_modes(model: Any) -> None:
    own = copy.deepcopy(model).train()
    own.model.layers[0].eval()
    backend = TransformersBackend(own)
    versions = {name: value._version for name, value in own.named_parameters()}
    backend.load_weights(own)
    first = backend.generate([[1, 5]], 2, DRAWN, [1])
    assert {name: value._version for name, value in own.named_parameters()} == versions
    assert own.training
    assert not own.model.layers[0].training
    with torch.no_grad():
        for value in own.parameters():
            value.mul_(1.5)
    assert backend.generate([[1, 5]], 2, DRAWN, [1]) != first


def test_weights_that_do_not_fit_are_refused_and_nothing_is_copied(model: Any) -> None:
    own = copy.deepcopy(model)
    backend = TransformersBackend(own)
    wider = build_model(VOCAB, 32, layers=1, heads=2).double()
    with pytest.raises(InvalidInputError, match=r"^model: weights: expected the \d+ names"):
        backend.load_weights(wider)
    for name, value in own.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n": 0}, r"^n: expected at least 1 rollout per prompt, got 0"),
        ({"n": -3}, r"^n: expected at least 1"),
        ({"n": True}, r"^n: expected a whole number"),
        ({"n": 1.5}, r"^n: expected a whole number"),
        ({"n": [1]}, r"^n: expected one number per prompt, 2, got 1"),
        ({"n": [1, -1]}, r"^n\[1\]: expected a whole number of at least 0, got -1"),
        ({"n": [1, 0.5]}, r"^n\[1\]: expected"),
        ({"prompts": [[5], []]}, r"^prompts\[1\]: expected at least one token, got none"),
        ({"prompts": [[5], [VOCAB]]}, r"^prompts\[1\]: expected ids in \[0, 24\), got 24"),
        ({"prompts": [[-1], [5]]}, r"^prompts\[0\]: expected ids in"),
        ({"prompts": [[5], [5] * 95]}, r"^prompts\[1\]: 95 tokens and max_new_tokens=8 are more"),
        ({"seeds": [1]}, r"^seeds: expected one per prompt, 2, got 1"),
        ({"seeds": [1, -1]}, r"^seeds\[1\]: expected a whole number in \[0, 2\*\*63\), got -1"),
        ({"seeds": [2**63, 1]}, r"^seeds\[0\]: expected"),
        ({"seeds": [0.5, 1]}, r"^seeds\[0\]: expected"),
        ({"params": [DRAWN]}, r"^params: expected SamplingParams, or one per prompt, 2, got 1"),
        ({"params": {"max_new_tokens": 3}}, r"^params: expected SamplingParams"),
        ({"params": SamplingParams(4, stop=("x",))}, r"^params.stop: .*tokenizer.*prompts\[0\]"),
    ],
)
def test_bad_arguments_are_refused_by_name_before_anything_is_generated(
    model: Any, backend: Any, changes: dict[str, Any], message: str
) -> None:
    call: dict[str, Any] = {"prompts": [[5], [6, 7]], "n": 2, "params": DRAWN, "seeds": [1, 2]}
    with forward_shapes(model) as shapes, pytest.raises(InvalidInputError, match=message):
        backend.generate(**(call | changes))
    assert shapes == []
    assert backend.usage == Usage()


def test_no_prompts_and_prompts_without_samples_give_empty_lists(backend: Any) -> None:
    assert backend.generate([], 3, DRAWN, []) == []
    assert ids(backend.generate([[5], [6]], [0, 1], DRAWN, [1, 2]))[0] == []


def without_eos(model: Any) -> Any:
    changed = copy.deepcopy(model)
    changed.config.eos_token_id = changed.generation_config.eos_token_id = None
    return changed


def test_a_model_without_eos_is_refused_unless_rollouts_end_otherwise(model: Any) -> None:
    backend = TransformersBackend(without_eos(model))
    with pytest.raises(InvalidInputError, match=r"^model: expected an end-of-sequence token"):
        backend.generate([[5]], 1, SamplingParams(4), [1])
    for params in (SamplingParams(4, ignore_eos=True), SamplingParams(4, stop_token_ids=(7,))):
        assert len(backend.generate([[5]], 1, params, [1])[0]) == 1
    TransformersBackend(without_eos(model), eos_token_ids=[EOS]).generate([[5]], 1, DRAWN, [1])


def test_a_tokenizer_without_eos_is_refused_and_one_with_it_adds_its_own(model: Any) -> None:
    tokenizer = build_tokenizer(["abc"])
    tokenizer.eos_token = "<unk>"
    assert TransformersBackend(model, tokenizer).eos_token_ids == {EOS, 3}
    tokenizer.eos_token = None
    with pytest.raises(InvalidInputError, match=r"^tokenizer: expected one with an end-of-sequ"):
        TransformersBackend(model, tokenizer)
    assert TransformersBackend(model, tokenizer, eos_token_ids=[9]).eos_token_ids == {9}


def test_logprobs_that_are_not_numbers_are_an_error_not_a_rollout(model: Any) -> None:
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.lm_head.weight[3] = float("nan")
    backend = TransformersBackend(broken)
    with pytest.raises(NotFiniteError, match=r"^logprobs of rollouts: .*NaN"):
        backend.generate([[5]], 1, DRAWN, [1])


@pytest.mark.parametrize("name", ["max_batch_size", "max_batch_tokens", "max_length"])
def test_limits_that_are_not_positive_are_refused(model: Any, name: str) -> None:
    with pytest.raises(InvalidInputError, match=f"^{name}: expected at least 1, got 0"):
        TransformersBackend(model, **{name: 0})
