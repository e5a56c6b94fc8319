from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gsm_compose.errors import LearningError
from gsm_compose.gap import gap_report
from gsm_compose.learning.findings import CLAIMS, SCALES, evidence, jobs
from gsm_compose.outcomes import Outcomes

pytest.importorskip("decapod")

N = 200


def _point(s1: float, s2: float, comp: float) -> dict[str, list[int]]:
    def column(rate: float) -> list[int]:
        return [int(i < round(rate * N)) for i in range(N)]

    return {"q1": column(s1), "q2": column(s2), "cf": column(comp)}


def _result(arm: str, seed: int, half: float, end: float) -> dict[str, Any]:
    return {
        "arm": arm,
        "seed": seed,
        "steps": 10,
        "half": _point(0.9, 0.9, half),
        "end": _point(1.0, 1.0, end),
        "q1_ids": list(range(N)),
        "q2_ids": list(range(N)),
    }


def _runs(seeds: int, compositional: float = 0.9) -> list[dict[str, Any]]:
    return [
        run
        for seed in range(seeds)
        for run in (
            _result("one-hop", seed, 0.2 + 0.01 * seed, 0.2 + 0.01 * seed),
            _result("compositional", seed, 0.2, compositional + 0.01 * seed),
            _result("code", seed, 0.5, 0.95 + 0.01 * seed),
        )
    ]


def test_numbers_are_those_of_the_definitions() -> None:
    found = evidence(_runs(3))
    assert found["learning-gap"].effect == pytest.approx(0.21 - 0.81)
    assert found["learning-more-helps-one-hop"].effect == pytest.approx(1 - 0.81)
    assert found["learning-more-leaves-gap"].effect == pytest.approx(-0.79)
    shares = [1 - (-0.1 + 0.01 * s) / (-0.8 + 0.01 * s) for s in range(3)]
    assert found["learning-composition-closes"].effect == pytest.approx(np.mean(shares))
    assert found["learning-code-shrinks"].effect == pytest.approx(0.75)
    assert found["learning-code-shrinks"].arms == pytest.approx(
        {"code": -0.04, "more one-hop": -0.79}
    )


def test_interval_over_seeds_is_students_t() -> None:
    found = evidence(_runs(3))["learning-more-leaves-gap"]
    half = 4.3026527 * 0.01 / 3**0.5  # t of 2 degrees of freedom, standard deviation 0.01
    # The standard error comes from a bootstrap of 2000 resamples, so it is right to a few percent.
    assert found.high - found.effect == pytest.approx(half, rel=0.1)
    assert found.n == 3


def test_one_seed_has_an_interval_over_pairs_that_says_so() -> None:
    found = evidence(_runs(1))
    gap = found["learning-more-leaves-gap"]
    assert gap.high - gap.effect == pytest.approx(gap.effect - gap.low)
    assert "says nothing of other seeds" in gap.detail
    assert all(np.isfinite([e.low, e.high]).all() for e in found.values())


def test_interval_over_pairs_is_that_of_the_gap_report() -> None:
    run = _result("one-hop", 0, 0.2, 0.2)
    point = {name: np.array(column, dtype=bool) for name, column in run["half"].items()}
    ids = np.arange(N).astype(str)
    category = np.where(point["cf"], "correct", "wrong Q2")
    outcomes = Outcomes(ids, ids, ids, c1=point["cf"], category=category, **point)
    expected = gap_report(outcomes).delta
    found = evidence([run])["learning-gap"]
    assert (found.effect, found.low, found.high) == pytest.approx(
        (expected.value, expected.low, expected.high)
    )


def test_rules_can_come_out_either_way() -> None:
    rules = {claim.id: claim.rule for claim in CLAIMS}
    good, bad = evidence(_runs(3)), evidence(_runs(3, compositional=0.3))
    assert {name: rules[name].decide(e) for name, e in good.items()} == dict.fromkeys(
        rules, "shown"
    )
    assert rules["learning-composition-closes"].decide(bad["learning-composition-closes"]) == (
        "reversed"
    )


def test_a_seed_without_a_gap_leaves_the_share_open() -> None:
    runs = _runs(2)
    runs[0]["end"] = _point(1.0, 1.0, 1.0)
    found = evidence(runs)["learning-composition-closes"]
    assert (found.low, found.high) == (-np.inf, np.inf)


def test_only_claims_whose_arms_were_run_have_evidence() -> None:
    found = evidence([run for run in _runs(2) if run["arm"] == "one-hop"])
    assert set(found) == {
        "learning-gap",
        "learning-more-helps-one-hop",
        "learning-more-leaves-gap",
    }


def test_arms_with_different_or_repeated_seeds_are_refused() -> None:
    runs = _runs(2)
    for bad in (runs[:-1], [*runs, runs[0]], []):
        with pytest.raises(LearningError, match=r"^results"):
            evidence(bad)


def test_profiles_stay_off_the_seeds_that_were_explored() -> None:
    for scale in SCALES.values():
        planned = [(job.arguments["arm"], job.arguments["seed"]) for job in jobs(scale)]
        assert len(set(planned)) == len(planned) == 3 * scale.seeds
        assert max(seed for _, seed in planned) < 100
    assert SCALES["quick"].seeds == 1
    assert SCALES["standard"].seeds >= 3
