from __future__ import annotations

import functools
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decapod.jobs import Job, JobResult
from decapod.jobs.callables import pack
from decapod.jobs.worker import execute
from hpreliability.errors import (
    EmptyInputError,
    IncompleteSweepError,
    MissingExtraError,
    NonFiniteScoreError,
    SweepConfigError,
    SweepResultError,
)
from hpreliability.scoring import thc
from hpreliability.sweep import Sweep, SweepSpec

SPEC: dict[str, Any] = {
    "name": "toy",
    "base": {"lr": 0.1, "width": 2},
    "hyperparameters": {"lr": [0.01, 0.1, 1.0], "width": [1, 2]},
    "contexts": {"env": ["a", "b"]},
    "budgets": 10,
    "seeds": 2,
}


def spec(**changes: Any) -> SweepSpec:
    return SweepSpec(**{**SPEC, **changes})


def train(config: dict[str, Any], env: str, seed: int, budget: int) -> float:
    sign = 1 if env == "a" else -1
    return sign * config["lr"] + config["width"] + budget + seed / 2**32


def curve(config: dict[str, Any], env: str, seed: int, budget: int) -> Any:
    for step in range(5, budget + 1, 5):  # a generator: cannot itself travel between processes
        yield step, train(config, env, seed, step)


class InThisProcess:
    """An executor without processes, for tests that are not about them."""

    def run(self, jobs: Sequence[Job]) -> Iterator[JobResult]:
        for job in jobs:
            outcome = execute(pack(job.function), job.arguments)
            yield JobResult(job.key, job.label, job.arguments, *outcome)


def run(sweep: Sweep, function: Any = train, **options: Any) -> Any:
    options.setdefault("executor", InThisProcess())
    return sweep.run(function, progress=False, **options)


def csv(sweep: Sweep, path: Path, **options: Any) -> bytes:
    sweep.write_csv(path, **options)
    return path.read_bytes()


def test_base_is_run_once_and_counts_for_every_hyperparameter(tmp_path: Path) -> None:
    sweep = Sweep(spec(), tmp_path / "runs")
    configs = {json.dumps(trial.config, sort_keys=True) for trial in sweep.trials()}
    assert len(configs) == 3 + 2 - 1
    assert len(sweep.trials()) == 4 * 2 * 2
    assert run(sweep).complete
    table = sweep.results()
    assert len(table.frame) == (3 + 2) * 2 * 2
    base = [
        table.select(hyperparameter=name, value=value).frame["score"].tolist()
        for name, value in (("lr", "0.1"), ("width", "2"))
    ]
    assert base[0] == base[1]


def test_scores_land_in_the_row_of_their_run(tmp_path: Path) -> None:
    sweep = Sweep(spec(budgets=[10, 20]), tmp_path)
    assert run(sweep, executor="local", n_jobs=2).complete
    frame = sweep.results().frame.set_index(["hyperparameter", "value", "env", "budget", "seed"])
    for trial in sweep.trials():
        score = train(dict(trial.config), trial.contexts["env"], trial.seed, trial.budget)
        for name in ("lr", "width"):
            if trial.label.startswith((name, "base")):
                key = (
                    name,
                    str(trial.config[name]),
                    trial.contexts["env"],
                    str(trial.budget),
                    str(trial.seed_index),
                )
                assert frame.loc[key, "score"] == score


def test_a_finished_sweep_can_be_scored(tmp_path: Path) -> None:
    sweep = Sweep(spec(seeds=3), tmp_path)
    assert run(sweep).complete
    frame = thc(sweep.results(), over="env").frame
    assert frame.set_index("hyperparameter").loc["lr", "score"] > 0


def test_a_run_has_a_seed_of_its_own_that_other_values_do_not_change() -> None:
    def seeds(**changes: Any) -> dict[str, int]:
        return {trial.label: trial.seed for trial in Sweep(spec(**changes)).trials()}

    few = seeds()
    more = seeds(
        hyperparameters={"lr": [0.001, 1.0, 0.1, 0.01], "width": [2, 1, 8]},
        contexts={"env": ["c", "b", "a"]},
        seeds=4,
        budgets=[10, 99],
    )
    assert len(set(more.values())) == len(more)
    assert few.items() <= more.items()
    assert not few.items() & seeds(root_seed=1).items()


