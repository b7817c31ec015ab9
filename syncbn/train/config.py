"""The configuration of one run: keyword-only dataclasses with a docstring under each field; reading and writing them.

Each class checks its values when it is made, so mistakes are found before data is loaded or a model is built. Every
check raises :class:`ConfigError`, which names the key, the value and what was expected.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from syncbn.train.result import jsonable, write_atomically

# fmt: off
NormName = Literal[
    "none", "batch", "sync", "ghost", "renorm", "frozen", "mabn", "group", "layer", "instance", "rms", "weight",
    "ws_group", "nf", "evonorm", "frn",
]
# fmt: on
BATCH_NORMS = ("batch", "sync", "ghost", "renorm", "frozen", "mabn")
"""Norms that use statistics over samples in training."""
_WORDS = {int: "an integer", float: "a finite number", bool: "true or false", str: "text", type(None): "null"}
_WORDS |= {Path: "a path"}
MOST_GPUS = 2**20
LARGEST = {int: 2**31 - 1, float: 3.4e38}
"""The largest integer of a configuration, and the largest number: float32 holds it."""
_SCALARS = (bool, int, float, str, type(None))
_MOST_SHOWN = 60
"""Characters of a value in a message. A path is shown whole."""
_MOST_WORDS = 400
"""Characters of a message's other parts, which may quote a key or another program."""


# ---- checks


@cache
def _hints(kind: Any) -> dict[str, Any]:
    """The types of a section's fields. To evaluate them takes most of the time of a check."""
    return get_type_hints(kind)


def shown(value: object, most: int = _MOST_SHOWN) -> str:
    """A value as a message shows it: in one line, and without the middle of a long one."""
    if isinstance(value, Path):
        return repr(str(value))
    text = repr(value)
    return text if len(text) <= most else f"{text[: most // 2]}...{text[-(most // 2) :]}"


class ConfigError(ValueError):
    """A value of the configuration, or a file, that cannot be used. The message is one line."""

    def __init__(self, key: str, value: object, expected: str) -> None:
        got = "nothing" if value is None else shown(value)  # a file has null, or no value
        super().__init__(f"{_words(key)}: got {got}, expected {_words(expected)}")
        self.key, self.expected = key, expected
        self.value = str(value) if isinstance(value, Path) else value


def _words(text: str) -> str:
    line = " ".join(text.split())
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
    return line if len(line) <= _MOST_WORDS else f"{line[: _MOST_WORDS // 2]}...{line[-_MOST_WORDS // 2 :]}"


class RunWarning(UserWarning):
    """A run can be done, but may not be what was meant. The command line prints it as one line."""


class LocalError(ValueError):
    """A mistake that only one process meets, such as an image that cannot be read. That process has to report it."""


def require(ok: bool, key: str, value: object, expected: str) -> None:
    """Raise :class:`ConfigError` unless ``ok``."""
    if not ok:
        raise ConfigError(key, value, expected)


def meant(name: object, known: Iterable[str], most: int = 1) -> str:
    """Which of the known names a misspelt one may stand for, to follow what was expected; empty if none is like it."""
    close = difflib.get_close_matches(str(name), list(known), n=most, cutoff=0.6)
    return f"; did you mean {', '.join(close)}?" if close else ""


def check_rules(config: Any, prefix: str, *rules: tuple[str, bool, str]) -> None:
    """Raise :class:`ConfigError` for the first broken rule: a field's name, whether it is right, what was expected."""
    for name, holds, expected in rules:
        require(holds, prefix + name, getattr(config, name), expected)


