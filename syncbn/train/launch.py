"""The processes of a run: starting them on this machine, and joining them through accelerate."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from syncbn.train.config import RunConfig, require
from syncbn.train.launcher_variables import meeting_point, rank_and_processes
from syncbn.train.lifeline import PARENT
from syncbn.train.logical_gpus import Placement
from syncbn.train.trackers import check_trackers, ending_trackers
from syncbn.watchdog import watchdog

MEETING_SECONDS = 300.0
"""How long processes wait for each other when they start."""

ONE_NODE = ("--standalone", "--local-addr", "localhost")
"""torchrun's options. By default the processes meet at the machine's own name, which some containers cannot look up."""


class LaunchError(RuntimeError):
    """The processes failed. The message is what they reported, or ends with their last output.

    Attributes:
        mistake: whether it is a mistake of the user's, and not of the machine, such as a full disk.
    """

    def __init__(self, message: str, mistake: bool = False) -> None:
        super().__init__(message)
        self.mistake = mistake


def launch(
    processes: int, arguments: Sequence[str], log: Path, timeout: float | None = None, *, module: str = "syncbn"
) -> None:
    """Run ``python -m MODULE ARGUMENTS`` in ``processes`` processes under torchrun, on a free port.

    Their output goes to ``log``. All of them have ended when this function returns or raises.

    Raises:
        LaunchError: they failed, or did not end within ``timeout`` seconds.
    """
    torchrun = "from syncbn.train.lifeline import torchrun; torchrun()"
    outer = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {"OMP_NUM_THREADS": "1", **{k: v for k, v in os.environ.items() if k not in outer}}
    environment[PARENT] = str(os.getpid())
    log.parent.mkdir(parents=True, exist_ok=True)
    # torchrun leaves its own folder of logs behind.
    with tempfile.TemporaryDirectory(prefix="syncbn-torchrun-") as logs, log.open("w") as output:
        command = [sys.executable, "-c", torchrun, *ONE_NODE, f"--nproc-per-node={processes}", "--log-dir", logs]
        process = subprocess.Popen(
            [*command, "-m", module, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise LaunchError(f"not finished after {timeout:.0f} s; see {log}\n{_tail(log)}") from None
        finally:
            _end(process)
    if not code:
        return
    text = log.read_text(errors="replace")
    if said := re.findall(r"syncbn: error: (.+)", text):
        # What other processes say comes of it. torchrun itself ends with 1, and its summary has the process's own code.
        raise LaunchError(said[0], mistake=re.search(r"^\s*exitcode\s*: 2\b", text, re.MULTILINE) is not None)
    raise LaunchError(f"{processes} processes ended with exit code {code}; see {log}\n{_tail(log)}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the launcher and its children, which form a process group."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, how)
        except ProcessLookupError:
            return
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)


def _tail(log: Path, lines: int = 15) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


@contextmanager
def open_session(config: RunConfig, out: Path | None, trackers: Sequence[str] = ()) -> Iterator[Any]:
    """An :class:`accelerate.Accelerator` for ``config``; under torchrun or accelerate launch it joins the processes.

    The random state and accelerate's global state are restored at the end, and a process group that was created here is
    destroyed, so one process can run several configurations.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState

    check_trackers(trackers)
    cpu = _use_cpu(config)
    had_world = dist.is_initialized()
    rng_devices = [] if cpu else [int(os.environ.get("LOCAL_RANK", "0"))]
    # Accelerate has one state per process, which refuses a second precision.
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        if placement().processes > 1 and not had_world:
            make_process_group("gloo" if cpu else "nccl")
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
        with torch.random.fork_rng(devices=rng_devices), watchdog(_timeout()), ending_trackers(accelerator):
            yield accelerator
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        if not had_world and dist.is_initialized():
            dist.destroy_process_group()


def _timeout() -> float:
    """Seconds that a process may wait for the others in a layer."""
    given = os.environ.get("SYNCBN_TIMEOUT") or "300"
    number = re.fullmatch(r"\d+(\.\d+)?", given) is not None and float(given) > 0
    require(number, "SYNCBN_TIMEOUT", given, "an environment variable with a positive number of seconds")
    return float(given)


_worlds = itertools.count()


def make_process_group(backend: str) -> None:
    """Make the default process group of the launcher's processes; each of them makes its groups in the same order.

    The launcher's store outlives a group, with the addresses at which the processes of that group could be reached. A
    second group under the same keys may read these, and wait forever for processes that listen elsewhere by now. So
    each group has keys of its own, also after torchrun has started the processes again.
    """
    place, store = placement(), PrefixStore(f"syncbn-{restarts()}-{next(_worlds)}", _launchers_store())
    dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.processes)


@lru_cache(maxsize=1)
def _launchers_store() -> Store:
    # Kept: without torchrun the first process serves it, and could not open the port a second time.
    place = meeting_point()
    try:
        store: Store = next(iter(rendezvous("env://", timeout=timedelta(seconds=MEETING_SECONDS))))[0]
    except dist.DistError as error:
        reason = str(error).splitlines()[0]
        raise LaunchError(f"the processes cannot meet at {place} (MASTER_ADDR and MASTER_PORT): {reason}") from None
    return store


def _use_cpu(config: RunConfig) -> bool:
    cuda = torch.cuda.is_available()
    too_many = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > torch.cuda.device_count()
    if config.device == "cuda":
        require(cuda, "device", "cuda", "cpu or auto, as torch finds no CUDA device")
        expected = f"cpu, or at most {torch.cuda.device_count()} processes on this machine, as each needs its own GPU"
        require(not too_many, "device", "cuda", f"{expected} (a process can host several logical GPUs)")
    cpu = config.device == "cpu" or too_many or not cuda
    expected = "bf16, fp32 or fp64 on a CPU (fp16 needs CUDA's loss scaling)"
    require(not cpu or config.precision != "fp16", "precision", "fp16", expected)
    return cpu


def restarts() -> int:
    """How many times torchrun has started the processes again, after one of them failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def placement() -> Placement:
    """Rank and number of processes, as the launcher set them."""
    return Placement(*rank_and_processes())
