"""HTML pages in the report's look, which load nothing from outside."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from jinja2 import Environment, PackageLoader, StrictUndefined

from decapod._version import __version__
from decapod.claims import Cell, DataTable, Figure
from decapod.report import palette
from decapod.report.figures import themed_svg


@dataclass(frozen=True)
class Section:
    """A part of a page: paragraphs of plain text, then figures, then tables."""

    title: str
    text: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[DataTable] = ()


def render_page(title: str, lead: str, sections: Sequence[Section], *, kicker: str = "") -> str:
    """A self-contained HTML page.

    Args:
        title: the heading.
        lead: one paragraph under it.
        sections: in reading order.
        kicker: a few words above the heading, such as the library's name.

    Raises:
        ValueError: a figure's SVG is not fit for a page.
    """
    return render("page.html.j2", title=title, lead=lead, sections=sections, kicker=kicker)


def render(template: str, **context: Any) -> str:
    """Render one of the package's templates with the page's styles and scripts in it."""
    environment = Environment(
        loader=PackageLoader("decapod.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    environment.filters["duration"] = duration
    environment.globals.update(
        inline_figure=_inline_figure,
        table_text=table_text,
        environment_rows=environment_rows,
        version=__version__,
        palette_css=palette.stylesheet(),
    )
    return environment.get_template(template).render(**context)


def _inline_figure(figure: Figure, prefix: str) -> str:
    return themed_svg(figure.svg, prefix=f"{prefix}-", label=figure.alt)


MINUS: Final = "\N{MINUS SIGN}"


def number(value: float, decimals: int | None = None) -> str:
    """A number for people: four significant digits unless ``decimals`` is given, a real minus."""
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else f"{MINUS}∞"
    if decimals is None:
        if float(value).is_integer() and abs(value) < 1e15:
            text = f"{int(value):,}"
        elif 1e-4 <= abs(value) < 1e6:
            text = f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
        else:
            text = f"{value:.3g}"
    else:
        text = f"{value:,.{decimals}f}"
    text = text.replace("-", MINUS)
    return text.removeprefix(MINUS) if not text.strip(f"{MINUS}0.,") else text


def interval_decimals(low: float, high: float) -> int | None:
    """Decimals that show an interval's width with two digits; None where it has no finite width."""
    width = high - low
    if not math.isfinite(width) or width <= 0:
        return None
    return min(max(1 - math.floor(math.log10(width)), 0), 6)


def duration(seconds: float) -> str:
    """Seconds as "8.2 s", "48 s", "3 min 20 s" or "2 h 5 min"."""
    if seconds < 0.05:
        return "under 0.1 s"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


def environment_rows(environment: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What :func:`decapod.runs.environment` recorded, as headings and text."""
    rows = []
    for key, value in environment.items():
        if key == "dirty" or value is None:
            continue
        if key == "commit" and environment.get("dirty"):
            text = f"{value} with uncommitted changes"
        elif isinstance(value, Mapping):
            text = ", ".join(f"{name} {version or 'absent'}" for name, version in value.items())
        else:
            text = str(value)
        rows.append((key.replace("_", " ").capitalize().replace("Cpu", "CPU"), text))
    return rows


@dataclass(frozen=True)
class TableText:
    """A table as text: which columns hold numbers, and the rows' cells."""

    columns: tuple[str, ...]
    numeric: tuple[bool, ...]
    rows: tuple[tuple[str, ...], ...]


def table_text(table: DataTable) -> TableText:
    """Format a table's cells.

    The numbers of a column share their decimals: as many as four digits of the largest need.
    """
    columns = [[row[i] for row in table.rows] for i in range(len(table.columns))]
    return TableText(
        columns=tuple(table.columns),
        numeric=tuple(_is_numeric(cells) for cells in columns),
        rows=tuple(zip(*(_column(cells) for cells in columns), strict=True)),
    )


def _is_numeric(cells: Sequence[Cell]) -> bool:
    numbers = [isinstance(c, int | float) and not isinstance(c, bool) for c in cells]
    return any(numbers) and all(n or c is None for n, c in zip(numbers, cells, strict=True))


def _column(cells: Sequence[Cell]) -> list[str]:
    decimals: int | None = None
    if _is_numeric(cells):
        finite = [float(c) for c in cells if isinstance(c, int | float) and math.isfinite(c)]
        largest = max((abs(x) for x in finite), default=0.0)
        if all(x.is_integer() for x in finite):
            decimals = 0
        elif 1e-2 <= largest < 1e6:
            decimals = max(3 - max(math.floor(math.log10(largest)), 0), 0)
    return [_cell(cell, decimals) for cell in cells]


def _cell(cell: Cell, decimals: int | None) -> str:
    if cell is None:
        return "–"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    return cell if isinstance(cell, str) else number(cell, decimals)