def check_values(config: Any, prefix: str, **least: int) -> None:
    """Check every field of a dataclass against its type, and those named in ``least`` against a smallest value."""
    for name, hint in _hints(cast(Any, type(config))).items():
        value = getattr(config, name)
        require(fits(value, hint), prefix + name, value, described_type(hint))
        for number in value if isinstance(value, list | tuple) else [value]:
            most = LARGEST.get(type(number))
            bound = f"a number of at most {most}" if most is None or number > 0 else f"a number of at least -{most}"
            require(most is None or abs(number) <= most, prefix + name, value, bound)
        if name in least and value is not None:
            kind = "a number" if hint is float else "an integer"
            require(value >= least[name], prefix + name, value, f"{kind} of at least {least[name]}")


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type, and finite if that is a float."""
    if hint is Any:
        return True
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return value in parts
    if origin in (Union, UnionType):
        return any(fits(value, part) for part in parts)
    if origin in (list, tuple):
        right_length = origin is list or len(value) == len(parts) if isinstance(value, list | tuple) else False
        return right_length and all(fits(item, parts[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(fits(k, parts[0]) and fits(v, parts[1]) for k, v in value.items())
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, origin or hint)


def _plain(value: Any) -> bool:
    """Whether a value is the same after it was written as JSON: its names are texts."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _plain(item) for key, item in value.items())
    return all(map(_plain, value)) if isinstance(value, list | tuple) else isinstance(value, _SCALARS)


def described_type(hint: Any) -> str:
    """What a value of a type is, in words."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(repr, parts))}"
    if origin in (Union, UnionType):
        return " or ".join(described_type(part) for part in parts)
    if origin is list:
        return f"a list, each item {described_type(parts[0])}"
    if origin is tuple:
        return f"a list of {len(parts)}, each item {described_type(parts[0])}"
    return _WORDS.get(hint, "a mapping")


# ---- sections


@dataclass(kw_only=True)
class TaskConfig:
    """What is trained."""

    name: str = "classification"
    """`classification`, whose data and network are in the sections `data` and `model`; `segmentation`; `detection`; or
    `module:attribute`, a subclass of `syncbn.train.Task` or a function that returns a task."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the task. Those of `segmentation` and `detection` are the fields of `SegmentationOptions`
    and `DetectionOptions`, in `syncbn.train.tasks`."""

    def __post_init__(self) -> None:
        check_values(self, "task.")
        require(_plain(self.options), "task.options", self.options, "names, and values as YAML has them")


@dataclass(kw_only=True)
class DataConfig:
    """Order of the samples; for classification also the data set and its augmentation."""

    name: Literal["mnist5k", "digits", "cifar10", "cifar100", "fashion_mnist", "imagefolder", "synthetic"] = "mnist5k"
    """Data set. `mnist5k` and `digits` come with a package; `cifar10`, `cifar100`, `fashion_mnist` are downloaded."""
    root: str | None = None
    """Folder of an `imagefolder` (with `train/CLASS/*` and `test/CLASS/*`), or the folder for downloads."""
    class_skew: int = 1
    """Number of consecutive training images from one class; 1 is an i.i.d. order."""
    augment: Literal["none", "crop", "crop_flip", "resized_crop_flip"] = "none"
    """Training augmentation. `crop` shifts an image by up to an eighth of its side; `crop_flip` also mirrors half of
    the images. `resized_crop_flip`, usual for ImageNet, needs an `imagefolder`: it cuts out 8 to 100 % of the original
    image, resizes it and mirrors half of the crops; test images are resized to 256/224 of `image_size` on the shorter
    side and cropped to the middle."""
    image_size: int = 32
    """Side in pixels of `synthetic` images, and of an `imagefolder`'s images after resizing."""
    synthetic_samples: int = 512
    """Training images of the `synthetic` set. Its test set has a quarter of that."""
    synthetic_classes: int = 10
    """Classes of the `synthetic` set."""
    train_samples: int | None = None
    """Number of training images to use, spread evenly over the set; null uses all."""
    validation_fraction: float = 0.0
    """Fraction of each class's training images that is held out for choices, such as that of a learning rate."""
    drop_last: bool = False
    """Skip the last optimizer step of an epoch if it has fewer images than the others."""
    workers: int = 0
    """Loader processes for image folders. Sets that fit in memory do not use them."""

    def __post_init__(self) -> None:
        synthetic = {"synthetic_samples": 4, "synthetic_classes": 2}
        check_values(self, "data.", class_skew=1, image_size=4, train_samples=1, workers=0, **synthetic)
        files = self.name == "imagefolder"
        augments = f"none, crop or crop_flip with data.name {self.name}; it needs an imagefolder's files"
        check_rules(
            self,
            "data.",
            ("validation_fraction", 0 <= self.validation_fraction < 1, "a number from 0 to below 1"),
            ("augment", files or self.augment != "resized_crop_flip", augments),
            ("root", not files or bool(self.root), "a folder with train/CLASS/* and test/CLASS/* for an imagefolder"),
        )


