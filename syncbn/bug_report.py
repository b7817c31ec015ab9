"""What a bug report needs to say about an installation and its machine."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import syncbn

PACKAGES = (
    *("triton", "numpy", "torchvision", "timm", "accelerate", "lightning", "transformers", "submitit"),
    *("jsonargparse", "scipy", "pandas"),
)
"""Packages that this one works with, or may be used through."""
PREFIXES = (
    *("ACCELERATE_", "ATEN_", "CUDA_", "GLOO_", "GOMP_", "KMP_", "MKL_", "NCCL_", "OMP_", "PYTORCH_", "SYNCBN_"),
    *("TORCH", "TRITON_"),
)
VARIABLES = (
    *("CXX", "CXXFLAGS", "LD_LIBRARY_PATH", "LD_PRELOAD", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "ONEDNN_MAX_CPU_ISA"),
    *("RANK", "SLURM_NNODES", "SLURM_NTASKS", "WORLD_SIZE", "XDG_CACHE_HOME"),
)
"""Environment variables, besides those with the prefixes, that change what the package or torch does."""
SECRET = re.compile("KEY|TOKEN|SECRET|PASS|CREDENTIAL|AUTH|COOKIE", re.IGNORECASE)


def lines() -> Iterator[str]:
    """The lines of the report, one after another. They hold no password, token or name of the user's home folder.

    What cannot be found out is a line too, with the reason: a broken installation is what most reports are about.

    Example:
        >>> from syncbn.bug_report import lines
        >>> next(lines()).split()[0]
        'syncbn'
    """
    for label, find in FACTS.items():
        try:
            found = find()
        except Exception as error:
            found = f"not known: {type(error).__name__}: {' '.join(str(error).split())}"
        yield f"{label:<13}{found}".replace(str(Path.home()), "~")


def processor() -> str:
    """The name of the processor."""
    try:
        found = re.search(r"^model name\s*: (.+)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.machine()


def _system() -> str:
    try:
        name = platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        name = platform.system()
    return f"{name}, {platform.platform()}"


def _processor() -> str:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{processor()}, {usable} of {os.cpu_count()} cores"


def _torch() -> str:
    import torch

    return f"{torch.__version__}, {torch.get_num_threads()} threads"


def _instructions() -> str:
    import torch

    from syncbn.kernels.cpu.library import instruction_sets, wanted

    torchs = torch.backends.cpu.get_cpu_capability().lower()
    return f"{wanted()} of {', '.join(instruction_sets())}; torch uses {torchs}"


def _kernels() -> str:
    from syncbn.kernels.cpu import build, library

    there = [kind for kind in build.kinds() if build.library(kind).exists()]
    if not there:
        return f"not compiled; {_compiler()}. python -m syncbn.kernels.cpu.build compiles them"
    compiled = f"compiled for {', '.join(there)}"
    if not build.operators().exists():  # loading would compile them, which takes half a minute
        return f"{compiled}; their operators for this torch are not, as no layer has run on the CPU; {_compiler()}"
    return f"{compiled}; those for {library.load()} are loaded"


def _compiler() -> str:
    from syncbn.kernels.cpu import build

    try:
        return f"the compiler is {' '.join(build.compiler())}"
    except build.BuildError as error:
        return str(error)


def _cuda() -> str:
    import torch
    from torch.utils import collect_env

    if torch.version.cuda is None:
        return "this build of torch has none"
    driver = collect_env.get_nvidia_driver_version(collect_env.run)
    return f"{torch.version.cuda}, driver {driver or 'not found'}"


def _cudnn() -> str:
    import torch

    version = torch.backends.cudnn.version()  # an error if it is not the one that torch was compiled for
    return "none" if version is None else str(version)


def _gpus() -> str:
    import torch

    names = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return "; ".join(f"{gpu.name}, {gpu.total_memory >> 30} GiB" for gpu in names) or "none"


def _distributed() -> str:
    import torch
    import torch.distributed as dist

    if not dist.is_available():
        return "this build of torch has none"
    known = {"gloo": dist.is_gloo_available, "nccl": dist.is_nccl_available, "mpi": dist.is_mpi_available}
    found = [name for name, is_there in known.items() if is_there()]
    if "nccl" in found:
        found[found.index("nccl")] += f" {'.'.join(map(str, torch.cuda.nccl.version()))}"
    return ", ".join(found)


def _packages() -> str:
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"no {name}")
    return ", ".join(found)


def _torchvision() -> str:
    if importlib.util.find_spec("torchvision") is None:
        return "not installed"
    from syncbn.compat import has_torchvision_operators

    return "its operators can be called" if has_torchvision_operators() else "it has no operators for this torch"


def _variables() -> str:
    names = [name for name in sorted(os.environ) if name.startswith(PREFIXES) or name in VARIABLES]
    return " ".join(f"{name}={_shown(name, os.environ[name])}" for name in names) or "none of those that matter"


def _shown(name: str, value: str) -> str:
    """A variable's value without what nobody else should read."""
    if SECRET.search(name):
        return "(hidden)"
    return re.sub(r"://[^/@\s]*@", "://(hidden)@", value)


FACTS: dict[str, Callable[[], str]] = {
    "syncbn": lambda: f"{syncbn.__version__} in {Path(syncbn.__file__).parent}",
    "python": lambda: f"{platform.python_version()}, {sys.executable}",
    "system": _system,
    "processor": _processor,
    "torch": _torch,
    "instructions": _instructions,
    "CPU kernels": _kernels,
    "CUDA": _cuda,
    "cuDNN": _cudnn,
    "GPUs": _gpus,
    "distributed": _distributed,
    "packages": _packages,
    "torchvision": _torchvision,
    "variables": _variables,
}
"""What finds each line, by its label."""
