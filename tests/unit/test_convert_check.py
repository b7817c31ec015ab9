"""`syncbn convert-check`: what it finds in models that convert well, badly or not at all, and its exit codes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import syncbn
from syncbn.cli import main
from syncbn.convert_check import KINDS, compare, largest_difference
from syncbn.named_model import NamedModel

USER_MODULE = """
import torch
from torch import nn
import syncbn

def whole():
    norms = nn.BatchNorm2d(4), nn.GroupNorm(2, 4)
    return nn.Sequential(nn.Conv2d(3, 4, 3), *norms, nn.Dropout(), nn.Flatten(), nn.Linear(144, 2))

class Doubled(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)

def unknown():
    return nn.Sequential(Doubled(3), nn.BatchNorm2d(3))

class Wrong(nn.BatchNorm2d):
    def forward(self, x):
        return torch.relu(super().forward(x))

syncbn.register_batchnorm(Wrong)  # which is not so

def wrong():
    return nn.Sequential(nn.Conv2d(3, 4, 1), Wrong(4))

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x, scale):
        return {"y": self.norm(x) * scale, "n": len(x)}

def two():
    return Two(), {"x": torch.randn(6, 4), "scale": torch.rand(6, 1)}

def no_model():
    return 3

def broken():
    raise RuntimeError("no luck")

def without():
    return nn.Sequential(nn.GroupNorm(1, 3), nn.InstanceNorm2d(3, affine=True))

def no_tensor():
    class Silent(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x):
            self.norm(x)
    return Silent()

def too_small():
    return nn.Sequential(nn.BatchNorm2d(3), nn.MaxPool2d(9))
"""


@pytest.fixture(autouse=True)
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "checked_models.py").write_text(USER_MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "checked_models", raising=False)


def check(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(["convert-check", *words])
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_computes_the_same(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = check(capsys, "checked_models:whole", "--kind", kind, "--input-size", "8")
    assert code == 0, out
    found = out.splitlines()
    assert found[0] == f"checked_models:whole, converted to {kind}"
    assert "  replaced  1 BatchNorm2d" in found
    assert "  kept      1 GroupNorm" in found
    assert "    outputs in evaluation     0.0e+00" in found
    assert found[-1] == "  the same"


def test_inputs_of_the_function(capsys: pytest.CaptureFixture[str]) -> None:
    assert check(capsys, "checked_models:two")[0] == 0


def test_a_layer_that_loses_something(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = check(capsys, "checked_models:wrong", "--input-size", "4")
    assert code == 1
    assert out.splitlines()[-1] == "  NOT the same"
    assert "  reverted  to the first classes" in out
    assert "in 0.weight" in out


def test_a_layer_that_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = check(capsys, "checked_models:unknown", "--input-size", "4")
    assert code == 1
    assert "  replaced  1 BatchNorm2d\n" in out
    assert "  refused   Doubled '0' cannot be converted: checked_models.Doubled is a subclass that may do more" in out
    assert out.splitlines()[-1] == "  not converted as a whole"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["checked_models:no_model"], "a function that returns a model, or a model and its inputs, not int"),
        (["checked_models:broken"], "model checked_models:broken: the function raised RuntimeError: no luck"),
        (["checked_models:nothing"], "an attribute of checked_models, which has none called nothing"),
        (["no_such_module:f"], "a module that Python finds"),
        (["checked_models:without"], "a model with batch normalization (it has 1 GroupNorm, 1 InstanceNorm2d)"),
        (["checked_models:no_tensor"], "it returns no tensor that depends on its inputs"),
        (["checked_models:too_small", "--input-size", "4"], "a model that takes (4, 3, 4, 4) in float64 ("),
        (["checked_models:whole", "--kind", "batch"], "kind: got 'batch', expected one of 'sync', 'ghost', 'renorm'"),
        (["checked_models:whole", "--batch-size", "1"], "batch-size: got 1, expected an integer of at least 2"),
        (["checked_models:whole", "--input-size", "0"], "input-size: got 0, expected a positive integer"),
        (["timm:resnet18x"], "the name of a model of timm; did you mean resnet18"),
        (["torchvision:resnet_18"], "the name of a model of torchvision; did you mean resnet18"),
        (["torchvision:fasterrcnn_resnet50_fpn"], "no detector, which takes targets; give MODULE:FUNCTION"),
        ([], "which syncbn convert-check needs"),
    ],
    ids=str,
)
def test_mistakes(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, error = check(capsys, *words)
    assert (code, out) == (2, "")
    assert message in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("name", ["timm:test_resnet", "test_resnet"])
def test_a_model_of_timm(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("syncbn.norm_act", reason="it is timm's")
    code, out, _ = check(capsys, name, "--input-size", "32", "--batch-size", "3")
    assert (code, out.splitlines()[0]) == (0, "timm:test_resnet, converted to sync")


def test_a_frozen_model_names_the_remedy() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("weight", "bias", "running_mean", "running_var"):
                self.register_buffer(name, torch.ones(3))

    Frozen.__name__ = "FrozenBatchNorm2d"
    with pytest.raises(ValueError, match=r"it has 1 FrozenBatchNorm2d; syncbn.convert\(model, kind, frozen=True\)"):
        compare(NamedModel("x", nn.Sequential(Frozen()), torch.zeros(2, 3, 2, 2)), "sync")


def test_a_model_that_changes_its_input_or_does_not_end_as_it_was() -> None:
    class InPlace(nn.BatchNorm2d):
        pass

    syncbn.register_batchnorm(InPlace)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = InPlace(3)

        def forward(self, x: Tensor) -> Any:
            if not x.requires_grad:
                x.mul_(2)
            return [self.norm(x)]

    found = compare(NamedModel("x", Net(), torch.randn(4, 3, 2, 2)), "sync")
    assert found.same
    found.reverted = False
    assert not found.same


def test_differences() -> None:
    one = {"a": torch.tensor([1.0, -10.0]), "b": torch.tensor([1e-9])}
    assert largest_difference(one, one) == (0.0, "")
    assert largest_difference({**one, "a": torch.tensor([1.5, -10.0])}, one) == (pytest.approx(0.05), "a")
    # A thousandth of the largest of all is the least scale.
    assert largest_difference({**one, "b": torch.tensor([2e-9])}, one) == (pytest.approx(1e-7), "b")
    assert largest_difference({"a": one["a"]}, one) == (float("inf"), "b")
    assert largest_difference({**one, "a": torch.ones(3)}, one) == (float("inf"), "a")
    nan = {"a": torch.tensor([float("nan"), 1.0, float("inf")])}
    assert largest_difference(nan, nan) == (0.0, "")
    assert largest_difference({"a": torch.ones(3)}, nan) == (float("inf"), "a")
    assert largest_difference(nan, {"a": torch.ones(3)}) == (float("inf"), "a")
