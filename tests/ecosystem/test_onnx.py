"""ONNX: what torch.onnx makes of a converted model, in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
import torch
from model_steps import images
from torch import nn

import syncbn


@pytest.mark.works_with(
    "onnxscript", "`torch.onnx.export` of all three layers in evaluation: no operator of this package"
)
@pytest.mark.works_with("onnxruntime", "the exported model, for batches of any size: the outputs of torch")
def test_export(tmp_path: Path) -> None:
    torch.manual_seed(0)
    norms = (syncbn.convert(nn.BatchNorm2d(4), "sync"), syncbn.GhostBatchNorm(4, 2), syncbn.BatchRenorm(4))
    model = nn.Sequential(nn.Conv2d(3, 4, 3), *norms, nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
    x = images(6).float()
    model(x)
    batch = torch.export.Dim("batch")
    program = torch.onnx.export(model.eval(), (x,), dynamo=True, dynamic_shapes=({0: batch},), verbose=False)
    assert program is not None
    assert {node.domain for node in program.model.graph} <= {"", "ai.onnx"}
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for each in (x, torch.cat([x, x + 1])):
        (y,) = session.run(None, {session.get_inputs()[0].name: each.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), model(each))
