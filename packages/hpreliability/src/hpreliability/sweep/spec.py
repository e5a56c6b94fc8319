"""What a sweep is to run, checked before anything runs."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from hpreliability.errors import MissingExtraError, SweepConfigError
from hpreliability.table import label

Design = Literal["one-at-a-time", "grid"]

_CANONICAL = ("hyperparameter", "value", "seed", "score", "step")
_KEYWORDS = ("config", "budget")


@dataclass(frozen=True)
class SweepSpec:
    """What to run.

    Attributes:
        name: letters, digits, `-`, `_`, `.`; titles the sweep and names its default folder.
        base: the full configuration around which values vary, handed to `train`. JSON values.
        hyperparameters: values to try, by key of `base`.
        contexts: labels by column; `train` gets one label of each, under the column's name. All
            combinations are run.
        budgets: how long to train, in whatever unit `train` takes. Several budgets become a context
            column `budget`.
        seeds: number of runs per cell, or their indices.
        checkpoints: one run of the largest budget serves all budgets. `train` must then give a
            curve with a point at each budget, and nothing in it may depend on the run's length.
            Otherwise each budget has runs of its own.
        design: `"one-at-a-time"` changes one hyper-parameter of `base` and leaves the others, as
            the paper does; `base` itself is run once and counts for all hyper-parameters.
            `"grid"` runs all combinations.
        common_random_numbers: give runs with equal context, budget and seed index the same seed
            for all configurations. Differences between values get less noisy, but the values'
            scores are then not independent.
        root_seed: from which all seeds of runs are derived.
        metric: which entry of a mapping that `train` returns is the score.
        version: raise it when `train` changes, so that old results are not taken for new ones.

    Raises:
        SweepConfigError: a field is wrong; the message begins with its name.
    """

    name: str
    base: Mapping[str, Any]
    hyperparameters: Mapping[str, Sequence[Any]]
    contexts: Mapping[str, Sequence[str]]
    budgets: int | Sequence[int]
    seeds: int | Sequence[int] = 3
    checkpoints: bool = False
    design: Design = "one-at-a-time"
    common_random_numbers: bool = False
    root_seed: int = 0
    metric: str = "score"
    version: str = ""

    def __post_init__(self) -> None:
        named = isinstance(self.name, str)
        if not named or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise SweepConfigError(
                f"name: expected letters, digits, '.', '_' and '-', got {self.name!r}; it names a "
                "folder"
            )
        for key in ("checkpoints", "common_random_numbers"):
            if not isinstance(getattr(self, key), bool):
                raise SweepConfigError(f"{key}: expected true or false, got {getattr(self, key)!r}")
        for key in ("metric", "version"):
            if not isinstance(getattr(self, key), str):
                raise SweepConfigError(f"{key}: expected text, got {getattr(self, key)!r}")
        if self.design not in get_args(Design):
            raise SweepConfigError(
                f"design: expected one of {get_args(Design)}, got {self.design!r}"
            )
        _set(self, "root_seed", _whole(self.root_seed, "root_seed", least=0))
        _set(self, "seeds", _indices(self.seeds))
        _set(self, "budgets", _budgets(self.budgets))
        _set(self, "contexts", _contexts(self.contexts))
        _set(self, "base", _plain(_mapping(self.base, "base"), "base"))
        _set(self, "hyperparameters", _grid(self.hyperparameters, self.base, self.design))

    @property
    def seed_indices(self) -> tuple[int, ...]:
        """Which repetitions there are of each cell."""
        return _indices(self.seeds)

    @property
    def all_budgets(self) -> tuple[int, ...]:
        """The budgets, ascending."""
        return _budgets(self.budgets)


def load_yaml(path: Path) -> Any:
    """The content of a YAML file.

    Raises:
        SweepConfigError: not YAML, or a key given twice.
        MissingExtraError: pyyaml is not installed.
        FileNotFoundError: no such file.
    """
    if importlib.util.find_spec("yaml") is None:
        raise MissingExtraError("pyyaml", "experiments")
    import yaml

    class Loader(yaml.SafeLoader):
        """Safe YAML that reads 1e-3 as a number and refuses a key given twice."""

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
            for key in keys:
                if keys.count(key) > 1:
                    raise SweepConfigError(f"{key}: given twice")
            return super().construct_mapping(node, deep=deep)

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+"), list("-+0123456789")
    )
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SweepConfigError(f"not YAML: {error}") from error


def spec_from(described: Any) -> SweepSpec:
    """The specification that a mapping describes.

    Raises:
        SweepConfigError: a key is unknown, missing or wrong.
    """
    known = [f.name for f in fields(SweepSpec)]
    if not isinstance(described, Mapping):
        raise SweepConfigError(f"expected the keys {', '.join(known)}, got {described!r}")
    for key in described:
        if key not in known:
            near = get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the keys are: {', '.join(known)}"
            raise SweepConfigError(f"{key}: unknown key; {hint}")
    for f in fields(SweepSpec):
        if f.default is MISSING and f.name not in described:
            raise SweepConfigError(f"{f.name}: missing key")
    return SweepSpec(**described)


def canonical(value: Any) -> str:
    """One text for one JSON value, whatever the order of its keys."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _set(instance: object, name: str, value: object) -> None:
    """Store the checked form of a field of a frozen dataclass, in `__post_init__`."""
    object.__setattr__(instance, name, value)


