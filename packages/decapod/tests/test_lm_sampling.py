"""The noise, the cuts, and the draw of one token per row."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare, kstest

from decapod.lm.sampling import allowed, choose, sampler_logprobs, uniform

WORD = 2**64
GAMMA = 0x9E3779B97F4A7C15


def split_mix(x: int) -> int:
    """The mixer of SplitMix64 in Python's own integers."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % WORD
    return x ^ (x >> 31)


@given(
    st.integers(0, 2**63 - 1),
    st.integers(0, 2**20),
    st.integers(0, 400),
)
@settings(max_examples=50, deadline=None)
def test_noise_is_split_mix_of_seed_step_and_token(seed: int, step: int, token: int) -> None:
    stream = split_mix((split_mix((seed + 1) * GAMMA % WORD) + (step + 1) * GAMMA) % WORD)
    word = split_mix((stream + (token + 1) * GAMMA) % WORD)
    expected = ((word >> 12) + 0.5) / 2**52
    assert uniform(torch.tensor([seed]), step, token + 1)[0, token].item() == expected


def test_noise_is_uniform_and_without_correlation_between_seeds_steps_and_tokens() -> None:
    seeds = torch.arange(200)
    draws = torch.stack([uniform(seeds, step, 50) for step in range(20)], 1).numpy()
    assert draws.min() > 0
    assert draws.max() < 1
    assert kstest(draws.ravel(), "uniform").pvalue > 1e-3
    centred = draws - 0.5
    for axis in range(3):
        left = np.take(centred, range(draws.shape[axis] - 1), axis)
        right = np.take(centred, range(1, draws.shape[axis]), axis)
        # Twelve times the mean product is normal with variance 1 / n under independence.
        assert abs(12 * (left * right).mean()) * left.size**0.5 < 4


def test_noise_of_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    seeds = torch.tensor([3, 2**63 - 1, 0])
    together = uniform(seeds, 7, 30)
    for row, seed in enumerate(seeds):
        assert torch.equal(together[row], uniform(seed[None], 7, 30)[0])
    assert torch.equal(together[:, :10], uniform(seeds, 7, 10))


def reference_cut(probabilities: list[float], top_k: int, top_p: float) -> set[int]:
    order = sorted(range(len(probabilities)), key=lambda i: (-probabilities[i], i))
    order = order[:top_k] if top_k else order
    if top_p == 1:
        return set(order)
    total = sum(probabilities[i] for i in order)
    for size in range(1, len(order)):
        if sum(probabilities[i] for i in order[:size]) / total >= top_p:
            return set(order[:size])
    return set(order)


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=12),
    st.integers(0, 14),
    st.integers(1, 100),
)
@settings(max_examples=200, deadline=None)
def test_cuts_keep_what_the_definition_keeps(weights: list[int], top_k: int, percent: int) -> None:
    # Halfway between whole percents of the total, where rounding decides nothing.
    top_p = 1.0 if percent == 100 else (percent + 0.4142135) / 100
    probabilities = np.array(weights) / sum(weights)
    kept = allowed(
        torch.tensor(probabilities).log()[None], torch.tensor([top_k]), torch.tensor([top_p])
    )[0]
    expected = reference_cut(probabilities.tolist(), top_k, top_p)
    assert set(kept.nonzero()[:, 0].tolist()) == expected


def test_tokens_without_probability_are_never_drawn() -> None:
    logprobs = torch.tensor([[0.5, 0.0, 0.5, 0.0]]).log().repeat(500, 1)
    drawn = choose(
        logprobs,
        torch.full((500,), 2.0, dtype=torch.float64),
        torch.zeros(500, dtype=torch.long),
        torch.ones(500, dtype=torch.float64),
        torch.arange(500),
        0,
    )
    assert set(drawn.tolist()) == {0, 2}


def test_draws_have_the_frequencies_of_the_tempered_distribution_in_a_large_vocabulary() -> None:
    rows, size, temperature = 4000, 2000, 1.5
    logprobs = torch.tensor(np.random.default_rng(0).normal(0, 2, size)).log_softmax(-1)
    counts = np.zeros(size)
    for step in range(3):
        drawn = choose(
            logprobs.expand(rows, -1),
            torch.full((rows,), temperature, dtype=torch.float64),
            torch.zeros(rows, dtype=torch.long),
            torch.ones(rows, dtype=torch.float64),
            torch.arange(rows),
            step,
        )
        counts += np.bincount(drawn.numpy(), minlength=size)
    expected = (logprobs / temperature).softmax(-1).numpy() * counts.sum()
    order = np.argsort(expected)
    groups = np.array_split(order, 100)
    observed = [counts[group].sum() for group in groups]
    assert chisquare(observed, [expected[group].sum() for group in groups]).pvalue > 1e-3


def test_greedy_rows_stand_beside_drawn_rows() -> None:
    logprobs = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    temperature = torch.tensor([0, 1, 0, 2, 0.5, 0], dtype=torch.float64)
    arguments = torch.zeros(6, dtype=torch.long), torch.ones(6, dtype=torch.float64)
    drawn = choose(logprobs, temperature, *arguments, torch.arange(6), 3)
    for row in range(6):
        alone = choose(
            logprobs[row : row + 1],
            temperature[row : row + 1],
            arguments[0][:1],
            arguments[1][:1],
            torch.tensor([row]),
            3,
        )
        assert drawn[row] == alone[0]
    assert torch.equal(drawn[temperature == 0], logprobs.argmax(-1)[temperature == 0])


@given(
    st.lists(st.integers(1, 40), min_size=2, max_size=12),
    st.integers(0, 14),
    st.integers(1, 100),
    st.floats(0.2, 3.0),
)
@settings(max_examples=100, deadline=None)
def test_logprobs_of_the_sampler_are_those_of_the_kept_tokens_renormalised(
    weights: list[int], top_k: int, percent: int, temperature: float
) -> None:
    top_p = 1.0 if percent == 100 else (percent + 0.4142135) / 100
    tempered = (np.array(weights) / sum(weights)) ** (1 / temperature)
    tempered /= tempered.sum()
    found = sampler_logprobs(
        torch.tensor(weights, dtype=torch.float64).log().log_softmax(-1)[None],
        torch.tensor([temperature], dtype=torch.float64),
        torch.tensor([top_k]),
        torch.tensor([top_p]),
    )[0].exp()
    kept = sorted(found.nonzero()[:, 0].tolist())
    expected = np.zeros(len(weights))
    expected[kept] = tempered[kept] / tempered[kept].sum()
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)
    # Tokens of equal weight after rounding may be cut either way; their number may not.
    assert abs(len(kept) - len(reference_cut(tempered.tolist(), top_k, top_p))) <= 1


def test_logprobs_of_the_sampler_of_a_greedy_row_are_those_of_the_model() -> None:
    logprobs = torch.randn(2, 40, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    found = sampler_logprobs(
        logprobs,
        torch.tensor([0.0, 1.0], dtype=torch.float64),
        torch.tensor([3, 0]),
        torch.tensor([0.5, 1.0], dtype=torch.float64),
    )
    np.testing.assert_allclose(found.numpy(), logprobs.numpy(), atol=1e-6)
