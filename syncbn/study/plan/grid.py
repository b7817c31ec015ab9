"""A study as a grid of runs: arms, over the values of the axes, over seeds.

A *setting* is an arm at one point of the axes; a *cell* is a setting with a seed. Cells that resolve to the same run
configuration are trained once: GroupNorm does not depend on how the batch is divided among GPUs, so one of its runs
serves every point of such a sweep.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, Literal

from syncbn.train.config import ConfigError, RunConfig, config_from_dict, config_to_dict
from syncbn.train.result import Metric, RunResult

KEY_LENGTH = 16
"""Hexadecimal digits of a cell's key. 64 bits rule out accidental collisions."""

State = Literal["missing", "running", "done", "diverged", "failed"]
"""State of a cell, wherever one is named: in files, messages and reports."""

Vary = Literal["per_gpu_batch_size", "ghost_batch_size", "sync_group_size"]
Value = int | float | str | bool | None
Point = tuple[tuple[str, Value], ...]
"""A place on the axes: (name, value) pairs in the order of :attr:`Study.axes`."""

Candidate = tuple[tuple[str, Value], ...]
"""Values to be tried for the keys of a run's configuration: (key, value) pairs in the order of the tuning grid."""

HOLD = "hold"
"""Name of the axis of a coupled sweep that is run both at constant epochs and at constant steps."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way of normalizing under comparison."""

    name: str
    """Short name, used in files and commands."""
    label: str
    """Name in tables and plots."""
    overrides: dict[str, Any]
    """What differs from the study's base configuration, as a nested mapping."""
    reference: bool = False
    """Whether the other arms are compared with this one (at most one arm)."""
    only: dict[str, tuple[Value, ...]] = field(default_factory=dict)
    """Values of an axis at which this arm is run; it is run at all values of an axis that is not named."""
    tune: dict[str, tuple[Value, ...]] | None = None
    """A tuning grid of its own, in place of the study's."""
    tuned: bool = True
    """Whether the arm takes part in the study's tuning, if it has one."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """How the normalization batch is varied.

    ``decoupled`` changes normalization alone: global batch, learning rate and steps stay the same, and the same global
    batches are divided differently. ``coupled`` is the protocol of Wu and He 2018 (Group Normalization, arXiv
    1803.08494, section 4.1): the batch on each GPU varies, and the global batch and the learning rate with it.
    """

    kind: Literal["decoupled", "coupled"] = "decoupled"
    vary: Vary = "per_gpu_batch_size"
    values: tuple[int, ...]
    global_batch_size: int | None = None
    """Decoupled over ``per_gpu_batch_size``: images in a forward pass over all logical GPUs."""
    hold: tuple[Literal["epochs", "steps"], ...] = ("epochs",)
    """Coupled: what stays constant while the batch varies; with both, the whole sweep is run for each."""
    steps: int | None = None
    """Coupled, with ``steps`` held: optimizer steps of every run."""


@dataclass(frozen=True, kw_only=True)
class Tune:
    """What each setting chooses for itself by validation, before the study's runs."""

    grid: dict[str, tuple[Value, ...]]
    """Dotted keys of the run configuration, and the values to try."""
    seeds: tuple[int, ...]
    """None of them is a seed of the study."""
    halving: int | None = None
    """The factor of successive halving; None trains every candidate with the whole budget."""

    def candidates(self, arm: Arm) -> list[Candidate]:
        """All combinations of the values of an arm's grid."""
        grid = self.grid if arm.tune is None else arm.tune
        return list(product(*([(key, value) for value in values] for key, values in grid.items())))


@dataclass(frozen=True)
class Place:
    """An arm at a point of the axes."""

    arm: str
    point: Point


@dataclass(frozen=True)
class Contrast:
    """Score at ``first`` minus score at ``second``; with ``minus``, minus the same difference there."""

    name: str  # unique within the study; made of the arms and of the values that differ
    first: Place
    second: Place
    minus: tuple[Place, Place] | None = None
    margin: float | None = None
    """By how much ``first`` may be worse than ``second`` and still count as no worse: in points if the metric is in
    percent, else in the metric's own unit."""

    @property
    def places(self) -> tuple[Place, ...]:
        """All places whose runs the contrast needs: two, or four with ``minus``."""
        return (self.first, self.second, *(self.minus or ()))


