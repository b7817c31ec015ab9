"""The configuration of one run: keyword-only dataclasses, one docstring under each field.

Whatever can be wrong with a value on its own, or with two values together, is found here, before anything is built.
Every check raises :class:`ConfigError`, which names the key, the value and what was expected.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

Precision = Literal["fp32", "bf16", "fp16", "fp64"]
DataName = Literal["mnist5k", "digits", "cifar10", "cifar100", "fashion_mnist", "imagefolder", "synthetic"]
NormName = Literal["none", "batch", "sync", "ghost", "renorm", "group"]


class ConfigError(ValueError):
    """A value of the configuration that cannot be used."""

    def __init__(self, key: str, value: object, expected: str) -> None:
        super().__init__(f"{key}: got {value!r}, expected {expected}")
        self.key = key
        self.value = value
        self.expected = expected


class LocalError(ValueError):
    """A mistake that only the process which meets it can report, such as an image that cannot be read."""


def _check_values(config: Any, prefix: str) -> None:
    """What a type says of a value, for configurations made in Python: a choice among names, and finite numbers."""
    hints = get_type_hints(type(config))
    for f in fields(config):
        value, hint = getattr(config, f.name), hints[f.name]
        if get_origin(hint) is Literal:
            _require(value in get_args(hint), prefix + f.name, value, f"one of {', '.join(map(repr, get_args(hint)))}")
        if isinstance(value, float):
            _require(math.isfinite(value), prefix + f.name, value, "a finite number")


def _require(ok: bool, key: str, value: object, expected: str) -> None:
    if not ok:
        raise ConfigError(key, value, expected)


@dataclass(kw_only=True)
class DataConfig:
    """Which images, in which order."""

    name: DataName = "mnist5k"
    """Data set. `mnist5k` and `digits` come with a package; `cifar10`, `cifar100`, `fashion_mnist` are downloaded."""
    root: str | None = None
    """Folder of an `imagefolder` (it holds `train/CLASS/*` and `test/CLASS/*`), or where downloads are kept."""
    class_skew: int = 1
    """Samples arrive in runs of this many images of one class; 1 is an i.i.d. order."""
    augment: Literal["none", "crop", "crop_flip"] = "none"
    """Training augmentation, drawn as a function of (seed, epoch, sample)."""
    image_size: int = 32
    """Side in pixels to which an `imagefolder`'s images are resized, and of `synthetic` images."""
    synthetic_samples: int = 512
    """Training images of the `synthetic` set (its test set is a quarter of that)."""
    synthetic_classes: int = 10
    """Classes of the `synthetic` set."""
    train_samples: int | None = None
    """Use only this many training images, spread evenly over the set; None is all."""
    drop_last: bool = False
    """Leave out an epoch's last, smaller global batch instead of training on it."""
    workers: int = 0
    """Loader processes (for image folders; sets held in memory are faster without)."""

    def __post_init__(self) -> None:
        _check_values(self, "data.")
        _require(self.class_skew >= 1, "data.class_skew", self.class_skew, "an integer of at least 1")
        _require(self.image_size >= 4, "data.image_size", self.image_size, "at least 4 pixels")
        _require(self.synthetic_samples >= 4, "data.synthetic_samples", self.synthetic_samples, "at least 4")
        _require(self.synthetic_classes >= 2, "data.synthetic_classes", self.synthetic_classes, "at least 2")
        _require(
            self.train_samples is None or self.train_samples >= 1,
            "data.train_samples",
            self.train_samples,
            "a positive integer or null",
        )
        _require(self.workers >= 0, "data.workers", self.workers, "0 or more")
        _require(
            self.name != "imagefolder" or bool(self.root),
            "data.root",
            self.root,
            "a folder holding train/CLASS/* and test/CLASS/*, as data.name is imagefolder",
        )


@dataclass(kw_only=True)
class ModelConfig:
    """Which network."""

    name: str = "convnet"
    """`convnet`, `resnet20`, `resnet56`, or a classifier of torchvision.models by name."""
    width: int = 16
    """Channels of the first stage (`convnet`, `resnet20`, `resnet56`)."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further keyword arguments of a torchvision model."""

    def __post_init__(self) -> None:
        _require(self.width >= 1, "model.width", self.width, "a positive integer")


