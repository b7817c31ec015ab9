"""Compiles the CPU kernels to shared libraries, one for each set of vector instructions, and torch's operators for them.

The installation of the package compiles the kernels, which do not depend on torch. The operators are compiled for the
torch that is installed, which takes about half a minute, when they are first used or by hand:
``python -m syncbn.kernels.cpu.build`` compiles both. A library's name contains a hash of its sources, including this
file, so an outdated library is never loaded. ``CXX`` and ``CXXFLAGS`` have their usual meaning.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent
OPERATORS = (FOLDER / "call.h", FOLDER / "lanes.h", FOLDER / "operators.cpp")
"""The sources of the operators: what they include, then the file itself."""
COMMON_FLAGS = [
    *("-fPIC", "-shared", "-fvisibility=hidden"),
    # Vectors wider than the machine's are passed in memory, between functions of one library alone.
    *("-Wall", "-Wextra", "-Wno-psabi"),
]
FLAGS = [
    *("-std=c++17", "-O3", "-fopenmp", *COMMON_FLAGS),
    # No roundings change but those of fused multiply-adds; NaN and infinity stay what they are.
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
]
KINDS = {"avx512": ["-march=x86-64-v4"], "avx2": ["-march=x86-64-v3"], "default": []}
"""Compiler flags by the name of torch's CPU capability, best first. Machines other than x86-64 only have the last."""


class BuildError(RuntimeError):
    """No library was built; the message says why."""


def sources() -> list[Path]:
    """The headers of the kernels, then the source file that includes them."""
    return [*sorted(FOLDER.glob("*.h")), FOLDER / "kernels.cpp"]


def library(kind: str) -> Path:
    """The path of the kernels' library of a kind, which need not exist."""
    return FOLDER / f"kernels-{_digest(*sources())}-{kind}.so"


def operators() -> Path:
    """The path of the operators' library for this torch, which need not exist.

    It lies beside the sources, or in the user's cache if that folder cannot be written.
    """
    import torch

    name = f"operators-{_digest(*OPERATORS)}-torch{torch.__version__}.so"
    if (FOLDER / name).exists() or os.access(FOLDER, os.W_OK):
        return FOLDER / name
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "syncbn" / name


def _digest(*files: Path) -> str:
    digest = hashlib.sha256(platform.machine().encode())
    for file in (*files, Path(__file__)):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def kinds() -> list[str]:
    """The kinds for this machine's architecture."""
    return list(KINDS) if platform.machine() in ("x86_64", "AMD64") else ["default"]


def compiler() -> list[str]:
    """The command of ``$CXX``, which may have arguments, or of the first compiler that is found."""
    chosen = _arguments("CXX")
    candidates = [chosen] if chosen else [["c++"], ["g++"], ["clang++"]]
    found = next((command for command in candidates if shutil.which(command[0])), None)
    if found is None:
        raise BuildError(f"no C++ compiler was found: {', '.join(c[0] for c in candidates)}; CXX may name another")
    return found


def _arguments(variable: str) -> list[str]:
    value = os.environ.get(variable, "")
    try:
        return shlex.split(value)
    except ValueError as error:
        raise BuildError(f"{variable}={value!r}: {error}") from error


def build() -> list[Path]:
    """Compile all kinds, or those of them that the compiler knows; older libraries are removed.

    Raises:
        BuildError: none could be compiled, or written.
    """
    cxx = compiler()
    errors: list[str] = []
    try:
        with tempfile.TemporaryDirectory(dir=FOLDER, prefix=".build-") as scratch:
            built = _compile_into(Path(scratch), cxx, errors)
        current = [library(kind) for kind in kinds()]
        for old in FOLDER.glob("kernels-*.so"):
            if built and old not in current:
                old.unlink(missing_ok=True)
    except OSError as error:
        raise BuildError(str(error)) from error
    if not built:
        raise BuildError(f"{cxx[0]} failed\n" + "\n".join(errors))
    return built


def _compile_into(scratch: Path, cxx: list[str], errors: list[str]) -> list[Path]:
    running = []
    for kind in kinds():
        target = scratch / f"{kind}.so"
        flags = [*FLAGS, *KINDS[kind], *_arguments("CXXFLAGS")]
        command = [*cxx, *flags, str(sources()[-1]), "-o", str(target)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        running.append((kind, target, process))
    built = []
    for kind, target, process in running:
        _, messages = process.communicate()
        if process.returncode == 0:
            os.replace(target, library(kind))
            built.append(library(kind))
        else:
            errors.append(f"{kind}: {messages.strip()[-2000:]}")
    return built


def build_operators() -> Path:
    """Compile the operators for the torch that is installed, unless another process has done so meanwhile.

    Raises:
        BuildError: they could not be compiled, or written.
    """
    from filelock import FileLock  # torch needs it too

    target, cxx = operators(), compiler()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.parent / ".operators.lock"):
            if not target.exists():
                _compile_operators(target, cxx)
    except OSError as error:
        raise BuildError(str(error)) from error
    return target


def _compile_operators(target: Path, cxx: list[str]) -> None:
    import torch

    root = Path(torch.__file__).parent
    headers = [f"-isystem{root / folder}" for folder in ("include", "include/torch/csrc/api/include")]
    link = [f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu"]
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as scratch:
        made = Path(scratch) / target.name
        flags = ["-std=c++20", "-O2", *COMMON_FLAGS, *headers, *_arguments("CXXFLAGS")]
        command = [*cxx, *flags, str(OPERATORS[-1]), "-o", str(made), *link]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BuildError(f"{cxx[0]} failed\n{done.stderr.strip()[-2000:]}")
        for old in target.parent.glob(f"operators-*-torch{torch.__version__}.so"):
            old.unlink(missing_ok=True)
        os.replace(made, target)


def main() -> int:
    try:
        for path in (*build(), build_operators()):
            print(path)
    except BuildError as error:
        print(f"the CPU's kernels were not built: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
