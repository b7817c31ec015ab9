"""The normalization section of a run's configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from syncbn.train.checks import check_rules, check_values

# fmt: off
NormName = Literal[
    "none", "batch", "sync", "ghost", "renorm", "frozen", "mabn", "group", "layer", "instance", "rms", "weight",
    "ws_group", "nf", "evonorm", "frn",
]
# fmt: on
BATCH_NORMS = ("batch", "sync", "ghost", "renorm", "frozen", "mabn")
"""Norms that use statistics over samples in training."""


@dataclass(kw_only=True)
class NormConfig:
    """Normalization."""

    name: NormName = "batch"
    """Normalization. `batch` is local to a logical GPU; `sync` spans `sync_group_size` of them (by default all). The
    sources are listed in `syncbn/train/norms/factory.py`."""
    momentum: float | None = 0.1
    """Weight of the new value in the running statistics; null is a cumulative average."""
    eps: float = 1e-5
    """Added to the variance inside the square root."""
    affine: bool = True
    """Learn a weight and a bias for each channel."""
    ghost_batch_size: int | None = None
    """`ghost`: samples of a logical GPU that share statistics; a divisor of `per_gpu_batch_size`."""
    sync: bool = False
    """`ghost`, `renorm`: merge the statistics over the logical GPUs of a sync group."""
    r_max: float = 3.0
    """`renorm`: largest scale correction, reached at `r_ramp_end`. `mabn`: the same, in force after the warm-up."""
    d_max: float = 5.0
    """`renorm`: largest shift correction in standard deviations, reached at `d_ramp_end`."""
    warmup_steps: int = 5_000
    """`renorm`: training forwards with plain batch statistics before the ramps begin. `mabn`: training forwards before
    the windows are used, at least `window`."""
    r_ramp_end: int = 40_000
    """`renorm`: training forward at which `r_max` is reached."""
    d_ramp_end: int = 25_000
    """`renorm`: training forward at which `d_max` is reached."""
    groups: int = 8
    """`group`, `ws_group`, `evonorm`: groups of channels."""
    freeze_at: float = 0.75
    """`frozen`: fraction of the optimizer steps after which the statistics are constant."""
    window: int = 16
    """`mabn`: training forwards whose batch statistics are averaged, on each logical GPU."""
    clip_factor: float = 0.02
    """`nf`: largest norm of a unit's gradient relative to the norm of its weights (adaptive gradient clipping)."""

    def __post_init__(self) -> None:
        check_values(self, "norm.", ghost_batch_size=1, r_max=1, d_max=0, warmup_steps=0, groups=1, window=1)
        ghost, may_sync = self.name == "ghost", self.name in ("ghost", "renorm")
        momentum, warmup = self.momentum, self.warmup_steps
        check_rules(
            self,
            "norm.",
            ("momentum", momentum is None or 0 <= momentum <= 1, "a number from 0 to 1, or null"),
            ("eps", self.eps > 0, "a positive number"),
            (
                "ghost_batch_size",
                ghost == (self.ghost_batch_size is not None),
                "a number of samples with norm.name ghost, and null with any other",
            ),
            ("sync", may_sync or not self.sync, f"false with norm.name {self.name} (it is for ghost and renorm)"),
            ("r_ramp_end", self.r_ramp_end >= warmup, f"at least norm.warmup_steps ({warmup})"),
            ("d_ramp_end", self.d_ramp_end >= warmup, f"at least norm.warmup_steps ({warmup})"),
            ("freeze_at", 0 <= self.freeze_at <= 1, "a number from 0 to 1"),
            ("clip_factor", self.clip_factor > 0, "a positive number"),
        )

    @property
    def uses_batch(self) -> bool:
        """Whether training uses statistics over samples."""
        return self.name in BATCH_NORMS

    @property
    def synchronized(self) -> bool:
        """Whether logical GPUs share statistics."""
        return self.name == "sync" or self.sync
