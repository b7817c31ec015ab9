"""Batch normalization for small per-GPU batches: synchronized, ghost and renormalized, exact on any number of processes."""

from syncbn.modules import BatchRenorm, GhostBatchNorm, SampleGroups, SyncBatchNorm

__version__ = "0.1.0"

__all__ = ["BatchRenorm", "GhostBatchNorm", "SampleGroups", "SyncBatchNorm", "__version__"]
