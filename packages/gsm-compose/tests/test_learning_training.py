from __future__ import annotations

import json
import random
from typing import Any

import pytest

from gsm_compose.errors import LearningError
from gsm_compose.learning.examples import (
    COMPOSITIONAL,
    ONE_HOP,
    composition,
    draw_examples,
    encode,
)
from gsm_compose.learning.experiment import ARMS, train_and_measure
from gsm_compose.learning.findings import CLAIMS, evidence, figures, tables
from gsm_compose.learning.measuring import answers, held_out_pairs
from gsm_compose.learning.runs import learning_curves
from gsm_compose.learning.training import (
    TrainingConfig,
    backward,
    build,
    train,
)

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("decapod")

TINY: dict[str, Any] = {"hidden_size": 16, "intermediate": 32, "batch_size": 8, "warm_up": 2}


def _gradients(model: Any) -> list[Any]:
    found = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    return found


def test_gradient_of_the_two_rectangles_is_that_of_each_example_alone() -> None:
    model: Any = build(TrainingConfig(**TINY), 0)
    examples = draw_examples(random.Random(0), COMPOSITIONAL, "cot", 6)
    loss = backward(model, examples)
    together = _gradients(model)
    total, summed = 0, 0.0
    for example in examples:
        prompt, target = encode(example.prompt), [*encode(example.target), 2]
        labels = torch.tensor([[-100] * len(prompt) + target])
        one = model(input_ids=torch.tensor([prompt + target]), labels=labels).loss * len(target)
        one.backward()
        summed, total = summed + float(one.detach()), total + len(target)
    apart = [gradient / total for gradient in _gradients(model)]
    assert loss == pytest.approx(summed / total, rel=1e-5)
    for x, y in zip(together, apart, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


def test_training_lowers_the_loss() -> None:
    config = TrainingConfig(steps=30, batch_size=16, warm_up=10, hidden_size=32, intermediate=64)
    losses = [loss for _, loss in train(build(config, 1), config, (ONE_HOP, ONE_HOP), "cot", 1)]
    assert len(losses) == 60
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


def test_learning_rate_warms_up_and_ends_at_its_last_fraction() -> None:
    config = TrainingConfig(steps=50, warm_up=10, decay=0.3)
    rates = [config.rate(step) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([config.learning_rate * i / 10 for i in range(1, 11)])
    assert set(rates[10:70]) == {config.learning_rate}
    assert rates[-1] == pytest.approx(config.learning_rate / 30)


def test_a_model_can_learn_one_composition_by_heart_and_is_then_read_right() -> None:
    config = TrainingConfig(hidden_size=32, intermediate=64)
    model = build(config, 0)
    example = composition(held_out_pairs(0, 1)[0], "cot")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(80):
        backward(model, [example])
        optimizer.step()
        optimizer.zero_grad()
    assert answers(model, [example]) == [example.target]


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return [
        train_and_measure(arm, seed, steps=3, pairs=25, checkpoints=1, config=TINY)
        for seed in (1, 0)
        for arm in ARMS
    ]


def test_job_returns_json_and_the_same_numbers_again(results: list[dict[str, Any]]) -> None:
    assert json.loads(json.dumps(results)) == results
    again = train_and_measure("one-hop", 1, steps=3, pairs=25, checkpoints=1, config=TINY)
    assert again == results[0]


def test_arms_are_the_same_run_until_they_part(results: list[dict[str, Any]]) -> None:
    one_hop, compositional = results[:2]
    assert one_hop["curve"][0] == compositional["curve"][0]
    assert one_hop["half"] == compositional["half"]
    assert one_hop["curve"][1]["loss"] != compositional["curve"][1]["loss"]


def test_delta_is_the_sum_of_its_parts(results: list[dict[str, Any]]) -> None:
    for result in results:
        for point in result["curve"]:
            parts = point["distraction"] + point["second_hop"] + point["lucky"]
            assert point["delta"] == pytest.approx(parts, abs=1e-12)


def test_end_to_end_every_claim_has_evidence_and_every_arm_a_curve(
    results: list[dict[str, Any]],
) -> None:
    found = evidence(results)
    assert set(found) == {claim.id for claim in CLAIMS}
    for claim in CLAIMS:
        assert set(found[claim.id].arms) == set(claim.arms)
        claim.rule.decide(found[claim.id])
    pytest.importorskip("matplotlib")
    (figure,), (table,) = figures(results), tables(results)
    assert figure.svg.startswith("<svg")
    assert len(table.rows) == 6
    curves = learning_curves(results)
    assert set(curves) == {"one-hop", "compositional", "code"}
    assert curves["code"]["step"] == [3, 6]
    assert all(len(seeds) == 2 for seeds in curves["code"]["s_comp"])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"arm": "two-hop"}, "arm"),
        ({"steps": 0}, "steps"),
        ({"checkpoints": 9}, "checkpoints"),
        ({"config": {"width": 3}}, "config"),
        ({"config": {"learning_rate": -1.0}}, "learning_rate"),
    ],
)
def test_bad_arguments_are_named_before_anything_is_trained(
    change: dict[str, Any], named: str
) -> None:
    arguments: dict[str, Any] = {"arm": "one-hop", "seed": 0, "steps": 3, "checkpoints": 1}
    with pytest.raises(LearningError, match=rf"^{named}"):
        train_and_measure(**(arguments | change))
