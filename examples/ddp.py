"""SyncBatchNorm under DistributedDataParallel: one line more than without it.

Run: torchrun --standalone --nproc-per-node 2 examples/ddp.py
"""

import os

import torch
import torch.distributed as dist
from torch import nn

import syncbn


def main() -> None:
    dist.init_process_group()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2)).to(device)
    model(torch.zeros(2, 3, 8, 8, device=device))  # gives the lazy layer its size
    syncbn.convert(model, "sync")  # the new line: every BatchNorm, before the model is wrapped
    replica = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(replica.parameters(), lr=0.01)
    for _ in range(10):
        # Two images per process, of another brightness on each: local statistics would differ.
        images = torch.randn(2, 3, 8, 8, device=device) + dist.get_rank()
        loss = nn.functional.cross_entropy(replica(images), torch.tensor([0, 1], device=device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    means = [torch.zeros_like(model[1].running_mean) for _ in range(dist.get_world_size())]
    dist.all_gather(means, model[1].running_mean)
    if dist.get_rank() == 0:
        print(f"running means equal on all ranks: {all(torch.equal(mean, means[0]) for mean in means)}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
