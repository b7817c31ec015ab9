"""Checkpoints: written atomically, tied to a configuration, independent of the number of processes."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from syncbn.train.config import RunConfig, config_to_dict, flatten, require
from syncbn.train.result import replacing, write_atomically

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
    """Write a checkpoint, make it the latest, and only then remove the one before."""
    target = folder / f"step-{step:08d}"
    target.mkdir(parents=True, exist_ok=True)
    save_weights(model, target / "model.safetensors")
    torch.save(state, target / "state.pt")
    write_atomically(target / "config.json", json.dumps(config_to_dict(config)))
    write_atomically(folder / "latest", target.name)
    for other in folder.glob("step-*"):
        if other != target:
            shutil.rmtree(other)


def load_checkpoint(folder: Path, model: nn.Module, config: RunConfig) -> dict[str, Any] | None:
    """Load the latest checkpoint's weights into ``model`` and return its state; None if there is no checkpoint."""
    pointer = folder / "latest"
    if not pointer.exists():
        return None
    target = folder / pointer.read_text().strip()
    check_same(json.loads((target / "config.json").read_text()), config_to_dict(config), folder)
    load_weights(model, target / "model.safetensors")
    state: dict[str, Any] = torch.load(target / "state.pt", map_location="cpu", weights_only=True)
    return state


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
