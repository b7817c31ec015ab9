"""Checkpoints that are whole or absent, and belong to a configuration, not to a number of processes."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from syncbn.train.config import ConfigError, RunConfig
from syncbn.train.config_io import config_to_dict
from syncbn.train.result import write_atomically

# What may change between the parts of a run, as it changes nothing that is computed.
_NO_MATTER = ("device", "data.workers", "budget.checkpoint_every", "budget.eval_batch_size")


def save_weights(model: nn.Module, path: Path) -> None:
    """Parameters and buffers as safetensors, atomically."""
    from safetensors.torch import save_model

    temporary = path.with_name(f".{path.name}")
    save_model(model, str(temporary))
    temporary.replace(path)


def load_weights(model: nn.Module, path: Path) -> None:
    """Load what :func:`save_weights` wrote, strictly."""
    from safetensors.torch import load_model

    load_model(model, str(path), strict=True)


def save_checkpoint(folder: Path, step: int, model: nn.Module, state: dict[str, Any], config: RunConfig) -> None:
    """Write a checkpoint and make it the latest; the one before is removed only after that."""
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
    """Load the latest checkpoint's weights into ``model`` and return its state; None where there is none.

    Raises:
        ConfigError: the checkpoint was made with another configuration, apart from what does not enter the training.
    """
    pointer = folder / "latest"
    if not pointer.exists():
        return None
    target = folder / pointer.read_text().strip()
    check_same(json.loads((target / "config.json").read_text()), config_to_dict(config), folder)
    load_weights(model, target / "model.safetensors")
    state: dict[str, Any] = torch.load(target / "state.pt", map_location="cpu", weights_only=True)
    return state


def check_same(theirs: dict[str, Any], ours: dict[str, Any], folder: Path, prefix: str = "") -> None:
    """Raise ConfigError, naming the key, unless two configurations are the same apart from the device."""
    for key in sorted(theirs.keys() | ours.keys()):
        if prefix + key in _NO_MATTER:
            continue
        a, b = theirs.get(key), ours.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            check_same(a, b, folder, f"{prefix}{key}.")
        elif a != b:
            raise ConfigError(
                f"{prefix}{key}", b, f"{a!r}, with which the run in {folder} was begun; use another --out"
            )


@contextmanager
def try_lock(path: Path) -> Iterator[bool]:
    """Hold an advisory lock; yields False if another process holds it.

    The kernel releases it when the holder ends, however it ends. The file stays: removing it would let two processes
    hold locks on two files of the same name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
        except BlockingIOError:
            held = False
        try:
            yield held
        finally:
            if held:  # explicitly, as a forked loader process may still hold a copy of the descriptor
                fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the folder of a run, which is made if need be.

    Raises:
        ConfigError: another process holds it.
    """
    out.mkdir(parents=True, exist_ok=True)
    with try_lock(out / ".lock") as held:
        if not held:
            raise ConfigError("out", str(out), "a folder that no other run is writing to")
        yield
