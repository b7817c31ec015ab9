"""Checkpoints: whole or not used, tied to a configuration, independent of the number of processes."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from torch import Tensor, nn

from syncbn.train.config import ConfigError, RunConfig, config_to_dict, flatten, require, shown
from syncbn.train.plain_state import from_plain, to_plain
from syncbn.train.result import naming, replacing, write_atomically
from syncbn.train.stored import load_model_tensors, load_tensors, read_json, save_model_tensors, save_tensors

KEPT = 2
"""Checkpoints of a run that are kept: if a file of the newest is damaged, the one before it is used."""
_FORMAT = 1
_MANIFEST = "manifest.json"
"""The sizes and digests of the other files, written last."""
_FILES = ("model.safetensors", "state.safetensors", "state.json", "config.json")
_REPLACED = "-replaced"
"""Ends the name of a checkpoint while another one of its step takes its place."""
_log = logging.getLogger("syncbn")
# When a run is resumed, as they do not change what is computed.
_MAY_CHANGE = (
    "device",
    "data.workers",
    "budget.checkpoint_every",
    "budget.checkpoint_every_steps",
    "budget.checkpoint_every_minutes",
    "budget.eval_batch_size",
)


def save_weights(model: nn.Module, path: Path) -> None:
    """Write parameters and buffers as safetensors, atomically. Raises OSError, which names ``path``."""
    with replacing(path) as unfinished:
        save_model_tensors(model, unfinished)


def save_checkpoint(folder: Path, step: int, model: nn.Module, state: dict[str, Any], config: RunConfig) -> None:
    """Write a checkpoint, make it the latest, and only then remove all but :data:`KEPT`.

    Raises:
        OSError: it could not be written, for a full disk for one. The checkpoints before it are as they were.
    """
    target = folder / f"step-{step:08d}"
    unfinished = folder / f".{target.name}"
    before = next((each.name for each in _checkpoints(folder) if _step(each) < step), None)
    kept = "there is none before it" if before is None else f"{before}, the one before, is kept"
    with _undone(unfinished, f"this checkpoint could not be written; {kept}"):
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        _write(unfinished, step, model, state, config)
        if target.exists():  # damaged, as the run has come here again; or from before the evaluation of this step
            replaced = target.with_name(target.name + _REPLACED)  # still found, if the process is killed right now
            shutil.rmtree(replaced, ignore_errors=True)
            target.rename(replaced)
        unfinished.rename(target)
    write_atomically(folder / "latest", target.name)
    # A later one was damaged, or the run would not have come here again.
    older = [each for each in _checkpoints(folder) if _step(each) < step]
    for other in set(_checkpoints(folder)) - {target, *older[: KEPT - 1]}:
        shutil.rmtree(other)


@contextmanager
def _undone(unfinished: Path, note: str) -> Iterator[None]:
    """After an error, remove what was written: it may be what the disk has no room for."""
    try:
        with naming(unfinished.with_name(unfinished.name[1:])):
            yield
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise OSError(error.errno, f"{error.strerror}; {note}", error.filename) from error


def _write(folder: Path, step: int, model: nn.Module, state: dict[str, Any], config: RunConfig) -> None:
    """The files of a checkpoint, the manifest last."""
    tensors: dict[str, Tensor] = {}
    plain = to_plain(state, tensors)
    save_model_tensors(model, folder / "model.safetensors")
    save_tensors(tensors, folder / "state.safetensors")
    (folder / "state.json").write_text(json.dumps(plain))
    (folder / "config.json").write_text(json.dumps(config_to_dict(config)))
    files = {name: _digest(folder / name) for name in _FILES}
    (folder / _MANIFEST).write_text(json.dumps({"format": _FORMAT, "step": step, "files": files}, indent=1))


def tidy(out: Path, step: int | None) -> None:
    """Remove what killed processes have left unfinished in a run's folder, which this process has locked.

    ``latest`` is made to name the checkpoint of ``step``, with which the run goes on: the process may have been killed
    between a checkpoint and its name.
    """
    folder = out / "checkpoint"
    for path in (*out.glob(".*"), *folder.glob(".*")):
        if re.fullmatch(r"\..+\.[0-9a-f]{32}", path.name):
            path.unlink()
        elif re.fullmatch(r"\.step-[0-9]{8,18}", path.name):
            shutil.rmtree(path)
    if step is not None:
        found = next(each.name for each in _checkpoints(folder) if _step(each) == step)
        latest = folder / "latest"
        if not latest.is_file() or latest.read_text(errors="replace") != found:
            write_atomically(latest, found)


def load_checkpoint(folder: Path, model: nn.Module, config: RunConfig) -> dict[str, Any] | None:
    """Load the newest whole checkpoint's weights into ``model`` and return its state; None if there is none yet.

    A checkpoint with a file that its manifest does not describe is not used, but the one before it.

    Raises:
        ConfigError: no checkpoint is whole, or the run in ``folder`` has another configuration.
    """
    target = whole_checkpoint(folder)
    if target is None:
        return None
    check_same(read_json(target / "config.json", "out"), config_to_dict(config), folder)
    try:
        load_model_tensors(model, target / "model.safetensors")
    except RuntimeError as error:
        expected = "a checkpoint of the task's model, which has other weights by now; use another --out"
        raise ConfigError("out", target, expected) from error
    state = from_plain(read_json(target / "state.json", "out"), load_tensors(target / "state.safetensors"))
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
    require(not found, "out", folder, f"a whole checkpoint; use another --out ({'; '.join(problems)})")
    return None


def _checkpoints(folder: Path) -> list[Path]:
    """The newest first. Folders of other names, such as a copy of a checkpoint, are the user's."""
    named = f"step-[0-9]{{8,18}}({_REPLACED})?"
    found = [path for path in folder.glob("step-*") if re.fullmatch(named, path.name) and path.is_dir()]
    return sorted(found, key=lambda path: (_step(path), not path.name.endswith(_REPLACED)), reverse=True)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def _problem(target: Path) -> str | None:
    """What is wrong with a checkpoint: a file's name and the reason; None if nothing is."""
    try:
        manifest = read_json(target / _MANIFEST, "out")
        files = dict(manifest["files"])
        if manifest["format"] != _FORMAT or files.keys() != set(_FILES):
            return f"{_MANIFEST} is of another version"
    except (ValueError, KeyError, TypeError):
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
    """Raise ConfigError if two configurations differ in a key that enters the training; the error names the key.

    A key that is younger than the run in ``folder`` has its default there.
    """
    theirs, ours = flatten(config_to_dict(RunConfig())) | flatten(theirs), flatten(ours)
    for key in sorted((theirs.keys() | ours.keys()).difference(_MAY_CHANGE)):
        expected = f"{shown(theirs.get(key))}, the value of the run that was started in {folder}; use another --out"
        require(theirs.get(key) == ours.get(key), key, ours.get(key), expected)


@contextmanager
def try_lock(path: Path) -> Iterator[bool]:
    """Hold an advisory lock; yields False if another process holds it.

    The kernel releases it when its holder ends, however that happens. The file stays, because removing it would let two
    processes hold locks on two files of the same name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _lockable(path) as file:
        held = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held = False
        try:
            yield held
        finally:  # a forked loader process may still hold a copy of the file, so closing it is not enough
            fcntl.flock(file, fcntl.LOCK_UN)


def _lockable(path: Path) -> IO[Any]:
    try:
        return path.open("a")
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES) or not path.is_file():
            raise
        return path.open("rb")  # in a folder that may be looked at, but not written to


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Lock the folder of a run, which is made if needed."""
    with try_lock(out / ".lock") as held:
        require(held, "out", out, "a folder that no other run is writing to")
        yield
