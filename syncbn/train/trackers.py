"""Accelerate's trackers, as TensorBoard: what they are told, and what becomes of an error of theirs."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from syncbn.train.config import RunConfig, config_to_dict, flatten, require


def check_trackers(names: Sequence[str]) -> None:
    """Raise ConfigError unless the trackers with these names can be used here."""
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import LoggerType

    known = list(map(str, LoggerType))
    for name in names:
        require(name in known, "trackers", name, f"one of {', '.join(known)}")
        # Accelerate leaves out a tracker without its package, and says nothing.
        installed = name == "all" or name in map(str, get_available_trackers())
        require(installed, "trackers", name, f"a tracker whose package is installed: pip install {name}")


def begin_tracking(accelerator: Any, config: RunConfig, out: Path | None) -> None:
    """Start the trackers, if there are any, in the folder of the run."""
    if accelerator.log_with:
        assert out is not None, "checked before"
        # What accelerate does not tell a tracker: the name of the run, and where files go.
        options = {"wandb": {"name": out.name, "dir": str(out)}, "mlflow": {"run_name": out.name}}
        with _writing(accelerator):
            accelerator.init_trackers("syncbn", config=_shown(config), init_kwargs=options)


def track(accelerator: Any, values: dict[str, float], step: int) -> None:
    """Send values of an optimizer step to the trackers."""
    with _writing(accelerator):
        accelerator.log(values, step=step)


@contextmanager
def ending_trackers(accelerator: Any) -> Iterator[None]:
    """End the trackers with this context, unless it ends with an error."""
    before = threading.excepthook
    threading.excepthook = lambda args: None if _comes_again(args) else before(args)
    try:
        yield
        with _writing(accelerator):
            for tracker in accelerator.trackers:  # end_training() would also destroy a process group that is not ours
                tracker.finish()
    finally:
        for thread in threading.enumerate():
            if _writes(thread) and getattr(thread, "exception", None) is not None:
                thread.join(1.0)  # it has failed, and is about to call the hook
        threading.excepthook = before


@contextmanager
def _writing(accelerator: Any) -> Iterator[None]:
    """Let an error of a write, as to a full disk, say whose it is."""
    try:
        yield
    except OSError as error:
        reason = f"{error.strerror or error}; a tracker could not write its files"
        raise OSError(error.errno, reason, accelerator.project_dir) from error


def _comes_again(args: threading.ExceptHookArgs) -> bool:
    """Whether this is an error of a thread that its tracker raises again in the main thread: one line is enough."""
    return issubclass(args.exc_type, OSError) and args.thread is not None and _writes(args.thread)


def _writes(thread: threading.Thread) -> bool:
    return type(thread).__module__.startswith("tensorboard.")


def _shown(config: RunConfig) -> dict[str, Any]:
    """The configuration as trackers take it: no lists, no None."""
    values = flatten(config_to_dict(config))
    return {key: value if isinstance(value, int | float | str) else str(value) for key, value in values.items()}
