"""Lightning's Trainer with this package's layers, for `lightning` and `pytorch_lightning`."""

from __future__ import annotations

import functools
import importlib
import sys
import warnings
from collections.abc import Callable
from typing import Any, Literal

from torch import nn

import syncbn

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def _lightning() -> Any:
    """The package of Lightning that the user has imported, else the first that is installed."""
    for name in sorted(_PACKAGES, key=lambda name: name not in sys.modules):
        try:
            return importlib.import_module(name)
        except ImportError as error:
            reason = error
    raise ImportError(f"Lightning is needed here ({reason}); install: pip install lightning") from reason


_Callback: Any = _lightning().Callback
_LayerSync: Any = _lightning().plugins.LayerSync


class ConvertBatchNorm(_Callback, _LayerSync):  # type: ignore[misc]  # the type checker does not know these classes
    """Train with the layers of :func:`syncbn.convert` in place of the model's batch normalizations.

    The layers are converted when ``Trainer.fit`` begins, before the model is wrapped, and have their first classes
    again when it ends, with the trained numbers. Checkpoints have the keys of the model as it was.

    Give it to the Trainer in one of two ways:

    - ``Trainer(callbacks=[...])``: Lightning calls callbacks with every strategy, also on one device, but before
      ``configure_model``, whose layers come too late.
    - ``Trainer(plugins=[...])``, as a ``LayerSync`` in place of ``sync_batchnorm=True``: Lightning calls it after
      ``configure_model``, but with DDP and FSDP only. With other strategies, such as that of one device, **the model
      stays as it is**, and nothing says so.

    If FSDP has wrapped or sharded the layers, they stay converted after training, and a warning says so.

    Args:
        kind: ``"sync"``, ``"ghost"`` or ``"renorm"``, or the class of the layer.
        where: convert only the layers for which ``where(qualified_name, layer)`` is true.
        options: those of :func:`syncbn.convert`, such as ``ghost_batch_size``. The Trainer makes the process group
            later, so name a part of the ranks by ``sync_group_size=8`` or ``process_group=[0, 1]``.

    Raises:
        ImportError: neither ``lightning`` nor ``pytorch_lightning`` is installed.
        ValueError: the kind has no such option or it has a wrong value. In ``Trainer.fit``: the model has layers that
            :func:`syncbn.convert` has changed already, or ``sync_batchnorm=True`` has replaced the converted layers.

    Example:
        >>> from lightning import LightningModule, Trainer
        >>> class Model(LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.network = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
        ...     def training_step(self, batch):
        ...         return self.network(batch).square().mean()
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.1)
        >>> convert = ConvertBatchNorm("ghost", ghost_batch_size=2)
        >>> trainer = Trainer(callbacks=[convert], max_epochs=1, barebones=True, accelerator="cpu")
        >>> trainer.fit(Model(), torch.utils.data.DataLoader(torch.randn(8, 4), batch_size=4))
    """

    def __init__(
        self,
        kind: Literal["sync", "ghost", "renorm"] | type[nn.Module],
        *,
        where: Callable[[str, nn.Module], bool] | None = None,
        **options: Any,
    ) -> None:
        convert: Any = syncbn.convert
        convert(nn.BatchNorm1d(1), kind, **options)  # a mistake in the options raises here, and not in `fit`
        self._convert = functools.partial(convert, kind=kind, where=where, **options)
        self._model: nn.Module | None = None
        self._layers: list[nn.Module] = []
        for package in map(sys.modules.get, _PACKAGES):
            if package is not None:  # each package's Trainer takes plugins of its own class only
                package.plugins.LayerSync.register(type(self))

    # -- a plugin ------------------------------------------------------------------------------------------------------

    def apply(self, model: nn.Module) -> nn.Module:
        """Convert the layers of ``model``. Called by the strategy before it wraps the model."""
        if model is self._model:  # the callback has done it
            return model
        converted = [name for name, layer in model.named_modules() if "_conversion" in vars(layer)]
        if converted:
            raise ValueError(
                f"syncbn.convert has changed layers of this model already, such as {converted[0]!r}: convert it by "
                f"hand or by ConvertBatchNorm. syncbn.revert(model) brings the first layers back"
            )
        self._convert(model)
        self._model = model
        self._layers = [layer for layer in model.modules() if "_conversion" in vars(layer)]
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        """Undo :meth:`apply`. Called by the strategy when training has ended."""
        if self._model is None:
            return model
        self._model, self._layers = None, []
        try:
            syncbn.revert(model)
        except ValueError as error:  # raised here, it would hide the exception that ended the training
            warnings.warn(f"the layers of ConvertBatchNorm stay converted: {error}", UserWarning, stacklevel=2)
        return model

    # -- a callback ----------------------------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:
        """Convert, before the strategy sees the model."""
        if stage == "fit":
            self.apply(pl_module)

    def on_fit_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Raise if another converter has replaced the layers since."""
        if not set(self._layers) <= set(pl_module.modules()):
            remedy = "leave out Trainer(sync_batchnorm=True) and other LayerSync plugins"
            raise ValueError(f"the layers of ConvertBatchNorm were replaced after the conversion: {remedy}")

    def teardown(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:
        """Revert at the end of training."""
        self.revert(pl_module)

    def on_exception(self, trainer: Any, pl_module: nn.Module, exception: BaseException) -> None:
        """Revert, because an exception leaves out :meth:`teardown`."""
        self.revert(pl_module)
