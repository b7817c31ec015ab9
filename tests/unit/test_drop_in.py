"""Where other code meets the layers: what holds for torch's batch normalization holds for them."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fw
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.data import DataLoader, TensorDataset

import syncbn

KINDS: dict[str, dict[str, Any]] = {
    "sync": {},
    "ghost": {"ghost_batch_size": 2},
    "renorm": {"warmup_steps": 0, "r_ramp_end": 1, "d_ramp_end": 1},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def network(kind: str | None = None, inplace: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace))
    return net if kind is None else syncbn.convert(net, kind, **KINDS[kind])  # type: ignore[call-overload, no-any-return]


def images(n: int = 4) -> Tensor:
    return torch.randn(n, 3, 6, 6, generator=torch.Generator().manual_seed(1)) + 1


# -- subclasses of Tensor ----------------------------------------------------------------------------------------------


class Tagged(Tensor):
    """A tensor that hands on its tag, as MONAI's MetaTensor hands on its metadata."""

    tag: str | None = None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = super().__torch_function__(func, types, args, kwargs or {})
        tags = [a.tag for a in args if isinstance(a, Tagged)]
        if isinstance(found, Tagged) and tags:
            found.tag = tags[0]
        return found


@pytest.mark.works_with("torch", "subclasses of `Tensor` in training, evaluation, autocast, `torch.compile` and `vmap`")
@every_kind
@pytest.mark.parametrize("how", ["train", "eval", "autocast", "compile", "vmap"])
def test_a_subclass_goes_through(kind: str, how: str) -> None:
    """With an activation that writes in place on the layer's output."""
    net, plain = network(kind, inplace=True), network(kind)
    x = images().as_subclass(Tagged)
    x.tag = "scan 7"
    function: Any = net
    if how in ("eval", "vmap"):
        net.eval()
        plain.eval()
    if how == "compile":
        function = torch.compile(net, backend="eager", fullgraph=True)  # with others torch has no such convolution
    if how == "vmap":
        function = torch.func.vmap(lambda each: net(each[None])[0])
    with torch.autocast("cpu", enabled=how == "autocast"):
        y, expected = function(x), plain(images())
    if how != "vmap":  # which returns a Tensor whatever it is given
        assert isinstance(y, Tagged)
    if how not in ("compile", "vmap"):
        assert y.tag == "scan 7"
    torch.testing.assert_close(y.as_subclass(Tensor), expected)
    y.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(net[0].weight.grad, plain[0].weight.grad)


def test_a_subclass_as_a_residual_too() -> None:
    layer = syncbn.SyncBatchNorm(3, activation="relu")
    x = images()
    y = layer(x.as_subclass(Tagged), x.as_subclass(Tagged))
    assert isinstance(y, Tagged)
    torch.testing.assert_close(y.as_subclass(Tensor), syncbn.SyncBatchNorm(3, activation="relu")(x, x))


# -- buffers -----------------------------------------------------------------------------------------------------------


@every_kind
def test_the_buffers_are_those_of_batch_norm(kind: str) -> None:
    assert [name for name, _ in network(kind).named_buffers()] == [name for name, _ in network().named_buffers()]
    by_hand = getattr(syncbn, {"sync": "SyncBatchNorm", "ghost": "GhostBatchNorm", "renorm": "BatchRenorm"}[kind])
    assert [n for n, _ in by_hand(4, **KINDS[kind]).named_buffers()] == [
        n for n, _ in nn.BatchNorm2d(4).named_buffers()
    ]


@pytest.mark.works_with("torch", "`AveragedModel` made before the conversion")
@every_kind
def test_an_average_made_before_the_conversion_goes_on(kind: str) -> None:
    net = network()
    average = AveragedModel(net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5), use_buffers=True)
    syncbn.convert(net, kind, **KINDS[kind])  # type: ignore[call-overload]
    average.update_parameters(net)
    net(images())
    average.update_parameters(net)
    torch.testing.assert_close(average.module[1].running_mean, net[1].running_mean / 2)


