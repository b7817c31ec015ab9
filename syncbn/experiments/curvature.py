"""The largest curvatures in training, with and without a normalization (Ghorbani et al. 2019, Karakida et al. 2019)."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from syncbn.experiments.drawing import panels, trace
from syncbn.experiments.runs import Runs
from syncbn.experiments.training import Perceptron, error_of, features, trained
from syncbn.study import Setting

Product = Callable[[Tensor], Tensor]
CLASSES = 10
"""Outliers of a Hessian are as many as there are classes, or fewer."""


def run(setting: Setting) -> dict[str, float]:
    """The largest eigenvalues of the Hessian and of the Fisher matrix of the training loss of a batch.

    The Fisher matrix of a softmax is its Gauss-Newton matrix. Both by Lanczos (ARPACK), to 1 percent, on one fixed
    batch in float64. Reports ``hessian`` and ``fisher``, the largest of each, and ``spread``, the largest of the
    Hessian over its tenth largest; returns their means over the training, those at the start, ``first_...``, and the
    test ``error``. With ``outputs``, the outputs are normalized too.
    """
    o = setting.options
    fixed: list[tuple[Tensor, Tensor]] = []
    seen: list[dict[str, float]] = []

    def probe(step: int, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        if not fixed:
            fixed.append((images, labels))
        if step % o["look_every"] == 0:
            hessian, fisher = largest_eigenvalues(model, *fixed[0])
            seen.append({"hessian": hessian[0], "fisher": fisher, "spread": hessian[0] / hessian[-1]})
            setting.report(step, **seen[-1])

    def prepare(model: nn.Module) -> nn.Module:
        return nn.Sequential(model, nn.BatchNorm1d(CLASSES)) if o["outputs"] else model

    sizes = (features(setting), 50, o["depth"], CLASSES)
    found = {"error": error_of(trained(setting, lambda: Perceptron(sizes), probe, prepare).result)}
    for name, first in seen[0].items():
        found |= {f"first_{name}": first, name: float(np.mean([values[name] for values in seen[1:] or seen]))}
    return found


def largest_eigenvalues(model: nn.Module, inputs: Tensor, labels: Tensor) -> tuple[list[float], float]:
    """Of a batch's mean cross entropy: as many of the Hessian as there are classes, and one of the Gauss-Newton matrix.

    They are the algebraically largest, from the largest on.
    """
    copied = copy.deepcopy(model).double()
    parameters = list(copied.parameters())
    z = copied(inputs.double())
    gradient = torch.autograd.grad(cross_entropy(z, labels), parameters, create_graph=True)
    p = z.detach().softmax(1)
    # J v as the derivative of u' J by u: torch's reverse mode, twice.
    u = torch.zeros_like(z, requires_grad=True)
    pulled = torch.autograd.grad(z, parameters, u, create_graph=True)

    def hessian(v: Tensor) -> Tensor:
        return _flat(torch.autograd.grad(gradient, parameters, _split(v, parameters), retain_graph=True))

    def fisher(v: Tensor) -> Tensor:
        (jv,) = torch.autograd.grad(pulled, u, _split(v, parameters), retain_graph=True)
        of_softmax = (p * jv - p * (p * jv).sum(1, keepdim=True)) / len(z)
        return _flat(torch.autograd.grad(z, parameters, of_softmax, retain_graph=True))

    size = sum(parameter.numel() for parameter in parameters)
    return _largest(hessian, size, z.device, CLASSES), _largest(fisher, size, z.device, 1)[0]


def _largest(product: Product, size: int, device: torch.device, number: int) -> list[float]:
    def multiply(v: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(product(torch.from_numpy(v.ravel()).to(device)).cpu())

    operator = LinearOperator((size, size), matvec=multiply, dtype=np.float64)
    start = np.random.default_rng(0).standard_normal(size)
    found = eigsh(operator, k=number, which="LA", tol=0.01, v0=start, return_eigenvectors=False)
    return sorted(found.tolist(), reverse=True)


def _split(v: Tensor, like: list[nn.Parameter]) -> list[Tensor]:
    parts = v.split([parameter.numel() for parameter in like])
    return [part.view_as(parameter) for part, parameter in zip(parts, like, strict=True)]


def _flat(tensors: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def figure(runs: Runs) -> Figure:
    """The eigenvalues along the steps."""
    drawn, axes = panels(runs, 3)
    words = {"hessian": "Hessian, largest", "fisher": "Fisher matrix, largest", "spread": "Hessian, largest / tenth"}
    for each, (quantity, label) in zip(axes, words.items(), strict=True):
        for arm in runs.study.arms:
            trace(each, runs, arm.name, runs.curve(quantity, arm.name))
        each.set(yscale="log", ylabel=label, xlabel="step")
    return drawn
