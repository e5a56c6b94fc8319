"""The reproduction: its evidence on made results with known effects, and one real, tiny run."""

from __future__ import annotations

import json
import math
from importlib.metadata import entry_points
from typing import Any

import pytest

pytest.importorskip("decapod.claims")
pytest.importorskip("matplotlib")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from decapod.claims import Profile
from decapod.jobs import JobResult
from vineppo.experiments import findings
from vineppo.experiments.exact import cells, tree_cell
from vineppo.experiments.learning import LEARNING, METHODS, RATES, TUNED, VINE, learn
from vineppo.reproduce import CLAIMS, REPRODUCTION, evidence, jobs

PROFILES: tuple[Profile, ...] = ("quick", "standard", "full")
GAIN = {"PPO": 0.2, "RLOO": 0.1, "GRPO": 0.1, "RestEM": 0.05, "DPO+": 0.0, "VinePPO K=1": 0.2,
        "VinePPO K=3": 0.3, "VinePPO K=9": 0.4}  # fmt: skip
COST = {**dict.fromkeys(METHODS, 1.0), **{name: 1.0 + k for name, k in VINE.items()}}


def report(error: float, top1: float) -> dict[str, Any]:
    return {"mae": {"value": error}, "top1": {"value": top1}}


def made_run(method: str, seed: int, *, values: bool) -> dict[str, Any]:
    """Accuracy that rises on a straight line to 0.4 and the method's gain."""
    shares = [0.0, 0.25, 0.5, 0.75, 1.0]
    curve = [
        {
            "iteration": 40 * share,
            "steps": 160 * share,
            "tokens": 1000 * COST[method] * share,
            "seconds": 10 * COST[method] * share,
            "accuracy": 0.4 + GAIN[method] * share + 0.001 * seed,
        }
        for share in shares
    ]
    found: dict[str, Any] = {"method": method, "rate": 3e-4, "seed": seed, "curve": curve}
    found["end"] = {"greedy": curve[-1]["accuracy"], "sampled": 0.3, "divergence": 1.0}
    if values:
        found["values"] = {
            "critic": report(0.2 + 0.01 * (seed - 10), 0.3),
            "rollouts, K=9": report(0.05, 0.9),
        }
    return found


@pytest.fixture(scope="module")
def trees() -> list[dict[str, Any]]:
    return [tree_cell(**arguments) for arguments in cells(1)]


@pytest.fixture(scope="module")
def found(trees: list[dict[str, Any]]) -> Any:
    results = []
    real = iter([*trees, *trees, *trees])
    for job in jobs("standard"):
        a = job.arguments
        value = (
            made_run(a["method"], a["seed"], values=a["values"])
            if job.function is learn
            else next(real)
        )
        results.append(JobResult(job.key, job.label, a, "done", value))
    return evidence("standard", results)


def test_the_library_registers_its_reproduction() -> None:
    (entry,) = [e for e in entry_points(group="decapod.reproductions") if e.name == "vineppo"]
    assert entry.load() is REPRODUCTION


@pytest.mark.parametrize("profile", PROFILES)
def test_jobs_are_different_and_carry_plain_json(profile: Profile) -> None:
    listed = jobs(profile)
    assert len({job.key for job in listed}) == len(listed)
    assert all(json.loads(json.dumps(job.arguments)) == job.arguments for job in listed)


def test_every_method_has_the_same_episodes_and_one_of_the_same_rates() -> None:
    assert set(TUNED) == set(METHODS)
    assert set(TUNED.values()) <= set(RATES)


def test_every_claim_has_its_evidence(found: Any) -> None:
    assert found.keys() == {claim.id for claim in CLAIMS}
    assert all(math.isfinite(e.effect) for e in found.values())
    assert all(set(found[claim.id].arms) <= set(claim.arms) for claim in CLAIMS)


def test_differences_are_those_of_the_means_along_the_run(found: Any) -> None:
    # The mean of 1/4, 2/4, 3/4 and 1 is 0.625.
    for claim, gain in (("vine-ppo", 0.2), ("vine-rloo", 0.3), ("k9-k1", 0.2), ("k9-k3", 0.1)):
        assert found[claim].effect == pytest.approx(0.625 * gain)
        assert found[claim].low == pytest.approx(found[claim].high)  # paired: seeds cancel


def test_at_equal_cost_the_cheaper_run_is_at_its_end(found: Any) -> None:
    # VinePPO with K = 9 costs ten times as much: it has a tenth of its gain when RLOO ends.
    assert found["vine-tokens"].effect == pytest.approx(0.1 * 0.4 - 0.1)
    assert found["vine-seconds"].effect == pytest.approx(0.1 * 0.4 - 0.2)


def test_values_are_compared_on_the_same_seeds(found: Any) -> None:
    assert found["values-error"].effect == pytest.approx(0.05 - 0.215)
    assert found["values-top1"].effect == pytest.approx(0.6)
    assert found["values-error"].n == 4


def test_accuracy_beyond_the_end_of_a_run_is_refused() -> None:
    with pytest.raises(ValueError, match="limit: expected at most 1000 tokens"):
        findings.accuracy_at(made_run("RLOO", 0, values=False), "tokens", 1001)


def test_the_rules_give_the_verdicts_that_the_trees_ask_for(found: Any) -> None:
    verdicts = {claim.id: claim.rule.decide(found[claim.id]) for claim in CLAIMS}
    for claim in ("vine-unbiased", "critic-biased", "newline-starts-biased"):
        assert verdicts[claim] == "shown"
    assert verdicts["vine-tokens"] == "reversed"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["PPO", "DPO+"])
def test_a_run_is_measured_along_its_way(
    method: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    content = {
        "task": {"operands": 4, "modulus": 10},
        "start": {"seed": 0, "steps": 30, "width": 32, "layers": 1},
        "training": {
            **LEARNING["training"],
            "iterations": 4,
            "episodes_per_iteration": 16,
            "num_generations": 4,
            "mini_batch_size": 8,
        },
        "evaluation": {
            **LEARNING["evaluation"],
            "prompts": 32, "every": 2, "states": 8, "rollouts": 16, "alternatives": 8,
        },
    }  # fmt: skip
    judged = method == "PPO"
    first = learn(content, method, 3e-4, 0, values=judged)
    assert json.loads(json.dumps(first)) == first
    assert [row["iteration"] for row in first["curve"]] == ([0, 2, 4] if judged else [0, 1])
    assert first["curve"][-1]["tokens"] > first["curve"][0]["tokens"] == 0
    again = learn(content, method, 3e-4, 0, values=judged)

    def timeless(run: dict[str, Any]) -> list[dict[str, float]]:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in run["curve"]]

    assert timeless(again) == timeless(first)
    assert again["end"] == first["end"]
    if judged:
        assert set(first["values"]) >= {"critic", "group mean", "rollouts, K=9"}
        assert again["values"] == first["values"]
