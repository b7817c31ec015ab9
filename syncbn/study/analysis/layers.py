"""How far batch statistics are from the population's, layer by layer: maps for the page, and what they show."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from syncbn.study.analysis.summary import Setting, Summary
from syncbn.study.report.words import DASH, axis_word, compact, place_words, significant, some, value_word

MAX_LAYERS = 24
"""Layers that a map shows; of more, evenly spread ones, the first and the last among them."""
MAX_MAPS = 12
"""Maps that a page shows."""
HEAT = (
    ("#ffffe5", "#1c1e21"),
    ("#fff7bc", "#1c1e21"),
    ("#fee391", "#1c1e21"),
    ("#fec44f", "#1c1e21"),
    ("#fe9929", "#1c1e21"),
    ("#ec7014", "#1c1e21"),
    ("#cc4c02", "#ffffff"),
    ("#993404", "#ffffff"),
    ("#662506", "#ffffff"),
)
"""Ground and ink of a cell by level: ColorBrewer's YlOrBr, whose lightness alone tells the levels apart."""
LEVELS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Where a divergence's level changes: half decades, the same on every page."""
PARTS = (3.0, 10.0, 30.0, 100.0, 300.0, 1e3, 3e3, 1e4)
"""The same for how many values stand for one independent value."""


@dataclass(frozen=True, kw_only=True)
class LayerMeans:
    """One layer of one setting: means over the runs that have them; NaN where none has."""

    layer: str
    count: float
    """Values a channel in one normalization batch."""
    kl: float
    effective: float
    running_kl: float
    seeds: int


@dataclass(frozen=True, kw_only=True)
class MapCell:
    """A number of a map; ``level`` is its place on the scale of colours, None where there is no number."""

    text: str
    level: int | None


@dataclass(frozen=True, kw_only=True)
class MapRow:
    """A layer of a map."""

    layer: str
    cells: list[MapCell]


@dataclass(frozen=True, kw_only=True)
class LayerMap:
    """Layers by places along the sweep (one arm), or by arms (one place)."""

    arm: str | None
    title: str
    across: str
    columns: list[str]
    rows: list[MapRow]
    omitted: int
    """Layers that are not shown."""


def layer_means(setting: Setting) -> list[LayerMeans]:
    """The layers of a setting, in the order of the model; empty without batch statistics."""
    found: dict[str, list[dict[str, float | None]]] = {}
    for run in setting.runs:
        for entry in run.layers:
            found.setdefault(str(entry.get("layer")), []).append(entry)

    def mean(entries: Sequence[dict[str, float | None]], name: str) -> float:
        values = [float(value) for entry in entries if (value := entry.get(name)) is not None]
        return sum(values) / len(values) if values else math.nan

    return [
        LayerMeans(
            layer=layer,
            count=mean(entries, "count"),
            kl=mean(entries, "kl"),
            effective=mean(entries, "effective"),
            running_kl=mean(entries, "running_kl"),
            seeds=len(entries),
        )
        for layer, entries in found.items()
    ]


def divergence_maps(summary: Summary) -> list[LayerMap]:
    """The divergence of the batch statistics: a map an arm along the sweep, the reference's first, or one of all."""
    return [_map(summary, title, arm, columns, _divergence) for title, arm, columns in _columns(summary)]


def effective_map(summary: Summary) -> LayerMap | None:
    """How many independent values a batch is worth, for the arm whose normalization batch varies most."""
    widest = max(_columns(summary), key=lambda entry: _variety(entry[2]), default=None)
    return None if widest is None else _map(summary, *widest, _effective)


def layer_words(summary: Summary) -> list[str]:
    """What the maps show, in sentences: where batches are farthest off, and what their correlation costs.

    Divergences are compared within an arm: the values that another arm's layers normalize are other ones.
    """
    settings = [s for s in _shown(summary) if any(not math.isnan(means.kl) for means in layer_means(s))]
    if not settings:
        return []
    main = next((s for s in settings if s.reference), settings[0])
    every = _with_divergence([s for s in settings if s.arm == main.arm])
    setting, worst = max(every, key=lambda pair: pair[1].kl)
    words = [
        f"Farthest off in {main.label} is {worst.layer}{_at(setting)}: a batch's statistics diverge from the "
        f"population's by {significant(worst.kl)} on average{_worth(worst)}."
    ]
    same = [(s, m) for s, m in every if m.layer == worst.layer]
    best_setting, best = min(same, key=lambda pair: pair[1].kl)
    if best.kl < worst.kl / 1.5:
        words.append(f"In the same layer it is {significant(best.kl)} at {place_words(best_setting.point)}.")
    return [*words, *_correlation(summary), *_drift(settings)]


def _drift(settings: Sequence[Setting]) -> list[str]:
    """Whether running statistics are farther off than a single batch's, arm by arm."""
    counts = []
    for arm in dict.fromkeys(setting.arm for setting in settings):
        mine = _with_divergence([setting for setting in settings if setting.arm == arm])
        pairs = [means for _, means in mine if means.kl > 0 and not math.isnan(means.running_kl)]
        beyond = sum(means.running_kl > means.kl for means in pairs)
        if pairs:
            counts.append((beyond, len(pairs), mine[0][0].label))
    far = [f"{label} ({count} of {of})" for count, of, label in counts if count]
    if far:
        return [f"The running statistics are farther off than a single batch in layers of {some(far, 8)}."]
    return ["The running statistics are nearer to the population's than a single batch in every layer."] * bool(counts)


