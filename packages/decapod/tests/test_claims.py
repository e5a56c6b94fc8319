from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decapod.claims import (
    Above,
    Below,
    Claim,
    DataTable,
    Evidence,
    Exactly,
    Figure,
    Findings,
    Paper,
    Reproduction,
    Within,
    region,
)
from decapod.jobs import Job, JobResult
from decapod.reproductions import Outcome, discover, reproduce

PAPER = Paper("On toys", "A. Author", "Venue", 2024, "https://example.org/toys")
CLAIM = Claim("gain", "Toys gain", "Table 1", ("toy", "none"), "gain", Above(0))


def evidence(low: float, high: float, effect: float | None = None) -> Evidence:
    middle = (low + high) / 2 if math.isfinite(high - low) else 0.0
    return Evidence(middle if effect is None else effect, low, high, 3, "seeds")


def measure(seed: int) -> float:
    return 1.0 + seed


def witness(path: str) -> str:
    return Path(path).read_text()


def fail() -> None:
    raise RuntimeError("the job fell over")


def conclude(profile, results):
    values = [result.value for result in results]
    return Findings(
        {"gain": Evidence(sum(values), min(values), max(values), len(values), "seeds")},
        [Figure("A figure", "<svg/>", "caption", "alt")],
        [DataTable("A table", ["seed", "value"], [[i, v] for i, v in enumerate(values)])],
        ["a note"],
    )


def make(claims=(CLAIM,), jobs=None, conclude=conclude) -> Reproduction:
    listed = [Job(measure, {"seed": s}) for s in range(3)] if jobs is None else jobs
    return Reproduction("toy", PAPER, claims, lambda _: listed, conclude, ("scipy",))


class InThisProcess:
    """An executor as simple as can be: what is tested here is not where jobs run."""

    def run(self, jobs):
        for job in jobs:
            value = job.function(**job.arguments)
            yield JobResult(job.key, job.label, job.arguments, "done", value)


def run(reproduction, out, executor=None, **options) -> Outcome:
    executor = executor or InThisProcess()
    return reproduce(reproduction, "quick", out, executor, progress=False, **options)


@pytest.mark.parametrize(
    ("rule", "low", "high", "verdict"),
    [
        (Above(0), 0.1, 0.5, "shown"),
        (Above(0), 0.0, 0.5, "not shown"),
        (Above(0), -0.5, -0.1, "reversed"),
        (Above(2), 1.0, 1.9, "reversed"),
        (Above(0), -math.inf, math.inf, "not shown"),
        (Below(0), -0.5, -0.1, "shown"),
        (Below(0), -0.5, 0.0, "not shown"),
        (Below(0), 0.1, 0.2, "reversed"),
        (Exactly(41), 41, 41, "shown"),
        (Exactly(41), 40, 42, "not shown"),
        (Exactly(41), 40, 40, "not shown"),
        (Within(-1, 1), -1, 1, "shown"),
        (Within(-1, 1), -1.1, 0, "not shown"),
        (Within(-1, 1), -2, 2, "not shown"),
        (Within(-1, 1), 1.5, 2, "reversed"),
        (Within(-1, 1), -3, -2, "reversed"),
    ],
)
def test_the_whole_interval_decides(rule, low, high, verdict):
    assert rule.decide(evidence(low, high)) == verdict


@settings(deadline=None)
@given(st.floats(-5, 5), st.tuples(st.floats(-9, 9), st.floats(-9, 9)).map(sorted))
def test_above_and_below_are_mirror_images(threshold, ends):
    low, high = ends
    mirrored = Below(-threshold).decide(evidence(-high, -low))
    assert Above(threshold).decide(evidence(low, high)) == mirrored


@settings(deadline=None)
@given(st.tuples(st.floats(-9, 9), st.floats(-9, 9)).map(sorted))
def test_an_interval_inside_the_region_is_shown_whatever_the_rule(ends):
    for rule in (Above(-1), Below(2), Within(-3, 4), Exactly(1)):
        start, end = region(rule)
        inside = start < ends[0] and ends[1] < end
        assert not inside or rule.decide(evidence(*ends)) == "shown"


