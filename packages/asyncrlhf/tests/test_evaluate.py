from __future__ import annotations

import csv
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from asyncrlhf import evaluate
from asyncrlhf.dataset import Prompts
from asyncrlhf.errors import InvalidInputError
from asyncrlhf.evaluate import Samples
from asyncrlhf.rewards import RewardSuite
from asyncrlhf.tasks import SyntheticSummary

TASK = SyntheticSummary(symbols=4, length=5)
EOS = TASK.eos_token_id
FLOATS = st.floats(-5, 5, allow_nan=False)


def tiny(seed: int, spread: float = 1.0) -> Any:
    """A model with random weights whose next-token distributions are far from uniform."""
    from decapod.lm import build_model

    model = build_model(TASK.vocab_size, 16, 1, 2, seed=seed, init_std=0.3 * spread)
    model.generation_config.eos_token_id = model.config.eos_token_id = EOS
    return model


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return [row["prompt_ids"] for row in TASK.prompts(40, 0, "eval")]


# --- samples --------------------------------------------------------------------------------------


def test_samples_are_reproducible_and_two_models_share_their_noise(
    prompts: list[list[int]],
) -> None:
    model = tiny(0)
    one, again, other = (
        evaluate.sample(model, prompts, max_new_tokens=6, seed=seed) for seed in (0, 0, 1)
    )
    assert one == again
    assert one.completion_ids != other.completion_ids
    assert evaluate.sample(tiny(0), prompts, max_new_tokens=6).completion_ids == one.completion_ids
    # Not the same answer to every prompt, not more tokens than allowed, ends told from limits.
    assert len(set(one.completion_ids)) > 10
    assert max(map(len, one.completion_ids)) == 6
    for ids, finished in zip(one.completion_ids, one.finished, strict=True):
        assert (ids[-1] == EOS) == finished
        assert EOS not in ids[:-1]
    assert 0 < sum(one.finished) < len(one.finished)


def test_other_tokens_can_end_an_answer(prompts: list[list[int]]) -> None:
    drawn = evaluate.sample(tiny(0), prompts, max_new_tokens=6, eos_token_ids=[EOS, 4])
    for ids, finished in zip(drawn.completion_ids, drawn.finished, strict=True):
        assert (ids[-1] in (EOS, 4)) == finished


def test_log_probabilities_are_those_of_each_answer_alone(prompts: list[list[int]]) -> None:
    model = tiny(0).train()
    mixed = [prompt[: 2 + i % 4] for i, prompt in enumerate(prompts)]
    samples = evaluate.sample(model, mixed, max_new_tokens=6)
    logps, mask = evaluate.sample_logps(model, samples, temperature=0.7, batch_size=7)
    assert model.training
    assert not logps.requires_grad
    for row, (prompt, answer) in enumerate(
        zip(samples.prompt_ids, samples.completion_ids, strict=True)
    ):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0]
        wanted = (logits / 0.7).log_softmax(-1)[len(prompt) - 1 : -1]
        wanted = wanted.gather(-1, torch.tensor(answer)[:, None])[:, 0]
        torch.testing.assert_close(logps[row, : len(answer)], wanted, atol=1e-5, rtol=1e-5)
        assert mask[row].tolist() == [True] * len(answer) + [False] * (mask.shape[1] - len(answer))
    assert (logps[~mask] == 0).all()


# --- win-rate -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("wins", "n"), [(0, 5), (3, 10), (10, 10), (61, 100)])
def test_without_ties_the_interval_is_wilsons(wins: int, n: int) -> None:
    found = evaluate.compare_scores([1.0] * wins + [0.0] * (n - wins), [0.5] * n, level=0.9)
    wanted = scipy.stats.binomtest(wins, n).proportion_ci(0.9, "wilson")
    assert found.rate.value == wins / n
    assert (found.rate.low, found.rate.high) == pytest.approx((wanted.low, wanted.high))
    assert (found.wins, found.ties, found.losses) == (wins, 0, n - wins)


