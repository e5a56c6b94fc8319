from __future__ import annotations

import importlib.util
import json
import sys
import tomllib
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("decapod.claims")
pytest.importorskip("matplotlib")

from decapod.claims import Findings, Profile, Verdict
from decapod.jobs import JobResult
from sbattn import cli, reproduce
from sbattn.certificates import LOGITS, TOLERANCE, exit_errors, saturated_gradients
from sbattn.errors import InvalidInputError
from sbattn.experiment import Experiment, TextData, run
from sbattn.findings import NAMES, by_arm
from sbattn.reproduce import (
    CLAIMS,
    RATES,
    RECALL,
    REPRODUCTION,
    TEXT,
    TUNING_SEEDS,
    conclude,
    jobs,
)

EXPERIMENTS = Path(__file__).parents[1] / "experiments"

Recalled = Callable[[str, int], float]  # arm and seed to the accuracy at 512
Risen = Callable[[str, int], float]  # arm and seed to the change of the loss beyond 1024


def _results(
    profile: Profile,
    recalled: Recalled = lambda arm, seed: {"stickbreaking": 1.0}.get(arm, 0.8 - 0.02 * seed),
    risen: Risen = lambda arm, seed: 0.001 * seed if arm == "stickbreaking" else 0.4 + 0.1 * seed,
    live: tuple[float, float] = (0.1, 0.2),
    outside: int = 0,
) -> list[JobResult]:
    """Results as the jobs of a profile would give them, with numbers of our choice."""

    def value(function: str, a: dict[str, Any]) -> Any:
        if function == "saturated_gradients":
            return {"exclusive": [1e-7] * 30, "inclusive": [1e-7] * 8 + [1.0] * 22}
        if function == "exit_errors":
            return {"rows": 100, "inside": 100 - outside, "worst": 0.9 + outside}
        found = {
            "purpose": a["purpose"],
            "rate": a["rate"],
            "attn": a["attn"],
            "seed": a["seed"],
            "parameters": 1000,
            "data": "made up",
            "loss": 1.0,
        }
        if a["purpose"] != "text":
            accuracy = recalled(a["attn"], a["seed"])
            loss = abs(a["rate"] - RATES[a["attn"]])
            row = {"accuracy": accuracy, "loss": loss, "questions": 100}
            return found | {"recall": [{"length": n, **row} for n in (64, 128, 256, 512, 1024)]}
        rise = risen(a["attn"], a["seed"])
        found |= {"block": 128, "by_position": [2.0] * 8 + [2.0 + rise] * 8}
        if a["attn"] == "stickbreaking":
            before, after = ([[x + 0.01 * a["seed"]] * 4] * 4 for x in live)
            found["live"] = {tile: {"before": before, "after": after} for tile in ("64", "8")}
        return found

    return [
        JobResult(
            job.key, job.label, job.arguments, "done",
            value(job.function.__name__, dict(job.arguments)),
        )
        for job in jobs(profile)
    ]  # fmt: skip


def _verdicts(results: list[JobResult], profile: Profile = "standard") -> dict[str, Verdict]:
    found = conclude(profile, results)
    assert set(found.evidence) == {claim.id for claim in CLAIMS}
    assert all(set(found.evidence[claim.id].arms) <= set(claim.arms) for claim in CLAIMS)
    return {claim.id: claim.rule.decide(found.evidence[claim.id]) for claim in CLAIMS}


def test_the_entry_point_leads_to_the_reproduction() -> None:
    (entry,) = [e for e in entry_points(group="decapod.reproductions") if e.name == "sbattn"]
    assert entry.load() is REPRODUCTION


def test_results_as_the_paper_has_them_show_every_claim() -> None:
    assert set(_verdicts(_results("standard")).values()) == {"shown"}


def test_opposite_results_are_never_shown() -> None:
    verdicts = _verdicts(
        _results(
            "standard",
            recalled=lambda arm, seed: 0.5 if arm == "stickbreaking" else 0.9 + 0.001 * seed,
            risen=lambda arm, seed: 0.5 + 0.01 * seed if arm == "stickbreaking" else -0.2,
            live=(0.8, 0.7),
            outside=1,
        )
    )
    assert verdicts == {
        "saturated-gradient": "shown",  # its numbers were left as they are
        "certified-exit": "not shown",
        **dict.fromkeys(
            [c.id for c in CLAIMS if c.id not in ("saturated-gradient", "certified-exit")],
            "reversed",
        ),
    }


