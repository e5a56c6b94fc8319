"""R1: how much gold each loss loses as its samples grow stale.

A round of N minibatches is generated with one version of the weights and trained on in N updates,
the k-th of them k - 1 updates stale; generation does not run ahead (sections 3.2 and 3.3 of arXiv
2410.18252). All arms have the same prompts, updates and learning rates. Two rates, five times
apart, because the order of the losses depends on the rate.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from asyncrlhf.experiments import machine
from asyncrlhf.experiments.setting import PILOT, Setting, inline, one_thread, train

ROBUSTNESS: Final[dict[str, Any]] = {**PILOT}
"""The setting of all cells; `experiments/robustness.yaml` holds the same."""

LOSSES: Final = ("online_dpo", "proximal_rloo", "rloo", "copg", "best_of_k", "ppo")
MORE_LOSSES: Final = ("ipo", "grpo")
MINIBATCHES: Final = (1, 2, 4, 16, 64)
GENTLE, LARGE = 2e-4, 1e-3
RATES: Final = (GENTLE, LARGE)

CURVE: Final = ("step", "gold", "gold_se", "kl", "kl_k3", "ppl", "length", "eos_rate")
"""What is kept of an evaluation."""


def cell(
    content: Mapping[str, Any], loss: str, minibatches: int, rate: float, seed: int
) -> dict[str, Any]:
    """Job: train one cell of the grid with one seed, on one thread.

    Args:
        content: see :meth:`~asyncrlhf.experiments.setting.Setting.from_mapping`.
        loss: the arm.
        minibatches: N.
        rate: the learning rate.
        seed: of everything.

    Returns:
        The arguments but ``content``; ``curve``, with a row per evaluation; ``staleness``, the
        mean; ``seconds`` per round of g, r, t and w.
    """
    setting = Setting.from_mapping(
        {
            **content,
            "training": {
                **content["training"],
                "loss": loss,
                "minibatches_per_round": minibatches,
                "learning_rate": rate,
            },
        }
    )
    with machine.shared(), one_thread():
        done = train(setting, seed, inline(setting))
    return {
        "loss": loss,
        "minibatches": minibatches,
        "rate": rate,
        "seed": seed,
        "curve": [kept(row) for row in done.curve],
        "staleness": done.staleness,
        "seconds": done.seconds(),
    }


def kept(row: Mapping[str, float], *further: str) -> dict[str, float]:
    """Of an evaluation, what is kept, to six decimals."""
    return {name: round(row[name], 6) for name in (*CURVE, *further)}
