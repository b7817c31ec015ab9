"""Slurm on the nodes of this machine, with all its state in one folder; it ends with the nodes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from network import Network

COMMANDS = ("munged", "sbatch", "scancel", "scontrol", "slurmctld", "slurmd", "squeue", "srun")
# Nothing is counted or confined: this needs no control groups, no database and no daemon of the system.
CONFIG = """\
ClusterName=tests
SlurmctldHost=node0
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/controller
SlurmctldPidFile={folder}/controller.pid
SlurmctldLogFile={folder}/controller.log
SlurmdSpoolDir={folder}/%n
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2
PluginDir={plugins}
NodeName=node[0-1] CPUs=4 RealMemory=4000 State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=node[0-1] Default=YES PriorityTier=1 GraceTime=10
PartitionName=urgent Nodes=node[0-1] PriorityTier=2
"""


class Slurm:
    """A controller on the first node and a daemon on each."""

    def __init__(self, network: Network, folder: Path) -> None:
        missing = [command for command in COMMANDS if shutil.which(command) is None]
        if missing:
            pytest.skip(f"Slurm is not installed: no {', '.join(missing)} (make test-cluster installs it for root)")
        self.folder, self.head = folder, network.nodes[0]
        (folder / "controller").mkdir(parents=True)
        (plugins,) = Path("/usr/lib").glob("*/slurm-wlm")
        (folder / "slurm.conf").write_text(CONFIG.format(folder=folder, plugins=plugins))
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o400)
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PYTHON": sys.executable}
        files = [f"--{kind}-file={folder}/munge.{kind.split('-')[0]}" for kind in ("key", "log", "pid", "seed")]
        self._daemon(network, 0, "munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *files)
        self._daemon(network, 0, "slurmctld", "-D", "-c")
        for number in range(len(network.nodes)):
            self._daemon(network, number, "slurmd", "-D")
        deadline = time.monotonic() + 60
        while self.ask("sinfo", "--noheader", "--format=%T %D") != "idle 2" and time.monotonic() < deadline:
            time.sleep(0.2)
        assert self.ask("sinfo", "--noheader", "--format=%T %D") == "idle 2", self._logs()

    def _daemon(self, network: Network, node: int, *words: str) -> None:
        with (self.folder / f"{words[0]}-{node}.out").open("w") as said:
            subprocess.Popen(
                [*network.nodes[node].enter, *words],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _logs(self) -> str:
        return "\n".join(path.read_text() for path in self.folder.iterdir() if path.suffix in (".log", ".out"))

    def submit(self, script: str, *arguments: str, options: Sequence[str] = (), **environment: str) -> str:
        """Queue one of the project's scripts from the top of the repository; returns the id of the job."""
        given = [f"{name}={value}" for name, value in environment.items()]
        said = self.ask("env", *given, "sbatch", *options, f"launch/{script}", *arguments)
        found = re.fullmatch(r"Submitted batch job (\d+)", said)
        assert found, said
        return found[1]

    def state(self, job: str) -> str:
        """For instance ``RUNNING`` or ``COMPLETED``."""
        found = re.search(r"JobState=(\w+)", self.ask("scontrol", "show", "job", job))
        return found[1] if found else "GONE"

    def ask(self, *words: str) -> str:
        """What a command of Slurm answers on the first node, also if it fails."""
        command = [*self.head.enter, *words]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60, check=False)
        return (done.stdout + done.stderr).strip()
