"""What would hang, or mix the statistics of layers, ends with a sentence that names the layer and the ranks."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from pool import Pool

import syncbn
from syncbn import collectives, lockstep
from syncbn.watchdog import EXIT_CODE

LOOP = Path(__file__).with_name("hanging_loop.py")
TIMEOUT = 5
"""Of the watchdog in the loop."""


def torchrun(fault: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(LOOP), fault]
    return subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=100,  # less than torch's own, which is set to 90 s once all processes have started
        check=False,
    )


def errors(output: str) -> list[str]:
    return re.findall(r"^syncbn: error: (.*)", output, re.MULTILINE)


@pytest.mark.parametrize(
    ("fault", "line", "function"),
    [
        ("eval", "    dist.all_reduce(torch.zeros(1))", "evaluate"),
        ("train_alone", "        time.sleep(60)", "<module>"),
        ("batch_fewer", "        dist.barrier()", "<module>"),
    ],
)
@pytest.mark.fault(
    "hang",
    "one rank does something else (`{fault}`)",
    moment="in training",
    outcome="exit code 86 and one line: layer, call, rank and its line of code",
    lost="the steps since a checkpoint of the loop",
)
def test_a_hang_names_layer_call_and_rank(fault: str, line: str, function: str) -> None:
    done = torchrun(fault)
    (sentence,) = errors(done.stderr)  # one rank speaks
    number = LOOP.read_text().splitlines().index(line) + 1
    assert sentence == (
        f"rank 0 has waited for {TIMEOUT} s in SyncBatchNorm '1' (forward), call 4: rank 1 is in no layer (the last "
        f"was SyncBatchNorm '1' (backward), call 3), at hanging_loop.py:{number} ({function}) on {socket.gethostname()}"
    )
    assert "done" not in done.stdout
    # torchrun's summary has the exit code, and the sentence once more at its end.
    assert re.search(rf"exitcode\s*: {EXIT_CODE}\b", done.stderr)
    assert sentence in done.stderr.splitlines()[-2]


def test_a_hang_is_seen_in_debug_mode_too() -> None:
    """There, each reduction is preceded by another collective, in which the ranks wait."""
    done = torchrun("train_alone", SYNCBN_DEBUG="1")
    (sentence,) = errors(done.stderr)
    expected = f"rank 0 has waited for {TIMEOUT} s in SyncBatchNorm '1' (forward), call 4: rank 1 is in no layer"
    assert expected in sentence
    assert re.search(rf"exitcode\s*: {EXIT_CODE}\b", done.stderr)


@pytest.mark.fault(
    "hang",
    "one rank is busy alone in a loop over `syncbn.uneven`",
    moment="in training",
    outcome="exit code 86 and one line: rank and its line of code",
    lost="the steps since a checkpoint of the loop",
)
def test_a_hang_in_uneven_names_it() -> None:
    done = torchrun("uneven")
    (sentence,) = errors(done.stderr)
    number = LOOP.read_text().splitlines().index("            time.sleep(0 if first else 60)") + 1
    assert sentence == (
        f"rank 0 has waited for {TIMEOUT} s in syncbn.uneven, call 3: rank 1 is in no layer (the last was "
        f"syncbn.uneven, call 2), at hanging_loop.py:{number} (<module>) on {socket.gethostname()}"
    )
    assert re.search(rf"exitcode\s*: {EXIT_CODE}\b", done.stderr)


@pytest.mark.fault(
    "hang",
    "a rank is stopped, as if its node were cut off",
    moment="in training",
    outcome="exit code 86 and one line that names the rank",
    lost="the steps since a checkpoint of the loop",
)
def test_a_rank_that_is_gone() -> None:
    """It is stopped, so that its connections stay open and its threads are silent, as when its node is cut off."""
    done = torchrun("stopped")
    (sentence,) = errors(done.stderr)
    assert "rank 1" in sentence
    assert re.search(r"gives no sign of life for 5 s|has waited for 5 s", sentence)


@pytest.mark.parametrize("fault", ["slow", "suspended"])
@pytest.mark.fault(
    "hang",
    "a rank is slow, or all are suspended (`{fault}`)",
    moment="in training",
    outcome="the training goes on",
    lost="nothing",
)
def test_no_false_alarm(fault: str) -> None:
    """A rank may be slow, and all may be suspended for longer than the watchdog's seconds."""
    done = torchrun(fault)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done") == 2  # without spaces perhaps: two processes write to one pipe


@pytest.mark.fault(
    "hang",
    "a loop of the user's raises an error on one rank",
    moment="in training",
    outcome="its traceback, and no sentence of the watchdog",
    lost="the steps since a checkpoint of the loop",
)
def test_an_error_of_the_user_comes_through() -> None:
    done = torchrun("error")
    assert done.returncode == 1
    assert 'KeyError: "a mistake of the user\'s"' in done.stderr
    assert not errors(done.stderr)