def _correlation(summary: Summary) -> list[str]:
    """What a batch is worth where it is worth least for its size, and where it is worth more than it has.

    At the place of comparison, or else where the map has most.
    """
    widest = max(_columns(summary), key=lambda entry: _variety(entry[2]))
    settings = [setting for _, setting in widest[2]]
    setting = next((s for s in settings if s.point == summary.study.comparison_point()), settings[0])
    words = []
    least = min(_counted(setting), key=lambda m: m.effective / m.count, default=None)
    if least is not None and least.effective <= least.count / 2:
        skew = max(int((run.config.get("data") or {}).get("class_skew") or 1) for run in setting.runs)
        alike = f", and so are images of a batch, which come {skew} of one class in a row" if skew > 1 else ""
        words.append(
            f"Values of one image are alike{alike}, so a batch counts for fewer than it has: in {least.layer} of "
            f"{_name(setting)}, {least.count:,.0f} values a channel are worth {compact(least.effective)} independent "
            "ones."
        )
    counted = [means for each in settings for means in _counted(each)]
    above = sum(means.effective > means.count for means in counted)
    if above:
        name = f" of {setting.label}" if summary.layout.across is not None else ""
        words.append(
            f"In {above} of {len(counted)} fields of the map{name}, a batch is worth more than the values that it has "
            "(above 100 %): the pixels of an image are no random draw but a sample of all its parts, which is nearer "
            "to the mean, and a layer behind others gets values that the same batch has already normalized."
        )
    return words


def _counted(setting: Setting) -> list[LayerMeans]:
    return [means for means in layer_means(setting) if means.count > 0 and not math.isnan(means.effective)]


def _with_divergence(settings: Sequence[Setting]) -> list[tuple[Setting, LayerMeans]]:
    return [(setting, m) for setting in settings for m in layer_means(setting) if not math.isnan(m.kl)]


def heat_level(value: float, levels: Sequence[float] = LEVELS) -> int | None:
    """The place of a number on the scale of colours."""
    return None if math.isnan(value) else sum(value >= level for level in levels)


def _columns(summary: Summary) -> list[tuple[str, str | None, list[tuple[str, Setting]]]]:
    """What each map has as columns: title, arm, and settings with their headings."""
    panel = summary.layout.panel_of(summary.study.comparison_point())
    if summary.layout.across is None:
        here = [s for s in summary.at(summary.study.comparison_point()) if layer_means(s)]
        return [("", None, [(s.label, s) for s in here])] if here else []
    found: list[tuple[str, str | None, list[tuple[str, Setting]]]] = []
    for arm in sorted(summary.study.arms, key=lambda arm: not arm.reference):
        along = [(i, s) for i, s in summary.across(arm.name, panel) if layer_means(s)]
        if along:
            headings = [(value_word(summary.layout.values[i]), s) for i, s in along]
            found.append((arm.label, arm.name, headings))
    return found


def _map(
    summary: Summary,
    title: str,
    arm: str | None,
    columns: list[tuple[str, Setting]],
    cell: Callable[[LayerMeans], MapCell],
) -> LayerMap:
    means = [{entry.layer: entry for entry in layer_means(setting)} for _, setting in columns]
    layers = list(dict.fromkeys(layer for column in means for layer in column))
    shown = _spread(layers, MAX_LAYERS)
    empty = MapCell(text=DASH, level=None)
    rows = [
        MapRow(layer=layer, cells=[cell(column[layer]) if layer in column else empty for column in means])
        for layer in shown
    ]
    return LayerMap(
        arm=arm,
        title=title,
        across=axis_word(summary.layout.across) if summary.layout.across is not None else "arm",
        columns=[heading for heading, _ in columns],
        rows=rows,
        omitted=len(layers) - len(shown),
    )


def _divergence(means: LayerMeans) -> MapCell:
    return MapCell(text=_few_digits(means.kl), level=heat_level(means.kl))


def _effective(means: LayerMeans) -> MapCell:
    """The number, coloured by how many values stand for one that is independent."""
    share = means.effective / means.count if means.count > 0 else math.nan
    return MapCell(text=compact(means.effective), level=heat_level(1 / share if share > 0 else math.nan, PARTS))


def _few_digits(value: float) -> str:
    """Two digits from 0.1 on and one below: a cell has room for five characters."""
    if math.isnan(value):
        return DASH
    if value < 0.0005:
        return "<.001"
    return significant(value) if value >= 0.0995 else f"{value:.2f}" if value >= 0.0095 else f"{value:.3f}"


def _spread(layers: list[str], limit: int) -> list[str]:
    if len(layers) <= limit:
        return layers
    return [layers[round(i * (len(layers) - 1) / (limit - 1))] for i in range(limit)]


def _variety(columns: list[tuple[str, Setting]]) -> float:
    sizes = [s.normalization_batch_size or 1 for _, s in columns]
    return max(sizes) / min(sizes)


def _shown(summary: Summary) -> list[Setting]:
    return [setting for _, _, columns in _columns(summary) for _, setting in columns]


def _worth(means: LayerMeans) -> str:
    if math.isnan(means.effective):
        return ""
    return f", as those of {compact(means.effective)} independent values would ({means.count:,.0f} were there)"


def _at(setting: Setting) -> str:
    return f" at {place_words(setting.point)}" if setting.point else ""


def _name(setting: Setting) -> str:
    return setting.label + _at(setting)
