"""The authors' public scores, and the published THC table they must reproduce.

Both ship with the package; `data/README.md` says where they come from. Nothing that computes a
score reads the published table: it is opened by `compare`'s caller alone.
"""

from __future__ import annotations

import gzip
from importlib import resources
from typing import Final

import numpy as np
import pandas as pd

from hpreliability.errors import MissingColumnError
from hpreliability.scoring import THCTable, thc
from hpreliability.table import Table, from_frame

CONTEXTS: Final = ("regime", "agent", "env")
TOLERANCE: Final = 1e-9

# The public data and the published table call the same things by different names.
DISPLAY_NAMES: Final[dict[str, str]] = {
    "epsilon": "Adam's ε",
    "batch_sizes": "Batch Size",
    "layer_funct_conv": "Conv. Activation Function",
    "normalizations_convs": "Convolutional Normalization",
    "CNN_widths": "Convolutional Width",
    "layer_funct_dense": "Dense Activation Function",
    "normalizations": "Dense Normalization",
    "widths": "Dense Width",
    "gammas": "Discount Factor",
    "eps_train": "Exploration ε",
    "learning_rate": "Learning Rate",
    "min_replay_history": "Minimum Replay History",
    "num_atoms": "Number of Atoms",
    "convs": "Number of Convolutional Layers",
    "depths": "Number of Dense Layers",
    "replay_capacity": "Replay Capacity",
    "clip_rewards": "Reward Clipping",
    "target_update_periods": "Target Update Period",
    "update_horizon": "Update Horizon",
    "update_periods": "Update Period",
    "weightdecay": "Weight Decay",
}
AGENT_NAMES: Final[dict[str, str]] = {"DER": "DER", "DrQ_eps": "DrQ(ε)"}

_CELL: Final = ["regime", "agent", "hyperparameter"]


def load_scores() -> Table:
    """Final human-normalised scores of the paper's runs in the Atari-100k regime.

    Returns:
        A table with contexts regime, agent (DER, DrQ_eps) and env (26 games), five seeds per cell,
        21 hyper-parameters varied one at a time.

    Source: public data of arXiv 2406.17523, MIT licence; see `data/README.md`.
    """
    with _data("final_hns_100k.csv.gz").open("rb") as packed, gzip.open(packed) as file:
        # Value labels are text ("True", "4.0", "relu"): a guessed type would respell them.
        frame = pd.read_csv(file, dtype={"value": "str"})
    return from_frame(frame, context=CONTEXTS)


def load_published() -> pd.DataFrame:
    """The THC table on the paper's website: what a recomputation is held against.

    Returns:
        Columns regime, agent, hyperparameter (the data's key), name (as published), `thc_mean` and
        `thc_std` (sample standard deviation over values); one row per cell.

    Source: the paper's public website code; see `data/README.md`.
    """
    with _data("published_thc_100k.csv").open(encoding="utf-8") as file:
        frame = pd.read_csv(file)
    keys = {name: key for key, name in DISPLAY_NAMES.items()}
    frame = frame.rename(columns={"hyperparameter": "name"})
    frame.insert(2, "hyperparameter", frame["name"].map(keys))
    return frame


def recompute(table: Table) -> THCTable:
    """The paper's own THC of every regime, agent and hyper-parameter: games as contexts.

    Args:
        table: contexts regime, agent and env, as from `load_scores`.

    Raises:
        MissingColumnError: one of these contexts is missing.
    """
    missing = [c for c in CONTEXTS if c not in table.contexts]
    if missing:
        raise MissingColumnError(
            f"the published table is by regime and agent over env; the data lack {missing}"
        )
    return thc(
        table,
        over="env",
        by=_CELL,
        interval="mean_std",
        ties="paper",
        uncertainty=None,
        null=None,
    )


def compare(recomputed: THCTable, published: pd.DataFrame) -> pd.DataFrame:
    """Recomputed and published THC, cell by cell.

    Args:
        recomputed: from `recompute`.
        published: from `load_published`.

    Returns:
        One row per cell that is in either: regime, agent, hyperparameter, name, `score`,
        `published_score`, `std`, `published_std` and `match`. A cell matches when mean and standard
        deviation agree within `TOLERANCE`; one that either side lacks does not.
    """
    columns = {"thc_mean": "published_score", "thc_std": "published_std"}
    both = recomputed.frame[[*_CELL, "score", "std"]].merge(
        published[[*_CELL, *columns]].rename(columns=columns), on=_CELL, how="outer"
    )
    both.insert(3, "name", both["hyperparameter"].map(DISPLAY_NAMES))
    # NaN, where a side lacks the cell, compares as false.
    both["match"] = (np.abs(both["score"] - both["published_score"]) <= TOLERANCE) & (
        np.abs(both["std"] - both["published_std"]) <= TOLERANCE
    )
    return both[
        [*_CELL, "name", "score", "published_score", "std", "published_std", "match"]
    ].sort_values(_CELL, ignore_index=True)


def _data(name: str) -> resources.abc.Traversable:
    return resources.files("hpreliability") / "data" / name
