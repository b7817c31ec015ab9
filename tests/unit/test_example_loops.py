"""The training loops of `examples/loops/` are run by a study's setting, with the arm's layers in their networks."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from example_loops import LOOPS, SCRIPTS, cases, check_loop, check_script, example

from syncbn import GhostBatchNorm
from syncbn.study import Setting
from syncbn.train.config import config_from_dict


def test_every_loop_is_run() -> None:
    """Here, or in tests/ecosystem."""
    assert {path.stem for path in SCRIPTS} == set(LOOPS)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_lengths(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 60


@pytest.mark.parametrize(("name", "arm"), cases(ecosystem=False))
def test_loop(name: str, arm: str) -> None:
    check_loop(name, arm)


@pytest.mark.parametrize("name", sorted({name for name, _ in cases(ecosystem=False)}))
def test_script(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    check_script(name, tmp_path, monkeypatch, capsys)


@pytest.fixture
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_penalty_is_differentiated_twice(float64: None) -> None:
    """Its gradients through the arm's layers are those through torch's."""
    wgan = example("wgan_gp")
    torch.manual_seed(0)
    plain = wgan.network(2, 1)
    real, fake = torch.randn(2, 8, 2)
    config = config_from_dict({"per_gpu_batch_size": 8, "device": "cpu", "task": {"name": "wgan_gp:run"}})
    normalized = Setting(config=config, out=None, resume=False).normalize(copy.deepcopy(plain))
    gradients = []
    for critic in (plain, normalized):
        torch.manual_seed(1)
        wgan.penalty(critic, real, fake).backward()
        weights = [p for name, p in critic.named_parameters() if name.endswith("weight")]
        gradients.append([weight.grad for weight in weights])
    assert isinstance(normalized[1], GhostBatchNorm)
    assert all(gradient.abs().max() > 1e-6 for gradient in gradients[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-12)
