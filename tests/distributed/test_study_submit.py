"""Cells as jobs of a cluster, through submitit: on this machine, and under commands that stand in for Slurm's."""

from __future__ import annotations

import collections
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import fake_slurm
import pytest
from study_jobs import tiny_study, trace, traced_train

from syncbn.study.plan.grid import study_cells
from syncbn.study.run import submit
from syncbn.study.run.records import read_records
from syncbn.study.run.runner import run_cells
from syncbn.train.config import ConfigError
from syncbn.train.launch_error import LaunchError
from syncbn.train.loop import train
from tests.unit import study_fakes

pytest.importorskip("submitit", reason="submitit hands the jobs to a cluster")
ROOT = Path(__file__).resolve().parents[2]
CELLS = study_cells(study_fakes.small_study())


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """The jobs find the tests' modules."""
    paths = [str(ROOT), str(ROOT / "tests" / "distributed"), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.setitem(submit.POLL_SECONDS, "local", 0.1)


def run(out, train=study_fakes.train, executor="local", workers=2, **options):
    return run_cells(CELLS, out, workers=workers, train=train, executor=executor, options=options)


def calls(out):
    return collections.Counter((out / "calls.txt").read_text().split())


def most_at_once(out):
    """The largest number of recorded runs that were going on at the same time."""
    spans = [(r.started, r.ended) for r in read_records(out).values()]
    return max(sum(a <= moment < b for a, b in spans) for moment, _ in spans)


@pytest.mark.fault(
    "death",
    "a job of a study is killed",
    moment="in a run",
    outcome="the run is `failed`, the others are done",
    lost="the steps since the last checkpoint",
)
def test_jobs_on_this_machine(tmp_path):
    """One run raises, one kills its job, two diverge: the others are done all the same, and nothing hangs."""
    outcomes = run(tmp_path, study_fakes.train_with_accidents)
    by_place = {(c.arm, c.seed): outcomes[c.key] for c in CELLS}
    assert by_place["sync", 0].message == "RuntimeError: no luck"
    assert "RuntimeError: no luck" in by_place["sync", 0].job.log.read_text()
    assert by_place["sync", 1].state == "failed"
    assert "ended without an answer (submitit's log: " in by_place["sync", 1].message
    assert "failed: job" in by_place["sync", 1].job.log.read_text()
    assert [by_place["batch", seed].state for seed in (0, 1)] == ["diverged"] * 2
    assert [by_place["iid", seed].state for seed in (0, 1)] == ["done"] * 2
    assert most_at_once(tmp_path) <= 2


def test_jobs_beside_a_pool(tmp_path):
    """Both share the folder; each cell is run once, and both end with all results."""
    found = {}
    cells = study_cells(study_fakes.small_study(seeds=[0]))

    def work(kind):
        found[kind] = run_cells(cells, tmp_path, workers=2, train=study_fakes.train, executor=kind)

    threads = [threading.Thread(target=work, args=(kind,)) for kind in ("local", "pool")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    assert sorted(calls(tmp_path).values()) == [1] * 3
    for outcomes in found.values():
        assert {o.state for o in outcomes.values()} == {"done"}
    assert {k: o.result for k, o in found["local"].items()} == {k: o.result for k, o in found["pool"].items()}
    lines = [line for path in (tmp_path / "records").iterdir() for line in path.read_text().splitlines()]
    assert len(lines) == 3


def test_a_job_that_is_put_back_goes_on_from_its_checkpoint(tmp_path):
    out = tmp_path / "out"
    study = tiny_study(seeds=[0], arms={"sync": {"overrides": {"norm": {"name": "sync"}}}})
    cell = study_cells(study)[0]
    found = {}

    def work():
        found.update(run_cells([cell], out, train=traced_train, executor="local"))

    thread = threading.Thread(target=work)
    thread.start()
    deadline = time.monotonic() + 60
    while not (out / "runs" / cell.key / "checkpoint" / "latest").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(int(trace(out)[0][1]), signal.SIGUSR2)  # what Slurm sends some time before it ends the job
    thread.join(100)
    assert (found[cell.key].state, found[cell.key].ran) == ("done", True)
    began = [line for line in trace(out) if line[2] == "began"]
    assert len(began) == 2
    assert began[0][3] == "step-0"
    assert began[1][3] != "step-0"
    assert began[0][1] != began[1][1]
    whole = train(cell.config, tmp_path / "undisturbed")
    assert found[cell.key].result.losses == whole.losses
    assert read_records(out)[cell.key].result.history == whole.history


INTERRUPTED = """
import sys
from tests.distributed import test_study_submit as tests
if __name__ == "__main__":
    tests.run(tests.Path(sys.argv[1]), tests.endless_train)
"""


def endless_train(config, out=None, *, resume=False):
    out.mkdir(parents=True)
    (out / "begun").write_text(str(os.getpid()))
    (out / "begun").rename(out / "pid")  # whole when the test sees it
    time.sleep(100)


def running(pid):
    """Not so a process that has ended, whether or not its exit was collected."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() != b""
    except OSError:
        return False


@pytest.mark.fault(
    "signal",
    "Ctrl-C on a study that submitit runs",
    moment="in a run",
    outcome="its jobs end",
    lost="the steps since the last checkpoint",
)
def test_an_interrupt_ends_the_jobs(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(tmp_path)],
        stderr=subprocess.PIPE,
        text=True,
        # A shell without job control lets what it starts in the background ignore interrupts; children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("runs/*/pid"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert said.strip().endswith("KeyboardInterrupt")
    pids = [int(path.read_text()) for path in tmp_path.glob("runs/*/pid")]
    assert len(pids) == 2
    deadline = time.monotonic() + 10  # a killed process takes a moment to go
    while any(map(running, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(running, pids))


def test_an_array_of_slurm_jobs(tmp_path, monkeypatch):
    fake_slurm.install(tmp_path / "bin", tmp_path / "state")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    for name, seconds in (("QUEUE_SECONDS", 0.3), ("GRACE_SECONDS", 0.5)):
        monkeypatch.setattr(submit, name, seconds)
    monkeypatch.setitem(submit.POLL_SECONDS, "slurm", 0.1)
    out = tmp_path / "out"
    outcomes = run(out, study_fakes.train_with_accidents, "slurm", partition="gpu", timeout_min=30, mem_gb=2)
    assert {(c.arm, c.seed) for c in CELLS if outcomes[c.key].state == "failed"} == {("sync", 0), ("sync", 1)}
    gone = next(outcomes[c.key] for c in CELLS if (c.arm, c.seed) == ("sync", 1))
    assert gone.message.startswith("job 100_")
    assert "ended without an answer" in gone.message
    assert most_at_once(out) <= 2
    script = (tmp_path / "state" / "100.sh").read_text()
    for line in ("--array=0-5%2", "--partition=gpu", "--time=30", "--mem=2GB", "--job-name=syncbn-study"):
        assert f"#SBATCH {line}\n" in script
    assert not (tmp_path / "state" / "cancelled").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"colour": "red"}, "Unknown argument 'colour' for executor 'slurm'"),
        ({"timeout_min": "long"}, "expected type"),
        ({"tasks_per_node": 2}, "slurm-options: tasks_per_node: got 2, expected 1"),
    ],
)
def test_options_that_cannot_be(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, **options)


def test_no_slurm_here(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="srun was not found"):
        run(tmp_path, executor="slurm")


@pytest.mark.fault(
    "together",
    "Slurm refuses a study's jobs",
    moment="before the first run",
    outcome="one line with Slurm's reason; the script that was to be submitted stays beside the study's logs",
    lost="nothing",
    keeps=(".submission_file_*.sh",),
)
def test_slurm_does_not_take_the_jobs(tmp_path, monkeypatch):
    fake_slurm.install(tmp_path / "bin", tmp_path / "state")
    (tmp_path / "bin" / "sbatch").write_text(
        "#!/bin/sh\necho 'sbatch: error: invalid partition specified: x' >&2\nexit 1\n"
    )
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(LaunchError, match=r"slurm did not take the jobs: .*invalid partition specified: x") as caught:
        run(tmp_path / "out", executor="slurm", partition="x")
    assert "\n" not in str(caught.value)
