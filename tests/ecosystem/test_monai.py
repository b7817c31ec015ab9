"""MONAI: its networks of volumes, with images that carry their metadata, and its registry of norms."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from model_steps import check_converted, make
from monai.data import MetaTensor
from monai.inferers import sliding_window_inference
from monai.networks.layers import Norm
from monai.networks.nets import DynUNet, SegResNet, UNet
from torch import Tensor, nn

import syncbn


def volumes(number: int = 2) -> Tensor:
    return torch.randn(number, 1, 16, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def unet() -> nn.Module:
    return UNet(3, 1, 2, channels=(4, 8, 16), strides=(2, 2), num_res_units=1, norm="batch")


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "UNet": unet,
    "SegResNet": lambda: SegResNet(3, 4, 1, norm="batch", blocks_down=(1, 1), blocks_up=(1,)),
    "DynUNet": lambda: DynUNet(3, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], norm_name="batch", filters=[4, 8, 8]),
}


@pytest.mark.works_with("monai", "UNet, SegResNet and DynUNet of volumes: a converted step")
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str) -> None:
    check_converted(NETWORKS[name], volumes())


@pytest.mark.works_with("monai", "`MetaTensor`: a converted step, whose output has the image's metadata")
@pytest.mark.parametrize("kind", ["sync", "renorm"])
def test_images_with_metadata(kind: str) -> None:
    affine = torch.diag(torch.tensor([2.0, 2.0, 3.0, 1.0], dtype=torch.float64))
    x = MetaTensor(volumes(), affine=affine, meta={"filename": "scan7.nii"})
    model, plain = make(unet), make(unet)
    syncbn.convert(model, kind)  # type: ignore[call-overload]  # which takes the literals
    y, expected = model(x), plain(volumes())
    assert isinstance(y, MetaTensor)
    assert y.meta["filename"] == "scan7.nii"
    assert torch.equal(y.affine, affine)
    # float64 in six layers; renorm's warm-up is batch normalization.
    torch.testing.assert_close(y.as_tensor(), expected, rtol=1e-9, atol=1e-9)
    y.sum().backward()
    expected.sum().backward()
    for actual, wanted in zip(model.parameters(), plain.parameters(), strict=True):
        assert type(actual.grad) is Tensor
        torch.testing.assert_close(actual.grad, wanted.grad, rtol=1e-8, atol=1e-8)


@pytest.mark.works_with("monai", "`sliding_window_inference` with a converted model: equal to the bit")
def test_sliding_windows() -> None:
    model, x = make(unet), torch.cat([volumes(1), volumes(1)], 2)
    model(volumes())
    expected = sliding_window_inference(x, (16, 16, 16), 2, model.eval())
    assert torch.equal(sliding_window_inference(x, (16, 16, 16), 2, syncbn.convert(model, "sync")), expected)


@pytest.mark.works_with("monai", "`Norm.add_factory_class`: networks by the name of a layer of this package")
def test_registry_of_norms() -> None:
    Norm.add_factory_class("ghostbatch", syncbn.GhostBatchNorm)
    options = {"channels": (4, 8), "strides": (2,)}
    model = make(lambda: UNet(3, 1, 2, **options, norm=("ghostbatch", {"ghost_batch_size": 2})))
    plain = make(lambda: UNet(3, 1, 2, **options, norm="batch"))
    assert sum(isinstance(module, syncbn.GhostBatchNorm) for module in model.modules()) == 2
    x = volumes(4)
    # The first normalization of each half is that of the half alone; so are then all others.
    expected = torch.cat([plain(half) for half in x.split(2)])
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)  # float64 in two layers
