"""A diagnosis in words: a table, and what it means.

A claim about the model's scores needs a difference that is larger than the noise of the test set, and large enough to
matter. See :mod:`syncbn.train.paired` for the intervals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median_high

from syncbn.population import LayerDivergence, gaussian_divergence
from syncbn.train.diagnosis import Diagnosis
from syncbn.train.paired import Difference
from syncbn.train.result import Metric

FEW = 16.0
"""Effective samples below which a layer is reported. A batch mean is then off by a quarter of a standard deviation."""
MATTERS = 0.005
"""Smallest difference of the metric that is reported; relative, unless its values are fractions."""


def advice(found: Diagnosis) -> list[str]:
    """What the measurements mean, one sentence each, the most important first."""
    claims, worst = _about_scores(found), _about_worst_scores(found)
    words = [worst] if worst else claims
    further = (_about_running(found, claims), _about_order(found), _about_shared_layers(found), _about_noise(found))
    words += [sentence for sentence in further if sentence]
    return words or ["Nothing here suggests that small batches harmed this model."]


def _about_scores(found: Diagnosis) -> list[str]:
    """Whether the running statistics are a bad estimate, and whether the model needs those of its batches."""
    metric, words = found.metric, []
    known = {kind: score for kind, score in found.scores.items() if score is not None}
    if metric is None or "running" not in known:
        return []

    def cost(kind: str) -> float:
        return metric.sign * known[kind]

    population = min((kind for kind in ("mean", "total") if kind in known), key=cost, default="running")
    # Two estimators have two chances to look better by luck. Each claim is in one direction only, of which its interval
    # covers 97.5 %, so both together are wrong in at most 5 % of models for which nothing is to be found.
    if claim := _claim(found, "running", population):
        words.append(
            f"Estimation: with population statistics the {metric.name} is {metric.shown(known[population])} and not "
            f"{metric.shown(known['running'])}{claim}. Recompute them after training "
            "(syncbn.update_population_statistics)."
        )
    fixed = min("running", population, key=cost)
    if "batch" in known and (claim := _claim(found, fixed, "batch")):
        size = found.trained_at if found.evaluated_at is None else found.evaluated_at
        words.append(
            f"Mismatch: with the statistics of its own batches of {size} the {metric.name} is "
            f"{metric.shown(known['batch'])}, with fixed ones at {'most' if metric.higher_is_better else 'least'} "
            f"{metric.shown(known[fixed])}{claim}. The model uses information about which samples share a batch, and "
            "inference does not have it. Train with larger normalization batches, BatchRenorm or GroupNorm."
        )
    return words


def _about_worst_scores(found: Diagnosis) -> str | None:
    """Whether all scores are the worst that there are, and so tell nothing of the statistics."""
    metric, known = found.metric, [score for score in found.scores.values() if score is not None]
    if metric is None or not known:
        return None
    worst = 0.0 if metric.higher_is_better else 1.0 if metric.percent else math.inf
    if any(score != worst for score in known):
        return None
    return (
        f"Scores: the {metric.name} is {metric.shown(worst)} with all kinds of statistics, the worst that it can be. "
        "It tells nothing about them. Train longer, or look for a mistake in the data or the metric, before comparing."
    )


def _about_running(found: Diagnosis, claims: Sequence[str]) -> str | None:
    """Whether the running statistics are far from those of the training data, and what that may come from."""
    size = max(found.layers) if found.trained_at is None else found.trained_at
    layers = [x for x in found.layers.get(size, []) if x.running_kl is not None and x.layer not in found.uses]
    far = {
        x.layer: x.running_kl for x in layers if x.running_kl is not None and x.running_kl > gaussian_divergence(FEW)
    }
    if not far:
        return None
    batch = {x.layer: x.kl for x in layers if x.kl is not None}
    # An average of batches is not as far as the batches themselves, unless the weights have moved on.
    behind = [name for name, kl in far.items() if found.trained_at and kl > 2 * batch.get(name, math.inf)]
    named = ", ".join(list(far)[:3]) + (", ..." if len(far) > 3 else "")
    facts = (
        f"Running: in {len(far)} of {len(layers)} layers the running statistics are as far from those of the training "
        f"data as {FEW:.0f} independent values would be, or farther ({named}; KL at most {_number(max(far.values()))})."
    )
    reason = (
        "They average too few batches, which a smaller momentum mends, or batches that are small or whose samples are "
        "alike."
    )
    if found.trained_at is None:
        reason = "They average too few batches, or have not followed the weights."
    elif behind:
        reason = (
            f"In layer {behind[0]}, a single batch of {size} is less than half as far: they have not followed the "
            "weights, or are of other data. A larger momentum, or more steps at a small learning rate, "
            "lets them follow."
        )
    scores = [
        kind for kind, score in found.scores.items() if kind in ("running", "mean", "total") and score is not None
    ]
    shown = any(words.startswith("Estimation") for words in claims)
    harmless = " The test scores do not show a loss by that." * (len(scores) > 1 and not shown)
    return f"{facts} {reason} Population statistics replace them (syncbn.update_population_statistics).{harmless}"


def _claim(found: Diagnosis, first: str, second: str) -> str | None:
    """The interval in words, if the second score is the better one by more than the noise; else None."""
    metric, before, after = found.metric, found.scores[first], found.scores[second]
    assert metric is not None
    assert before is not None
    assert after is not None
    matters = MATTERS * (1 if metric.percent else abs(before))
    if metric.sign * (before - after) <= matters:
        return None
    gain = found.gain(first, second)
    if gain is None:
        return " (which may be noise of the test set, as the values of its samples are not known)"
    return f" ({shown_gain(metric, gain)})" if gain.low > 0 else None


def shown_gain(metric: Metric, gain: Difference) -> str:
    """A gain with its interval, in points if the metric is in percent."""
    word, amounts = ("better", gain[:3]) if gain.value >= 0 else ("worse", (-gain.value, -gain.high, -gain.low))
    value, low, high = (f"{100 * x:.1f}" if metric.percent else f"{x:.3g}" for x in amounts)
    unit = " points" if metric.percent else ""
    return f"{word} by {value}{unit}, 95 % interval {low} to {high}, on {gain.samples} test samples"


def _about_order(found: Diagnosis) -> str | None:
    """Whether the samples of a batch are alike."""
    size = max(found.layers) if found.trained_at is None else found.trained_at
    own = {layer.layer: layer.effective for layer in found.layers.get(size, [])}
    pairs = [(own.get(layer.layer), layer.effective) for layer in found.shuffled]
    ratio = median_high([shuffled / trained for trained, shuffled in pairs if trained and shuffled] or [0.0])
    if ratio < 2:
        return None
    return (
        f"Order: a shuffled batch of {size} would have {ratio:.0f} times as many effective samples in the median "
        "layer, because the samples of a batch are alike. Shuffle the samples, synchronize over GPUs that see "
        "others, or use BatchRenorm or GroupNorm."
    )


def _about_shared_layers(found: Diagnosis) -> str | None:
    if not found.uses:
        return None
    layer, uses = next(iter(found.uses.items()))
    more = f" (and {len(found.uses) - 1} more)" if len(found.uses) > 1 else ""
    return (
        f"Shared: {layer}{more} is applied {uses} times in each forward pass and has one set of running statistics. "
        "Its divergence is also that between its uses, which no batch size changes. Give each use a layer of its own."
    )


def _about_noise(found: Diagnosis) -> str | None:
    """Which layers have too few effective samples, and how many samples would be enough."""
    suffering = {tried: _few(layers, found) for tried, layers in found.layers.items()}
    size = min(suffering) if found.trained_at is None else found.trained_at
    few = suffering.get(size)
    if not few:
        return None
    named = ", ".join(few[:3]) + (", ..." if len(few) > 3 else "")
    enough = next((tried for tried, layers in suffering.items() if tried > size and not layers), None)
    remedy = "No size tried is enough for all layers: use BatchRenorm, or train anew with GroupNorm."
    if enough is not None and found.trained_at is None:
        remedy = f"{enough} are enough. With fewer in training, synchronize (SyncBatchNorm), or use BatchRenorm."
    elif enough is not None:
        remedy = f"{enough} are enough: synchronize over {-(-enough // size)} GPUs (SyncBatchNorm), or use BatchRenorm."
    trained = "" if found.trained_at is None else ", as trained"
    return (
        f"Noise: at {size} {'sample' if size == 1 else 'samples'}{trained}, {len(few)} of {len(found.layers[size])} "
        f"layers have fewer than {FEW:.0f} effective samples ({named}). {remedy}"
    )


def _few(layers: list[LayerDivergence], found: Diagnosis) -> list[str]:
    return [x.layer for x in layers if x.effective is not None and x.effective < FEW and x.layer not in found.uses]


def print_diagnosis(found: Diagnosis) -> None:
    """Print errors, the table of layers and the advice."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if Console().is_terminal else 120, highlight=False)
    trained = "" if found.trained_at is None else f", trained with {found.trained_at} samples per mean"
    console.print(f"{found.title}{trained}; measured on {found.samples} training samples", markup=False)
    for line in _score_lines(found):
        console.print(line, markup=False)
    table = Table(title="KL of batch from population statistics (effective samples), by normalization batch size")
    table.add_column("layer")
    for heading in (*(f"{size}{'*' * (size == found.trained_at)}" for size in found.layers), "running"):
        table.add_column(heading, justify="right")
    for row in zip(*found.layers.values(), strict=True):
        cells = [f"{_number(x.kl)} ({_number(x.effective)})" for x in row]
        table.add_row(row[0].layer, *cells, _number(row[-1].running_kl))
    console.print(table)
    as_trained = "* as trained; " if found.trained_at in found.layers else ""
    console.print(f"{as_trained}running: KL of the running from the population statistics")
    for sentence in advice(found):
        console.print(f"- {sentence}", markup=False)


def _score_lines(found: Diagnosis) -> list[str]:
    lines, metric = [], found.metric
    for entry in found.evaluations:
        assert metric is not None
        detail = f" ({entry['estimator']}, {entry['samples']} samples)" if entry["estimator"] else ""
        values, kind = entry["test"], entry["estimator"] or entry["statistics"]
        shown = "cannot be computed" if values is None else metric.shown(values[metric.name])
        gain = None if kind == "running" else found.gain("running", kind)
        compared = "" if gain is None else f" ({shown_gain(metric, gain)})"
        lines.append(f"  test {metric.name} with {entry['statistics']} statistics{detail}: {shown}{compared}")
    return lines


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}" if value < 99.5 else f"{value:.0f}"
