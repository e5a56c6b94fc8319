"""A picture of a predicted run: who works on which round when, and where the gaps are.

SVG text, made without any package. It has no ids and no script, takes the colour of the text around
it when it stands in a page, and follows the reader's light or dark theme when it is a file.
"""

from __future__ import annotations

import math

from asyncrlhf.errors import InvalidInputError
from asyncrlhf.schedule import Event, Kind, Speedup, Stage, Timeline

__all__ = ["draw", "draw_comparison"]

# Each has 4.5 : 1 to white numbers on it, and 3 : 1 to a white and to a dark page. Those that can
# meet in one row differ in more than red against green.
_FILLS: dict[Kind, str] = {
    "generate": "#2a72bd",
    "score": "#167f79",
    "train": "#b9531d",
    "publish": "#8a57b0",
}
_NAMES: dict[Kind, str] = {
    "generate": "generate",
    "score": "score",
    "train": "train",
    "publish": "publish weights",
}
_WIDTH = 840.0
_LEFT, _RIGHT = 66.0, 82.0  # beside the rows: who works, and how much of the time not
_PLOT = _WIDTH - _LEFT - _RIGHT
_ROW, _BETWEEN_ROWS = 30.0, 16.0
_HEADING, _BETWEEN_PANELS = 26.0, 26.0
_AXIS, _LEGEND = 34.0, 28.0
_DIGIT = 6.5  # about its width
_TICKS = 8
# In a page, the page's own colour of text wins: there, `svg` is not the root.
_FONT = "system-ui,-apple-system,'Segoe UI',Helvetica,Arial,sans-serif"
_STYLE = "svg:root{color:#1d1c1a}@media (prefers-color-scheme:dark){svg:root{color:#ece8df}}"


def draw(timeline: Timeline, rounds: int = 8) -> str:
    """The first rounds of a run as SVG.

    A row per stage; blocks carry the number of their round, and an arrow leads from the publication
    of weights to the generation that is the first to use them. Idle fractions are those of the
    steady state.

    Args:
        timeline: of :func:`asyncrlhf.schedule.simulate`.
        rounds: how many to show, counted by the learner.

    Raises:
        InvalidInputError: fewer than one round, or rounds that take no time.
    """
    return _picture([timeline], rounds)


def draw_comparison(baseline: Timeline, *others: Timeline, rounds: int = 8) -> str:
    """The first rounds of several runs, one below the other on one axis of time, as SVG.

    The headings of `others` say how much faster all their rounds are than those of `baseline`.

    Args:
        baseline: such as the synchronous schedule.
        others: as many optimizer steps each.
        rounds: how many to show.

    Raises:
        InvalidInputError: as :func:`draw`, or another number of steps.
    """
    return _picture([baseline, *others], rounds)


def _picture(timelines: list[Timeline], rounds: int) -> str:
    if rounds < 1:
        raise InvalidInputError(f"rounds: expected at least 1, got {rounds}")
    ends = [timeline.round_ends[:rounds][-1] for timeline in timelines]
    longest = max(ends)
    if min(ends) <= 0:
        raise InvalidInputError("timeline: expected rounds that take time, got none in 0 s")
    divisor, unit = _unit(longest)
    scale = _PLOT / longest
    ticks = {value: _LEFT + value * divisor * scale for value in _ticks(longest / divisor)}

    body: list[str] = []
    sentences: list[str] = []
    y = 0.0
    for index, (timeline, end) in enumerate(zip(timelines, ends, strict=True)):
        total = len(timeline.round_ends)
        summary = f"{_rounds(min(rounds, total))} in {end / divisor:.3g} {unit}"
        if index:
            summary += f" · all {total}: " if rounds < total else " · "
            summary += _gain(timeline.speedup_over(timelines[0]))
        y += _BETWEEN_PANELS if index else 0.0
        body += _grid(ticks, y + _HEADING, y + _height(timeline))
        body += _panel(timeline, end, scale, y, summary)
        sentences.append(_sentence(timeline, summary))
        y += _height(timeline)
    body += [*_axis(ticks, y, unit), *_legend(timelines, y + _AXIS)]
    height = y + _AXIS + _LEGEND
    title = "Timeline: " + " against ".join(_name(timeline).lower() for timeline in timelines)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" role="img" viewBox="0 0 {_WIDTH:g} '
            f'{height:g}" width="{_WIDTH:g}" height="{height:g}" fill="currentColor" '
            f'font-family="{_FONT}" font-size="12" style="max-width:100%;height:auto">',
            f"<title>{title}</title>",
            f"<desc>{' '.join(sentences)}</desc>",
            f"<style>{_STYLE}</style>",
            *body,
            "</svg>\n",
        ]
    )


def _name(timeline: Timeline) -> str:
    ahead = timeline.schedule.ahead
    if not ahead:
        return "Synchronous"
    return f"Asynchronous, {_rounds(ahead)} ahead"


def _rounds(count: int) -> str:
    return f"{count} round{'s' if count > 1 else ''}"


def _gain(gain: Speedup) -> str:
    less = "less" if gain.time_reduction >= 0 else "more"
    return f"{gain.ratio:.2f}× the speed, {abs(gain.time_reduction):.0%} {less} time"


def _sentence(timeline: Timeline, summary: str) -> str:
    idle = ", ".join(
        f"the {stage} {timeline.idle(stage, steady=True):.0%}" for stage in timeline.stages
    )
    return f"{_name(timeline)}: {summary}. Idle in steady state: {idle}."


def _height(timeline: Timeline) -> float:
    rows = len(timeline.stages)
    return _HEADING + rows * _ROW + (rows - 1) * _BETWEEN_ROWS


