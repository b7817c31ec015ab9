"""What torch's profiler shows of a layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cpu_cases import compiled
from torch import nn

import syncbn
from syncbn import BatchRenorm, GhostBatchNorm, SyncBatchNorm
from syncbn.kernels import dispatch

LAYERS = {
    "SyncBatchNorm": lambda: SyncBatchNorm(3, activation="relu"),
    "GhostBatchNorm": lambda: GhostBatchNorm(3, 2),
    "BatchRenorm": lambda: BatchRenorm(3, warmup_steps=0, r_ramp_end=2, d_ramp_end=2),
}
each_layer = pytest.mark.parametrize("name", LAYERS)


@pytest.fixture(params=["operator", "steps", "twins"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The CPU's operator for a whole pass; its operators for the steps, as ranks use them; torch's operations."""
    if request.param == "twins":
        monkeypatch.setattr(dispatch, "_compiled", lambda x: dispatch.REFERENCE)
    else:
        compiled()
    return request.param


def events(profile: Any) -> dict[str, list[str]]:
    """The events inside of each of ours, by its name."""

    def inside(event: Any) -> Iterator[str]:
        for child in event.cpu_children:
            yield child.name
            yield from inside(child)

    return {event.name: list(inside(event)) for event in profile.events() if event.name.startswith("syncbn.")}


@each_layer
def test_events_of_training(name: str, path: str) -> None:
    """One around each pass, with the work of the pass inside."""
    layer, x = LAYERS[name](), torch.randn(4, 3, 5, requires_grad=True)
    if path == "steps":
        layer.observer = lambda *statistics: None
    with torch.profiler.profile() as profile:
        layer(x).sum().backward()
    found = events(profile)
    assert list(found) == [f"syncbn.{name}", f"syncbn.{name}, backward"]
    forward, backward = found.values()
    expected = {
        "operator": ("syncbn::batch_norm_forward", "syncbn::batch_norm_backward"),
        "steps": ("syncbn::normalize", "syncbn::grad_input"),
        "twins": ("aten::rsqrt", "aten::sum"),
    }[path]
    assert expected[0] in forward
    assert expected[1] in backward


@each_layer
def test_events_of_evaluation(name: str) -> None:
    layer, x = LAYERS[name]().eval(), torch.randn(4, 3, 5, requires_grad=True)
    with torch.profiler.profile() as profile:
        layer(x).sum().backward()
    ((found, inside),) = events(profile).items()
    assert found == f"syncbn.{name}"
    assert "aten::batch_norm" in inside


def test_events_of_a_converted_model_and_of_the_older_profiler() -> None:
    net = syncbn.convert(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), "ghost", ghost_batch_size=2)
    with torch.autograd.profiler.profile() as profile:
        net(torch.randn(4, 3)).sum().backward()
    assert [event.name for event in profile.function_events if event.name.startswith("syncbn.")] == [
        "syncbn.GhostBatchNorm",
        "syncbn.GhostBatchNorm, backward",
    ]


def test_a_graph_that_was_recorded_can_be_used_again(path: str) -> None:
    """Also after the profiler has ended, and for a second derivative; gradients are those without a profiler."""
    layer = SyncBatchNorm(3).double()
    x = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(layer(x).pow(3).sum(), x)[0]
    with torch.profiler.profile() as profile:
        y = layer(x).pow(3).sum()
        for _ in range(2):
            (first,) = torch.autograd.grad(y, x, create_graph=True)
    assert [event.name for event in profile.events()].count("syncbn.SyncBatchNorm, backward") == 2
    torch.testing.assert_close(first, expected, rtol=1e-10, atol=1e-12)
    (second,) = torch.autograd.grad(first.sum(), x, retain_graph=True)
    assert second.isfinite().all()
    assert torch.equal(torch.autograd.grad(y, x)[0], expected) or path == "twins"


def test_nothing_is_recorded_without_a_profiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> Any:
        raise AssertionError("an event takes time")

    monkeypatch.setattr("syncbn.layers.recorded", fail)
    layer, x = SyncBatchNorm(3), torch.randn(4, 3, requires_grad=True)
    layer(x).sum().backward()
    with pytest.raises(AssertionError, match="takes time"), torch.profiler.profile():
        layer(x)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_graph_shows_the_operator(backend: str) -> None:
    """Traced while a profiler records, and run under another."""
    compiled()
    torch.compiler.reset()
    layer, x = SyncBatchNorm(3), torch.randn(4, 3, 5, requires_grad=True)
    graph = torch.compile(layer, fullgraph=True, backend=backend)
    with torch.profiler.profile():
        graph(x).sum().backward()
    with torch.profiler.profile() as profile:
        graph(x).sum().backward()
    names = [event.name for event in profile.events()]
    assert {"syncbn::batch_norm_forward", "syncbn::batch_norm_backward"} <= set(names)
