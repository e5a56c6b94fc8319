"""`asyncrlhf report`: what a run's folder says, as text and as a picture."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Final

from asyncrlhf.commands import run_folder
from asyncrlhf.commands.simulation import picture, timelines, write_svg
from asyncrlhf.measured import RoundTimes
from asyncrlhf.report import Report
from asyncrlhf.writing import whole_file

TEXT: Final = "report.md"
PICTURE: Final = "timeline.svg"
_CURVES: Final = ("reward", "eval_reward", "kl", "ess", "loss", "completions/mean_length")
_BARS: Final = "▁▂▃▄▅▆▇█"
_WIDTH: Final = 48


def write_report(folder: Path) -> str:
    """Write ``report.md`` and ``timeline.svg`` into a run's folder.

    Returns:
        The text.

    Raises:
        InvalidInputError: no run in the folder, or a damaged one.
        OSError: it cannot be written.
    """
    curve = run_folder.read_curve(folder)
    timing = run_folder.read(folder / run_folder.TIMING) or {"attempts": []}
    reports = [run_folder.report_of(attempt) for attempt in timing["attempts"]]
    result = run_folder.read(folder / run_folder.RESULT)
    lines = [f"# {folder.resolve().name}", ""]
    lines += _result(result) if result else ["The run is not done.", ""]
    for number, report in enumerate(reports, start=1):
        title = f"## Attempt {number}" if len(reports) > 1 else "## Times, staleness, sample size"
        lines += [title, "", "```text", str(report), "```", ""]
    if reports:
        lines += [_against_synchronous(reports[-1]), "", f"![The first rounds]({PICTURE})", ""]
        write_svg(folder / PICTURE, picture(_simulated(reports[-1]), 6))
    lines += ["## Learning curves", "", "```text", *_curves(curve), "```", ""]
    text = "\n".join(lines)
    with whole_file(folder / TEXT) as file:
        file.write(text.encode())
    return text


def _result(result: Mapping[str, Any]) -> list[str]:
    lines = [f"{result['steps']} optimizer steps in {result['train_seconds']:.1f} s.", ""]
    policy, reference = result.get("policy"), result.get("reference", {})
    if policy:
        lines += ["| at the end | policy | reference |", "|---|---|---|"]
        lines += [
            f"| {name} | {_number(value)} | "
            f"{_number(reference[name]) if name in reference else ''} |"
            for name, value in policy.items()
            if not name.endswith(("_se", "_low", "_high"))
        ]
        lines.append("")
    return lines


def _number(value: float) -> str:
    return f"{value:.4g}"


def _against_synchronous(report: Report) -> str:
    synchronous, ahead = _simulated(report)
    gain = ahead.speedup_over(synchronous)
    told = f"{gain.ratio:.2f}× the speed, {gain.time_reduction:.0%} less time"
    if report.schedule.ahead:
        return f"Against the same work done synchronously, by the timing model: {told}."
    return f"The same work one round ahead, by the timing model: {told}."


def _simulated(report: Report) -> list[Any]:
    """The synchronous schedule and the run's own (or one round ahead) at the median seconds."""
    g, r, t, w = (
        median(getattr(times, name) for times in report.times) for name in RoundTimes._fields[:4]
    )
    schedule = report.schedule
    return timelines(
        g=g, r=r, t=t, w=w, ahead=[schedule.ahead or 1], rounds=len(report.times),
        minibatches=schedule.minibatches, epochs=schedule.epochs, stages=report.scoring,
    )  # fmt: skip


def _curves(curve: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """One line per metric: where it began, a bar per stretch of steps, where it ended."""
    for name in _CURVES:
        values = [row[name] for row in curve if isinstance(row.get(name), int | float)]
        if values:
            yield (
                f"{name:<24}{values[0]:>10.4g}  {_bars(values):<{_WIDTH}}  {values[-1]:.4g}"
            ).rstrip()
    if curve:
        yield f"{'step':<24}{curve[0]['step']:>10}  {'':<{_WIDTH}}  {curve[-1]['step']}"


def _bars(values: Sequence[float]) -> str:
    if len(values) > _WIDTH:
        ends = [round(i * len(values) / _WIDTH) for i in range(_WIDTH + 1)]
        values = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(ends)]
    low, high = min(values), max(values)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((value - low) * scale)] for value in values)
