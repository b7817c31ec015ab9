"""TorchRL and TensorDict: networks with norms, losses that keep target networks, and ensembles."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from model_steps import assert_near, check_converted
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.modules import MLP, BatchRenorm1d, ConvNet, QValueActor
from torchrl.objectives import DQNLoss, SoftUpdate

import syncbn


def sample(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.works_with("torchrl", "`MLP` and `ConvNet` with `norm_class`: a converted step")
def test_networks() -> None:
    of_rows = {"norm_class": nn.BatchNorm1d, "norm_kwargs": {"num_features": 8}, "num_cells": [8, 8]}
    check_converted(lambda: MLP(in_features=4, out_features=2, **of_rows), sample(6, 4))
    of_images = {"norm_class": nn.BatchNorm2d, "norm_kwargs": {"num_features": 8}, "num_cells": [8, 8]}
    check_converted(lambda: ConvNet(in_features=3, **of_images), sample(4, 3, 16, 16))


@pytest.mark.works_with("torchrl", "its `BatchRenorm1d` after the warm-up, beside `BatchRenorm` with the same limits")
def test_batch_renorm() -> None:
    limits: dict[str, Any] = {"r_max": 3.0, "d_max": 5.0, "warmup_steps": 0, "r_ramp_end": 1, "d_ramp_end": 1}
    ours = syncbn.BatchRenorm(3, momentum=0.01, **limits).double()
    theirs = BatchRenorm1d(3, max_r=3.0, max_d=5.0, warmup_steps=1).double()
    for layer in (ours, theirs):
        # The first step is a warm-up of theirs. A second would make twice the corrections of them, without a limit.
        layer.num_batches_tracked.fill_(1)
        layer.running_mean.fill_(0.2)
    results = []
    for layer in (ours, theirs):
        x = (2 * sample(8, 3) + 1).requires_grad_()
        y = layer(x)
        y.pow(3).sum().backward()
        assert x.grad is not None
        results.append({"y": y.detach(), "dx": x.grad, "mean": layer.running_mean, "var": layer.running_var})
    assert_near(results[0], results[1], "BatchRenorm")


def q_values(kind: Any = None) -> QValueActor:
    torch.manual_seed(0)
    norm = {"norm_class": nn.BatchNorm1d, "norm_kwargs": {"num_features": 8}, "num_cells": [8]}
    network = MLP(in_features=4, out_features=3, **norm).double()
    if kind is not None:
        syncbn.convert(network, kind)
    return QValueActor(network, in_keys=["observation"], action_space="categorical")


@pytest.mark.works_with("torchrl", "`DQNLoss` with `SoftUpdate` of a converted network: as with torch's layers")
@pytest.mark.parametrize("kind", ["sync", "renorm"])
def test_a_loss_with_a_target_network(kind: str) -> None:
    found = []
    for each in (None, kind):
        actor = q_values(each)
        loss = DQNLoss(actor, action_space="categorical", delay_value=True)
        loss.make_value_estimator(gamma=0.9)
        target = SoftUpdate(loss, eps=0.5)
        optimizer = torch.optim.SGD(actor.parameters(), lr=0.1)
        for step in range(3):
            after = {"observation": sample(6, 4, seed=step + 10), "reward": sample(6, 1, seed=step)}
            after |= {"done": torch.zeros(6, 1, dtype=torch.bool), "terminated": torch.zeros(6, 1, dtype=torch.bool)}
            batch = {"observation": sample(6, 4, seed=step + 20), "action": torch.arange(6) % 3, "next": after}
            loss(TensorDict(batch, [6]))["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
            target.step()
        found.append({name: tensor.detach() for name, tensor in loss.state_dict().items() if torch.is_tensor(tensor)})
    assert_near(found[1], found[0], "the loss and its target")


@pytest.mark.works_with("tensordict", "an ensemble of converted networks by `from_modules` and `vmap`")
def test_an_ensemble() -> None:
    members = [syncbn.convert(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)).double(), "sync") for _ in range(3)]
    x = sample(6, 4)
    expected = [copy.deepcopy(member)(x) for member in members]
    stacked = TensorDict.from_modules(*members)
    shell = copy.deepcopy(members[0])

    def one(state: TensorDict) -> Tensor:
        with state.to_module(shell):
            y: Tensor = shell(x)
        return y

    found = torch.vmap(one)(stacked)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-12, atol=1e-12)
    means = [copy.deepcopy(member) for member in members]
    for mean in means:
        mean(x)
    torch.testing.assert_close(
        stacked["1", "running_mean"], torch.stack([mean[1].running_mean for mean in means]), rtol=1e-12, atol=1e-12
    )


@pytest.mark.works_with("tensordict", "`TensorDictModule` of a converted network")
def test_a_module_of_tensordicts() -> None:
    network = syncbn.convert(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)).double(), "sync")
    module = TensorDictModule(copy.deepcopy(network), in_keys=["x"], out_keys=["y"])
    assert torch.equal(module(TensorDict({"x": sample(6, 4)}, [6]))["y"], network(sample(6, 4)))
