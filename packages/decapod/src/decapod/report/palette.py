"""The report's colours, in one place: figures use the light ones, the page swaps in the dark.

Draw a figure with the names below, e.g. ``color=palette.SERIES[0]`` or ``palette.MUTED``.
:func:`decapod.report.svg_from_matplotlib` turns each of these exact hex values into a CSS variable,
so that one SVG serves light and dark. Every colour but ``GRID`` has a contrast of at least 4.5:1 to
``SURFACE`` in both themes, so text may use any of them.
"""

from __future__ import annotations

from typing import Any, Final

INK: Final = "#1d1c1a"
MUTED: Final = "#5e5a52"
GRID: Final = "#dfdad0"
SURFACE: Final = "#fffefb"
ACCENT: Final = "#0e5a6b"
SERIES: Final = ("#1f62a6", "#b14a16", "#2a6f4c", "#7b4397", "#8a6100", "#a8325e")
GOOD: Final = "#1c6b40"
WARN: Final = "#8a5200"
BAD: Final = "#a82a2a"

LIGHT: Final[dict[str, str]] = {
    "ink": INK,
    "muted": MUTED,
    "grid": GRID,
    "surface": SURFACE,
    "accent": ACCENT,
    **{f"series{i}": colour for i, colour in enumerate(SERIES, start=1)},
    "good": GOOD,
    "warn": WARN,
    "bad": BAD,
}

DARK: Final[dict[str, str]] = {
    "ink": "#ece8df",
    "muted": "#a8a397",
    "grid": "#37362f",
    "surface": "#1b1b18",
    "accent": "#6fc3d4",
    "series1": "#7fb2ea",
    "series2": "#f0955f",
    "series3": "#6dc596",
    "series4": "#c79be0",
    "series5": "#d9b048",
    "series6": "#ee8bb0",
    "good": "#6cc592",
    "warn": "#e0a850",
    "bad": "#f08a80",
}

PAGE_LIGHT: Final = "#f7f4ed"
PAGE_DARK: Final = "#131311"
"""What surfaces lie on. Not for figures."""

RCPARAMS: Final[dict[str, Any]] = {
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "normal",
    "axes.titlelocation": "left",
    "axes.labelsize": 10,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "font.size": 10,
}
"""For ``matplotlib.rc_context(palette.RCPARAMS)``: the report's look in a figure."""


def stylesheet() -> str:
    """CSS that defines ``--ink`` … ``--bad`` and ``--page`` for light, dark and the toggle."""

    def block(colours: dict[str, str], page: str, scheme: str) -> str:
        lines = "".join(f"--{name}:{value};" for name, value in colours.items())
        return f"{{color-scheme:{scheme};--page:{page};{lines}}}"

    light, dark = block(LIGHT, PAGE_LIGHT, "light"), block(DARK, PAGE_DARK, "dark")
    return (
        f":root{light}\n"
        f"@media screen and (prefers-color-scheme:dark){{:root:not([data-theme=light]){dark}}}\n"
        f"@media screen{{:root[data-theme=dark]{dark}}}\n"
    )
