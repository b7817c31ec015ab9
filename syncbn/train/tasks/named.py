"""From the name of a task in a configuration to the task: a built-in one, or ``module:attribute`` of the user's."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch

from syncbn.train.config import ConfigError, LocalError, RunConfig, require
from syncbn.train.result import Metric
from syncbn.train.task import Task
from syncbn.train.tasks.classification import Classification

BUILT_IN: dict[str, str] = {
    "segmentation": "syncbn.train.tasks.segmentation:Segmentation",
    "detection": "syncbn.train.tasks.detection:Detection",
}
"""Built-in tasks besides ``classification``, by name: ``module:attribute``."""
BUILT_IN_NAMES = ("classification", *BUILT_IN)


class TaskError(LocalError):
    """A mistake in a task's code."""


@contextmanager
def blamed(task: str, method: str) -> Iterator[None]:
    """Name the task and its method in an error of the user's code; the user's traceback is that of the cause."""
    try:
        yield
    except (ConfigError, LocalError):
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        # A DataLoader's process puts its own traceback before the message.
        text = lines[-1] if lines[0].startswith("Caught ") else f"{type(error).__name__}: {lines[0]}"
        raise TaskError(f"task {task}: {method} raised {text}") from error


@contextmanager
def traceback_in(log: Path | None) -> Iterator[None]:
    """Write the traceback of an error in a task's code to ``log``, and name the file in the error."""
    try:
        yield
    except TaskError as error:
        if log is None:
            raise
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_text(traceback.format_exc(), encoding="utf-8", errors="replace")
        except OSError:  # a full disk, for one: the task's own error says more
            raise error from None
        raise TaskError(f"{error} (traceback: {log})") from error


def load_task(config: RunConfig, device: torch.device) -> Task:
    """The task that a configuration names.

    Raises:
        ConfigError: there is no such task, it does not take these options, or it lacks a method.
        TaskError: making it raised an error.
    """
    name, options = config.task.name, config.task.options
    if name == "classification":
        require(not options, "task.options", options, "none for classification: see `data` and `model`")
        return Classification(config.data, config.model, config.optimizer.label_smoothing, device)
    make = find(BUILT_IN.get(name, name), "task.name")
    if isinstance(make, Task):
        require(not options, "task.options", options, f"none, as {name} is a task that has been made")
        return check_task(make, name)
    try:
        inspect.signature(make).bind(**options)
    except TypeError as error:
        raise ConfigError("task.options", options, f"keyword arguments of {name} ({error})") from error
    with blamed(name, "__init__()" if inspect.isclass(make) else "the function"):
        task = make(**options)
    return check_task(task, name)


def check_task(task: Any, name: str) -> Task:
    """``task``, if it has what a run needs."""
    require(isinstance(task, Task), "task.name", name, "a subclass of syncbn.train.Task, or a function that makes one")
    for method in ("model", "data", "loss"):
        own = getattr(type(task), method) is not getattr(Task, method)
        require(own, "task.name", name, f"a task with the methods model, data and loss; it has no {method}")
    expected = f"a task whose `metric` is a syncbn.train.Metric, not {task.metric!r}"
    require(isinstance(task.metric, Metric), "task.name", name, expected)
    return cast(Task, task)


def find(name: str, key: str) -> Any:
    """The attribute that ``module:attribute`` names, for a key of a file.

    Modules in the working directory are found too.
    """
    module, colon, attribute = name.partition(":")
    what = key.partition(".")[0]
    known = f"{', '.join(['classification', *BUILT_IN])}, or " if key == "task.name" else ""
    require(bool(module and colon and attribute), key, name, f"{known}module:attribute")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and (module == error.name or module.startswith(f"{error.name}.")):
            where = f"a module that Python finds, in {os.getcwd()} or among the installed packages"
            raise ConfigError(key, name, where) from error
        raise TaskError(f"{what} {name}: its module raised {type(error).__name__}: {error}") from error
    except Exception as error:
        raise TaskError(f"{what} {name}: its module raised {type(error).__name__}: {error}") from error
    for part in attribute.split("."):
        require(hasattr(found, part), key, name, f"an attribute of {module}, which has none called {part}")
        found = getattr(found, part)
    require(isinstance(found, Task) or callable(found), key, name, "a class or a function")
    return found
