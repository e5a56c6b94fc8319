from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
)

from asyncrlhf import selective_log_softmax as selective
from asyncrlhf.engines.protocol import VersionSpan
from asyncrlhf.errors import InvalidInputError
from asyncrlhf.selective_log_softmax import (
    naive_selective_log_softmax,
    selective_log_softmax,
)
from asyncrlhf.sequences import (
    Batch,
    bounded_exp,
    first_eos_mask,
    k3,
    kl_estimates,
    pad_batch,
    pad_values,
    sequence_logps,
    staleness,
    token_logps,
    token_logps_and_entropy,
    truncate_at_eos,
)
from decapod.lm import build_model

VOCABULARY, EOS = 17, 2
POSITIONS = 12
PROMPTS = [[1, 5, 6], [1], [1, 7, 8, 9, 3], [1, 2, 2], [1, 4]]
COMPLETIONS = [[4, 5, 2, 9], [3], [6, 7, 8, 9, 10, 11, 12], [], [2]]
Rows = list[list[int]]


def llama() -> Any:
    return build_model(VOCABULARY, 16, heads=2, max_positions=POSITIONS, init_std=0.3)


def neox() -> Any:
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=POSITIONS,
        initializer_range=0.3,
    )
    return GPTNeoXForCausalLM(config).eval()


