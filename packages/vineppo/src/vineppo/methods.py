"""The trainers. Each says what its episodes teach; the loop is :mod:`vineppo.trainer`'s."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from vineppo.batch import EpisodeBatch, Response
from vineppo.budget import AdaptiveBudget
from vineppo.config import (
    DPOPositiveConfig,
    GRPOConfig,
    PolicyGradientConfig,
    PPOConfig,
    RestEMConfig,
    RLOOConfig,
    TrainerConfig,
    VinePPOConfig,
)
from vineppo.credit import (
    AdvantageEstimator,
    Credit,
    CriticAdvantages,
    StepValueAdvantages,
    grpo_advantages,
    rloo_advantages,
)
from vineppo.errors import InvalidInputError
from vineppo.objectives import DPOPositive, FineTuning, PolicyGradient, Unit
from vineppo.trainer import EpisodeTrainer, Lesson
from vineppo.values import ConstantValueEstimator, MonteCarloValueEstimator, ValueEstimator


class PolicyGradientTrainer(EpisodeTrainer):
    """PPO's loss with the advantages of any estimator.

    Args:
        advantage_estimator: one of one's own, see :class:`vineppo.credit.AdvantageEstimator`.

    The other arguments are those of :class:`~vineppo.trainer.EpisodeTrainer`.
    """

    config_class: ClassVar[type[TrainerConfig]] = PolicyGradientConfig

    def __init__(
        self, *args: Any, advantage_estimator: AdvantageEstimator | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.advantage_estimator = advantage_estimator or self._estimator()

    def _estimator(self) -> AdvantageEstimator:
        """The estimator of the method."""
        return rloo_advantages()

    def _lesson(self, batch: EpisodeBatch, iteration: int) -> Lesson:
        responses = _responses(batch)
        policy = self._read_policy(responses)
        reference = self._read_reference(responses)
        if policy[0][1] is not None:
            batch = replace(batch, token_values=[values for _, values in policy])
        with self.accelerator.autocast():
            credit = self.advantage_estimator(batch, self._seed("credit", iteration))
        _check_lengths(credit, batch)
        units: list[Unit] = []
        for i, (response, (logprobs, values)) in enumerate(zip(responses, policy, strict=True)):
            units.append(
                (
                    replace(
                        response,
                        advantages=credit.advantages[i],
                        old_logprobs=logprobs,
                        ref_logprobs=None if reference is None else reference[i],
                        old_values=values,
                        returns=None if credit.returns is None else credit.returns[i],
                    ),
                )
            )
        metrics = dict(credit.metrics)
        metrics["logprob"] = float(np.mean(np.concatenate([logprobs for logprobs, _ in policy])))
        if reference is not None:
            # Of the policy that sampled, before this iteration's steps; nats per answer.
            metrics["divergence"] = float(
                np.mean([(lp - ref).sum() for (lp, _), ref in zip(policy, reference, strict=True)])
            )
        return Lesson(units, PolicyGradient(self.args), metrics=metrics)


class VinePPOTrainer(PolicyGradientTrainer):
    """VinePPO: PPO whose values of intermediate states are means of rollouts from them.

    Args:
        segmenter: an object instead of the name in ``args.segmenter``.
        value_estimator: instead of Monte-Carlo rollouts by the policy.

    The other arguments are those of :class:`~vineppo.trainer.EpisodeTrainer`. Source: arXiv
    2410.01679.
    """

    config_class = VinePPOConfig

    def __init__(
        self,
        *args: Any,
        segmenter: Any = None,
        value_estimator: ValueEstimator | None = None,
        **kwargs: Any,
    ) -> None:
        self._segmenter = segmenter
        self._values = value_estimator
        super().__init__(*args, **kwargs)

    def _estimator(self) -> AdvantageEstimator:
        config: VinePPOConfig = self.args
        values = self._values or MonteCarloValueEstimator(
            self.backend,
            self.reward,
            config.num_rollouts,
            params=self._params(config.temperature, config.top_p),
            max_response_tokens=config.max_response_tokens,
            adaptive=(
                None
                if config.adaptive_pilot is None
                else AdaptiveBudget(pilot=config.adaptive_pilot)
            ),
        )
        return StepValueAdvantages(
            values,
            config.segmenter if self._segmenter is None else self._segmenter,
            self.processing_class,
            config.max_value_steps,
            config.gamma,
            config.lam,
            self._ranks,
        )


class PPOTrainer(PolicyGradientTrainer):
    """PPO with a critic, or with a constant in its place."""

    config_class = PPOConfig

    def _critic(self) -> str | None:
        config: PPOConfig = self.args
        return config.critic if config.constant_value is None else None

    def _estimator(self) -> AdvantageEstimator:
        config: PPOConfig = self.args
        if config.constant_value is None:
            return CriticAdvantages(config.gamma, config.lam)
        return StepValueAdvantages(
            ConstantValueEstimator(config.constant_value),
            "token",
            self.processing_class,
            gamma=config.gamma,
            lam=config.lam,
        )


class RLOOTrainer(PolicyGradientTrainer):
    """RLOO: every token of an answer gets its score less the mean score of the others."""

    config_class = RLOOConfig


class GRPOTrainer(PolicyGradientTrainer):
    """GRPO: every token of an answer gets its score, standardised in its group."""

    config_class = GRPOConfig

    def _estimator(self) -> AdvantageEstimator:
        config: GRPOConfig = self.args
        return grpo_advantages(scale=config.scale)


class RestEMTrainer(EpisodeTrainer):
    """RestEM: fine-tuning on the policy's own right answers, early stopped."""

    config_class = RestEMConfig
    uses_reference = False

    def _restarts(self) -> bool:
        return bool(self.args.restart)

    def _lesson(self, batch: EpisodeBatch, iteration: int) -> Lesson:
        config: RestEMConfig = self.args
        rng = self._seeds("kept", iteration).generator()
        by_group = _by_group(batch)
        held_out = _held_out(list(by_group), config.validation_share, rng)
        learnt: list[Unit] = []
        validation: list[Unit] = []
        for group, members in by_group.items():
            right = {
                batch.episodes[i].response_ids: i
                for i in members
                if batch.scores[i] > config.correct_above and batch.episodes[i].finished
            }
            kept = list(right.values())
            if config.max_correct_per_prompt is not None:
                kept = kept[: config.max_correct_per_prompt]
            into = validation if group in held_out else learnt
            into.extend((_response(batch, i),) for i in kept)
        if not learnt:  # a lesson all of whose prompts were held out would teach nothing
            learnt, validation = validation, []
        return Lesson(
            learnt, FineTuning(), validation, config.restart, {"kept": float(len(learnt))}
        )


