"""Nodes of this machine: each has its own network, host name and processes, and all share one file system.

A node is a set of Linux namespaces that one process holds open. If that process ends, the kernel kills all others of
the node. It ends with the tests, as it waits for the end of its standard input.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any, Self

import psutil
import pytest

COMMANDS = ("ip", "nsenter", "tc", "unshare")


class Node:
    """Namespaces, and the process that holds them. A switch has only a network."""

    def __init__(self, name: str, *setup: str, only_network: bool = False) -> None:
        self.name = name
        kinds = ["--net"] if only_network else ["--net", "--uts", "--mount", "--pid", "--mount-proc"]
        script = " && ".join([*setup, "ip link set lo up", "echo ready", "exec cat"])
        self._holder = subprocess.Popen(
            ["unshare", *kinds, "--fork", "--kill-child", "sh", "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != "ready\n":
            _, said = self._holder.communicate(timeout=10)
            pytest.skip(f"no namespaces can be made here: {said.strip()}")
        (first,) = psutil.Process(self._holder.pid).children()
        self.pid = first.pid
        names = kinds if only_network else [kind for kind in kinds if kind != "--mount-proc"]
        self.enter = ["nsenter", "--target", str(self.pid), *names, f"--wdns={os.getcwd()}"]
        """What comes before a command to run it on this node."""

    def run(self, *words: str) -> str:
        """The output of a command, which has to succeed."""
        done = subprocess.run([*self.enter, *words], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout

    def kill(self) -> None:
        """End all processes of the node at once, with SIGKILL. Their connections are closed, as the kernel goes on."""
        if self._holder.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
        self._holder.communicate(timeout=20)


class Network:
    """Nodes ``node0``, ``node1``, ... on one switch. They know each other by name."""

    def __init__(self, nodes: int, folder: Path) -> None:
        if os.geteuid() != 0 or not all(map(shutil.which, COMMANDS)):
            pytest.skip(f"nodes of one machine need root and the commands {', '.join(COMMANDS)} (iproute2, util-linux)")
        self._folder = folder
        self._hosts = folder / "hosts"
        addresses = [f"10.77.0.{number + 1} node{number}\n" for number in range(nodes)]
        self._hosts.write_text("".join(["127.0.0.1 localhost\n", *addresses]))
        self._switch = Node("switch", "ip link add bridge type bridge", "ip link set bridge up", only_network=True)
        self.nodes: list[Node] = []
        for number in range(nodes):
            self.nodes.append(self._start(number))

    def _start(self, number: int) -> Node:
        # Processes of two nodes may have the same id, and name what they share by it.
        shared = "mount -t tmpfs tmpfs /dev/shm"
        node = Node(f"node{number}", f"hostname node{number}", f"mount --bind {self._hosts} /etc/hosts", shared)
        port = f"port{number}"
        inside, outside = (["netns", str(place.pid)] for place in (node, self._switch))
        subprocess.run(
            ["ip", "link", "add", "eth0", *inside, "type", "veth", "peer", "name", port, *outside],
            capture_output=True,
            timeout=20,
            check=True,
        )
        self._switch.run("ip", "link", "set", port, "master", "bridge", "up")
        node.run("ip", "address", "add", f"10.77.0.{number + 1}/24", "dev", "eth0")
        node.run("ip", "link", "set", "eth0", "up")
        return node

    def restart(self, number: int) -> None:
        """Bring a node back that was killed."""
        self.nodes[number] = self._start(number)

    def cut(self, number: int) -> None:
        """Pull a node's plug from the switch: nothing arrives, and nobody is told."""
        self._switch.run("ip", "link", "set", f"port{number}", "down")

    def slow_down(self, number: int, kilobits: int) -> None:
        """Let so many kilobits in a second pass to and from a node; what comes faster waits in a queue."""
        limit = ["root", "tbf", "rate", f"{kilobits}kbit", "burst", "2kb", "limit", "1mb"]
        self._switch.run("tc", "qdisc", "add", "dev", f"port{number}", *limit)
        self.nodes[number].run("tc", "qdisc", "add", "dev", "eth0", *limit)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        for node in [*self.nodes, self._switch]:
            node.kill()
