"""Records of finished runs: append-only JSONL files, one for each process that writes, merged by key.

``OUT/records/WORKER.jsonl`` holds one line a finished run::

    {"schema": 1, "key", "worker", "started", "ended", "seconds", "result": the fields of RunResult}

A file has one writer, so no line is ever torn apart by another process. A kill in mid-write leaves a last line without
its end, which is as good as none: what the trainer left in the run's own folder is then recorded by the next worker. A
line that stands is never changed.
"""

from __future__ import annotations

import json
import math
import os
import re
import socket
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from syncbn.train.config import ConfigError

if TYPE_CHECKING:
    from syncbn.train.result import RunResult

SCHEMA = 1
"""Version of a line."""
FOLDER = "records"
PAUSE_SECONDS = 60.0
"""A longer time without any run is that of a stopped study; a shorter one is what a worker needs between two runs."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """A finished run."""

    key: str
    """The cell's key, or the id of the repeat under real processes."""
    worker: str
    """Process that recorded it: host, process id and start."""
    started: datetime
    """When the run was begun, or taken up again after a kill (UTC)."""
    ended: datetime
    seconds: float
    """Wall time between the two: what the run took in all, or its last part, if it was killed and went on."""
    result: RunResult


def append(path: Path, record: Record) -> None:
    """Add a line to a worker's own file and see it to the disk.

    Raises:
        OSError: it cannot be written. A part of it that was is no record.
    """
    from syncbn.train.result import jsonable

    values = {
        "schema": SCHEMA,
        "key": record.key,
        "worker": record.worker,
        "started": record.started.astimezone(UTC).isoformat(timespec="milliseconds"),
        "ended": record.ended.astimezone(UTC).isoformat(timespec="milliseconds"),
        "seconds": round(record.seconds, 3),
        "result": asdict(record.result),
    }
    data = (json.dumps(jsonable(values), allow_nan=False) + "\n").encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            data = b"\n" + data  # a full disk cut the line before
        while data:
            data = data[os.write(descriptor, data) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if not size:
        _sync_folder(path.parent)


def read_records(out: Path) -> dict[str, Record]:
    """The records of a study by key; empty where there are none.

    Where several files hold a key, the run that ended first counts, and within a file the first line.

    Raises:
        ConfigError: a line was written by a newer version, or cannot be read by this one.
    """
    records = Records(out)
    records.refresh()
    return records.all()


def cells_per_hour(records: Iterable[Record]) -> float | None:
    """Finished runs for each hour in which the study was running; None where there is nothing to tell it from.

    The study was running while at least one of the recorded runs was going on, whichever worker had it; times without
    any are left out if they are longer than ``PAUSE_SECONDS``. So a study that was stopped overnight, or killed, has
    the speed of its sessions. What a killed run had done before it was taken up again does not count as time.
    """
    spans = sorted((record.started, _end(record)) for record in records)
    busy = 0.0
    until: datetime | None = None
    for started, ended in spans:
        if until is None or (started - until).total_seconds() > PAUSE_SECONDS:
            busy += (ended - started).total_seconds()
            until = ended
        elif ended > until:
            busy += (ended - until).total_seconds()
            until = ended
    return 3600 * len(spans) / busy if busy > 0 else None


def _end(record: Record) -> datetime:
    """When a run ended; where the clock was set back meanwhile, by the time that the run took."""
    return record.ended if record.ended >= record.started else record.started + timedelta(seconds=record.seconds)


def worker_name() -> str:
    """A name that no other process has: host, process id and this moment."""
    host = re.sub(r"[^\w.-]", "_", socket.gethostname())
    return f"{host}-{os.getpid()}-{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}"


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where a record stands."""

    path: Path
    offset: int
    ended: datetime


class Records:
    """The records of a study, as one process sees them and adds to them.

    Only where each stands is held in memory, and a look at what is new reads no line twice: a worker looks before each
    of a study's hundreds of runs, whose records may hold thousands of losses each.
    """

    def __init__(self, out: Path) -> None:
        self.folder = out / FOLDER
        self.worker = worker_name()
        self._places: dict[str, dict[Path, _Place]] = {}
        self._read: dict[Path, int] = {}

    def refresh(self) -> None:
        """Read the lines that have come since the last look.

        Raises:
            ConfigError: as :func:`read_records`.
        """
        for path in sorted(self.folder.glob("*.jsonl")):
            if path.is_file() and path.stat().st_size > self._read.get(path, 0):
                self._read_on(path)

    def all(self) -> dict[str, Record]:
        """Every record by key, as of the last :meth:`refresh`."""
        found = {key: self.get(key) for key in sorted(self._places)}
        return {key: record for key, record in found.items() if record is not None}

    def get(self, key: str) -> Record | None:
        """The record of a run, as of the last :meth:`refresh`."""
        places = self._places.get(key)
        if not places:
            return None
        first = min(places.values(), key=lambda place: (place.ended, place.path.name))
        with first.path.open("rb") as file:
            file.seek(first.offset)
            return _record(file.readline(), first.path)

    def add(
        self, key: str, started: datetime, seconds: float, result: RunResult, ended: datetime | None = None
    ) -> None:
        """Record a run in this process's own file; ``ended`` is now, if it is not given."""
        record = Record(
            key=key,
            worker=self.worker,
            started=started,
            ended=ended or datetime.now(UTC),
            seconds=seconds,
            result=result,
        )
        append(self.folder / f"{self.worker}.jsonl", record)
        self.refresh()

    def _read_on(self, path: Path) -> None:
        offset = self._read.get(path, 0)
        with path.open("rb") as file:
            file.seek(offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break  # being written, or torn by a kill
                record = _record(line, path)
                if record is not None:
                    place = _Place(path=path, offset=offset, ended=record.ended)
                    self._places.setdefault(record.key, {}).setdefault(path, place)
                offset += len(line)
        self._read[path] = offset


def _record(line: bytes, path: Path) -> Record | None:
    """The record in a line; None in one that is no record at all."""
    from syncbn.train.result import RunResult

    try:
        values: Any = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict) or type(values.get("schema")) is not int:
        return None
    where, schema = f"records in {path}", values.pop("schema")
    if schema > SCHEMA:
        raise ConfigError(where, f"schema {schema}", f"schema {SCHEMA} at most: a newer version of syncbn wrote them")
    if not {"key", "worker", "result"} <= values.keys():
        return None
    try:
        result = values["result"]
        result["losses"] = [math.nan if loss is None else loss for loss in result["losses"]]
        return Record(
            key=str(values["key"]),
            worker=str(values["worker"]),
            started=datetime.fromisoformat(values["started"]).astimezone(UTC),
            ended=datetime.fromisoformat(values["ended"]).astimezone(UTC),
            seconds=float(values["seconds"]),
            result=RunResult(**result),
        )
    except (KeyError, TypeError, ValueError) as error:
        # Not to be taken for a missing run: it would be run again, over a result that another version can read.
        raise ConfigError(where, values["key"], f"a record that this version of syncbn can read ({error})") from None


def _sync_folder(folder: Path) -> None:
    """See a new file's name to the disk; a file system that cannot do that for a folder is left to itself."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
