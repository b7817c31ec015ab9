"""What the compiled CPU kernels alone have: whole passes in one call, the small step, half precision, threads."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from cpu_cases import EPILOGUES, compiled, each_dtype, groupings, passes, sample, scale_and_shift, tensors, tolerance

from syncbn.functional import finish as reference_finish
from syncbn.functional.epilogue import NO_EPILOGUE, Epilogue
from syncbn.functional.normalize import Affine
from syncbn.functional.renorm import Limits
from syncbn.functional.running import Running
from syncbn.functional.statistics import Groups, group_sums
from syncbn.kernels.cpu import build, library

cpu = compiled()
pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("activation", EPILOGUES)
@each_dtype
@pytest.mark.parametrize("name", ["mlp", "images", "channels_last", "many blocks", "volumes, channels_last"])
def test_at_once(name, dtype, activation):
    """If nothing travels, one operator does all, with the results of the single steps."""
    x, dy = tensors(name, dtype, 1.0)
    kind, with_residual = EPILOGUES[activation]
    epilogue = Epilogue(sample(x.shape, 5, dtype) if with_residual else None, kind, 0.2)
    for label, groups in groupings(len(x)):
        if x[0, 0].numel() == 1 and groups.number == len(x):
            continue
        weight, bias = (t[0] for t in scale_and_shift(groups.number, x.shape[1]))
        bias = bias.float().double()
        expected = cpu.finish(cpu.group_sums(x, groups), 1e-5, None)
        affine = Affine(expected.mean, expected.invstd, *(t.expand(groups.number, -1) for t in (weight, bias)))
        single = passes(cpu, x, dy, groups, epilogue, affine, expected.count)
        narrow = bias.float()  # the same values; the gradients have the dtypes of their parameters
        y, grads = at_once(x, dy, (weight, narrow), groups, epilogue)
        assert torch.equal(y, single[0]), label
        torch.testing.assert_close(grads[1], single[2][:, 1].sum(0), rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(grads[2], single[2][:, 0].sum(0).float(), rtol=2e-7, atol=1e-7)
        # The means of the gradient, which are 0 but for roundings in the plain case, are multiplied in another order.
        close = tolerance(dtype)
        torch.testing.assert_close(grads[0], single[3], msg=lambda m, n=label: f"{n}: {m}", **close)
        assert grads[0].stride() == y.stride() == x.stride()
        if with_residual:
            assert torch.equal(grads[3], dy if single[1] is None else single[1]), label


def at_once(x, dy, parameters, groups, epilogue=NO_EPILOGUE):
    """The output, and the gradients of x, the parameters and the residual, from the whole operator."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, *parameters, epilogue.residual)]
    epilogue = epilogue._replace(residual=leaves[3])
    y = cpu.batch_norm(*leaves[:3], None, epilogue, groups, 1e-5, False)
    grads = iter(torch.autograd.grad(y, [t for t in leaves if t is not None], dy))
    return y.detach(), [None if t is None else next(grads) for t in leaves]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_value_of_half_precision(dtype):
    """All 65,536: read as torch reads them, and written as torch rounds what lies between them."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(1, 256, 256)
    zero, one = torch.zeros(1, 256, dtype=torch.float64), torch.ones(1, 256, dtype=torch.float64)
    assert torch.equal(cpu.normalize(x, Affine(zero, one), Groups(), NO_EPILOGUE).nan_to_num(7.0), x.nan_to_num(7.0))
    for factor in (1.0009765625, 1.3, 0.5, 3e-5, 1000.0):
        found = cpu.normalize(x, Affine(zero, one, one * factor), Groups(), NO_EPILOGUE)
        expected = (x.float() * torch.tensor(factor, dtype=torch.float32)).to(dtype)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_the_number_of_threads_shows_in_no_bit():
    before = torch.get_num_threads()
    for name in ("many blocks", "large channels_last", "wide mlp", "images"):
        for copies in (1, 5):
            x, dy = (t.repeat(copies, *[1] * (t.dim() - 1)) for t in tensors(name, torch.float32))
            for _, groups in groupings(len(x)):
                results = []
                for threads in (1, 3):
                    torch.set_num_threads(threads)
                    try:
                        y, grads = at_once(x, dy, (None, None), groups)
                        _, mean, invstd, *_ = cpu.finish(cpu.group_sums(x, groups), 1e-5, None)
                        _, _, sums = cpu.backward_sums(dy, x, Affine(mean, invstd), groups, NO_EPILOGUE)
                        results.append((y, mean, invstd, sums, grads[0]))
                    finally:
                        torch.set_num_threads(before)
                assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), name


def test_a_group_that_does_not_exist():
    x = torch.ones(2, 3, 4)
    for wrong in (-1, 2):
        with pytest.raises(ValueError, match="group"):
            cpu.group_sums(x, Groups(torch.tensor([0, wrong]), 2))


# -- the small step ----------------------------------------------------------------------------------------------------


def running(momentum, mode="mean", divisor=None, limits=None, update=True):
    mean, var = torch.tensor([0.5, -1.0, 2.0]), torch.tensor([1.0, 0.3, 4.0])
    return Running(mean, var, torch.tensor(3), torch.tensor(0), momentum, mode, divisor, limits, update)


@pytest.mark.parametrize("case", ["plain", "small", "large", "infinite", "nan", "overflow", "empty"])
@pytest.mark.parametrize("limits", [None, Limits(3.0, 5.0, 0, 6, 6)], ids=["plain", "renorm"])
@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
@pytest.mark.parametrize("mode", ["mean", "sequential", "total"])
@pytest.mark.parametrize("divisor", [None, 2.5])
@pytest.mark.parametrize("number", [1, 3])
def test_finish(case, limits, momentum, mode, divisor, number):
    groups = torch.arange(6) // 2 if number == 3 else None
    x = sample((6, 3, 4), 0, torch.float64, loc=2.0)
    x *= {"small": 1e-3, "large": 1e14, "overflow": 1e25}.get(case, 1.0)
    if case in ("infinite", "nan"):
        x[0, 1, 0] = float("inf") if case == "infinite" else float("nan")
    kept = 0 if case == "empty" else len(x)
    sums = group_sums(x[:kept], Groups(None if groups is None else groups[:kept], number))
    ours, theirs = (running(momentum, mode, divisor, limits) for _ in range(2))
    found = cpu.finish(sums, 1e-5, ours)
    expected = reference_finish.finish(sums, 1e-5, theirs)
    for name in ("count", "mean", "var", "invstd", "r", "d"):
        # float64 throughout, in another order.
        torch.testing.assert_close(
            getattr(found, name), getattr(expected, name), rtol=1e-13, atol=1e-13, equal_nan=True
        )
    for a, b in zip(ours[:4], theirs[:4], strict=True):
        torch.testing.assert_close(a, b, rtol=2e-7, atol=2e-7)  # one rounding to the buffer's float32


def test_finish_without_update():
    ours = running(0.1, update=False)
    cpu.finish(group_sums(sample((6, 3, 4), 0)), 1e-5, ours)
    assert all(torch.equal(a, b) for a, b in zip(ours[:4], running(0.1)[:4], strict=True))


# -- which library ---------------------------------------------------------------------------------------------------


OTHER_LIBRARY = """
import sys, torch
from syncbn.functional.epilogue import NO_EPILOGUE
from syncbn.functional.statistics import Groups
from syncbn.kernels import dispatch
from syncbn.kernels.cpu.library import load
x, y, sums = torch.load(sys.argv[1])
assert load() == sys.argv[2], load()
found = dispatch.cpu().batch_norm(x, None, None, None, NO_EPILOGUE, Groups(), 1e-5, False)
torch.testing.assert_close(found, y, rtol=1e-6, atol=1e-6)
torch.testing.assert_close(dispatch.cpu().group_sums(x, Groups()), sums, rtol=1e-6, atol=1e-3)
"""


@pytest.mark.skipif(len(build.kinds()) == 1, reason="an architecture with one library")
@pytest.mark.parametrize("capability", ["avx2", "default"])
@pytest.mark.parametrize("variable", ["ATEN_CPU_CAPABILITY", "SYNCBN_CPU"])
def test_fewer_vector_instructions(variable, capability, tmp_path):
    """Another library is taken where torch or this package is told to use less, and gives the same."""
    x, _ = tensors("many blocks", torch.float32)
    y = cpu.batch_norm(x, None, None, None, NO_EPILOGUE, Groups(), 1e-5, False)
    torch.save((x, y, cpu.group_sums(x, Groups())), tmp_path / "expected.pt")
    command = [sys.executable, "-c", OTHER_LIBRARY, str(tmp_path / "expected.pt"), capability]
    environment = {**os.environ, variable: capability}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stderr


def test_wrong_instruction_set(monkeypatch):
    monkeypatch.setenv("SYNCBN_CPU", "avx")
    with pytest.raises(ValueError, match=r"SYNCBN_CPU='avx'.*default; name one of them"):
        library.wanted()
