"""A run that was killed or stopped anywhere in an epoch ends with the bits of one that was not."""

from __future__ import annotations

import dataclasses
import os
import random
import signal
from pathlib import Path

import pytest
import torch
from broken_runs import (
    NORMS,
    STEPS,
    Killed,
    at_steps,
    check_same_bits,
    configured,
    stop_once,
    terminate,
    train_killed,
    train_stopped,
    train_whole,
)
from task_cases import Sign

from syncbn.study.plan.grid import cell_key
from syncbn.train import loop, pauses, train
from syncbn.train.config import ConfigError, config_from_dict
from syncbn.train.metrics import step_records
from syncbn.train.own_buffers import differing_buffers, load_own_buffers
from syncbn.train.parity import TOLERANCE, Trained, compare_runs

KILLS = int(os.environ.get("SYNCBN_KILLS", "3"))
"""In each case: 3 make 54 in all, and 12 more than 200."""
# Three processes show the order in which gradients are added, two what each process has for itself.
CASES = [(norm, 1) for norm in NORMS] + [(norm, 2) for norm in NORMS if norm != "sync"]
CASES += [("batch", 3), ("sync", 3), ("batch", 4)]


def run_on(pools, world, function, *args):
    """On ``world`` processes; one is this process."""
    return [function(*args)] if world == 1 else pools(world).run(function, *args)


def gpus_for(world):
    """As many samples in a step, on a number of logical GPUs that the processes divide."""
    return {"gpus": 4, "per_gpu_batch_size": 3} if world == 4 else {}


@pytest.fixture(scope="module")
def wholes(pools, tmp_path_factory):
    """The folder of an unbroken run without checkpoints, of a norm on a number of processes."""
    made = {}

    def get(norm, world):
        if (norm, world) not in made:
            made[norm, world] = tmp_path_factory.mktemp("whole") / "out"
            config = configured(norm, **gpus_for(world), budget={"checkpoint_every": 0})
            run_on(pools, world, train_whole, config, made[norm, world])
        return made[norm, world]

    return get


@pytest.mark.parametrize(("norm", "world"), CASES)
@pytest.mark.fault(
    "death",
    "all processes are killed",
    moment="before any step, on 1 to 4 processes",
    outcome="`--resume` ends with the bits of an unbroken run",
    lost="the steps since the last checkpoint",
)
def test_killed_anywhere(pools, wholes, norm, world, tmp_path):
    """Kills at random steps, with checkpoints as far apart as chance has it: none of them changes a bit."""
    draw = random.Random(f"{norm} on {world}")
    kills, every = sorted(draw.sample(range(STEPS), KILLS)), draw.randint(1, 9)
    config = configured(norm, **gpus_for(world), budget={"checkpoint_every_steps": every})
    left = run_on(pools, world, train_killed, config, tmp_path / "out", kills)[0]
    newest = [names[-1:] for names in left]
    assert newest == [[f"step-{kill // every * every:08d}"] if kill >= every else [] for kill in kills]
    check_same_bits(wholes(norm, world), tmp_path / "out")


@pytest.mark.parametrize(("norm", "world"), [("batch", 1), ("batch", 2), ("frozen", 2), ("batch", 3)])
@pytest.mark.fault(
    "signal",
    "SIGTERM to one of 1 to 3 processes",
    moment="in any step",
    outcome="all stop after the same step; resumed, the bits of an unbroken run",
    lost="nothing",
)
def test_stopped_by_a_signal(pools, wholes, norm, world, tmp_path):
    """A process alone stops after the step. Several stop at the same one, though only the last is told to."""
    steps = sorted(random.Random(f"{norm} {world}").sample(range(STEPS - 1), 3))
    found = run_on(pools, world, train_stopped, configured(norm), tmp_path / "out", steps, [world - 1])
    at = [step for step, _ in found[-1]]
    assert all([step for step, _ in other] == at for other in found)
    if world == 1:
        assert at == [step + 1 for step in steps]
    assert all(0 < step <= STEPS for step in at)
    assert len(at) >= 1
    words = (
        f"stopped by SIGTERM at step {at[0]}; the checkpoint is in {tmp_path / 'out/checkpoint'}; --resume continues"
    )
    assert found[-1][0] == (at[0], words)
    if world > 1:
        assert "stopped by a signal to another process at step" in found[0][0][1]
    check_same_bits(wholes(norm, world), tmp_path / "out")