def _panel(timeline: Timeline, end: float, scale: float, top: float, summary: str) -> list[str]:
    rows: dict[Stage, float] = {
        stage: top + _HEADING + index * (_ROW + _BETWEEN_ROWS)
        for index, stage in enumerate(timeline.stages)
    }
    parts = [
        _text(_LEFT, top + 14, _name(timeline), 'font-weight="600"'),
        _text(_LEFT + _PLOT, top + 14, summary, 'text-anchor="end" fill-opacity="0.75"'),
    ]
    for stage, y in rows.items():
        idle = timeline.idle(stage, steady=True)
        parts += [
            _text(_LEFT - 10, y + _ROW / 2 + 4, stage, 'text-anchor="end"'),
            f'<rect x="{_LEFT:g}" y="{y:g}" width="{end * scale:.2f}" height="{_ROW:g}" rx="3" '
            'fill-opacity="0.08"/>',
            _text(_LEFT + _PLOT + 12, y + _ROW / 2 + 4, f"{idle:.0%} idle", 'fill-opacity="0.75"'),
        ]
    parts += _arrows(timeline, end, scale, rows["learner"], rows["actor"] + _ROW)
    for event in timeline.events:
        if event.start < end and event.end > event.start:
            parts += _block(event, end, scale, rows[event.stage])
    return parts


def _block(event: Event, end: float, scale: float, y: float) -> list[str]:
    x = _LEFT + event.start * scale
    width = (min(event.end, end) - event.start) * scale
    # Half a pixel on either side keeps neighbours apart; slivers stay visible.
    inner = max(width - 1, min(width, 0.8))
    tip = (
        f"round {event.round}: {_NAMES[event.kind]}, {event.start:.4g} s to {event.end:.4g} s, "
        f"version {event.version}"
    )
    parts = [
        f'<rect x="{x + (width - inner) / 2:.2f}" y="{y:g}" width="{inner:.2f}" '
        f'height="{_ROW:g}" rx="{min(3.0, inner / 3):.2g}" fill="{_FILLS[event.kind]}">'
        f"<title>{tip}</title></rect>"
    ]
    label = str(event.round)
    if width > _DIGIT * len(label) + 3.5:
        parts.append(
            _text(
                x + width / 2,
                y + _ROW / 2 + 4,
                label,
                'text-anchor="middle" font-size="11" fill="white" pointer-events="none"',
            )
        )
    return parts


def _arrows(
    timeline: Timeline, end: float, scale: float, learner: float, actor: float
) -> list[str]:
    published = {event.version: event.end for event in timeline.of_kind("publish")}
    parts = []
    used = 0
    for event in timeline.of_kind("generate"):
        if event.version > used and event.start < end:
            used = event.version
            x0, x1 = (_LEFT + t * scale for t in (published[used], event.start))
            middle = (learner + actor) / 2
            parts.append(
                f'<path d="M{x0:.2f} {learner:g}C{x0:.2f} {middle:g} {x1:.2f} {middle:g} '
                f'{x1:.2f} {actor + 4:g}" fill="none" stroke="currentColor" '
                'stroke-opacity="0.6"/>'
                f'<path d="M{x1:.2f} {actor + 1:g}l3 5h-6z" fill-opacity="0.6"/>'
            )
    return parts


def _grid(ticks: dict[float, float], top: float, bottom: float) -> list[str]:
    return [
        f'<path d="M{x:.2f} {top - 4:g}V{bottom + 4:g}" stroke="currentColor" '
        'stroke-opacity="0.15"/>'
        for x in ticks.values()
    ]


def _axis(ticks: dict[float, float], bottom: float, unit: str) -> list[str]:
    return [
        _text(
            x,
            bottom + 20,
            f"{value:g}" if value else f"0 {unit}",
            'text-anchor="middle" font-size="11" fill-opacity="0.75"',
        )
        for value, x in ticks.items()
    ]


def _legend(timelines: list[Timeline], top: float) -> list[str]:
    drawn = {
        event.kind for timeline in timelines for event in timeline.events if event.end > event.start
    }
    parts = []
    x = _LEFT
    for kind, fill in _FILLS.items():
        if kind in drawn:
            parts += [
                f'<rect x="{x:g}" y="{top + 4:g}" width="12" height="12" rx="2.5" fill="{fill}"/>',
                _text(x + 18, top + 14, _NAMES[kind]),
            ]
            x += 18 + 6.2 * len(_NAMES[kind]) + 24
    if any(timeline.of_kind("generate")[-1].version for timeline in timelines):
        parts += [
            f'<path d="M{x + 4:g} {top + 17:g}V{top + 8:g}" stroke="currentColor" '
            f'stroke-opacity="0.6"/><path d="M{x + 4:g} {top + 3:g}l3 5h-6z" fill-opacity="0.6"/>',
            _text(x + 14, top + 14, "first use of new weights"),
        ]
    return parts


def _text(x: float, y: float, content: str, attributes: str = "") -> str:
    return f'<text x="{x:.4g}" y="{y:g}" {attributes}>{content}</text>'


def _unit(seconds: float) -> tuple[float, str]:
    for least, divisor, unit in ((7200.0, 3600.0, "h"), (180.0, 60.0, "min"), (0.5, 1.0, "s")):
        if seconds >= least:
            return divisor, unit
    return 1e-3, "ms"


def _ticks(span: float) -> list[float]:
    """Multiples of the smallest 1, 2 or 5 times a power of ten that gives `_TICKS` or fewer."""
    power = 10.0 ** math.floor(math.log10(span / _TICKS))
    step = next(m * power for m in (1, 2, 5, 10) if span / (m * power) <= _TICKS)
    return [index * step for index in range(math.floor(span / step * (1 + 1e-9)) + 1)]
