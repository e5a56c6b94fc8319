from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("decapod.claims")
pytest.importorskip("matplotlib")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from asyncrlhf import reproduce
from asyncrlhf.engines import HFEngine
from asyncrlhf.errors import InvalidInputError
from asyncrlhf.experiments import machine, speed
from asyncrlhf.experiments.findings import NAMES, by_cell, gold_at_same_time, gold_where_both_were
from asyncrlhf.experiments.knobs import EPOCHS, SAMPLES
from asyncrlhf.experiments.overoptimization import PROXY
from asyncrlhf.experiments.robustness import (
    GENTLE,
    LARGE,
    MINIBATCHES,
    RATES,
    ROBUSTNESS,
    cell,
)
from asyncrlhf.experiments.setting import Setting, inline, train
from asyncrlhf.experiments.speed import BALANCES, SPEED
from asyncrlhf.reproduce import CLAIMS, REPRODUCTION, conclude, evidence, jobs
from decapod.claims import Findings, Profile, Verdict
from decapod.jobs import JobResult

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
PROFILES: tuple[Profile, ...] = ("quick", "standard", "full")

Lost = Callable[[str, float, int, int], float]  # loss, rate, N and seed to gold lost


def _lost(loss: str, rate: float, n: int, seed: int) -> float:
    """As the specification's pilot has it: the order of the losses turns round with the rate."""
    if n <= 2:
        return 0.001 * seed
    scale = {"online_dpo": 0.03} if rate == GENTLE else {"online_dpo": 0.5}
    return scale.get(loss, 0.15) * n / 64 + 0.002 * seed * (n > 2)


def _row(step: int, gold: float, kl: float, **more: float) -> dict[str, float]:
    row = {"gold": gold, "gold_se": 0.01, "kl": kl, "kl_k3": kl, "ppl": 3.0, "length": 6.0}
    return {"step": step, **row, "eos_rate": 1.0, **more}


def _cell(a: dict[str, Any], lost: Lost) -> dict[str, Any]:
    seed, n, steps = a["seed"], a["minibatches"], a["content"]["training"]["max_steps"]
    gold = 0.9 - 0.01 * seed - lost(a["loss"], a["rate"], n, seed)
    # Gold is a function of the divergence at the gentle rate: a frontier that all N share.
    kl = (gold - 0.5) * 5 if a["rate"] == GENTLE else 2.0 + n / 16
    names = ("loss", "minibatches", "rate", "seed")
    return {
        **{name: a[name] for name in names},
        "curve": [_row(0, 0.5, 0.0), _row(steps, gold, kl)],
        "staleness": (n - 1) / 2,
        "seconds": {"g": 0.01, "r": 0.001, "t": 0.02, "w": 0.001},
    }


def _race(a: dict[str, Any], slower: float, gold: float, equal: bool) -> dict[str, Any]:
    g = 0.02 * BALANCES[a["balance"]]
    seconds = {"g": g, "r": 0.001, "t": 0.018, "w": 0.001}
    arms = {}
    for arm in ("sync, one core", "sync", "async", "replay"):
        ahead = arm in ("async", "replay")
        took = max(g, 0.02) if ahead else g + 0.02
        arms[arm] = {
            "seconds": {**seconds, "round": took * (slower if ahead else 1) + 1e-5 * a["seed"]},
            "predicted": took,
            "foreseen": took,
            "ahead": int(ahead),
            "makespan": took * a["rounds"],
            "makespan_predicted": took * a["rounds"],
            "actor_idle": 0.1,
            "learner_idle": 0.2,
            "last": _row(a["rounds"], 0.9 - ahead * gold * (1 + 0.01 * a["seed"]), 2.0),
            "weights": "a" if equal else arm,
        }
    sizes = {"rows": 64, "prompts": 32}
    return {**{k: a[k] for k in ("balance", "seed", "rounds")}, "sizes": sizes, "arms": arms}


def _turn(a: dict[str, Any], gain: float) -> dict[str, Any]:
    more = gain * (a["epochs"] + a["samples"] - 3) + 0.001 * a["seed"]
    names = ("epochs", "samples", "rounds", "seed")
    slower = a["rounds"] * (1 + 0.5 * (a["samples"] == 4))
    return {
        **{name: a[name] for name in names},
        "seconds": {"g": 0.05, "r": 0.001, "t": 0.02, "w": 0.001},
        "curve": [
            _row(0, 0.5, 0.0, clock=0.0),
            _row(a["rounds"] * a["epochs"], 0.7 + 1.5 * more, 1 + 10 * more, clock=slower),
        ],
    }


