from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

import hpreliability
from hpreliability.errors import MissingColumnError
from hpreliability.published import (
    AGENT_NAMES,
    DISPLAY_NAMES,
    TOLERANCE,
    compare,
    load_published,
    load_scores,
    recompute,
)
from hpreliability.scoring import THCTable
from hpreliability.table import Table


@pytest.fixture(scope="module")
def scores() -> Table:
    return load_scores()


@pytest.fixture(scope="module")
def rebuilt(scores: Table) -> THCTable:
    return recompute(scores)


def test_all_41_published_cells_are_rebuilt_from_the_public_scores(rebuilt: THCTable) -> None:
    cells = compare(rebuilt, load_published())
    assert len(cells) == 41
    assert cells["match"].all(), cells[~cells["match"]]


def test_vendored_scores_are_complete(scores: Table) -> None:
    runs = scores.frame.groupby(["agent", "hyperparameter", "value"])
    assert len(scores.frame) == 26_130
    assert set(runs["env"].nunique()) == {26}
    assert set(runs.size()) == {26 * 5}
    assert scores.frame["score"].notna().all()


def test_every_published_name_has_one_key_and_every_key_one_name(scores: Table) -> None:
    assert set(scores.hyperparameters) == set(DISPLAY_NAMES)
    assert len(set(DISPLAY_NAMES.values())) == len(DISPLAY_NAMES)
    assert set(load_published()["name"]) == set(DISPLAY_NAMES.values())
    assert set(scores.frame["agent"]) == set(AGENT_NAMES)


@pytest.mark.parametrize("column", ["score", "std"])
def test_a_deviation_just_above_the_tolerance_is_a_mismatch(rebuilt: THCTable, column: str) -> None:
    frame = rebuilt.frame.copy()
    frame.loc[7, column] += 2 * TOLERANCE
    cells = compare(replace(rebuilt, frame=frame), load_published())
    assert (~cells["match"]).sum() == 1


def test_a_cell_that_one_side_lacks_is_a_mismatch_and_not_left_out(rebuilt: THCTable) -> None:
    short = replace(rebuilt, frame=rebuilt.frame.drop(index=3))
    assert compare(short, load_published())["match"].tolist().count(False) == 1
    assert compare(rebuilt, load_published().drop(index=3))["match"].tolist().count(False) == 1


def test_an_altered_run_changes_its_cell_alone(scores: Table) -> None:
    frame = scores.frame.copy()
    chosen = (frame["agent"] == "DER") & (frame["hyperparameter"] == "gammas")
    frame.loc[chosen & (frame["value"] == "0.99"), "score"] = -5.0
    cells = compare(recompute(replace(scores, frame=frame)), load_published())
    assert cells.loc[~cells["match"], ["agent", "hyperparameter"]].to_numpy().tolist() == [
        ["DER", "gammas"]
    ]


def test_scores_without_the_published_contexts_are_refused() -> None:
    table = hpreliability.table.from_frame(
        pd.DataFrame(
            {"hyperparameter": "x", "value": ["1", "2"], "env": "e", "seed": 0, "score": 0}
        )
    )
    with pytest.raises(MissingColumnError, match="regime"):
        recompute(table)


def test_only_the_comparison_can_reach_the_published_numbers() -> None:
    package = Path(hpreliability.__file__).parent
    naming = [f.name for f in package.rglob("*.py") if "published_thc" in f.read_text("utf-8")]
    assert naming == ["published.py"]


def test_symmetric_ties_change_25_cells_and_alone_survive_negated_scores(
    scores: Table, rebuilt: THCTable
) -> None:
    # The numbers that the documentation gives for the two tie conventions on the public scores.
    cells = rebuilt.frame
    gap = (cells["symmetric"] - cells["score"]).abs()
    assert (gap > TOLERANCE).sum() == 25
    widest = cells.loc[gap.idxmax()]
    assert (widest["agent"], widest["hyperparameter"]) == ("DER", "CNN_widths")
    assert (widest["score"], widest["symmetric"]) == pytest.approx((0.325, 0.425))
    negated = recompute(
        replace(scores, frame=scores.frame.assign(score=-scores.frame["score"]))
    ).frame
    assert ((cells["score"] - negated["score"]).abs() > TOLERANCE).sum() == 23
    assert ((cells["symmetric"] - negated["symmetric"]).abs() > TOLERANCE).sum() == 0
