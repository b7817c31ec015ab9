"""Measurements on several processes: they time together, answer by rank, and none fails unseen."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from syncbn.bench import suites
from syncbn.bench.correctness import errors, references, tolerances
from syncbn.bench.peers import CONTENDERS, Contender, LayerStep, UnavailableError
from syncbn.bench.problem import Shape, make_problem
from syncbn.bench.suites import SUITES, Selection, WrongError
from syncbn.bench.timing import ProcessError, interleaved, run_processes, run_with_environment

pytestmark = pytest.mark.timeout(180)

SHAPE = Shape("tiny", (4, 3, 5, 4), channels_last=True)
PAIR = next(suite for suite in SUITES if suite.world_size == 2)
KINDS = ("SyncBatchNorm", "textbook", "nn.BatchNorm")


def answer(factor):
    return factor * (dist.get_rank() + 1), torch.full((2,), float(dist.get_rank())), torch.get_num_threads()


def uneven():
    rank = dist.get_rank()
    contenders = {"slow": lambda: time.sleep(0.02 * (rank + 1)), "fast": lambda: None}
    return interleaved(contenders, rounds=3, device=torch.device("cpu"), together=True)


def raises(rank):
    if dist.get_rank() == rank:
        raise ValueError("this rank has had enough")
    dist.barrier()


def ends(rank):
    if dist.get_rank() == rank:
        os._exit(3)
    dist.barrier()


def sleeps():
    time.sleep(60)


def all_errors():
    """The contenders' errors against one process on the concatenated batch."""
    group, rank = dist.group.WORLD, dist.get_rank()
    parts = [make_problem(SHAPE, torch.float32, torch.device("cpu"), rank=r, group=group) for r in range(group.size())]
    expected = references(parts, rank)
    return {name: errors(CONTENDERS[name].make(parts[rank])(), expected(CONTENDERS[name].kind)) for name in KINDS}


def left_out(problem):
    raise UnavailableError("left out of this test")


def biased_on_one_rank():
    """One rank of the two has a SyncBatchNorm that is off: both find that it is."""
    if dist.get_rank() == 1:
        make = CONTENDERS["SyncBatchNorm"].make

        def biased(problem):
            step = make(problem)
            return LayerStep(lambda x: step.function(x) + 1e-3, step.known, step.grad_output)

        CONTENDERS["SyncBatchNorm"] = Contender("SyncBatchNorm", "batch", biased, ours=True)
    CONTENDERS["textbook compiled"] = Contender("textbook compiled", "batch", left_out)  # compiling takes long
    selection = Selection("cpu", ("float32",), ("tiny",), 1, check=True)
    try:
        suites.measure(PAIR, selection, SHAPE, "float32", dist.group.WORLD)
    except WrongError as error:
        return str(error)
    return "nothing wrong"


def test_answers_come_by_rank_and_by_value():
    (first, tensor, threads), (second, other, _) = run_processes(answer, 2, 10)
    assert (first, second, threads) == (10, 20, 1)
    assert torch.equal(other - tensor, torch.ones(2))


def test_a_sample_is_the_slowest_process_on_all_of_them():
    first, second = run_processes(uneven, 2)
    assert first == second
    assert all(sample >= 0.04 for sample in first["slow"].samples)
    assert first["fast"].calls > 1
    assert first["fast"].median < 0.01


@pytest.mark.parametrize(
    ("function", "message"),
    [(raises, "rank 1: .*Traceback.*this rank has had enough"), (ends, "rank 1: .*exit code 3")],
)
def test_a_failing_process_is_an_error_with_its_reason(function, message):
    start = time.monotonic()
    with pytest.raises(ProcessError, match="(?s)" + message):
        run_processes(function, 2, 1)
    assert time.monotonic() - start < 60


def test_a_process_that_does_not_answer_is_an_error():
    with pytest.raises(ProcessError, match=r"ranks \[0, 1\] of 2 gave no answer within 5 s"):
        run_processes(sleeps, 2, timeout=5)


def environment(name):
    return os.environ.get(name), torch.backends.cpu.get_cpu_capability()


def ends_at_once():
    os._exit(3)


def test_libraries_of_a_new_process_see_its_environment(monkeypatch):
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    variables = {"ATEN_CPU_CAPABILITY": "default"}
    assert run_with_environment(variables, environment, "ATEN_CPU_CAPABILITY") == ("default", "DEFAULT")
    assert "ATEN_CPU_CAPABILITY" not in os.environ


def test_errors_of_a_new_process_are_raised():
    with pytest.raises(ProcessError, match=r"ends_at_once with {'A': 'B'}: "):
        run_with_environment({"A": "B"}, ends_at_once)
    with pytest.raises(ZeroDivisionError):
        run_with_environment({"A": "B"}, divmod, 1, 0)
    assert "A" not in os.environ


def test_synchronized_contenders_are_those_of_the_whole_batch():
    limits = tolerances(torch.float32, 80)
    for found in run_processes(all_errors, 2):
        assert all(error <= limits[tensor] for name in KINDS for tensor, error in found[name].items()), found


def test_what_is_wrong_on_one_process_is_wrong_on_all():
    texts = run_processes(biased_on_one_rank, 2)
    assert texts[0] == texts[1]
    assert "SyncBatchNorm on tiny N=4 3x5x4 channels_last, float32: output is off" in texts[0]