def _proxy(a: dict[str, Any]) -> dict[str, Any]:
    rows = [_row(0, 0.5, 0.0, proxy=0.0), _row(12, 0.6, 1.0, proxy=1.0)]
    rows.append(_row(24, 0.2, 6.0, proxy=2.0))
    return {"loss": a["loss"], "seed": a["seed"], "accuracy": 0.8, "curve": rows}


def _results(
    profile: Profile,
    lost: Lost = _lost,
    slower: float = 1.05,
    gold: float = 0.001,
    gain: float = 0.1,
    equal: bool = True,
) -> list[JobResult]:
    """Results as the jobs of a profile would give them, with numbers of our choice."""

    def value(function: str, a: dict[str, Any]) -> Any:
        match function:
            case "cell":
                return _cell(a, lost)
            case "race":
                return _race(a, slower, gold, equal)
            case "turn":
                return _turn(a, gain)
        return _proxy(a)

    return [
        JobResult(
            job.key, job.label, job.arguments, "done",
            value(job.function.__name__, dict(job.arguments)),
        )
        for job in jobs(profile)
    ]  # fmt: skip


def _verdicts(results: list[JobResult], profile: Profile = "standard") -> dict[str, Verdict]:
    found = evidence(profile, results)
    assert set(found) == {claim.id for claim in CLAIMS}
    assert all(set(found[claim.id].arms) <= set(claim.arms) for claim in CLAIMS)
    return {claim.id: claim.rule.decide(found[claim.id]) for claim in CLAIMS}


def test_the_entry_point_leads_to_the_reproduction() -> None:
    (entry,) = [e for e in entry_points(group="decapod.reproductions") if e.name == "asyncrlhf"]
    assert entry.load() is REPRODUCTION