@dataclass(kw_only=True)
class ModelConfig:
    """Network."""

    name: str = "convnet"
    """`convnet`, `resnet20`, `resnet56`, the name of a classifier in torchvision.models, or `timm:NAME`."""
    width: int = 16
    """Channels of the first stage (`convnet`, `resnet20`, `resnet56`)."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further keyword arguments for a model of torchvision or timm."""

    def __post_init__(self) -> None:
        check_values(self, "model.", width=1)
        require(_plain(self.options), "model.options", self.options, "names, and values as YAML has them")


@dataclass(kw_only=True)
class NormConfig:
    """Normalization."""

    name: NormName = "batch"
    """Normalization. `batch` is local to a logical GPU; `sync` spans `sync_group_size` of them (by default all). The
    sources are listed in `syncbn/train/norms/factory.py`."""
    momentum: float | None = 0.1
    """Weight of the new value in the running statistics; null is a cumulative average."""
    update_per: Literal["forward", "step"] = "forward"
    """With `accumulation_steps`, update the running statistics after each forward pass, or once an optimizer step, with
    the mean over its forward passes."""
    eps: float = 1e-5
    """Added to the variance inside the square root. The layers of a model of a task or a library keep their own, also
    where layers of this package take their place."""
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
    """`renorm`: training forwards (with `update_per: step`, optimizer steps) with plain batch statistics before the
    ramps begin. `mabn`: training forwards before the windows are used, at least `window`."""
    r_ramp_end: int = 40_000
    """`renorm`: training forward, or optimizer step, at which `r_max` is reached."""
    d_ramp_end: int = 25_000
    """`renorm`: training forward, or optimizer step, at which `d_max` is reached."""
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
        ghost = (self.name == "ghost") == (self.ghost_batch_size is not None)
        once = self.uses_batch and self.name != "mabn"
        may_sync, momentum, warmup = self.name in ("ghost", "renorm"), self.momentum, self.warmup_steps
        check_rules(
            self,
            "norm.",
            ("momentum", momentum is None or 0 <= momentum <= 1, "a number from 0 to 1, or null"),
            ("update_per", once or self.update_per == "forward", f"forward with norm.name {self.name}"),
            ("eps", self.eps > 0, "a positive number"),
            ("ghost_batch_size", ghost, "a number of samples with norm.name ghost, and null with any other"),
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
    select: Literal["last", "best"] = "last"
    """Which model a run ends with: that of the `last` step, or of the evaluation with the `best` validation metric."""
    patience: int | None = None
    """Evaluations without a better validation metric after which the run ends early; null never does."""
    eval_batch_size: int = 500
    """Samples per evaluation batch, over all processes."""
    checkpoint_every: int = 1
    """Epochs between checkpoints; 0 writes none at the end of an epoch."""
    checkpoint_every_steps: int = 0
    """Optimizer steps between further checkpoints, which may lie within an epoch; 0 writes none of them."""
    checkpoint_every_minutes: float = 0.0
    """Minutes of training after the last checkpoint at which another one is written; 0 writes none of them."""

    def __post_init__(self) -> None:
        least = {"epochs": 1, "steps": 1, "eval_every": 1, "patience": 1, "eval_batch_size": 1}
        saved = {"checkpoint_every": 0, "checkpoint_every_steps": 0, "checkpoint_every_minutes": 0}
        check_values(self, "budget.", **least, **saved)
        early = self.patience is None or self.select == "best"
        require(early, "budget.patience", self.patience, "null, unless budget.select is best")
        other = f"exactly one of budget.steps and budget.epochs, which is {self.epochs!r}; set the other one to null"
        require((self.epochs is None) != (self.steps is None), "budget.steps", self.steps, other)


@dataclass(kw_only=True)
class EvaluationConfig:
    """Evaluations of the trained model with other statistics than the running ones (norms with batch statistics)."""

    batch: bool = True
    """Evaluate with the statistics of the test batches, which are cut and ordered as in training. `renorm` skips this,
    as it pulls batch statistics towards the running ones."""
    population_samples: list[int] = field(default_factory=lambda: [1024])
    """Evaluate with population statistics over this many training images, once per number and estimator. A number is
    rounded up to whole global batches and capped at what the training set has. An empty list skips this."""

    def __post_init__(self) -> None:
        check_values(self, "evaluation.")
        numbers = self.population_samples
        rising = all(n >= 1 for n in numbers) and numbers == sorted(set(numbers))
        expected = "increasing positive integers, or an empty list"
        require(rising, "evaluation.population_samples", numbers, expected)


@dataclass(kw_only=True)
class RunConfig:
    """One training run. It names logical GPUs: the number of processes changes the speed, not the result.

    Raises:
        ConfigError: a value of the wrong type or out of range, or values that exclude each other.

    Example:
        >>> from syncbn.train import RunConfig
        >>> config = RunConfig(gpus=16, per_gpu_batch_size=4)
        >>> config.global_batch_size, config.normalization_batch_size
        (64, 4)
        >>> RunConfig(gpus=0)
        Traceback (most recent call last):
        syncbn.train.config.ConfigError: gpus: got 0, expected an integer of at least 1
    """

    gpus: int = 1
    """Logical GPUs. The number of processes must divide it."""
    per_gpu_batch_size: int = 64
    """Images per logical GPU in one forward pass."""
    sync_group_size: int | None = None
    """Consecutive logical GPUs that share statistics, for a synchronized norm; null is all of them."""
    accumulation_steps: int = 1
    """Forward passes per optimizer step; their gradients are added up."""
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = "fp32"
    """`fp32`, mixed `bf16` or `fp16`, or `fp64` throughout."""
    seed: int = 0
    """Seed of the initial weights, the data order and the augmentation."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device; `auto` takes CUDA if there is a GPU for each process, else the CPU."""
    task: TaskConfig = field(default_factory=TaskConfig)
    """What is trained."""
    data: DataConfig = field(default_factory=DataConfig)
    """Order of the samples; for classification also the data set."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Network, for classification."""
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
            ("gpus", self.gpus <= MOST_GPUS, f"an integer of at most {MOST_GPUS:,}"),
            ("sync_group_size", k is None or self.gpus % k == 0, f"a divisor of gpus ({self.gpus}), or null"),
            ("sync_group_size", k is None or norm.synchronized, local),
        )
        if self.task.name != "classification":
            given, own = flatten(asdict(self)), flatten(asdict(_DEFAULTS))
            for key in (key for key in given if key.startswith(("data.", "model.")) and key not in _DATA_OF_ALL_TASKS):
                unset = f"nothing, as it is for classification; task {self.task.name} has its `task.options`"
                require(given[key] == own.get(key), key, given[key], unset)
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
        """Samples that share one mean and variance; None for a norm without batch statistics."""
        if not self.norm.uses_batch:
            return None
        samples = self.norm.ghost_batch_size or self.per_gpu_batch_size
        return samples * (self.sync_group_size or self.gpus) if self.norm.synchronized else samples

    def check_processes(self, processes: int) -> None:
        """Raise :class:`ConfigError` unless ``processes`` divides ``gpus``."""
        require(self.gpus % processes == 0, "gpus", self.gpus, f"a multiple of the number of processes ({processes})")


