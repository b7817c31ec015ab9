"""A study from Python: two layers, two sizes of the batch on a GPU, two seeds, on the digits of scikit-learn.

Run: python examples/study.py
"""

import tempfile
from pathlib import Path

from syncbn.study import load_study
from syncbn.study.commands import run_study

STUDY = """
name: digits
title: Small batches on digits
question: What does a batch of 2 cost, and does BatchRenorm give it back?
base:
  data: {name: digits}
  model: {name: convnet, width: 8}
  budget: {epochs: 4}
sweep: {global_batch_size: 32, values: [2, 32]}
arms:
  batch: {label: Local BatchNorm, overrides: {norm: {name: batch}}, reference: true}
  renorm: {label: BatchRenorm, overrides: {norm: {name: renorm, warmup_steps: 10, r_ramp_end: 60, d_ramp_end: 40}}}
seeds: [0, 1]
"""

if __name__ == "__main__":
    folder = Path(tempfile.mkdtemp())
    file = folder / "digits.yaml"
    file.write_text(STUDY)
    print(f"{load_study(file).title}: the report goes to {folder}")
    raise SystemExit(run_study(str(file), folder / "runs", workers=2))