@pytest.mark.parametrize(("first", "then"), [(3, 1), (1, 3)])
@pytest.mark.fault(
    "signal",
    "SIGTERM; resumed with {then} in place of {first} processes",
    moment="within an epoch",
    outcome="the numbers of an unbroken run, to 1e-10",
    lost="nothing",
)
def test_another_number_of_processes_goes_on_within_an_epoch(pools, wholes, first, then, tmp_path):
    """Each process had its own running statistics: another number of processes takes their mean."""
    config, out = configured("batch"), tmp_path / "out"
    assert 0 < run_on(pools, first, stop_once, config, out)[0] < STEPS
    run_on(pools, then, train_killed, config, out, [])
    difference = compare_runs(Trained.read(wholes("batch", 1)), Trained.read(out))
    assert difference.largest <= TOLERANCE, difference


@pytest.mark.fault(
    "signal",
    "SIGTERM",
    moment="in the last step of an epoch",
    outcome="stops before the evaluation, which is done when the run goes on",
    lost="nothing",
)
def test_stopped_after_the_last_step_of_an_epoch(tmp_path):
    """The evaluation is not waited for, which may take longer than there is time: it is done when the run goes on."""
    config = configured("batch", budget={"epochs": 2})
    train(config, tmp_path / "whole")
    at = train_stopped(config, tmp_path / "out", [STEPS - 1, 2 * STEPS - 1], [0])
    assert [step for step, _ in at] == [STEPS, 2 * STEPS]
    check_same_bits(tmp_path / "whole", tmp_path / "out")


@pytest.mark.fault(
    "death",
    "the process is killed",
    moment="while a checkpoint replaces another one of its step",
    outcome="`--resume` finds the one that was to be replaced",
    lost="nothing",
)
def test_killed_while_the_only_checkpoint_is_replaced(tmp_path, monkeypatch):
    """That of an epoch's last step is replaced after the evaluation: at each moment there is a whole one."""
    config, out = configured("batch", budget={"epochs": 2}), tmp_path / "out"
    train(config, tmp_path / "whole")
    rename = Path.rename

    def killed(path, target):
        if path.name.startswith(".step-") and (out / "checkpoint/latest").exists():
            raise Killed
        return rename(path, target)

    with at_steps([STEPS - 1], terminate), pytest.raises(loop.Stopped):
        train(config, out, stop_on=[signal.SIGTERM])
    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(Killed):
        train(config, out, resume=True)
    monkeypatch.setattr(Path, "rename", rename)
    assert [path.name for path in out.glob("checkpoint/step-*")] == [f"step-{STEPS:08d}-replaced"]
    train(config, out, resume=True)
    assert [path.name for path in out.glob("checkpoint/step-*")] == [f"step-{STEPS:08d}"]
    check_same_bits(tmp_path / "whole", out)


@pytest.mark.fault(
    "signal",
    "SIGTERM to `train()` without a folder",
    moment="in a step",
    outcome="`Stopped` says that nothing was saved",
    lost="the run",
)
def test_stopped_without_a_folder():
    handler = signal.getsignal(signal.SIGTERM)
    with at_steps([3], terminate), pytest.raises(loop.Stopped, match="at step 4; nothing was saved, as the run has no"):
        train(configured("batch"), stop_on=[signal.SIGTERM])
    assert signal.getsignal(signal.SIGTERM) == handler


def checkpoints_by_the_clock(config, out, ranks):
    """The checkpoints of a run on some of whose processes minutes have gone by since the last one."""
    saved, checkpoint, prepare = [], loop._checkpoint, loop.prepare

    def noted(run, out):
        saved.append(run.progress.step)
        checkpoint(run, out)
        run.pace.saved += offset(run)

    def offset(run):
        return -1e6 if run.partition.placement.rank in ranks else 1e6

    def prepared(*args, **options):
        run = prepare(*args, **options)
        run.pace.saved += offset(run)
        return run

    loop._checkpoint, loop.prepare = noted, prepared
    try:
        train(config, out)
    finally:
        loop._checkpoint, loop.prepare = checkpoint, prepare
    return saved


@pytest.mark.parametrize(("ranks", "many"), [([0], True), ([1], False)])
def test_the_first_process_tells_when_minutes_have_passed(pools, wholes, ranks, many, tmp_path):
    config = configured("batch", budget={"checkpoint_every_minutes": 0.5})
    found = pools(2).run(checkpoints_by_the_clock, config, tmp_path / "out", ranks)
    assert found[0] == found[1]
    assert (STEPS in found[0]) == many
    assert bool(found[0]) == many
    check_same_bits(wholes("batch", 2), tmp_path / "out")


@pytest.mark.parametrize("seconds", [0.0, 1e9])
def test_when_a_run_pauses_changes_nothing(wholes, seconds, tmp_path, monkeypatch):
    monkeypatch.setattr(pauses, "PAUSE_SECONDS", seconds)
    written = []

    def noted(losses, *rest, start):
        written.append(start)
        return step_records(losses, *rest, start)

    monkeypatch.setattr(pauses, "step_records", noted)
    train(configured("batch"), tmp_path / "out")
    assert written == (list(range(STEPS)) if seconds == 0 else [0, 1, 2, 20])
    check_same_bits(wholes("batch", 1), tmp_path / "out")


