from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vineppo import losses
from vineppo.errors import InvalidInputError, NotFiniteError

NAN, INF = math.nan, math.inf
B, T = 5, 6
Rows = list[list[float]]


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_mask(seed: int) -> Tensor:
    """Answers of length 0 to T, one empty and one full."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, T + 1, (B,), generator=g)
    lengths[0], lengths[1] = 0, T
    return torch.arange(T) < lengths[:, None]


# --- formulas in plain Python, which share nothing with the library ------------------------------


def reduced(per_token: Rows, mask: list[list[bool]], reduction: str) -> float:
    rows = [
        [x for x, inside in zip(row, places, strict=True) if inside]
        for row, places in zip(per_token, mask, strict=True)
    ]
    rows = [row for row in rows if row]
    if reduction == "token":
        return math.fsum(x for row in rows for x in row) / sum(len(row) for row in rows)
    if reduction == "sequence":
        return math.fsum(math.fsum(row) / len(row) for row in rows) / len(rows)
    return math.fsum(math.fsum(row) for row in rows) / len(rows)


def naive_ppo(new: float, old: float, advantage: float, clip: float) -> tuple[float, float]:
    """Of one token: the loss, and its derivative by the new log-probability."""
    ratio = math.exp(new - old)
    stopped = (advantage > 0 and ratio > 1 + clip) or (advantage < 0 and ratio < 1 - clip)
    if stopped:
        return -advantage * (1 + clip if ratio > 1 else 1 - clip), 0.0
    return -advantage * ratio, -advantage * ratio


def naive_value(v: float, old: float, target: float, clip: float) -> tuple[float, float]:
    bounded = min(max(v, old - clip), old + clip)
    free, held = (v - target) ** 2, (bounded - target) ** 2
    slope = 0.0 if held > free else v - target
    return 0.5 * max(free, held), slope


def naive_kl(new: float, ref: float, kind: str, clamp: float) -> tuple[float, float]:
    d = ref - new
    value, slope = {
        "k1": (-d, 1.0),
        "k2": (d * d / 2, -d),
        "k3": (math.exp(d) - d - 1, 1 - math.exp(d)),
    }[kind]
    return (clamp, 0.0) if value > clamp else (value, slope)


def naive_sft(new: float) -> tuple[float, float]:
    return -new, -1.0


def naive_loss(
    of_token: Callable[..., tuple[float, float]], inputs: list[Tensor], mask: Tensor, reduction: str
) -> tuple[float, Tensor]:
    """Loss and gradient by the first input."""
    rows, inside = [x.tolist() for x in inputs], mask.tolist()
    found = [
        [of_token(*(x[b][t] for x in rows)) if inside[b][t] else (NAN, NAN) for t in range(T)]
        for b in range(B)
    ]
    loss = reduced([[value for value, _ in row] for row in found], inside, reduction)
    gradient = torch.zeros(B, T, dtype=torch.float64)
    full = sum(any(row) for row in inside)
    for b, t in mask.nonzero().tolist():
        weight = {
            "token": 1 / sum(map(sum, inside)),
            "sequence": 1 / sum(inside[b]) / full,
            "sequence_sum": 1 / full,
        }[reduction]
        gradient[b, t] = weight * found[b][t][1]
    return loss, gradient


def ppo(x: list[Tensor], mask: Tensor, **rest: Any) -> Tensor:
    return losses.ppo_clip_loss(x[0], x[1], x[2], mask, **rest).loss


def value(x: list[Tensor], mask: Tensor, reduction: str = "token", **rest: Any) -> Tensor:
    return losses.value_clip_loss(x[0], x[1], x[2], mask, **rest).loss


def kl(kind: Any) -> Callable[..., Tensor]:
    def loss(x: list[Tensor], mask: Tensor, **rest: Any) -> Tensor:
        estimates = losses.kl_estimate(x[0], x[1], kind, 1.5, mask=mask)
        return losses.kl_loss(estimates, mask, **rest)

    return loss


def sft(x: list[Tensor], mask: Tensor, **rest: Any) -> Tensor:
    return losses.sft_loss(x[0], mask, **rest).loss


ALL = ("token", "sequence", "sequence_sum")
CASES: dict[str, tuple[Callable[..., Tensor], Callable[..., tuple[float, float]], int, Any]] = {
    "ppo": (ppo, lambda n, o, a: naive_ppo(n, o, a, 0.2), 3, ALL),
    "value": (value, lambda v, o, g: naive_value(v, o, g, 0.2), 3, ("token",)),
    "k1": (kl("k1"), lambda n, r: naive_kl(n, r, "k1", 1.5), 2, ALL),
    "k2": (kl("k2"), lambda n, r: naive_kl(n, r, "k2", 1.5), 2, ALL),
    "k3": (kl("k3"), lambda n, r: naive_kl(n, r, "k3", 1.5), 2, ALL),
    "sft": (sft, naive_sft, 1, ALL),
}
EACH = [(name, reduction) for name, case in CASES.items() for reduction in case[3]]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("name", "reduction"), EACH)
def test_losses_and_gradients_are_those_of_the_formula(
    name: str, reduction: str, seed: int
) -> None:
    loss_of, of_token, arity, _ = CASES[name]
    mask = random_mask(seed)
    inputs = [normal(seed + i, B, T) for i in range(arity)]
    first = inputs[0].requires_grad_()
    loss = loss_of(inputs, mask, reduction=reduction)
    (gradient,) = torch.autograd.grad(loss, first)
    expected, expected_gradient = naive_loss(of_token, inputs, mask, reduction)
    assert loss.item() == pytest.approx(expected, abs=1e-9, rel=1e-9)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("name", "reduction"), EACH)
def test_gradients_are_finite_differences(name: str, reduction: str) -> None:
    loss_of, _, arity, _ = CASES[name]
    mask = random_mask(1)
    inputs = [normal(11 + i, B, T) for i in range(arity)]
    inputs[0].requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: loss_of([x, *inputs[1:]], mask, reduction=reduction), inputs[0]
    )


@settings(max_examples=30, deadline=None)
@given(
    case=st.sampled_from(EACH),
    seed=st.integers(0, 2**31),
    parts=st.lists(st.integers(0, 2), min_size=B, max_size=B),
)
def test_any_partition_of_the_rows_gives_the_loss_and_gradient_of_the_whole(
    case: tuple[str, Any], seed: int, parts: list[int]
) -> None:
    name, reduction = case
    loss_of, _, arity, _ = CASES[name]
    mask = random_mask(seed)
    inputs = [normal(seed + i, B, T) for i in range(arity)]
    inputs[0].requires_grad_()
    whole = loss_of(inputs, mask, reduction=reduction)
    (gradient,) = torch.autograd.grad(whole, inputs[0])
    rows_of = [[b for b in range(B) if parts[b] == part] for part in range(3)]
    denominator = sum(losses.count_for(mask[rows], reduction) for rows in rows_of)
    pieces = [
        loss_of([x[rows] for x in inputs], mask[rows], reduction=reduction, denominator=denominator)
        for rows in rows_of
    ]
    summed = torch.stack(pieces).sum()
    (of_pieces,) = torch.autograd.grad(summed, inputs[0])
    torch.testing.assert_close(summed, whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(of_pieces, gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("garbage", [0.0, -INF, INF, NAN, -1e30, 1e30])
@pytest.mark.parametrize(("name", "reduction"), EACH)
def test_what_stands_outside_the_mask_changes_neither_loss_nor_gradient(
    name: str, reduction: str, garbage: float
) -> None:
    loss_of, _, arity, _ = CASES[name]
    mask = random_mask(2)
    clean = [normal(i, B, T) for i in range(arity)]
    found = []
    for fill in (1.0, garbage):
        inputs = [torch.where(mask, x, fill) for x in clean]
        inputs[0].requires_grad_()
        loss = loss_of(inputs, mask, reduction=reduction)
        (gradient,) = torch.autograd.grad(loss, inputs[0])
        found.append((loss, gradient))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert not found[1][1][~mask].any()


@pytest.mark.parametrize("width", [0, 3])
@pytest.mark.parametrize(("name", "reduction"), EACH)
def test_without_any_token_loss_and_gradient_are_zero(
    name: str, reduction: str, width: int
) -> None:
    loss_of, _, arity, _ = CASES[name]
    inputs = [torch.full((2, width), NAN) for _ in range(arity)]
    inputs[0].requires_grad_()
    loss = loss_of(inputs, torch.zeros(2, width, dtype=torch.bool), reduction=reduction)
    loss.backward()
    assert loss.item() == 0.0
    assert inputs[0].grad is not None
    assert not inputs[0].grad.any()


@pytest.mark.parametrize("name", CASES)
def test_only_the_first_input_gets_a_gradient(name: str) -> None:
    loss_of, _, arity, _ = CASES[name]
    inputs = [normal(i, B, T).requires_grad_() for i in range(arity)]
    loss_of(inputs, random_mask(1)).backward()
    assert [x.grad is not None for x in inputs] == [True] + [False] * (arity - 1)


ARGUMENTS = {
    "ppo": ["logprobs", "old_logprobs", "advantages"],
    "value": ["values", "old_values", "returns"],
    "k3": ["logprobs", "ref_logprobs"],
    "sft": ["logprobs"],
}


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize(
    ("name", "place"), [(name, i) for name, of in ARGUMENTS.items() for i in range(len(of))]
)
def test_a_number_under_the_mask_that_is_not_finite_is_named(
    name: str, place: int, bad: float
) -> None:
    loss_of, _, arity, _ = CASES[name]
    inputs = [normal(i, B, T) for i in range(arity)]
    inputs[place][1, 3] = bad
    argument = ARGUMENTS[name][place]
    with pytest.raises(NotFiniteError, match=rf"^{argument}: .*{bad} at \(1, 3\) and 1 such"):
        loss_of(inputs, random_mask(1))


@pytest.mark.parametrize(
    ("name", "place"),
    [(name, i) for name, of in ARGUMENTS.items() for i in range(len(of))],
)
def test_a_shape_that_does_not_fit_is_named_with_the_one_expected(name: str, place: int) -> None:
    loss_of, _, arity, _ = CASES[name]
    inputs = [normal(i, B, T) for i in range(arity)]
    inputs[place] = inputs[place][:, 1:]
    with pytest.raises(
        InvalidInputError, match=rf"{ARGUMENTS[name][place]}.*expected.*\(5, 5\)"
    ) as error:
        loss_of(inputs, random_mask(1))
    assert "(5, 6)" in str(error.value) or "same shape" in str(error.value)


@pytest.mark.parametrize("name", CASES)
def test_masks_denominators_and_reductions_are_checked(name: str) -> None:
    loss_of, _, arity, reductions = CASES[name]
    inputs, mask = [normal(i, B, T) for i in range(arity)], random_mask(1)
    with pytest.raises(InvalidInputError, match=r"mask: .*mask\.bool\(\)"):
        loss_of(inputs, mask.long())
    with pytest.raises(InvalidInputError, match="denominator: expected a number above 0, got 0"):
        loss_of(inputs, mask, denominator=0)
    if len(reductions) > 1:
        with pytest.raises(InvalidInputError, match="reduction: expected one of token"):
            loss_of(inputs, mask, reduction="mean")


def test_half_precision_is_computed_in_float32() -> None:
    mask = random_mask(1)
    inputs = [normal(i, B, T).bfloat16() for i in range(3)]
    for name in ("ppo", "value", "k3", "sft"):
        loss_of, _, arity, _ = CASES[name]
        exact = loss_of([x.double() for x in inputs[:arity]], mask)
        found = loss_of(inputs[:arity], mask)
        assert found.dtype == torch.float32
        assert found.item() == pytest.approx(exact.item(), rel=1e-5)


def test_float64_advantages_with_float32_log_probabilities_are_taken_as_they_are() -> None:
    mask = random_mask(1)
    inputs = [normal(0, B, T).float(), normal(1, B, T).float(), normal(2, B, T)]
    for name in ("ppo", "value"):
        exact = CASES[name][0]([x.double() for x in inputs], mask)
        assert CASES[name][0](inputs, mask).item() == pytest.approx(exact.item(), rel=1e-6)


# --- the clipped surrogate -----------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ALL)
def test_on_policy_the_ratio_is_1_and_the_gradient_that_of_the_policy_gradient(
    reduction: Any,
) -> None:
    mask, advantages = random_mask(4), normal(1, B, T)
    new = normal(0, B, T).requires_grad_()
    found = losses.ppo_clip_loss(new, new.detach(), advantages, mask, reduction=reduction)
    assert found.stats["ratio"] == found.stats["ratio_max"] == 1.0
    assert found.stats["clip_fraction"] == found.stats["approx_kl"] == 0.0
    (gradient,) = torch.autograd.grad(found.loss, new)
    linear = [(advantages * new).detach()]
    _, expected = naive_loss(lambda x: (-x, -1.0), linear, mask, reduction)
    torch.testing.assert_close(gradient, expected * advantages, rtol=1e-12, atol=1e-12)


def test_the_sum_over_tokens_has_the_gradient_of_reinforce_whatever_the_lengths() -> None:
    mask, advantages = random_mask(4), normal(1, B, T)
    mask[0, 0] = True  # no row is empty
    new = normal(0, B, T).requires_grad_()
    loss = losses.ppo_clip_loss(new, new.detach(), advantages, mask, reduction="sequence_sum").loss
    reinforce = -torch.stack([(advantages[b] * new[b])[mask[b]].sum() for b in range(B)]).mean()
    (found,) = torch.autograd.grad(loss, new)
    (expected,) = torch.autograd.grad(reinforce, new)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_statistics_of_the_surrogate_by_hand() -> None:
    ratios = torch.tensor([[1.5, 0.5, 1.5, 1.1, 99.0]], dtype=torch.float64)
    advantages = torch.tensor([[1.0, -1.0, -1.0, 1.0, 1.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, True, True, False]])
    old = torch.full_like(ratios, -2.0)
    found = losses.ppo_clip_loss(old + ratios.log(), old, advantages, mask)
    # Clipped are the first two; the third is outside the range, but is pulled back.
    assert found.loss.item() == pytest.approx((-1.2 + 0.8 + 1.5 - 1.1) / 4, abs=1e-12)
    assert found.stats["clip_fraction"] == 0.5
    assert found.stats["ratio"].item() == pytest.approx(4.6 / 4, abs=1e-12)
    assert found.stats["ratio_max"].item() == pytest.approx(1.5, abs=1e-12)
    expected_kl = math.fsum(r - 1 - math.log(r) for r in (1.5, 0.5, 1.5, 1.1)) / 4
    assert found.stats["approx_kl"].item() == pytest.approx(expected_kl, abs=1e-12)
    assert not any(x.requires_grad or x.ndim for x in found.stats.values())


def test_statistics_weighed_by_tokens_are_those_of_the_whole() -> None:
    mask = random_mask(3)
    new, old, advantages = (normal(i, B, T) for i in range(3))
    whole = losses.ppo_clip_loss(new, old, advantages, mask).stats
    parts = [slice(0, 1), slice(1, 3), slice(3, 5)]  # the first has no token
    stats = [losses.ppo_clip_loss(new[p], old[p], advantages[p], mask[p]).stats for p in parts]
    weights = [mask[p].sum() / mask.sum() for p in parts]
    for name in ("ratio", "clip_fraction", "approx_kl"):
        mean = sum(w * s[name] for w, s in zip(weights, stats, strict=True))
        assert float(mean) == pytest.approx(whole[name].item(), abs=1e-6)
    assert max(s["ratio_max"] for s in stats) == whole["ratio_max"]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_diverged_policy_gives_finite_loss_and_gradient_and_is_guarded(sign: float) -> None:
    new = torch.tensor([[-1.0, -1.0]], requires_grad=True)
    old = torch.tensor([[-500.0, -1.0]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    found = losses.ppo_clip_loss(new, old, torch.full((1, 2), sign), mask)
    guard = losses.ratio_guard(found.stats["ratio"])
    assert found.loss.isfinite()
    assert guard == 0.0
    (gradient,) = torch.autograd.grad(found.loss * guard, new)
    assert gradient.tolist() == [[0.0, 0.0]]


def test_the_ratio_guard_lets_pass_up_to_its_limit() -> None:
    ratios = torch.tensor([0.0, 1.0, 10.0, 10.001, INF, NAN])
    assert [losses.ratio_guard(r).item() for r in ratios] == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    assert losses.ratio_guard(torch.tensor(3.0), limit=2.0) == 0.0
    with pytest.raises(InvalidInputError, match="limit"):
        losses.ratio_guard(ratios[0], limit=0.0)


# --- the critic ----------------------------------------------------------------------------------


def test_without_clipping_the_critics_loss_is_half_the_mean_square() -> None:
    mask = random_mask(1)
    v, old, target = (normal(i, B, T) for i in range(3))
    found = losses.value_clip_loss(v, old, target, mask, INF)
    expected = 0.5 * (v - target)[mask].square().mean()
    assert found.loss.item() == pytest.approx(expected.item(), abs=1e-12)
    assert found.stats["value_clip_fraction"] == 0.0
    assert found.stats["value_error"].item() == pytest.approx(
        (v - target)[mask].abs().mean().item(), abs=1e-12
    )
    assert found.stats["value_mean"].item() == pytest.approx(v[mask].mean().item(), abs=1e-12)


# --- divergence ----------------------------------------------------------------------------------


def test_k3_is_the_formula_of_the_paper_not_negative_and_zero_at_equality() -> None:
    new, ref = normal(0, 50), normal(1, 50)
    found = losses.kl_estimate(new, ref)
    d = ref - new
    torch.testing.assert_close(found, (d.exp() - d - 1).clamp(0, 10), rtol=1e-9, atol=1e-12)
    assert (found >= 0).all()
    for kind in losses.KL_KINDS:
        assert not losses.kl_estimate(new, new, kind).any()
    # Where exp(d) - d - 1 would lose all its digits: d^2 / 2 + d^3 / 6.
    tiny = torch.tensor([1e-7], dtype=torch.float64)
    assert losses.kl_estimate(-tiny, 0 * tiny).item() == pytest.approx(5e-15, rel=1e-6, abs=0)


@pytest.mark.parametrize("kind", losses.KL_KINDS)
def test_estimates_are_clamped_at_the_top_and_k1_only_there(kind: Any) -> None:
    new = torch.tensor([-200.0, -20.0, -0.1], requires_grad=True)
    ref = torch.tensor([-0.1, -0.2, -200.0])
    found = losses.kl_estimate(new, ref, kind, 10.0)
    expected = {
        "k1": [-199.9, -19.8, 10.0],
        "k2": [10.0, 10.0, 10.0],
        "k3": [10.0, 10.0, 10.0],
    }[kind]
    torch.testing.assert_close(found.detach(), torch.tensor(expected))
    (gradient,) = torch.autograd.grad(found.sum(), new)
    assert gradient.isfinite().all()
    assert gradient[2] == 0.0
    loose = losses.kl_estimate(new, ref, kind, INF)
    assert loose.isfinite().all()
    (gradient,) = torch.autograd.grad(loose.sum(), new)
    assert gradient.isfinite().all()


def softmax_pair() -> tuple[Tensor, Tensor]:
    return normal(0, 6).requires_grad_(), normal(1, 6).log_softmax(0)


@pytest.mark.parametrize("kind", losses.KL_KINDS)
def test_expected_values_and_gradients_of_the_estimates_are_as_documented(kind: Any) -> None:
    """Exact expectations over a vocabulary of 6, no sampling."""
    logits, ref = softmax_pair()
    logprobs = logits.log_softmax(0)
    probabilities = logprobs.exp().detach()
    estimates = losses.kl_estimate(logprobs, ref, kind, INF)
    mean = (probabilities * estimates).sum()
    (found,) = torch.autograd.grad(mean, logits, retain_graph=True)
    forward = (logprobs.exp() * (logprobs - ref)).sum()
    backward = (ref.exp() * (ref - logprobs)).sum()
    if kind == "k2":
        assert abs(mean.item() - forward.item()) > 1e-3
    else:
        assert mean.item() == pytest.approx(forward.item(), abs=1e-12)
    if kind == "k1":
        expected = torch.zeros_like(found)
    else:
        (expected,) = torch.autograd.grad(forward if kind == "k2" else backward, logits)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_estimates_without_a_mask_still_do_not_pass_the_loss() -> None:
    mask = random_mask(1)
    ref = normal(1, B, T)
    ref[1, 3] = NAN
    with pytest.raises(NotFiniteError, match=r"estimates: .*\(1, 3\)"):
        losses.kl_loss(losses.kl_estimate(normal(0, B, T), ref), mask)


def test_estimates_refuse_what_they_do_not_know() -> None:
    x = torch.zeros(3)
    with pytest.raises(InvalidInputError, match="kind: expected one of k1, k2, k3"):
        losses.kl_estimate(x, x, "kl")  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="clamp"):
        losses.kl_estimate(x, x, clamp=0.0)


# --- DPO-Positive --------------------------------------------------------------------------------


def naive_dpo(w: float, lose: float, rw: float, rl: float, beta: float, lam: float) -> float:
    z = beta * ((w - rw) - (lose - rl) - lam * max(0.0, rw - w))
    return math.log1p(math.exp(-z)) if z > 0 else -z + math.log1p(math.exp(z))


def pairs(seed: int, n: int = 7) -> list[Tensor]:
    return [normal(seed + i, n) - 3.0 for i in range(4)]


@pytest.mark.parametrize("lam", [0.0, 1.0, 50.0])
@pytest.mark.parametrize("seed", range(3))
def test_dpo_positive_is_the_formula_and_its_gradient_the_finite_difference(
    seed: int, lam: float
) -> None:
    chosen, rejected, ref_chosen, ref_rejected = pairs(seed)
    inputs = (chosen.requires_grad_(), rejected.requires_grad_())
    found = losses.dpo_positive_loss(*inputs, ref_chosen, ref_rejected, 0.3, lam)
    rows = zip(*(x.tolist() for x in (*inputs, ref_chosen, ref_rejected)), strict=True)
    expected = [naive_dpo(*row, 0.3, lam) for row in rows]
    assert found.loss.item() == pytest.approx(math.fsum(expected) / 7, abs=1e-9, rel=1e-9)
    assert torch.autograd.gradcheck(
        lambda w, x: losses.dpo_positive_loss(w, x, ref_chosen, ref_rejected, 0.3, lam).loss,
        inputs,
    )


def test_dpo_positive_without_penalty_is_dpo() -> None:
    chosen, rejected, ref_chosen, ref_rejected = pairs(3)
    dpo = -torch.log(
        torch.sigmoid(0.1 * ((chosen - rejected) - (ref_chosen - ref_rejected)))
    ).mean()
    found = losses.dpo_positive_loss(chosen, rejected, ref_chosen, ref_rejected, lam=0.0)
    assert found.loss.item() == pytest.approx(dpo.item(), abs=1e-12)
    # Where the chosen answer has not become less likely, no λ changes that.
    risen = losses.dpo_positive_loss(ref_chosen + 1.0, rejected, ref_chosen, ref_rejected)
    plain = losses.dpo_positive_loss(ref_chosen + 1.0, rejected, ref_chosen, ref_rejected, lam=0.0)
    assert risen.loss == plain.loss
    assert risen.stats["penalised"] == 0.0


def test_dpo_positive_is_log_2_at_the_reference() -> None:
    chosen, rejected, _, _ = pairs(0)
    found = losses.dpo_positive_loss(chosen, rejected, chosen, rejected)
    assert found.loss.item() == pytest.approx(math.log(2), abs=1e-12)
    assert found.stats["margin"] == 0.0
    assert found.stats["accuracy"] == 0.5


def test_dpo_statistics_by_hand_and_finite_for_any_margin() -> None:
    zero = torch.zeros(3)
    chosen = torch.tensor([2.0, -1e4, 0.0], requires_grad=True)
    found = losses.dpo_positive_loss(chosen, zero, zero, zero, beta=0.5)
    assert found.stats["margin"].item() == pytest.approx((1.0 - 5e3) / 3)
    assert found.stats["accuracy"].item() == pytest.approx(0.5)
    assert found.stats["penalised"].item() == pytest.approx(1 / 3)
    assert found.loss.isfinite()
    (gradient,) = torch.autograd.grad(found.loss, chosen)
    assert gradient.isfinite().all()
    assert gradient[1].item() == pytest.approx(-0.5 * 51 / 3)


def test_parts_of_the_pairs_sum_to_the_whole() -> None:
    x = pairs(5)
    whole = losses.dpo_positive_loss(*x).loss
    parts = [
        losses.dpo_positive_loss(*(y[rows] for y in x), denominator=7).loss
        for rows in (slice(0, 3), slice(3, 3), slice(3, 7))
    ]
    torch.testing.assert_close(torch.stack(parts).sum(), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("place", range(4))
def test_dpo_positive_names_what_is_not_finite_or_does_not_fit(place: int) -> None:
    name = ["chosen", "rejected", "ref_chosen", "ref_rejected"][place]
    x = pairs(0)
    x[place][2] = NAN
    with pytest.raises(NotFiniteError, match=rf"^{name}: .*\(2,\)"):
        losses.dpo_positive_loss(*x)
    x = pairs(0)
    x[place] = x[place][1:]
    with pytest.raises(InvalidInputError, match=rf"{name}.*\(6,\)"):
        losses.dpo_positive_loss(*x)
    for bad in ({"beta": 0.0}, {"lam": -1.0}):
        with pytest.raises(InvalidInputError, match=next(iter(bad))):
            losses.dpo_positive_loss(*pairs(0), **bad)


def test_log_probabilities_of_answers_are_sums_over_their_tokens() -> None:
    mask, logprobs = random_mask(1), normal(0, B, T)
    found = losses.sequence_logprobs(torch.where(mask, logprobs, -INF), mask)
    expected = [math.fsum(logprobs[b, mask[b]].tolist()) for b in range(B)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
