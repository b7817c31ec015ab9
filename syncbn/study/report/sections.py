"""The sections of a report that have figures: drawn, written to files of their own, and put into words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.figure import Figure

from syncbn.study.analysis.causes import cause_words, causes_of, estimator_words
from syncbn.study.analysis.comparisons import Comparisons
from syncbn.study.analysis.evaluations import FAMILIES, Evaluated, evaluated_settings, with_several_samples
from syncbn.study.analysis.layers import (
    HEAT,
    LEVELS,
    MAX_MAPS,
    PARTS,
    LayerMap,
    divergence_maps,
    effective_map,
    layer_words,
)
from syncbn.study.analysis.summary import Setting, Summary, by_badness
from syncbn.study.analysis.throughput import Costs, costs_of
from syncbn.study.plan.grid import Point
from syncbn.study.report.captions import (
    arms_caption,
    chance_words,
    curves_caption,
    diverged_words,
    fair_words,
    fixed_caption,
    kinds_words,
    level_words,
    missing_words,
    not_shown_words,
    samples_caption,
    shown_words,
    sweep_caption,
)
from syncbn.study.report.figures import arms_figure, extent, sweep_figure
from syncbn.study.report.panels import (
    FAMILY_MARKS,
    curve_figure,
    curves_of,
    kinds_figure,
    kinds_row_figure,
    layers_figure,
    samples_figure,
    used_families,
)
from syncbn.study.report.plots import NARROW, WIDE, Mark, inline, save_png, save_svg, svg_of
from syncbn.study.report.words import axis_word

SHOWN_PANELS = 4
"""Small figures that are open from the start; the others are behind a line to click on."""
MAX_PANELS = 12
"""Small figures in one section."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """Figures with what is said about them."""

    heading: str = ""
    reading: list[str] = field(default_factory=list)
    """How the figures are to be read."""
    figures: list[str] = field(default_factory=list)
    """SVG elements, a telephone wide."""
    more: list[str] = field(default_factory=list)
    """Further ones, not open from the start."""
    wide: str = ""
    """The same as the only one of ``figures``, for a wide page."""
    legend: list[tuple[str, str, str]] = field(default_factory=list)
    """Glyph, colour and meaning."""
    words: list[str] = field(default_factory=list)
    """What to see, sentence by sentence."""
    lines: list[tuple[str, str]] = field(default_factory=list)
    """The same as a list: what each line is about, and the sentence."""
    titles: list[str] = field(default_factory=list)
    """Of ``figures``, where they have none themselves."""


@dataclass(frozen=True, kw_only=True)
class LayerSection:
    """Maps of layers with what is said about them."""

    maps: list[LayerMap]
    effective: LayerMap | None
    words: list[str]
    scale: list[tuple[str, str, str]]
    """Ground, ink and meaning of each colour of ``maps``."""
    parts: list[tuple[str, str, str]]
    """The same for ``effective``."""
    left_out: str
    """How many maps are not shown."""
    heat: tuple[tuple[str, str], ...] = HEAT


@dataclass(frozen=True, kw_only=True)
class CostSection:
    """Speed and memory, and the speed of the whole study."""

    costs: Costs | None
    words: list[str]


def main_section(summary: Summary, marks: Mapping[str, Mark], out: Path) -> Section:
    """The main figure, also as files: a panel for each place on the axes that do not go across."""
    layout, settings = summary.layout, list(summary.settings.values())
    sweeps = layout.across is not None
    panels = [panel for panel in layout.panels if any(s.runs for s in _within(summary, panel))]
    limits = extent(settings) if sweeps else [error for s in settings for error in s.errors]

    def draw(panel: Point, width: float) -> Figure:
        if sweeps:
            return sweep_figure(summary, panel, marks, width, limits)
        return arms_figure(by_badness(summary.at(panel)), marks, width, limits, layout.title(panel))

    if not any(setting.runs for setting in settings):
        return Section(heading="Test error", words=["No run has a result yet."])
    figures = [draw(panel, NARROW) for panel in panels]
    wide = draw(panels[0], WIDE) if len(panels) == 1 else None
    files = [wide] if wide is not None else figures
    svgs = [svg_of(figure) for figure in figures]
    wide_svg = svg_of(wide) if wide is not None else ""
    name = main_figure_name(summary)
    save_svg([wide_svg] if wide_svg else svgs, out / f"{name}.svg")
    save_png(files, out / f"{name}.png")
    described = "Test error along the sweep" if sweeps else "Test error of each arm"
    said = [
        (layout.title(p), sweep_caption(summary, p) if sweeps else _said(arms_caption(summary.at(p)))) for p in panels
    ]
    lines = [(title[0].upper() + title[1:], " ".join(texts)) for title, texts in said if title and texts]
    words = [text for title, texts in said if not title for text in texts]
    words += _said(diverged_words(settings), missing_words(settings), chance_words(settings))
    titled = [f"{described}, {layout.title(panel)}" if layout.title(panel) else described for panel in panels]
    return Section(
        heading=f"Test error against {axis_word(layout.across)}"
        if layout.across is not None
        else "Test error of each arm",
        reading=_said(
            fixed_caption(summary) if sweeps else "", _reading(summary, figures[0]), fair_words(summary.study)
        ),
        figures=[inline(svg, f"e{i}", text) for i, (svg, text) in enumerate(zip(svgs, titled, strict=True))],
        wide=inline(wide_svg, "ew", described) if wide_svg else "",
        words=words,
        lines=lines,
    )


def main_figure_name(summary: Summary) -> str:
    """Name of the main figure's files: what its horizontal axis is."""
    sweep, across = summary.study.sweep, summary.layout.across
    if across is None:
        return "error_by_arm"
    return "error_by_nbs" if sweep is not None and across == sweep.vary else f"error_by_{across.rpartition('.')[2]}"


