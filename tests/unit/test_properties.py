"""Random layers on one process equal their definition in float64, by the compiled kernels and by torch's operations."""

from __future__ import annotations

import math
from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st
from layer_cases import DTYPES, LAYERS, LAYOUTS, Case, cases, drawn, take_step, tensors
from layer_truth import expected, problems

from syncbn.functional.renorm import corrections
from syncbn.functional.statistics import compute_dtype
from syncbn.kernels import dispatch
from syncbn.kernels.dispatch import REFERENCE, Kernels

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


def check(case: Case, name: str = "operator") -> None:
    held, wanted = expected(case, tensors(case))
    found = take_step(case, held, 0)
    assert not problems(case, found, wanted[0])
    # Torch's own operations keep these two formats only: evaluation is one, and a back-end consists of them.
    kept = ("contiguous", "channels_last", *(["transposed", "offset"] if case.training and name != "torch" else []))
    assert found["error"] or case.layouts[0] not in kept or found["strides"] or held.x[0].numel() == 0


def test_layers_equal_their_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, seen = Counter[str](), Counter[str]()

    @drawn(2 / 3)
    @given(cases(ranks=1), st.sampled_from(BACK_ENDS))
    def run(case: Case, name: str) -> None:
        monkeypatch.setattr(dispatch, "_compiled", lambda x: back_end(name, calls))
        seen.update([case.layer, case.dtype, case.layouts[0], name])
        check(case, name)

    run()
    assert seen.keys() >= {*LAYERS, *DTYPES, *LAYOUTS, *BACK_ENDS}
    assert calls.keys() >= {f"reference {step}" for step in STEPS}
    if dispatch.cpu() is not dispatch.REFERENCE:  # tests/unit/test_cpu_kernels.py asks for them
        assert calls.keys() >= {f"cpu {step}" for step in (*STEPS, "batch_norm")}


def narrow_sums(x: torch.Tensor, groups: Any) -> torch.Tensor:
    """Sums about zero in the precision of the input's arithmetic, as most implementations have them."""
    wide, dims = x.to(compute_dtype(x)), tuple(range(2, x.dim()))
    sums = REFERENCE.group_sums(x, groups)
    if len(x) == 0 or groups.number > 1:
        return sums
    squares = wide.square().sum((0, *dims))
    return torch.cat((sums[:, : -x.shape[1]], squares.double()[None]), 1)


def without_variance(dz: Any, x: Any, affine: Any, means: torch.Tensor, *rest: Any) -> torch.Tensor:
    return REFERENCE.grad_input(dz, x, affine, means * torch.tensor([[[1.0], [0.0]]]), *rest)


FAULTS: dict[str, tuple[str, Any]] = {
    "running_var gets the biased variance": ("syncbn.functional.running.unbiased", lambda var, count: var),
    "r and d are not clipped": (
        "syncbn.functional.finish.corrections",
        lambda *args: corrections(*args[:5], torch.tensor(math.inf), torch.tensor(math.inf)),
    ),
    "the rest of a rounded mean is lost": (
        "syncbn.functional.normalize.split_mean",
        lambda mean, x: (mean.to(compute_dtype(x)).double(), torch.zeros_like(mean)),
    ),
    "sums are float32": ("group_sums", narrow_sums),
    "the gradient does not flow through the variance": ("grad_input", without_variance),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_layer_is_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bounds of rounding are narrow enough."""
    name, replacement = FAULTS[fault]
    kernels = REFERENCE
    if name in STEPS:
        kernels = kernels._replace(**{name: replacement})
    else:
        monkeypatch.setattr(name, replacement)
    monkeypatch.setattr(dispatch, "_compiled", lambda x: kernels)

    def is_wrong(case: Case) -> bool:
        held, wanted = expected(case, tensors(case))
        return bool(problems(case, take_step(case, held, 0), wanted[0]))

    find(
        cases(ranks=1),
        is_wrong,
        settings=settings(drawn(1), max_examples=200, derandomize=True, phases=[Phase.generate]),
    )
