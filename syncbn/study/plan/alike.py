"""Runs that failed with the same sentence."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping


def sentence(message: str, key: str) -> str:
    """Why a run failed, without what is this run's own: its key, and the file that holds the details."""
    return re.sub(r" \((?:traceback|submitit's log): [^()]*\)", "", message).replace(key, "KEY")


def alike(failures: Mapping[str, str]) -> list[list[str]]:
    """The keys of runs that failed, those with the same sentence together; ``failures`` are messages by key."""
    found: dict[str, list[str]] = defaultdict(list)
    for key, message in failures.items():
        found[sentence(message, key)].append(key)
    return list(found.values())


def named(first: str, number: int) -> str:
    """The first of a number of runs, by its label, and how many others there are."""
    others = "1 other" if number == 2 else f"{number - 1} others"
    return first if number == 1 else f"{first} and {others} alike"
