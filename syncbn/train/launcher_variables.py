"""The environment variables by which a launcher tells its processes who they are and where they meet."""

from __future__ import annotations

import os

from syncbn.train.config import require


def whole_number(name: str, default: int) -> int:
    """The value of a variable. Raises ConfigError, which names it, if it is no whole number."""
    text = os.environ.get(name, str(default))
    require(text.isdecimal(), name, text, "an environment variable with a whole number, as launchers set it")
    return int(text)


def rank_and_processes() -> tuple[int, int]:
    """This process's rank, and how many processes there are. Raises ConfigError if these cannot be."""
    rank, processes = whole_number("RANK", 0), whole_number("WORLD_SIZE", 1)
    require(rank < max(processes, 1), "RANK", rank, f"an environment variable below WORLD_SIZE, which is {processes}")
    return rank, processes


def meeting_point() -> str:
    """Where the processes meet, as host:port. Raises ConfigError if the launcher has not said it."""
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    expected = "an environment variable with the host of rank 0, as launchers set it"
    require(bool(host), "MASTER_ADDR", host, expected)
    expected = "an environment variable with a free port on the host of rank 0, from 1 to 65535"
    require(port is not None and port.isdecimal() and 0 < int(port) < 2**16, "MASTER_PORT", port, expected)
    return f"{host}:{port}"


def restarts() -> int:
    """How many times torchrun has started the processes again, after one of them failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
