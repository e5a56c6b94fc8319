"""Weights & Biases run tables, exported to a file: no network, no account."""

from __future__ import annotations

import ast
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from hpreliability.errors import MissingColumnError, SourceFormatError
from hpreliability.readers.designs import Binning, Design, flattened, from_runs
from hpreliability.readers.files import Source, find_files, read_frame
from hpreliability.table import Table

_RUN_NAMES = ("ID", "id", "Name", "name")
_STATES = ("State", "state")


def from_wandb_export(
    path: Source | Iterable[Source],
    *,
    params: Sequence[str],
    score: str,
    context: Sequence[str] = ("env",),
    seed: str | None = "seed",
    design: Design = "one_at_a_time",
    default: Mapping[str, object] | None = None,
    bins: int = 4,
    binning: Binning = "quantile",
    min_count: int = 3,
) -> Table:
    """A table from exported runs, one row per run.

    Two forms are read, as CSV (or Parquet, JSON lines):

    * the runs table as the web page exports it: one column per config key and summary metric, and
      `Name`, `State`, …;
    * what the documented export script writes: columns `name`, `config` and `summary`, the last two
      with a Python or JSON dict in each cell. Nested keys become `outer.inner`.

    Args:
        path: file, pattern or several.
        params: the hyper-parameters, by config key.
        score: the summary metric.
        context: config keys that are contexts.
        seed: config key of the seed; None: each run is a run of its own, named by `ID` or `Name`.
        design, default, bins, binning, min_count: see `from_runs`.

    Runs whose state is there and is not `finished` are failed runs (score NaN), with a note: their
    summary is from before they ended. Charts exported as history are not read; log the number that
    counts to the summary, or use `read` with `step`.

    Raises:
        EmptyInputError, MissingColumnError, SourceFormatError, MissingExtraError: as `read`.
        HPReliabilityError: as `from_runs`.

    The tests make runs with the wandb library offline, read configs and summaries back from its
    own log, and write both forms from them; the web service itself is not part of the tests.
    """
    frames = [_expanded(read_frame(file), str(file)) for file in find_files(path)]
    frame = pd.concat(frames, ignore_index=True)
    contexts = (context,) if isinstance(context, str) else tuple(context)
    names = [name for name in _RUN_NAMES if name in frame.columns]
    if seed is None and not names:
        raise MissingColumnError(f"seed=None needs a column among {_RUN_NAMES} to name the runs")
    if score not in frame.columns:
        known = ", ".join(map(repr, frame.columns))
        raise MissingColumnError(f"no column {score!r}; there are: {known}")
    notes = []
    states = [name for name in _STATES if name in frame.columns]
    if states:
        ended = frame[states[0]].map(str).str.lower()
        failed = ~ended.isin(["finished"])
        if failed.any():
            frame[score] = frame[score].astype(object).where(~failed, float("nan"))
            counts = ended[failed].value_counts().to_dict()
            notes.append(f"{int(failed.sum())} runs count as failed, by their state: {counts}")
    table = from_runs(
        frame,
        params=params,
        design=design,
        default=default,
        context=contexts,
        seed=names[0] if seed is None else seed,
        score=score,
        bins=bins,
        binning=binning,
        min_count=min_count,
    )
    return replace(table, notes=(*notes, *table.notes))


def _expanded(frame: pd.DataFrame, file: str) -> pd.DataFrame:
    """The script's form with its dicts turned into columns; the page's form as it is."""
    if not {"config", "summary"} <= set(frame.columns):
        return frame
    rows: list[dict[str, Any]] = []
    for number, record in enumerate(frame.to_dict("records")):
        row = {str(key): cell for key, cell in record.items()}
        config = flattened(_mapping(row.pop("config"), f"{file}, row {number}, config"))
        summary = flattened(_mapping(row.pop("summary"), f"{file}, row {number}, summary"))
        both = sorted(set(config) & set(summary))
        if both:
            raise SourceFormatError(f"{file}, row {number}: in config and summary alike: {both}")
        rows.append(row | summary | config)
    # dtype=object: a gap in one run must not turn the integers of the others into floats.
    return pd.DataFrame(rows, dtype=object)


def _mapping(cell: object, where: str) -> Mapping[str, Any]:
    if isinstance(cell, Mapping):
        return cell
    try:
        tree = ast.parse(str(cell), mode="eval")
        content = ast.literal_eval(_Names().visit(tree))
    except (SyntaxError, ValueError, RecursionError) as error:
        raise SourceFormatError(f"{where}: expected a dict, got {str(cell)[:60]!r}") from error
    if not isinstance(content, dict):
        raise SourceFormatError(f"{where}: expected a dict, got {str(cell)[:60]!r}")
    return content


class _Names(ast.NodeTransformer):
    """Constants that a printed dict may spell as bare names, in Python or JSON."""

    constants: Mapping[str, bool | float | None] = {
        "nan": math.nan,
        "NaN": math.nan,
        "inf": math.inf,
        "Infinity": math.inf,
        "true": True,
        "false": False,
        "null": None,
    }

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if node.id not in self.constants:
            return node
        return ast.copy_location(ast.Constant(self.constants[node.id]), node)
