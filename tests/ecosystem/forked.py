"""Processes as torchrun starts them, but forked from one that has imported the frameworks, which takes them seconds."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

TIMEOUT_S = 200


def launch(job: Callable[..., Any], processes: int, folder: Path, *args: Any) -> list[Any]:
    """Call ``job(*args)``, a function of a module, in each of the processes; the results by rank.

    The job makes the process group, as a user's script does. A result is what ``torch.load`` takes.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        here = str(Path(__file__).parent)
        patch.setenv("PYTHONPATH", os.pathsep.join([here, *filter(None, sys.path)]))  # the first process imports more
        multiprocessing.set_forkserver_preload(["frameworks"])
        started = torch.multiprocessing.start_processes(
            _serve, (job, processes, port, str(folder), args), processes, join=False, start_method="forkserver"
        )
    deadline = time.monotonic() + TIMEOUT_S
    try:
        while not started.join(timeout=1):  # it raises a process's error
            assert time.monotonic() < deadline, f"the processes have not ended within {TIMEOUT_S} s"
    finally:
        for process in started.processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(processes)]


def _serve(rank: int, job: Callable[..., Any], processes: int, port: int, folder: str, args: tuple[Any, ...]) -> None:
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0}
    sizes = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    # As `accelerate launch --cpu` says it: without, processes on a machine without a GPU each train for themselves.
    meeting["ACCELERATE_USE_CPU"] = "true"
    os.environ |= {name: str(value) for name, value in (ranks | sizes | meeting).items()}
    torch.set_num_threads(1)
    os.chdir(folder)
    torch.save(job(*args), f"{rank}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()
