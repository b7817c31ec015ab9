"""Jobs done in this process, one after another, for functions that no other process could be given."""

from __future__ import annotations

from collections.abc import Sequence

from syncbn.study.run.jobs import Event, Events, Job, TrainFunction, attempt
from syncbn.study.run.records import Records


def here_events(jobs: Sequence[Job], train: TrainFunction) -> Events:
    """Do the jobs. An interrupt ends them; an exception of a run is a failure of that run."""
    records = Records(jobs[0].out)
    for job in jobs:
        yield Event(job, "running")
        yield attempt(job, train, records)
