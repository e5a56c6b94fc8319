"""``vineppo bench``: the exact comparison of gradient estimators, by families of trees."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.table import Table

from vineppo.commands.checking import made, refuse_unknown
from vineppo.commands.output import bar
from vineppo.commands.recipe import overridden, read_content
from vineppo.errors import InvalidInputError, MissingExtraError, at_least
from vineppo.experiments.exact import FAMILIES, Result, tree_cell

RESULTS: Final = "results.json"


@dataclass(frozen=True)
class ExactBench:
    """What is compared on which trees.

    Attributes:
        families: of trees, by their names in :data:`vineppo.experiments.exact.FAMILIES`.
        seeds: trees of each family.
        group: responses of a group.
        batches: sampled estimates that cosines are means of.
    """

    families: tuple[str, ...] = tuple(FAMILIES)
    seeds: int = 1
    group: int = 8
    batches: int = 200

    def __post_init__(self) -> None:
        refuse_unknown("families: ", self.families, tuple(FAMILIES))
        if not self.families:
            raise InvalidInputError("families: expected at least one, got none")
        for name, least in (("seeds", 1), ("group", 2), ("batches", 2)):
            at_least(name, getattr(self, name), least)


def read(path: Path | None, overrides: Sequence[str] = ()) -> ExactBench:
    """The comparison that a file asks for.

    Args:
        path: YAML; None takes the defaults.
        overrides: such as ``seeds=3``.

    Raises:
        InvalidInputError: no such file, an unknown name, or a value that does not fit.
    """
    content: dict[str, Any] = {} if path is None else read_content(path)
    for word in overrides:
        content = overridden(content, word)
    return made(ExactBench, content, "bench")


def results(bench: ExactBench, out: Path | None = None) -> list[Result]:
    """Run the comparison.

    Args:
        bench: what is compared.
        out: a folder for ``results.json`` and figures; None writes nothing.

    Raises:
        InvalidInputError: ``out`` is a file.
        MissingExtraError: figures need matplotlib.
    """
    if out is not None:
        if out.exists() and not out.is_dir():
            raise InvalidInputError(f"--out: expected a folder, got the file {out}")
        require_matplotlib()
    arguments: list[dict[str, Any]] = [
        {"family": family, "seed": seed, "group": bench.group, "batches": bench.batches}
        for family in bench.families
        for seed in range(bench.seeds)
    ]
    found: list[Result] = []
    with bar("trees", len(arguments), "tree") as shown:
        for given in arguments:
            found.append(tree_cell(**given))
            shown.update()
    if out is not None:
        _write(found, out)
    return found


def tables(found: Sequence[Result]) -> list[Table]:
    """The tables of the bench, for a terminal."""
    from vineppo.experiments.exact_exhibits import tables as of_results

    made_tables = []
    for one in of_results(found):
        shown = Table(title=one.title, title_justify="left")
        for place, column in enumerate(one.columns):
            shown.add_column(column, no_wrap=place == 0)
        for row in one.rows:
            shown.add_row(*map(str, row))
        shown.caption = one.caption
        made_tables.append(shown)
    return made_tables


def require_matplotlib() -> None:
    """Refuse to begin what would end without its figures.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401 - asked for before any work
    except ImportError as error:
        raise MissingExtraError("matplotlib", "experiments") from error


def _write(found: Sequence[Mapping[str, Any]], out: Path) -> None:
    from decapod.writing import write_text
    from vineppo.experiments.drawing import standalone
    from vineppo.experiments.exact_exhibits import figures

    drawn = figures(found)
    out.mkdir(parents=True, exist_ok=True)
    for figure in drawn:
        name = "-".join("".join(c if c.isalnum() else " " for c in figure.title).lower().split())
        write_text(out / f"{name}.svg", standalone(figure))
    write_text(out / RESULTS, json.dumps([dict(result) for result in found], indent=1) + "\n")
