"""Random layers on one process equal their definition in float64, by the compiled kernels and by torch's operations."""

from __future__ import annotations

import pytest

pytest.importorskip("hypothesis", reason="the extra `test` has it")

from collections import Counter
from functools import partial
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from layer_cases import DTYPES, LAYERS, LAYOUTS, Case, cases, drawn, take_step, tensors
from layer_truth import expected, problems

from syncbn.kernels import dispatch
from syncbn.kernels.dispatch import Kernels

STEPS = ("group_sums", "finish", "normalize", "backward_sums", "grad_input")
BACK_ENDS = ("operator", "steps", "torch")
"""One compiled operator, its steps one by one, or torch's operations."""


def back_end(name: str, calls: Counter[str]) -> Kernels:
    """The kernels of a name, which count their calls."""
    kernels = dispatch.REFERENCE if name == "torch" else dispatch.cpu()
    if name == "steps":
        kernels = kernels._replace(batch_norm=None)

    def counted(step: str, *args: Any) -> Any:
        calls[f"{kernels.name} {step}"] += 1
        return getattr(kernels, step)(*args)

    steps = [step for step in (*STEPS, "batch_norm") if getattr(kernels, step) is not None]
    return kernels._replace(**{step: partial(counted, step) for step in steps})


def check(case: Case) -> None:
    held, wanted = expected(case, tensors(case))
    found = take_step(case, held, 0)
    assert not problems(case, found, wanted[0])
    # Evaluation is torch's own operation, which keeps these two formats only.
    kept = ("contiguous", "channels_last", *(["transposed", "offset"] if case.training else []))
    assert found["error"] or case.layouts[0] not in kept or found["strides"]


def test_layers_equal_their_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, seen = Counter[str](), Counter[str]()

    @drawn(2 / 3)
    @given(cases(ranks=1), st.sampled_from(BACK_ENDS))
    def run(case: Case, name: str) -> None:
        monkeypatch.setattr(dispatch, "_compiled", lambda x: back_end(name, calls))
        seen.update([case.layer, case.dtype, case.layouts[0], name])
        check(case)

    run()
    assert seen.keys() >= {*LAYERS, *DTYPES, *LAYOUTS, *BACK_ENDS}
    assert calls.keys() >= {f"reference {step}" for step in STEPS}
    if dispatch.cpu() is not dispatch.REFERENCE:  # tests/unit/test_cpu_kernels.py asks for them
        assert calls.keys() >= {f"cpu {step}" for step in (*STEPS, "batch_norm")}
