"""Studies that the real Optuna ran."""

from __future__ import annotations

from typing import Any

import pytest

from hpreliability.errors import (
    EmptyInputError,
    MissingColumnError,
    SourceFormatError,
)
from hpreliability.readers import from_optuna

optuna = pytest.importorskip("optuna")
optuna.logging.set_verbosity(optuna.logging.ERROR)

GRID = {"lr": [0.01, 0.1], "seed": [0, 1, 2], "env": ["A", "B"]}


def objective(trial: Any) -> float:
    lr = trial.suggest_float("lr", 1e-3, 1.0, log=True)
    seed = trial.suggest_int("seed", 0, 9)
    env = trial.suggest_categorical("env", ["A", "B"])
    trial.set_user_attr("agent", "dqn")
    if lr == 0.1 and seed == 1 and env == "B":
        raise RuntimeError("diverged")
    if lr == 0.1 and seed == 2 and env == "B":
        trial.report(0.0, 1)
        raise optuna.TrialPruned
    return lr + seed


def grid_study(direction: str = "maximize") -> Any:
    study = optuna.create_study(
        direction=direction, sampler=optuna.samplers.GridSampler(GRID, seed=0)
    )
    study.optimize(objective, catch=(RuntimeError,))
    return study


def test_a_grid_study_gives_its_values_and_failed_runs() -> None:
    table = from_optuna(grid_study(), params=["lr"], context=["env", "agent"], seed="seed")
    assert table.contexts == ("env", "agent")
    assert table.values("lr") == ("0.01", "0.1")
    assert len(table.frame) == 12
    failed = table.frame[table.frame["score"].isna()]
    assert failed[["value", "env", "seed"]].to_numpy().tolist() == [
        ["0.1", "B", "1"],
        ["0.1", "B", "2"],
    ]
    assert table.notes == ("2 trials failed or were pruned and count as failed runs",)
    good = table.frame.dropna()
    assert (good["score"] == good["value"].astype(float) + good["seed"].astype(float)).all()


def test_scores_of_a_minimising_study_are_negated() -> None:
    up = from_optuna(grid_study(), params=["lr"], context=["env"], seed="seed").frame
    down = from_optuna(grid_study("minimize"), params=["lr"], context=["env"], seed="seed")
    assert (up["score"].dropna() == -down.frame["score"].dropna()).all()
    assert any("negative" in note for note in down.notes)


def test_a_sampled_study_is_binned_with_the_trial_number_as_seed() -> None:
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=0))
    study.optimize(
        lambda trial: (
            trial.suggest_float("lr", 1e-5, 1e-1, log=True)
            * (1 if trial.suggest_categorical("env", ["A", "B"]) == "A" else -1)
        ),
        n_trials=60,
    )
    table = from_optuna(study, params=["lr"], context=["env"], bins=3, binning="log")
    assert len(table.values("lr")) == 3
    assert len(table.frame) == 60
    assert table.frame["seed"].nunique() == 60
    assert "60 values in log bins" in table.notes[0]


def test_one_study_per_context_becomes_that_context() -> None:
    studies = {"CartPole": grid_study(), "Acrobot": grid_study()}
    table = from_optuna(studies, params=["lr"], context=["env"], across="task", seed="seed")
    assert table.contexts == ("env", "task")
    assert set(table.frame["task"]) == {"CartPole", "Acrobot"}
    assert len(table.frame) == 24


def test_trials_that_have_not_ended_are_left_out_with_a_note() -> None:
    study = grid_study()
    study.enqueue_trial({"lr": 0.5})
    table = from_optuna(study, params=["lr"], context=["env"], seed="seed")
    assert table.notes[0] == "1 trials that have not ended were left out"
    assert len(table.frame) == 12


def test_a_trial_that_failed_before_it_drew_anything_is_noted() -> None:
    study = grid_study()
    study.add_trial(optuna.trial.create_trial(state=optuna.trial.TrialState.FAIL))
    table = from_optuna(study, params=["lr"], context=["env"], seed="seed", design="grid")
    assert len(table.frame) == 12
    assert any("1 trials ended before" in note for note in table.notes)


def test_misuse_is_refused_with_the_remedy() -> None:
    study = grid_study()
    with pytest.raises(MissingColumnError, match="'momentum'"):
        from_optuna(study, params=["momentum"], context=["env"])
    with pytest.raises(ValueError, match="across"):
        from_optuna({"A": study}, params=["lr"])
    with pytest.raises(ValueError, match="context"):
        from_optuna(study, params=["lr"])
    with pytest.raises(ValueError, match="objective 1"):
        from_optuna(study, params=["lr"], context=["env"], objective=1)
    with pytest.raises(SourceFormatError, match="directions"):
        from_optuna({"a": study, "b": grid_study("minimize")}, params=["lr"], across="task")
    with pytest.raises(SourceFormatError, match="got str"):
        from_optuna("study.db", params=["lr"], context=["env"])
    with pytest.raises(EmptyInputError, match="no trial"):
        from_optuna(optuna.create_study(), params=["lr"], context=["env"])
