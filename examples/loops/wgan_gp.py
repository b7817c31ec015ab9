"""WGAN-GP on eight Gaussians: which normalization does the critic take? The penalty differentiates it twice.

With BatchNorm it is not a penalty of each sample: Gulrajani et al. (2017, arXiv 1704.00028) advise LayerNorm.

Run: python examples/loops/wgan_gp.py
"""

import math
import tempfile

import torch
from torch import nn

from syncbn.study import Study


def mixture(samples):
    angles = torch.randint(8, (samples,)) * math.pi / 4
    return torch.stack((angles.cos(), angles.sin()), 1) * 2 + 0.1 * torch.randn(samples, 2)


def network(inputs, outputs):
    layers = [(nn.Linear(size, 64), nn.BatchNorm1d(64), nn.LeakyReLU(0.2)) for size in (inputs, 64)]
    return nn.Sequential(*sum(layers, ()), nn.Linear(64, outputs))


def penalty(critic, real, fake):
    between = torch.lerp(fake, real, torch.rand(len(real), 1)).requires_grad_()
    (gradient,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    return 10 * (gradient.norm(dim=1) - 1).square().mean()


def run(setting):
    generator, critic = network(4, 2), setting.normalize(network(2, 1))  # the generator keeps BatchNorm
    rate = setting.config.optimizer.lr
    optimizers = [torch.optim.Adam(model.parameters(), rate, (0.5, 0.9)) for model in (generator, critic)]
    for step in range(setting.options.get("steps", 900)):
        real, fake = mixture(setting.batch_size), generator(torch.randn(setting.batch_size, 4))
        if step % 3 == 2:  # the critic has two steps for each of the generator's
            optimizer, loss = optimizers[0], -critic(fake).mean()
        else:
            fake = fake.detach()
            optimizer, loss = optimizers[1], critic(fake).mean() - critic(real).mean() + penalty(critic, real, fake)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        directions = nn.functional.normalize(torch.randn(2, 64), dim=0)
        found, true = (x @ directions for x in (generator.eval()(torch.randn(2000, 4)), mixture(2000)))
    return {"sliced_wasserstein": (found.sort(0).values - true.sort(0).values).abs().mean()}


if __name__ == "__main__":
    names, metric = ("batch", "layer"), {"name": "sliced_wasserstein", "percent": False}
    arms = {name: {"overrides": {"norm": {"name": name}}, "reference": name == "batch"} for name in names}
    base = {"device": "cpu", "optimizer": {"lr": 0.001}}  # 64 samples on one GPU, unless it is said
    study = Study(run=run, metric=metric, base=base, arms=arms, seeds=range(3))
    study.run(tempfile.mkdtemp(), progress=False)
    print(study.compare().T)