def test_one_bad_seed_is_enough_to_lose_the_recall_claim() -> None:
    bad = _results("standard", recalled=lambda _, seed: 0.97 if seed == 3 else 1.0)
    verdicts = _verdicts(bad)
    assert verdicts["recall-extrapolates"] == "not shown"
    assert verdicts["recall-beats-rope"] == "reversed"  # both arms are alike


def test_seeds_that_disagree_decide_nothing() -> None:
    verdicts = _verdicts(
        _results(
            "standard",
            recalled=lambda arm, seed: 1.0 if arm == "stickbreaking" else seed / 5,
            risen=lambda _, seed: 0.3 * (-1) ** seed,
        )
    )
    assert verdicts["recall-extrapolates"] == "shown"
    for claim in ("text-stickbreaking", "text-rope"):
        assert verdicts[claim] == "not shown"


def test_a_quick_run_with_one_seed_decides_nothing_about_text() -> None:
    verdicts = _verdicts(_results("quick"), "quick")
    for claim in ("text-stickbreaking", "text-rope", "live-half", "live-grows"):
        assert verdicts[claim] == "not shown"
    assert verdicts["certified-exit"] == "shown"


def test_figures_and_tables_show_every_arm_and_their_words_its_numbers() -> None:
    found = conclude("standard", _results("standard"))
    recall, text, live = found.figures
    assert all(figure.svg.startswith("<svg") for figure in found.figures)
    for arm in RATES:
        assert f"{NAMES[arm]}: " in recall.alt
        assert NAMES[arm] in recall.svg
    for arm in NAMES:
        assert f"{NAMES[arm]}: " in text.alt
        assert NAMES[arm] in text.svg
    assert "RoPE: 0.760 at 64" in recall.alt
    assert "RoPE: 2.00 at positions 128–255, 2.50 at 1024–2047" in text.alt
    assert "trained, 0.21 to 0.21" in live.alt
    titles = [table.title for table in found.tables]
    assert len(titles) == len(set(titles)) == 4
    assert all(table.rows for table in found.tables)


def test_a_rate_that_is_not_the_best_here_is_said() -> None:
    results = _results("standard")
    assert not any("tuning seed" in note for note in conclude("standard", results).notes)
    for result in results:
        value: Any = result.value
        if result.arguments.get("purpose") == "tuning" and value["attn"] == "alibi":
            value["recall"][0]["loss"] = value["rate"] * (value["seed"] - 99)
    (said,) = (n for n in conclude("standard", results).notes if "tuning seed" in n)
    assert said.startswith("ALiBi had its lowest loss")
    assert "at the learning rate 0.003; it was run at 0.01" in said


@pytest.mark.parametrize("profile", ["quick", "standard", "full"])
def test_jobs_differ_and_stay_off_the_tuning_seed(profile: Profile) -> None:
    planned = jobs(profile)
    assert len({job.key for job in planned}) == len(planned)
    learned = [job.arguments for job in planned if "purpose" in job.arguments]
    for a in learned:
        assert (a["seed"] in TUNING_SEEDS) == (a["purpose"] == "tuning")
        Experiment.from_mapping(a["content"], a["attn"], learning_rate=a["rate"])
    if profile != "quick":
        for purpose in ("recall", "text"):
            for arm in RATES:
                runs = [a for a in learned if (a["purpose"], a["attn"]) == (purpose, arm)]
                assert len(runs) >= 3


