"""Two runs in each process of a launcher, one after another; run by ``test_two_runs.py``."""

import json
import os
import sys
from pathlib import Path

import torch.distributed as dist

from syncbn.train import load_config, train

data = {"data.name": "synthetic", "data.synthetic_samples": 32, "data.image_size": 8, "model.width": 4}
run = {"gpus": 4, "per_gpu_batch_size": 4, "norm.name": "sync", "budget.epochs": 1, "device": "cpu"}
losses = []
for changes in ({}, {"sync_group_size": 2}, {"precision": "bf16"}, {}):
    losses.append(train(load_config(None, {**data, **run, **changes})).losses)
    assert not dist.is_initialized()
Path(sys.argv[1], f"{os.environ['RANK']}.json").write_text(json.dumps(losses))