_DEFAULTS = RunConfig()
_DATA_OF_ALL_TASKS = ("data.class_skew", "data.drop_last", "data.workers")

# ---- reading and writing


def load_config(path: str | Path | None, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """Read a run's configuration from a YAML file; keys that the file leaves out have their defaults.

    Args:
        path: the YAML file; None starts from the defaults.
        overrides: values by dotted key, which replace those of the file.

    Raises:
        ConfigError: the file cannot be read, a key is unknown, or a value has a wrong type or is out of range.

    Example:
        >>> import tempfile
        >>> from syncbn.train import load_config
        >>> with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        ...     print("{gpus: 4, norm: {name: sync}}", file=file, flush=True)
        ...     config = load_config(file.name, {"norm.momentum": 0.05})
        >>> config.gpus, config.norm.name, config.norm.momentum
        (4, 'sync', 0.05)
    """
    from syncbn.train.yaml_file import read_yaml

    values = {} if path is None else read_yaml(Path(path), "config")
    check_keys(values, RunConfig)
    for key, value in (overrides or {}).items():
        section = values
        *parents, name = key.split(".")
        for parent in parents:
            section = section.setdefault(parent, {})
        # One option of a task on the command line leaves the file's other options as they are.
        known = section.get(name)
        section[name] = {**known, **value} if isinstance(known, dict) and isinstance(value, dict) else value
    return config_from_dict(values)


def config_from_dict(values: dict[str, Any]) -> RunConfig:
    """Build a configuration from nested dictionaries; missing keys have their defaults. Raises ConfigError."""
    check_keys(values, RunConfig)
    return cast(RunConfig, _built(values, RunConfig))


def check_keys(values: Any, kind: type, prefix: str = "") -> None:
    """Check that nested values have no key that a section lacks; ``prefix`` is the section's name, such as ``norm.``.

    Raises ConfigError if they have.
    """
    if not isinstance(values, dict):
        raise ConfigError(prefix.removesuffix(".") or "config", values, "a mapping")
    hints = _hints(kind)
    for name, value in values.items():
        if name not in hints:
            key = f"{prefix}{name}"
            raise ConfigError(key, value, f"a known key{meant(key, known_keys())}")
        if is_dataclass(hints[name]):
            check_keys(value, hints[name], f"{prefix}{name}.")


def _built(values: Any, hint: Any) -> Any:
    """``values`` as ``hint`` has them: sections as dataclasses, numbers of float fields as floats."""
    if is_dataclass(hint):
        section = cast(Any, hint)
        hints = _hints(section)
        return section(**{name: _built(value, hints[name]) for name, value in values.items()})
    if get_origin(hint) in (list, tuple) and isinstance(values, list):
        return get_origin(hint)(_built(value, get_args(hint)[0]) for value in values)
    if hint is float or (get_origin(hint) in (Union, UnionType) and float in get_args(hint)):
        # YAML 1.1, which the command line follows, reads 1e-3 as text. A bool is left for the check of types to refuse.
        try:
            return float(values) if isinstance(values, int | str) and not isinstance(values, bool) else values
        except (ValueError, OverflowError):
            return values
    return values


def config_to_dict(config: RunConfig) -> dict[str, Any]:
    """Nested dictionaries of plain values. :func:`config_from_dict` reads them back."""
    return cast(dict[str, Any], jsonable(asdict(config)))


def save_config(config: RunConfig, path: Path) -> None:
    """Write all fields of the configuration as YAML, atomically."""
    write_atomically(path, config_to_yaml(config))


def config_to_yaml(config: RunConfig) -> str:
    """All fields of the configuration as YAML, in their order."""
    from syncbn.train.yaml_file import yaml_text

    return yaml_text(config_to_dict(config))


def known_keys(kind: type = RunConfig, prefix: str = "") -> list[str]:
    """All keys of the configuration, dotted."""
    keys: list[str] = []
    for name, hint in _hints(kind).items():
        keys.append(prefix + name)
        if is_dataclass(hint):
            keys += known_keys(cast(type, hint), f"{prefix}{name}.")
    return keys


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