def test_the_claims_are_there_without_loading_torch() -> None:
    code = (
        "import sys, asyncrlhf.reproduce; "
        "print(sorted({'torch', 'transformers', 'matplotlib'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_results_as_the_pilot_had_them_show_every_claim_but_at_the_large_rate() -> None:
    verdicts = _verdicts(_results("standard"))
    large = {"dpo-loses-less-large-rate", "same-frontier-large-rate"}
    assert {name for name, verdict in verdicts.items() if verdict == "reversed"} == large
    assert {v for name, v in verdicts.items() if name not in large} == {"shown"}


def test_opposite_results_are_never_shown() -> None:
    verdicts = _verdicts(
        _results(
            "standard",
            lost=lambda loss, rate, n, seed: (
                (0.3 if (loss == "online_dpo") == (rate == GENTLE) else 0.1) * (n > 1)
                + 0.001 * seed * (n > 1)
            ),
            slower=1.9,
            gold=0.2,
            gain=-0.1,
            equal=False,
        )
    )
    assert verdicts.pop("dpo-loses-less-large-rate") == "shown"
    assert verdicts.pop("same-frontier") == "shown"  # gold was made from the divergence
    assert verdicts.pop("replay-exact") == "not shown"  # a count is never reversed
    assert set(verdicts.values()) == {"reversed"}


def test_one_loss_that_loses_less_is_enough_to_lose_the_claim_about_all() -> None:
    def lost(loss: str, rate: float, n: int, seed: int) -> float:
        return 0.0 if loss == "copg" else _lost(loss, rate, n, seed)

    verdicts = _verdicts(_results("standard", lost=lost))
    assert verdicts["dpo-loses-less"] == "shown"
    assert verdicts["dpo-loses-least"] == "reversed"


def test_seeds_that_disagree_decide_nothing() -> None:
    verdicts = _verdicts(
        _results("standard", lost=lambda _, __, n, seed: 0.3 * (-1) ** (seed + n // 2) * (n > 1))
    )
    for claim in ("dpo-loses-less", "dpo-loses-less-large-rate", "two-is-one"):
        assert verdicts[claim] == "not shown"


def test_one_slow_seed_is_enough_to_lose_the_prediction() -> None:
    results = _results("standard")
    assert _verdicts(results)["prediction-holds"] == "shown"
    race: Any = next(r.value for r in results if r.label == "speed, training-bound, seed 1")
    race["arms"]["async"]["seconds"]["round"] *= 1.2
    assert _verdicts(results)["prediction-holds"] == "not shown"


def test_the_quick_profile_leaves_open_what_it_did_not_run() -> None:
    verdicts = _verdicts(_results("quick"), "quick")
    for claim in (
        "dpo-loses-less-than-ppo",
        "two-is-one",
        "gain-shrinks",
        "async-faster",
        "epochs-gold",
        "samples-gold",
    ):
        assert verdicts[claim] == "not shown"
    assert verdicts["replay-exact"] == "shown"


def test_figures_and_tables_show_every_arm_and_their_words_its_numbers() -> None:
    found = conclude("standard", _results("standard"))
    gold, frontier, rounds, knobs, proxy = found.figures
    assert all(figure.svg.startswith("<svg") for figure in found.figures)
    for loss in reproduce.LOSSES:
        assert f"{NAMES[loss]} at {LARGE:g}: " in gold.alt
        assert NAMES[loss] in gold.svg
    assert "online DPO at 0.001: 0.884 with N = 1, 0.884 with N = 2, 0.851 with N = 4" in gold.alt
    for n in MINIBATCHES:
        assert f"N = {n}" in frontier.svg
    assert "balanced, async: 21 ms measured, 20 predicted" in rounds.alt
    assert "generation-bound, T = 3: gold 1.002 and divergence 3.01 after 96.0 s" in knobs.alt
    assert "gold rises from 0.50 to 0.60 and ends at 0.20, proxy from 0.00 to 2.00" in proxy.alt
    lost, cells, times, turned = found.tables
    assert [row[0] for row in lost.rows] == [NAMES[loss] for loss in reproduce.LOSSES]
    assert len(cells.rows) == len(RATES) * len(reproduce.LOSSES) * len(MINIBATCHES)
    assert len(times.rows) == len(BALANCES) * 3
    assert len(turned.rows) == 5


@pytest.mark.parametrize("profile", PROFILES)
def test_jobs_differ_and_are_runs_that_can_be_made(profile: Profile) -> None:
    planned = jobs(profile)
    assert len({job.key for job in planned}) == len(planned)
    for a in (job.arguments for job in planned):
        setting = Setting.from_mapping(a["content"])
        assert a["seed"] < 100  # the seeds from 100 on are for setting up
        if "minibatches" in a:
            assert setting.training["max_steps"] % a["minibatches"] == 0
    if profile != "quick":
        cells = [a for a in (job.arguments for job in planned) if "minibatches" in a]
        arms = {(a["loss"], a["rate"], a["minibatches"]) for a in cells}
        assert len(arms) >= 5 * 2 * 5
        assert len(cells) >= 3 * len(arms)


def test_all_losses_have_the_same_setting_and_the_same_rates() -> None:
    cells = [job.arguments for job in jobs("standard") if "minibatches" in job.arguments]
    assert {json.dumps(a["content"]) for a in cells} == {json.dumps(ROBUSTNESS)}
    for loss in reproduce.LOSSES:
        assert {a["rate"] for a in cells if a["loss"] == loss} == set(RATES)


def test_cells_with_other_seeds_are_refused() -> None:
    cells = [r.value for r in _results("quick") if "minibatches" in r.arguments]
    changed: list[Any] = [*cells[:-1], {**cells[-1], "seed": 7}]  # type: ignore[dict-item]
    for bad in (changed, [*cells, cells[0]]):
        with pytest.raises(InvalidInputError, match="seeds"):
            by_cell(bad)


def test_curves_are_compared_where_both_have_been() -> None:
    fresh = [_row(0, 0.5, 0.0, clock=0.0), _row(9, 0.9, 4.0, clock=10.0)]
    stale = [_row(0, 0.5, 0.0, clock=0.0), _row(9, 0.6, 2.0, clock=20.0)]
    assert gold_where_both_were(fresh, stale) == pytest.approx((0.7, 0.6, 2.0))
    assert gold_at_same_time(fresh, stale) == pytest.approx((0.9, 0.55))


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("robustness", ROBUSTNESS),
        ("speed", SPEED),
        ("knob-epochs", EPOCHS),
        ("knob-samples", SAMPLES),
        ("proxy", PROXY),
    ],
)
def test_the_files_hold_what_the_reproduction_runs(name: str, content: dict[str, Any]) -> None:
    yaml = pytest.importorskip("yaml")
    assert yaml.safe_load((EXPERIMENTS / f"{name}.yaml").read_text("utf-8")) == content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": {}}, "tasks"),
        ({"task": {"symbol": 3}}, "symbol"),
        ({"model": {"depth": 3}}, "depth"),
        ({"evaluation": {"prompt": 3}}, "prompt"),
        ({"training": {"learning_rate": 1e-3}}, "max_steps"),
    ],
)
def test_a_setting_that_is_misspelt_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        Setting.from_mapping({**ROBUSTNESS, **change})
    with pytest.raises(InvalidInputError, match="also model"):
        Setting.from_mapping({"task": {}, "training": {}, "fine_tuning": {}, "evaluation": {}})


# --- real runs, as small as can be ----------------------------------------------------------------


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "asyncrlhf"


