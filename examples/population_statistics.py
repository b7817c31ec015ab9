"""Population statistics: evaluate with the statistics of many samples, not with a moving average of small batches.

Run: python examples/population_statistics.py
"""

import torch
from torch import nn

import syncbn


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32, momentum=0.5), nn.ReLU(), nn.Linear(32, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    samples = 1 + 3 * torch.randn(2048, 16)
    labels = samples[:, :4].argmax(1)
    for batch in torch.randperm(2048).split(4):  # few samples, and so noisy running statistics
        loss = nn.functional.cross_entropy(model(samples[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def test_loss() -> float:
        model.eval()
        with torch.no_grad():
            return nn.functional.cross_entropy(model(samples), labels).item()

    before = test_loss()
    syncbn.update_population_statistics(model, samples.split(256))  # torch's layers too; the weights stay
    print(f"loss with running statistics {before:.3f}, with population statistics {test_loss():.3f}")


if __name__ == "__main__":
    main()
