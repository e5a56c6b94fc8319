"""Exports made from runs that the real wandb library logged offline."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from hpreliability.errors import EmptyInputError, MissingColumnError, SourceFormatError
from hpreliability.readers import from_wandb_export

wandb = pytest.importorskip("wandb")

DEFAULT = {"optim.lr": 0.1, "n_step": 1}


def records(log: Path) -> Iterator[Any]:
    """Records of wandb's own offline log: protobufs in a LevelDB log of 32 KiB blocks."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, part = log.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = Record()
            record.ParseFromString(part)
            part = b""
            yield record


def put(tree: dict[str, Any], update: Any) -> None:
    keys = list(update.nested_key) or [update.key]
    for key in keys[:-1]:
        tree = tree.setdefault(key, {})
    tree[keys[-1]] = json.loads(update.value_json)


def logged(log: Path) -> dict[str, Any]:
    """What `wandb.Api` would give of a run: name, state, config and summary."""
    run: dict[str, Any] = {"config": {}, "summary": {}, "state": "crashed"}
    for record in records(log):
        if record.HasField("run"):
            run["name"] = record.run.run_id
            for update in record.run.config.update:
                put(run["config"], update)
        for update in record.summary.update:
            put(run["summary"], update)
        if record.HasField("exit"):
            run["state"] = "failed" if record.exit.exit_code else "finished"
    run["config"] = {key: x for key, x in run["config"].items() if not key.startswith("_")}
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    root = tmp_path_factory.mktemp("wandb")
    settings = wandb.Settings(silent=True, x_disable_stats=True, x_disable_meta=True)
    for lr, n_step in [(0.1, 1), (0.01, 1), (0.1, 5)]:
        for env in ("CartPole", "Acrobot"):
            config = {"optim": {"lr": lr}, "n_step": n_step, "env": env, "seed": 0}
            with wandb.init(
                mode="offline", project="p", dir=str(root), config=config, settings=settings
            ) as run:
                run.log({"return": 1.0})
                run.log({"return": lr + n_step})
                if (n_step, env) == (5, "Acrobot"):
                    run.log({"return": float("nan")})
    wandb.teardown()  # the last log is complete only when its writer has ended
    return [logged(log) for log in sorted(root.glob("wandb/offline-run-*/*.wandb"))]


@pytest.fixture
def scripted(runs: list[dict[str, Any]], tmp_path: Path) -> Path:
    """The form of the documented export script: dicts in cells."""
    pd.DataFrame(runs).to_csv(tmp_path / "project.csv")
    return tmp_path / "project.csv"


@pytest.fixture
def from_page(runs: list[dict[str, Any]], tmp_path: Path) -> Path:
    """The form of the web page's runs table: a column per key."""
    rows = [
        {"Name": run["name"], "State": run["state"]}
        | pd.json_normalize(run["config"]).iloc[0].to_dict()
        | {key: x for key, x in run["summary"].items() if not key.startswith("_")}
        for run in runs
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "wandb_export.csv", index=False)
    return tmp_path / "wandb_export.csv"


@pytest.mark.parametrize("form", ["scripted", "from_page"])
def test_both_forms_give_the_runs_that_were_logged(
    form: str, request: pytest.FixtureRequest
) -> None:
    file = request.getfixturevalue(form)
    table = from_wandb_export(file, params=[*DEFAULT], score="return", default=DEFAULT)
    assert table.values("optim.lr") == ("0.01", "0.1")
    assert table.values("n_step") == ("1", "5")
    assert len(table.frame) == 2 * 2 * 2
    cell = table.select(hyperparameter="optim.lr", value="0.01", env="CartPole").frame
    assert cell["score"].tolist() == [1.01]
    failed = table.frame[table.frame["score"].isna()]
    assert failed[["hyperparameter", "value", "env"]].to_numpy().tolist() == [
        ["n_step", "5", "Acrobot"]
    ]


def test_runs_that_did_not_finish_are_failed_runs_with_a_note(
    runs: list[dict[str, Any]], tmp_path: Path
) -> None:
    pd.DataFrame([runs[0] | {"state": "crashed"}, *runs[1:]]).to_csv(tmp_path / "r.csv")
    table = from_wandb_export(
        tmp_path / "r.csv", params=[*DEFAULT], score="return", design="grid", seed=None
    )
    assert table.select(seed=runs[0]["name"]).frame["score"].isna().all()
    assert table.notes[0] == "1 runs count as failed, by their state: {'crashed': 1}"


def test_parquet_exports_with_dicts_are_read(runs: list[dict[str, Any]], tmp_path: Path) -> None:
    frame = pd.DataFrame(runs)
    frame[["config", "summary"]] = frame[["config", "summary"]].map(json.dumps)
    frame.to_parquet(tmp_path / "r.parquet")
    table = from_wandb_export(
        tmp_path / "r.parquet", params=[*DEFAULT], score="return", default=DEFAULT
    )
    assert len(table.frame) == 8


def test_a_cell_that_is_not_a_dict_is_refused_with_its_row(scripted: Path) -> None:
    frame = pd.read_csv(scripted)
    frame.loc[3, "config"] = "__import__('os').system('true')"
    frame.to_csv(scripted)
    with pytest.raises(SourceFormatError, match="row 3, config"):
        from_wandb_export(scripted, params=[*DEFAULT], score="return", default=DEFAULT)


def test_an_unknown_metric_lists_the_columns(scripted: Path) -> None:
    with pytest.raises(MissingColumnError, match=r"'reward'.*'return'"):
        from_wandb_export(scripted, params=[*DEFAULT], score="reward", default=DEFAULT)


def test_an_empty_export_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_bytes(b"")
    with pytest.raises(EmptyInputError, match=r"r\.csv"):
        from_wandb_export(tmp_path / "r.csv", params=["lr"], score="return")