def test_seeds_of_runs_never_change() -> None:
    assert [trial.seed for trial in Sweep(spec()).trials()[:3]] == [
        3001876500,
        1182878018,
        977258174,
    ]


def test_common_random_numbers_share_seeds_between_configurations_only() -> None:
    by_cell: dict[tuple[str, int], set[int]] = {}
    for trial in Sweep(spec(common_random_numbers=True)).trials():
        by_cell.setdefault((trial.contexts["env"], trial.seed_index), set()).add(trial.seed)
    assert all(len(seeds) == 1 for seeds in by_cell.values())
    assert len(set.union(*by_cell.values())) == 4


@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 20))
def test_shards_are_disjoint_and_together_the_sweep(count: int) -> None:
    sweep = Sweep(spec())
    assert [len(sweep.shard(i, count).jobs(train)) for i in range(count)] == [
        len(sweep.trials()[i::count]) for i in range(count)
    ]
    labels = [t.label for i in range(count) for t in sweep.shard(i, count).trials()]
    assert sorted(labels) == sorted(trial.label for trial in sweep.trials())


def test_shards_run_apart_and_merged_by_copying_give_the_same_bytes(tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    merged.mkdir()
    for index in range(3):
        part = Sweep(spec(), tmp_path / f"machine{index}").shard(index, 3)
        report = run(part)
        assert not report.failures
        assert len(report.results) == len(part.trials())
        assert len(part.results().frame) > 0
        for file in part.folder.glob("*.json*"):
            shutil.copy(file, merged)
    assert run(Sweep(spec(), tmp_path / "whole")).complete
    assert csv(Sweep(spec(), merged), tmp_path / "merged.csv") == csv(
        Sweep(spec(), tmp_path / "whole"), tmp_path / "whole.csv"
    )


def test_a_new_value_runs_only_the_new_jobs(tmp_path: Path) -> None:
    assert run(Sweep(spec(), tmp_path)).reused == 0
    grown = Sweep(spec(hyperparameters={"lr": [0.01, 0.1, 10.0], "width": [1, 2]}), tmp_path)
    with pytest.raises(IncompleteSweepError, match="4 of 16 runs have no result yet"):
        grown.results()
    partial = grown.results(partial=True)
    assert partial.notes == ("4 of 16 runs have no result yet and are left out",)
    assert "10.0" not in partial.values("lr")
    report = run(grown)
    assert report.complete
    assert report.reused == 12
    assert grown.results().values("lr") == ("0.01", "0.1", "10.0")


def test_a_new_version_runs_everything_again(tmp_path: Path) -> None:
    run(Sweep(spec(), tmp_path))
    assert run(Sweep(spec(version="2"), tmp_path)).reused == 0


def test_a_raising_run_is_nan_with_its_traceback_at_hand(tmp_path: Path) -> None:
    def fragile(config: dict[str, Any], env: str, seed: int, budget: int) -> float:
        if config["lr"] == 1.0 and env == "b":
            raise FloatingPointError("diverged")
        return train(config, env, seed, budget)

    sweep = Sweep(spec(), tmp_path)
    report = run(sweep, fragile, executor="local")
    assert len(report.failures) == 2
    table = sweep.results()
    broken = table.frame[table.frame["score"].isna()]
    assert set(zip(broken["value"], broken["env"], strict=True)) == {("1.0", "b")}
    assert len(table.frame) == 20
    assert "2 of 16 runs failed (0 of them killed)" in table.notes[0]
    for failure in sweep.failures():
        assert "FloatingPointError: diverged" in failure.error
        assert "in fragile" in failure.error
    with pytest.raises(NonFiniteScoreError):
        thc(table, over="env")


def test_curves_keep_their_steps_and_a_failed_curve_is_nan_at_all_of_them(tmp_path: Path) -> None:
    def fragile(config: dict[str, Any], env: str, seed: int, budget: int) -> Any:
        yield 5, 0.0
        if config["lr"] == 1.0 and env == "b":
            raise FloatingPointError("diverged")
        yield 10, train(config, env, seed, budget)

    sweep = Sweep(spec(), tmp_path)
    run(sweep, fragile)
    table = sweep.results()
    assert set(table.frame["step"]) == {5, 10}
    broken = table.select(hyperparameter="lr", value="1.0", env="b")
    assert len(broken.frame) == 4
    assert broken.frame["score"].isna().all()
    for how in ("final", "auc", "best"):
        assert table.reduce(how).frame["score"].isna().sum() == 2


def test_one_run_with_checkpoints_serves_every_budget(tmp_path: Path) -> None:
    shared = Sweep(
        spec(budgets=[5, 20], checkpoints=True, common_random_numbers=True), tmp_path / "s"
    )
    assert len(shared.trials()) == 16
    assert run(shared, curve, executor="local").complete
    table = shared.results()
    assert table.contexts == ("env", "budget")
    assert not table.has_curves
    assert set(table.frame["budget"]) == {"5", "20"}
    by_budget = table.frame.pivot_table(
        index=["hyperparameter", "value", "env", "seed"], columns="budget", values="score"
    )
    assert (by_budget["20"] - by_budget["5"]).to_numpy() == pytest.approx(15)


def test_a_checkpoint_without_a_point_is_an_error_that_says_which(tmp_path: Path) -> None:
    sweep = Sweep(spec(budgets=[7, 20], checkpoints=True), tmp_path)
    run(sweep, curve)
    with pytest.raises(SweepResultError, match="no point at budget 7; its steps are 5, 10, 15, 20"):
        sweep.results()


def test_checkpoints_need_a_curve(tmp_path: Path) -> None:
    sweep = Sweep(spec(budgets=[5, 20], checkpoints=True), tmp_path)
    run(sweep, train)
    with pytest.raises(SweepResultError, match="checkpoints: false"):
        sweep.results()


def test_a_mapping_names_the_metric(tmp_path: Path) -> None:
    def metrics(config: dict[str, Any], env: str, seed: int, budget: int) -> dict[str, float]:
        return {"return": train(config, env, seed, budget), "loss": 0.0}

    assert run(Sweep(spec(metric="return"), tmp_path), metrics).complete
    assert Sweep(spec(metric="return"), tmp_path).results().frame["score"].min() > 9
    assert set(Sweep(spec(metric="loss"), tmp_path).results().frame["score"]) == {0.0}
    with pytest.raises(SweepResultError, match=r"metric 'score' is None; train gave: return, loss"):
        Sweep(spec(), tmp_path).results()


def test_partials_are_told_apart_by_what_they_bind(tmp_path: Path) -> None:
    def scaled(
        scale: float, config: dict[str, Any], env: str, seed: int, budget: int, shift: float = 0.0
    ) -> float:
        return scale * train(config, env, seed, budget) + shift

    one = functools.partial(scaled, 2.0)
    assert run(Sweep(spec(), tmp_path), functools.partial(one, shift=1000.0)).complete
    assert Sweep(spec(), tmp_path).results().frame["score"].min() > 1000
    with pytest.raises(SweepConfigError, match="holds results of"):
        run(Sweep(spec(), tmp_path), one)
    with pytest.raises(TypeError, match="not JSON"):
        run(Sweep(spec(), tmp_path), functools.partial(scaled, object()))


def test_further_contexts_reach_train_by_their_name(tmp_path: Path) -> None:
    def with_agent(config: dict[str, Any], env: str, agent: str, seed: int, budget: int) -> float:
        return {"x": 1.0, "y": 2.0}[agent]

    sweep = Sweep(spec(contexts={"env": ["a", "b"], "agent": ["x", "y"]}), tmp_path)
    assert run(sweep, with_agent).complete
    table = sweep.results()
    assert table.contexts == ("env", "agent")
    assert set(table.select(agent="y").frame["score"]) == {2.0}
    with pytest.raises(TypeError, match="config, env, agent, seed, budget"):
        run(sweep, train)


def test_joblib_is_another_name_of_local(tmp_path: Path) -> None:
    assert run(Sweep(spec(), tmp_path), executor="joblib", n_jobs=2).complete


def test_a_grid_is_averaged_over_the_others_or_cut_at_the_base(tmp_path: Path) -> None:
    sweep = Sweep(spec(design="grid", common_random_numbers=True), tmp_path)
    assert len(sweep.trials()) == 3 * 2 * 2 * 2
    assert run(sweep).complete
    mean, base = sweep.results().frame, sweep.results(others="base").frame
    assert len(mean) == len(base) == 20
    lr = mean["hyperparameter"] == "lr"
    # Half of the averaged runs have width 1 instead of 2; the score adds the width.
    assert (base["score"] - mean["score"])[lr].to_numpy() == pytest.approx(0.5)
    assert mean[lr].drop(columns="score").equals(base[lr].drop(columns="score"))


@pytest.mark.parametrize(("module", "package"), [("decapod", "decapod"), ("yaml", "pyyaml")])
def test_without_the_extra_the_error_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, package: str
) -> None:
    path = tmp_path / "toy.yaml"
    path.write_text(YAML)
    monkeypatch.setitem(sys.modules, module, None)  # what Python takes for absent
    with pytest.raises(MissingExtraError, match=rf"{package} .*hpreliability\[experiments\]"):
        Sweep.from_yaml(path).jobs(train)


