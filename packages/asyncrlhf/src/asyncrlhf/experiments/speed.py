"""R2: how long a round takes with real processes, each on a core of its own, against the model.

Three arms: synchronous with actor and learner in turn on *one* core, synchronous on a core each,
and asynchronous on a core each. The first two tell what a second core alone brings, which is
nothing, so that the third shows what asynchrony brings (section 2.2 of the specification of
arXiv 2410.18252: g + r + t + w against max(g, r + t + w)).

The learning problem is the same in all of them. What is tuned before the runs are two sizes that
change only how long things take: how many rows the actor decodes at once, and how many prompts the
learner takes through one backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from statistics import median
from typing import TYPE_CHECKING, Any, Final

from asyncrlhf.experiments import machine
from asyncrlhf.experiments.robustness import kept
from asyncrlhf.experiments.setting import PILOT, STAGES, Setting, Trained, inline, one_thread, train
from asyncrlhf.schedule import predicted_round_time, simulate

if TYPE_CHECKING:
    from asyncrlhf.engines import HFEngine

SPEED: Final[dict[str, Any]] = {
    **PILOT,
    "task": {**PILOT["task"], "length": 10},
    "evaluation": {"prompts": 512, "every": 0},
}
"""The setting; `experiments/speed.yaml` holds the same. Answers are twice as long as in R1."""

BALANCES: Final = {"balanced": 1.0, "generation-bound": 3.0, "training-bound": 1 / 3}
"""Names of the targets of g / (r + t + w)."""

ARMS: Final = ("sync, one core", "sync", "async")
_ROWS: Final = (64, 40, 32, 22, 16, 11, 8, 6)  # that the actor decodes at once
_PROMPTS: Final = (32, 16, 8, 4)  # in one backward pass
_PILOT_ROUNDS: Final = 6
_WARM: Final = 2  # rounds that are left out of every median: memory and caches are still filling


def race(content: Mapping[str, Any], balance: str, seed: int, rounds: int) -> dict[str, Any]:
    """Job: tune one balance, then time the three arms one after the other, alone on the machine.

    Args:
        content: see :meth:`~asyncrlhf.experiments.setting.Setting.from_mapping`.
        balance: a name in :data:`BALANCES`.
        seed: of everything but the clock.
        rounds: of every arm.

    Returns:
        ``balance``, ``seed``, ``rounds``, the tuned ``sizes``, and by arm in ``arms``:

        - ``ahead``: rounds that generation runs ahead;
        - ``seconds`` per round of g, r, t and w, and of a whole ``round``;
        - ``predicted``: seconds of a round that the model gives for the stages of ``sync``;
          ``foreseen``: for the stages of the arm itself;
        - ``makespan`` with its ``makespan_predicted``; ``actor_idle`` and ``learner_idle``;
        - ``last`` row of the curve; ``weights``, their SHA-256.

        The arm ``replay`` is the asynchronous one again in a single process; its clock means
        nothing.

    Raises:
        InvalidInputError: there are not two cores.
    """
    setting = Setting.from_mapping(
        {**content, "training": {**content["training"], "max_steps": rounds}}
    )
    first, second = machine.two_cores()
    with machine.shared(), one_thread():
        setting.start(seed)  # trained here, where others may run, and kept
    with machine.alone(), one_thread():
        tuned = _tuned(setting, seed, BALANCES[balance], core=first)
        done = {
            "sync": train(tuned, seed, _process(tuned, second), learner_cores=[first]),
            "async": train(
                tuned, seed, _process(tuned, second), learner_cores=[first], rounds_ahead=1
            ),
            "sync, one core": train(tuned, seed, _process(tuned, first), learner_cores=[first]),
        }
    with machine.shared(), one_thread():
        done["replay"] = train(tuned, seed, inline(tuned), rounds_ahead=1)
    steady = _seconds(done["sync"])
    return {
        "balance": balance,
        "seed": seed,
        "sizes": {
            "rows": tuned.decoding["max_batch_size"],
            "prompts": tuned.training["per_device_train_batch_size"],
        },
        "rounds": rounds,
        "arms": {
            name: _described(run, steady, ahead=int(name in ("async", "replay")))
            for name, run in done.items()
        },
    }


def _process(setting: Setting, core: int) -> HFEngine:
    from asyncrlhf.engines import HFEngine

    return HFEngine(placement="process", cores=[core], threads=1, **setting.decoding)


def _described(run: Trained, steady: Mapping[str, Any], *, ahead: int) -> dict[str, Any]:
    own = _seconds(run)
    ends = [times.ended for times in run.times]
    start = min(times.started for times in run.times)
    predicted = simulate(**own, rounds=len(run.times), ahead=ahead)
    work = {
        "actor": sum(times.generate for times in run.times),
        "learner": sum(times.score + times.train + times.publish for times in run.times),
    }
    makespan = ends[-1] - start
    # Every round but the last publishes; a pair of rounds evens out who was early in which.
    period = ahead + 1
    gaps = [(b - a) / period for a, b in zip(ends[_WARM:], ends[_WARM + period :], strict=False)]
    return {
        "ahead": ahead,
        "seconds": {**own, "round": median(gaps)},
        "predicted": predicted_round_time(**steady, ahead=ahead),
        "foreseen": predicted_round_time(**own, ahead=ahead),
        "makespan": makespan,
        "makespan_predicted": predicted.makespan,
        "actor_idle": max(0.0, 1 - work["actor"] / makespan),
        "learner_idle": max(0.0, 1 - work["learner"] / makespan),
        "last": kept(run.curve[-1]),
        "weights": run.weights,
    }


def _seconds(run: Trained) -> dict[str, Any]:
    """Median g, r, t and w without the first rounds and the last, which publishes nothing."""
    rounds = run.times[_WARM:-1]
    return {name: median(getattr(times, of) for times in rounds) for name, of in STAGES.items()}


def _tuned(setting: Setting, seed: int, target: float, core: int) -> Setting:
    """The setting with the sizes whose g / (r + t + w) comes nearest to the target.

    Generation is timed for every number of rows, training for every number of prompts, each in a
    short run on one core; the two do not depend on one another, so all pairs are known then.
    """
    whole = setting.training["per_device_train_batch_size"]

    def sized(rows: int, prompts: int) -> Setting:
        sizes = {
            "per_device_train_batch_size": prompts,
            "gradient_accumulation_steps": whole // prompts,
        }
        return replace(
            setting,
            training={**setting.training, **sizes},
            decoding={"max_batch_size": rows},
        )

    def seconds(rows: int, prompts: int) -> dict[str, float]:
        tried = sized(rows, prompts)
        short = replace(
            tried,
            training={**tried.training, "max_steps": _PILOT_ROUNDS},
            evaluation={"prompts": 8, "every": 0},
        )
        return _seconds(train(short, seed, inline(short), learner_cores=[core]))

    generating = {rows: seconds(rows, whole)["g"] for rows in _ROWS}
    learning = {}
    for prompts in _PROMPTS:
        if whole % prompts == 0:
            found = seconds(_ROWS[0], prompts)
            learning[prompts] = found["r"] + found["t"] + found["w"]
    rows, prompts = min(
        ((rows, prompts) for rows in generating for prompts in learning),
        key=lambda pair: abs(math.log(generating[pair[0]] / learning[pair[1]] / target)),
    )
    return sized(rows, prompts)
