"""Figures for the report: SVG whose colours follow the page's theme, safe to put into HTML."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING, Final
from xml.etree import ElementTree

from decapod.report.palette import LIGHT

if TYPE_CHECKING:
    from matplotlib.figure import Figure as MatplotlibFigure

_SVG: Final = "http://www.w3.org/2000/svg"
_XLINK_HREF: Final = "{http://www.w3.org/1999/xlink}href"
_DROPPED: Final = frozenset({"metadata", "style", "title", "desc"})
_FORBIDDEN: Final = frozenset({"script", "foreignObject", "iframe", "animate", "set", "a"})
_COLOUR: Final = re.compile(r"#[0-9a-fA-F]{6}\b")
_FONT_FAMILY: Final = re.compile(r"font-family:[^;]*")
_FONT: Final = re.compile(r"font:\s*((?:[a-z]+ )*[\d.]+px)[^;]*")
_URL_ID: Final = re.compile(r"url\(\s*['\"]?#([^)'\"]+)['\"]?\s*\)")
_EXTERNAL: Final = re.compile(r"url\(\s*['\"]?(?!#)|@import|expression\(", re.IGNORECASE)
# Black and white are what matplotlib draws in where nobody chose a colour.
_VARIABLES: Final = {
    **{colour: f"var(--{name})" for name, colour in LIGHT.items()},
    "#000000": "var(--ink)",
    "#ffffff": "var(--surface)",
}


def svg_from_matplotlib(figure: MatplotlibFigure) -> str:
    """A matplotlib figure as SVG that follows the page's light and dark theme.

    The exact colours of :mod:`decapod.report.palette` (and black and white) become CSS variables;
    other colours stay as they are. Text stays text, in the page's font. The same figure gives the
    same bytes. The figure remains the caller's: close it yourself.

    Args:
        figure: any matplotlib figure.

    Returns:
        One ``<svg>`` element without XML declaration, doctype, metadata or date.
    """
    import matplotlib  # the caller's figure has it; the report itself needs none

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "decapod", "svg.fonttype": "none"}):
        figure.savefig(
            buffer,
            format="svg",
            transparent=True,
            bbox_inches="tight",
            pad_inches=0.05,
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    return themed_svg(buffer.getvalue())


def themed_svg(svg: str, *, prefix: str = "", label: str = "") -> str:
    """SVG source made fit for a page: themed, unique ids, nothing active, nothing external.

    Args:
        svg: a complete SVG document or element.
        prefix: put before every id and every reference to one.
        label: accessible name; the image is hidden from assistive technology if it is empty.

    Raises:
        ValueError: not well-formed SVG, or it holds a script, an event handler, or a reference to
            something outside the file.
    """
    if "<!ENTITY" in svg:
        raise ValueError("svg: expected no entity declarations, got one. Save it without.")
    try:
        root = ElementTree.fromstring(svg.strip())
    except ElementTree.ParseError as error:
        raise ValueError(f"svg: expected well-formed SVG, got {error}.") from error
    if _local(root.tag) != "svg":
        raise ValueError(f"svg: expected an <svg> element, got <{_local(root.tag)}>.")
    width = _natural_width(root)
    _clean(root, prefix)
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.set("fill", "var(--ink)")
    root.set("stroke-linejoin", "round")
    if label:
        root.set("role", "img")
        root.set("aria-label", label)
    if width:
        # Natural size on a wide page; never so small on a phone that its labels cannot be read.
        root.set("style", f"max-width:{width:.0f}px;min-width:min({width:.0f}px,36rem)")
    root.set("xmlns", _SVG)
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=True)


def _local(tag: str) -> str:
    return tag.rpartition("}")[2]


def _natural_width(root: ElementTree.Element) -> float | None:
    box = root.get("viewBox", "").replace(",", " ").split()
    if len(box) != 4:
        return None
    # matplotlib's viewBox counts points; a CSS pixel is three quarters of one.
    return float(box[2]) * 4 / 3 if root.get("width", "pt").endswith("pt") else float(box[2])


def _clean(element: ElementTree.Element, prefix: str) -> None:
    element.tag = _local(element.tag)
    if element.tag in _FORBIDDEN:
        raise ValueError(f"svg: expected a still picture, got a <{element.tag}> element.")
    for child in list(element):
        if _local(child.tag) in _DROPPED:
            element.remove(child)
        else:
            _clean(child, prefix)
            child.tail = None if not (child.tail or "").strip() else child.tail
    if element.tag not in ("text", "tspan") and not (element.text or "").strip():
        element.text = None
    href = element.attrib.pop(_XLINK_HREF, None) or element.attrib.pop("href", None)
    for name, value in list(element.attrib.items()):
        if _local(name).lower().startswith("on"):
            raise ValueError(f"svg: expected no event handler, got {name!r} on <{element.tag}>.")
        if "}" in name:
            del element.attrib[name]
        else:
            element.set(name, _themed(value, prefix))
    if "id" in element.attrib:
        element.set("id", prefix + element.attrib["id"])
    if href is not None:
        if href.startswith("#"):
            element.set("href", "#" + prefix + href[1:])
        elif element.tag == "image" and href.startswith("data:image/png;base64,"):
            element.set("href", "".join(href.split()))
        else:
            raise ValueError(
                f"svg: expected references inside the file only, got {href[:80]!r} on "
                f"<{element.tag}>."
            )


def _themed(value: str, prefix: str) -> str:
    if _EXTERNAL.search(value):
        raise ValueError(f"svg: expected nothing loaded from outside, got {value[:80]!r}.")
    value = _COLOUR.sub(lambda m: _VARIABLES.get(m[0].lower(), m[0]), value)
    value = _FONT_FAMILY.sub("font-family: var(--sans)", value)
    value = _FONT.sub(r"font: \1 var(--sans)", value)
    value = _URL_ID.sub(lambda m: f"url(#{prefix}{m[1]})", value)
    return re.sub(r"\s+", " ", value).strip()
