"""The configuration of one run: keyword-only dataclasses with a docstring under each field.

Each class checks its values when it is made, so mistakes are found before data is loaded or a model is built. Every
check raises :class:`ConfigError`, which names the key, the value and what was expected.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from syncbn.train.checks import ConfigError, LocalError, check_rules, check_values, require
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
    """Data set, order of the images and augmentation."""

    name: DataName = "mnist5k"
    """Data set. `mnist5k` and `digits` come with a package; `cifar10`, `cifar100`, `fashion_mnist` are downloaded."""
    root: str | None = None
    """Folder of an `imagefolder` (with `train/CLASS/*` and `test/CLASS/*`), or the folder for downloads."""
    class_skew: int = 1
    """Number of consecutive training images from one class; 1 is an i.i.d. order."""
    augment: Literal["none", "crop", "crop_flip", "resized_crop_flip"] = "none"
    """Training augmentation. The draws depend on the seed, the epoch and the sample alone. `crop` shifts an image by up
    to an eighth of its side; `crop_flip` also mirrors half of the images. `resized_crop_flip` is the usual augmentation
    for ImageNet and needs an `imagefolder`: it cuts out 8 to 100 % of the original image, resizes it and mirrors half
    of the crops. Test images are then resized to 256/224 of `image_size` on the shorter side and cropped to the
    middle."""
    image_size: int = 32
    """Side in pixels of `synthetic` images, and of an `imagefolder`'s images after resizing."""
    synthetic_samples: int = 512
    """Training images of the `synthetic` set. Its test set has a quarter of that."""
    synthetic_classes: int = 10
    """Classes of the `synthetic` set."""
    train_samples: int | None = None
    """Number of training images to use, spread evenly over the set; null uses all."""
    drop_last: bool = False
    """Skip the last optimizer step of an epoch if it has fewer images than the others."""
    workers: int = 0
    """Loader processes for image folders. Sets that fit in memory do not use them."""

    def __post_init__(self) -> None:
        smallest = {"class_skew": 1, "image_size": 4, "synthetic_samples": 4, "synthetic_classes": 2}
        check_values(self, "data.", train_samples=1, workers=0, **smallest)
        files, augments = self.name == "imagefolder", f"none, crop or crop_flip with data.name {self.name}"
        check_rules(
            self,
            "data.",
            ("augment", files or self.augment != "resized_crop_flip", f"{augments}; it needs an imagefolder's files"),
            ("root", not files or bool(self.root), "a folder with train/CLASS/* and test/CLASS/* for an imagefolder"),
        )


@dataclass(kw_only=True)
class ModelConfig:
    """Network."""

    name: str = "convnet"
    """`convnet`, `resnet20`, `resnet56`, or the name of a classifier in torchvision.models."""
    width: int = 16
    """Channels of the first stage (`convnet`, `resnet20`, `resnet56`)."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further keyword arguments for a torchvision model."""

    def __post_init__(self) -> None:
        check_values(self, "model.", width=1)


@dataclass(kw_only=True)
class OptimizerConfig:
    """Optimizer, loss and learning rate."""

    name: Literal["sgd", "adamw"] = "sgd"
    """Optimizer."""
    lr: float = 0.1
    """Learning rate; with a schedule, its peak."""
    lr_scaling: Literal["none", "linear", "sqrt"] = "none"
    """Multiply `lr` by images per optimizer step / `lr_reference_batch_size` (`linear`) or its square root (`sqrt`)."""
    lr_reference_batch_size: int = 256
    """`lr_scaling`: images per optimizer step for which `lr` is given."""
    momentum: float = 0.9
    """`sgd`: momentum."""
    nesterov: bool = False
    """`sgd`: Nesterov momentum."""
    betas: tuple[float, float] = (0.9, 0.999)
    """`adamw`: decay rates of the two moments."""
    weight_decay: float = 0.0
    """Weight decay."""
    decay_norm_and_bias: bool = True
    """Apply weight decay also to normalization parameters and biases."""
    label_smoothing: float = 0.0
    """Label smoothing of the cross entropy."""
    schedule: Literal["constant", "cosine", "one_cycle", "step"] = "cosine"
    """Learning-rate schedule, counted in optimizer steps."""
    warmup_steps: int = 0
    """Optimizer steps of linear warm-up before the schedule; 0 with `one_cycle`, which has its own."""
    step_milestones: list[float] = field(default_factory=lambda: [0.5, 0.75])
    """`step`: fractions of the run at which the learning rate is multiplied by `step_gamma`."""
    step_gamma: float = 0.1
    """`step`: factor at each milestone."""

    def __post_init__(self) -> None:
        check_values(self, "optimizer.", weight_decay=0, warmup_steps=0, lr_reference_batch_size=1)
        milestones = self.step_milestones
        rising = all(0 < m < 1 for m in milestones) and sorted(milestones) == milestones
        own_warmup = self.schedule == "one_cycle"
        check_rules(
            self,
            "optimizer.",
            ("lr", self.lr > 0, "a positive number"),
            ("momentum", 0 <= self.momentum < 1, "a number in [0, 1)"),
            ("nesterov", not self.nesterov or self.momentum > 0, "false with a momentum of 0"),
            ("betas", all(0 <= b < 1 for b in self.betas), "two numbers in [0, 1)"),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "a number in [0, 1)"),
            ("warmup_steps", self.warmup_steps == 0 or not own_warmup, "0 with one_cycle, which has its own warm-up"),
            ("step_milestones", rising, "increasing fractions between 0 and 1"),
            ("step_gamma", self.step_gamma > 0, "a positive number"),
        )


