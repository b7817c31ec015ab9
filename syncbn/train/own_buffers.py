"""Buffers that differ between the processes of a run, such as the running statistics of a local layer.

A checkpoint keeps those of every process, so that the same number of processes goes on with the same bits. Averaging
them in the run itself would round them once more than a run without this checkpoint.
"""

from __future__ import annotations

import hashlib

import torch
import torch.distributed as dist
from torch import Tensor, nn

from syncbn.collectives import gathered
from syncbn.train.logical_gpus import Placement


def differing_buffers(model: nn.Module, device: torch.device) -> dict[str, Tensor]:
    """The saved buffers that are not the same on all processes: for each name the values of all, (processes, *).

    All processes have to call it, and get the same tensors, which lie on the CPU.
    """
    buffers = _saved_buffers(model)
    if not buffers or not dist.is_initialized() or dist.get_world_size() == 1:
        return {}
    digests = torch.tensor([_digest(each) for each in buffers.values()], dtype=torch.int64, device=device)
    found = gathered(digests)
    same = (found == found[0]).all(0).tolist()
    differing = {name: each for (name, each), equal in zip(buffers.items(), same, strict=True) if not equal}
    if not differing:
        return {}
    values = gathered(torch.cat([_as_bytes(each) for each in differing.values()])).cpu()
    parts = values.split([each.nbytes for each in differing.values()], dim=1)
    return {
        # A copy, because a view as wider numbers has to begin where such a number may.
        name: part.flatten().clone().view(each.dtype).view(len(values), *each.shape)
        for (name, each), part in zip(differing.items(), parts, strict=True)
    }


def load_own_buffers(model: nn.Module, found: dict[str, Tensor], placement: Placement) -> None:
    """Give this process its buffers of :func:`differing_buffers`, if they are those of as many processes as now."""
    buffers = _saved_buffers(model)
    for name, values in found.items():
        if len(values) == placement.processes:
            buffers[name].copy_(values[placement.rank])


def _saved_buffers(model: nn.Module) -> dict[str, Tensor]:
    saved = model.state_dict().keys()
    return {name: buffer.detach() for name, buffer in model.named_buffers() if name in saved}


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def _digest(tensor: Tensor) -> int:
    content = _as_bytes(tensor).cpu().numpy().tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)