def gpt2() -> Any:
    """Has a table of positions, which padding must not leave."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=POSITIONS,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
    )
    return GPT2LMHeadModel(config).eval()


def with_lora() -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        # PEFT asks for a property that transformers has renamed.
        warnings.simplefilter("ignore", FutureWarning)
        return peft.get_peft_model(llama(), config).eval()


class WithoutKeeping(torch.nn.Module):
    """A model whose forward knows nothing of `logits_to_keep`."""

    def __init__(self) -> None:
        super().__init__()
        self.model = llama()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, use_cache: bool
    ) -> Any:
        return self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
        )


MODELS: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "neox": neox,
    "gpt2": gpt2,
    "lora": with_lora,
    "wrapped": lambda: torch.nn.DataParallel(llama()),
    "without keeping": WithoutKeeping,
}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]()


def batch() -> Batch:
    return pad_batch(PROMPTS, COMPLETIONS, pad_id=0, eos_ids={EOS})


def alone(model: Any, prompt: list[int], completion: list[int], temperature: float) -> list[float]:
    """Log-probabilities of one completion: no padding, no cache, plain log-softmax."""
    ids = torch.tensor([prompt + completion])
    logits = model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        position_ids=torch.arange(ids.shape[1])[None],
        use_cache=False,
    ).logits[0]
    logs = (logits / temperature).log_softmax(-1)
    return [logs[len(prompt) + t - 1, token].item() for t, token in enumerate(completion)]


def test_a_batch_is_what_its_fields_say() -> None:
    b = pad_batch([[7, 8], [9]], [[3, 2, 5], [4]], pad_id=0, eos_ids=[2])
    assert b.input_ids.tolist() == [[7, 8, 3, 2], [0, 9, 4, 0]]
    assert b.attention_mask.tolist() == [[1, 1, 1, 1], [0, 1, 1, 0]]
    assert b.position_ids.tolist() == [[0, 1, 2, 3], [0, 0, 1, 1]]
    assert b.completion_mask.tolist() == [[True, True], [True, False]]
    assert b.completion_ids.tolist() == [[3, 2], [4, 0]]
    assert b.has_eos.tolist() == [True, False]
    assert b.lengths.tolist() == [2, 1]
    assert torch.equal(b.to("cpu").input_ids, b.input_ids)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.tuples(
            st.lists(st.integers(0, 4), min_size=1, max_size=5),
            st.lists(st.integers(0, 4), max_size=6),
        ),
        min_size=1,
        max_size=5,
    ),
    pad=st.integers(0, 4),
    eos=st.sets(st.integers(0, 4), max_size=2),
)
def test_masks_come_from_lengths_whatever_the_padding_is(
    rows: list[tuple[list[int], list[int]]], pad: int, eos: set[int]
) -> None:
    """Also where the padding is a token of the text, or one that ends an answer."""
    prompts, completions = [list(r[0]) for r in rows], [list(r[1]) for r in rows]
    b = pad_batch(prompts, completions, pad, eos)
    kept: Rows = []
    for completion in completions:
        end = next((t for t, token in enumerate(completion) if token in eos), None)
        kept.append(completion if end is None else completion[: end + 1])
        assert list(truncate_at_eos(completion, eos)) == kept[-1]
    assert b.lengths.tolist() == [len(row) for row in kept]
    assert b.has_eos.tolist() == [any(t in eos for t in row) for row in completions]
    for i, (prompt, row) in enumerate(zip(prompts, kept, strict=True)):
        assert b.input_ids[i][b.attention_mask[i].bool()].tolist() == prompt + row
        assert b.completion_ids[i][b.completion_mask[i]].tolist() == row
        inside = b.attention_mask[i].bool()
        assert b.position_ids[i][inside].tolist() == list(range(len(prompt + row)))
        assert b.position_ids[i].max().item() == len(prompt + row) - 1
    whole = pad_batch(prompts, completions, pad)
    lengths = torch.tensor([len(row) for row in completions])
    found = first_eos_mask(whole.completion_ids, lengths, eos)
    width = b.completion_mask.shape[1]
    assert torch.equal(found[:, :width], b.completion_mask)
    assert not found[:, width:].any()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_row_does_not_depend_on_the_others(model: Any, temperature: float) -> None:
    """Nor on padding: alone, without any, the same log-probabilities come out."""
    b = batch()
    found = token_logps(model, b, temperature)
    assert found.shape == b.completion_mask.shape
    assert not found[~b.completion_mask].any()
    with torch.no_grad():
        for i, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
            kept = list(truncate_at_eos(completion, {EOS}))
            expected = alone(model, prompt, kept, temperature)
            assert found[i, : len(kept)].tolist() == pytest.approx(expected, abs=2e-5)


def test_the_padding_id_does_not_matter(model: Any) -> None:
    values = [
        token_logps(model, pad_batch(PROMPTS, COMPLETIONS, pad, {EOS})) for pad in (0, EOS, 9)
    ]
    for other in values[1:]:
        torch.testing.assert_close(other, values[0], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["llama", "lora", "wrapped"])
def test_logits_are_computed_for_completions_alone(name: str) -> None:
    model, b = MODELS[name](), batch()
    shapes = []
    head = next(m for path, m in model.named_modules() if path.endswith("lm_head"))
    head.register_forward_hook(lambda _module, _inputs, output: shapes.append(output.shape))
    token_logps(model, b)
    assert shapes == [(*b.completion_mask.shape, VOCABULARY)]


def test_nothing_as_wide_as_the_vocabulary_is_kept_but_the_logits() -> None:
    logits = torch.randn(4, 8, 1000).bfloat16().requires_grad_()
    ids = torch.zeros(4, 8, dtype=torch.int64)
    kept: dict[str, int] = {}
    for function in (selective_log_softmax, naive_selective_log_softmax):
        sizes: list[int] = []

        def pack(x: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(x.numel() * x.element_size())
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            function(logits, ids, 0.7)
        kept[function.__name__] = sum(sizes)
    own = logits.numel() * logits.element_size()
    assert kept["selective_log_softmax"] < 1.05 * own
    assert kept["naive_selective_log_softmax"] >= 2 * own


def test_empty_completions_alone_give_zeros_that_can_go_backward() -> None:
    model = llama()
    b = pad_batch([[1, 2], [3]], [[], []], pad_id=0)
    logps = token_logps(model, b)
    assert logps.tolist() == [[0.0], [0.0]]
    logps.sum().backward()
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


def test_gradients_are_those_of_the_definition() -> None:
    model, b = llama().double(), batch()
    weights = torch.arange(b.completion_mask.numel()).view(b.completion_mask.shape).cos()
    (token_logps(model, b, 0.8) * weights).sum().backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    logits = model(
        input_ids=b.input_ids,
        attention_mask=b.attention_mask,
        position_ids=b.position_ids,
        use_cache=False,
    ).logits
    width = b.completion_mask.shape[1]
    logs, _ = naive_selective_log_softmax(logits[:, -width - 1 : -1], b.completion_ids, 0.8)
    (logs * b.completion_mask * weights).sum().backward()
    for gradient, parameter in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1, 60, 2**24])
def test_pieces_add_up_to_the_definition(
    dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selective, "_CHUNK", chunk)
    g = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(5, 3, 7, generator=g, dtype=torch.float64)).to(dtype)
    logits[0, 0, 3] = -math.inf
    ids = torch.randint(4, 7, (5, 3), generator=g)
    weights = torch.randn(5, 3, generator=g, dtype=torch.float64)
    results = []
    for function in (selective_log_softmax, naive_selective_log_softmax):
        leaf = logits.clone().requires_grad_()
        options = {} if function is naive_selective_log_softmax else {"entropy": True}
        logps, entropy = function(leaf, ids, 0.7, **options)
        assert logps.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert not entropy.requires_grad
        (logps * weights).sum().backward()
        assert leaf.grad is not None
        assert leaf.grad.dtype == dtype
        results.append((logps.detach(), entropy, leaf.grad))
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    for found, expected in zip(*results, strict=True):
        coarse = 1e-2 if found.dtype == torch.bfloat16 else tolerance
        torch.testing.assert_close(found, expected, rtol=coarse, atol=tolerance)


def test_gradients_agree_with_finite_differences() -> None:
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 3, 5, generator=g, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(5, (2, 3), generator=g)
    assert torch.autograd.gradcheck(lambda x: selective_log_softmax(x, ids, 0.7)[0], logits)


def test_half_precision_logits_are_normalised_in_float32() -> None:
    b = batch()
    found = token_logps(llama().bfloat16(), b)
    assert found.dtype == torch.float32


def test_entropy_is_that_of_the_tempered_distribution() -> None:
    model, b = llama(), batch()
    logps, entropy = token_logps_and_entropy(model, b, 0.5)
    torch.testing.assert_close(logps, token_logps(model, b, 0.5), rtol=0, atol=0)
    prompt, completion = PROMPTS[2], COMPLETIONS[2]
    ids = torch.tensor([prompt + completion])
    p = (model(input_ids=ids).logits[0, len(prompt) - 1 : -1] / 0.5).softmax(-1)
    torch.testing.assert_close(
        entropy[2, : len(completion)], -(p * p.log()).sum(-1), rtol=1e-5, atol=1e-5
    )
    assert not entropy[~b.completion_mask].any()
    assert not entropy.requires_grad


def test_behaviour_log_probabilities_are_cut_at_the_first_eos() -> None:
    b = batch()
    rows = [[-0.1 * (t + 1) for t in range(len(row))] for row in COMPLETIONS]
    found = pad_values(rows, b.completion_mask)
    assert found.dtype == torch.float32
    assert found[0].tolist() == pytest.approx([-0.1, -0.2, -0.3, 0, 0, 0, 0])
    assert not found[~b.completion_mask].any()
    with pytest.raises(InvalidInputError, match="each of 3 tokens of row 0, got 1"):
        pad_values([rows[0][:1], *rows[1:]], b.completion_mask)
    with pytest.raises(InvalidInputError, match="values: expected 5 rows"):
        pad_values(rows[1:], b.completion_mask)


def test_sequence_log_probabilities_are_sums_over_the_mask() -> None:
    logps = torch.tensor([[-1.0, -2.0, math.nan], [math.nan] * 3], requires_grad=True)
    mask = torch.tensor([[True, True, False], [False] * 3])
    found = sequence_logps(logps, mask)
    assert found.tolist() == [-3.0, 0.0]
    found.sum().backward()
    assert logps.grad is not None
    assert logps.grad.tolist() == [[1, 1, 0], [0, 0, 0]]


def test_staleness_counts_from_the_oldest_token_in_the_loss() -> None:
    spans = [
        [VersionSpan(0, 4, 7)],
        [VersionSpan(0, 2, 5), VersionSpan(2, 6, 8)],
        [VersionSpan(0, 2, 8), VersionSpan(2, 6, 5)],  # swapped back: the oldest counts
        [VersionSpan(0, 2, 8), VersionSpan(2, 6, 5)],  # ... but not behind the EOS
        [],
    ]
    assert staleness(spans, [4, 3, 6, 2, 0], step=9).tolist() == [2, 4, 4, 1, 0]


@pytest.mark.parametrize(
    ("spans", "length", "message"),
    [
        ([VersionSpan(0, 2, 3)], 3, "expected spans over 3 tokens of completion 0"),
        ([], 1, "expected spans over 1 tokens"),
        ([VersionSpan(0, 2, 10)], 2, "expected versions up to step 9, got 10"),
    ],
)
def test_spans_that_cannot_be_are_refused(
    spans: list[VersionSpan], length: int, message: str
) -> None:
    with pytest.raises(InvalidInputError, match=message):
        staleness([spans], [length], step=9)


def test_kl_estimates_are_unbiased_for_what_the_policy_draws() -> None:
    """Their expectation, summed over a whole vocabulary, is the divergence itself."""
    g = torch.Generator().manual_seed(0)
    p = torch.randn(9, generator=g, dtype=torch.float64).log_softmax(0)
    q = torch.randn(9, generator=g, dtype=torch.float64).log_softmax(0)
    estimates = kl_estimates(p[None], q[None], torch.ones(1, 9, dtype=torch.bool))
    exact = (p.exp() * (p - q)).sum().item()
    assert (p.exp() * estimates.k1[0]).sum().item() == pytest.approx(exact, rel=1e-12)
    assert (p.exp() * estimates.k3[0]).sum().item() == pytest.approx(exact, rel=1e-12)


@settings(max_examples=60, deadline=None)
@given(pairs=st.lists(st.tuples(st.floats(-30, 0), st.floats(-30, 0)), min_size=1, max_size=6))
def test_k3_is_never_negative_and_zero_for_equal(pairs: list[tuple[float, float]]) -> None:
    p, q = torch.tensor(pairs, dtype=torch.float64).T[:, None]
    mask = torch.ones(p.shape, dtype=torch.bool)
    estimates = kl_estimates(p, q, mask)
    assert (estimates.k3 >= 0).all()
    assert estimates.sequence_k1.item() == pytest.approx((p - q).sum().item(), abs=1e-9)
    expected = [
        math.exp(b - a) - 1 - (b - a) if b - a < 20 else math.exp(20) - 21 for a, b in pairs
    ]
    assert estimates.sequence_k3.item() == pytest.approx(math.fsum(expected), rel=1e-9, abs=1e-12)
    same = kl_estimates(p, p, mask)
    assert not same.k1.any()
    assert not same.k3.any()
    nothing = kl_estimates(p, q * math.nan, ~mask)
    assert not nothing.k1.any()
    assert not nothing.k3.any()


@pytest.mark.parametrize("size", [1e4, -1e4])
@pytest.mark.parametrize("function", [bounded_exp, k3])
def test_huge_log_ratios_stay_finite_without_pull(
    function: Callable[[Tensor], Tensor], size: float
) -> None:
    x = torch.tensor([size, 1.0], requires_grad=True)
    y = function(x)
    y.sum().backward()
    assert torch.isfinite(y).all()
    assert x.grad is not None
    # Far below, k3 falls with slope −1, which is its true derivative.
    assert x.grad[0].item() == (-1.0 if function is k3 and size < 0 else 0.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pad_batch([], [], 0), "prompts: expected at least one"),
        (lambda: pad_batch([[1]], [], 0), "completions: expected one for each of 1 prompts"),
        (lambda: pad_batch([[1], []], [[2], [3]], 0), "at least one token each, got none in row 1"),
        (lambda: token_logps(None, batch(), 0.0), "temperature: expected a positive"),
        (lambda: token_logps(None, batch(), math.nan), "temperature: expected a positive"),
    ],
)
def test_what_does_not_fit_is_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        call()
