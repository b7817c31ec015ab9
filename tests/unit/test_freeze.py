"""Frozen layers: what they compute, and that nothing moves them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from convert_cases import pickled, saved
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.optim.swa_utils import update_bn

import syncbn
from syncbn.compat import import_torchvision
from syncbn.layers import SmallBatchNorm

LAYERS: dict[str, Callable[[], SmallBatchNorm]] = {
    "sync": lambda: syncbn.SyncBatchNorm(3, activation="relu"),
    "ghost": lambda: syncbn.GhostBatchNorm(3, 4),
    "renorm": lambda: syncbn.BatchRenorm(3, warmup_steps=0, r_ramp_end=2, d_ramp_end=2),
}
every_layer = pytest.mark.parametrize("kind", LAYERS)


def model_of(kind: str) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), LAYERS[kind](), nn.Dropout(0.5), nn.Conv2d(3, 3, 1), LAYERS[kind]())
    for step in range(4):
        model(batch(step))
    return model


def batch(step: int = 0) -> Tensor:
    return 3 + torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(step))


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def step_of(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    optimizer.zero_grad(set_to_none=False)  # as older loops do: gradients stay, as zeros
    model(batch(step)).square().mean().backward()
    optimizer.step()


@every_layer
def test_equals_torchs_layer_in_evaluation(kind: str) -> None:
    """Output and gradients, bit for bit: both call F.batch_norm."""
    norm = model_of(kind)[1]
    twin = nn.BatchNorm2d(3).eval()
    twin.load_state_dict(norm.state_dict())
    syncbn.freeze(norm).train()
    results = []
    for layer in (norm, twin):
        x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = layer(x)
        y = y.relu() if layer is twin and kind == "sync" else y
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, *layer.parameters()))))
    assert all(map(torch.equal, *results))


@every_layer
@pytest.mark.parametrize("affine", [False, True])
def test_training_moves_nothing(kind: str, affine: bool) -> None:
    """With momentum, weight decay and old gradients, which would move a parameter that has a gradient of zero."""
    model = model_of(kind)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    step_of(model, optimizer, 0)
    assert syncbn.freeze(model, affine=affine) is model
    before, parameters = buffers(model), copy.deepcopy(dict(model.named_parameters()))
    for step in range(3):
        model.train()
        step_of(model, optimizer, step)
        with syncbn.accumulate_statistics(model):
            model(batch(step))
    assert same(buffers(model), before)
    assert [m.training for m in model] == [True, False, True, True, False]
    for name, parameter in model.named_parameters():
        norms = name.startswith(("1.", "4."))
        assert torch.equal(parameter, parameters[name]) == (norms and affine), name
        assert parameter.requires_grad != (norms and affine)


@every_layer
def test_unfrozen_it_trains_on(kind: str) -> None:
    """As a model that was not frozen."""
    model = model_of(kind)
    model[1].bias.requires_grad_(False)  # before, and so afterwards
    other = copy.deepcopy(model)
    syncbn.freeze(model, affine=True).eval()
    syncbn.freeze(model.train(), affine=True)
    model(batch())
    syncbn.unfreeze(model)
    assert all(module.training for module in model.modules())
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in other.parameters()]
    for each in (model, other):
        torch.manual_seed(1)
        each(batch(7))
    assert same(buffers(model), buffers(other))
    assert vars(model[1]).keys() == vars(other[1]).keys()
    syncbn.freeze(model)
    model.eval()
    assert not any(module.training for module in syncbn.unfreeze(model).modules())


def test_frozen_again_is_frozen_as_asked_last() -> None:
    norm = syncbn.freeze(syncbn.freeze(syncbn.SyncBatchNorm(3), affine=True))
    assert norm.weight.requires_grad
    assert not syncbn.freeze(norm, affine=True).weight.requires_grad
    assert syncbn.unfreeze(norm).weight.requires_grad


def test_a_mode_that_is_set_by_hand() -> None:
    model = syncbn.freeze(model_of("sync"))
    before = buffers(model)
    for module in model.modules():
        module.training = True
    model(batch())
    assert same(buffers(model), before)


def test_a_part_of_a_model() -> None:
    model = model_of("sync")
    syncbn.freeze(model)
    syncbn.unfreeze(model[4])
    before = buffers(model)
    model.train()(batch())
    moved = {name for name, buffer in model.named_buffers() if not torch.equal(buffer, before[name])}
    assert moved == {"4.running_mean", "4.running_var", "4.num_batches_tracked"}


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved], ids=lambda f: f.__name__)
@every_layer
def test_copies_are_frozen(kind: str, copied: Callable[[nn.Module], nn.Module]) -> None:
    model = syncbn.freeze(model_of(kind), affine=True)
    other: Any = copied(model)
    before = buffers(other)
    other.train()(batch())
    assert same(buffers(other), before)
    assert not other[1].weight.requires_grad
    assert syncbn.unfreeze(other)[1].weight.requires_grad
    assert not model[1].weight.requires_grad
    assert model[1].frozen_state is not None


def test_what_recomputes_statistics_leaves_frozen_layers_alone() -> None:
    model = model_of("sync")
    syncbn.freeze(model[1])
    before = buffers(model)
    batches = [batch(step) for step in range(8, 12)]
    for recompute in (syncbn.update_population_statistics, lambda model, batches: update_bn(batches, model)):
        recompute(model, batches)
        found = buffers(model)
        assert all(torch.equal(found[name], before[name]) for name in before if name.startswith("1."))
        assert not torch.equal(found["4.running_var"], before["4.running_var"])
        before = found
    assert set(syncbn.update_population_statistics(model, batches)) == {"4"}
    with pytest.raises(ValueError, match=r"only frozen batch normalizations; call syncbn\.unfreeze"):
        syncbn.update_population_statistics(syncbn.freeze(model), batches)


def test_a_state_loads_into_a_frozen_model() -> None:
    source, model = model_of("sync"), syncbn.freeze(nn.Sequential(*copy.deepcopy(list(model_of("sync")))))
    source(batch(9))
    model.load_state_dict(source.state_dict())
    assert same(buffers(model), buffers(source))


def test_revert_refuses_and_fold_does_not() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU())
    model = syncbn.convert(model, "sync")
    model(batch())
    syncbn.freeze(model, affine=True)
    with pytest.raises(ValueError, match=r"'1' cannot be reverted: it is frozen, and would be trained again; call"):
        syncbn.revert(model)
    torch.testing.assert_close(syncbn.fold(model.eval())(batch()), model(batch()))
    assert model[1].frozen_state is not None
    syncbn.convert(model, "ghost", ghost_batch_size=2).train()
    before = buffers(model)
    model(batch(1))
    assert same(buffers(model), before), "another conversion keeps it frozen"
    assert type(syncbn.revert(syncbn.unfreeze(model))[1]) is nn.BatchNorm2d
    assert model[1].training


def test_one_value_per_channel_and_an_empty_batch() -> None:
    """Both have no variance of their own, and need none."""
    norm = syncbn.freeze(model_of("sync")[1])
    assert norm(torch.ones(1, 3)).shape == (1, 3)
    assert norm(torch.ones(0, 3)).shape == (0, 3)


def test_compiled() -> None:
    model = syncbn.freeze(nn.Sequential(nn.Conv2d(2, 3, 3), syncbn.SyncBatchNorm(3)))
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for mode in (True, False, True):
        torch.testing.assert_close(compiled.train(mode)(batch()), model(batch()))
    assert counter.frame_count == 1, "a mode that changes nothing needs no graph of its own"
    before = buffers(model)
    compiled.train()(batch(5))
    assert same(buffers(model), before)


def test_domains() -> None:
    """Each domain's own statistics, which stay as they are."""
    model = syncbn.domains(nn.Sequential(syncbn.SyncBatchNorm(2)), ["clean", "noisy"], affine=True)
    with syncbn.domain(model, "noisy"):
        model(batch())
    syncbn.freeze(model, affine=True)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    before = buffers(model)
    for name in ("clean", "noisy"):
        with syncbn.domain(model.train(), name):
            y = model(batch(1))
        held = model[0] if name == "clean" else model[0].domain_noisy
        x = (batch(1) - held.running_mean.view(-1, 1, 1)) / (held.running_var.view(-1, 1, 1) + 1e-5).sqrt()
        torch.testing.assert_close(y, x, rtol=1e-5, atol=1e-5)  # float32, in another order
    assert same(buffers(model), before)
    assert all(parameter.requires_grad for parameter in syncbn.unfreeze(model).parameters())


