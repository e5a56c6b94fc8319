"""The value bench: what critic, rollouts and group mean know about intermediate states.

All are judged on the same states of the same policy, against the mean of many fresh rollouts that
none of them has seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from vineppo.batch import Response, at_tokens, collate
from vineppo.borders import token_borders
from vineppo.dataset import Prompts
from vineppo.diagnostics import (
    Candidates,
    alternatives,
    collect_states,
    evaluate_values,
    ground_truth,
    states_of,
)
from vineppo.episodes import Episode, State
from vineppo.policy import PolicyWithCritic
from vineppo.rewards import RewardSuite
from vineppo.rollout import TransformersBackend
from vineppo.segmenters import make_segmenter
from vineppo.values import (
    CriticValueEstimator,
    GroupMeanValueEstimator,
    MonteCarloValueEstimator,
)

if TYPE_CHECKING:
    from vineppo.tasks import ChainArithmetic

KS: Final = (1, 3, 9)


class Sampling:
    """A policy, prompts of the task, and what is needed to sample and score answers.

    Args:
        model: the policy.
        task: of the prompts.
        rows: examples of the task.
        eos_token_ids: tokens that end an answer.
    """

    def __init__(
        self, model: Any, task: ChainArithmetic, rows: Sequence[Mapping[str, Any]]
    ) -> None:
        self.tokenizer = task.tokenizer()
        self.longest = task.max_response_tokens
        self.prompts = Prompts("rows", rows, self.tokenizer, None, self.longest)
        self.reward = RewardSuite(task.reward, self.prompts, self.tokenizer)
        self.backend = TransformersBackend(model, max_batch_size=1024)
        self.model = model

    def params(self, temperature: float = 1.0) -> Any:
        """How tokens are drawn."""
        from decapod.lm import SamplingParams

        return SamplingParams(max_new_tokens=self.longest, temperature=temperature)

    def episodes(self, samples: int, seed: int, temperature: float = 1.0) -> list[Episode]:
        """Answers to all prompts."""
        seeds = np.random.default_rng(seed).integers(2**63, size=len(self.prompts)).tolist()
        found = self.backend.generate(self.prompts.ids, samples, self.params(temperature), seeds)
        return [
            Episode(row, self.prompts.ids[row], rollout.token_ids, rollout.finished)
            for row, rollouts in enumerate(found)
            for rollout in rollouts
        ]

    def borders(self, response_ids: Sequence[int]) -> list[int]:
        """Where steps end, in tokens."""
        return token_borders(make_segmenter("newline"), response_ids, self.tokenizer)


def divergence(policy: Any, start: Any, episodes: Sequence[Episode]) -> float:
    """Divergence of a policy from where it started, on its own answers; nats per answer."""
    responses = [Response(e.prompt_ids, e.response_ids) for e in episodes]
    sums = []
    for model in (policy, start):
        found = []
        for i in range(0, len(responses), 256):
            rows = collate(responses[i : i + 256], 0)
            with torch.no_grad():
                logprobs, _ = PolicyWithCritic(model)(rows.input_ids, rows.attention_mask)
            found += [tokens.sum() for tokens in at_tokens(logprobs, rows.mask)]
        sums.append(np.array(found))
    return float((sums[0] - sums[1]).mean())


def critic_values(module: PolicyWithCritic) -> CriticValueEstimator:
    """The critic of a trainer as a value estimator."""

    def values(sequences: Sequence[Sequence[int]]) -> list[float]:
        found: list[float] = []
        for i in range(0, len(sequences), 256):
            part = sequences[i : i + 256]
            # Values stand before the token that is chosen: one token behind each state asks for it.
            rows = collate([Response(tuple(ids), (0,)) for ids in part], 0)
            with torch.no_grad():
                _, of = module(rows.input_ids, rows.attention_mask)
            assert of is not None
            found += [float(v[0]) for v in at_tokens(of, rows.mask)]
        return found

    return CriticValueEstimator(values)


def judge(
    sampling: Sampling, critic: PolicyWithCritic | None, evaluation: Mapping[str, int], seed: int
) -> dict[str, Any]:
    """Reports by the name of a predictor, as JSON.

    Args:
        sampling: of the policy.
        critic: policy and critic; None without one.
        evaluation: ``states``, ``rollouts`` behind the truth of each, ``alternatives``: states
            whose next steps are ranked.
        seed: of the sampling.
    """
    trajectories = sampling.episodes(4, seed)
    scores = np.array(sampling.reward(trajectories)).reshape(-1, 4).mean(axis=1)
    sample = collect_states(trajectories, sampling.borders, limit=evaluation["states"], seed=seed)
    common = {"params": sampling.params(), "max_response_tokens": sampling.longest}
    truth = ground_truth(
        sampling.backend, sampling.reward, sample.states, evaluation["rollouts"], seed, **common
    )
    sets = alternatives(
        sampling.backend, _spread(sample.states, evaluation["alternatives"]), sampling.borders,
        5, seed, samples=32, **common,
    )  # fmt: skip
    candidates = Candidates(
        sets,
        ground_truth(
            sampling.backend, sampling.reward, states_of(sets), evaluation["rollouts"], seed,
            **common,
        ),
    )  # fmt: skip
    predictors: dict[str, Any] = {
        f"rollouts, K={k}": MonteCarloValueEstimator(sampling.backend, sampling.reward, k, **common)
        for k in KS
    }
    predictors["group mean"] = GroupMeanValueEstimator(dict(enumerate(scores.tolist())))
    if critic is not None:
        predictors["critic"] = critic_values(critic)
    reports = evaluate_values(
        predictors, sample.states, truth, sample.positions, sample.clusters,
        candidates=candidates, bins=5, seed=seed,
    )  # fmt: skip
    return {name: report.to_json() for name, report in reports.items()}


def _spread(states: Sequence[State], count: int) -> list[State]:
    """So many different states, evenly out of all."""
    different = list(dict.fromkeys(states))
    places = np.linspace(0, len(different) - 1, min(count, len(different))).round().astype(int)
    return [different[i] for i in places]
