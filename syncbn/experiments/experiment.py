"""An experiment: a claim, a study of what it is about, and checks of what it says about the numbers."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from syncbn.experiments.checks import Check, check_from
from syncbn.experiments.runs import Runs
from syncbn.study.plan.content import mapping, text
from syncbn.study.plan.grid import Study
from syncbn.study.plan.study_file import packaged, study_from_dict
from syncbn.train.config import ConfigError, require
from syncbn.train.yaml_file import read_yaml

_CLAIM = ("source", "claim", "paper", "checks")
_STUDY = ("title", "run", "metric", "base", "arms", "sweep", "axes", "seeds", "notes")


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A claim of the literature and what measures it.

    Example:
        >>> from syncbn.experiments import load_experiment
        >>> experiment = load_experiment("depth")
        >>> experiment.source
        'Yang et al. 2019, A Mean Field Theory of Batch Normalization, arXiv 1902.08129, sections 3 and 4'
        >>> experiment.study.seeds
        (0, 1, 2, 3, 4)
    """

    name: str
    source: str
    """The paper and the section."""
    claim: str
    """What is claimed."""
    paper: str
    """What the paper shows for it."""
    study: Study
    """The runs: a function of the configuration and the seed, for every arm at every point of the axes."""
    checks: tuple[Check, ...]
    """What the claim says about the numbers."""
    figure: Callable[[Runs], Figure]
    """Draws what the runs measured, as the paper does."""


def experiment_names() -> list[str]:
    """The experiments that come with the package, sorted."""
    return sorted(packaged("experiments"))


def described_experiments() -> list[tuple[str, str, str]]:
    """Name, title and source of each, without building their runs."""
    found = [(name, read_yaml(path, "config")) for name, path in sorted(packaged("experiments").items())]
    return [(name, str(content["title"]), str(content["source"])) for name, content in found]


def load_experiment(path_or_name: str | Path, *, larger: bool = False) -> Experiment:
    """Read an experiment from its YAML file, or the packaged one of this name.

    Args:
        path_or_name: path of a YAML file, or a name.
        larger: take the sizes for a GPU, the file's ``larger``, in place of those for two cores.

    Raises:
        ValueError: there is no such experiment, or its file has a mistake; the message names the file, the key, the
            value and what was expected.
    """
    installed = packaged("experiments")
    path = Path(path_or_name) if Path(path_or_name).is_file() else installed.get(str(path_or_name))
    if path is None:
        expected = f"an existing YAML file or the name of an experiment ({', '.join(sorted(installed))})"
        raise ConfigError("experiment", str(path_or_name), expected)
    return experiment_from_dict(read_yaml(path, "config"), path.stem, str(path), larger=larger)


def experiment_from_dict(content: object, name: str, source: str, *, larger: bool = False) -> Experiment:
    """Build an experiment from the parsed content of its file. Raises ConfigError for a mistake in it."""
    required = [key for key in (*_CLAIM, *_STUDY) if key not in ("sweep", "axes", "notes")]
    data = mapping(content, source, required, ("sweep", "axes", "notes", "larger"))
    sizes = mapping(data.get("larger") or {}, f"{source}: larger", optional=("base", "axes", "seeds"))
    plan = {key: data[key] for key in _STUDY if key in data}
    if larger:
        require(bool(sizes), f"{source}: larger", data.get("larger"), "the sizes for a GPU, which `--larger` asks for")
        plan |= {key: _merged(plan[key], value) for key, value in sizes.items()}
    claim = text(data["claim"], f"{source}: claim")
    study = study_from_dict({**plan, "name": name, "question": claim}, source)
    listed = isinstance(data["checks"], list) and bool(data["checks"])
    require(listed, f"{source}: checks", data["checks"], "a list of checks")
    return Experiment(
        name=name,
        source=text(data["source"], f"{source}: source"),
        claim=claim,
        paper=text(data["paper"], f"{source}: paper"),
        study=study,
        checks=tuple(check_from(entry, study, f"{source}: checks[{i}]") for i, entry in enumerate(data["checks"])),
        figure=_figure_of(study),
    )


def _merged(old: Any, new: Any) -> Any:
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return new
    return old | {key: _merged(old.get(key), value) for key, value in new.items()}


def _figure_of(study: Study) -> Callable[[Runs], Figure]:
    """``figure`` of the module that has the study's function."""
    assert isinstance(study.run, str), "an experiment's file names its function"
    module = importlib.import_module(study.run.partition(":")[0])
    return module.figure  # type: ignore[no-any-return]