@dataclass(frozen=True, kw_only=True)
class Parity:
    """The exact check of one cell: its training must not depend on the number of processes (``syncbn parity``)."""

    arm: str
    processes: tuple[int, ...] = (1, 2)
    """Numbers of processes that train the cell; the others are compared with the first."""
    steps: int = 8
    """Optimizer steps, in float64."""
    at: dict[str, Value] = field(default_factory=dict)
    """Place on the axes; an axis that is not named is at the arm's first value."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """A question, the arms that answer it, the axes along which they are run, and the seeds of each setting.

    Example:
        >>> from syncbn.study.plan.study_file import load_study
        >>> study = load_study("quickstart")
        >>> [arm.name for arm in study.arms]
        ['batch', 'sync', 'renorm', 'group', 'batch_iid']
        >>> study.reference.label
        'Local BatchNorm on i.i.d. data'
    """

    name: str
    title: str
    question: str
    base: dict[str, Any]
    """Run configuration that all arms share, as a nested mapping."""
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    sweep: Sweep | None = None
    grid: dict[str, tuple[Value, ...]] = field(default_factory=dict)
    """Further axes: a dotted key of the run configuration, and its values."""
    contrasts: tuple[Contrast, ...] = ()
    """The planned comparisons, which are the family over which the tests are corrected."""
    parity: Parity | None = None
    tune: Tune | None = None
    run: str | Callable[..., Any] | None = None
    """A training loop of the user's, ``module:function`` or the function; None for the package's trainer."""
    metric: Metric | None = None
    """What the user's training loop is compared by."""
    processes: int = 1
    """Processes that the user's training loop is launched in, under torchrun."""
    notes: str | None = None
    """A remark for the reader of the main figure, such as why it differs from a published one."""
    content: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """What its file says, for its folder."""

    @property
    def reference(self) -> Arm | None:
        """The reference arm, if the study names one."""
        return next((arm for arm in self.arms if arm.reference), None)

    @property
    def axes(self) -> dict[str, tuple[Value, ...]]:
        """All axes by name, the sweep's first; empty for a plain comparison of arms."""
        found: dict[str, tuple[Value, ...]] = {}
        if self.sweep is not None:
            found[self.sweep.vary] = self.sweep.values
            if len(self.sweep.hold) > 1:
                found[HOLD] = self.sweep.hold
        return found | self.grid

    @property
    def samples_word(self) -> str:
        """What its samples are called: ``images`` for classification, else ``samples``."""
        if self.run is not None:
            return "samples"
        task = self.base.get("task")
        name = task.get("name", "classification") if isinstance(task, Mapping) else "classification"
        return "images" if name == "classification" else "samples"

    def points(self, arm: Arm) -> list[Point]:
        """The points of the axes at which an arm is run."""
        choices = [
            [(name, value) for value in values if name not in arm.only or value in arm.only[name]]
            for name, values in self.axes.items()
        ]
        return list(product(*choices))

    def comparison_point(self) -> Point:
        """The place to show arms side by side: that of the first contrast between arms, or the axes' first values."""
        for contrast in self.contrasts:
            if contrast.first.point == contrast.second.point:
                return contrast.first.point
        return tuple((name, values[0]) for name, values in self.axes.items())


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of a study: a setting with a seed, resolved into a full run configuration."""

    arm: str
    seed: int
    point: Point = ()
    candidate: Candidate = ()
    """What tuning tries or has chosen."""
    tuning: bool = False
    """Whether this is a run from which a setting chooses."""
    rung: str = ""
    """The part of the budget that it has in successive halving, such as "2 epochs"."""
    config: RunConfig
    key: str
    """Hash of ``config``. A cell whose configuration changes has another key and is run again."""

    @property
    def label(self) -> str:
        """Name of the cell in messages."""
        named = (f"{name} {spelled(value)}" for name, value in self.point + self.candidate)
        return ", ".join([self.arm, *named, *([self.rung] if self.rung else []), f"seed {self.seed}"])


def study_cells(
    study: Study, source: str | None = None, *, choices: Mapping[Place, Candidate] | None = None
) -> list[Cell]:
    """The cells of a study, all settings of the first seed first, so that an interrupted study has compared all arms.

    Seeds are paired: a cell's seed is its run's seed, so all arms of one seed share initial weights, data order and
    augmentation as far as their configurations allow. ``choices`` are what settings chose in the study's tuning.

    Raises ConfigError if a setting has an impossible configuration; the message names ``source`` (by default the
    study's name), the arm and the key.
    """
    chosen = choices or {}
    parsed: dict[str, RunConfig] = {}  # by the values they are parsed from: parsing is slow, and settings share values
    by_setting = [
        setting_cells(study, arm, point, chosen.get(Place(arm.name, point), ()), study.seeds, source, parsed)
        for arm in study.arms
        for point in study.points(arm)
    ]
    return [cells[i] for i in range(len(study.seeds)) for cells in by_setting]


def setting_cells(
    study: Study,
    arm: Arm,
    point: Point,
    candidate: Candidate,
    seeds: Sequence[int],
    source: str | None = None,
    parsed: dict[str, RunConfig] | None = None,
) -> list[Cell]:
    """The cells of one setting with the values of a candidate, one for each seed."""
    config = _resolve(study, arm, point, candidate, source or study.name, {} if parsed is None else parsed)
    seeded = [replace(config, seed=seed) for seed in seeds]
    return [
        Cell(arm=arm.name, seed=each.seed, point=point, candidate=candidate, config=each, key=cell_key(each))
        for each in seeded
    ]


def unique_cells(cells: Sequence[Cell]) -> list[Cell]:
    """The first cell of each key: the runs to be trained."""
    found: dict[str, Cell] = {}
    for cell in cells:
        found.setdefault(cell.key, cell)
    return list(found.values())


def parity_cell(parity: Parity, cells: Sequence[Cell]) -> Cell | None:
    """The first cell at the place that a parity check names; None if no cell is there."""
    return next((c for c in cells if c.arm == parity.arm and parity.at.items() <= dict(c.point).items()), None)


def state_of(result: RunResult) -> State:
    """State of a cell whose run has a result: ``done`` or ``diverged``."""
    return "diverged" if result.status == "diverged" else "done"


def cell_key(config: RunConfig) -> str:
    """The first ``KEY_LENGTH`` hexadecimal digits of the SHA-256 of a run configuration's canonical JSON.

    A number is an integer there if it can be, so that 1 and 1.0 give the same key. When checkpoints are written changes
    no result, and the keys that say it are younger than many studies.
    """

    def number(text: str) -> float:
        value = float(text)
        return int(value) if value.is_integer() else value

    values = json.loads(json.dumps(config_to_dict(config), allow_nan=False), parse_float=number)
    for name in ("checkpoint_every_steps", "checkpoint_every_minutes"):
        del values["budget"][name]
    if values["norm"]["update_per"] == "forward":  # younger than many studies, in which it is so
        del values["norm"]["update_per"]
    content = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(content.encode()).hexdigest()[:KEY_LENGTH]


def spelled(value: Value) -> str:
    """A value as a study's file has it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def merge(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A new mapping: ``base`` with the values of ``overrides`` in place of its own, section by section."""
    merged = dict(base)
    for key, value in overrides.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


def _resolve(
    study: Study, arm: Arm, point: Point, candidate: Candidate, source: str, parsed: dict[str, RunConfig]
) -> RunConfig:
    """The configuration of a setting, before a seed is set."""
    values = merge(study.base, arm.overrides)
    if "seed" in values:
        raise ConfigError(f"{source}: arm {arm.name}: seed", values["seed"], "no seed here: the study's `seeds` set it")
    at = dict(point)
    where = f"{source}: arm {arm.name}" + "".join(f", {name} {spelled(value)}" for name, value in point + candidate)
    for name, value in [*((name, at[name]) for name in study.grid), *candidate]:
        values = merge(values, _nested(name, value))
    if study.sweep is not None:
        config = _parse(merge(values, _any_place(study.sweep, values)), where, parsed)
        values = merge(values, _swept(study.sweep, config, at, where))
    return _parse(values, where, parsed)


def _any_place(sweep: Sweep, values: Mapping[str, Any]) -> dict[str, Any]:
    """Stand-ins for the values that the sweep sets, so that an arm can be parsed before they are known."""
    norm = values.get("norm")
    if sweep.vary == "ghost_batch_size":
        ghost = isinstance(norm, Mapping) and norm.get("name") == "ghost"
        return {"norm": {"ghost_batch_size": sweep.values[0]}} if ghost else {}
    whole = sweep.global_batch_size
    return {} if whole is None else {"gpus": 1, "per_gpu_batch_size": whole, "sync_group_size": None}


def _swept(sweep: Sweep, config: RunConfig, at: Mapping[str, Value], where: str) -> dict[str, Any]:
    """The values that a point of the sweep sets; none if the arm's normalization does not depend on it."""
    value = at[sweep.vary]
    assert isinstance(value, int)
    if sweep.kind == "coupled":
        hold = at.get(HOLD, sweep.hold[0])
        if hold == "epochs" and config.budget.epochs is None:
            raise ConfigError(f"{where}: budget.epochs", None, "a number of epochs, as the sweep holds them")
        scaling = config.optimizer.lr_scaling if config.optimizer.lr_scaling != "none" else "linear"
        budget = {"epochs": None, "steps": sweep.steps} if hold == "steps" else {}
        return {"per_gpu_batch_size": value, "optimizer": {"lr_scaling": scaling}, "budget": budget}
    if sweep.vary == "per_gpu_batch_size":
        assert sweep.global_batch_size is not None
        if config.normalization_batch_size is None:
            value = sweep.global_batch_size
        return {"gpus": sweep.global_batch_size // value, "per_gpu_batch_size": value}
    if sweep.vary == "ghost_batch_size":
        return {"norm": {"ghost_batch_size": value}} if config.norm.name == "ghost" else {}
    return {"sync_group_size": value} if config.norm.synchronized else {}


def _nested(dotted: str, value: Value) -> dict[str, Any]:
    first, _, rest = dotted.partition(".")
    return {first: _nested(rest, value) if rest else value}


def _parse(values: dict[str, Any], where: str, parsed: dict[str, RunConfig]) -> RunConfig:
    name = repr(values)
    if name not in parsed:
        try:
            parsed[name] = config_from_dict(values)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error.key}", error.value, error.expected) from None
    return parsed[name]
