from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from asyncrlhf import losses
from asyncrlhf.errors import InvalidInputError
from asyncrlhf.losses import LossOutput

BETA, KL, CLIP = 0.3, 0.07, 0.2
Numbers = list[float]


@dataclass(frozen=True)
class Case:
    """Completions of several prompts, in any order; float64."""

    logps: Tensor
    behaviour: Tensor
    ref: Tensor
    scores: Tensor
    groups: Tensor
    mask: Tensor
    valid: Tensor

    def rows(self, which: Tensor) -> Case:
        return Case(*(getattr(self, name)[which] for name in self.__dataclass_fields__))

    def usable(self) -> list[bool]:
        return (self.valid & self.mask.any(1)).tolist()

    def members(self) -> list[list[int]]:
        """Usable completions of each prompt, in the order of the batch."""
        usable, ids = self.usable(), self.groups.tolist()
        return [[i for i in range(len(ids)) if ids[i] == g and usable[i]] for g in sorted(set(ids))]

    def sums(self, x: Tensor) -> Numbers:
        rows = zip(x.tolist(), self.mask.tolist(), strict=True)
        return [math.fsum(v for v, m in zip(*row, strict=True) if m) for row in rows]


def double(numbers: Numbers) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def make_case(
    seed: int,
    sizes: tuple[int, ...] = (2, 3, 4, 2, 5),
    *,
    ties: bool = True,
    holes: bool = True,
) -> Case:
    """With `ties` some scores are equal; with `holes` some completions are empty or invalid."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    n, width = sum(sizes), 4
    labels = torch.randperm(50, generator=g)[: len(sizes)] - 20
    groups = labels.repeat_interleave(torch.tensor(sizes))[torch.randperm(n, generator=g)]
    lengths = torch.randint(0 if holes else 1, width + 1, (n,), generator=g)
    logps = -normal(n, width).abs()
    scores = torch.randint(0, 3, (n,), generator=g).double() if ties else normal(n)
    valid = torch.rand(n, generator=g) < (0.85 if holes else 1.1)
    return Case(
        logps=logps,
        behaviour=logps + 0.2 * normal(n, width),
        ref=logps + 0.5 * normal(n, width),
        scores=torch.where(valid, scores, torch.nan),
        groups=groups,
        mask=torch.arange(width) < lengths[:, None],
        valid=valid,
    )


# Each loss of a case, as the library computes it ...
Call = Callable[..., LossOutput]
CALLS: dict[str, Call] = {
    "online_dpo": lambda c, h, **kw: losses.online_dpo(
        h, c.ref, c.scores, c.groups, beta=BETA, mask=c.mask, valid=c.valid, **kw
    ),
    "ipo": lambda c, h, **kw: losses.ipo(
        h, c.ref, c.scores, c.groups, beta=BETA, mask=c.mask, valid=c.valid, **kw
    ),
    "best_of_k": lambda c, h, **kw: losses.best_of_k(
        h, c.scores, c.groups, mask=c.mask, valid=c.valid, **kw
    ),
    "rloo": lambda c, h, **kw: losses.rloo(
        h, c.behaviour, c.ref, c.scores, c.groups, kl_coef=KL, mask=c.mask, valid=c.valid, **kw
    ),
    "proximal_rloo": lambda c, h, **kw: losses.proximal_rloo(
        h,
        c.behaviour,
        c.ref,
        c.scores,
        c.groups,
        kl_coef=KL,
        clip=CLIP,
        mask=c.mask,
        valid=c.valid,
        **kw,
    ),
    "copg": lambda c, h, **kw: losses.copg(
        h, c.ref, c.scores, c.groups, kl_coef=KL, mask=c.mask, valid=c.valid, **kw
    ),
    "grpo": lambda c, h, **kw: losses.grpo(
        h, c.behaviour, c.scores, c.groups, c.mask, clip=CLIP, valid=c.valid, **kw
    ),
}
GROUPWISE = list(CALLS)
PAIRWISE = ["online_dpo", "ipo", "best_of_k"]


# ... and as the specification says, with loops over numbers: values and derivatives by hand.
def best_and_worst(c: Case, members: list[int]) -> tuple[int, int] | None:
    s = c.scores.tolist()
    if len(members) < 2:
        return None
    best = max(members, key=lambda i: (s[i], -i))
    worst = min(members, key=lambda i: (s[i], i))
    return None if s[best] == s[worst] else (best, worst)


def pairwise(c: Case, value: Callable[[float], tuple[float, float]]) -> tuple[Numbers, Numbers]:
    h, hr = c.sums(c.logps), c.sums(c.ref)
    out, slope = [0.0] * len(h), [0.0] * len(h)
    for members in c.members():
        if pair := best_and_worst(c, members):
            p, m = pair
            out[p], slope[p] = value((h[p] - hr[p]) - (h[m] - hr[m]))
            slope[m] = -slope[p]
    return out, slope


def expected_online_dpo(c: Case) -> tuple[Numbers, Numbers]:
    return pairwise(
        c, lambda d: (math.log1p(math.exp(-BETA * d)), -BETA / (1 + math.exp(BETA * d)))
    )


def expected_ipo(c: Case) -> tuple[Numbers, Numbers]:
    return pairwise(c, lambda d: ((d - 1 / (2 * BETA)) ** 2, 2 * (d - 1 / (2 * BETA))))


def expected_best_of_k(c: Case) -> tuple[Numbers, Numbers]:
    h = c.sums(c.logps)
    out, slope = [0.0] * len(h), [0.0] * len(h)
    for members in c.members():
        if pair := best_and_worst(c, members):
            out[pair[0]], slope[pair[0]] = -h[pair[0]], -1.0
    return out, slope


def leave_one_out(c: Case, rewards: Numbers) -> Numbers:
    a = [0.0] * len(rewards)
    for members in c.members():
        for i in members:
            others = [rewards[j] for j in members if j != i]
            a[i] = rewards[i] - math.fsum(others) / len(others) if others else 0.0
    return a


def regularised(c: Case, log_ratio_of: Tensor) -> Numbers:
    h, hr = c.sums(log_ratio_of), c.sums(c.ref)
    return [s - KL * (x - y) for s, x, y in zip(c.scores.tolist(), h, hr, strict=True)]


def expected_rloo(c: Case) -> tuple[Numbers, Numbers]:
    a = leave_one_out(c, regularised(c, c.behaviour))
    return [-x * h for x, h in zip(a, c.sums(c.logps), strict=True)], [-x for x in a]


def expected_copg(c: Case) -> tuple[Numbers, Numbers]:
    a = leave_one_out(c, regularised(c, c.logps))
    return [-x * h for x, h in zip(a, c.sums(c.logps), strict=True)], [-x for x in a]


def clipped_term(rho: float, a: float) -> tuple[float, float]:
    """The loss of a ratio and its derivative by the logarithm of the ratio."""
    held = min(max(rho, 1 - CLIP), 1 + CLIP)
    stopped = (a > 0 and rho > 1 + CLIP) or (a < 0 and rho < 1 - CLIP)
    return -min(rho * a, held * a), 0.0 if stopped else -rho * a


def expected_proximal_rloo(c: Case) -> tuple[Numbers, Numbers]:
    a = leave_one_out(c, regularised(c, c.behaviour))
    h, hb = c.sums(c.logps), c.sums(c.behaviour)
    terms = [
        clipped_term(math.exp(x - y), z) if z else (0.0, 0.0)
        for x, y, z in zip(h, hb, a, strict=True)
    ]
    return [t[0] for t in terms], [t[1] for t in terms]


EXPECTED = {
    "online_dpo": expected_online_dpo,
    "ipo": expected_ipo,
    "best_of_k": expected_best_of_k,
    "rloo": expected_rloo,
    "proximal_rloo": expected_proximal_rloo,
    "copg": expected_copg,
}


def run(name: str, c: Case, **options: Any) -> tuple[LossOutput, Tensor]:
    """The output and the gradient of its loss by the log-probabilities."""
    leaf = c.logps.clone().requires_grad_()
    out = CALLS[name](c, leaf, **options)
    out.loss.backward()
    assert leaf.grad is not None
    return out, leaf.grad


def close(found: Tensor, expected: Any, tolerance: float = 1e-10) -> None:
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(found.detach().double(), expected, rtol=tolerance, atol=tolerance)


def pair(score_gap: float = 1.0) -> dict[str, Any]:
    return {"scores": double([score_gap, 0.0]), "group_ids": torch.tensor([0, 0])}


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.parametrize("seed", range(6))
def test_values_and_gradients_are_those_of_the_formulas(name: str, seed: int) -> None:
    c = make_case(seed, ties=seed % 2 == 0, holes=seed % 3 != 0)
    per_sequence, slopes = EXPECTED[name](c)
    count = len(c.members()) if name in PAIRWISE else len(c.scores)
    out, gradient = run(name, c)
    assert out.normalizer == count
    close(out.per_sequence, per_sequence)
    close(out.loss, math.fsum(per_sequence) / count)
    close(gradient, double(slopes)[:, None] * c.mask / count)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("average", ["sequence", "token"])
def test_grpo_is_its_formula(seed: int, scale: bool, average: Any) -> None:
    c = make_case(seed, ties=seed % 2 == 0, holes=seed % 3 != 0)
    kl_coef = 0.04
    n, width = c.mask.shape
    out, gradient = run(
        "grpo", c, scale_rewards=scale, average=average, ref_logps=c.ref, kl_coef=kl_coef
    )
    s, usable = c.scores.tolist(), c.usable()
    a = [0.0] * n
    for members in c.members():
        if len(members) < 2:
            continue
        mean = math.fsum(s[i] for i in members) / len(members)
        variance = math.fsum((s[i] - mean) ** 2 for i in members) / (len(members) - 1)
        for i in members:
            a[i] = (s[i] - mean) / (math.sqrt(variance) + 1e-4) if scale else s[i] - mean
    values = torch.zeros(n, dtype=torch.float64)
    slopes = torch.zeros(n, width, dtype=torch.float64)
    for i in range(n):
        tokens = [t for t in range(width) if c.mask[i, t] and usable[i]]
        for t in tokens:
            x, b, r = (float(y[i, t]) for y in (c.logps, c.behaviour, c.ref))
            loss, slope = clipped_term(math.exp(x - b), a[i]) if a[i] else (0.0, 0.0)
            loss += kl_coef * (math.exp(r - x) - 1 - (r - x))
            slope += kl_coef * (1 - math.exp(r - x))
            share = 1 / len(tokens) if average == "sequence" else 1.0
            values[i] += share * loss
            slopes[i, t] = share * slope
    tokens_used = sum(int(c.mask[i].sum()) for i in range(n) if usable[i])
    count = n if average == "sequence" else tokens_used
    assert out.normalizer == count
    close(out.per_sequence, values)
    close(gradient, slopes / count)


@pytest.mark.parametrize("name", ["rloo", "copg", "proximal_rloo", "online_dpo", "best_of_k"])
def test_sums_of_sequences_do_as_well_as_tokens(name: str) -> None:
    c = make_case(3)
    summed = replace(
        c,
        logps=double(c.sums(c.logps)),
        ref=double(c.sums(c.ref)),
        behaviour=double(c.sums(c.behaviour)),
    )
    by_token, token_gradient = run(name, c)
    by_sequence, sequence_gradient = run(name, summed)
    close(by_sequence.per_sequence, by_token.per_sequence.detach())
    close(sequence_gradient[:, None] * c.mask, token_gradient)


@pytest.mark.parametrize("name", GROUPWISE)
@pytest.mark.parametrize("average", ["sequence", "token"])
def test_micro_batches_sum_to_the_minibatch(name: str, average: str) -> None:
    """Whole prompts per micro-batch, unevenly cut; also one that contributes nothing."""
    options = {"average": average} if name == "grpo" else {}
    c = make_case(11, sizes=(2, 4, 3, 2, 2, 3))
    whole, gradient = run(name, c, **options)
    labels = c.groups.unique().tolist()
    total, parts, values = 0.0, torch.zeros_like(gradient), torch.zeros_like(whole.per_sequence)
    for chosen in (labels[:1], labels[1:4], labels[4:]):
        rows = torch.isin(c.groups, torch.tensor(chosen)).nonzero()[:, 0]
        out, part = run(name, c.rows(rows), normalizer=whole.normalizer, **options)
        total += out.loss.item()
        parts[rows] = part
        values[rows] = out.per_sequence.detach()
    close(whole.loss, total, 1e-12)
    close(parts, gradient, 1e-12)
    close(values, whole.per_sequence.detach(), 1e-12)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    sizes=st.lists(st.integers(2, 4), min_size=1, max_size=4),
    name=st.sampled_from(GROUPWISE),
    ties=st.booleans(),
)
def test_order_of_completions_and_names_of_groups_do_not_matter(
    seed: int, sizes: list[int], name: str, ties: bool
) -> None:
    # Of several best or worst ones the first is taken, so there the order does matter.
    c = make_case(seed, tuple(sizes), ties=ties and name not in PAIRWISE)
    order = torch.randperm(len(c.scores), generator=torch.Generator().manual_seed(seed))
    moved = c.rows(order)
    moved = replace(moved, groups=1000 - 7 * moved.groups)
    out, gradient = run(name, c)
    other, other_gradient = run(name, moved)
    close(other.loss, out.loss.detach())
    close(other.per_sequence, out.per_sequence.detach()[order])
    close(other_gradient, gradient[order])
    for key, value in out.metrics.items():
        close(other.metrics[key], value)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    shift=st.floats(-100, 100),
    name=st.sampled_from(GROUPWISE),
)
def test_only_differences_of_scores_within_a_prompt_matter(
    seed: int, shift: float, name: str
) -> None:
    c = make_case(seed)
    shift = round(shift)  # so that ties stay ties
    moved = replace(c, scores=c.scores + shift * (1 + c.groups % 3))
    close(run(name, moved)[1], run(name, c)[1], 1e-9)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), shift=st.floats(-50, 50))
def test_a_common_part_of_reference_log_probabilities_cancels(seed: int, shift: float) -> None:
    c = make_case(seed)
    sums = double(c.sums(c.ref))
    moved = sums + shift * (1 + c.groups % 3)
    for name in ("online_dpo", "ipo", "rloo", "proximal_rloo", "copg"):
        with_sums, with_moved = replace(c, ref=sums), replace(c, ref=moved)
        close(run(name, with_moved)[1], run(name, with_sums)[1], 1e-8)


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_at_the_reference_dpo_is_ln_2_with_slopes_of_half_beta(beta: float) -> None:
    h = torch.tensor([-3.0, -5.0], dtype=torch.float64, requires_grad=True)
    out = losses.online_dpo(h, h.detach(), beta=beta, **pair())
    out.loss.backward()
    close(out.loss, 0.6931471805599453)
    close(h.grad, [-beta / 2, beta / 2])


@pytest.mark.parametrize("name", ["online_dpo", "ipo", "best_of_k", "copg"])
def test_no_log_probability_of_the_sampler_enters(name: str) -> None:
    parameters = inspect.signature(getattr(losses, name)).parameters
    assert "behaviour_logps" not in parameters
    assert not losses.INFO[name].needs_behaviour


def test_information_agrees_with_the_signatures() -> None:
    assert set(losses.INFO) == {*GROUPWISE, "ppo"}
    for name, info in losses.INFO.items():
        parameters = inspect.signature(getattr(losses, name)).parameters
        assert info.needs_behaviour == ("behaviour_logps" in parameters)
        assert info.needs_critic == ("values" in parameters)
        required = [p.name for p in parameters.values() if p.default is p.empty]
        assert info.token_level == ("mask" in required)
        if name != "ppo":
            assert info.needs_reference == ("ref_logps" in required)
        for given_late in ("normalizer", "valid", "weights", "proximal_logps"):
            if given_late in parameters and given_late != "normalizer":
                assert parameters[given_late].kind is inspect.Parameter.KEYWORD_ONLY


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_advantages_of_a_prompt_sum_to_zero(seed: int) -> None:
    c = make_case(seed)
    for name in ("rloo", "copg"):
        _, gradient = run(name, replace(c, logps=double(c.sums(c.logps))))
        for members in c.members():
            assert abs(gradient[members].sum().item()) < 1e-12


def test_advantages_of_two_are_their_difference() -> None:
    h = torch.tensor([-1.0, -2.0], dtype=torch.float64, requires_grad=True)
    hb = torch.tensor([-1.5, -2.5], dtype=torch.float64)
    hr = torch.tensor([-3.0, -1.0], dtype=torch.float64)
    out = losses.rloo(h, hb, hr, kl_coef=0.1, **pair(0.7))
    out.loss.backward()
    rewards = [0.7 - 0.1 * 1.5, 0.0 - 0.1 * -1.5]
    difference = rewards[0] - rewards[1]
    close(-2 * h.grad, [difference, -difference])


@pytest.mark.parametrize("seed", range(4))
def test_at_the_sampler_proximal_rloo_has_the_gradient_of_rloo(seed: int) -> None:
    c = make_case(seed)
    c = replace(c, behaviour=c.logps)
    close(run("proximal_rloo", c)[1], run("rloo", c)[1], 1e-12)


@pytest.mark.parametrize(
    ("moved", "gap", "stopped"),
    [(0.3, 1.0, True), (-0.3, 1.0, False), (0.3, -1.0, False), (-0.3, -1.0, True)],
)
def test_clipping_stops_what_has_moved_far_enough(moved: float, gap: float, stopped: bool) -> None:
    """The first completion has moved by `moved`, the second stays; its advantage is `gap`."""
    hb = torch.tensor([-3.0, -4.0], dtype=torch.float64)
    h = (hb + torch.tensor([moved, 0.0])).requires_grad_()
    out = losses.proximal_rloo(h, hb, hb, kl_coef=0.0, clip=0.2, **pair(gap))
    out.loss.backward()
    assert (h.grad[0].item() == 0.0) == stopped
    assert out.metrics["clip_fraction"].item() == (0.5 if stopped else 0.0)
    close(h.grad[1], gap / 2)


@pytest.mark.parametrize("kl_coef", [0.05, 0.7])
@pytest.mark.parametrize("k", [2, 3, 5])
def test_copg_is_the_gradient_of_squared_differences(k: int, kl_coef: float) -> None:
    """Per group 1/(2 kl_coef (K−1)); for K=2 the loss is 1/(4 kl_coef) of the mean square."""
    c = make_case(5, sizes=(k, k, k), ties=False, holes=False)
    h = double(c.sums(c.logps)).requires_grad_()
    hr = double(c.sums(c.ref))
    out = losses.copg(h, hr, c.scores, c.groups, kl_coef=kl_coef)
    (found,) = torch.autograd.grad(out.per_sequence.sum(), h)
    squares = []
    for members in c.members():
        rewards = c.scores[members] - kl_coef * (h[members] - hr[members])
        squares.append((rewards[:, None] - rewards).square().triu().sum())
    total = torch.stack(squares)
    (expected,) = torch.autograd.grad(total.sum() / (2 * kl_coef * (k - 1)), h, retain_graph=True)
    close(found, expected)
    if k == 2:
        (found,) = torch.autograd.grad(losses.copg(h, hr, c.scores, c.groups, kl_coef).loss, h)
        (expected,) = torch.autograd.grad(total.mean() / (4 * kl_coef), h)
        close(found, expected)


@pytest.mark.parametrize("k", [2, 4])
def test_copg_rests_at_the_optimum_whoever_drew_the_completions(k: int) -> None:
    """At π ∝ π_ref e^(score / kl_coef) each completion's gradient is 0, not only the mean's."""
    c = make_case(8, sizes=(k, k), ties=False, holes=False)
    hr = double(c.sums(c.ref))
    h = (hr + c.scores / KL - 1.7 * (c.groups % 2)).requires_grad_()
    losses.copg(h, hr, c.scores, c.groups, kl_coef=KL).loss.backward()
    close(h.grad, torch.zeros_like(h), 1e-12)


@pytest.mark.parametrize("name", GROUPWISE)
def test_equal_scores_contribute_exactly_nothing(name: str) -> None:
    """0.1 three times does not average to 0.1; nothing of that may be left."""
    c = make_case(1, sizes=(3, 3), ties=False, holes=False)
    c = replace(c, scores=torch.full_like(c.scores, 0.1), ref=c.logps, behaviour=c.logps)
    out, gradient = run(name, c)
    assert out.loss.item() == 0.0
    assert not gradient.any()
    if "ties_fraction" in out.metrics:
        assert out.metrics["ties_fraction"].item() == 1.0


@pytest.mark.parametrize("name", PAIRWISE)
def test_dropped_ties_stay_in_the_normalizer(name: str) -> None:
    c = make_case(2, sizes=(2, 2), ties=False, holes=False)
    tied = c.groups == c.groups.min()
    half = replace(c, scores=torch.where(tied, 0.5, c.scores))
    whole, _ = run(name, c)
    out, gradient = run(name, half)
    assert out.normalizer == 2.0
    assert out.metrics["ties_fraction"].item() == 0.5
    close(out.loss, whole.per_sequence[~tied].sum().item() / 2)
    assert not gradient[tied].any()


def test_kept_ties_compare_a_completion_with_itself() -> None:
    h = torch.tensor([-1.0, -2.0], dtype=torch.float64, requires_grad=True)
    hr = torch.tensor([-1.5, -1.0], dtype=torch.float64)
    for loss, value in (
        (losses.online_dpo, math.log(2)),
        (losses.ipo, 1 / (4 * 0.1**2)),
    ):
        out = loss(h, hr, ties="keep", **pair(0.0))
        close(out.loss, value)
        (gradient,) = torch.autograd.grad(out.loss, h)
        assert not gradient.any()
    (gradient,) = torch.autograd.grad(losses.best_of_k(h, ties="keep", **pair(0.0)).loss, h)
    close(gradient, [-1.0, 0.0])


@pytest.mark.parametrize("name", GROUPWISE)
@pytest.mark.parametrize("how", ["masked", "invalid"])
def test_unusable_completions_are_as_if_they_were_not_there(name: str, how: str) -> None:
    """Whatever stands in their rows, NaN included, and also in the columns outside the mask."""
    c = make_case(4, sizes=(3, 3), ties=False, holes=False)
    out_rows = torch.zeros(6, dtype=torch.bool)
    for g in c.groups.unique():
        out_rows[(c.groups == g).nonzero()[0]] = True
    mask = c.mask & ~out_rows[:, None] if how == "masked" else c.mask
    spoilt = torch.where(mask & ~out_rows[:, None], 1.0, torch.nan)
    c = replace(
        c,
        logps=c.logps * spoilt,
        behaviour=c.behaviour * spoilt,
        ref=c.ref * spoilt,
        scores=torch.where(out_rows, torch.nan, c.scores),
        mask=mask,
        valid=c.valid if how == "masked" else c.valid & ~out_rows,
    )
    out, gradient = run(name, c)
    rest, rest_gradient = run(name, c.rows(~out_rows), normalizer=out.normalizer)
    close(out.loss, rest.loss.detach(), 1e-12)
    close(gradient[~out_rows], rest_gradient, 1e-12)
    assert not gradient[out_rows].any()
    assert not out.per_sequence[out_rows].any()
    assert all(torch.isfinite(value) for value in out.metrics.values())


@pytest.mark.parametrize("name", GROUPWISE)
@pytest.mark.parametrize("left", [0, 1])
@pytest.mark.parametrize("how", ["mask", "valid"])
def test_none_or_one_usable_gives_a_loss_of_zero_that_can_go_backward(
    name: str, left: int, how: str
) -> None:
    c = make_case(4, holes=False)
    kept = torch.arange(len(c.scores)) < left
    c = replace(c, mask=c.mask & kept[:, None]) if how == "mask" else replace(c, valid=kept)
    out, gradient = run(name, c)
    assert out.loss.item() == 0.0
    assert not gradient.any()
    assert all(torch.isfinite(value) for value in out.metrics.values())


@pytest.mark.parametrize("name", GROUPWISE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_huge_log_probabilities_give_finite_values_and_gradients(
    name: str, dtype: torch.dtype, size: float
) -> None:
    c = make_case(7, sizes=(2, 3, 4), ties=False, holes=False)
    far = torch.where(torch.arange(9)[:, None] % 2 == 0, size, 0.0)
    for case in (
        replace(c, logps=c.logps + far),
        replace(c, behaviour=c.behaviour + far),
        replace(c, ref=c.ref + far),
    ):
        cast = replace(
            case,
            logps=case.logps.to(dtype),
            behaviour=case.behaviour.to(dtype),
            ref=case.ref.to(dtype),
        )
        options = {"ref_logps": cast.ref, "kl_coef": 0.1} if name == "grpo" else {}
        out, gradient = run(name, cast, **options)
        assert torch.isfinite(out.loss)
        assert torch.isfinite(gradient).all()
        assert all(torch.isfinite(value) for value in out.metrics.values())


def test_beyond_the_bound_on_log_ratios_the_gradient_is_zero() -> None:
    hb = torch.tensor([-3.0, -4.0], dtype=torch.float64)
    h = (hb + torch.tensor([25.0, 0.0])).requires_grad_()
    out = losses.proximal_rloo(h, hb, hb, kl_coef=0.0, **pair(-1.0))
    out.loss.backward()
    close(out.loss, (math.exp(20) - 1) / 2)
    close(h.grad, [0.0, -0.5])


@pytest.mark.parametrize("name", ["rloo", "copg", "proximal_rloo", "grpo"])
def test_weights_scale_the_policy_gradient(name: str) -> None:
    c = make_case(9)
    weights = torch.rand(len(c.scores), dtype=torch.float64) + 0.5
    weights = torch.where(c.valid, weights, torch.nan).requires_grad_()
    _, plain = run(name, c)
    _, weighted = run(name, c, weights=weights)
    scale = torch.where(c.valid, weights.detach(), 0.0)
    close(weighted, plain * scale[:, None])
    assert weights.grad is None
    close(run(name, c, weights=torch.ones(len(c.scores)))[1], plain, 1e-12)


@pytest.mark.parametrize("name", ["rloo", "copg", "grpo"])
def test_weights_of_tokens_scale_each_token(name: str) -> None:
    c = make_case(9)
    weights = torch.rand(c.mask.shape, dtype=torch.float64) + 0.5
    _, plain = run(name, c)
    _, weighted = run(name, c, weights=torch.where(c.mask, weights, torch.nan))
    close(weighted, plain * weights)


@pytest.mark.parametrize("name", ["proximal_rloo", "grpo"])
def test_the_decoupled_objective_is_the_plain_one_where_nothing_is_decoupled(name: str) -> None:
    c = make_case(10)
    plain, gradient = run(name, c)
    out, decoupled = run(name, c, proximal_logps=c.behaviour)
    assert torch.equal(out.per_sequence, plain.per_sequence)
    assert torch.equal(decoupled, gradient)


def test_the_decoupled_objective_is_its_formula() -> None:
    c = make_case(10, ties=False, holes=False)
    proximal = c.logps + 0.15 * torch.randn(
        c.logps.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    _, gradient = run("proximal_rloo", c, proximal_logps=proximal)
    a = leave_one_out(c, regularised(c, c.behaviour))
    slopes = [
        math.exp(p - b) * clipped_term(math.exp(h - p), x)[1]
        for h, p, b, x in zip(
            c.sums(c.logps), c.sums(proximal), c.sums(c.behaviour), a, strict=True
        )
    ]
    close(gradient, double(slopes)[:, None] * c.mask / len(a))


def test_metrics_of_a_pair_are_what_they_are_called() -> None:
    h = torch.tensor([-1.0, -4.0, -2.0, -2.0, -1.0, -1.0], dtype=torch.float64)
    hr = torch.tensor([-2.0, -3.0, -1.0, -3.0, -1.0, -1.0], dtype=torch.float64)
    scores = torch.tensor([1.0, 0.0, 3.0, 1.0, 0.0, 0.0])
    out = losses.online_dpo(h, hr, scores, torch.tensor([0, 0, 1, 1, 2, 2]), beta=0.5)
    expected = {
        "margin": 0.5 * (2.0 - 2.0) / 2,
        "accuracy": 0.5,
        "reward_chosen": 0.5 * (1.0 - 1.0) / 2,
        "reward_rejected": 0.5 * (-1.0 + 1.0) / 2,
        "score_gap": 1.5,
        "ties_fraction": 1 / 3,
        "skipped_fraction": 0.0,
        "kl_ref": (1.0 - 1.0 - 1.0 + 1.0) / 6,
    }
    assert {k: v.item() for k, v in out.metrics.items()} == pytest.approx(expected)


def test_metrics_of_ratios_are_those_of_usable_completions() -> None:
    hb = torch.tensor([-1.0, -2.0, -3.0], dtype=torch.float64)
    h = hb + torch.tensor([0.5, -0.1, 9.0])
    out = losses.proximal_rloo(
        h,
        hb,
        hb - 1.0,
        torch.tensor([1.0, 0.0, torch.nan]),
        torch.tensor([4, 4, 4]),
        kl_coef=0.1,
        valid=torch.tensor([True, True, False]),
    )
    expected = {
        "reward": 0.5 - 0.1,
        "kl_ref": 1.0,
        "advantage_abs": 1.0,
        "clip_fraction": 0.5,
        "ratio_mean": (math.exp(0.5) + math.exp(-0.1)) / 2,
        "ratio_max": math.exp(0.5),
        "approx_kl": (math.exp(0.5) - 1 - 0.5 + math.exp(-0.1) - 1 + 0.1) / 2,
    }
    assert {k: v.item() for k, v in out.metrics.items()} == pytest.approx(expected)


@pytest.mark.parametrize("name", GROUPWISE)
def test_metrics_carry_no_gradient_and_losses_are_at_least_float32(name: str) -> None:
    c = make_case(0)
    out, gradient = run(name, replace(c, logps=c.logps.bfloat16()))
    assert gradient.dtype == torch.bfloat16
    assert out.loss.dtype in (torch.float32, torch.float64)
    assert all(v.ndim == 0 and not v.requires_grad for v in out.metrics.values())


@pytest.mark.parametrize("name", GROUPWISE)
def test_one_completion_per_prompt_is_refused(name: str) -> None:
    c = make_case(0, sizes=(2, 1), ties=False, holes=False)
    with pytest.raises(InvalidInputError, match=rf"{name}.*K=1"):
        run(name, c)


@pytest.mark.parametrize("name", GROUPWISE)
def test_scores_of_nan_are_refused_unless_excluded(name: str) -> None:
    c = make_case(0, ties=False, holes=False)
    spoilt = replace(c, scores=torch.where(torch.arange(len(c.scores)) == 3, torch.nan, c.scores))
    with pytest.raises(InvalidInputError, match="scores: expected finite"):
        run(name, spoilt)
    run(name, replace(spoilt, valid=spoilt.scores.isfinite()))


H, S, G = torch.zeros(2), torch.tensor([1.0, 0.0]), torch.tensor([0, 0])
H2, M = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: losses.online_dpo(H2, H, S, G), "mask: expected"),
        (lambda: losses.online_dpo(H[:1], H, S, G), "logps: expected shape"),
        (lambda: losses.online_dpo(H, H[:1], S, G), "ref_logps: expected shape"),
        (lambda: losses.online_dpo(H, H, S[None], G), "scores: expected shape"),
        (lambda: losses.online_dpo(H, H, S[:0], G[:0]), "scores: expected shape"),
        (lambda: losses.online_dpo(H, H, S, G.float()), "group_ids: expected 2 integers"),
        (lambda: losses.online_dpo(H, H, S, G[:1]), "group_ids: expected 2 integers"),
        (lambda: losses.online_dpo(H, H, S, G, mask=M.float()), "mask: expected .* bool"),
        (lambda: losses.online_dpo(H, H, S, G, valid=S), "valid: expected .* bool"),
        (lambda: losses.online_dpo(H, H, S, G, ties="x"), "ties: expected one of drop, keep"),  # type: ignore[arg-type]
        (lambda: losses.online_dpo(H, H, S, G, beta=0.0), "beta: expected a positive"),
        (lambda: losses.ipo(H, H, S, G, beta=-1.0), "beta: expected a positive"),
        (lambda: losses.online_dpo(H, H, S, G, normalizer=0.0), "normalizer: expected"),
        (lambda: losses.rloo(H, H, H, S, G, kl_coef=-1.0), "kl_coef: expected"),
        (lambda: losses.rloo(H, H, H, S, G, weights=H2), "weights: expected shape"),
        (lambda: losses.rloo(H2, H, H, S, G, mask=M, weights=H[:1]), "weights: expected shape"),
        (lambda: losses.proximal_rloo(H, H, H, S, G, clip=0.0), "clip: expected"),
        (
            lambda: losses.proximal_rloo(H2, H, H, S, G, mask=M, weights=H2),
            'weights: expected shape .*level="sequence"',
        ),
        (lambda: losses.grpo(H2, H, S, G, M), "behaviour_logps: expected the mask's shape"),
        (lambda: losses.grpo(H2, H2, S, G, M, kl_coef=0.1), "ref_logps: expected with kl_coef"),
        (lambda: losses.grpo(H2, H2, S, G, M, average="x"), "average: expected one of"),  # type: ignore[arg-type]
    ],
)
def test_what_does_not_fit_is_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        call()
