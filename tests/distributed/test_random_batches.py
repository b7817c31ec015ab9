"""Random layers on two processes, whose batches differ in size, equal their definition in float64 on one process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from layer_cases import LAYERS, Case, cases, drawn, take_step, tensors
from layer_truth import expected, problems
from pool import Pool

from syncbn.kernels import dispatch


def step(case: Case, compiled: bool) -> tuple[list[str], bool]:
    """What is wrong with what this rank's layer finds, and whether it raised an error."""
    rank, chosen = dist.get_rank(), dispatch._compiled
    if not compiled:
        dispatch._compiled = lambda x: dispatch.REFERENCE
    try:
        held, wanted = expected(case, tensors(case))
        found = take_step(case, held, rank)
    finally:
        dispatch._compiled = chosen
    return problems(case, found, wanted[rank]), found["error"] is not None


def test_layers_equal_their_definition_on_two_ranks(pools: Callable[[int], Pool]) -> None:
    seen = Counter[str]()

    @drawn(1 / 3)
    @given(cases(ranks=2), st.booleans())
    def run(case: Case, compiled: bool) -> None:
        outcomes = pools(2).run(step, case, compiled, timeout=60)
        assert not [problem for problems, _ in outcomes for problem in problems]
        seen.update([case.layer, f"shared: {case.shares}", f"compiled: {compiled}"])
        seen["an empty rank"] += 0 in case.sizes
        seen["an error"] += outcomes[0][1]

    run()
    kinds = [*LAYERS, *(f"{name}: {value}" for name in ("shared", "compiled") for value in (True, False))]
    assert all(seen[kind] > 0 for kind in (*kinds, "an empty rank", "an error"))