@pytest.mark.parametrize(
    ("make_it", "words"),
    [
        (lambda: Evidence(math.nan, 0, 1, 3, "seeds"), "Evidence.effect"),
        (lambda: Evidence(0, 1, -1, 3, "seeds"), "low <= high"),
        (lambda: Evidence(0, 0, 0, -1, "seeds"), "Evidence.n"),
        (lambda: Within(2, 1), "low <= high"),
        (lambda: dataclasses.replace(CLAIM, id="Two Words"), "slug"),
        (lambda: dataclasses.replace(CLAIM, statement=" "), "Claim.statement"),
        (lambda: DataTable("t", ["a", "b"], [[1, 2], [3]]), "row 1"),
        (lambda: dataclasses.replace(make(), claims=()), "at least one claim"),
        (lambda: dataclasses.replace(make(), claims=(CLAIM, CLAIM)), "used twice"),
        (lambda: dataclasses.replace(make(), name="../toy"), "Reproduction.name"),
    ],
)
def test_nonsense_is_refused_by_name(make_it, words):
    with pytest.raises(ValueError, match=words.replace(".", r"\.")):
        make_it()


def test_fingerprint_sees_every_field_and_every_detail_of_the_rule():
    variants = [
        CLAIM,
        dataclasses.replace(CLAIM, id="loss"),
        dataclasses.replace(CLAIM, statement="Toys lose"),
        dataclasses.replace(CLAIM, source="Table 2"),
        dataclasses.replace(CLAIM, arms=("none", "toy")),
        dataclasses.replace(CLAIM, metric="loss"),
        dataclasses.replace(CLAIM, rule=Above(1e-15)),
        dataclasses.replace(CLAIM, rule=Below(0)),
    ]
    assert len({claim.fingerprint for claim in variants}) == len(variants)