@dataclass(kw_only=True)
class NormConfig:
    """Which normalization."""

    name: NormName = "batch"
    """`batch` is local to a logical GPU; `sync` spans `sync_group_size` of them (all by default)."""
    momentum: float | None = 0.1
    """Weight of the new value in the running statistics; null is a cumulative average."""
    eps: float = 1e-5
    """Added to the variance under the root."""
    affine: bool = True
    """Learn a weight and a bias for each channel."""
    ghost_batch_size: int | None = None
    """Samples that share statistics within a logical GPU (`ghost`); it divides `per_gpu_batch_size`."""
    sync: bool = False
    """`ghost`, `renorm`: merge the statistics over the logical GPUs of a sync group."""
    r_max: float = 3.0
    """`renorm`: largest scale correction, reached at `r_ramp_end`."""
    d_max: float = 5.0
    """`renorm`: largest shift correction, in standard deviations, reached at `d_ramp_end`."""
    warmup_steps: int = 5_000
    """`renorm`: training forwards with plain batch statistics before the ramps begin."""
    r_ramp_end: int = 40_000
    """`renorm`: training forward at which `r_max` is reached."""
    d_ramp_end: int = 25_000
    """`renorm`: training forward at which `d_max` is reached."""
    groups: int = 8
    """`group`: channel groups of GroupNorm."""

    def __post_init__(self) -> None:
        _check_values(self, "norm.")
        _require(
            self.momentum is None or 0.0 <= self.momentum <= 1.0,
            "norm.momentum",
            self.momentum,
            "a number from 0 to 1, or null",
        )
        _require(self.eps > 0, "norm.eps", self.eps, "a positive number")
        _require(
            (self.name == "ghost") == (self.ghost_batch_size is not None),
            "norm.ghost_batch_size",
            self.ghost_batch_size,
            "a number of samples with norm.name ghost, and null with any other",
        )
        _require(
            self.ghost_batch_size is None or self.ghost_batch_size >= 1,
            "norm.ghost_batch_size",
            self.ghost_batch_size,
            "a positive integer",
        )
        _require(
            not self.sync or self.name in ("ghost", "renorm"),
            "norm.sync",
            self.sync,
            f"false with norm.name {self.name} (it is for ghost and renorm)",
        )
        _require(self.r_max >= 1, "norm.r_max", self.r_max, "at least 1")
        _require(self.d_max >= 0, "norm.d_max", self.d_max, "at least 0")
        _require(self.warmup_steps >= 0, "norm.warmup_steps", self.warmup_steps, "0 or more")
        for key in ("r_ramp_end", "d_ramp_end"):
            value = getattr(self, key)
            _require(
                value >= self.warmup_steps, f"norm.{key}", value, f"at least norm.warmup_steps ({self.warmup_steps})"
            )
        _require(self.groups >= 1, "norm.groups", self.groups, "a positive integer")


@dataclass(kw_only=True)
class OptimizerConfig:
    """How the weights move."""

    name: Literal["sgd", "adamw"] = "sgd"
    """Optimizer."""
    lr: float = 0.1
    """Learning rate (the peak of a schedule)."""
    lr_scaling: Literal["none", "linear", "sqrt"] = "none"
    """Scale `lr` with (global batch size / `lr_reference_batch_size`), or with its root."""
    lr_reference_batch_size: int = 256
    """Global batch size at which `lr` is meant, for `lr_scaling`."""
    momentum: float = 0.9
    """`sgd`: momentum."""
    nesterov: bool = False
    """`sgd`: Nesterov momentum."""
    betas: tuple[float, float] = (0.9, 0.999)
    """`adamw`: decay rates of the two moments."""
    weight_decay: float = 0.0
    """Weight decay."""
    decay_norm_and_bias: bool = True
    """Apply the weight decay to normalization parameters and biases too."""
    label_smoothing: float = 0.0
    """Label smoothing of the cross entropy."""
    schedule: Literal["constant", "cosine", "one_cycle", "step"] = "cosine"
    """Learning-rate schedule, counted in optimizer steps."""
    warmup_steps: int = 0
    """Optimizer steps of linear warm-up before the schedule (`one_cycle` brings its own)."""
    step_milestones: list[float] = field(default_factory=lambda: [0.5, 0.75])
    """`step`: fractions of the run at which the learning rate is multiplied by `step_gamma`."""
    step_gamma: float = 0.1
    """`step`: factor at each milestone."""

    def __post_init__(self) -> None:
        _check_values(self, "optimizer.")
        _require(self.lr > 0, "optimizer.lr", self.lr, "a positive number")
        _require(0 <= self.momentum < 1, "optimizer.momentum", self.momentum, "a number in [0, 1)")
        _require(
            not self.nesterov or self.momentum > 0, "optimizer.nesterov", self.nesterov, "false with a momentum of 0"
        )
        betas_ok = len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas)
        _require(betas_ok, "optimizer.betas", self.betas, "two numbers in [0, 1)")
        self.betas = (self.betas[0], self.betas[1])  # a list where it comes from a file
        _require(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "0 or more")
        _require(0 <= self.label_smoothing < 1, "optimizer.label_smoothing", self.label_smoothing, "a number in [0, 1)")
        _require(self.warmup_steps >= 0, "optimizer.warmup_steps", self.warmup_steps, "0 or more")
        _require(
            self.warmup_steps == 0 or self.schedule != "one_cycle",
            "optimizer.warmup_steps",
            self.warmup_steps,
            "0 with the one_cycle schedule, which brings its own warm-up",
        )
        _require(
            self.lr_reference_batch_size >= 1,
            "optimizer.lr_reference_batch_size",
            self.lr_reference_batch_size,
            "a positive integer",
        )
        _require(
            all(0 < m < 1 for m in self.step_milestones) and sorted(self.step_milestones) == self.step_milestones,
            "optimizer.step_milestones",
            self.step_milestones,
            "rising fractions between 0 and 1",
        )
        _require(self.step_gamma > 0, "optimizer.step_gamma", self.step_gamma, "a positive number")


