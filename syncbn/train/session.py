"""The processes and the device of a run, through accelerate."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from syncbn.train.checks import ConfigError, require
from syncbn.train.config import RunConfig
from syncbn.train.logical_gpus import Placement


@contextmanager
def open_session(config: RunConfig, out: Path | None, trackers: Sequence[str] = ()) -> Iterator[Any]:
    """An :class:`accelerate.Accelerator` for ``config``; under torchrun or accelerate launch it joins the processes.

    One process can run several configurations, one after another: the random state and accelerate's global state are
    restored at the end, and a process group that was created here is destroyed.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState
    from accelerate.utils import LoggerType

    known = [str(tracker.value) for tracker in LoggerType]
    for name in trackers:
        require(name in known, "trackers", name, f"one of {', '.join(known)}")
    cpu = _use_cpu(config)
    had_world = dist.is_initialized()
    rng_devices = [] if cpu else [int(os.environ.get("LOCAL_RANK", "0"))]
    # Accelerate has one state per process, which refuses a second precision.
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        accelerator = Accelerator(
            cpu=cpu,
            mixed_precision=config.precision if config.precision in ("bf16", "fp16") else "no",
            dynamo_backend="no",
            log_with=list(trackers) or None,
            project_dir=None if out is None else str(out),
            # The layers average their own buffers; broadcasting those of rank 0 would undo that.
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
        # The loop accumulates gradients itself. Accelerate would divide them, as an environment variable may ask for.
        accelerator.gradient_accumulation_steps = 1
        with torch.random.fork_rng(devices=rng_devices):
            yield accelerator
            for tracker in accelerator.trackers:  # end_training() would also destroy a process group that is not ours
                tracker.finish()
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        if not had_world and dist.is_initialized():
            dist.destroy_process_group()


def _use_cpu(config: RunConfig) -> bool:
    cuda = torch.cuda.is_available()
    too_many = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > torch.cuda.device_count()
    if config.device == "cuda":
        require(cuda, "device", "cuda", "cpu or auto, as torch finds no CUDA device")
        expected = f"cpu, or at most {torch.cuda.device_count()} processes on this machine, as each needs its own GPU"
        require(not too_many, "device", "cuda", f"{expected} (a process can host several logical GPUs)")
    cpu = config.device == "cpu" or too_many or not cuda
    if cpu and config.precision == "fp16":
        raise ConfigError("precision", "fp16", "bf16, fp32 or fp64 on a CPU (fp16 needs CUDA's loss scaling)")
    return cpu


def placement() -> Placement:
    """Rank and number of processes, as the launcher set them."""
    return Placement(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
