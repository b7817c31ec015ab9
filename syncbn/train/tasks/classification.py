"""Classification of images: the data sets and networks of a configuration, cross entropy, and the error."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from syncbn.train.config import DataConfig, ModelConfig
from syncbn.train.data.datasets import Data, load_data
from syncbn.train.result import Metric
from syncbn.train.task import Datasets, Sum, Task
from syncbn.train.tasks.models import Norm, build_model


class Classification(Task):
    """The task of the sections ``data`` and ``model`` of a run's configuration."""

    metric = Metric("error", of_samples=True)

    def __init__(self, data: DataConfig, model: ModelConfig, label_smoothing: float, device: torch.device) -> None:
        self._data, self._model, self._device = data, model, device
        self._label_smoothing = label_smoothing
        self._loaded: Data | None = None

    def data(self, seed: int) -> Datasets:
        """The data sets, their pixels on the device if they are held in memory."""
        self._loaded = load_data(self._data, seed, self._device)
        return Datasets(train=self._loaded.train, validation=self._loaded.validation, test=self._loaded.test)

    def model(self) -> nn.Module:
        """The network with torch's BatchNorm."""
        return self.normalized_model(nn.BatchNorm2d, _unchanged, _unchanged)

    def normalized_model(
        self, norm: Norm, adapt: Callable[[nn.Module], nn.Module], finish: Callable[[nn.Module], nn.Module]
    ) -> nn.Module:
        """The network with a normalization, as in :func:`build_model`; after :meth:`data`, which has its sizes."""
        assert self._loaded is not None, "the data are loaded first"
        channels, size, _ = self._loaded.shape
        return build_model(
            self._model,
            norm=norm,
            adapt=adapt,
            finish=finish,
            in_channels=channels,
            num_classes=self._loaded.num_classes,
            image_size=size,
        )

    def loss(self, outputs: Tensor, targets: Tensor) -> Sum:
        """Cross entropy, summed over the samples; in evaluation in float64 and without label smoothing."""
        training = torch.is_grad_enabled()
        smoothing, outputs = (self._label_smoothing, outputs) if training else (0.0, outputs.double())
        total = functional.cross_entropy(outputs, targets, reduction="sum", label_smoothing=smoothing)
        return Sum(total, len(targets))

    def metrics(self, outputs: Tensor, targets: Tensor) -> Mapping[str, Sum]:
        """``error``: the fraction of samples that are classified wrongly."""
        return {"error": Sum((outputs.argmax(1) != targets).sum(), len(targets))}


def _unchanged(model: nn.Module) -> nn.Module:
    return model
