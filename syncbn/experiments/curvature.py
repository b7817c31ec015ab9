"""The largest curvature in training, with and without a normalization (Ghorbani et al. 2019, Karakida et al. 2019)."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from syncbn.experiments.drawing import panels, trace
from syncbn.experiments.runs import Runs
from syncbn.experiments.training import Perceptron, error_of, trained
from syncbn.study import Setting

Product = Callable[[Tensor], Tensor]


def run(setting: Setting) -> dict[str, float]:
    """The largest eigenvalue of the Hessian and of the Fisher matrix of the training loss of a batch.

    The Fisher matrix of a softmax is its Gauss-Newton matrix. Both by Lanczos (ARPACK), to 1 percent, on one fixed
    batch in float64. Reports them; returns the means over the training, ``hessian`` and ``fisher``, those at the start,
    ``first_...``, and the test ``error``.
    """
    o = setting.options
    fixed: list[tuple[Tensor, Tensor]] = []
    seen: list[tuple[float, float]] = []

    def probe(step: int, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        if not fixed:
            fixed.append((images, labels))
        if step % o["look_every"] == 0:
            seen.append(largest_eigenvalues(model, *fixed[0]))
            setting.report(step, hessian=seen[-1][0], fisher=seen[-1][1])

    result = trained(setting, lambda: Perceptron((784, 50, o["depth"], 10)), probe).result
    hessian, fisher = (float(np.mean(values)) for values in zip(*seen[1:] or seen, strict=True))
    first = {"first_hessian": seen[0][0], "first_fisher": seen[0][1]}
    return {"error": error_of(result), "hessian": hessian, "fisher": fisher, **first}


def largest_eigenvalues(model: nn.Module, inputs: Tensor, labels: Tensor) -> tuple[float, float]:
    """Of the Hessian (its algebraically largest) and of the Gauss-Newton matrix of a batch's mean cross entropy."""
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
    return _largest(hessian, size), _largest(fisher, size)


def _largest(product: Product, size: int) -> float:
    operator = LinearOperator(
        (size, size), matvec=lambda v: product(torch.from_numpy(v.ravel())).numpy(), dtype=np.float64
    )
    start = np.random.default_rng(0).standard_normal(size)
    return float(eigsh(operator, k=1, which="LA", tol=0.01, v0=start, return_eigenvectors=False)[0])


def _split(v: Tensor, like: list[nn.Parameter]) -> list[Tensor]:
    parts = v.split([parameter.numel() for parameter in like])
    return [part.view_as(parameter) for part, parameter in zip(parts, like, strict=True)]


def _flat(tensors: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def figure(runs: Runs) -> Figure:
    """The eigenvalues along the steps."""
    drawn, axes = panels(runs, 2, height=2.3)
    for each, quantity, label in zip(axes, ("hessian", "fisher"), ("Hessian", "Fisher matrix"), strict=True):
        for arm in runs.study.arms:
            trace(each, runs, arm.name, runs.curve(quantity, arm.name))
        each.set(yscale="log", ylabel=f"largest eigenvalue, {label}")
    axes[1].set_xlabel("step")
    return drawn
