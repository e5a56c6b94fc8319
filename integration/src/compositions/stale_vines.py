"""asyncrlhf x vineppo: what is the value of a step worth when the weights behind it are old?

Vines cost nine rollouts a step, so they are what one would most like to move to an actor that runs
ahead of the learner. Its weights are then some updates old. The policy is a tiny Llama on a token
tree, where the value under *any* weights is known by dynamic programming: bias and variance of the
values are numbers at every update, and neither is estimated by more rollouts.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch

from asyncrlhf.engines import HFEngine
from decapod.lm import Request, SamplingParams, build_model
from vineppo import Episode, Rollout
from vineppo.backend import Usage, sample_seeds
from vineppo.rollout import Call
from vineppo.tasks import TokenTree
from vineppo.values import MonteCarloValueEstimator
from vineppo.vines import VineValues

VOCABULARY, HORIZON, PROMPT = 4, 4, (0,)
PARAMS = SamplingParams(max_new_tokens=HORIZON, temperature=1.0, ignore_eos=True)
K, BATCH = 9, 32


class Served:
    """An engine of asyncrlhf as vineppo wants its rollouts: the requests are the same ones."""

    def __init__(self, engine: HFEngine) -> None:
        self.engine = engine
        self.usage = Usage()

    def generate(
        self, prompts: Sequence[Sequence[int]], n: Any, params: Any, seeds: Sequence[int]
    ) -> list[list[Rollout]]:
        """Rollouts by whichever weights the engine has."""
        call = Call.of(prompts, n, params, seeds)
        answers = self.engine.generate(call.requests)
        done = [Rollout(a.ids, a.logprobs, finished=a.finish_reason == "stop") for a in answers]
        self.usage += Usage(
            generated_tokens=sum(len(rollout.token_ids) for rollout in done),
            prompt_tokens=sum(len(request.prompt) for request in call.requests),
            requests=len(done),
        )
        ends = np.cumsum([0, *call.counts])
        return [done[low:high] for low, high in pairwise(ends.tolist())]

    def load_weights(self, model: Any) -> None:
        """Use them as the next version."""
        self.engine.load_weights(model.named_parameters(), self.engine.version + 1)


def exact(model: Any, tree: TokenTree) -> TokenTree:
    """The tree with this model's probabilities, and with them its exact values."""
    leaves = torch.as_tensor(tree.shape.tokens)
    with torch.no_grad():
        ids = torch.cat([torch.full((len(leaves), 1), PROMPT[0]), leaves[:, :-1]], dim=1)
        logits = model(ids).logits.double().numpy()  # [leaves, depth, vocabulary]
    table = np.empty((tree.shape.internal, VOCABULARY))
    table[tree.shape.paths[:, :-1]] = logits
    return TokenTree(tree.shape, table, tree.rewards)


def train(
    *, staleness: int, updates: int, rate: float, seed: int, placement: Literal["inline", "process"]
) -> dict[str, Any]:
    """Policy gradient by vines; answers and rollouts come from weights so many updates old."""
    torch.set_num_threads(1)
    tree = TokenTree.random(VOCABULARY, HORIZON, seed, success=0.25)
    model = build_model(VOCABULARY, 16, 1, 2, init_std=0.3, seed=seed).eval()
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    engine = HFEngine(placement=placement, threads=1)
    engine.attach(model, [])
    place: dict[tuple[int, ...], int] = {}  # of each state its node
    leaf: dict[tuple[int, ...], float] = {}  # of each answer its reward
    for tokens, path, r in zip(
        tree.shape.tokens.tolist(), tree.shape.paths.tolist(), tree.rewards, strict=True
    ):
        place |= {tuple(tokens[:t]): path[t] for t in range(HORIZON)}
        leaf[tuple(tokens)] = float(r)

    def reward(episodes: Sequence[Episode]) -> list[float]:
        return [leaf[episode.response_ids] for episode in episodes]

    vines = VineValues(
        MonteCarloValueEstimator(
            Served(engine), reward, K, params=PARAMS, max_response_tokens=HORIZON
        ),
        reward,
        segmenter="token",
    )  # fmt: skip
    history, rows = [{n: p.detach().clone() for n, p in model.named_parameters()}], []
    trees = [exact(model, tree)]
    for step in range(updates):
        old = max(0, step - staleness)
        engine.load_weights(iter(history[old].items()), old)
        seeds = sample_seeds([seed * 10_000 + step], [BATCH])[0]
        answers = list(engine.generate([Request(PROMPT, PARAMS, s) for s in seeds]))
        assert {answer.oldest_version for answer in answers} == {old}
        ids = [answer.ids for answer in answers]
        credit = vines([PROMPT] * BATCH, ids, [False] * BATCH, [0] * BATCH, seed=step)
        nodes = {place[row[:t]]: v for row, values in zip(ids, credit.step_values, strict=True)
                 for t, v in enumerate(values)}  # fmt: skip
        at, found = np.array(list(nodes)), np.array(list(nodes.values()))
        rows.append({
            "bias2": float(np.mean((trees[old].values - trees[step].values)[at] ** 2)),
            "noise": float(np.mean((found - trees[old].values[at]) ** 2)),
            "error": float(np.mean(found - trees[step].values[at])),
            "value": float(trees[step].values[0]),
        })  # fmt: skip
        drawn = torch.tensor(ids)
        inputs = torch.cat([torch.full((BATCH, 1), PROMPT[0]), drawn[:, :-1]], dim=1)
        logps = model(inputs).logits.log_softmax(-1).gather(-1, drawn[..., None])[..., 0]
        optimizer.zero_grad()
        (-(logps * credit.padded(HORIZON)).sum(dim=1).mean()).backward()
        optimizer.step()
        history.append({n: p.detach().clone() for n, p in model.named_parameters()})
        trees.append(exact(model, tree))
    engine.close()
    return {"rows": rows, "end": float(trees[-1].values[0]), "best": float(tree.rewards.max())}
