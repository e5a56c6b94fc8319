"""Which runs a sweep has, with which seeds, and which of them stand for each value."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from hpreliability.errors import SweepConfigError
from hpreliability.sweep.spec import SweepSpec, canonical
from hpreliability.table import label

Others = Literal["mean", "base"]


@dataclass(frozen=True, eq=False)
class Trial:
    """One run of a sweep.

    Attributes:
        config: handed to `train`.
        contexts: label by context column, without the budget.
        budget: for how long.
        seed_index: which of the repetitions; the table's `seed`.
        seed: what `train` gets, in [0, 2**32).
        label: for people.
    """

    config: Mapping[str, Any]
    contexts: Mapping[str, str]
    budget: int
    seed_index: int
    seed: int
    label: str


def configurations(spec: SweepSpec) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every configuration once, with a label for people."""
    if spec.design == "grid":
        for combination in itertools.product(*spec.hyperparameters.values()):
            changes = dict(zip(spec.hyperparameters, combination, strict=True))
            yield spell(changes), {**spec.base, **changes}
        return
    yield "base", dict(spec.base)
    for name, values in spec.hyperparameters.items():
        for value in values:
            if canonical(value) != canonical(spec.base[name]):
                yield spell({name: value}), {**spec.base, name: value}


def slices_of(spec: SweepSpec, others: Others) -> Iterator[tuple[str, str, frozenset[str]]]:
    """Which configurations stand for each value: (hyper-parameter, value's label, configurations).

    Configurations are given as canonical text.
    """
    if others not in get_args(Others):
        raise ValueError(f"others must be one of {get_args(Others)}, got {others!r}")
    configs = [config for _, config in configurations(spec)]
    fixed = tuple(spec.hyperparameters) if others == "base" or spec.design != "grid" else ()
    for name, values in spec.hyperparameters.items():
        for value in values:
            want = {other: spec.base[other] for other in fixed if other in spec.base}
            want[name] = value
            chosen = frozenset(
                canonical(config)
                for config in configs
                if all(canonical(config[key]) == canonical(v) for key, v in want.items())
            )
            if not chosen or any(other not in want for other in fixed):
                raise SweepConfigError(
                    'others: "base" needs the base value of every hyper-parameter to be in the '
                    f"grid; there is no run of {spell(want)}"
                )
            yield name, label(value), chosen


def trials_of(spec: SweepSpec) -> Iterator[Trial]:
    """Every run of a sweep once, in an order that does not change; needs decapod."""
    from decapod.seeding import Seeds

    seeds = Seeds(spec.root_seed)
    columns = list(spec.contexts)
    budgets = (max(spec.all_budgets),) if spec.checkpoints else spec.all_budgets
    for name, config in configurations(spec):
        for labels in itertools.product(*spec.contexts.values()):
            for budget in budgets:
                contexts = dict(zip(columns, labels, strict=True))
                shared = "" if spec.common_random_numbers else canonical(config)
                stream = seeds.child("sweep", shared, canonical(contexts), budget)
                for index in spec.seed_indices:
                    where = spell({**contexts, "budget": budget, "seed": index})
                    yield Trial(
                        config, contexts, budget, index, stream.integer(index), f"{name} {where}"
                    )


def arguments_of(spec: SweepSpec, trial: Trial) -> dict[str, Any]:
    """What identifies a run, and what its job is called with."""
    return {
        "config": trial.config,
        "contexts": trial.contexts,
        "budget": trial.budget,
        "seed": trial.seed,
        "version": spec.version,
    }


def spell(entries: Mapping[str, Any]) -> str:
    """Entries as people read them: `learning_rate=0.001 env=CartPole-v1`."""
    return " ".join(f"{name}={label(value)}" for name, value in entries.items())
