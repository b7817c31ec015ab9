"""Trainings that are killed at any moment: real processes, forked from one that has imported what a training needs.

A moment is the n-th event of a step in one process. Events are the calls of this package's functions, and what happens
to files: they are opened for writing, renamed, removed, made. A process dies by SIGKILL, or within a write by SIGXFSZ,
which the kernel sends when the file comes to a given size. The disk then has the first part of the write.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing as mp
import os
import re
import resource
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from task_cases import Sign

import syncbn
from syncbn.train import train
from syncbn.train.config import RunConfig
from syncbn.train.lifeline import end_with_parent

PACKAGE = str(Path(syncbn.__file__).parent)
PREPARING = -1
"""The step of events before the first step of a process."""
FILE_EVENTS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")
WRITERS = ("save_tensors", "save_model_tensors")
"""Their files are written by a library that Python does not see open them."""
# By functions; that of the innermost call counts.
PHASES = {
    "save_checkpoint": "checkpoint",
    "save_weights": "result",
    "to_json": "result",
    "write": "metrics",
    "_evaluate": "evaluation",
    "evaluate_statistics": "evaluation",
    "_train_step": "step",
    "prepare": "preparation",
}
IMPORTED_LATE = ("accelerate", "safetensors.torch", "torch._dynamo")
"""What a training imports when it needs it."""
TIMEOUT_S = 240
GRACE_S = 5
"""For the other processes to notice that one is gone."""


class Event(NamedTuple):
    step: int
    number: int
    """Within the step."""
    phase: str
    what: str
    """``call``, one of :data:`FILE_EVENTS`, or ``write NAME``."""


@dataclass(frozen=True)
class Kill:
    """Where a training is killed: at this event of this rank, or at the next one of its kind."""

    rank: int
    event: Event
    everyone: bool = True
    """Whether all processes are killed at once, or this one alone."""
    size: int | None = None
    """Bytes of the file that are written before; None kills before the event."""


class Watch:
    """Sees the events of this process: records them, or kills the process at one of them."""

    def __init__(self, out: Path, kill: Kill | None, note: Path) -> None:
        self.out, self.kill, self.note = str(out), kill, note
        self.step, self.number, self.armed = PREPARING, 0, False
        self.phases, self.events = list[str](), list[Event]()

    def start(self) -> None:
        sys.addaudithook(self._audit)
        sys.setprofile(self._profile)

    def stop(self) -> None:
        sys.setprofile(None)
        self.kill = None

    def _profile(self, frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event not in ("call", "return") or not code.co_filename.startswith(PACKAGE):
            return
        name = code.co_name
        if event == "return":  # also by an exception
            if name in PHASES:
                self.phases.pop()
            return
        if name in PHASES:
            self.phases.append(PHASES[name])
        if name in ("_train_step", "_train_epochs"):
            self.step, self.number = frame.f_locals["run"].progress.step, 0
        self._happens(f"write {plain_name(Path(frame.f_locals['path']))}" if name in WRITERS else "call")

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(args[0], str | Path) and str(args[0]).startswith(self.out):
            path, mode, flags = args
            if set(mode or "") & set("wax+") or flags & (os.O_WRONLY | os.O_RDWR):
                held = os.path.getsize(path) if "a" in (mode or "") and os.path.exists(path) else 0
                self._happens(f"write {plain_name(Path(path))}", held)
        elif event in FILE_EVENTS and str(args[0]).startswith(self.out):
            self._happens(event)

    def _happens(self, what: str, held: int = 0) -> None:
        """An event; a file that is written has ``held`` bytes."""
        self.number += 1
        happened = Event(self.step, self.number, self.phases[-1] if self.phases else "between", what)
        if self.kill is None:
            self.events.append(happened)
            return
        kill, due = self.kill, (self.step, self.number) >= self.kill.event[:2]
        if self.armed:
            if what != "call":  # the write was shorter
                os.kill(os.getpid(), signal.SIGKILL)
            return
        if not due or (kill.size is not None and not what.startswith("write ")):
            return
        self.kill = None  # what follows are events too
        saved = any(Path(self.out).glob("checkpoint/step-*"))
        self.note.write_text(json.dumps([*happened, saved]))
        if kill.size is None:
            os.kill(os.getpid(), signal.SIGKILL)
        self.kill, self.armed = kill, True
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (held + kill.size, resource.RLIM_INFINITY))


def plain_name(path: Path) -> str:
    """The name of a file, which may be written under a passing one."""
    found = re.fullmatch(r"\.(.+)\.[0-9a-f]{32}", path.name)
    return found[1] if found else path.name


class Attempt(NamedTuple):
    """One start of a training: to its end, or until it is killed."""

    config: RunConfig
    out: Path
    world: int
    scratch: Path
    kill: Kill | None = None
    record: bool = False


class Outcome(NamedTuple):
    codes: list[int]
    """Exit codes by rank, negative for signals."""
    death: tuple[Event, bool] | None
    """Where it was killed, and whether there was a checkpoint by then."""
    events: list[Event]
    """Of the first rank, if they were recorded. Those of the others are much the same, but for files."""
    said: str
    """What the processes that failed have printed."""


def _rank(rank: int, attempt: Attempt, rendezvous: Path) -> None:
    """What a forked process does."""
    if attempt.world > 1:
        world = str(attempt.world)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=world, LOCAL_WORLD_SIZE=world)
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=attempt.world)
        dist.barrier()  # a rank whose run is finished already would end before the others are connected
    kill = attempt.kill if attempt.kill is not None and attempt.kill.rank == rank else None
    note = attempt.scratch / f"note-{rank}.json"
    records = attempt.record and rank == 0
    watch = Watch(attempt.out, kill, note)
    if records or kill is not None:
        watch.start()
    train(attempt.config, attempt.out, task=Sign(), resume=True)
    watch.stop()
    if records:
        note.write_text(json.dumps(watch.events))
    if attempt.world > 1:
        dist.destroy_process_group()


def _forked(rank: int, attempt: Attempt, rendezvous: Path) -> int:
    """The process number of a training's rank."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        end_with_parent(signal.SIGKILL)
        output = os.open(attempt.scratch / f"said-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        _rank(rank, attempt, rendezvous)
        code = 0
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code)


