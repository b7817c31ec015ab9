"""Compile the Triton kernels for GPUs that need not be there: ``python triton_compiled.py FILE`` writes a CSV file.

The interpreter takes much that the compiler does not. Each row has what a launch needs of a multiprocessor: registers
of a thread, bytes of its stack, bytes that it spills because registers do not suffice, bytes of shared memory.
"""

from __future__ import annotations

import csv
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from syncbn.functional.epilogue import Epilogue
from syncbn.functional.normalize import Affine
from syncbn.functional.renorm import Limits
from syncbn.functional.running import Running
from syncbn.functional.statistics import Groups

CAPABILITIES = (80, 90, 100)
COLUMNS = (
    *("capability", "kernel", "case", "warps", "registers"),
    *("stack", "spill_stores", "spill_loads", "shared_memory", "triton"),
)


class Driver:
    """What the compiler asks of a driver."""

    capability = 0

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return self.capability  # compiled kernels are kept by device

    def get_current_stream(self, device=0):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


def resources(kernel, capability):
    """The figures of a compiled kernel, from the assembler's report."""
    knobs = triton.knobs.nvidia
    assembler = knobs.ptxas_blackwell if capability >= 100 else knobs.ptxas
    target = re.search(r"\.target (\w+)", kernel.asm["ptx"])[1]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(kernel.asm["ptx"])
        file.flush()
        command = [assembler.path, "-v", f"--gpu-name={target}", file.name, "-o", "/dev/null"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    # Of the kernel, which comes last; functions that it calls may come before.
    frame = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)[-1]
    registers = re.findall(r"Used (\d+) registers", report)[-1]
    return kernel.metadata.num_warps, int(registers), *map(int, frame), kernel.metadata.shared


def passes(x, index, num_groups, activation, has_residual):
    from syncbn.kernels.cuda import functions as kernels

    statistics = torch.zeros(num_groups, x.shape[1], dtype=torch.float64)
    affine = Affine(statistics, statistics, *torch.ones(2, x.shape[1]).unsqueeze(1).expand(2, num_groups, -1))
    groups = Groups(index, num_groups)
    epilogue = Epilogue(x if has_residual else None, activation)
    kernels.group_sums(x, groups)
    kernels.normalize(x, affine, groups, epilogue)
    dz, rest, sums = kernels.backward_sums(x, x, affine, groups, epilogue)
    kernels.grad_input(dz, x, affine, sums, groups, rest)


def gradients(number, renorm):
    from syncbn.kernels.cuda import local

    x, moments, weight = torch.empty(8, 64, 5, 5), torch.zeros(2, number, 64, dtype=torch.float64), torch.ones(64)
    corrections = torch.ones(2, number, 64) if renorm else None
    affine = local._affine(moments, weight, weight, corrections)
    groups = Groups(None if number == 1 else torch.arange(8) * number // 8, number)
    ctx = SimpleNamespace(needs_input_grad=(False, True, True, False), bias_dtype=weight.dtype)
    local._gradients(ctx, x, x, weight, affine, corrections, groups, Epilogue())


def finish(rule, limits):
    from syncbn.kernels.cuda import functions as kernels

    buffers = torch.zeros(64), torch.ones(64), torch.tensor(0), torch.tensor(0)
    running = None if rule is None else Running(*buffers, *rule, limits=limits)
    kernels.finish(torch.zeros(4, 129, dtype=torch.float64), 1e-5, running)


def in_two_launches(rule):
    from syncbn.kernels.cuda import functions as kernels

    alone, kernels._FINISH_ALONE = kernels._FINISH_ALONE, 0
    finish(rule, None)
    kernels._FINISH_ALONE = alone


def cases():
    images = torch.empty(8, 64, 56, 56)
    last = images.contiguous(memory_format=torch.channels_last)
    few = torch.empty(2, 100, 7, 7)
    samples = torch.arange(8)
    return {
        "float32": lambda: passes(images, None, 1, None, False),
        "bfloat16, add, relu": lambda: passes(images.bfloat16(), None, 1, "relu", True),
        "float16, silu, channels_last": lambda: passes(last.half(), None, 1, "silu", False),
        "float32, groups, channels_last": lambda: passes(last, samples, 8, None, False),
        "float64, groups, add, leaky_relu": lambda: passes(images.double(), samples, 8, "leaky_relu", True),
        "float32, groups, add, silu, (N, C)": lambda: passes(torch.empty(64, 100), torch.arange(64), 64, "silu", True),
        "float32, 7 x 7": lambda: passes(few, None, 1, None, False),
        "bfloat16, groups, add, relu, 7 x 7": lambda: passes(few.bfloat16(), torch.arange(2), 2, "relu", True),
        "no buffers": lambda: finish(None, None),
        "renorm": lambda: finish((0.1,), Limits(3.0, 5.0, 0, 40, 25)),
        "one group": lambda: gradients(1, False),
        "groups, renorm": lambda: gradients(4, True),
        "cumulative, two launches": lambda: in_two_launches((None, "mean", 2.5)),
    }


def rows(capabilities):
    """A row of COLUMNS for each kernel, case and capability."""
    driver, run = Driver(), JITFunction.run
    kernels = []

    def compile_instead(self, *args, grid, warmup, **options):
        kernels.append(run(self, *args, grid=grid, warmup=True, **options))

    triton.runtime.driver.set_active(driver)
    JITFunction.run = compile_instead
    found = []
    for driver.capability in capabilities:
        for case, launch in cases().items():
            launch()
            for kernel in kernels:
                figures = resources(kernel, driver.capability)
                found.append((driver.capability, kernel.metadata.name, case, *figures, triton.__version__))
            kernels.clear()
    return found


def main():
    with Path(sys.argv[1]).open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows(CAPABILITIES)])


if __name__ == "__main__":
    main()
