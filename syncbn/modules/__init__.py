"""The layers: parameters, buffers and checks around the functions."""

from syncbn.modules.base import SampleGroups, SmallBatchNorm
from syncbn.modules.layers import BatchRenorm, GhostBatchNorm, SyncBatchNorm

__all__ = ["BatchRenorm", "GhostBatchNorm", "SampleGroups", "SmallBatchNorm", "SyncBatchNorm"]
