"""SimCLR on digits: a linear probe of features that were trained with few images on each GPU.

Both views are on one GPU, whose statistics can betray the pair: Chen et al. (2020, arXiv 2002.05709) synchronize them.

Run: python examples/loops/simclr.py
"""

import tempfile

import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import nn

from syncbn.study import Study


def view(images):
    """Each image turned, scaled and shifted a little, and noise."""
    n = len(images)
    change = torch.eye(2, 3) + torch.randn(n, 2, 3) * torch.tensor([0.15, 0.15, 0.1])
    grid = nn.functional.affine_grid(change, [n, 1, 8, 8], align_corners=False)
    return nn.functional.grid_sample(images, grid, align_corners=False) + 0.1 * torch.randn(n, 1, 8, 8)


def contrast(first, second):
    """NT-Xent: each view has to find the other view of its image among all others of the batch."""
    z = nn.functional.normalize(torch.cat((first, second)), dim=1)
    similar = (z @ z.T / 0.2).fill_diagonal_(-torch.inf)
    return nn.functional.cross_entropy(similar, torch.arange(len(z)).roll(len(first)))


def run(setting):
    images, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(images).float().view(-1, 1, 8, 8) / 16
    widths = ((1, 16), (16, 32))
    layers = [(nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(), nn.MaxPool2d(2)) for i, o in widths]
    projection = nn.Sequential(nn.Linear(128, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 32))
    model = setting.normalize(nn.Sequential(nn.Sequential(*sum(layers, ()), nn.Flatten()), projection))
    optimizer = torch.optim.AdamW(model.parameters(), setting.config.optimizer.lr)
    for _ in range(setting.options.get("steps", 300)):
        batch = images[torch.randint(1200, (setting.batch_size,))]
        loss = contrast(model(view(batch)), model(view(batch)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        features = model.eval()[0](images).numpy()
    probe = LogisticRegression(max_iter=1000).fit(features[:100], labels[:100])
    return {"accuracy": probe.score(features[1200:], labels[1200:])}


if __name__ == "__main__":
    arms = {n: {"overrides": {"norm": {"name": n}}, "reference": n == "batch"} for n in ("batch", "sync", "group")}
    base = {"gpus": 16, "per_gpu_batch_size": 2, "device": "cpu", "optimizer": {"lr": 0.003}}
    metric = {"name": "accuracy", "higher_is_better": True}
    study = Study(run=run, metric=metric, base=base, arms=arms, seeds=range(3))
    study.run(tempfile.mkdtemp(), progress=False)
    print(study.compare().T)
