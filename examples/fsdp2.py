"""SyncBatchNorm in a model that FSDP2 shards (`fully_shard`): convert first, then shard.

Run: torchrun --standalone --nproc-per-node 2 examples/fsdp2.py
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import syncbn


def main() -> None:
    dist.init_process_group()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(device, (dist.get_world_size(),))  # on GPUs, each process takes the one of its local rank
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4)).to(device)
    syncbn.convert(model, "sync")
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # after sharding, as FSDP2 wants it
    torch.manual_seed(dist.get_rank())
    for _ in range(100):
        samples = torch.randn(4, 16, device=device)
        loss = nn.functional.cross_entropy(model(samples), samples[:, :4].argmax(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    mean = loss.detach() / dist.get_world_size()
    dist.all_reduce(mean)
    if dist.get_rank() == 0:
        print(f"mean loss {mean.item():.2f}; of the norm's 32 weights, {model[1].weight.to_local().numel()} are here")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
