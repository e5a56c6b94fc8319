"""`sbattn-bench`: time, rate, live tiles and memory of the operator and its peers, in one run."""

from __future__ import annotations

import sys
from dataclasses import asdict

from sbattn.benchmarking.comparison import Options, Row, measure
from sbattn.benchmarking.recording import record
from sbattn.errors import InvalidInputError, MissingExtraError, UnsupportedError


def main(arguments: list[str] | None = None) -> None:
    """The command `sbattn-bench`."""
    try:
        import tyro
        from rich.console import Console
        from rich.table import Table
    except ModuleNotFoundError as error:
        raise MissingExtraError(error.name or "tyro", "bench") from error
    console = Console()
    try:
        options = tyro.cli(Options, args=arguments, prog="sbattn-bench", description=__doc__)
    except InvalidInputError as error:
        sys.exit(f"sbattn-bench: {error}")
    rows: list[Row] = []
    begun, total = 0, len(options.problems()) * len(options.passes)
    with console.status("timing") as status:
        try:
            for problem, passes, found in measure(options, console.print):
                begun += 1
                status.update(f"{begun} of {total} done")
                backward = "forward" if passes == "forward" else "forward and backward"
                title = f"{problem.length} tokens, {problem.logits} logits, {backward}"
                table = Table("arm", "ms", "TFLOP/s", "live", "MiB", "× SDPA", title=title)
                for row in found:
                    table.add_row(*_cells(row))
                console.print(table)
                rows += found
        except UnsupportedError as error:
            sys.exit(f"sbattn-bench: {error}")
        except KeyboardInterrupt:
            console.print("stopped; what was timed is above")
    if options.out is not None and rows:
        settings = {key: value for key, value in asdict(options).items() if key != "out"}
        record(options.out, {"options": settings, "rows": [asdict(row) for row in rows]})
        console.print(f"written to {options.out}")


def _cells(row: Row) -> tuple[str, ...]:
    beside = ""
    if row.beside_sdpa is not None:
        beside = "{:.2f} [{:.2f}, {:.2f}]".format(*row.beside_sdpa)
    return (
        row.arm,
        f"{row.milliseconds:.2f}",
        f"{row.teraflops:.3g}",
        "" if row.live is None else f"{row.live:.3f}",
        "" if row.peak_bytes is None else f"{row.peak_bytes / 1024**2:.0f}",
        beside,
    )
