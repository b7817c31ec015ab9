"""The compiled kernels run in the OpenMP runtime that torch has loaded, on no more threads than torch allows.

Two runtimes in a process each keep a pool of threads, so that twice as many threads as cores would be busy.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from syncbn.kernels.cpu import build

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import json, os, re
import torch
import syncbn

def loaded(pattern):
    with open("/proc/self/maps") as maps:
        return sorted({line.split()[-1] for line in maps if re.search(pattern, line)})

def run(layer):
    x = torch.randn(32, 64, 56, 56, requires_grad=True)
    layer(x).sum().backward()
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(2)
print(json.dumps({
    "torch": run(torch.nn.BatchNorm2d(64)),
    "ours": run(syncbn.SyncBatchNorm(64)),
    "kernels": loaded(r"/kernels-\\w+-\\w+\\.so$"),
    "runtimes": loaded(r"/lib(gomp|omp|iomp5)[-\\w.]*\\.so"),
}))
"""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
@pytest.mark.skipif(not any(build.library(kind).exists() for kind in build.kinds()), reason="the kernels are not built")
def test_one_runtime_and_no_more_threads_than_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["kernels"], "the layer did not use the compiled kernels"
    assert len(found["runtimes"]) == 1, found["runtimes"]
    assert found["ours"] <= found["torch"]
