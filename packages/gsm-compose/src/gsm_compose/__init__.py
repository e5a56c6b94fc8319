"""Compositional GSM: chains of grade-school problems with exact labels, and the reasoning gap.

The benchmark of arXiv 2410.01748 built again from GSM8K by rules, without a language model, with
the evaluation and the statistics that go with it. Names are loaded when they are first used, so
importing the package costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gsm_compose._version import __version__

if TYPE_CHECKING:
    from gsm_compose import (
        integrations,
        parse,
        plot,
        prompts,
        rewards,
        sandbox,
        simulate,
        stats,
        verify,
    )
    from gsm_compose.benchmark import CANARY, Benchmark
    from gsm_compose.building import build_benchmark, compose
    from gsm_compose.engine.doubtful import doubtful_rows
    from gsm_compose.engine.problems import Problem, load_gsm8k
    from gsm_compose.engine.program import Program
    from gsm_compose.engine.rules import DEFAULT_RULES, Rule
    from gsm_compose.engine.slots import Slot, candidates, explain, find_slots
    from gsm_compose.engine.value_rules import VALUE_RULES, reject_values
    from gsm_compose.engine.yields import count_yields
    from gsm_compose.errors import GSMComposeError
    from gsm_compose.evaluation import evaluate
    from gsm_compose.exemplars import exemplar_problems
    from gsm_compose.gap import GapReport, gap_report
    from gsm_compose.items import Hop, Item, Link
    from gsm_compose.outcomes import Outcomes
    from gsm_compose.prompts import PromptSpec, render, stop_sequences
    from gsm_compose.results import Response, Results, best_of

_HOMES = {
    "benchmark": ("CANARY", "Benchmark"),
    "building": ("build_benchmark", "compose"),
    "engine.doubtful": ("doubtful_rows",),
    "engine.problems": ("Problem", "load_gsm8k"),
    "engine.program": ("Program",),
    "engine.rules": ("DEFAULT_RULES", "Rule"),
    "engine.slots": ("Slot", "candidates", "explain", "find_slots"),
    "engine.value_rules": ("VALUE_RULES", "reject_values"),
    "engine.yields": ("count_yields",),
    "errors": ("GSMComposeError",),
    "evaluation": ("evaluate",),
    "exemplars": ("exemplar_problems",),
    "gap": ("GapReport", "gap_report"),
    "items": ("Hop", "Item", "Link"),
    "outcomes": ("Outcomes",),
    "prompts": ("PromptSpec", "render", "stop_sequences"),
    "results": ("Response", "Results", "best_of"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}
_MODULES = (
    "integrations",
    "parse",
    "plot",
    "prompts",
    "rewards",
    "sandbox",
    "simulate",
    "stats",
    "verify",
)

__all__ = [
    "CANARY",
    "DEFAULT_RULES",
    "VALUE_RULES",
    "Benchmark",
    "GSMComposeError",
    "GapReport",
    "Hop",
    "Item",
    "Link",
    "Outcomes",
    "Problem",
    "Program",
    "PromptSpec",
    "Response",
    "Results",
    "Rule",
    "Slot",
    "__version__",
    "best_of",
    "build_benchmark",
    "candidates",
    "compose",
    "count_yields",
    "doubtful_rows",
    "evaluate",
    "exemplar_problems",
    "explain",
    "find_slots",
    "gap_report",
    "integrations",
    "load_gsm8k",
    "parse",
    "plot",
    "prompts",
    "reject_values",
    "render",
    "rewards",
    "sandbox",
    "simulate",
    "stats",
    "stop_sequences",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"gsm_compose.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'gsm_compose' has no attribute {name!r}")
    found = getattr(import_module(f"gsm_compose.{_HOME[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return __all__
