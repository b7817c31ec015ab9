"""Records of finished runs: append-only JSONL files, one for each process that writes, merged by key.

``OUT/records/WORKER.jsonl`` holds one line per finished run::

    {"schema": 1, "key", "worker", "started", "ended", "seconds", "result": the fields of RunResult, "digest"}

The digest is that of the line before it: a line in which a disk has turned a bit is no record. Lines of earlier
versions have none. Each file has one writer, so lines of different processes never mix. A process killed while it
writes leaves a last line without its end, which counts as no record; the next worker records that run again from its
own folder. A whole line is never changed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import socket
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from syncbn.train.config import ConfigError
from syncbn.train.result import RunResult, jsonable, naming

SCHEMA = 1
"""Version of a line."""
_DIGEST = b', "digest": "%s"}\n'
"""The end of a line."""
_log = logging.getLogger("syncbn")


@dataclass(frozen=True, kw_only=True)
class Record:
    """A finished run."""

    key: str
    """The cell's key."""
    worker: str
    """Process that recorded it: host, process id and start."""
    started: datetime
    """When the run was begun, or taken up again after a kill (UTC)."""
    ended: datetime
    seconds: float
    """Wall time between the two: of the whole run, or of its last part if it was killed and went on."""
    result: RunResult


def append(path: Path, record: Record) -> None:
    """Add a line to a worker's own file. A line that could be written in part only is no record."""
    values = {"schema": SCHEMA, **asdict(record), "seconds": round(record.seconds, 3)}
    for name in ("started", "ended"):
        values[name] = values[name].astimezone(UTC).isoformat(timespec="milliseconds")
    data = json.dumps(jsonable(values), allow_nan=False).encode()[:-1]
    data += _DIGEST % _digest(data)
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path), path.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                data = b"\n" + data  # a full disk cut off the line before
        file.write(data)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=8).hexdigest().encode()


def read_records(out: Path) -> dict[str, Record]:
    """The records of a study by key; empty where there are none.

    If a key is recorded more than once, the run that ended first counts, and within a file the first line. A line that
    a newer version wrote, or that this one cannot read, is a ConfigError.
    """
    records = Records(out)
    records.refresh()
    return records.all()


def worker_name() -> str:
    """A name that no other process has: host, process id and time."""
    host = re.sub(r"[^\w.-]", "_", socket.gethostname())
    return f"{host}-{os.getpid()}-{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}"


class _Place(NamedTuple):
    """Where a record is."""

    ended: datetime
    path: Path
    offset: int


class Records:
    """The records of a study as one process sees them, and its own file, to which it adds.

    Only the place of each record is held in memory, and :meth:`refresh` reads new lines alone: workers look before each
    of a study's hundreds of runs, and a record may hold thousands of losses.
    """

    def __init__(self, out: Path) -> None:
        self.folder = out / "records"
        self.worker = worker_name()
        self._places: dict[str, _Place] = {}
        self._read: dict[Path, int] = {}

    @property
    def empty(self) -> bool:
        """Whether there is no record, as of the last :meth:`refresh`."""
        return not self._places

    def refresh(self) -> None:
        """Read the lines that were added since the last call."""
        for path in sorted(self.folder.glob("*.jsonl")):
            if path.is_file() and path.stat().st_size > self._read.get(path, 0):
                self._read_on(path)

    def all(self) -> dict[str, Record]:
        """Every record by key, as of the last :meth:`refresh`."""
        found = {key: self.get(key) for key in sorted(self._places)}
        return {key: record for key, record in found.items() if record is not None}

    def get(self, key: str) -> Record | None:
        """The record of a run, as of the last :meth:`refresh`."""
        place = self._places.get(key)
        if place is None:
            return None
        with place.path.open("rb") as file:
            file.seek(place.offset)
            return _record(file.readline(), place.path)

    def add(
        self, key: str, started: datetime, seconds: float, result: RunResult, ended: datetime | None = None
    ) -> None:
        """Record a run that ended now, or at ``ended``, in this process's own file."""
        ended = ended or datetime.now(UTC)
        record = Record(key=key, worker=self.worker, started=started, ended=ended, seconds=seconds, result=result)
        append(self.folder / f"{self.worker}.jsonl", record)
        self.refresh()

    def _read_on(self, path: Path) -> None:
        offset = self._read.get(path, 0)
        with path.open("rb") as file:
            file.seek(offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break  # being written, or cut off by a kill
                record = _record(line, path)
                if record is None and b'"digest"' in line:
                    _warn(path, offset)
                if record is not None:
                    place = _Place(record.ended, path, offset)
                    known = self._places.setdefault(record.key, place)
                    if known.path != path:
                        self._places[record.key] = min(known, place)
                offset += len(line)
        self._read[path] = offset


@cache
def _warn(path: Path, offset: int) -> None:
    """Once for each line, as a command reads the records several times."""
    _log.warning("the record at byte %d of %s is not what was written, and does not count", offset, path)


def _whole(line: bytes) -> bool:
    """Whether a line ends with its digest."""
    data = line[: -len(_DIGEST % _digest(b""))]
    return line == data + _DIGEST % _digest(data)


def _record(line: bytes, path: Path) -> Record | None:
    """The record in a line; None if it is no record, as a line is that was damaged or written by another program."""
    try:
        values: Any = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict) or type(values.get("schema")) is not int:
        return None
    where, schema = f"records in {path}", values.pop("schema")
    if "digest" in values and not _whole(line):
        return None
    if schema > SCHEMA:
        raise ConfigError(where, f"schema {schema}", f"schema {SCHEMA} at most: a newer version of syncbn wrote them")
    if not {"key", "worker", "result"} <= values.keys():
        return None
    try:
        return Record(
            key=str(values["key"]),
            worker=str(values["worker"]),
            started=datetime.fromisoformat(values["started"]).astimezone(UTC),
            ended=datetime.fromisoformat(values["ended"]).astimezone(UTC),
            seconds=float(values["seconds"]),
            result=RunResult.from_dict(values["result"]),
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        # Not a missing run, which would be run again over a result that another version can read.
        raise ConfigError(
            where,
            values["key"],
            f"a record that this version of syncbn can read ({error}); move the file away to run its runs again",
        ) from None