@dataclass(kw_only=True)
class BudgetConfig:
    """Length of the run, evaluations and checkpoints."""

    epochs: int | None = 6
    """Passes over the training set; null if `steps` is given."""
    steps: int | None = None
    """Optimizer steps, in place of `epochs`."""
    eval_every: int = 1
    """Epochs between evaluations. The last epoch is always evaluated."""
    eval_batch_size: int = 500
    """Images per evaluation batch, over all processes."""
    checkpoint_every: int = 1
    """Epochs between checkpoints; 0 writes no checkpoints, only the weights at the end."""

    def __post_init__(self) -> None:
        check_values(self, "budget.", epochs=1, steps=1, eval_every=1, eval_batch_size=1, checkpoint_every=0)
        other = f"exactly one of budget.steps and budget.epochs, which is {self.epochs!r}; set the other one to null"
        check_rules(self, "budget.", ("steps", (self.epochs is None) != (self.steps is None), other))


@dataclass(kw_only=True)
class EvaluationConfig:
    """Evaluations of the trained model with other statistics than the running ones (norms with batch statistics)."""

    batch: bool = True
    """Evaluate with the statistics of the test batches, which are cut and ordered as in training. `renorm` skips this,
    as it pulls batch statistics towards the running ones."""
    population_samples: list[int] = field(default_factory=lambda: [1024])
    """Evaluate with population statistics recomputed over this many training images, once per number and estimator. A
    number is rounded up to whole global batches and capped at what the training set has. An empty list skips this."""

    def __post_init__(self) -> None:
        check_values(self, "evaluation.")
        samples = self.population_samples
        rising = all(n >= 1 for n in samples) and samples == sorted(set(samples))
        expected = "increasing positive integers, or an empty list"
        check_rules(self, "evaluation.", ("population_samples", rising, expected))


@dataclass(kw_only=True)
class RunConfig:
    """One training run. It names logical GPUs: the number of processes changes the speed, not the result.

    Every section is a dataclass of its own. All values are checked when the configuration is made.

    Raises:
        ConfigError: a value of the wrong type or out of range, or values that exclude each other.

    Example:
        >>> from syncbn.train import RunConfig
        >>> config = RunConfig(gpus=16, per_gpu_batch_size=4)
        >>> config.global_batch_size, config.normalization_batch_size
        (64, 4)
        >>> RunConfig(gpus=0)
        Traceback (most recent call last):
        syncbn.train.checks.ConfigError: gpus: got 0, expected an integer of at least 1
    """

    gpus: int = 1
    """Logical GPUs. The number of processes must divide it."""
    per_gpu_batch_size: int = 64
    """Images per logical GPU in one forward pass."""
    sync_group_size: int | None = None
    """Consecutive logical GPUs that share statistics, for a synchronized norm; null is all of them."""
    accumulation_steps: int = 1
    """Forward passes per optimizer step; their gradients are added up."""
    precision: Precision = "fp32"
    """`fp32`, mixed `bf16` or `fp16`, or `fp64` throughout."""
    seed: int = 0
    """Seed of the initial weights, the data order and the augmentation."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device; `auto` takes CUDA if there is a GPU for each process, else the CPU."""
    data: DataConfig = field(default_factory=DataConfig)
    """Data set and order."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Network."""
    norm: NormConfig = field(default_factory=NormConfig)
    """Normalization."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer, loss and learning-rate schedule."""
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    """Length of the run, evaluations, checkpoints."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Evaluations of the trained model."""

    def __post_init__(self) -> None:
        check_values(self, "", gpus=1, per_gpu_batch_size=1, sync_group_size=1, accumulation_steps=1, seed=0)
        k, g, norm = self.sync_group_size, self.norm.ghost_batch_size, self.norm
        local = f"null with norm.name {norm.name}, which does not synchronize (norm.sync is {norm.sync})"
        check_rules(
            self,
            "",
            ("seed", self.seed < 2**31, "an integer from 0 to 2^31 - 1"),
            ("sync_group_size", k is None or self.gpus % k == 0, f"a divisor of gpus ({self.gpus}), or null"),
            ("sync_group_size", k is None or norm.synchronized, local),
        )
        divisor = f"a divisor of per_gpu_batch_size ({self.per_gpu_batch_size})"
        require(g is None or self.per_gpu_batch_size % g == 0, "norm.ghost_batch_size", g, divisor)

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
        """Samples that share one mean and variance; None for a norm without batch statistics.

        This is b = ``per_gpu_batch_size`` (or g = ``ghost_batch_size``), times the k GPUs of a synchronized group.
        """
        if not self.norm.uses_batch:
            return None
        samples = self.norm.ghost_batch_size or self.per_gpu_batch_size
        return samples * (self.sync_group_size or self.gpus) if self.norm.synchronized else samples

    def check_processes(self, processes: int) -> None:
        """Raise :class:`ConfigError` unless ``processes`` divides ``gpus``."""
        require(self.gpus % processes == 0, "gpus", self.gpus, f"a multiple of the number of processes ({processes})")
