"""Batch normalization for small per-GPU batches: synchronized, ghost and renormalized, exact on many processes."""

from typing import TYPE_CHECKING

from syncbn.lazy import import_when_used

if TYPE_CHECKING:
    from syncbn.accumulation import accumulate_statistics
    from syncbn.agreement import verify_ranks
    from syncbn.convert import convert, revert
    from syncbn.convert_layer import register_batchnorm
    from syncbn.domains import domain, domains
    from syncbn.fold import fold
    from syncbn.freeze import freeze, unfreeze
    from syncbn.layers import BatchRenorm, GhostBatchNorm, SyncBatchNorm
    from syncbn.population import reconcile, update_population_statistics
    from syncbn.recompute import checkpoint_contexts
    from syncbn.uneven import uneven
    from syncbn.watchdog import watchdog

__version__ = "0.1.0"

__all__ = [
    "BatchRenorm",
    "GhostBatchNorm",
    "SyncBatchNorm",
    "__version__",
    "accumulate_statistics",
    "checkpoint_contexts",
    "convert",
    "domain",
    "domains",
    "fold",
    "freeze",
    "reconcile",
    "register_batchnorm",
    "revert",
    "uneven",
    "unfreeze",
    "update_population_statistics",
    "verify_ranks",
    "watchdog",
]

import_when_used(
    __name__,
    {
        "accumulation": ("accumulate_statistics",),
        "agreement": ("verify_ranks",),
        "convert": ("convert", "revert"),
        "convert_layer": ("register_batchnorm",),
        "domains": ("domain", "domains"),
        "fold": ("fold",),
        "freeze": ("freeze", "unfreeze"),
        "layers": ("BatchRenorm", "GhostBatchNorm", "SyncBatchNorm"),
        "population": ("reconcile", "update_population_statistics"),
        "recompute": ("checkpoint_contexts",),
        "uneven": ("uneven",),
        "watchdog": ("watchdog",),
    },
)