@dataclass(kw_only=True)
class BudgetConfig:
    """How long the run lasts and what is done on the way."""

    epochs: int | None = 6
    """Passes over the training set; null where `steps` is given."""
    steps: int | None = None
    """Optimizer steps, instead of `epochs`."""
    eval_every: int = 1
    """Epochs between evaluations (the last one is always evaluated)."""
    eval_batch_size: int = 500
    """Images an evaluation step takes over all processes."""
    checkpoint_every: int = 1
    """Epochs between checkpoints; 0 writes none on the way, and only the weights at the end."""

    def __post_init__(self) -> None:
        _require(
            (self.epochs is None) != (self.steps is None),
            "budget.steps",
            self.steps,
            f"exactly one of budget.steps and budget.epochs, which is {self.epochs!r}; set the other one to null",
        )
        for key in ("epochs", "steps", "eval_every", "eval_batch_size"):
            value = getattr(self, key)
            _require(value is None or value >= 1, f"budget.{key}", value, "a positive integer")
        _require(self.checkpoint_every >= 0, "budget.checkpoint_every", self.checkpoint_every, "0 or more")


@dataclass(kw_only=True)
class RunConfig:
    """One training run. It names logical GPUs; how many processes execute them changes nothing but the speed."""

    gpus: int = 1
    """Logical GPUs. The number of processes must divide it."""
    per_gpu_batch_size: int = 64
    """Images on each logical GPU in one forward pass."""
    sync_group_size: int | None = None
    """Consecutive logical GPUs that share statistics, with a synchronized norm; null is all of them."""
    accumulation_steps: int = 1
    """Forward passes whose gradients make one optimizer step."""
    precision: Precision = "fp32"
    """`fp32`, mixed `bf16` or `fp16`, or `fp64` throughout, for exactness."""
    seed: int = 0
    """Seed of the initial weights, the data order and the augmentation."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; `auto` takes CUDA where there is a GPU for each process, else the CPU."""
    data: DataConfig = field(default_factory=DataConfig)
    """Data set and order."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Network."""
    norm: NormConfig = field(default_factory=NormConfig)
    """Normalization."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer, loss and learning-rate schedule."""
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    """Length of the run, evaluation, checkpoints."""

    def __post_init__(self) -> None:
        _check_values(self, "")
        _require(self.gpus >= 1, "gpus", self.gpus, "a positive integer")
        _require(self.per_gpu_batch_size >= 1, "per_gpu_batch_size", self.per_gpu_batch_size, "a positive integer")
        _require(self.accumulation_steps >= 1, "accumulation_steps", self.accumulation_steps, "a positive integer")
        _require(0 <= self.seed < 2**31, "seed", self.seed, "an integer from 0 to 2^31 - 1")
        k = self.sync_group_size
        _require(
            k is None or (k >= 1 and self.gpus % k == 0),
            "sync_group_size",
            k,
            f"a divisor of gpus ({self.gpus}), or null",
        )
        _require(
            k is None or self.norm.name == "sync" or self.norm.sync,
            "sync_group_size",
            k,
            f"null with norm.name {self.norm.name}, which does not synchronize (norm.sync is {self.norm.sync})",
        )
        g = self.norm.ghost_batch_size
        _require(
            g is None or self.per_gpu_batch_size % g == 0,
            "norm.ghost_batch_size",
            g,
            f"a divisor of per_gpu_batch_size ({self.per_gpu_batch_size})",
        )

    @property
    def global_batch_size(self) -> int:
        """Images in one forward pass over all logical GPUs."""
        return self.gpus * self.per_gpu_batch_size

    @property
    def step_batch_size(self) -> int:
        """Images in one optimizer step."""
        return self.global_batch_size * self.accumulation_steps

    @property
    def normalization_batch_size(self) -> int | None:
        """Samples that share one mean: b locally, b*k synchronized over k GPUs, ghost g or g*k; None for no batch."""
        if self.norm.name in ("none", "group"):
            return None
        samples = self.norm.ghost_batch_size or self.per_gpu_batch_size
        synchronized = self.norm.name == "sync" or self.norm.sync
        return samples * (self.sync_group_size or self.gpus) if synchronized else samples

    def check_processes(self, processes: int) -> None:
        """Raise :class:`ConfigError` unless ``processes`` divides ``gpus``."""
        _require(self.gpus % processes == 0, "gpus", self.gpus, f"a multiple of the number of processes ({processes})")