def estimation_section(summary: Summary, out: Path) -> Section | None:
    """Training or estimation; None where no run was evaluated with other than running statistics."""
    every = evaluated_settings(summary)
    shown = summary.study.comparison_point()
    panel = summary.layout.panel_of(shown)
    items = {place: item for place, item in every.items() if summary.layout.panel_of(place[1]) == panel}
    if not items:
        return None
    families = used_families(items.values())
    described, wide = "Test error by kind of statistics", ""
    if summary.layout.across is None:
        here = list(items.values())
        drawn = [(described, kinds_row_figure(here, NARROW, families))]
        wide = svg_of(kinds_row_figure(here, WIDE, families))
    else:
        drawn = _kinds_figures(summary, panel, items, families)
    svgs = [svg_of(figure) for _, figure in drawn[:MAX_PANELS]]
    save_svg([wide] if wide else svgs, out / "estimation.svg")
    inlined = [inline(svg, f"k{i}", title) for i, (svg, (title, _)) in enumerate(zip(svgs, drawn, strict=False))]
    words = _said(
        not_shown_words(len(drawn) - len(svgs), "arm"),
        kinds_words(families),
        estimator_words(items),
        _leak_words(items.values()) if "batch" in families else "",
        shown_words(summary, panel),
    )
    return Section(
        figures=inlined[:SHOWN_PANELS],
        more=inlined[SHOWN_PANELS:],
        wide=inline(wide, "kw", described) if wide else "",
        legend=[(FAMILY_MARKS[f].glyph, FAMILY_MARKS[f].page_colour, FAMILIES[f]) for f in families],
        lines=cause_words(causes_of(summary, items)),
        words=words,
    )


def _kinds_figures(
    summary: Summary, panel: Point, items: Mapping[tuple[str, Point], Evaluated], families: Sequence[str]
) -> list[tuple[str, Figure]]:
    """A figure an arm, the reference's first, each with a description."""
    limits = [error.mean for item in items.values() for error in item.errors.values()]
    found = []
    for arm in sorted(summary.study.arms, key=lambda arm: not arm.reference):
        along = summary.across(arm.name, panel)
        trace = [(i, items[arm.name, s.point]) for i, s in along if (arm.name, s.point) in items]
        if trace:
            title = f"Test error by kind of statistics, {arm.label}"
            found.append((title, kinds_figure(summary, trace, limits, families)))
    return found


