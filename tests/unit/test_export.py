"""Programs of torch.export: of evaluation, also compiled ahead of time, and of training."""

from __future__ import annotations

import copy
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import syncbn

KINDS: dict[str, dict[str, Any]] = {
    "sync": {},
    "ghost": {"ghost_batch_size": 2},
    "renorm": {"warmup_steps": 0, "r_ramp_end": 1, "d_ramp_end": 1},
}
every_kind = pytest.mark.parametrize("kind", KINDS)
each_export = pytest.mark.parametrize("strict", [False, True], ids=["run", "traced"])


def images(n: int = 4, seed: int = 1) -> Tensor:
    return torch.randn(n, 3, 6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 1


def network(kind: str | None, **options: Any) -> nn.Sequential:
    """A network with running statistics that are not the initial ones."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3)).double()
    if kind is not None:
        syncbn.convert(net, kind, **KINDS[kind], **options)  # type: ignore[call-overload]
    net(images())
    return net


def operators(program: Any) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


@every_kind
@each_export
def test_an_evaluated_model_is_that_of_torchs_layers(kind: str, strict: bool) -> None:
    """Tools that look for a convolution and a normalization in the program find them."""
    net = network(kind).eval()
    program = torch.export.export(net, (images(),), strict=strict)
    assert operators(program) == operators(torch.export.export(network(None).eval(), (images(),), strict=strict))
    assert "aten.batch_norm.default" in operators(program)
    x = images(seed=2)
    assert torch.equal(program.module()(x), net(x))


@every_kind
@each_export
@pytest.mark.filterwarnings("ignore:.*exported in training mode")
def test_a_program_of_training_trains(kind: str, strict: bool) -> None:
    """Outputs, gradients and running statistics are the model's, for another batch than the program was made from."""
    net = network(kind)
    program = torch.export.export(copy.deepcopy(net), (images(),), strict=strict).module()
    results = []
    for model in (program, net):
        x = images(seed=2).requires_grad_()
        y = model(x)
        y.square().sum().backward()
        state = {**dict(model.named_buffers()), **{name: p.grad for name, p in model.named_parameters()}}
        results.append({"y": y.detach(), "dx": x.grad, **state})
    assert set(results[1]) <= set(results[0])
    for name, expected in results[1].items():
        # float64, composed of torch's operations: another order of sums.
        torch.testing.assert_close(
            results[0][name], expected, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )


@every_kind
@each_export
def test_a_program_of_training_says_what_it_is(kind: str, strict: bool) -> None:
    with pytest.warns(UserWarning, match=r"exported in training mode.*model.eval\(\).*export syncbn.revert\(model\)"):
        torch.export.export(network(kind), (images(),), strict=strict)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*exported in training mode")
        torch.export.export(network(kind).eval(), (images(),), strict=strict)


@pytest.mark.slow  # it compiles C++, which takes half a minute
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="AOTInductor needs a C++ compiler")
def test_compiled_ahead_of_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of each kind, one after another. The package serves every size of batch."""
    inductor = pytest.importorskip("torch._inductor", reason="a torch without its compiler")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    net = nn.Sequential(*(layer for kind in KINDS for layer in network(kind, activation="relu")[:2]))
    for index in (2, 4):
        net[index] = nn.Conv2d(4, 4, 1).double()
    net.eval()
    sizes = {0: torch.export.Dim("n", min=1, max=64)}
    program = torch.export.export(net, (images(),), dynamic_shapes=(sizes,))
    path = inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "net.pt2"))
    packaged: Callable[[Tensor], Tensor] = inductor.aoti_load_package(path)
    for n in (4, 1, 7):
        x = images(n, seed=n)
        # float64: a fused kernel may multiply and add in another order.
        torch.testing.assert_close(packaged(x), net(x), rtol=1e-12, atol=1e-12)
