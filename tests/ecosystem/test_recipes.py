"""Each recipe of `docs/recipes.md` on two processes gives the model of one process with the whole batch, in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import recipe_jobs
import torch
from forked import launch

TITLES = ("A loop with DistributedDataParallel", "accelerate", "Lightning", "Fabric", "transformers", "FSDP2")
TOLERANCE = 1e-10  # float64, over five steps: the order of the sums differs
ONE_PROCESS = {'syncbn.convert(model, "sync")': "pass", "batch_size=4": "batch_size=8"}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))


def test_every_recipe_is_run_here() -> None:
    found = recipe_jobs.recipes()
    assert tuple(found) == TITLES
    for title, (text,) in found.items():
        assert 10 <= len([line for line in text.splitlines() if line]) <= 25, title


@pytest.mark.parametrize("title", TITLES)
def test_recipe(title: str, tmp_path: Path) -> None:
    if title == "transformers":  # its optimizer has a schedule, so its Trainer says what one process does
        folder = tmp_path / "alone"
        folder.mkdir()
        (expected,) = launch(recipe_jobs.run, 1, folder, title, ONE_PROCESS)
    else:
        expected = recipe_jobs.alone()
    for state in launch(recipe_jobs.run, 2, tmp_path, title, {}):
        torch.testing.assert_close(state, expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_without_the_conversion_the_model_is_another(tmp_path: Path) -> None:
    """The comparisons above can fail."""
    left_out = {'syncbn.convert(model.to(device), "sync")': "pass"}
    state, _ = launch(recipe_jobs.run, 2, tmp_path, TITLES[0], left_out)
    assert (state["4.running_mean"] - recipe_jobs.alone()["4.running_mean"]).abs().max() > 1e-3


def test_what_the_option_of_transformers_is_for(tmp_path: Path) -> None:
    """Without it two processes double the gradient, as twice the learning rate does, but for the limit of its norm."""
    unlimited = {'optim="sgd"': 'optim="sgd", max_grad_norm=0.0'}
    left_out = {"    average_tokens_across_devices=False,\n": ""}
    state, _ = launch(recipe_jobs.run, 2, tmp_path, "transformers", unlimited | left_out)
    twice = {"learning_rate=0.1": "learning_rate=0.2"}
    (expected,) = launch(recipe_jobs.run, 1, tmp_path, "transformers", unlimited | ONE_PROCESS | twice)
    torch.testing.assert_close(state, expected, rtol=TOLERANCE, atol=TOLERANCE)


LOCAL = {
    "A loop with DistributedDataParallel": {
        "DistributedDataParallel(model)": "DistributedDataParallel(model, broadcast_buffers=False)"
    },
    "accelerate": {
        "Accelerator()": "Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)])",
        "import Accelerator": "import Accelerator, DistributedDataParallelKwargs",
    },
    "Lightning": {
        'strategy="ddp"': "strategy=DDPStrategy(broadcast_buffers=False)",
        "import torch\n": "import torch\nfrom lightning.pytorch.strategies import DDPStrategy\n",
    },
    "Fabric": {
        'strategy="ddp"': "strategy=DDPStrategy(broadcast_buffers=False)",
        "import torch\n": "import torch\nfrom lightning.fabric.strategies import DDPStrategy\n",
    },
    "transformers": {'"out"': '"out", ddp_broadcast_buffers=False'},
}
"""By recipe, what the table of options for local layers changes in it."""


@pytest.mark.parametrize("title", LOCAL)
def test_local_layers(title: str, tmp_path: Path) -> None:
    """With the option, DistributedDataParallel leaves each process its running statistics."""
    option, *_ = LOCAL[title].values()
    assert option in recipe_jobs.PAGE.read_text(), "it is not the page's"
    local = {'"sync"': '"ghost", ghost_batch_size=2', **LOCAL[title]}
    (first, sent), (second, _) = launch(recipe_jobs.run_noting_buffers, 2, tmp_path, title, local)
    assert sent == [False]
    means = [name for name in first if name.endswith("running_mean")]
    assert means
    assert not any(torch.equal(first[name], second[name]) for name in means)