def _leak_words(items: Iterable[Evaluated]) -> str:
    skews = [(run.config.get("data") or {}).get("class_skew") or 1 for item in items for run in item.setting.runs]
    if max(skews, default=1) == 1:
        return ""
    return (
        "Under class skew the test batches are in class order too, as the training's were: their own statistics then "
        "give away something about the class, which inference does not have."
    )


def samples_section(summary: Summary, out: Path) -> Section | None:
    """Error against the images that population statistics are of; None where only one number of them was tried."""
    every = evaluated_settings(summary)
    point = summary.study.comparison_point()
    found = with_several_samples([item for item in every.values() if item.setting.point == point])
    items = found[:MAX_PANELS]
    if not items:
        return None
    limits = [error.mean for item in items for error in item.errors.values()]
    svgs = [svg_of(samples_figure(item, limits)) for item in items]
    save_svg(svgs, out / "samples.svg")
    described = "Test error by images in the population statistics"
    inlined = [
        inline(svg, f"n{i}", f"{described}, {item.setting.label}")
        for i, (svg, item) in enumerate(zip(svgs, items, strict=True))
    ]
    left = not_shown_words(len(found) - len(items), "arm")
    words = _said(left, samples_caption(items), shown_words(summary, point), level_words(items))
    return Section(figures=inlined[:SHOWN_PANELS], more=inlined[SHOWN_PANELS:], words=words)


def layer_section(summary: Summary, out: Path) -> LayerSection | None:
    """Maps of the layers' divergence; None where no run has one."""
    maps = divergence_maps(summary)
    if not maps:
        return None
    save_svg([svg_of(layers_figure(maps[0]))], out / "layers.svg")
    ends = [f"below {LEVELS[0]:g}", *(f"from {level:g}" for level in LEVELS)]
    parts = [f"below {PARTS[0]:g}", *(f"from {level:,g}" for level in PARTS)]
    return LayerSection(
        maps=maps[:MAX_MAPS],
        left_out=not_shown_words(len(maps) - MAX_MAPS, "arm"),
        effective=effective_map(summary),
        words=layer_words(summary),
        scale=[(ground, ink, text) for (ground, ink), text in zip(HEAT, ends, strict=True)],
        parts=[(ground, ink, text) for (ground, ink), text in zip(HEAT, parts, strict=True)],
    )


def curve_section(summary: Summary, comparisons: Comparisons, marks: Mapping[str, Mark]) -> Section | None:
    """Learning curves of the arms at the place of comparison; None without any."""
    settings = [s for s in by_badness(comparisons.settings) if any(curves_of(s))]
    limits = [error for s in settings for curve in curves_of(s) for error in curve.values()]
    if not limits:
        return None
    reference = comparisons.reference
    figures = [
        inline(
            svg_of(
                curve_figure(s, None if s.reference else reference, marks[s.arm].colour, [min(limits), max(limits)])
            ),
            f"c{number}",
            f"Test error of {s.label} over the epochs",
        )
        for number, s in enumerate(settings)
    ]
    return Section(
        figures=figures,
        titles=[s.label for s in settings],
        words=_said(shown_words(summary, comparisons.point), curves_caption(settings)),
    )


def cost_section(summary: Summary, comparisons: Comparisons, out: Path) -> CostSection | None:
    """Speed and memory; None where nothing was run."""
    costs = costs_of(comparisons.settings)
    if costs is None:
        return None
    return CostSection(costs=costs, words=_said(shown_words(summary, comparisons.point)))


def _reading(summary: Summary, figure: Figure) -> str:
    """How the main figure is to be read."""
    if summary.layout.across is None:
        dashed = " The dashed line is the reference's mean." if summary.reference is not None else ""
        return f"A point is one seed, the upright bar the mean, a cross a run that diverged.{dashed}"
    logarithmic = figure.axes[0].get_yscale() == "log"
    words = "A mark is the mean of the seeds, with its 95 % interval; places are moved apart a little to show them."
    return f"{words} Errors are on a log scale." if logarithmic else words


def _within(summary: Summary, panel: Point) -> list[Setting]:
    return [s for s in summary.settings.values() if summary.layout.panel_of(s.point) == panel]


def _said(*texts: str) -> list[str]:
    return [text for text in texts if text]
