"""Asynchrony changes when, not what: every run equals a plain loop that delays weights.

The oracle is written from the schedule alone: one process, no engine, no pipeline, no transport, no
trainer. It shares with them the sampler, the losses and the optimizer, which have their own tests.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("decapod.lm")

import torch
from transformers import get_scheduler

from asyncrlhf import losses
from asyncrlhf.engines import HFEngine
from asyncrlhf.rounds import Orders
from asyncrlhf.sequences import pad_batch, token_logps
from decapod.lm import SamplingParams, TransformersEngine

STEPS = 6


def plain_loop(replay: Any, delay: int, minibatches: int = 1, epochs: int = 1) -> str:
    """Online DPO with weights that arrive ``delay`` rounds late; the digest of its end."""
    policy, reference = replay.model().eval(), replay.model().eval()
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in policy.parameters() if p.dim() >= 2]},
            {"params": [p for p in policy.parameters() if p.dim() < 2]},
        ],
        lr=replay.RATE,
        weight_decay=0.0,
    )
    scheduler = get_scheduler("linear", optimizer, 0, STEPS)
    encode = replay.tokenizer()
    params = SamplingParams(
        max_new_tokens=5, temperature=0.7, stop_token_ids=(replay.EOS,), logprobs_of="sampler"
    )
    orders = Orders(
        [encode(prompt)["input_ids"] for prompt in replay.PROMPTS],
        params, per_round=4 * minibatches, samples=2, seed=42,
    )  # fmt: skip
    history = [copy.deepcopy(policy)]  # the weights after each round
    for index in range(STEPS // (minibatches * epochs)):
        sampler = history[max(0, index - delay)]
        order = orders.order(index, 0)
        answers = TransformersEngine(sampler, eos_token_ids=[replay.EOS]).generate(order.requests)
        for _ in range(epochs):
            for j in range(minibatches):
                here = slice(8 * j, 8 * (j + 1))
                ids = [answer.token_ids for answer in answers[here]]
                batch = pad_batch([r.prompt for r in order.requests[here]], ids, 0)
                with torch.no_grad():
                    ref = token_logps(reference, batch, 0.7)
                output = losses.online_dpo(
                    token_logps(policy, batch, 0.7),
                    ref,
                    torch.tensor(replay.score([list(row) for row in ids])),
                    torch.arange(8) // 2,
                    mask=batch.completion_mask,
                )
                output.loss.backward()
                # In the optimizer's order: how a norm is rounded depends on what is added first.
                taken = [p for group in optimizer.param_groups for p in group["params"]]
                torch.nn.utils.clip_grad_norm_(taken, 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        history.append(copy.deepcopy(policy))
    found: str = replay.digest(policy)
    return found


@pytest.mark.parametrize(
    ("delay", "minibatches", "epochs"),
    [(0, 1, 1), (1, 1, 1), (2, 1, 1), (3, 1, 1), (1, 2, 1), (1, 1, 2), (0, 3, 2)],
)
@pytest.mark.parametrize("placement", ["inline", "thread"])
def test_a_run_equals_the_plain_loop_bit_for_bit(
    replay: Any, tmp_path: Path, placement: Any, delay: int, minibatches: int, epochs: int
) -> None:
    args = replay.settings(
        tmp_path,
        rounds_ahead=delay,
        minibatches_per_round=minibatches,
        epochs_per_round=epochs,
    )
    run = replay.trainer(args, HFEngine(placement=placement))
    run.train()
    assert replay.digest(run.model) == plain_loop(replay, delay, minibatches, epochs)


def test_rounds_of_delay_matter(replay: Any) -> None:
    ends = {plain_loop(replay, delay) for delay in range(4)}
    assert len(ends) == 4


@pytest.mark.slow
@pytest.mark.parametrize("delay", [1, 2])
@pytest.mark.parametrize("chance", range(5))
def test_processes_that_dawdle_change_nothing(
    replay: Any, tmp_path: Path, delay: int, chance: int
) -> None:
    engine = replay.Sleeping(HFEngine(placement="process", threads=1), chance)
    run = replay.trainer(
        replay.settings(tmp_path, rounds_ahead=delay),
        engine,
        callbacks=[replay.SleepingLearner(100 + chance)],
    )
    run.train()
    assert replay.digest(run.model) == plain_loop(replay, delay)


def test_round_two_of_a_synchronous_run_is_drawn_by_the_weights_after_round_one(
    replay: Any, tmp_path: Path
) -> None:
    loaded: list[tuple[int, dict[str, torch.Tensor]]] = []

    class Recording(HFEngine):
        def load_weights(self, source: Any, version: int) -> None:
            loaded.append((version, {name: value.clone() for name, value in source}))
            super().load_weights(source, version)

    learned: dict[int, dict[str, torch.Tensor]] = {}

    class Keeping(replay.TrainerCallback):  # type: ignore[misc,name-defined]
        def on_step_end(self, _args: Any, state: Any, *_: Any, model: Any, **__: Any) -> None:
            learned[state.global_step] = {
                name: value.detach().clone() for name, value in model.named_parameters()
            }

    run = replay.trainer(
        replay.settings(tmp_path, rounds_ahead=0),
        Recording(placement="thread"),
        callbacks=[Keeping()],
    )
    run.train()
    assert [version for version, _ in loaded] == [0, 1, 2, 3, 4, 5]
    for version, weights in loaded[1:]:
        assert all(torch.equal(weights[name], learned[version][name]) for name in weights)
    assert not all(torch.equal(a, loaded[0][1][name]) for name, a in loaded[1][1].items())


@pytest.mark.parametrize("delay", range(4))
@pytest.mark.parametrize("minibatches", [1, 2, 5])
@pytest.mark.parametrize("epochs", [1, 2])
def test_the_staleness_of_every_step_is_the_closed_form(
    replay: Any, tmp_path: Path, delay: int, minibatches: int, epochs: int
) -> None:
    rounds, per_round = 5, minibatches * epochs
    args = replay.settings(
        tmp_path,
        rounds_ahead=delay,
        minibatches_per_round=minibatches,
        epochs_per_round=epochs,
        max_steps=rounds * per_round,
        per_device_train_batch_size=1,
        logging_steps=1,
    )
    run = replay.trainer(args, HFEngine(placement="thread"))
    run.train()
    found = [int(row["staleness"]) for row in run.state.log_history if "staleness" in row]
    expected = [u - max(0, u // per_round - delay) * per_round for u in range(rounds * per_round)]
    assert found == expected
