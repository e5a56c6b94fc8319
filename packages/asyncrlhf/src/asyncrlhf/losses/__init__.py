"""Losses as pure functions of log-probabilities, scores, masks and groups.

All give a :class:`LossOutput`, whose ``loss`` is ``per_sequence.sum() / normalizer``. Pass the
``normalizer`` of the whole minibatch, and the losses of micro-batches sum to that of the minibatch;
:data:`INFO` says what each counts. Log-probabilities that are exponentiated are first brought to
±:data:`asyncrlhf.sequences.LOG_RATIO_LIMIT` as log-ratios: no value overflows, and the gradient
beyond is 0.
"""

from asyncrlhf.losses.advantages import gae, token_rewards, whiten
from asyncrlhf.losses.leave_one_out import copg, proximal_rloo, rloo
from asyncrlhf.losses.output import INFO, LossInfo, LossOutput
from asyncrlhf.losses.preferences import best_of_k, ipo, online_dpo
from asyncrlhf.losses.token_level import grpo, ppo

__all__ = [
    "INFO",
    "LossInfo",
    "LossOutput",
    "best_of_k",
    "copg",
    "gae",
    "grpo",
    "ipo",
    "online_dpo",
    "ppo",
    "proximal_rloo",
    "rloo",
    "token_rewards",
    "whiten",
]
