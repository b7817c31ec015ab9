"""What the tests of other libraries run on each of two processes. A worker imports a library when it is needed."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from model_steps import images
from torch import Tensor, nn

import syncbn
from syncbn.compat import import_timm


def timms_distribute_bn() -> tuple[float, float]:
    """By how much the running statistics differ from those of `reconcile`, before and after timm's function."""
    timm_layers, utils = import_timm("layers"), import_timm("utils")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), timm_layers.BatchNormAct2d(4)).double()
    syncbn.convert(model, "ghost", ghost_batch_size=2)
    model(images(6) + dist.get_rank())
    reconciled = copy.deepcopy(model)
    syncbn.reconcile(reconciled)
    found = []
    for step in (lambda: None, lambda: utils.distribute_bn(model, dist.get_world_size(), reduce=True)):
        step()
        pairs = zip(model.buffers(), reconciled.buffers(), strict=True)
        found.append(max(float((a - b).abs().max()) for a, b in pairs))
    return found[0], found[1]


def graph_batches() -> list[tuple[Tensor, Tensor]]:
    """The nodes of two graphs of unequal sizes, and their edges."""
    generator = torch.Generator().manual_seed(4)
    sizes = (9, 4)
    nodes = [torch.randn(n, 5, dtype=torch.float64, generator=generator) for n in sizes]
    return [(x, torch.randint(0, len(x), (2, 3 * len(x)), generator=generator)) for x in nodes]


def gin(norm: str = "batch_norm") -> nn.Module:
    import torch_geometric.nn

    torch.manual_seed(0)
    model: nn.Module = torch_geometric.nn.GIN(5, 8, 2, 3, norm=norm).double()
    return model


def a_graph_each() -> dict[str, Tensor]:
    """A step on this rank's graph: gradients, added over the ranks, and buffers."""
    model = syncbn.convert(gin(), "sync")
    x, edges = graph_batches()[dist.get_rank()]
    model(x, edges).square().sum().backward()
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
    return {**{name: p.grad for name, p in model.named_parameters()}, **dict(model.named_buffers())}