@pytest.mark.parametrize("fault", ["other_layer", "skipped"])
@pytest.mark.fault(
    "hang",
    "a rank runs another layer of the same size (`{fault}`)",
    moment="in training",
    outcome="`RuntimeError` names both layers after at most 17 reductions",
    lost="the steps since a checkpoint of the loop",
)
def test_mixed_layers_are_found(fault: str) -> None:
    done = torchrun(fault)
    assert done.returncode == 1
    found = re.findall(r"RuntimeError: the statistics of different layers were added.*", done.stderr)
    assert found, done.stderr
    places = ["rank 0 is at SyncBatchNorm '1'", "rank 1 at SyncBatchNorm '4'"]
    turned = ["rank 1 is at SyncBatchNorm '4'", "rank 0 at SyncBatchNorm '1'"]
    assert all(all(part in line for part in places) or all(part in line for part in turned) for line in found)


@pytest.mark.parametrize("fault", ["other_layer", "skipped"])
@pytest.mark.fault(
    "hang",
    "the same with `SYNCBN_DEBUG=1` (`{fault}`)",
    moment="in training",
    outcome="`RuntimeError` before the statistics mix",
    lost="the steps since a checkpoint of the loop",
)
def test_debug_mode_finds_them_before_they_mix(fault: str) -> None:
    done = torchrun(fault, SYNCBN_DEBUG="1")
    found = set(
        re.findall(r"RuntimeError: the ranks do not reduce the statistics of the same layer: (.*)", done.stderr)
    )
    assert found == {
        "rank 0: SyncBatchNorm '1' (forward), call 4, (1, 17) torch.float64; "
        "rank 1: SyncBatchNorm '4' (forward), call 4, (1, 17) torch.float64"
    }


def mixed_by_sums() -> tuple[str, list[str]]:
    """What a group of more than eight ranks, which adds and does not gather, says of layers that mix."""
    with mock.patch.object(collectives, "_GATHER_LIMIT", 0), mock.patch.object(lockstep, "CHECK_EVERY", 1):
        layers, x, said = [syncbn.SyncBatchNorm(3) for _ in range(2)], torch.randn(4, 3), []
        for layer, name in zip(layers, "ab", strict=True):
            layer.qualified_name = name
            layer(x).sum().backward()
        try:
            layers[dist.get_rank()](x)
        except RuntimeError as error:
            said.append(str(error))
        collectives.all_reduce_sum(torch.zeros(7).double(), dist.group.WORLD.group_name)  # of no layer
    return "ab"[dist.get_rank()], said


def test_layers_that_mix_in_a_sum(pools: Callable[[int], Pool]) -> None:
    for name, said in pools(2).run(mixed_by_sums):
        assert len(said) == 1
        assert f"is at SyncBatchNorm '{name}' (forward), call 2, others at other layers" in said[0]


def trained_beside_other_uses() -> bool:
    """A pass of rank 0 alone on meta tensors, as of a summary, and groups that overlap."""
    layer, x = syncbn.SyncBatchNorm(3), torch.randn(4, 3)
    groups = [dist.new_group([0, 1]), dist.new_group([1, 2])]
    with mock.patch.object(lockstep, "DEBUG", True):
        if dist.get_rank() == 0:
            syncbn.SyncBatchNorm(3, device="meta")(torch.empty(4, 3, device="meta"))
        for group, members in zip(groups, ([0, 1], [1, 2]), strict=True):
            if dist.get_rank() in members:
                syncbn.SyncBatchNorm(3, process_group=group)(x)
        for _ in range(2 * lockstep.CHECK_EVERY):
            layer(x).sum().backward()
    return bool(layer.running_mean.isfinite().all())


def position_of_a_ghost_layer() -> str:
    """Where a watchdog would see a rank that waits for the others' number of ghost groups."""
    seen = []
    layer = syncbn.GhostBatchNorm(3, 2, sync=True)
    layer.qualified_name = "a"
    wait = collectives.functional_collectives.wait_tensor

    def noted(tensor: torch.Tensor) -> torch.Tensor:
        seen.append(str(lockstep.oldest()))
        return wait(tensor)

    with mock.patch.object(collectives.functional_collectives, "wait_tensor", noted):
        layer(torch.randn(4, 3))
    return seen[0]


def test_a_wait_for_the_number_of_ghost_groups_is_seen(pools: Callable[[int], Pool]) -> None:
    assert pools(2).run(position_of_a_ghost_layer) == ["GhostBatchNorm 'a' (number of ghost groups), call 1"] * 2


def test_correct_programs_raise_nothing(pools: Callable[[int], Pool]) -> None:
    assert pools(3).run(trained_beside_other_uses) == [True] * 3


@pytest.mark.parametrize("wrong", [0, -1.0, "5", None])
def test_seconds_that_are_none(wrong: object) -> None:
    with pytest.raises(ValueError, match="timeout must be a positive number of seconds"):
        syncbn.watchdog(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="silence must be a positive number of seconds"):
        syncbn.watchdog(5, wrong)  # type: ignore[arg-type]


def test_one_process_is_not_watched() -> None:
    with syncbn.watchdog(timeout=0.1) as watch:
        assert syncbn.SyncBatchNorm(3)(torch.randn(4, 3)).shape == (4, 3)
    watch.stop()
    assert lockstep.watching == 0
