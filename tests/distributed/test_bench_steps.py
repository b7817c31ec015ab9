"""The benchmarked training steps, tiny, on one process and on two and four."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from pool import Pool

from syncbn.bench import steps
from syncbn.bench.report import summary
from syncbn.bench.rows import BenchResults
from syncbn.bench.steps import (
    CPU,
    TOLERANCE,
    StepConfig,
    backward,
    build,
    check,
    make_batch,
)

TINY = StepConfig("resnet20", 4, 8, 2)


def test_variants_are_equal_where_they_should_be() -> None:
    found = check(TINY)
    assert len(found) == 4
    assert max(found.values()) < TOLERANCE


def test_variants_are_equal_on_processes(pools: Callable[[int], Pool]) -> None:
    for rank, found in enumerate(pools(2).run(check, TINY)):
        assert len(found) == 2, rank
        assert max(found.values()) < TOLERANCE


def test_ghost_groups_are_not_the_whole_batch() -> None:
    # What the checks would find if a layer did something else.
    x, y = make_batch(TINY, CPU, torch.float64)
    losses = [
        float(backward(build(TINY, options, CPU, torch.float64), x, y))
        for options in (None, {"kind": "ghost", "ghost_batch_size": 2})
    ]
    assert abs(losses[0] / losses[1] - 1) > 1e-4


def test_shares_make_up_the_global_batch() -> None:
    x, y = make_batch(replace(TINY, batch=8), CPU, torch.float32)
    shares = [make_batch(TINY, CPU, torch.float32, rank, 2) for rank in range(2)]
    assert torch.equal(torch.cat([share[0] for share in shares]), x)
    assert torch.equal(torch.cat([share[1] for share in shares]), y)


def test_steps_on_one_process(capsys: pytest.CaptureFixture[str]) -> None:
    (found,), checks = steps.run_steps(CPU, 2, worlds=(1,), configs=[TINY])
    assert list(found.timings) == ["local", "sync", "ghost", "renorm"]
    assert found.ratio("local", "local").median == 1
    assert all(timing.median > 0 for timing in found.timings.values())
    assert len(checks) == 4
    assert capsys.readouterr().err.count("\n") == 1
    text = summary(BenchResults("cpu", [found], step_checks=checks))
    assert "step, world size 1: resnet20 N=4 3x8x8, float32" in text
    assert any("renorm" in line and "ms" in line for line in text)
    assert max(map(len, text)) <= 100


def test_steps_on_two_processes(pools: Callable[[int], Pool]) -> None:
    differences, times = pools(2).run(steps.steps_job, [(TINY, 2, CPU)], TINY)[0]
    assert len(differences) == 2
    samples = {name: len(timing.samples) for name, timing in times[0].items()}
    assert samples == {"local": 2, "sync": 2, "ghost": 2, "renorm": 2}


def test_emulation_is_the_same_step(pools: Callable[[int], Pool]) -> None:
    results = pools(4).run(steps.emulation_job, 1, replace(TINY, batch=2), ("local", "groups"))
    for timings, difference in results:
        assert max(difference.values()) < TOLERANCE
        assert set(timings) == {"local", "groups"}
        assert all(timing[side].samples[0] > 0 for timing in timings.values() for side in ("emulated", "real"))
    assert results[0] == results[1]  # the slowest rank's, on all


def test_losses_must_fall() -> None:
    steps._check_losses({"sync": 2.0}, {"sync": 1.0})
    for last in (2.5, float("nan")):
        with pytest.raises(RuntimeError, match="sync"):
            steps._check_losses({"sync": 2.0}, {"sync": last})
