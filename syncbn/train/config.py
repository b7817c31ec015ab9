"""The configuration of one run: keyword-only dataclasses, one docstring under each field.

Whatever can be wrong with a value on its own, or with two values together, is found here, before anything is built.
Every check raises :class:`ConfigError`, which names the key, the value and what was expected.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from syncbn.train.checks import ConfigError, LocalError, check_values, require
from syncbn.train.norms.config import NormConfig

__all__ = [
    "BudgetConfig",
    "ConfigError",
    "DataConfig",
    "EvaluationConfig",
    "LocalError",
    "ModelConfig",
    "NormConfig",
    "OptimizerConfig",
    "RunConfig",
]

Precision = Literal["fp32", "bf16", "fp16", "fp64"]
DataName = Literal["mnist5k", "digits", "cifar10", "cifar100", "fashion_mnist", "imagefolder", "synthetic"]


@dataclass(kw_only=True)
class DataConfig:
    """Which images, in which order."""

    name: DataName = "mnist5k"
    """Data set. `mnist5k` and `digits` come with a package; `cifar10`, `cifar100`, `fashion_mnist` are downloaded."""
    root: str | None = None
    """Folder of an `imagefolder` (it holds `train/CLASS/*` and `test/CLASS/*`), or where downloads are kept."""
    class_skew: int = 1
    """Samples arrive in runs of this many images of one class; 1 is an i.i.d. order."""
    augment: Literal["none", "crop", "crop_flip", "resized_crop_flip"] = "none"
    """Training augmentation, drawn as a function of (seed, epoch, sample): `crop` shifts by up to an eighth of the
    side, `crop_flip` mirrors half of the images too. `resized_crop_flip` is ImageNet's usual one, for an `imagefolder`:
    8 to 100 % of the original image, resized, and mirrored or not; a test image's shorter side is then resized to
    256/224 of `image_size`, and the middle is kept."""
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
        check_values(self, "data.")
        require(self.class_skew >= 1, "data.class_skew", self.class_skew, "an integer of at least 1")
        require(
            self.augment != "resized_crop_flip" or self.name == "imagefolder",
            "data.augment",
            self.augment,
            f"none, crop or crop_flip with data.name {self.name}: this one cuts the original files of an imagefolder",
        )
        require(self.image_size >= 4, "data.image_size", self.image_size, "at least 4 pixels")
        require(self.synthetic_samples >= 4, "data.synthetic_samples", self.synthetic_samples, "at least 4")
        require(self.synthetic_classes >= 2, "data.synthetic_classes", self.synthetic_classes, "at least 2")
        require(
            self.train_samples is None or self.train_samples >= 1,
            "data.train_samples",
            self.train_samples,
            "a positive integer or null",
        )
        require(self.workers >= 0, "data.workers", self.workers, "0 or more")
        require(
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
        require(self.width >= 1, "model.width", self.width, "a positive integer")


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
        check_values(self, "optimizer.")
        require(self.lr > 0, "optimizer.lr", self.lr, "a positive number")
        require(0 <= self.momentum < 1, "optimizer.momentum", self.momentum, "a number in [0, 1)")
        require(
            not self.nesterov or self.momentum > 0, "optimizer.nesterov", self.nesterov, "false with a momentum of 0"
        )
        betas_ok = len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas)
        require(betas_ok, "optimizer.betas", self.betas, "two numbers in [0, 1)")
        self.betas = (self.betas[0], self.betas[1])  # a list where it comes from a file
        require(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "0 or more")
        require(0 <= self.label_smoothing < 1, "optimizer.label_smoothing", self.label_smoothing, "a number in [0, 1)")
        require(self.warmup_steps >= 0, "optimizer.warmup_steps", self.warmup_steps, "0 or more")
        require(
            self.warmup_steps == 0 or self.schedule != "one_cycle",
            "optimizer.warmup_steps",
            self.warmup_steps,
            "0 with the one_cycle schedule, which brings its own warm-up",
        )
        require(
            self.lr_reference_batch_size >= 1,
            "optimizer.lr_reference_batch_size",
            self.lr_reference_batch_size,
            "a positive integer",
        )
        require(
            all(0 < m < 1 for m in self.step_milestones) and sorted(self.step_milestones) == self.step_milestones,
            "optimizer.step_milestones",
            self.step_milestones,
            "rising fractions between 0 and 1",
        )
        require(self.step_gamma > 0, "optimizer.step_gamma", self.step_gamma, "a positive number")


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
        require(
            (self.epochs is None) != (self.steps is None),
            "budget.steps",
            self.steps,
            f"exactly one of budget.steps and budget.epochs, which is {self.epochs!r}; set the other one to null",
        )
        for key in ("epochs", "steps", "eval_every", "eval_batch_size"):
            value = getattr(self, key)
            require(value is None or value >= 1, f"budget.{key}", value, "a positive integer")
        require(self.checkpoint_every >= 0, "budget.checkpoint_every", self.checkpoint_every, "0 or more")


@dataclass(kw_only=True)
class EvaluationConfig:
    """What is evaluated after training, besides the running statistics (a norm with batch statistics)."""

    batch: bool = True
    """Evaluate with the test batches' own statistics, cut and ordered as in training (not with `renorm`, which brings
    them back to the running ones)."""
    population_samples: list[int] = field(default_factory=lambda: [1024])
    """Evaluate with population statistics recomputed over this many training images, by both estimators, for each
    number in turn; none for an empty list. A number is rounded up to whole global batches, and cut to those that the
    training set has."""

    def __post_init__(self) -> None:
        samples = self.population_samples
        require(isinstance(samples, list), "evaluation.population_samples", samples, "a list of positive integers")
        rising = all(n >= 1 for n in samples) and samples == sorted(set(samples))
        require(rising, "evaluation.population_samples", samples, "rising positive integers, or an empty list")


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
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """What the trained model is evaluated with."""

    def __post_init__(self) -> None:
        check_values(self, "")
        require(self.gpus >= 1, "gpus", self.gpus, "a positive integer")
        require(self.per_gpu_batch_size >= 1, "per_gpu_batch_size", self.per_gpu_batch_size, "a positive integer")
        require(self.accumulation_steps >= 1, "accumulation_steps", self.accumulation_steps, "a positive integer")
        require(0 <= self.seed < 2**31, "seed", self.seed, "an integer from 0 to 2^31 - 1")
        k = self.sync_group_size
        require(
            k is None or (k >= 1 and self.gpus % k == 0),
            "sync_group_size",
            k,
            f"a divisor of gpus ({self.gpus}), or null",
        )
        require(
            k is None or self.norm.synchronized,
            "sync_group_size",
            k,
            f"null with norm.name {self.norm.name}, which does not synchronize (norm.sync is {self.norm.sync})",
        )
        g = self.norm.ghost_batch_size
        require(
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
        if not self.norm.uses_batch:
            return None
        samples = self.norm.ghost_batch_size or self.per_gpu_batch_size
        return samples * (self.sync_group_size or self.gpus) if self.norm.synchronized else samples

    def check_processes(self, processes: int) -> None:
        """Raise :class:`ConfigError` unless ``processes`` divides ``gpus``."""
        require(self.gpus % processes == 0, "gpus", self.gpus, f"a multiple of the number of processes ({processes})")
