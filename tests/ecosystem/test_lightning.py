"""`syncbn.integrations.lightning` with the real Trainer, on one process and on two."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pickle
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import lightning_jobs
import pytest
import torch
import torch.distributed as dist
from forked import launch
from lightning.pytorch.plugins import TorchSyncBatchNorm
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

import syncbn
from syncbn.integrations import lightning as integration
from syncbn.integrations.lightning import ConvertBatchNorm

TOLERANCE = 1e-10  # float64, over a run: the order of the sums differs
GHOST = {"ghost_batch_size": 2}
RENORM = {"sync": True, "momentum": 0.3, "warmup_steps": 1, "r_ramp_end": 4, "d_ramp_end": 4}
CLASSES = {"sync": "SyncBatchNorm", "ghost": "GhostBatchNorm", "renorm": "BatchRenorm"}


@pytest.mark.parametrize(
    ("processes", "strategy", "role", "kind", "options"),
    [
        (1, "ddp", "plugins", "sync", {}),
        (2, "ddp", "plugins", "sync", {}),
        (2, "ddp", "plugins", "renorm", RENORM),
        (1, "auto", "callbacks", "ghost", GHOST),
        (2, "ddp", "callbacks", "ghost", GHOST),
        (2, "ddp", "callbacks", "sync", {"process_group": [0, 1]}),
    ],
)
def test_training_equals_one_process(
    processes: int, strategy: str, role: str, kind: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """Weights and running statistics; the layers are converted in training, and have their first class after it."""
    expected = lightning_jobs.alone(None if kind == "sync" else kind, options, processes)
    check(launch(lightning_jobs.trained, processes, tmp_path, processes, strategy, role, kind, options), expected, kind)


def test_the_package_pytorch_lightning(tmp_path: Path) -> None:
    arguments = (2, "ddp", "plugins", "sync", {}, "pytorch_lightning")
    check(launch(lightning_jobs.trained, 2, tmp_path, *arguments), lightning_jobs.alone(None, {}), "sync")


def check(results: list[Any], expected: dict[str, torch.Tensor], kind: str) -> None:
    for state, during, after in results:
        assert during == [CLASSES[kind]]
        assert after == ["BatchNorm2d", "BatchNorm2d"]
        torch.testing.assert_close(state, expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_local_statistics_give_another_result() -> None:
    """The comparisons above can fail: on the data of one process, layers of two processes are not those of one."""
    whole, halves = lightning_jobs.alone(None, {}), lightning_jobs.alone("ghost", {"ghost_batch_size": 4}, 2)
    assert (whole["4.running_mean"] - halves["4.running_mean"]).abs().max() > 1e-3


def test_without_the_package_lightning(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lightning", "lightning.pytorch"):
        monkeypatch.setitem(sys.modules, name, None)  # its import raises ModuleNotFoundError
    monkeypatch.delitem(sys.modules, "syncbn.integrations.lightning")
    monkeypatch.setattr(syncbn.integrations, "lightning", integration)  # brings it back after the import below
    found = importlib.import_module("syncbn.integrations.lightning").ConvertBatchNorm
    pytorch_lightning = importlib.import_module("pytorch_lightning")
    assert found is not ConvertBatchNorm
    assert issubclass(found, pytorch_lightning.Callback)
    assert isinstance(found("sync"), pytorch_lightning.plugins.LayerSync)


# -- on one process ----------------------------------------------------------------------------------------------------


@pytest.fixture
def no_world() -> Iterator[None]:
    """Lightning leaves its process group to the end of the process."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def trainer(**options: Any) -> lightning.Trainer:
    return lightning.Trainer(max_epochs=1, accelerator="cpu", devices=1, **options, **lightning_jobs.QUIET)


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(*lightning_jobs.samples()), 8)


def classifier() -> Any:
    return lightning_jobs.module_of(lightning)


def layers(model: nn.Module) -> set[str]:
    return {type(layer).__name__ for layer in model.modules() if "Norm" in type(layer).__name__}


def test_training_again_and_evaluation() -> None:
    """A second training converts again, and evaluation has the first layers."""
    module, callback = classifier(), ConvertBatchNorm("ghost", **GHOST)
    module.test_step = lambda batch: module.log("kinds", float(layers(module) == {"BatchNorm2d"}))
    for _ in range(2):
        module.seen = set()
        trainer(callbacks=[callback]).fit(module, loader())
        assert module.seen == {"GhostBatchNorm"}
        assert trainer(callbacks=[callback]).test(module, loader(), verbose=False)[0]["kinds"] == 1
    assert int(module.network[1].num_batches_tracked) == 6


@pytest.mark.parametrize("role", ["plugins", "callbacks"])
def test_an_exception_in_training_leaves_the_first_layers(role: str, no_world: None) -> None:
    module = classifier()
    module.on_train_batch_start = lambda batch, index: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer(strategy="ddp", **{role: [ConvertBatchNorm("sync")]}).fit(module, loader())
    assert layers(module) == {"BatchNorm2d"}


