"""This package's layers with the dropout and activation of timm's ``BatchNormAct2d``. This module imports timm."""

from __future__ import annotations

from typing import Any

from torch import nn

from syncbn.compat import import_timm
from syncbn.drop_act import drop_then_act, own_activation
from syncbn.layers import BatchRenorm, GhostBatchNorm, SmallBatchNorm, SyncBatchNorm

BatchNormAct2d: Any = import_timm("layers").BatchNormAct2d
_OF_EPILOGUE = ("activation", "negative_slope")


class _NormAct:
    """The constructor of the layers below: the arguments of timm's, and the options of this package's by name."""

    def __init__(
        self: Any,
        num_features: int,
        *,
        apply_act: bool = True,
        act_layer: Any = nn.ReLU,
        act_kwargs: dict[str, Any] | None = None,
        inplace: bool = True,
        drop_layer: Any = None,
        **options: Any,
    ) -> None:
        super().__init__(num_features, **options)  # type: ignore[call-arg]
        timms = BatchNormAct2d(
            1, apply_act=apply_act, act_layer=act_layer, act_kwargs=act_kwargs, inplace=inplace, drop_layer=drop_layer
        )
        self.drop, self.act = timms.drop, timms.act
        own = {} if options.keys() & set(_OF_EPILOGUE) else own_activation(self, self.save)
        for name, value in own.items():
            setattr(self, name, value)
        self.after = None if own else drop_then_act


# A BatchNormAct2d to timm too: its functions that freeze or replace layers keep dropout and activation.
class SyncBatchNormAct2d(_NormAct, SyncBatchNorm, BatchNormAct2d):  # type: ignore[misc]
    """:class:`~syncbn.SyncBatchNorm` with the dropout and activation of timm's ``BatchNormAct2d``."""


class GhostBatchNormAct2d(_NormAct, GhostBatchNorm, BatchNormAct2d):  # type: ignore[misc]
    """:class:`~syncbn.GhostBatchNorm` with the dropout and activation of timm's ``BatchNormAct2d``."""


class BatchRenormAct2d(_NormAct, BatchRenorm, BatchNormAct2d):  # type: ignore[misc]
    """:class:`~syncbn.BatchRenorm` with the dropout and activation of timm's ``BatchNormAct2d``."""


WITH_ACTIVATION: dict[type[SmallBatchNorm], type[SmallBatchNorm]] = {
    SyncBatchNorm: SyncBatchNormAct2d,
    GhostBatchNorm: GhostBatchNormAct2d,
    BatchRenorm: BatchRenormAct2d,
}
