"""Whether the ranks still hold the same model: parameters, and the running statistics that all ranks share."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from syncbn.collectives import gathered, resolve
from syncbn.domain_statistics import holders
from syncbn.layers import SmallBatchNorm

_BLOCK = 2**22
"""Elements of a tensor that are looked at together: their positions take 8 bytes each."""
_MIX = (-7046029254386353131, -4417276706812531889)  # splitmix64's odd factors, as signed integers
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def verify_ranks(model: nn.Module) -> None:
    """Raise an error on all ranks unless they hold the same parameters and the same shared statistics.

    Data parallel training keeps the weights of all ranks the same, bit for bit. It does not notice if they are not: a
    rank that has loaded another checkpoint, has drawn other initial weights after wrapping, or has changed a parameter
    outside the optimizer trains on in silence. Call this on all ranks every few hundred steps, after the optimizer's
    step. Each rank sums the bits of each tensor, weighted by their place, on its device, and a collective of 8 bytes a
    tensor compares the sums. Without an initialized process group it does nothing.

    It compares all parameters, and the running statistics of layers that share them among all ranks. Those of local
    layers differ until :func:`reconcile`. Parameters that are DTensors are left out, as each rank has a part of them.

    Args:
        model: the model, wrapped or not.

    Raises:
        RuntimeError: tensors differ. It names the first, how many others there are, and the ranks that differ from
            rank 0. Or the ranks' models have tensors of other names, shapes or dtypes.

    Example:
        >>> import syncbn
        >>> model = syncbn.convert(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)), "sync")
        >>> verify_ranks(model)
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    tensors = dict(_common(model))
    described = [(name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in tensors.items()]
    device = "cpu" if "cpu" in dist.get_backend_config() else "cuda"
    kinds = gathered(torch.tensor(zlib.crc32(repr(described).encode()), device=device))
    if bool((kinds != kinds[0]).any()):
        others = ", ".join(map(str, (kinds != kinds[0]).nonzero().flatten().tolist()))
        raise RuntimeError(
            f"the ranks hold different models: the tensors of rank {others} have not the names, shapes and dtypes of "
            "those of rank 0; make the same model on every rank"
        )
    if not tensors:
        return
    own = torch.stack([_digest(tensor) for tensor in tensors.values()])
    found = gathered(own)
    other = (found != found[0]).cpu()
    if bool(other.any()):
        first = int(other.any(0).int().argmax())
        name = list(tensors)[first]
        ranks = other[:, first].nonzero().flatten().tolist()
        also = int(other.any(0).sum()) - 1
        more = f", and {also} more tensor{'s' * (also > 1)} differ{'s' * (also == 1)}" if also else ""
        raise RuntimeError(
            f"the ranks hold different models: '{name}' is not on rank {', '.join(map(str, ranks))} what it is on rank "
            f"0{more}; load or broadcast the weights of one rank, and change them by the optimizer alone"
        )


def _common(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors that have to be the same on all ranks, by name."""
    for name, parameter in model.named_parameters():
        if not hasattr(parameter, "to_local"):
            yield name, parameter.detach()
    for name, layer in model.named_modules():
        if _is_shared(layer):
            for prefix, held in holders(layer):
                for key in ("running_mean", "running_var"):
                    if getattr(held, key) is not None:
                        yield f"{name}.{prefix}{key}" if name else prefix + key, getattr(held, key)


def _is_shared(layer: nn.Module) -> bool:
    """Whether all ranks share the layer's running statistics."""
    if isinstance(layer, SmallBatchNorm):
        group = None if layer.scope is None else resolve(layer.scope)
    else:
        group = (layer.process_group or dist.group.WORLD) if isinstance(layer, nn.SyncBatchNorm) else None
    return group is not None and dist.get_world_size(group) == dist.get_world_size()


def _digest(tensor: Tensor) -> Tensor:
    """() int64, a sum over the elements: their bits as an integer, times an odd number that hashes their place."""
    flat = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    bits = flat.contiguous().view(_INTEGERS[flat.element_size()]).flatten()
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, len(bits), _BLOCK):
        block = bits[start : start + _BLOCK]
        weight = torch.arange(start + 1, start + 1 + len(block), device=tensor.device) * _MIX[0]
        weight = (weight ^ (weight >> 29)) * _MIX[1]
        weight = (weight ^ (weight >> 32)) | 1
        total += (block * weight).sum()
    return total
