"""What an iteration does, against a plain loop: one sequence at a time, nothing padded or shared.

The loop gets the rollouts that the trainer's backend gave, by the ids that they continue, and the
order of the mini-batches, which both derive from the seed. Steps, values, advantages, losses, and
the optimizer's arithmetic are its own.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("decapod.lm")
pytest.importorskip("transformers")

from decapod.seeding import Seeds
from vineppo.batch import EpisodeBatch
from vineppo.config import TrainerConfig
from vineppo.credit import Credit, StepValueAdvantages
from vineppo.segmenters import WholeResponseSegmenter
from vineppo.values import ValueEstimates

# Everything that a default could hide is changed, and clipping of all kinds is at work.
CHANGES: dict[str, dict[str, Any]] = {
    "VinePPO": {"gamma": 0.9, "lam": 0.7, "max_value_steps": 2},
    "PPO": {
        "gamma": 0.95,
        "lam": 0.8,
        "critic_learning_rate": 3e-2,
        "value_coefficient": 0.6,
        "value_clip_range": 0.02,
    },
    "RLOO": {"whiten": "std", "pg_reduction": "sequence_sum", "kl": "k2", "kl_reduction": "token"},
    "GRPO": {"whiten": None, "pg_reduction": "sequence"},
    "RestEM": {"mini_batch_size": 1},
    "DPOPositive": {"dpo_beta": 0.2, "dpo_lambda": 3.0},
}
COMMON = {
    "weight_decay": 0.1,
    "max_grad_norm": 0.3,
    "warmup_ratio": 0.4,
    "adam_betas": (0.8, 0.95),
    "adam_epsilon": 1e-5,
}
OF_POLICY_GRADIENT = {"beta": 0.2, "clip_range": 0.03, "kl_clamp": 0.5}


@dataclass
class Answer:
    """An episode, and what the plain loop knows of each of its tokens."""

    prompt: tuple[int, ...]
    ids: tuple[int, ...]
    finished: bool
    score: float
    group: int
    advantages: Tensor | None = None
    old: Tensor | None = None
    ref: Tensor | None = None
    old_values: Tensor | None = None
    returns: Tensor | None = None


class PlainLoop:
    """One iteration of a method."""

    def __init__(self, tiny: Any, method: str, config: Any, calls: Sequence[Any]) -> None:
        self.tiny, self.method, self.config = tiny, method, config
        self.policy = tiny.model()
        self.reference = tiny.model()
        self.trunk = copy.deepcopy(self.policy.model) if method == "PPO" else None
        self.head = torch.zeros(17, dtype=torch.float64, requires_grad=True)  # weights and bias
        self.tokenizer = tiny.tokenizer()
        self.longest = 0  # in steps
        prompts, _, rollouts = calls[0]
        self.rows = {tuple(self.tokenizer(row["prompt"])["input_ids"]): row for row in tiny.ROWS}
        self.answers = [
            Answer(prompt, r.token_ids, r.finished, self.score(prompt, r.token_ids, r.finished), g)
            for g, (prompt, of_prompt) in enumerate(zip(prompts, rollouts, strict=True))
            for r in of_prompt
        ]
        self.rollouts = dict(zip(calls[1][0], calls[1][2], strict=True)) if calls[1:] else {}

    def score(self, prompt: tuple[int, ...], ids: tuple[int, ...], finished: bool) -> float:
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return float(finished and len(text) % 2 == self.rows[prompt]["odd"])

    # --- models -----------------------------------------------------------------------------------

    def logprobs(self, model: Any, answer: Answer) -> Tensor:
        ids = torch.tensor([answer.prompt + answer.ids])
        scores = (model(ids).logits[0] / self.config.temperature).log_softmax(-1)
        start = len(answer.prompt)
        return torch.stack([scores[t - 1, ids[0, t]] for t in range(start, ids.shape[1])])

    def values(self, answer: Answer) -> Tensor:
        ids = torch.tensor([answer.prompt + answer.ids])
        hidden = self.trunk(ids).last_hidden_state[0]
        start = len(answer.prompt)
        return (hidden @ self.head[:16] + self.head[16])[start - 1 : -1]

    # --- credit -----------------------------------------------------------------------------------

    def prepare(self) -> list[tuple[Answer, ...]]:
        with torch.no_grad():
            for answer in self.answers:
                answer.old = self.logprobs(self.policy, answer)
                answer.ref = self.logprobs(self.reference, answer)
        scores = [[a.score for a in group] for group in self.groups()]
        if self.method == "RestEM":
            right = {(a.prompt, a.ids): a for a in self.answers if a.score > 0.5}
            return [(a,) for a in right.values()]
        if self.method == "DPOPositive":
            return [
                (better, worse)
                for group in self.groups()
                for better, worse in itertools.product(group, group)
                if better.score > 0.5 >= worse.score
            ]
        for answer in self.answers:
            others = list(scores[answer.group])
            others.remove(answer.score)
            if self.method == "RLOO":
                one = answer.score - sum(others) / len(others)
                answer.advantages = torch.full((len(answer.ids),), one, dtype=torch.float64)
            elif self.method == "GRPO":
                of = torch.tensor(scores[answer.group]).double()
                one = float(answer.score - of.mean()) / (float(of.std()) + 1e-4)
                answer.advantages = torch.full((len(answer.ids),), one, dtype=torch.float64)
            elif self.method == "VinePPO":
                answer.advantages = self.of_steps(answer)
            else:
                self.of_critic(answer)
        return [(a,) for a in self.answers]

    def groups(self) -> Iterator[list[Answer]]:
        for _, group in itertools.groupby(self.answers, key=lambda a: a.group):
            yield list(group)

    def of_steps(self, answer: Answer) -> Tensor:
        """A newline ends a line that is not blank, whatever follows, EOS among it."""
        newline = self.tokenizer.convert_tokens_to_ids("\n")
        steps: list[list[int]] = [[]]
        blank, ended = True, False
        for place, token in enumerate(answer.ids):
            if ended:
                steps.append([])
                blank, ended = True, False
            if token not in self.tokenizer.all_special_ids:
                ended = token == newline and not blank
                blank = blank and token == newline
            steps[-1].append(place)
        self.longest = max(self.longest, len(steps))
        starts = [step[0] for step in steps]
        values = []
        for start in starts[: self.config.max_value_steps]:
            found = self.rollouts[answer.prompt + answer.ids[:start]]
            room = self.config.max_response_tokens - start
            assert all(len(r.token_ids) <= room for r in found)
            scores = [
                self.score(answer.prompt, answer.ids[:start] + r.token_ids, r.finished)
                for r in found
            ]
            assert len(scores) == self.config.num_rollouts
            values.append(sum(scores) / len(scores))
        gamma, lam, last = self.config.gamma, self.config.lam, len(steps) - 1
        rewards = [0.0] * last + [answer.score]
        while len(values) <= last:  # from there on the trajectory's own return
            values.append(gamma ** (last - len(values)) * answer.score)
        following = [*values[1:], 0.0]
        deltas = [r + gamma * w - v for r, v, w in zip(rewards, values, following, strict=True)]
        out = torch.zeros(len(answer.ids), dtype=torch.float64)
        for i, step in enumerate(steps):
            out[step] = sum((gamma * lam) ** (j - i) * deltas[j] for j in range(i, last + 1))
        return out

    def of_critic(self, answer: Answer) -> None:
        with torch.no_grad():
            values = self.values(answer)
        gamma, lam, last = self.config.gamma, self.config.lam, len(answer.ids) - 1
        found = []
        for t in range(last + 1):
            total = 0.0
            for i in range(t, last + 1):
                following = float(values[i + 1]) if i < last else 0.0
                reward = answer.score if i == last else 0.0
                total += (gamma * lam) ** (i - t) * (reward + gamma * following - float(values[i]))
            found.append(total)
        answer.old_values = values
        answer.advantages = torch.tensor(found, dtype=torch.float64)
        answer.returns = answer.advantages + values

    # --- losses -----------------------------------------------------------------------------------

    def loss(self, units: Sequence[tuple[Answer, ...]]) -> Tensor:
        if self.method == "RestEM":
            return sum(-self.logprobs(self.policy, a).mean() for (a,) in units) / len(units)
        if self.method == "DPOPositive":
            return sum(map(self.of_pair, units)) / len(units)
        return self.of_policy_gradient([a for (a,) in units])

    def of_pair(self, pair: tuple[Answer, ...]) -> Tensor:
        better, worse = pair
        gain = (self.logprobs(self.policy, better) - better.ref).sum()
        loss = (self.logprobs(self.policy, worse) - worse.ref).sum()
        lost = torch.relu(-gain)  # whose derivative at 0, where policy and reference agree, is 0
        inner = self.config.dpo_beta * (gain - loss - self.config.dpo_lambda * lost)
        return torch.log1p(torch.exp(-inner))

    def of_policy_gradient(self, answers: Sequence[Answer]) -> Tensor:
        config = self.config
        tokens = sum(len(a.ids) for a in answers)
        everything = torch.cat([a.advantages for a in answers])
        mean, scale = torch.zeros(()), torch.ones(())
        if config.whiten is not None:
            scale = 1 / torch.sqrt(everything.var() + 1e-8)
        if config.whiten == "batch":
            mean = everything.mean()
        policy, divergence, critic = [], [], []
        for a in answers:
            now = self.logprobs(self.policy, a)
            ratio, advantage = torch.exp(now - a.old), (a.advantages - mean) * scale
            eps = config.clip_range
            gain = torch.minimum(advantage * ratio, advantage * ratio.clamp(1 - eps, 1 + eps))
            d = a.ref - now
            k = d**2 / 2 if config.kl == "k2" else torch.exp(d) - d - 1
            policy.append(-gain)
            divergence.append(k.clamp(max=config.kl_clamp))
            if self.trunk is not None:
                v = self.values(a)
                near = torch.clamp(
                    v, a.old_values - config.value_clip_range,
                    a.old_values + config.value_clip_range,
                )  # fmt: skip
                critic.append(torch.maximum((v - a.returns) ** 2, (near - a.returns) ** 2) / 2)
        by: dict[str, Callable[[list[Tensor]], Tensor]] = {
            "token": lambda parts: torch.cat(parts).sum() / tokens,
            "sequence": lambda parts: sum(part.mean() for part in parts) / len(parts),
            "sequence_sum": lambda parts: sum(part.sum() for part in parts) / len(parts),
        }
        loss = by[config.pg_reduction](policy) + config.beta * by[config.kl_reduction](divergence)
        if critic:
            loss = loss + config.value_coefficient * by["token"](critic)
        return loss

    # --- learning ---------------------------------------------------------------------------------

    def run(self) -> dict[str, Tensor]:
        config = self.config
        units = self.prepare()
        named = dict(self.policy.named_parameters())
        critic = {}
        if self.trunk is not None:
            critic = {f"trunk.{n}": p for n, p in self.trunk.named_parameters()}
            critic["head"] = self.head
        rate = getattr(config, "critic_learning_rate", None) or config.learning_rate
        groups = []
        for found, peak in ((named, config.learning_rate), (critic, rate)):
            for name, p in found.items():
                # The head's weights are a matrix, of which the bias is the last entry here.
                decay = config.weight_decay if p.ndim == 2 else 0.0
                groups.append({"params": [p], "peak": peak, "weight_decay": decay, "name": name})
        optimizer = torch.optim.AdamW(groups, 0.0, config.adam_betas, config.adam_epsilon)
        size, everything = config.mini_batch_size, [*named.values(), *critic.values()]
        planned = config.num_epochs * math.ceil(len(units) / size)
        step = 0
        for epoch in range(config.num_epochs):
            names = ("vineppo", "order", 0, epoch)
            order = Seeds(config.seed).child(*names).generator().permutation(len(units))
            for start in range(0, len(order), size):
                optimizer.zero_grad()
                self.loss([units[i] for i in order[start : start + size]]).backward()
                norm = torch.sqrt(sum((p.grad**2).sum() for p in everything if p.grad is not None))
                for p in everything:
                    p.grad *= min(1.0, config.max_grad_norm / (float(norm) + 1e-6))
                done = (step + 0.5) / planned / config.iterations
                warm = config.warmup_ratio
                factor = done / warm if done < warm else (1 - done) / (1 - warm)
                before = self.head.detach().clone()
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * factor
                optimizer.step()
                with torch.no_grad():
                    self.head[:16] -= rate * factor * config.weight_decay * before[:16]
                step += 1
        return {**named, **critic}


@pytest.mark.parametrize("method", list(CHANGES))
def test_an_iteration_is_that_of_a_plain_loop(tiny: Any, tmp_path: Path, method: str) -> None:
    changes = {**COMMON, **CHANGES[method]}
    if method not in ("RestEM", "DPOPositive"):
        changes = {**OF_POLICY_GRADIENT, **changes}
    run = tiny.recorded(method, tmp_path, iterations=1, seed=3, **changes)
    result = run.train()
    loop = PlainLoop(tiny, method, run.args, run.backend.calls)
    scores = [a.score for a in loop.answers]
    assert run.history[0]["reward"] == pytest.approx(np.mean(scores))
    assert 0 < np.mean(scores) < 1
    expected = loop.run()
    assert result.steps > 2
    assert method != "VinePPO" or loop.longest > run.args.max_value_steps
    found = dict(run.model.named_parameters())
    if method == "PPO":
        module = run.module
        found |= {f"trunk.{n}": p for n, p in module.trunk.named_parameters()}
        found["head"] = torch.cat([module.head.weight[0], module.head.bias])
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-9, rtol=0, msg=name)
    assert tiny.difference(tiny.parameters(run), tiny.START) > 1e-3


def test_all_methods_sample_the_same_first_episodes(tiny: Any, tmp_path: Path) -> None:
    first = []
    for method in tiny.METHODS:
        run = tiny.recorded(method, tmp_path / method, iterations=1)
        run.train()
        first.append(run.backend.calls[0])
    assert all(call == first[0] for call in first)
    other = tiny.recorded("RLOO", tmp_path / "other", iterations=1, seed=1)
    other.train()
    assert other.backend.calls[0][2] != first[0][2]


def dropping(kind: str) -> Any:
    """A model whose configuration asks for dropout, untrained, in double precision."""
    import transformers

    if kind == "llama":
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "attention_dropout": 0.5}
        config = transformers.LlamaConfig(vocab_size=10, eos_token_id=2, **sizes, **heads)
    else:
        drops = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}
        config = transformers.GPT2Config(
            vocab_size=10, n_positions=48, n_embd=16, n_layer=2, n_head=2, eos_token_id=2,
            bos_token_id=1, **drops,
        )  # fmt: skip
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).double()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["VinePPO", "PPO"])
def test_the_first_ratio_of_an_iteration_is_1(
    tiny: Any, tmp_path: Path, method: str, kind: str, checkpointing: bool
) -> None:
    policy = dropping(kind)
    assert policy.config.to_dict().get("attention_dropout", 0.5) == 0.5
    run = tiny.trainer(
        method, tmp_path, of=policy, iterations=2, num_epochs=1, mini_batch_size=8,
        gradient_checkpointing=checkpointing, eval_samples=1,
    )  # fmt: skip
    assert policy.training == checkpointing
    assert run.train().steps == 2
    for row in run.history:
        assert row["ratio"] == pytest.approx(1, abs=1e-12)
        assert row["ratio_max"] == pytest.approx(1, abs=1e-12)
        assert row["approx_kl"] == pytest.approx(0, abs=1e-12)
        assert row["clip_fraction"] == 0


@pytest.mark.parametrize("method", ["VinePPO", "PPO", "RestEM", "DPOPositive"])
def test_the_size_of_micro_batches_changes_nothing(tiny: Any, tmp_path: Path, method: str) -> None:
    runs = []
    for size in (1, 8):
        run = tiny.trainer(method, tmp_path / str(size), micro_batch_size=size, mini_batch_size=5)
        run.train()
        runs.append(run)
    for run in runs[1:]:
        assert tiny.difference(tiny.parameters(run), tiny.parameters(runs[0])) < 1e-9
        for row, expected in zip(tiny.history(run), tiny.history(runs[0]), strict=True):
            assert row == pytest.approx(expected, abs=1e-7)


class LeaveOneOut:
    """Values of prompts: the mean score of the other answers of the group.

    They belong to answers and not to states, so they are an advantage estimator's, which lists them
    for VinePPO's own.
    """

    def __call__(self, batch: EpisodeBatch, seed: int) -> Credit:
        total = {g: batch.scores[batch.groups == g].sum() for g in set(batch.groups.tolist())}
        others = (batch.groups == batch.groups[:, None]).sum(1) - 1
        means = (np.array([total[g] for g in batch.groups.tolist()]) - batch.scores) / others

        def listed(states: Sequence[Any], seed: int = 0) -> ValueEstimates:
            assert all(not state.response_ids for state in states)
            return ValueEstimates(means, np.zeros(len(means)), np.zeros(len(means), dtype=np.int64))

        return StepValueAdvantages(listed, WholeResponseSegmenter(), None)(batch, seed)


@pytest.mark.parametrize("whiten", ["batch", None])
def test_vineppo_with_whole_answers_and_leave_one_out_values_is_rloo(
    tiny: Any, tmp_path: Path, whiten: str | None
) -> None:
    vine = tiny.trainer(
        "VinePPO", tmp_path / "vine", whiten=whiten, extra={"advantage_estimator": LeaveOneOut()}
    )
    rloo = tiny.trainer("RLOO", tmp_path / "rloo", whiten=whiten)
    vine.train()
    rloo.train()
    assert tiny.difference(tiny.parameters(vine), tiny.parameters(rloo)) < 1e-12
    assert tiny.difference(tiny.parameters(vine), tiny.START) > 1e-3


def test_a_value_estimator_takes_the_place_of_rollouts(tiny: Any, tmp_path: Path) -> None:
    from vineppo.values import ConstantValueEstimator

    changes = {"segmenter": "token", "lam": 1.0}
    extra = {"value_estimator": ConstantValueEstimator(0.25)}
    vine = tiny.recorded("VinePPO", tmp_path / "vine", extra=extra, **changes)
    ppo = tiny.trainer("PPO", tmp_path / "ppo", constant_value=0.25)
    vine.train()
    ppo.train()
    assert len(vine.backend.calls) == 2  # of two iterations
    assert tiny.difference(tiny.parameters(vine), tiny.parameters(ppo)) == 0


def test_config_classes_are_those_of_their_trainers(tiny: Any, tmp_path: Path) -> None:
    import vineppo

    for method in tiny.METHODS:
        kind = getattr(vineppo, f"{method}Trainer").config_class
        assert kind is getattr(vineppo, f"{method}Config")
        assert issubclass(kind, TrainerConfig)
