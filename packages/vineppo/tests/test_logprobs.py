from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vineppo import logprobs
from vineppo.errors import InvalidInputError
from vineppo.logprobs import naive_selective_logprobs, selective_logprobs

SHAPES = [(3, 5, 7), (4, 2, 3), (1, 40, 11), (6, 5), (0, 3, 5), (3, 0, 5), (2, 3, 1)]


def made(shape: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(shape, generator=g, dtype=torch.float64)
    return logits, torch.randint(0, shape[-1], shape[:-1], generator=g)


@pytest.mark.parametrize("piece", [1, 20, 2**22])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_those_of_the_definition(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], temperature: float, piece: int
) -> None:
    monkeypatch.setattr(logprobs, "_PIECE", piece)
    logits, ids = made(shape)
    weights = torch.linspace(-1, 2, ids.numel(), dtype=torch.float64).reshape(ids.shape)
    found = []
    for function in (selective_logprobs, naive_selective_logprobs):
        x = logits.clone().requires_grad_()
        y = function(x, ids, temperature)
        (gradient,) = torch.autograd.grad((y * weights).sum(), x)
        found.append((y.detach(), gradient))
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)


def test_gradients_are_finite_differences() -> None:
    logits, ids = made((2, 3, 4))
    assert torch.autograd.gradcheck(
        lambda x: selective_logprobs(x, ids, 0.6), logits.requires_grad_()
    )


def test_views_with_strides_and_small_integers_are_taken_as_they_are() -> None:
    logits, ids = made((3, 6, 5))
    leaf = logits.clone().requires_grad_()
    found = selective_logprobs(leaf[:, :-1], ids[:, 1:].int(), 0.6)
    torch.testing.assert_close(
        found, naive_selective_logprobs(logits[:, :-1], ids[:, 1:], 0.6), rtol=1e-12, atol=1e-12
    )
    (gradient,) = torch.autograd.grad(found.sum(), leaf)
    assert gradient.shape == logits.shape
    assert not gradient[:, -1].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_normalised_in_float32(dtype: torch.dtype) -> None:
    logits, ids = made((2, 5, 300))
    half = logits.to(dtype).requires_grad_()
    found = selective_logprobs(half, ids, 0.6)
    assert found.dtype == torch.float32
    exact = naive_selective_logprobs(half.detach().double(), ids, 0.6)
    torch.testing.assert_close(found.detach().double(), exact, rtol=1e-5, atol=1e-5)
    found.sum().backward()
    assert half.grad is not None
    assert half.grad.dtype == dtype


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf])
def test_logits_of_places_without_gradient_do_not_matter(garbage: float) -> None:
    logits, ids = made((2, 4, 5))
    mask = torch.tensor([[False, True, True, True], [True, True, False, False]])
    x = torch.where(mask[..., None], logits, garbage).requires_grad_()
    found = torch.where(mask, selective_logprobs(x, ids), 0.0)
    (gradient,) = torch.autograd.grad(found.sum(), x)
    clean = logits.clone().requires_grad_()
    expected = torch.where(mask, naive_selective_logprobs(clean, ids), 0.0)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), clean)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-12)


def test_forbidden_tokens_take_no_part() -> None:
    logits = torch.tensor([[0.0, -torch.inf, 1.0]], requires_grad=True)
    found = selective_logprobs(logits, torch.tensor([2]))
    torch.testing.assert_close(found, torch.tensor([0.0, 1.0]).log_softmax(0)[1:])
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    assert gradient[0, 1] == 0.0
    assert gradient.isfinite().all()


def test_large_logits_do_not_overflow() -> None:
    found = selective_logprobs(torch.tensor([[1e4, 0.0]]), torch.tensor([1]), 0.5)
    assert found.item() == pytest.approx(-2e4)


class Saved:
    """Counts the numbers that autograd keeps for backward."""

    def __init__(self) -> None:
        self.storages: dict[int, int] = {}

    def pack(self, x: Tensor) -> Tensor:
        self.storages[x.untyped_storage().data_ptr()] = x.numel()
        return x


def test_beside_the_logits_one_number_per_position_is_kept_for_backward() -> None:
    logits, ids = made((2, 8, 100))
    leaf = logits.float().requires_grad_()
    saved = Saved()
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda x: x):
        selective_logprobs(leaf, ids, 0.6)
    del saved.storages[leaf.untyped_storage().data_ptr()]
    assert sum(saved.storages.values()) == 2 * ids.numel()  # ids and normalisers


@pytest.mark.parametrize(
    ("shape", "ids", "temperature", "name"),
    [
        ((2, 3, 4), torch.zeros(2, 2, dtype=torch.int64), 1.0, r"ids: .*\(2, 3, 4\) and \(2, 2\)"),
        ((4,), torch.zeros(0, dtype=torch.int64), 1.0, r"logits, ids: .*\(4,\)"),
        ((1, 4), torch.tensor([-100]), 1.0, "ids: expected from 0 to 3, got -100"),
        ((1, 4), torch.tensor([4]), 1.0, "ids: expected from 0 to 3, got 4"),
        ((1, 4), torch.tensor([1.0]), 1.0, "ids: expected integers"),
        ((1, 4), torch.tensor([1]), 0.0, "temperature"),
    ],
)
def test_what_does_not_fit_is_refused(
    shape: tuple[int, ...], ids: Tensor, temperature: float, name: str
) -> None:
    function: Any
    for function in (selective_logprobs, naive_selective_logprobs):
        with pytest.raises(InvalidInputError, match=name):
            function(torch.zeros(shape), ids, temperature)