@pytest.mark.works_with("torch", "models made on the device `meta`, then loaded or `to_empty`")
@every_kind
@pytest.mark.parametrize("how", ["assign", "to_empty"])
def test_from_the_meta_device(kind: str, how: str) -> None:
    with torch.device("meta"):
        net = network(kind)
    state = network().state_dict()
    if how == "assign":
        net.load_state_dict(state, assign=True)
    else:
        net.to_empty(device="cpu")
        net.load_state_dict(state)
    net(images())
    net(torch.full((4, 3, 6, 6), torch.nan))
    assert int(net[1].num_nonfinite_batches) == 1
    assert net[1].num_nonfinite_batches.device.type == "cpu"


def test_the_counter_goes_where_the_layer_goes() -> None:
    layer = syncbn.SyncBatchNorm(3)
    layer(torch.full((4, 3), torch.inf))
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer).double().half()):
        assert int(copied.num_nonfinite_batches) == 1
        assert copied.num_nonfinite_batches.dtype == torch.int64
    assert layer.to("meta").num_nonfinite_batches.is_meta


# -- tracers -----------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = syncbn.GhostBatchNorm(3, 2, activation="relu")

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x, x)
        return y * 2


@pytest.mark.works_with("torch", "`torch.fx.symbolic_trace` of a converted model")
@every_kind
@pytest.mark.parametrize("training", [True, False])
def test_torch_fx_takes_a_layer_for_a_leaf(kind: str, training: bool) -> None:
    net = network(kind).train(training)
    traced = torch.fx.symbolic_trace(copy.deepcopy(net))
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["0", "1", "2"]
    assert torch.equal(traced(images()), net(images()))


def test_torch_fx_with_a_residual() -> None:
    net = Residual()
    traced = torch.fx.symbolic_trace(net)
    assert torch.equal(traced(images()), net(images()))
    with pytest.raises(ValueError, match="cannot be traced by itself"):
        torch.fx.symbolic_trace(net.norm)


@pytest.mark.works_with("torch", "`torch.jit.script`: refused, with what to do; it takes the reverted model")
@every_kind
def test_torch_jit_script_says_what_to_do(kind: str) -> None:
    net = network(kind).eval()
    with pytest.raises(ValueError, match=r"'1' cannot be scripted: script syncbn.revert\(model\)"):
        torch.jit.script(net)
    x = images()
    expected = net(x)
    torch.testing.assert_close(torch.jit.script(syncbn.revert(net))(x), expected)


@pytest.mark.works_with("torch", "`FakeTensorMode`: conversion, a step and back")
@every_kind
def test_conversion_of_fake_tensors(kind: str) -> None:
    with FakeTensorMode():
        net = network(kind)
        assert net(images_like()).shape == (4, 4, 4, 4)
        syncbn.revert(net)
    assert type(net[1]) is nn.BatchNorm2d


def images_like() -> Tensor:
    return torch.empty(4, 3, 6, 6)


# -- forward-mode derivatives ------------------------------------------------------------------------------------------


def layers(kind: str) -> nn.Module:
    torch.manual_seed(0)
    options: dict[str, Any] = {"activation": "silu", **KINDS[kind]}
    name = {"sync": "SyncBatchNorm", "ghost": "GhostBatchNorm", "renorm": "BatchRenorm"}[kind]
    first, second = (getattr(syncbn, name)(3, **options, dtype=torch.float64) for _ in range(2))
    nn.init.uniform_(first.weight, 0.5, 1.5)
    return nn.Sequential(first, nn.Conv1d(3, 3, 1).double(), second)


@every_kind
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("how", ["dual", "jvp", "jacfwd", "linearize"])
def test_forward_mode_equals_reverse_mode(kind: str, training: bool, how: str) -> None:
    generator = torch.Generator().manual_seed(2)
    x, v = torch.randn(2, 4, 3, 2, generator=generator, dtype=torch.float64).unbind(0)
    net = layers(kind).train(training)
    reference = copy.deepcopy(net)
    _, expected = torch.autograd.functional.jvp(lambda a: reference(a), x, v)
    if how == "dual":
        with fw.dual_level():
            found = fw.unpack_dual(net(fw.make_dual(x, v))).tangent
    else:
        state = {**dict(net.named_parameters()), **{k: b.clone() for k, b in net.named_buffers()}}

        def function(a: Tensor) -> Tensor:
            buffers = {k: b.clone() for k, b in state.items()}  # which the layers may change
            return torch.func.functional_call(net, buffers, (a,))

        if how == "jvp":
            found = torch.func.jvp(function, (x,), (v,))[1]
        elif how == "linearize":
            found = torch.func.linearize(function, x)[1](v)
        else:
            found = (torch.func.jacfwd(function)(x) * v).sum((-1, -2, -3))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    if how == "dual":
        for name, buffer in reference.named_buffers():
            torch.testing.assert_close(net.get_buffer(name), buffer, rtol=1e-12, atol=1e-15)
            assert not net.get_buffer(name).requires_grad