class DPOPositiveTrainer(EpisodeTrainer):
    """DPO-Positive on pairs of a right and a wrong answer to one prompt."""

    config_class = DPOPositiveConfig

    def _lesson(self, batch: EpisodeBatch, iteration: int) -> Lesson:
        config: DPOPositiveConfig = self.args
        rng = self._seeds("pairs", iteration).generator()
        chosen: list[tuple[int, int]] = []
        for members in _by_group(batch).values():
            right = [i for i in members if batch.scores[i] > config.correct_above]
            wrong = [i for i in members if batch.scores[i] <= config.correct_above]
            pairs = [(better, worse) for better in right for worse in wrong]
            kept = rng.permutation(len(pairs))[: config.max_pairs_per_prompt]
            chosen.extend(pairs[i] for i in sorted(kept))
        used = sorted({i for pair in chosen for i in pair})
        responses = [_response(batch, i) for i in used]
        reference = self._read_reference(responses) or []
        with_reference = {
            i: replace(response, ref_logprobs=logprobs)
            for i, response, logprobs in zip(used, responses, reference, strict=True)
        }
        units: list[Unit] = [(with_reference[i], with_reference[j]) for i, j in chosen]
        return Lesson(units, DPOPositive(config), metrics={"pairs": float(len(units))})


def _check_lengths(credit: Credit, batch: EpisodeBatch) -> None:
    if len(credit.advantages) != len(batch.episodes):
        raise InvalidInputError(
            f"advantage_estimator: expected advantages of {len(batch.episodes)} answers, got those "
            f"of {len(credit.advantages)}"
        )
    for index, (of, episode) in enumerate(zip(credit.advantages, batch.episodes, strict=True)):
        if len(of) != len(episode.response_ids):
            raise InvalidInputError(
                f"advantage_estimator: expected {len(episode.response_ids)} advantages for answer "
                f"{index}, one per token, got {len(of)}"
            )


def _response(batch: EpisodeBatch, index: int) -> Response:
    episode = batch.episodes[index]
    return Response(episode.prompt_ids, episode.response_ids)


def _responses(batch: EpisodeBatch) -> list[Response]:
    return [_response(batch, i) for i in range(len(batch.episodes))]


def _by_group(batch: EpisodeBatch) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for index, group in enumerate(batch.groups.tolist()):
        found.setdefault(group, []).append(index)
    return found


def _held_out(groups: Sequence[int], share: float, rng: np.random.Generator) -> set[int]:
    count = round(share * len(groups))
    return {groups[i] for i in rng.permutation(len(groups))[:count]}