def test_memory_from_the_meta_device() -> None:
    """A frozen layer's memory is new there, and has to be given values."""
    with torch.device("meta"):
        norm = syncbn.freeze(syncbn.SyncBatchNorm(3))
    norm.to_empty(device="cpu")
    norm.running_var.fill_(7)
    norm.reset_parameters()
    assert torch.equal(norm.running_var, torch.ones(3))


def test_frozen_by_class() -> None:
    frozen = import_torchvision("ops").misc.FrozenBatchNorm2d(3)
    model = syncbn.freeze(nn.Sequential(frozen, syncbn.SyncBatchNorm(3)))
    assert type(model[0]) is type(frozen)
    norm = model[1].train()
    with torch.no_grad():
        for name in ("running_mean", "running_var", "weight", "bias"):
            getattr(norm, name).uniform_(0.5, 2)
            getattr(frozen, name).copy_(getattr(norm, name))
    x = torch.randn(2, 3, 4, 4)
    # torchvision's layer multiplies by weight / std; 1e-6 is float32's rounding of values of order 1.
    torch.testing.assert_close(norm(x), frozen(x), rtol=1e-6, atol=1e-6)


def test_what_is_refused() -> None:
    for model, message in (
        (
            nn.Sequential(nn.Linear(3, 3), syncbn.SyncBatchNorm(3, track_running_stats=False)),
            "layer '1' has no running",
        ),
        (
            nn.Sequential(syncbn.SyncBatchNorm(3), nn.BatchNorm1d(3)),
            "BatchNorm1d '1' is no layer of this package; call",
        ),
        (nn.Sequential(nn.Linear(3, 3)), "the model has no layer of this package; call"),
    ):
        with pytest.raises(ValueError, match=message):
            syncbn.freeze(model)
        assert all(module.training for module in model.modules())


def test_population_statistics_leave_the_mode_that_was_asked_for() -> None:
    model = nn.Sequential(syncbn.SyncBatchNorm(3), syncbn.SyncBatchNorm(3)).train()
    syncbn.freeze(model[0])
    syncbn.update_population_statistics(model, [torch.randn(8, 3)])
    assert syncbn.unfreeze(model)[0].training


def test_a_parametrized_weight_is_frozen() -> None:
    layer = syncbn.SyncBatchNorm(3)
    nn.utils.parametrize.register_parametrization(layer, "weight", nn.Softplus())
    syncbn.freeze(layer, affine=True)
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    syncbn.unfreeze(layer)
    assert all(parameter.requires_grad for parameter in layer.parameters())


def test_convert_says_that_frozen_true_is_no_unfreeze() -> None:
    model = syncbn.freeze(syncbn.convert(nn.Sequential(nn.BatchNorm2d(3)), "sync"))
    with pytest.warns(UserWarning, match=r"layers frozen by syncbn.freeze stay so until syncbn.unfreeze\(model\)"):
        syncbn.convert(model, "sync", frozen=True)
    assert model[0].frozen_state is not None
