"""torchao's quantization of exported models (pt2e) with these layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import syncbn

steps = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e", reason="the extra `ecosystem` has torchao")
x86 = pytest.importorskip(
    "torchao.quantization.pt2e.quantizer.x86_inductor_quantizer", reason="the extra `ecosystem` has torchao"
)

KINDS: dict[str, dict[str, Any]] = {
    "sync": {},
    "ghost": {"ghost_batch_size": 2},
    "renorm": {"warmup_steps": 0, "r_ramp_end": 1, "d_ramp_end": 1},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def images() -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def network(kind: str) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    syncbn.convert(net, kind, **KINDS[kind])  # type: ignore[call-overload]
    for _ in range(20):
        net(images())
    return net


def quantizer() -> Any:
    return x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())


def operators(model: Any) -> set[str]:
    return {str(node.target) for node in model.graph.nodes if node.op == "call_function"}


def check_close(found: Tensor, expected: Tensor) -> None:
    """Eight bits: the largest error is a few steps of 1/128 of the range."""
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()


@every_kind
def test_after_training(kind: str) -> None:
    """The layers of the evaluated model are found, and become part of the convolutions."""
    net = network(kind).eval()
    prepared = steps.prepare_pt2e(torch.export.export(net, (images(),)).module(), quantizer())
    prepared(images())
    found = steps.convert_pt2e(prepared)
    assert not [name for name in operators(found) if "norm" in name]
    assert [name for name in operators(found) if "quantize" in name]
    check_close(found(images()), net(images()))


@every_kind
def test_while_training_says_what_to_do(kind: str) -> None:
    """The program of a layer in training cannot be brought to evaluation. That of a reverted one is torch's own."""
    with pytest.warns(UserWarning, match=r"quantization-aware training, export syncbn.revert\(model\)"):
        torch.export.export(network(kind), (images(),), strict=True)
