"""PyTorch Geometric, whose BatchNorm holds torch's as its attribute `module`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch_geometric.nn
from model_steps import check_converted
from pool import Pool
from torch import Tensor, nn
from two_process_jobs import a_graph_each, gin, graph_batches

import syncbn

NODES, EDGES = 30, 80


class OnOneGraph(nn.Module):
    """A network as a function of the nodes' features alone."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.edges = torch.randint(0, NODES, (2, EDGES), generator=torch.Generator().manual_seed(1))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.network(x, self.edges)
        return y


@pytest.mark.works_with("torch-geometric", "GCN and GIN with `norm='batch_norm'`: a converted step")
@pytest.mark.parametrize("name", ["GCN", "GIN"])
def test_networks(name: str) -> None:
    x = torch.randn(NODES, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    network = getattr(torch_geometric.nn, name)
    model = check_converted(lambda: OnOneGraph(network(5, 8, 2, 3, norm="batch_norm")), x)
    norms = [m for m in model.modules() if isinstance(m, torch_geometric.nn.BatchNorm)]
    assert all(isinstance(norm.module, syncbn.SyncBatchNorm) for norm in norms)


@pytest.mark.works_with("torch-geometric", "graphs of unequal sizes on 2 processes, as one graph on one")
def test_graphs_of_unequal_sizes(pools: Callable[[int], Pool]) -> None:
    model = gin()
    graphs = graph_batches()
    offsets = (0, len(graphs[0][0]))
    edges = torch.cat([edges + offset for (_, edges), offset in zip(graphs, offsets, strict=True)], 1)
    model(torch.cat([x for x, _ in graphs]), edges).square().sum().backward()
    expected = {**{name: p.grad for name, p in model.named_parameters()}, **dict(model.named_buffers())}
    for found in pools(2).run(a_graph_each):
        for name, tensor in expected.items():
            # float64: the two have the same terms, summed in another order.
            torch.testing.assert_close(found[name], tensor, rtol=1e-10, atol=1e-11)


@pytest.mark.works_with("torch-geometric", "`BatchNorm(allow_single_element=True)` of one node: its running statistics")
def test_one_node() -> None:
    norm = syncbn.convert(torch_geometric.nn.BatchNorm(4, allow_single_element=True).double(), "sync")
    x = torch.randn(1, 4, dtype=torch.float64)
    torch.testing.assert_close(norm(x), x / (1 + norm.module.eps) ** 0.5)
    with pytest.raises(ValueError, match="holds one value per channel"):
        norm.module(x)