@pytest.mark.parametrize(("step", "wanted"), [(0.001, 20), (0.25, 20), (1.0, 5), (4.0, 1), (60.0, 1)])
def test_slow_steps_are_followed_by_more_pauses(step, wanted, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(pauses.time, "perf_counter", lambda: now[0])
    pace = pauses.Pace(paused=100.0)
    now[0] += 7 * step
    assert pace.note(7) == pytest.approx(7 * step)
    assert pace.wanted == wanted


@pytest.mark.parametrize("every", [0, 1, 7])
@pytest.mark.fault(
    "data",
    "the loss is infinite",
    moment="after any step",
    outcome="the run ends with status `diverged`; resumed, it diverges at the same step",
    lost="nothing",
)
def test_a_run_diverges_at_the_same_step_with_checkpoints(tmp_path, every):
    config = configured("nf", optimizer={"lr": 3e38}, budget={"checkpoint_every_steps": every})
    result = train(config, tmp_path)
    assert (result.status, result.steps) == ("diverged", 20)
    (tmp_path / "result.json").unlink()
    again = train(config, tmp_path, resume=True)
    assert (again.status, again.steps) == ("diverged", 20)
    assert repr(again.losses) == repr(result.losses)


def test_checkpoints_may_be_asked_for_when_a_run_is_resumed(tmp_path):
    train(configured("batch"), tmp_path)
    more = {"checkpoint_every_steps": 3, "checkpoint_every_minutes": 0.1}
    assert train(configured("batch", budget=more), tmp_path, resume=True).steps == STEPS


@pytest.mark.parametrize(
    ("key", "value"),
    [("checkpoint_every_steps", -1), ("checkpoint_every_steps", 0.5), ("checkpoint_every_minutes", -1.0)],
)
def test_what_is_no_interval(key, value):
    with pytest.raises(ConfigError, match=rf"^budget\.{key}: got {value}"):
        config_from_dict({"budget": {key: value}})


def test_a_studys_runs_do_not_depend_on_when_checkpoints_are_written():
    plain = configured("batch")
    often = dataclasses.replace(plain, budget=dataclasses.replace(plain.budget, checkpoint_every_steps=5))
    assert cell_key(plain) == cell_key(often)
    # Of all studies so far.
    assert cell_key(config_from_dict({})) == "5fbf429e7ac5709e"


def buffers_there_and_back():
    """Buffers of every kind, of which some differ between the processes; returns what came back wrong."""
    rank = torch.distributed.get_rank()
    model = torch.nn.Module()
    own = {
        "narrow": torch.full((3,), rank + 0.5, dtype=torch.bfloat16),
        "flag": torch.tensor(rank == 1),
        "wide": torch.arange(6.0, dtype=torch.float64).view(2, 3) * (rank + 1) / 3,
        "number": torch.tensor(7 + rank),
    }
    same = {"same": torch.ones(2), "empty": torch.zeros(0)}
    for name, buffer in {**own, **same}.items():
        model.register_buffer(name, buffer.clone())
    model.register_buffer("unsaved", torch.tensor(rank), persistent=False)
    found = differing_buffers(model, torch.device("cpu"))
    for buffer in model.buffers():
        buffer.zero_()
    load_own_buffers(model, found, loop.placement())
    wrong = [name for name, value in own.items() if not torch.equal(getattr(model, name), value)]
    return [*wrong, *(own.keys() ^ found.keys())]


def test_buffers_that_differ_between_processes(pools):
    assert pools(2).run(buffers_there_and_back) == [[], []]


@pytest.mark.fault(
    "death",
    "the process is killed",
    moment="in an evaluation",
    outcome="the evaluation is made again, and recorded once",
    lost="the evaluation",
)
def test_a_checkpoint_that_is_replaced_by_that_of_its_evaluation(tmp_path):
    """Both are of the last step of an epoch. The evaluation is recorded once, wherever the run is killed between."""
    config = config_from_dict(
        {"gpus": 2, "per_gpu_batch_size": 8, "device": "cpu", "budget": {"epochs": 3, "checkpoint_every_steps": 2}}
    )
    whole = train(config, tmp_path / "whole", task=Sign())
    evaluate, calls = loop.evaluate, []

    def killed(*args):
        calls.append(args)
        if len(calls) in (2, 5):
            raise KeyboardInterrupt
        return evaluate(*args)

    loop.evaluate = killed
    try:
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                train(config, tmp_path / "out", task=Sign(), resume=True)
        result = train(config, tmp_path / "out", task=Sign(), resume=True)
    finally:
        loop.evaluate = evaluate
    assert result.history == whole.history
    check_same_bits(tmp_path / "whole", tmp_path / "out")
