"""R3: two ways to spend the side that would stand still.

Where generation is the bottleneck, the learner has time to train on a round more than once (T
epochs). Where training is, the actor has time for more completions per prompt (K), of which the
best and the worst make the pair (section 3.5 of arXiv 2410.18252). Both are measured by gold and
divergence against the time that the model predicts for asynchronous processes from the measured
seconds of each stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from asyncrlhf.experiments import machine
from asyncrlhf.experiments.robustness import kept
from asyncrlhf.experiments.setting import PILOT, Setting, inline, one_thread, train
from asyncrlhf.schedule import simulate

EPOCHS: Final[dict[str, Any]] = {
    **PILOT,
    "training": {**PILOT["training"], "loss": "online_dpo", "rounds_ahead": 1},
    "decoding": {"max_batch_size": 8},
}
"""Generation-bound: the actor has memory for eight answers at a time."""

SAMPLES: Final[dict[str, Any]] = {
    **EPOCHS,
    "training": {
        **EPOCHS["training"],
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 4,
    },
    "decoding": {"max_batch_size": 512},
}
"""Training-bound: the learner has memory for eight prompts at a time.

`experiments/knob-epochs.yaml` and `knob-samples.yaml` hold the same.
"""

EPOCH_ARMS: Final = (1, 2, 3)
SAMPLE_ARMS: Final = (2, 4)
ROUNDS: Final = 96
_POINTS: Final = 12  # evaluations of a run


def turn(
    content: Mapping[str, Any], epochs: int, samples: int, rounds: int, seed: int
) -> dict[str, Any]:
    """Job: train with one position of the knobs, on one thread.

    Args:
        content: see :meth:`~asyncrlhf.experiments.setting.Setting.from_mapping`.
        epochs: T.
        samples: K.
        rounds: of generation.
        seed: of everything but the clock.

    Returns:
        The arguments but ``content``; ``seconds`` per round of g, r, t and w; ``curve``, with a row
        per evaluation and in it ``clock``, the predicted seconds of the asynchronous run up to it.
    """
    every = max(1, rounds // _POINTS)
    setting = Setting.from_mapping(
        {
            **content,
            "training": {
                **content["training"],
                "epochs_per_round": epochs,
                "num_generations": samples,
                "max_steps": rounds * epochs,
            },
            "evaluation": {**content["evaluation"], "every": every * epochs},
        }
    )
    with machine.shared(), one_thread():
        done = train(setting, seed, inline(setting))
    seconds = done.seconds()
    ends = (0.0, *simulate(**seconds, rounds=rounds, ahead=1, epochs=epochs).round_ends)
    return {
        "epochs": epochs,
        "samples": samples,
        "rounds": rounds,
        "seed": seed,
        "seconds": seconds,
        "curve": [
            {**kept(row), "clock": round(ends[int(row["step"]) // epochs], 6)} for row in done.curve
        ],
    }
