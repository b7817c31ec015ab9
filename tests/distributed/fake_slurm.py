"""Slurm's commands as far as submitit and a study use them, on this machine: `install` puts them into a folder.

A controller process for each submission starts the array's tasks, no more at once than the array says. It keeps no
accounting: there is no `sacct`, and `squeue` knows only what is not over.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path


def install(folder, state):
    """Write the commands to ``folder``; what is submitted and queued lies in ``state``."""
    folder.mkdir()
    state.mkdir()
    for name in ("sbatch", "srun", "squeue", "scancel"):
        script = f'#!/bin/sh\nexec {sys.executable} {__file__} {state} {name} "$@"\n'
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)


def sbatch(state, script):
    number = str(100 + len(list(state.glob("*.sh"))))
    text = Path(script).read_text()
    (state / f"{number}.sh").write_text(text)
    array = re.search(r"^#SBATCH --array=0-(\d+)%(\d+)$", text, re.MULTILINE)
    tasks = [f"{number}_{task}" for task in range(int(array[1]) + 1)] if array else [number]
    for task in tasks:
        (state / f"{task}.queued").touch()
    command = [sys.executable, __file__, str(state), "control", number, array[2] if array else "1", *tasks]
    subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    print(f"Submitted batch job {number}")


def control(state, number, limit, *tasks):
    running = {}
    waiting = list(tasks)
    while waiting or running:
        while waiting and len(running) < int(limit):
            task = waiting.pop(0)
            place = {"SLURM_JOB_ID": task.replace("_", "00")}
            if "_" in task:
                place |= {"SLURM_ARRAY_JOB_ID": number, "SLURM_ARRAY_TASK_ID": task.split("_")[1]}
            command = ["bash", str(state / f"{number}.sh")]
            running[task] = subprocess.Popen(command, env={**os.environ, **place}, start_new_session=True)
            (state / f"{task}.pid").write_text(str(running[task].pid))
        for task, process in list(running.items()):
            if process.poll() is not None:
                del running[task]
                (state / f"{task}.queued").unlink()
        time.sleep(0.05)


def srun(state, *words):
    """Runs the command in its place; the options before it say where its output goes."""
    words = list(words)
    number = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    for option, descriptor in (("--output", 1), ("--error", 2)):
        path = words[words.index(option) + 1].replace("%A_%a", number).replace("%t", "0")
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    command = words[words.index("--error") + 2 :]
    os.execvp(command[0], command)


def squeue(state, *words):
    asked = next(word for word in words if word.startswith("--jobs=")).removeprefix("--jobs=").split(",")
    queued = [path.stem for path in state.glob("*.queued")]
    found = [task for task in queued if task.split("_")[0] in asked]
    if not found:
        sys.exit("slurm_load_jobs error: Invalid job id specified")
    print("\n".join(found))


def scancel(state, *tasks):
    with (state / "cancelled").open("a") as file:
        file.writelines(f"{task}\n" for task in tasks)


if __name__ == "__main__":
    globals()[sys.argv[2]](Path(sys.argv[1]), *sys.argv[3:])
