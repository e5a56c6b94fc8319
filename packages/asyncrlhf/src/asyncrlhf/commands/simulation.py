"""How long a run will take and who will wait, as a table and as a picture; imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from asyncrlhf.errors import InvalidInputError
from asyncrlhf.schedule import Layout, Timeline, simulate
from asyncrlhf.timeline import draw, draw_comparison
from asyncrlhf.writing import whole_file


def timelines(
    *,
    g: float,
    r: float,
    t: float,
    w: float,
    ahead: Sequence[int],
    rounds: int,
    minibatches: int,
    epochs: int,
    stages: Layout,
) -> list[Timeline]:
    """The synchronous schedule, and one for each number of rounds ahead; arguments as there.

    Raises:
        InvalidInputError: as :func:`asyncrlhf.schedule.simulate`.
    """
    return [
        simulate(
            g=g, r=r, t=t, w=w, rounds=rounds, ahead=d, minibatches=minibatches, epochs=epochs,
            stages=stages,
        )
        for d in (0, *(d for d in dict.fromkeys(ahead) if d))
    ]  # fmt: skip


def table(found: Sequence[Timeline], unit: str = "s") -> Table:
    """Makespan, round, idle time, staleness, and what is gained over the first.

    Args:
        found: the first is what the others are compared with.
        unit: of time.
    """
    first = found[0]
    shown = Table(title=f"{len(first.round_ends)} rounds", title_justify="left")
    shown.add_column("rounds ahead", justify="right")
    for name in (f"makespan [{unit}]", f"round [{unit}]"):
        shown.add_column(name.replace("[", r"\["), justify="right")
    for stage in first.stages:
        shown.add_column(f"{stage} idle", justify="right")
    for name in ("staleness mean", "max", "speed", "time"):
        shown.add_column(name, justify="right")
    for timeline in found:
        gain = timeline.speedup_over(first)
        shown.add_row(
            f"{timeline.schedule.ahead}" + ("" if timeline.schedule.ahead else " (sync)"),
            f"{timeline.makespan:.6g}",
            f"{timeline.round_time:.4g}",
            *(f"{timeline.idle(stage, steady=True):.0%}" for stage in timeline.stages),
            f"{timeline.schedule.mean_staleness:g}",
            f"{timeline.schedule.max_staleness}",
            f"{gain.ratio:.2f}×",
            f"{-gain.time_reduction:+.0%}" if timeline is not first else "",
        )
    return shown


def picture(found: Sequence[Timeline], rounds: int) -> str:
    """SVG of the first rounds, one timeline below the other."""
    return draw(found[0], rounds) if len(found) == 1 else draw_comparison(*found, rounds=rounds)


def write_svg(path: Path, text: str) -> None:
    """Write a picture, whole or not at all.

    Raises:
        InvalidInputError: another ending than .svg.
        OSError: it cannot be written.
    """
    if path.suffix != ".svg":
        raise InvalidInputError(f"svg: expected a name that ends in .svg, got {path.name!r}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write(text.encode())
