"""Plug-ins for TRL's asynchronous GRPO (1.16): its seams, filled with this library's parts.

TRL's trainer asks for two objects: a rollout worker and a weight transfer. Those here let it train
with any engine of :mod:`asyncrlhf.engines`, on any device, with staleness that is bounded by
admission rather than by discarding, and with runs that repeat bit for bit::

    weights = EngineWeightTransfer(args)
    worker = EngineRolloutWorker(engine, weights, args=args, dataset=dataset, ...)
    trainer = portable_trainer(
        model=path, args=args, train_dataset=dataset, processing_class=tokenizer,
        rollout_worker=worker, weight_transfer=weights,
    )
"""

from __future__ import annotations

from asyncrlhf.integrations.trl_contract import TRLContractError, check_contract
from asyncrlhf.integrations.trl_portable import portable_trainer
from asyncrlhf.integrations.trl_rollouts import EngineRolloutWorker
from asyncrlhf.integrations.trl_weights import EngineWeightTransfer

__all__ = [
    "EngineRolloutWorker",
    "EngineWeightTransfer",
    "TRLContractError",
    "check_contract",
    "portable_trainer",
]