def _attempted(attempt: Attempt, number: int) -> Outcome:
    for old in [*attempt.scratch.glob("note-*.json"), *attempt.scratch.glob("said-*.txt")]:
        old.unlink()
    pids = list[int]()
    for rank in range(attempt.world):
        pids.append(_forked(rank, attempt, attempt.scratch / f"rendezvous-{number}"))
    codes, deadline = dict[int, int](), time.monotonic() + TIMEOUT_S
    while len(codes) < len(pids):
        for pid in [pid for pid in pids if pid not in codes]:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                codes[pid] = os.waitstatus_to_exitcode(status)
                if codes[pid]:
                    everyone = attempt.kill is not None and attempt.kill.everyone
                    deadline = min(deadline, time.monotonic() + (0 if everyone else GRACE_S))
        for pid in pids if time.monotonic() > deadline else []:
            if pid not in codes:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    said = [(attempt.scratch / f"said-{rank}.txt") for rank, pid in enumerate(pids) if codes[pid] > 0]
    notes = [json.loads(path.read_text()) for path in sorted(attempt.scratch.glob("note-*.json"))]
    killed = None if attempt.record or not notes else (Event(*notes[0][:-1]), notes[0][-1])
    events = [Event(*each) for each in notes[0]] if attempt.record and notes else []
    return Outcome([codes[pid] for pid in pids], killed, events, "\n".join(path.read_text() for path in said))


def _serve(pipe: Connection) -> NoReturn:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    for name in IMPORTED_LATE:
        importlib.import_module(name)
    number = 0
    while True:
        try:
            attempt = pipe.recv()
        except EOFError:
            os._exit(0)
        number += 1
        pipe.send(_attempted(attempt, number))


class Nursery:
    """A fresh process without threads, from which trainings are forked: importing torch takes seconds each time."""

    def __init__(self) -> None:
        context = mp.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    def run(self, attempt: Attempt) -> Outcome:
        self._pipe.send(attempt)
        if not self._pipe.poll(4 * TIMEOUT_S):
            raise TimeoutError(f"no end of {attempt}")
        outcome: Outcome = self._pipe.recv()
        return outcome

    def stop(self) -> None:
        self._process.kill()
        self._process.join(10)
