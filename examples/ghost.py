"""GhostBatchNorm: a batch of 32 with the statistics, and so the noise, of batches of 8.

Run: python examples/ghost.py
"""

import torch
from torch import nn

import syncbn


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4))
    syncbn.convert(model, "ghost", ghost_batch_size=8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    samples = torch.randn(256, 16)
    labels = samples[:, :4].argmax(1)
    for step in range(100):
        batch = torch.arange(32) + 32 * (step % 8)
        loss = nn.functional.cross_entropy(model(samples[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    # A ghost batch is normalized as if it were the whole batch.
    whole = model(samples[:32])
    pieces = torch.cat([model(piece) for piece in samples[:32].split(8)])
    print(f"largest difference from four batches of 8: {(whole - pieces).abs().max().item():.0e}")
    model.eval()
    print(f"accuracy: {(model(samples).argmax(1) == labels).float().mean().item():.2f}")


if __name__ == "__main__":
    main()
