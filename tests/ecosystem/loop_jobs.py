"""Loops of `examples/loops/` as each of several processes runs them: what the processes then have in common."""

from __future__ import annotations

import torch
import torch.distributed as dist
from example_loops import Watched, example

from syncbn.compat import import_torchvision
from syncbn.study import Setting

import_torchvision()  # as in conftest.py


def watched(setting: Setting) -> dict[str, float]:
    """The loop's metrics, by how much the processes' models differ, and whether a norm sees all processes' samples."""
    own = Watched(config=setting.config, out=setting.out, resume=setting.resume)
    values = example(own.options["loop"]).run(own)
    model, _ = own.options.pop("seen"), own.options.pop("weights")  # the options become a part of the result
    tensors = [*model.parameters(), *(buffer for buffer in model.buffers() if buffer.is_floating_point())]
    differs = max(spread(tensor) for tensor in tensors)
    layer = next(module for module in model.modules() if hasattr(module, "running_mean"))
    layer.train()(torch.randn(4, layer.num_features, 3, 3) + dist.get_rank())
    shares = spread(layer.running_mean) == 0
    dist.destroy_process_group()
    return {**values, "differs": differs, "shares": float(shares), "world": own.processes}


def spread(tensor: torch.Tensor) -> float:
    """The largest difference between two processes' tensors."""
    everywhere = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(everywhere, tensor.detach().contiguous())
    return float((torch.stack(everywhere) - everywhere[0]).abs().max())