# -- the habits of other code ------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("torchs", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d])
def test_a_converted_layer_is_found_by_its_first_class(kind: str, torchs: type[nn.Module]) -> None:
    net = syncbn.convert(nn.Sequential(torchs(4)), kind, **KINDS[kind])  # type: ignore[call-overload]
    for layer in (net[0], copy.deepcopy(net)[0], pickle.loads(pickle.dumps(net))[0]):
        assert isinstance(layer, torchs)
        others = {nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm} - {torchs}
        assert not isinstance(layer, tuple(others))
        assert type(layer).__name__ in ("SyncBatchNorm", "GhostBatchNorm", "BatchRenorm")
    assert type(syncbn.revert(net)[0]) is torchs


@pytest.mark.works_with("torch", "`swa_utils.update_bn` beside `update_population_statistics`")
@every_kind
def test_batches_as_torchs_update_bn_takes_them(kind: str) -> None:
    data = torch.randn(32, 3, 6, 6, generator=torch.Generator().manual_seed(3)) * 2 + 5
    for dataset in (TensorDataset(data), TensorDataset(data, torch.zeros(32))):
        net, torchs = network(kind), network()
        syncbn.update_population_statistics(net, DataLoader(dataset, 8), estimator="mean")
        update_bn(DataLoader(dataset, 8), torchs)
        torch.testing.assert_close(net[1].running_mean, torchs[1].running_mean)
        if kind == "sync":
            torch.testing.assert_close(net[1].running_var, torchs[1].running_var)
    named = [{"pixels": each, "label": 0} for each in data.split(8)]
    by_name = network(kind)
    syncbn.update_population_statistics(
        by_name, named, estimator="mean", forward=lambda model, batch: model(batch["pixels"])
    )
    assert torch.equal(by_name[1].running_var, net[1].running_var)


def test_eps_is_positive_everywhere() -> None:
    for eps in (0, -1e-5, float("nan"), float("inf"), None):
        for make in (syncbn.SyncBatchNorm, syncbn.BatchRenorm, lambda c, eps: syncbn.GhostBatchNorm(c, 2, eps=eps)):
            with pytest.raises(ValueError, match="eps must be a positive number"):
                make(3, eps=eps)
        with pytest.raises(ValueError, match="eps must be a positive number"):
            syncbn.convert(network(), "sync", eps=eps)
    layer = syncbn.SyncBatchNorm(3)
    layer.eps = 0.0
    with pytest.raises(ValueError, match=r"SyncBatchNorm .*: eps must be positive in training, got 0.0"):
        layer(images())
    with pytest.raises(ValueError, match=r"cannot be converted.*eps must be a positive number, got 0"):
        syncbn.convert(nn.Sequential(nn.BatchNorm2d(3, eps=0)), "sync")


@pytest.mark.works_with("torch", "`torch.func.replace_all_batch_norm_modules_` of a converted model")
@every_kind
def test_layers_whose_statistics_were_removed(kind: str) -> None:
    net = network(kind)
    torch.func.replace_all_batch_norm_modules_(net)
    batch = torch.nn.functional.batch_norm(net[0](images()), None, None, training=True)
    if kind != "ghost":
        torch.testing.assert_close(net(images()), batch.relu())
    torch.testing.assert_close(net.eval()(images()), batch.relu())


def test_a_conversion_that_changes_nothing_says_so() -> None:
    with pytest.warns(UserWarning, match="has changed nothing.*it has 2 GroupNorm, which stay as they are"):
        syncbn.convert(nn.Sequential(nn.GroupNorm(1, 2), nn.GroupNorm(1, 2)), "sync")
    with pytest.warns(UserWarning, match="or `where` leaves all of them out"):
        syncbn.convert(network(), "sync", where=lambda name, layer: False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        syncbn.convert(syncbn.convert(network(), "sync"), "sync")
