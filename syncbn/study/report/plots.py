"""What all figures of a report share: colours, marks and sizes, the axis of errors, and how they are written.

For colour-blind readers and for prints without colour, place, marks and labels carry the meaning; colour helps. One
unit of a figure is one pixel of the page, so that text has its size on a telephone too: figures are drawn as wide as a
telephone shows them, and again for a wide page where one of them stands alone.
"""

from __future__ import annotations

import html
import io
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from syncbn.study.plan.grid import Study
from syncbn.study.report.words import SPACE

NARROW, WIDE, SMALL = 350, 700, 172
"""Widths in pixels: a telephone's, the page's, and two beside each other on a telephone."""
TITLE_HEIGHT = 22
COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito's palette, without its yellow and black, which vanish on light and dark pages."""
INK, MUTED, GRID, SURFACE = "#1c1e21", "#636b74", "#d9dce0", "#fdfdfd"
_PAGE_COLOURS = {
    INK: "currentColor",
    MUTED: "var(--muted)",
    GRID: "var(--grid)",
    SURFACE: "var(--surface)",
    COLOURS[1]: "var(--blue)",  # too dark for a dark page
}
_MARKERS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "P": "✚", "<": "◀", ">": "▶"}
_DASHES: tuple[Any, ...] = ("solid", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
DASHED: Any = (0, (4, 3))
_FONTS = "system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif"


@dataclass(frozen=True, kw_only=True)
class Mark:
    """How an arm is drawn in all figures."""

    colour: str
    marker: str
    dash: Any

    @property
    def page_colour(self) -> str:
        """The colour in a style sheet, which differs between light and dark pages."""
        return _PAGE_COLOURS.get(self.colour, self.colour)

    @property
    def glyph(self) -> str:
        """The marker as a character, for tables."""
        return _MARKERS[self.marker]


def arm_marks(study: Study) -> dict[str, Mark]:
    """A mark for each arm by its place in the study, so that it keeps it in any order; the reference's is ink."""
    others = [arm.name for arm in study.arms if not arm.reference]
    markers = list(_MARKERS)
    marks = {
        name: Mark(
            colour=COLOURS[i % len(COLOURS)],
            marker=markers[i % len(markers)],
            dash=_DASHES[i // len(COLOURS) % len(_DASHES)],
        )
        for i, name in enumerate(others)
    }
    return marks | {arm.name: Mark(colour=INK, marker="o", dash=DASHED) for arm in study.arms if arm.reference}


def new_axes(width: float, height: float, left: float, right: float, top: float, bottom: float) -> tuple[Figure, Axes]:
    """A figure of this size and axes with these margins, all in pixels of the page."""
    figure = Figure(figsize=(width / 72, height / 72), facecolor="none")
    place = (left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height)
    axes = figure.add_axes(place, facecolor="none")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.set_axisbelow(True)
    return figure, axes


def put_title(figure: Figure, title: str) -> None:
    """A title in the room of :data:`TITLE_HEIGHT` that was left for it at the top."""
    width, height = figure.get_size_inches() * 72
    text = shortened(title, int((width - 8) / 7.6))
    figure.text(4 / width, 1 - 12 / height, text, va="center", fontweight="bold", fontsize=11.5)


def shortened(text: str, most: int) -> str:
    """At most so many characters; the page gives the whole of it as the figure's title."""
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def error_axis(axes: Axes, errors: Sequence[float], axis: str) -> None:
    """Scale, limits and percentages of an axis of errors (fractions): logarithmic where they span it and exceed 0."""
    found = [error for error in errors if not math.isnan(error)]
    low, high = (min(found), max(found)) if found else (0.0, 1.0)
    logarithmic = low > 0 and high > 4 * low
    if logarithmic:
        limits = low / 1.25, high * 1.25
        ticks = [base * 10.0**power for power in range(-6, 1) for base in (1, 2, 5)]
    else:
        margin = 0.08 * (high - low) or 0.01
        limits = max(low - margin, -0.02 * high), high + margin
        ticks = list(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(*limits))
    horizontal = axis == "x"
    line = axes.xaxis if horizontal else axes.yaxis
    (axes.set_xscale if horizontal else axes.set_yscale)("log" if logarithmic else "linear")
    (axes.set_xlim if horizontal else axes.set_ylim)(*limits)
    line.set_major_locator(FixedLocator([tick for tick in ticks if limits[0] <= tick <= limits[1]]))
    line.set_minor_locator(NullLocator())
    line.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}{SPACE}%"))
    axes.grid(axis="x" if horizontal else "y", color=GRID, linewidth=0.8, zorder=0)


def whisker(axes: Axes, x: float, low: float, high: float, colour: str) -> None:
    """An upright interval, cut off where the axis ends (no error is below 0, which a log scale does not have)."""
    bottom, top = axes.get_ylim()
    if not math.isnan(low):
        ends = [max(low, bottom), min(high, top)]
        axes.plot([x, x], ends, color=colour, linewidth=1.1, solid_capstyle="butt", zorder=3)


def fraction_of(axes: Axes, value: float) -> float:
    """Where a value lies on the upright axis, from 0 at its bottom to 1."""
    bottom, top = axes.get_ylim()
    if axes.get_yscale() == "log":
        bottom, top, value = math.log(bottom), math.log(top), math.log(max(value, bottom))
    return (value - bottom) / (top - bottom)


def svg_of(figure: Figure) -> str:
    """A figure as SVG with nothing in it that a browser can do without: reports are kept, and travel by mail."""
    buffer = io.StringIO()
    with style():
        figure.savefig(buffer, format="svg", facecolor="none", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    for waste in (r"<metadata>.*?</metadata>", r"<style.*?</style>", r"<!--.*?-->", r"<clipPath.*?</clipPath>"):
        svg = re.sub(waste, "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"| clip-path="[^"]*"| version="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'<svg [^>]*viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1">', svg, count=1)
    svg = re.sub(r' transform="rotate\(-?0 [^"]*\)"', "", svg)
    used = set(re.findall(r'href="#([^"]*)"', svg))
    svg = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in used else "", svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    svg = re.sub(r"font: (?:\w+ )?(bold|\d00) ([\d.]+)px [^;\"]*", r"font-size: \2px; font-weight: \1", svg)
    svg = re.sub(r' (d|style|x|y|viewBox|transform)="([^"]*)"', _short, svg)
    svg = re.sub(r">\s+<", "><", svg)
    svg = re.sub(r'<path d="[^"]*" style="fill:none"/>|<g/>|<defs></defs>', "", svg)
    if "<g " not in svg:  # groups that nothing is said of
        svg = svg.replace("<g>", "").replace("</g>", "")
    return svg.strip()


def inline(svg: str, prefix: str, description: str) -> str:
    """A figure as an element of a page: in the page's colours and font, its ids made unique by ``prefix``."""
    svg = _prefixed(svg, prefix)
    for colour, on_page in _PAGE_COLOURS.items():
        svg = svg.replace(colour, on_page)
    words = html.escape(description)
    return re.sub(
        r"<svg([^>]*)>",
        lambda head: f'<svg role="img" aria-label="{words}"{head[1]}><title>{words}</title>',
        svg,
        count=1,
    )


def save_svg(svgs: Sequence[str], path: Path, columns: int = 2) -> None:
    """Write figures beside each other as one SVG file, whole or not at all."""
    sizes = [_size(svg) for svg in svgs]
    width, height, places = _tiles(sizes, columns)
    tiles = []
    for number, (svg, size, (x, y)) in enumerate(zip(svgs, sizes, places, strict=True)):
        inner = f'<svg x="{x:g}" y="{y:g}" width="{size[0]:g}" height="{size[1]:g}"'
        tiles.append(_prefixed(svg, f"t{number}").replace("<svg", inner, 1))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" font-family="{_FONTS}">'
    ground = f'<rect width="{width:g}" height="{height:g}" fill="{SURFACE}"/>'
    text = f'<?xml version="1.0" encoding="utf-8"?>\n{head}{ground}{"".join(tiles)}</svg>\n'
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def save_png(figures: Sequence[Figure], path: Path, columns: int = 2) -> None:
    """Write figures beside each other as one PNG file, whole or not at all."""
    from PIL import Image

    images = []
    for figure in figures:
        buffer = io.BytesIO()
        with style():
            figure.savefig(buffer, format="png", dpi=160, facecolor=SURFACE)
        images.append(Image.open(buffer))
    width, height, places = _tiles([(image.width, image.height) for image in images], columns)
    whole = Image.new("RGB", (math.ceil(width), math.ceil(height)), SURFACE)
    for image, (x, y) in zip(images, places, strict=True):
        whole.paste(image.convert("RGB"), (round(x), round(y)))
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    whole.save(draft, format="PNG")
    draft.replace(path)


@contextmanager
def style() -> Iterator[None]:
    """Matplotlib's settings for all figures."""
    settings: Any = {
        "font.size": 11,
        "axes.edgecolor": MUTED,
        "axes.labelcolor": MUTED,
        "axes.labelsize": 11,
        "axes.linewidth": 0.8,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.labelsize": 10.5,
        "ytick.labelsize": 10.5,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "text.color": INK,
        "text.parse_math": False,  # labels are the user's; a dollar sign is a dollar sign
        "svg.fonttype": "none",
        "svg.hashsalt": "syncbn",
        "path.simplify": False,
    }
    with matplotlib.rc_context(settings):
        yield


def _short(match: re.Match[str]) -> str:
    """An attribute with numbers of one decimal and without spaces that mean nothing."""
    name, text = match[1], " ".join(match[2].split())
    if name == "style":
        parts = [part.replace(": ", ":") for part in re.split(r"; ?", text) if not re.match(_USUAL_STYLE, part)]
        return f' style="{";".join(parts)}"' if parts else ""
    text = re.sub(r"-?\d+\.\d+", lambda number: f"{float(number[0]):.1f}".removesuffix(".0"), text)
    if name == "d":
        text = re.sub(r" ?([MLCQZz]) ?", r"\1", text)
    return f' {name}="{text}"'


_USUAL_STYLE = r"stroke-linecap: square|stroke-linejoin: miter|stroke-miterlimit|font-family"


def _prefixed(svg: str, prefix: str) -> str:
    return svg.replace(' id="', f' id="{prefix}-').replace('href="#', f'href="#{prefix}-')


def _size(svg: str) -> tuple[float, float]:
    found = re.search(r'viewBox="\S+ \S+ (\S+) (\S+)"', svg)
    assert found is not None
    return float(found[1]), float(found[2])


def _tiles(sizes: Sequence[tuple[float, float]], columns: int) -> tuple[float, float, list[tuple[float, float]]]:
    """Width, height and the tiles' corners of a sheet with so many columns."""
    wide, high = max(width for width, _ in sizes), max(height for _, height in sizes)
    columns = min(columns, len(sizes))
    places = [(wide * (i % columns), high * (i // columns)) for i in range(len(sizes))]
    return wide * columns, high * math.ceil(len(sizes) / columns), places
