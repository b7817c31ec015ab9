"""The benchmarked steps and collectives, tiny, on one process and on two and four."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from pool import Pool

from syncbn.bench import growth, steps
from syncbn.bench.step_models import CPU, TOLERANCE, Shape, backward, build, check_alone, check_together, make_batch

TINY = Shape("resnet20", 4, 8, 2)


def test_variants_are_equal_where_they_should_be() -> None:
    found = check_alone(TINY)
    assert len(found) == 4
    assert max(found.values()) < TOLERANCE


def test_variants_are_equal_on_processes(pools: Callable[[int], Pool]) -> None:
    for rank, found in enumerate(pools(2).run(check_together, TINY)):
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


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_steps_on_one_process(precision: Any) -> None:
    said: list[str] = []
    result = steps.run_steps(
        CPU, 2, said.append, models=["resnet20"], worlds=(), precision=precision, emulation=False, shapes=[TINY]
    )
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert [row["variant"] for row in steps.rows(result)] == ["local", "sync", "ghost", "renorm"]
    assert steps.rows(result)[0]["ratio"] == 1
    assert all(row["ms"] > 0 and row["precision"] == precision for row in steps.rows(result))
    assert len(said) == 1
    assert "renorm" in "\n".join(steps.lines(result))


def test_steps_on_two_processes(pools: Callable[[int], Pool]) -> None:
    differences, times = pools(2).run(steps.together_job, TINY, [(TINY, 2)], "fp32")[0]
    assert len(differences) == 2
    assert {name: len(samples) for name, samples in times[0].items()} == {
        "local": 2,
        "sync": 2,
        "ghost": 2,
        "renorm": 2,
    }


def test_emulation_is_the_same_step(pools: Callable[[int], Pool]) -> None:
    results = pools(4).run(steps.emulation_job, 1, replace(TINY, batch=2), ("local", "groups"))
    for seconds, difference in results:
        assert max(difference.values()) < TOLERANCE
        assert set(seconds) == {"local", "groups"}
        assert all(samples[side][0] > 0 for samples in seconds.values() for side in ("one", "four"))
    assert results[0] == results[1]  # the slowest rank's, on all


def test_losses_must_fall() -> None:
    steps._check_losses({"sync": 2.0}, {"sync": 1.0})
    for last in (2.5, float("nan")):
        with pytest.raises(RuntimeError, match="sync"):
            steps._check_losses({"sync": 2.0}, {"sync": last})


def test_all_reduces_are_timed(pools: Callable[[int], Pool]) -> None:
    results = pools(2).run(growth.all_reduce_job, (64,), (64, 128), 2)
    assert results[0] == results[1]
    assert set(results[0]) == {"1024", "1032", "network"}
    assert all(len(samples) == 2 and min(samples) > 0 for samples in results[0].values())