def test_fingerprint_is_the_same_in_every_process():
    code = (
        "from decapod.claims import *; "
        "print(Claim('gain','Toys gain','Table 1',('toy','none'),'gain',Above(0)).fingerprint)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == CLAIM.fingerprint


def test_claims_are_on_disk_before_the_first_job_runs(tmp_path):
    record = tmp_path / "toy" / "claims.json"
    seen: list[str] = []

    def look(profile, results):
        seen.append(results[0].value)
        return Findings({"gain": evidence(1, 2)})

    run(make(jobs=[Job(witness, {"path": str(record)})], conclude=look), tmp_path)
    assert json.loads(seen[0])["profiles"]["quick"]["claims"][0]["fingerprint"] == CLAIM.fingerprint


def test_outcome_on_disk_is_the_outcome_returned(tmp_path):
    outcome = run(make(), tmp_path, executor="local")
    assert outcome.status == "concluded"
    assert outcome.claims[0].verdict == "shown"
    assert outcome.claims[0].evidence == Evidence(6.0, 1.0, 3.0, 3, "seeds")
    assert outcome.command == "decapod reproduce toy --profile quick"
    assert set(outcome.environment["packages"]) >= {"decapod", "scipy"}
    assert outcome.jobs_done == 3
    loaded = Outcome.load(tmp_path / "toy" / "outcome.json")
    assert loaded.claims == outcome.claims
    assert loaded.figures == outcome.figures
    assert loaded.notes == ("a note",)


def test_an_infinite_interval_survives_the_file_as_strict_json(tmp_path):
    run(make(conclude=lambda *_: Findings({"gain": evidence(-math.inf, math.inf, 0.5)})), tmp_path)
    path = tmp_path / "toy" / "outcome.json"
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert Outcome.load(path).claims[0].evidence == evidence(-math.inf, math.inf, 0.5)


def test_a_second_run_reuses_the_jobs_and_flags_nothing(tmp_path):
    run(make(), tmp_path)
    again = run(make(), tmp_path)
    assert again.jobs_reused == 3
    assert not again.claims[0].changed


def test_a_rule_changed_after_results_were_seen_is_flagged_and_the_record_stays(tmp_path):
    run(make(), tmp_path)
    record = (tmp_path / "toy" / "claims.json").read_bytes()
    softer = dataclasses.replace(CLAIM, rule=Above(-10))
    assert run(make(claims=(softer,)), tmp_path).claims[0].changed
    assert (tmp_path / "toy" / "claims.json").read_bytes() == record
    assert not run(make(claims=(softer,)), tmp_path / "fresh").claims[0].changed


def test_a_rule_changed_after_a_conclusion_without_jobs_is_flagged_too(tmp_path):
    def without_jobs(claim):
        return make((claim,), [], lambda *_: Findings({"gain": evidence(1, 2)}))

    run(without_jobs(CLAIM), tmp_path)
    assert (
        run(without_jobs(dataclasses.replace(CLAIM, rule=Above(1.5))), tmp_path).claims[0].changed
    )


def test_shards_run_apart_and_merged_conclude_as_one(tmp_path):
    whole = run(make(), tmp_path / "whole")
    for i in range(2):
        part = run(make(), tmp_path / "parts", shard=(i, 2))
        assert part.status == "partial"
        assert part.claims[0].verdict is None
        assert not (tmp_path / "parts" / "toy" / "outcome.json").exists()
    merged = run(make(), tmp_path / "parts")
    assert merged.jobs_reused == 3
    assert merged.claims == whole.claims


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"jobs": [Job(fail, {})]}, "the job fell over"),
        ({"conclude": lambda *_: 1 / 0}, "ZeroDivisionError"),
        ({"conclude": lambda *_: sys.exit("leaving")}, "leaving"),
        ({"conclude": lambda *_: 3}, "expected a Findings, got int"),
        ({"conclude": lambda *_: Findings({})}, "['gain'], got []"),
        (
            {
                "conclude": lambda *_: Findings(
                    {"gain": Evidence(1, 1, 1, 1, "seeds", {"surprise": 1.0})}
                )
            },
            "['surprise']",
        ),
    ],
)
def test_a_fault_of_the_library_is_an_outcome_without_verdicts(tmp_path, changes, words):
    outcome = run(make(**changes), tmp_path, executor="local" if "jobs" in changes else None)
    assert outcome.status == "failed"
    assert words in outcome.error
    assert outcome.claims[0].verdict is None
    assert Outcome.load(tmp_path / "toy" / "outcome.json").error == outcome.error


def test_an_interrupt_is_passed_on_and_concludes_nothing(tmp_path):
    def interrupt(profile, results):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(make(conclude=interrupt), tmp_path)
    assert not (tmp_path / "toy" / "outcome.json").exists()


def test_unknown_profile_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'standard', 'full'"):
        reproduce(make(), "big", tmp_path)


def test_discover_finds_the_good_and_explains_the_broken(install, monkeypatch):
    site = install(
        {
            "toy": "toys_module:TOY",
            "misnamed": "toys_module:MISNAMED",
            "number": "toys_module:NOT_ONE",
            "absent": "toys_module:ABSENT",
        }
    )
    install({"crashing": "bad_module:TOY"}, "bad", "raise OSError('no such disk')")
    monkeypatch.syspath_prepend(site)
    found, broken = discover()
    assert found["toy"].name == "toy"
    assert "calls itself 'other'" in broken["misnamed"]
    assert "got int" in broken["number"]
    assert "AttributeError" in broken["absent"]
    assert "no such disk" in broken["crashing"]


def test_a_name_registered_twice_is_nobodys(install, monkeypatch):
    site = install({"toy": "toys_module:TOY"})
    install({"toy": "more_module:TOY"}, "more")
    monkeypatch.syspath_prepend(site)
    found, broken = discover()
    assert "toy" not in found
    assert "Two installed packages" in broken["toy"]
