"""Batch normalization for small per-GPU batches: synchronized, ghost, renormalized, exact on many processes."""

from syncbn.convert import convert, revert
from syncbn.layers import BatchRenorm, GhostBatchNorm, SampleGroups, SyncBatchNorm
from syncbn.population import update_population_statistics
from syncbn.registry import register_batchnorm

__version__ = "0.1.0"

__all__ = [
    "BatchRenorm",
    "GhostBatchNorm",
    "SampleGroups",
    "SyncBatchNorm",
    "__version__",
    "convert",
    "register_batchnorm",
    "revert",
    "update_population_statistics",
]
