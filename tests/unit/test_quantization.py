"""torch's quantization of models with these layers: what works as it is, and where they have to be reverted."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import syncbn

quantization = pytest.importorskip("torch.ao.quantization", reason="this torch leaves quantization to torchao")
quantize_fx = pytest.importorskip("torch.ao.quantization.quantize_fx", reason="this torch leaves it to torchao")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

KINDS: dict[str, dict[str, Any]] = {
    "sync": {},
    "ghost": {"ghost_batch_size": 2},
    "renorm": {"warmup_steps": 0, "r_ramp_end": 1, "d_ramp_end": 1},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def backend() -> Any:
    before = torch.backends.quantized.engine
    supported = [name for name in ("fbgemm", "qnnpack") if name in torch.backends.quantized.supported_engines]
    if not supported:
        pytest.skip("this torch has no quantized kernels")
    torch.backends.quantized.engine = supported[0]
    yield supported[0]
    torch.backends.quantized.engine = before


def images() -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def network(kind: str, eager: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    first, last = ([quantization.QuantStub()], [quantization.DeQuantStub()]) if eager else ([], [])
    net = nn.Sequential(*first, nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), *last)
    syncbn.convert(net, kind, **KINDS[kind])  # type: ignore[call-overload]
    for _ in range(20):
        net(images())
    return net


def check_close(found: Tensor, expected: Tensor) -> None:
    """Eight bits: the largest error is a few steps of 1/128 of the range."""
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()


# -- eager mode --------------------------------------------------------------------------------------------------------


@every_kind
def test_eager_mode_says_what_to_do(kind: str, backend: str) -> None:
    """It replaces modules by their class. The layers stay as they are, and are given quantized tensors."""
    net = network(kind, eager=True).eval()
    net.qconfig = quantization.get_default_qconfig(backend)
    quantization.prepare(net, inplace=True)
    net(images())
    with pytest.raises(ValueError, match=r"'2'.*got torch.quint8; quantize syncbn.revert\(model\)"):
        quantization.convert(net)(images())


@every_kind
@pytest.mark.parametrize("aware", [False, True], ids=["after training", "aware"])
def test_eager_mode_after_revert(kind: str, aware: bool, backend: str) -> None:
    net = syncbn.revert(network(kind, eager=True)).train(aware)
    fuse = quantization.fuse_modules_qat if aware else quantization.fuse_modules
    fused = fuse(net, [["1", "2", "3"]])
    fused.qconfig = getattr(quantization, "get_default_qat_qconfig" if aware else "get_default_qconfig")(backend)
    prepared = quantization.prepare_qat(fused) if aware else quantization.prepare(fused)
    y = prepared(images())
    if aware:
        y.sum().backward()
    expected = prepared.eval()(images())
    check_close(quantization.convert(prepared)(images()), expected)


@every_kind
def test_fusion_of_modules_names_the_layer(kind: str) -> None:
    """The error is torch's own; the documentation says what to do."""
    net = network(kind, eager=True).eval()
    with pytest.raises((AssertionError, NotImplementedError), match=type(net[2]).__name__):
        quantization.fuse_modules(net, [["1", "2", "3"]])


# -- torch.fx ----------------------------------------------------------------------------------------------------------


def quantized(net: nn.Module, aware: bool, backend: str) -> tuple[nn.Module, Tensor]:
    """The model in eight bits, and what it should compute."""
    mapping = getattr(quantization, "get_default_qat_qconfig_mapping" if aware else "get_default_qconfig_mapping")
    prepare = quantize_fx.prepare_qat_fx if aware else quantize_fx.prepare_fx
    prepared = prepare(net.train(aware), mapping(backend), (images(),))
    y = prepared(images())
    if aware:
        y.sum().backward()
    prepared.eval()
    expected = prepared(images())
    return quantize_fx.convert_fx(prepared), expected


@every_kind
@pytest.mark.parametrize("aware", [False, True], ids=["after training", "aware"])
def test_fx_leaves_the_layers_in_floating_point(kind: str, aware: bool, backend: str) -> None:
    found, expected = quantized(network(kind), aware, backend)
    check_close(found(images()), expected)
    assert [m for m in found.modules() if isinstance(m, syncbn.layers.SmallBatchNorm)]


@every_kind
@pytest.mark.parametrize("how", ["revert", "revert, aware", "fold"])
def test_fx_of_a_reverted_or_folded_model_has_no_normalization(kind: str, how: str, backend: str) -> None:
    net = network(kind)
    plain = syncbn.fold(net.eval()) if how == "fold" else syncbn.revert(copy.deepcopy(net))
    found, expected = quantized(plain, how == "revert, aware", backend)
    check_close(found(images()), expected)
    if "aware" not in how:
        check_close(found(images()), net.eval()(images()))
    assert not [m for m in found.modules() if "Norm" in type(m).__name__]
