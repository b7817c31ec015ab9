"""BatchRenorm where the samples of a batch are alike: each batch of this training has one class only.

Run: python examples/renorm.py
"""

import torch
from torch import nn

import syncbn

STEPS = 400


def accuracy(renorm: bool) -> float:
    """Train on batches of one class in turn; return the accuracy on all classes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4))
    if renorm:
        # The paper's schedule is for 160,000 steps: a short run needs a shorter one, and a larger momentum.
        syncbn.convert(model, "renorm", momentum=0.1, warmup_steps=20, r_ramp_end=100, d_ramp_end=100)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    centers = 2 * torch.randn(4, 8)
    for step in range(STEPS):
        label = torch.full((8,), step % 4)
        loss = nn.functional.cross_entropy(model(centers[label] + torch.randn(8, 8)), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    labels = torch.arange(400) % 4
    return (model(centers[labels] + torch.randn(400, 8)).argmax(1) == labels).float().mean().item()


if __name__ == "__main__":
    print(f"BatchNorm: {accuracy(renorm=False):.2f}, BatchRenorm: {accuracy(renorm=True):.2f}")