def _small(content: dict[str, Any], steps: int) -> dict[str, Any]:
    return {
        **content,
        "task": {**content["task"], "length": 5},
        "model": {"width": 16, "layers": 1, "heads": 2},
        "fine_tuning": {"steps": 2, "batch_size": 8, "learning_rate": 1e-3},
        "training": {**content["training"], "max_steps": steps},
        "evaluation": {**content["evaluation"], "prompts": 8},
    }


@pytest.fixture
def quickest(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The quick profile, cut down until it takes seconds; stale is N = 2."""
    scale = replace(
        reproduce._SCALES["quick"],
        minibatches=(1, 2), updates=2, seeds=1, races={"balanced": 6}, rounds=2, proxy_updates=2,
    )  # fmt: skip
    monkeypatch.setitem(reproduce._SCALES, "quick", scale)
    for module in ("findings", "tables", "exhibits"):
        monkeypatch.setattr(f"asyncrlhf.experiments.{module}.STALE", 2)
    monkeypatch.setattr(reproduce, "PAIRS", 16)
    for name in ("ROBUSTNESS", "SPEED", "EPOCHS", "SAMPLES", "PROXY"):
        monkeypatch.setattr(reproduce, name, _small(getattr(reproduce, name), 2))
    monkeypatch.setattr(speed, "_ROWS", (64, 8))
    monkeypatch.setattr(speed, "_PROMPTS", (32, 8))
    assert own_cache


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
@pytest.mark.parametrize("placement", ["thread", pytest.param("process", marks=pytest.mark.slow)])
def test_the_quick_profile_runs_from_end_to_end(
    quickest: None, own_cache: Path, placement: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every job is real, but that starting processes is left to the slow variant."""
    if placement == "thread":
        monkeypatch.setattr(
            speed, "_process", lambda setting, _: HFEngine(placement="thread", **setting.decoding)
        )
    results = []
    for job in jobs("quick"):
        value = json.loads(json.dumps(job.function(**job.arguments)))
        results.append(JobResult(job.key, job.label, job.arguments, "done", value))
    found = conclude("quick", results)
    assert isinstance(found, Findings)
    assert found.evidence["dpo-loses-less"].n == 1
    assert found.evidence["replay-exact"].effect == 1
    assert len(list((own_cache / "models").iterdir())) == 1  # one fine-tuned model for all
    race: Any = next(r.value for r in results if "balance" in r.arguments)
    assert race["sizes"]["rows"] in (64, 8)
    for arm in race["arms"].values():
        seconds = arm["seconds"]
        assert all(seconds[name] >= 0 for name in ("g", "r", "t", "w"))
        assert seconds["round"] > 0
        # Whatever the machine did, the model is the sum or the maximum of the stages.
        work = seconds["r"] + seconds["t"] + seconds["w"]
        both = max if arm["ahead"] else sum
        assert arm["foreseen"] == pytest.approx(both((seconds["g"], work)))


def test_a_run_is_a_function_of_its_setting_and_seed(own_cache: Path) -> None:
    setting = Setting.from_mapping(_small(ROBUSTNESS, 4))
    once, again = (train(setting, 3, inline(setting)) for _ in range(2))
    assert once.weights == again.weights
    assert once.curve == again.curve
    assert [row["step"] for row in once.curve] == [0, 4]
    assert once.curve[0]["kl"] == 0
    other = train(setting, 4, inline(setting))
    assert other.weights != once.weights
    assert (own_cache / "models").is_dir()


def test_staleness_of_a_cell_is_that_of_its_rounds(own_cache: Path) -> None:
    found = cell(_small(ROBUSTNESS, 4), "rloo", 4, 1e-3, 0)
    assert found["staleness"] == 1.5  # 0, 1, 2, 3
    assert len(found["curve"]) == 2
    assert own_cache


def test_who_wants_the_machine_alone_waits_for_all_and_is_not_overtaken(own_cache: Path) -> None:
    events: list[str] = []

    def enter(name: str, held: Callable[[], AbstractContextManager[None]]) -> threading.Thread:
        def body() -> None:
            with held():
                events.append(f"{name} in")
                events.append(f"{name} out")

        thread = threading.Thread(target=body)
        thread.start()
        return thread

    with machine.shared(), machine.shared():
        timed = enter("timed", machine.alone)
        _until_held(own_cache / "gate.lock")
        newcomer = enter("newcomer", machine.shared)
        assert events == []
    for thread in (timed, newcomer):
        thread.join(30)
    assert events == ["timed in", "timed out", "newcomer in", "newcomer out"]


def _until_held(path: Path) -> None:
    with path.open("w") as file:
        for _ in range(3000):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
            fcntl.flock(file, fcntl.LOCK_UN)
            time.sleep(0.01)
    raise AssertionError("nobody waits")


def test_a_machine_with_one_core_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
    with pytest.raises(InvalidInputError, match="expected two"):
        machine.two_cores()
