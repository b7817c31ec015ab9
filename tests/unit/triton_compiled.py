"""Compile the Triton kernels for a GPU that need not be there; ``test_triton_kernels.py`` runs this as a script.

The interpreter takes much that the compiler does not. For each launch one line: the kernel's name, and the bytes of
stack that a thread needs, which are registers that did not suffice.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from syncbn.functional.epilogue import Epilogue
from syncbn.functional.normalize import Affine
from syncbn.functional.renorm import Limits
from syncbn.functional.running import Running
from syncbn.functional.statistics import Groups


class Driver:
    """What the compiler asks of a driver."""

    def get_current_target(self):
        return GPUTarget("cuda", int(sys.argv[1]), 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=0):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


def report(kernel):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    print(kernel.metadata.name, *re.findall(r"STACK:(\d+)", text))


def compile_instead(run):
    def compiled(self, *args, grid, warmup, **options):
        report(run(self, *args, grid=grid, warmup=True, **options))

    return compiled


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


def main():
    from syncbn.kernels.cuda import functions as kernels

    triton.runtime.driver.set_active(Driver())
    JITFunction.run = compile_instead(JITFunction.run)
    images = torch.empty(8, 64, 56, 56)
    last = torch.channels_last
    passes(images.bfloat16(), None, 1, "relu", True)
    passes(images.half().contiguous(memory_format=last), None, 1, "silu", False)
    passes(images.contiguous(memory_format=last), torch.arange(8), 8, None, False)
    passes(images.double(), torch.arange(8), 8, "leaky_relu", True)
    passes(torch.empty(64, 100), torch.arange(64), 64, "silu", False)
    passes(torch.empty(2, 100, 7, 7), None, 1, None, False)
    buffers = torch.zeros(64), torch.ones(64), torch.tensor(0), torch.tensor(0)
    sums = torch.zeros(4, 129, dtype=torch.float64)
    kernels.finish(sums, 1e-5)
    kernels.finish(sums, 1e-5, Running(*buffers, 0.1, limits=Limits(3.0, 5.0, 0, 40, 25)))
    kernels._FINISH_ALONE = 0
    kernels.finish(sums, 1e-5, Running(*buffers, None, "mean", 2.5))


if __name__ == "__main__":
    main()