def test_as_plugin_and_callback_at_once(no_world: None) -> None:
    module, convert = classifier(), ConvertBatchNorm("ghost", **GHOST)
    trainer(strategy="ddp", plugins=[convert], callbacks=[convert]).fit(module, loader())
    assert module.seen == {"GhostBatchNorm"}
    assert layers(module) == {"BatchNorm2d"}


def test_the_plugin_is_not_asked_on_one_device() -> None:
    """As the docstring says; if Lightning changes this, the docstring has to."""
    module = classifier()
    trainer(plugins=[ConvertBatchNorm("ghost", **GHOST)]).fit(module, loader())
    assert module.seen == {"BatchNorm2d"}


class Replaces(TorchSyncBatchNorm):
    """What `sync_batchnorm=True` does, and back at once: under DDP, `nn.SyncBatchNorm` refuses the CPU."""

    def apply(self, model: nn.Module) -> nn.Module:
        return TorchSyncBatchNorm().revert(TorchSyncBatchNorm().apply(model))

    def revert(self, model: nn.Module) -> nn.Module:
        return model


def test_not_together_with_another_converter(no_world: None) -> None:
    with pytest.raises(MisconfigurationException, match="Choose one or the other"):
        trainer(sync_batchnorm=True, plugins=[ConvertBatchNorm("sync")])
    options = {"strategy": "ddp", "plugins": [Replaces()], "callbacks": [ConvertBatchNorm("sync")]}
    with pytest.raises(ValueError, match=r"were replaced after the conversion: leave out Trainer\(sync_batchnorm"):
        trainer(**options).fit(classifier(), loader())


@pytest.mark.filterwarnings("error")
def test_sync_batchnorm_replaces_layers_that_were_converted_by_hand() -> None:
    """Without a word, as the docs say; if torch or Lightning changes this, the docs have to."""
    model = syncbn.convert(lightning_jobs.network(), "ghost", **GHOST)
    assert layers(TorchSyncBatchNorm().apply(model)) == {"SyncBatchNorm"}
    assert type(model[1]) is nn.SyncBatchNorm


def test_a_model_that_was_converted_by_hand() -> None:
    module = classifier()
    syncbn.convert(module, "ghost", **GHOST)
    with pytest.raises(ValueError, match=r"such as 'network\.1': convert it by hand or by ConvertBatchNorm"):
        trainer(callbacks=[ConvertBatchNorm("sync")]).fit(module, loader())
    assert layers(module) == {"GhostBatchNorm"}


def test_it_can_be_pickled() -> None:
    """Which the strategies that spawn processes do."""
    convert = pickle.loads(pickle.dumps(ConvertBatchNorm("ghost", ghost_batch_size=2, process_group=[0, 1])))
    assert convert.apply(nn.Sequential(nn.BatchNorm1d(3)))[0].scope.ranks == (0, 1)


def test_where_and_layers_that_were_made_as_ours() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3), syncbn.BatchRenorm(3))
    convert = ConvertBatchNorm("sync", where=lambda name, layer: name != "1")
    assert [type(layer).__name__ for layer in convert.apply(model)] == ["SyncBatchNorm", "BatchNorm1d", "SyncBatchNorm"]
    assert [type(layer).__name__ for layer in convert.revert(model)] == ["BatchNorm1d", "BatchNorm1d", "BatchRenorm"]


def test_a_sharded_model_stays_converted(tmp_path: Path, no_world: None) -> None:
    """Lightning reverts at the end of training, also while an exception is handled: an error would hide that."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    convert, model = ConvertBatchNorm("sync"), lightning_jobs.network()
    convert.apply(model)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    with pytest.warns(UserWarning, match="the layers of ConvertBatchNorm stay converted: .*fully_shard"):
        convert.revert(model)
    assert layers(model) == {"SyncBatchNorm"}


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("instance", {}, "kind must be one of 'sync', 'ghost', 'renorm'"),
        ("ghost", {}, "GhostBatchNorm needs the option 'ghost_batch_size'"),
        ("sync", {"r_max": 3.0}, "SyncBatchNorm has no option 'r_max'"),
    ],
)
def test_mistakes_in_the_options_raise_at_once(kind: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConvertBatchNorm(kind, **options)


def test_the_example_of_the_docstring() -> None:
    text = inspect.getdoc(ConvertBatchNorm) or ""
    names = {**vars(integration), "torch": torch}
    example = doctest.DocTestParser().get_doctest(text, names, "ConvertBatchNorm", None, None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Lightning, about workers
        assert doctest.DocTestRunner().run(example) == (0, len(example.examples))
    assert len(example.examples) > 4