def test_the_quick_profile_runs_from_end_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut down until it takes seconds: every job is real."""
    scale = replace(
        reproduce._SCALES["quick"],
        exits=1, recall_steps=3, text_steps=2, recall={"stickbreaking": 1, "rope": 1},
    )  # fmt: skip
    monkeypatch.setitem(reproduce._SCALES, "quick", scale)
    small = {"hidden_size": 16, "num_layers": 1, "num_heads": 2}
    text = {**TEXT["text"], "blocks": 1, "max_bytes": 600_000}
    monkeypatch.setattr(reproduce, "RECALL", {**RECALL, "model": small})
    monkeypatch.setattr(reproduce, "TEXT", {**TEXT, "model": small, "text": text})
    results = [
        JobResult(
            job.key, job.label, job.arguments, "done",
            json.loads(json.dumps(job.function(**job.arguments))),
        )
        for job in jobs("quick")
    ]  # fmt: skip
    found = conclude("quick", results)
    assert isinstance(found, Findings)
    assert found.evidence["saturated-gradient"].effect == len(LOGITS)
    assert found.evidence["certified-exit"].effect == 1
    assert found.evidence["live-half"].arms["untrained"] < 0.5


def test_saturated_gradients_are_right_where_the_subtracting_form_is_not() -> None:
    errors = saturated_gradients()
    assert max(errors["exclusive"]) <= TOLERANCE
    assert max(errors["inclusive"]) == 1.0


def test_the_exit_is_inside_its_bound_and_the_bound_is_tight() -> None:
    found = exit_errors(seed=1)
    assert found["inside"] == found["rows"] > 1000
    assert 0.99 < found["worst"] <= 1.0


def test_an_arm_with_a_repeated_seed_is_refused() -> None:
    twice: Any = [{"purpose": "recall", "attn": "rope", "seed": 0, "rate": 1.0}] * 2
    with pytest.raises(InvalidInputError, match="runs"):
        by_arm(twice, "recall")


# --- experiments as files -------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "content"), [("mqrar", RECALL), ("bytelm", TEXT)])
def test_the_files_hold_what_the_reproduction_runs(name: str, content: dict[str, Any]) -> None:
    with (EXPERIMENTS / f"{name}.toml").open("rb") as file:
        assert tomllib.load(file) == content


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("sbattn_train", EXPERIMENTS / "train.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("attn", ["stickbreaking", "rope", "alibi", "swa", "fox"])
def test_the_large_run_goes_the_same_way_as_the_small_ones(
    script: Any, attn: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = EXPERIMENTS / "350m.toml"
    script.main(config, attn, dry_run=True)
    count = capsys.readouterr().out.removeprefix(f"{attn}: ").removesuffix(" parameters\n")
    assert 345e6 < int(count.replace(",", "")) < 355e6
    script.main(config, attn, smoke=True, device="cpu", out=tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["attn"] == attn
    assert len(result["by_position"]) == 2
    assert (tmp_path / "checkpoint.pt").exists()
    assert json.loads(capsys.readouterr().out) == result


def test_the_large_run_is_what_its_file_says() -> None:
    experiment = Experiment.load(EXPERIMENTS / "350m.toml", "swa")
    assert experiment.training.length == 2**11
    assert isinstance(experiment.data, TextData)
    assert experiment.data.length == 2**14
    assert experiment.model.window == 512
    with pytest.raises(InvalidInputError, match="path"):
        run(replace(experiment, training=replace(experiment.training, device="cpu")).smoke())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "either recall or text"),
        ({"recall": {}, "text": {}}, "either recall or text"),
        ({"recall": {}, "network": {}}, "network"),
        ({"recall": {"kyes": 3}}, "kyes"),
        ({"recall": {"lengths": [64, 0]}}, "lengths"),
        ({"recall": {}, "model": {"hidden": 3}}, "hidden"),
        ({"recall": {}, "training": {"steps": 0}}, "steps"),
    ],
)
def test_an_experiment_that_is_misspelt_is_refused(content: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        Experiment.from_mapping(content)


# --- the command ----------------------------------------------------------------------------------


def test_the_command_trains_prints_and_goes_on_where_it_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tyro")
    words = ["mqrar", "--steps", "2", "--lengths", "64", "128", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["sbattn-repro", *words])
    cli.main()
    first = capsys.readouterr()
    assert "step 2/2" in first.err
    assert "chance 0.062" in first.out
    assert [line.split()[0] for line in first.out.splitlines()[1:]] == ["64", "128"]
    cli.main()
    again = capsys.readouterr()
    assert "step" not in again.err  # nothing was left to do
    assert again.out == first.out
    assert json.loads((tmp_path / "result.json").read_text())["attn"] == "stickbreaking"


def test_the_command_reads_a_text_and_tells_losses_by_position(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Long is the way. " * 2000)
    cli.bytelm(steps=2, length=32, test_length=64, text=text, quiet=True)
    out = capsys.readouterr().out
    assert "text.txt, 34000 bytes" in out
    assert [line.split()[0] for line in out.splitlines()[1:4]] == ["0–15", "16–31", "32–63"]
    assert "live tiles after training" in out