def _whole(value: Any, key: str, *, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise SweepConfigError(f"{key}: expected a whole number of at least {least}, got {value!r}")
    return int(value)


def _mapping(value: Any, key: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise SweepConfigError(f"{key}: expected a mapping with text keys, got {value!r}")
    return value


def _list(value: Any, key: str) -> list[Any]:
    if isinstance(value, str | Mapping) or not isinstance(value, Iterable):
        raise SweepConfigError(f"{key}: expected a list, got {value!r}")
    entries = list(value)
    if not entries:
        raise SweepConfigError(f"{key}: expected a list of at least one entry, got an empty one")
    labels = [label(entry) for entry in entries]
    twice = [text for text in labels if labels.count(text) > 1]
    if twice:
        raise SweepConfigError(f"{key}: {twice[0]} is given twice")
    return entries


def _indices(seeds: Any) -> tuple[int, ...]:
    if isinstance(seeds, int | np.integer):
        return tuple(range(_whole(seeds, "seeds", least=1)))
    return tuple(_whole(seed, "seeds", least=0) for seed in _list(seeds, "seeds"))


def _budgets(budgets: Any) -> tuple[int, ...]:
    given = [budgets] if isinstance(budgets, int | np.integer) else _list(budgets, "budgets")
    return tuple(sorted(_whole(budget, "budgets", least=1) for budget in given))


def _contexts(contexts: Any) -> dict[str, tuple[str, ...]]:
    checked = {}
    for column, labels in _mapping(contexts, "contexts").items():
        key = f"contexts.{column}"
        if not column.isidentifier() or column in (*_CANONICAL, *_KEYWORDS):
            raise SweepConfigError(
                f"{key}: expected a name that can be a keyword of train, other than "
                f"{', '.join((*_CANONICAL, *_KEYWORDS))}"
            )
        checked[column] = tuple(label(entry) for entry in _list(labels, key))
    if not checked:
        raise SweepConfigError("contexts: expected at least one, for example env: [CartPole-v1]")
    return checked


def _grid(
    hyperparameters: Any, base: Mapping[str, Any], design: Design
) -> dict[str, tuple[Any, ...]]:
    checked: dict[str, tuple[Any, ...]] = {}
    for name, given in _mapping(hyperparameters, "hyperparameters").items():
        key = f"hyperparameters.{name}"
        values = [_plain(value, key) for value in _list(given, key)]
        if len(values) < 2:
            raise SweepConfigError(f"{key}: expected at least two values to compare, got {values}")
        if name in base:
            # 1 and 1.0 would be two configurations: the base's spelling stands for both.
            values = [base[name] if _same(value, base[name]) else value for value in values]
        if design == "one-at-a-time":
            if name not in base:
                near = get_close_matches(name, base, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise SweepConfigError(f"{key}: base has no {name!r}{hint}")
            if base[name] not in values:
                raise SweepConfigError(
                    f"{key}: expected the base's value {base[name]!r} among the values, got "
                    f"{values}; add it"
                )
        checked[name] = tuple(values)
    if not checked:
        raise SweepConfigError("hyperparameters: expected at least one")
    return checked


def _same(one: Any, other: Any) -> bool:
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


def _plain(value: Any, key: str) -> Any:
    """A copy of plain JSON types."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise SweepConfigError(f"{key}: expected a finite number, got {value}")
        return value
    if isinstance(value, Mapping):
        return {k: _plain(v, f"{key}.{k}") for k, v in _mapping(value, key).items()}
    if isinstance(value, list | tuple):
        return [_plain(entry, f"{key}[{i}]") for i, entry in enumerate(value)]
    raise SweepConfigError(
        f"{key}: expected numbers, text, true or false, lists or mappings, got {value!r}"
    )
