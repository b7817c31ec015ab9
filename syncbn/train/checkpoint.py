"""Checkpoints: whole or not used, tied to a configuration, independent of the number of processes."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from syncbn.train.config import RunConfig, config_to_dict, flatten, require
from syncbn.train.plain_state import from_plain, to_plain
from syncbn.train.result import replacing, write_atomically

KEPT = 2
"""Checkpoints of a run that are kept: if a file of the newest is damaged, the one before it is used."""
_FORMAT = 1
_MANIFEST = "manifest.json"
"""The sizes and digests of the other files, written last."""
_FILES = ("model.safetensors", "state.safetensors", "state.json", "config.json")
_log = logging.getLogger("syncbn")
# When a run is resumed, as they do not change what is computed.
_MAY_CHANGE = ("device", "data.workers", "budget.checkpoint_every", "budget.eval_batch_size")


def save_weights(model: nn.Module, path: Path) -> None:
    """Write parameters and buffers as safetensors, atomically."""
    from safetensors.torch import save_model

    with replacing(path) as unfinished:
        save_model(model, str(unfinished))


def load_weights(model: nn.Module, path: Path) -> None:
    """Load what :func:`save_weights` wrote."""
    from safetensors.torch import load_model

    load_model(model, str(path))


def save_checkpoint(folder: Path, step: int, model: nn.Module, state: dict[str, Any], config: RunConfig) -> None:
    """Write a checkpoint, make it the latest, and only then remove all but :data:`KEPT`."""
    from safetensors.torch import save_file

    target = folder / f"step-{step:08d}"
    unfinished = folder / f".{target.name}"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    tensors: dict[str, Tensor] = {}
    plain = to_plain(state, tensors)
    save_weights(model, unfinished / "model.safetensors")
    save_file(tensors, unfinished / "state.safetensors")
    (unfinished / "state.json").write_text(json.dumps(plain))
    (unfinished / "config.json").write_text(json.dumps(config_to_dict(config)))
    files = {name: _digest(unfinished / name) for name in _FILES}
    (unfinished / _MANIFEST).write_text(json.dumps({"format": _FORMAT, "step": step, "files": files}, indent=1))
    if target.exists():  # damaged, as the run has come here again
        shutil.rmtree(target)
    unfinished.rename(target)
    write_atomically(folder / "latest", target.name)
    # A later one was damaged, or the run would not have come here again.
    older = [each for each in _checkpoints(folder) if each.name < target.name]
    for other in set(_checkpoints(folder)) - {target, *older[: KEPT - 1]}:
        shutil.rmtree(other)


def load_checkpoint(folder: Path, model: nn.Module, config: RunConfig) -> dict[str, Any] | None:
    """Load the newest whole checkpoint's weights into ``model`` and return its state; None if there is none yet.

    A checkpoint with a file that its manifest does not describe is not used, but the one before it.

    Raises:
        ConfigError: no checkpoint is whole, or the run in ``folder`` has another configuration.
    """
    from safetensors.torch import load_file

    target = whole_checkpoint(folder)
    if target is None:
        return None
    check_same(json.loads((target / "config.json").read_text()), config_to_dict(config), folder)
    load_weights(model, target / "model.safetensors")
    state = from_plain(json.loads((target / "state.json").read_text()), load_file(target / "state.safetensors"))
    assert isinstance(state, dict), "as save_checkpoint wrote it"
    return state


def whole_checkpoint(folder: Path) -> Path | None:
    """The folder of the newest checkpoint whose files are those of its manifest; None if there is no checkpoint yet.

    Raises:
        ConfigError: there are checkpoints, but none is whole.
    """
    found, problems = _checkpoints(folder), list[str]()
    for target in found:
        problem = _problem(target)
        if problem is None:
            if problems:
                _log.warning("%s; the run goes on from %s", "; ".join(problems), target.name)
            return target
        problems.append(f"{target.name}/{problem}")
    require(not found, "out", str(folder), f"a whole checkpoint; use another --out ({'; '.join(problems)})")
    return None


def _checkpoints(folder: Path) -> list[Path]:
    """The newest first."""
    return sorted(folder.glob("step-*"), reverse=True)


def _problem(target: Path) -> str | None:
    """What is wrong with a checkpoint: a file's name and the reason; None if nothing is."""
    try:
        manifest = json.loads((target / _MANIFEST).read_text())
        files = dict(manifest["files"])
        if manifest["format"] != _FORMAT or files.keys() != set(_FILES):
            return f"{_MANIFEST} is of another version"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{_MANIFEST} cannot be read"
    for name, expected in files.items():
        try:
            found = _digest(target / name)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if found != expected:
            return f"{name} is not what was written"
    return None


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "blake2b": hashlib.file_digest(file, "blake2b").hexdigest()}


def check_same(theirs: dict[str, Any], ours: dict[str, Any], folder: Path) -> None:
    """Raise ConfigError if two configurations differ in a key that enters the training; the error names the key."""
    theirs, ours = flatten(theirs), flatten(ours)
    for key in sorted((theirs.keys() | ours.keys()).difference(_MAY_CHANGE)):
        expected = f"{theirs.get(key)!r}, the value of the run that was started in {folder}; use another --out"
        require(theirs.get(key) == ours.get(key), key, ours.get(key), expected)


@contextmanager
def try_lock(path: Path) -> Iterator[bool]:
    """Hold an advisory lock; yields False if another process holds it.

    The kernel releases it when its holder ends, however that happens. The file stays, because removing it would let two
    processes hold locks on two files of the same name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        held = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held = False
        try:
            yield held
        finally:  # a forked loader process may still hold a copy of the file, so closing it is not enough
            fcntl.flock(file, fcntl.LOCK_UN)


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Lock the folder of a run, which is made if needed."""
    with try_lock(out / ".lock") as held:
        require(held, "out", str(out), "a folder that no other run is writing to")
        yield