@given(scores=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30))
def test_win_rates_of_two_policies_add_up_to_one(scores: list[tuple[int, int]]) -> None:
    ours, theirs = zip(*scores, strict=True)
    one, other = evaluate.compare_scores(ours, theirs), evaluate.compare_scores(theirs, ours)
    assert one.rate.value + other.rate.value == pytest.approx(1)
    assert one.rate.low + other.rate.high == pytest.approx(1)
    assert (one.wins, one.ties) == (other.losses, other.ties)
    assert 0 <= one.rate.low <= one.rate.value <= one.rate.high <= 1
    assert one.rate.low < one.rate.high
    assert one.wins + one.ties + one.losses == len(scores)
    assert evaluate.compare_scores(ours, ours).rate.value == 0.5


@pytest.mark.parametrize("chances", [(0.6, 0.1), (0.3, 0.6), (0.9, 0.05)])
def test_the_interval_covers_the_truth_with_ties(chances: tuple[float, float]) -> None:
    win, tie = chances
    rng = np.random.default_rng(0)
    truth = win + tie / 2
    covered = 0
    for _ in range(1000):
        outcomes = rng.choice([1.0, 0.0, -1.0], size=50, p=[win, tie, 1 - win - tie])
        rate = evaluate.compare_scores(outcomes, np.zeros(50)).rate
        covered += rate.low <= truth <= rate.high
    assert covered / 1000 > 0.93