def test_results_before_a_run_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(EmptyInputError, match="run it first"):
        Sweep(spec(), tmp_path).results()


def test_the_base_spelling_of_a_number_stands_for_both() -> None:
    sweep = Sweep(spec(base={"lr": 1, "width": 2}, hyperparameters={"lr": [1.0, 2.0]}))
    assert len(sweep.trials()) == 2 * 2 * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "../x"}, r"^name: "),
        ({"name": 5}, r"^name: "),
        ({"seeds": 0}, r"^seeds: expected a whole number of at least 1, got 0"),
        ({"seeds": [1, 1]}, r"^seeds: 1 is given twice"),
        ({"seeds": True}, r"^seeds: "),
        ({"budgets": []}, r"^budgets: "),
        ({"budgets": [10, 0.5]}, r"^budgets: expected a whole number"),
        ({"contexts": {}}, r"^contexts: "),
        ({"contexts": {"env": "a"}}, r"^contexts\.env: expected a list, got 'a'"),
        ({"contexts": {"seed": ["a"]}}, r"^contexts\.seed: "),
        ({"design": "random"}, r"^design: "),
        ({"checkpoints": "yes"}, r"^checkpoints: "),
        ({"root_seed": -1}, r"^root_seed: "),
        ({"base": [1]}, r"^base: expected a mapping"),
        ({"base": {"lr": 0.1, "width": 2, "f": {"g": print}}}, r"^base\.f\.g: "),
        ({"hyperparameters": {}}, r"^hyperparameters: "),
        ({"hyperparameters": {"lr": [0.1]}}, r"^hyperparameters\.lr: expected at least two"),
        ({"hyperparameters": {"lr": [0.1, 0.10]}}, r"^hyperparameters\.lr: 0\.1 is given twice"),
        ({"hyperparameters": {"lr": [0.2, 0.3]}}, r"^hyperparameters\.lr: .*base's value 0\.1"),
        ({"hyperparameters": {"l": [1, 2]}}, r"^hyperparameters\.l: .*did you mean 'lr'"),
        ({"hyperparameters": {"lr": [0.1, float("nan")]}}, r"^hyperparameters\.lr: .*finite"),
    ],
)
def test_a_wrong_field_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SweepConfigError, match=message):
        spec(**changes)


