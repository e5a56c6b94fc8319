"""The job: train one arm from scratch and measure it as it learns.

All arms are the same run for the first half, one-hop problems alone, up to the style of answers.
Then "one-hop" goes on with them, while "compositional" has compositions of templates of group A in
the place of some two-question examples, at the same number of steps and examples. Both are tested
on compositions of group B, whose sentences have been seen in one-hop problems alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Final, Literal, get_args

import numpy as np

from gsm_compose.errors import LearningError
from gsm_compose.learning.examples import COMPOSITIONAL, ONE_HOP, Mixture, Style
from gsm_compose.learning.measuring import Measured, held_out_pairs, measure
from gsm_compose.learning.training import TrainingConfig, build, train

Arm = Literal["one-hop", "compositional", "code"]
ARMS: Final[tuple[Arm, ...]] = get_args(Arm)

_DESIGNS: Final[dict[Arm, tuple[Mixture, Mixture, Style]]] = {
    "one-hop": (ONE_HOP, ONE_HOP, "cot"),
    "compositional": (ONE_HOP, COMPOSITIONAL, "cot"),
    "code": (ONE_HOP, ONE_HOP, "code"),
}


def train_and_measure(
    arm: Arm,
    seed: int,
    steps: int = 300,
    pairs: int = 300,
    checkpoints: int = 4,
    config: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Job: one arm with one seed, on one thread. The same arguments give the same numbers.

    Args:
        arm: one of `ARMS`.
        seed: of weights, examples and test pairs. Arms with the same seed share all of them.
        steps: of each half of the training.
        pairs: held-out pairs that it is tested on.
        checkpoints: measurements per half; the last ones are at its end.
        config: fields of `TrainingConfig` that differ from the defaults, `steps` apart.

    Returns:
        JSON values: ``arm``, ``seed``, ``steps``; ``curve``, a list of rates per checkpoint (see
        `rates`) with ``step`` and the mean ``loss`` since the one before; ``half`` and ``end``, the
        fields of `Measured` after the two halves; ``q1_ids`` and ``q2_ids``, equal numbers where
        two pairs have the same question up to names.

    Raises:
        LearningError: a bad argument.
        MissingExtraError: the extra `experiments` is not installed.
    """
    if arm not in ARMS:
        raise LearningError(f"arm: expected one of {', '.join(ARMS)}, got {arm!r}")
    for name, value in {"steps": steps, "pairs": pairs, "checkpoints": checkpoints}.items():
        if value < 1:
            raise LearningError(f"{name}: expected at least 1, got {value}")
    if checkpoints > steps:
        raise LearningError(
            f"checkpoints: expected at most one per step ({steps}), got {checkpoints}"
        )
    try:
        settings = TrainingConfig(steps=steps, **(config or {}))
    except TypeError as error:
        raise LearningError(f"config: expected fields of TrainingConfig; {error}") from error
    with_one_thread = _one_thread()
    first, second, style = _DESIGNS[arm]
    model = build(settings, seed)
    tested = held_out_pairs(seed, pairs)
    marks = {
        round((half + i / checkpoints) * steps)
        for half in range(2)
        for i in range(1, checkpoints + 1)
    }
    curve: list[dict[str, float]] = []
    measured: dict[int, Measured] = {}
    losses: list[float] = []
    try:
        for step, loss in train(model, settings, (first, second), style, seed):
            losses.append(loss)
            if step in marks:
                measured[step] = measure(model, tested, style)
                curve.append({"step": step, "loss": float(np.mean(losses))} | rates(measured[step]))
                losses.clear()
    finally:
        with_one_thread()
    return {
        "arm": arm,
        "seed": seed,
        "steps": steps,
        "curve": curve,
        "half": asdict(measured[steps]),
        "end": asdict(measured[2 * steps]),
        "q1_ids": _numbered([pair.q1.key for pair in tested]),
        "q2_ids": _numbered([pair.q2.key for pair in tested]),
    }


def rates(measured: Measured) -> dict[str, float]:
    """Shares of right answers, and Δ with its parts; see `gsm_compose.gap` for the identity.

    Δ = S_comp − S1·S2 = (a − S1)·S2 + a·(b − S2) + l, with a the share of compositions whose first
    answer is right, a·b that with both right, and l that with the final answer alone.
    """
    means = {name: float(np.mean(column)) for name, column in asdict(measured).items()}
    both = float(np.mean(np.multiply(measured.c1, measured.cf)))
    s1, s2, c1, s_comp = (means[name] for name in ("q1", "q2", "c1", "cf"))
    return {
        "s1": s1,
        "s2": s2,
        "s_comp": s_comp,
        "delta": s_comp - s1 * s2,
        "distraction": (c1 - s1) * s2,
        "second_hop": both - c1 * s2,
        "lucky": s_comp - both,
        "c1": c1,
        "independent": means["independent"],
        "given": means["given"],
        "answered_x": means["answered_x"],
        "unparsable": means["unparsable"],
    }


def _numbered(keys: list[str]) -> list[int]:
    numbers: dict[str, int] = {}
    return [numbers.setdefault(key, len(numbers)) for key in keys]


def _one_thread() -> Callable[[], None]:
    """Give torch one thread; returns what undoes it."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    return lambda: torch.set_num_threads(before)