def test_scores_that_are_no_numbers_are_refused() -> None:
    for policy, reference, message in (
        ([1.0, math.nan], [0.0, 0.0], "policy: expected finite scores, got nan at 1"),
        ([1.0, 1.0], [0.0, math.inf], "reference: expected finite scores, got inf"),
        ([1.0], [0.0, 0.0], "as many scores of each, got 1 and 2"),
        ([], [], "at least one"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            evaluate.compare_scores(policy, reference)
    with pytest.raises(InvalidInputError, match="level"):
        evaluate.compare_scores([1.0], [0.0], level=95)


def test_win_rates_are_of_answers_to_the_same_prompts() -> None:
    prompt = tuple(TASK.encode("dcbaa>"))
    right, wrong = tuple(TASK.target(prompt)), (EOS,)
    good = Samples((prompt, prompt), (right, wrong), (True, True), 0.7)
    bad = Samples((prompt, prompt), (wrong, wrong), (True, True), 0.7)
    found = evaluate.win_rate(TASK.gold_score, good, bad)
    assert (found.wins, found.ties, found.losses, found.rate.value) == (1, 1, 0, 0.75)
    other = Samples((prompt, right), bad.completion_ids, (True, True), 0.7)
    with pytest.raises(InvalidInputError, match="same prompts"):
        evaluate.win_rate(TASK.gold_score, good, other)


# --- divergence and perplexity --------------------------------------------------------------------


def enumerated(seed: int, closeness: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All answers of two random language models over 3 tokens, at most 3 long, token 0 the end.

    Returns log-probabilities of tokens under both, the mask, and the first's chance of each answer.
    """
    rng = np.random.default_rng(seed)
    tables: dict[tuple[int, ...], tuple[np.ndarray, np.ndarray]] = {}
    rows = []
    for answer in itertools.product(range(3), repeat=3):
        kept = answer[: answer.index(0) + 1] if 0 in answer else answer
        if any(row[0] == kept for row in rows):
            continue
        logps = []
        for place in range(len(kept)):
            prefix = kept[:place]
            if prefix not in tables:
                first = rng.normal(size=3)
                second = first + closeness * rng.normal(size=3)
                tables[prefix] = tuple(x - np.logaddexp.reduce(x) for x in (first, second))
            logps.append([table[kept[place]] for table in tables[prefix]])
        rows.append((kept, logps))
    n, width = len(rows), 3
    both = torch.zeros(2, n, width, dtype=torch.float64)
    mask = torch.zeros(n, width, dtype=torch.bool)
    for i, (kept, logps) in enumerate(rows):
        both[:, i, : len(kept)] = torch.tensor(np.array(logps)).T
        mask[i, : len(kept)] = True
    return both[0], both[1], mask, both[0].sum(dim=1).exp()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("closeness", [0.1, 1.0])
def test_k1_and_k3_are_unbiased_and_k2_is_not(seed: int, closeness: float) -> None:
    logps, ref_logps, mask, chances = enumerated(seed, closeness)
    assert float(chances.sum()) == pytest.approx(1)
    exact = float((chances * (logps - ref_logps).sum(dim=1)).sum())
    each = [
        evaluate.kl(logps[i : i + 1], ref_logps[i : i + 1], mask[i : i + 1])
        for i in range(len(mask))
    ]
    k1, k2, k3 = (
        sum(p * getattr(row, name).value for p, row in zip(chances.tolist(), each, strict=True))
        for name in ("k1", "k2", "k3")
    )
    assert k1 == pytest.approx(exact, abs=1e-12)
    assert k3 == pytest.approx(exact, abs=1e-12)
    assert k2 != pytest.approx(exact, rel=1e-4)
    assert all(row.k3.value >= 0 for row in each)
    if closeness < 1:
        assert k2 == pytest.approx(exact, rel=0.2)


def test_standard_errors_are_those_of_the_mean_over_answers() -> None:
    logps, ref_logps, mask, _ = enumerated(0, 1.0)
    found = evaluate.kl(logps, ref_logps, mask)
    per_answer = (logps - ref_logps).sum(dim=1).numpy()
    assert found.k1.value == pytest.approx(per_answer.mean())
    assert found.k1.standard_error == pytest.approx(scipy.stats.sem(per_answer))
    assert evaluate.kl(logps[:1], ref_logps[:1], mask[:1]).k1.standard_error == math.inf


def test_the_perplexity_of_a_uniform_reference_is_its_vocabulary() -> None:
    mask = torch.tensor([[True, True, True], [True, False, False]])
    logps = torch.full((2, 3), -math.log(17))
    assert evaluate.reference_perplexity(logps, mask).value == pytest.approx(17)
    # A mean over answers, not over tokens.
    logps[1] = 0.0
    assert evaluate.reference_perplexity(logps, mask).value == pytest.approx((17 + 1) / 2)


def test_what_stands_outside_the_mask_does_not_count_and_inside_must_be_finite() -> None:
    mask = torch.tensor([[True, False]])
    clean, padded = torch.tensor([[-1.0, 0.0]]), torch.tensor([[-1.0, math.nan]])
    assert evaluate.kl(padded, clean - 1, mask) == evaluate.kl(clean, clean - 1, mask)
    assert evaluate.reference_perplexity(padded, mask).value == pytest.approx(math.e)
    for logps, message in (
        (torch.tensor([[math.nan, 0.0]]), "finite numbers under the mask, got nan at row 0, tok"),
        (torch.tensor([[-1.0]]), r"shapes \(n, L\)"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            evaluate.kl(clean, logps, mask)
        with pytest.raises(InvalidInputError, match=message):
            evaluate.reference_perplexity(logps, mask)
    with pytest.raises(InvalidInputError, match="none in row 1"):
        evaluate.reference_perplexity(torch.zeros(2, 1), torch.tensor([[True], [False]]))
    # Numbers as far apart as they come.
    far = evaluate.kl(torch.tensor([[0.0]]), torch.tensor([[-1e4]]), torch.tensor([[True]]))
    assert far.k1.value == far.k3.value + 1 == 1e4
    assert math.isfinite(
        evaluate.kl(torch.tensor([[-1e4]]), torch.tensor([[0.0]]), torch.tensor([[True]])).k3.value
    )


# --- frontiers ------------------------------------------------------------------------------------


@given(points=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=12))
def test_the_frontier_is_what_no_other_row_beats(points: list[tuple[int, int]]) -> None:
    rows = [{"kl": x, "gold": y, "run": i} for i, (x, y) in enumerate(points)]

    def beats(a: dict[str, int], b: dict[str, int]) -> bool:
        no_worse = a["kl"] <= b["kl"] and a["gold"] >= b["gold"]
        better = a["kl"] < b["kl"] or a["gold"] > b["gold"]
        return no_worse and (better or a["run"] < b["run"])

    wanted = [row for row in rows if not any(beats(other, row) for other in rows)]
    found = evaluate.pareto(rows)
    assert found == sorted(wanted, key=lambda row: row["kl"])
    assert [row["gold"] for row in found] == sorted({row["gold"] for row in found})


def test_pareto_data_are_written_as_csv(tmp_path: Path) -> None:
    rows = [
        {"loss": "online_dpo", "ppl": 1.13, "gold": 0.85},
        {"loss": "rloo, proximal", "ppl": 1.13, "gold": 0.82},
        {"loss": "ppo", "ppl": np.float64(1.14), "gold": 0.86},
    ]
    path = tmp_path / "pareto.csv"
    evaluate.write_pareto(path, rows, x="ppl")
    with path.open(newline="") as file:
        read = list(csv.DictReader(file))
    assert [row["on_frontier"] for row in read] == ["1", "0", "1"]
    assert read[1] == {**{k: str(v) for k, v in rows[1].items()}, "on_frontier": "0"}
    for bad, message in (
        ([], "rows: expected at least one"),
        ([rows[0], {"ppl": 1.0, "gold": 1.0}], "the same names"),
        ([{"ppl": math.nan, "gold": 1.0}], r"rows\[0\]: expected a finite number 'ppl'"),
        ([{"ppl": 1.0, "gold": "high"}], r"rows\[0\]: expected a finite number 'gold'"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            evaluate.write_pareto(path, bad, x="ppl")
    assert len(path.read_text().splitlines()) == 4
    assert [file.name for file in tmp_path.iterdir()] == ["pareto.csv"]


def test_runs_are_compared_where_they_first_reach_a_divergence() -> None:
    curve = [(0.0, 0.5), (1.0, 0.7), (0.5, 0.6), (2.0, 0.9)]
    assert evaluate.gold_at_matched_kl(curve, 0.5) == pytest.approx(0.6)
    assert evaluate.gold_at_matched_kl(curve, 1.5) == pytest.approx(0.8)
    assert evaluate.gold_at_matched_kl(curve, 0.0) == 0.5
    assert evaluate.gold_at_matched_kl(curve, 2.0) == pytest.approx(0.9)
    assert evaluate.gold_at_matched_kl(curve, 2.1) is None
    assert evaluate.gold_at_matched_kl([(1.0, 0.3)], 1.0) == 0.3
    assert evaluate.gold_at_matched_kl([(1.0, 0.3), (1.0, 0.4)], 1.0) == 0.3
    for bad in ([], [(math.nan, 0.5)]):
        with pytest.raises(InvalidInputError, match="curve, kl"):
            evaluate.gold_at_matched_kl(bad, 1.0)


@settings(deadline=None)
@given(
    curve=st.lists(st.tuples(FLOATS, FLOATS), min_size=1, max_size=6),
    kl=FLOATS,
)
def test_gold_at_a_divergence_lies_within_the_curve(
    curve: list[tuple[float, float]], kl: float
) -> None:
    found = evaluate.gold_at_matched_kl(curve, kl)
    reached = min(x for x, _ in curve) <= kl <= max(x for x, _ in curve)
    assert (found is not None) == reached
    if found is not None:
        low, high = min(y for _, y in curve), max(y for _, y in curve)
        assert low - 1e-9 <= found <= high + 1e-9


# --- all of it ------------------------------------------------------------------------------------


def exact_divergence(policy: Any, reference: Any, prompt: list[int], temperature: float) -> float:
    """Divergence of answers of at most two tokens, by enumeration."""

    def next_logps(model: Any, ids: list[int]) -> Tensor:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1].double()
        return (logits / temperature).log_softmax(-1)

    ours, theirs = next_logps(policy, prompt), next_logps(reference, prompt)
    total = float((ours.exp() * (ours - theirs)).sum())
    for token in range(len(ours)):
        if token != EOS:
            after = [next_logps(model, [*prompt, token]) for model in (policy, reference)]
            more = float((after[0].exp() * (after[0] - after[1])).sum())
            total += math.exp(float(ours[token])) * more
    return total


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_the_divergence_of_models_is_that_of_an_enumeration(temperature: float) -> None:
    policy, reference = tiny(0), tiny(1)
    prompt = TASK.encode("dcbaa>")
    found = evaluate.evaluate_policy(
        policy,
        reference,
        TASK.gold_score,
        [prompt] * 3000,
        max_new_tokens=2,
        temperature=temperature,
    )
    exact = exact_divergence(policy, reference, prompt, temperature)
    assert exact > 0.05
    for name in ("kl", "kl_k3"):
        assert abs(found[name] - exact) < 4 * found[f"{name}_se"]
        assert found[f"{name}_se"] < 0.2 * exact


def test_a_policy_that_is_its_reference_has_not_moved(prompts: list[list[int]]) -> None:
    model = tiny(0)
    samples = evaluate.sample(model, prompts, max_new_tokens=6)
    found = evaluate.evaluate_policy(
        model, model, TASK.gold_score, prompts, max_new_tokens=6, reference_samples=samples
    )
    assert found["kl"] == found["kl_k3"] == 0
    assert found["win_rate"] == 0.5
    assert found["win_rate_low"] < 0.5 < found["win_rate_high"]
    assert found["gold"] == TASK.gold_score(samples.prompt_ids, samples.completion_ids).mean()
    assert found["length"] == np.mean([len(ids) for ids in samples.completion_ids])
    assert found["eos_rate"] == np.mean(samples.finished)
    logps, mask = evaluate.sample_logps(model, samples)
    assert found["ppl"] == evaluate.reference_perplexity(logps, mask).value
    with pytest.raises(InvalidInputError, match="prompts: expected at least one"):
        evaluate.evaluate_policy(model, model, TASK.gold_score, [], max_new_tokens=6)
    with pytest.raises(InvalidInputError, match="gold: expected finite"):
        evaluate.evaluate_policy(
            model, model, lambda p, _: [math.nan] * len(p), prompts, max_new_tokens=6
        )


def test_a_run_is_evaluated_by_its_own_rewards(prompts: list[list[int]]) -> None:
    policy, reference = tiny(0), tiny(1)
    rows = TASK.prompts(40, 0, "eval")
    data = Prompts(
        tuple(tuple(row["prompt_ids"]) for row in rows),
        tuple(row["prompt"] for row in rows),
        {"bonus": [float(i) for i in range(40)]},
    )

    def bonus_of_some(bonus: list[float], **_: Any) -> list[float]:
        return [value if value < 30 else math.nan for value in bonus]

    suite = RewardSuite(
        [TASK.gold, bonus_of_some],
        tokenizer=TASK.tokenizer(),
        on_error="drop",
        missing_eos_score=None,
    )
    settings = {"eos_token_ids": (EOS,), "pad_id": 0, "max_new_tokens": 6, "seed": 0}
    found = evaluate.evaluate_on(
        policy, reference, data, suite, temperature=0.7, batch_size=16, **settings
    )
    same = evaluate.evaluate_policy(
        policy, reference, TASK.gold_score, prompts, max_new_tokens=6, batch_size=16
    )
    assert found["rewards/GoldReward"] == pytest.approx(same["gold"])
    assert found["rewards/bonus_of_some"] == pytest.approx(np.mean(range(30)))
    assert found["reward_failed"] == 10
    for name in ("kl", "kl_k3", "ppl", "length", "eos_rate"):
        assert found[name] == pytest.approx(same[name], rel=1e-5)
    greedy = evaluate.evaluate_on(
        policy, reference, data, suite, temperature=0.0, batch_size=16, **settings
    )
    assert greedy.keys() == found.keys() - {"kl", "kl_se", "kl_k3", "kl_k3_se"}


# PEFT asks transformers by an older name.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_a_policy_with_an_adapter_is_its_own_reference(prompts: list[list[int]]) -> None:
    peft = pytest.importorskip("peft")
    base = tiny(0)
    adapted = peft.get_peft_model(tiny(0), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    arguments = (TASK.gold_score, prompts)
    alone = evaluate.evaluate_policy(adapted, None, *arguments, max_new_tokens=6)
    given = evaluate.evaluate_policy(adapted, base, *arguments, max_new_tokens=6)
    assert alone["kl"] > 0
    assert alone == pytest.approx(given, rel=1e-4)
