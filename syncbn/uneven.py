"""Training where the ranks have different numbers of batches: those that are done take part with empty ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn import lockstep
from syncbn.trees import leaves, tree_map

Batch = TypeVar("Batch")
_END: Any = object()
"""In place of a batch, after the last one."""
_NAME = "syncbn.uneven"
"""What a watchdog calls the place where ranks wait for each other here."""


def uneven(loader: Iterable[Batch], process_group: dist.ProcessGroup | None = None) -> Iterator[tuple[Batch, float]]:
    """Iterate over ``loader`` until it has ended on every rank; meanwhile the others get empty batches.

    Without it, the rank with the fewest batches leaves the others waiting in their next synchronized layer. Each step
    yields the batch and a factor for the loss. With the *sum* of the loss over the samples, times this factor,
    :class:`~torch.nn.parallel.DistributedDataParallel` gives the gradients of the mean over the samples of all ranks,
    which are those of one process that has the whole batch. (The mean over an empty batch is not a number, and the mean
    of ranks' means gives the samples of small batches more weight.)

    An empty batch has the tensors of a batch with no samples: shape (0, ...). The model has to take it; convolutions,
    linear layers and the layers of this package do.

    Args:
        loader: yields batches: tensors whose first dimension is the sample, or tuples, lists and dicts of them. Other
            objects in these are passed on as they are. A list of images is no batch: stack them. A rank may have no
            batch at all. One batch is fetched ahead. All ranks have to leave the loop at the same step.
        process_group: the ranks that train together. None: all of them.

    Yields:
        The batch and the factor: the number of ranks divided by the number of samples on all of them in this step.
        Without an initialized process group it is 1 / samples. A step without any sample is left out.

    Raises:
        ValueError: the tensors of a batch differ in their first dimension, or there are none.

    Example:
        >>> import syncbn, torch
        >>> model = torch.nn.Linear(3, 1)
        >>> for x, factor in syncbn.uneven([torch.randn(4, 3), torch.randn(2, 3)]):
        ...     (model(x).square().sum() * factor).backward()
    """
    ranks = dist.get_world_size(process_group) if dist.is_available() and dist.is_initialized() else 1
    batches = (batch for batch in loader)  # which has ended for good when the loader has, also if that starts again
    batch = next(batches, _END)
    empty = None if batch is _END else tree_map(_no_samples, batch)
    counts = _count(batch, ranks, process_group)
    samples, unfinished = counts()
    if 0 < unfinished < ranks:  # all ranks know it
        empty = _agree(empty, process_group)
    while unfinished:
        # What comes next is counted before the step is computed, so that the host does not wait for the device.
        following = next(batches, _END)
        counts = _count(following, ranks, process_group)
        if samples:
            yield (empty if batch is _END else batch), ranks / samples  # type: ignore[misc]
        batch = following
        samples, unfinished = counts()


def _no_samples(tensor: Tensor) -> Tensor:
    return tensor.new_empty((0, *tensor.shape[1:])) if tensor.dim() else tensor.clone()


def _samples(batch: Any) -> int:
    sizes = {len(tensor) for tensor in leaves(batch) if tensor.dim()}
    if len(sizes) != 1:
        found = f"those of this one have {sorted(sizes)}" if sizes else f"this {type(batch).__name__} has none"
        raise ValueError(f"a batch needs tensors whose first dimension is the sample; {found}")
    return sizes.pop()


def _agree(empty: Any, group: dist.ProcessGroup | None) -> Any:
    """The empty batch of this rank, or another's if this one has no batch to make it from. One collective."""
    kind = None if empty is None else next(tensor for tensor in leaves(empty) if tensor.dim()).device.type
    everywhere: list[Any] = [None] * dist.get_world_size(group)
    with lockstep.watched(_NAME, torch.empty(0), _name_of(group)):
        dist.all_gather_object(everywhere, (kind, None if empty is None else tree_map(Tensor.cpu, empty)), group)
    kind, tree = next(pair for pair in everywhere if pair[1] is not None)
    return tree_map(lambda tensor: tensor.to(kind), tree) if empty is None else empty


def _count(batch: Any, ranks: int, group: dist.ProcessGroup | None) -> Callable[[], tuple[int, int]]:
    """Start to add the ranks' samples, and the ranks that have a batch; the result is called for both."""
    here = (0, 0) if batch is _END else (_samples(batch), 1)
    if ranks == 1:
        return lambda: here
    # Not the device of the batch: with NCCL alone, ranks exchange only what is on a GPU, and batches may be on the CPU.
    counts = torch.tensor(here, device="cpu" if "cpu" in dist.get_backend_config(group) else "cuda")
    with lockstep.watched(_NAME, counts, _name_of(group)):
        dist.all_reduce(counts, group=group)
    if not counts.is_cuda:
        return lambda: tuple(counts.tolist())
    host, arrived = torch.empty(2, dtype=torch.int64, pin_memory=True), torch.cuda.Event()
    host.copy_(counts, non_blocking=True)
    arrived.record()

    def read() -> tuple[int, int]:
        arrived.synchronize()
        samples, unfinished = host.tolist()
        return samples, unfinished

    return read


def _name_of(group: dist.ProcessGroup | None) -> str:
    chosen = group or dist.group.WORLD
    assert chosen is not None, "called only with an initialized world"
    return chosen.group_name
