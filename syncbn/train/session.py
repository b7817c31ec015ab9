"""The processes and the device of a run, through accelerate."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from syncbn.train.config import ConfigError, RunConfig
from syncbn.train.logical_gpus import Placement


@contextmanager
def open_session(config: RunConfig, out: Path | None, trackers: Sequence[str] = ()) -> Iterator[Any]:
    """An :class:`accelerate.Accelerator` for ``config``.

    Under torchrun or accelerate launch it joins the other processes. What it changed in this process, the random state
    and accelerate's own, is put back, so that one process can run one configuration after another; a world that it
    initialised is taken down again.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState
    from accelerate.utils import LoggerType

    known = [str(tracker.value) for tracker in LoggerType]
    for name in trackers:
        if name not in known:
            raise ConfigError("trackers", name, f"one of {', '.join(known)}")
    cpu = _use_cpu(config)
    had_world = dist.is_initialized()
    rng_devices = [] if cpu else [int(os.environ.get("LOCAL_RANK", "0"))]
    # Accelerate keeps its state per process and refuses a second precision in it.
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        accelerator = Accelerator(
            cpu=cpu,
            mixed_precision=config.precision if config.precision in ("bf16", "fp16") else "no",
            dynamo_backend="no",
            log_with=list(trackers) or None,
            project_dir=None if out is None else str(out),
            # The layers keep their own buffers in step, exactly; broadcasting rank 0's would undo that.
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
        # The loop accumulates by itself; an environment variable for accelerate's own way would divide every gradient.
        accelerator.gradient_accumulation_steps = 1
        with torch.random.fork_rng(devices=rng_devices):
            yield accelerator
            for tracker in accelerator.trackers:  # end_training() would also take down a world that is not ours
                tracker.finish()
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        if not had_world and dist.is_initialized():
            dist.destroy_process_group()


def _use_cpu(config: RunConfig) -> bool:
    cuda = torch.cuda.is_available()
    if config.device == "cuda" and not cuda:
        raise ConfigError("device", "cuda", "cpu or auto, as torch finds no CUDA device")
    too_many = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > torch.cuda.device_count()
    if config.device == "cuda" and too_many:
        raise ConfigError(
            "device",
            "cuda",
            f"cpu, or at most {torch.cuda.device_count()} processes on this machine: "
            "processes need a GPU each, and one process can host several logical GPUs",
        )
    cpu = config.device == "cpu" or too_many or not cuda
    if cpu and config.precision == "fp16":
        raise ConfigError("precision", "fp16", "bf16, fp32 or fp64 on a CPU (fp16 needs CUDA's loss scaling)")
    return cpu


def placement() -> Placement:
    """Which process of how many this is, as the launcher says."""
    return Placement(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