YAML = """
name: toy
base: {lr: 1e-1, width: 2}
hyperparameters:
  lr: [1e-2, 1.E-1, 1]
contexts: {env: [a, b]}
budgets: 10
"""


def test_yaml_and_python_describe_the_same_sweep(tmp_path: Path) -> None:
    path = tmp_path / "toy.yaml"
    path.write_text(YAML)
    sweep = Sweep.from_yaml(path)
    assert sweep.spec == spec(hyperparameters={"lr": [0.01, 0.1, 1]}, seeds=3)
    assert sweep.folder == Path("sweeps/toy")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (YAML.replace("budgets: 10", "budget: 10"), "budget: unknown key; did you mean 'budgets'"),
        (YAML.replace("budgets: 10", ""), "budgets: missing key"),
        (YAML + "name: other", "name: given twice"),
        (YAML.replace("1e-2, 1.E-1, 1]", "2e-2, 1]"), r"hyperparameters\.lr: .*base's value 0\.1"),
        (YAML.replace("[a, b]", "a"), r"contexts\.env: expected a list"),
        ("- 1", "expected the keys name, base"),
        ("{", "not YAML"),
        ("", "expected the keys"),
        ("name: !!python/object/apply:os.system [ls]", "not YAML"),
    ],
)
def test_a_wrong_yaml_names_file_and_key(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "toy.yaml"
    path.write_text(text)
    with pytest.raises(SweepConfigError, match=rf"toy\.yaml: {message}"):
        Sweep.from_yaml(path)
