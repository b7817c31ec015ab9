"""Advice in words: a table, a recommendation, and what was not measured."""

from __future__ import annotations

from collections.abc import Iterator

from syncbn.advise.remedies import Advice, Remedy


def name_of(remedy: Remedy, gpus: int) -> str:
    """The remedy by its usual name."""
    if remedy.gpus == 1:
        return "local BatchNorm" if gpus > 1 else "BatchNorm"
    return f"SyncBatchNorm over {'all ' if remedy.gpus == gpus else ''}{remedy.gpus} GPUs"


def options_of(remedy: Remedy, gpus: int) -> str:
    """The options of a run with it."""
    if remedy.gpus == 1:
        return "--norm.name batch"
    return "--norm.name sync" + (f" --sync_group_size {remedy.gpus}" if remedy.gpus < gpus else "")


def sentences(found: Advice) -> Iterator[str]:
    """The recommendation, and what it rests on."""
    gpus = found.remedies[-1].gpus
    best = found.recommended
    if best is not None:
        yield f"Recommended: {name_of(best, gpus)} ({options_of(best, gpus)}), the cheapest without expected harm."
    elif found.needed is not None:
        yield (
            f"Recommended: none of these. {found.needed} samples to a mean would do: take more samples per GPU or more "
            "GPUs, or a norm that looks at single samples, such as GroupNorm."
        )
    else:
        yield "Recommended: none of these, and no larger batch that could be tried. GroupNorm looks at single samples."
    yield (
        "Alignment is the cosine between the gradients of the weights with these statistics, and those of the same "
        "samples with statistics of all of them, early in training."
    )
    yield (
        "Not known: what the learning rate and the running statistics add in training, and what BatchRenorm or "
        "GroupNorm would give. A study answers that (syncbn study run)."
    )


def print_advice(found: Advice) -> None:
    """Print the table and the sentences."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if Console().is_terminal else 120, highlight=False)
    gpus = found.remedies[-1].gpus
    table = Table(title=f"{found.title}: {found.layers} normalizations, {gpus} GPU{'s' * (gpus > 1)}")
    table.add_column("remedy")
    for heading in ("norm. batch", "alignment", "expected harm", f"exchange a step ({found.link.name}, modelled)"):
        table.add_column(heading, justify="right")
    for remedy in found.remedies:
        table.add_row(
            name_of(remedy, gpus),
            str(remedy.normalization_batch_size),
            "-" if remedy.alignment is None else f"{remedy.alignment:.2f}",
            remedy.harm,
            "-" if remedy.gpus == 1 else f"{remedy.exchange_ms:.2f} ms",
        )
    console.print(table)
    if found.step_ms is not None:
        console.print(
            f"A forward and backward pass of one GPU's samples takes {found.step_ms:.1f} ms here ({found.device})."
        )
    for sentence in sentences(found):
        console.print(f"- {sentence}", markup=False)
