"""Which learning rates a deep network bears (Ioffe and Szegedy 2015, section 4.2), by norm, activation and weights."""

from __future__ import annotations

import math

from matplotlib.figure import Figure
from torch import nn

from syncbn.experiments.drawing import log_axis, panels, trace
from syncbn.experiments.runs import Runs
from syncbn.experiments.training import Perceptron, error_of, report_errors, trained
from syncbn.study import Setting

ACTIVATIONS = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid}


def run(setting: Setting) -> dict[str, float]:
    """Train a deep perceptron; ``error`` of the test set at the end, and ``steps`` to the target error.

    ``steps`` are counted to the first evaluation below the target; the whole budget if there is none.
    """
    o = setting.options
    std = o["scale"] * math.sqrt(2 / 100)
    network = Perceptron(
        (784, 100, o["depth"], 10),
        ACTIVATIONS[o["activation"]],
        std if o["scale"] != 1 else None,
        norm_after=o["norm_after"],
        dropout=o["dropout"],
    )
    result = trained(setting, lambda: network).result
    evaluated = [(entry["step"], entry["test"]["error"]) for entry in result.history if entry["test"] is not None]
    report_errors(setting, result)
    budget = setting.config.budget.steps
    assert budget is not None, "the experiment counts steps"
    steps = next((step for step, error in evaluated if error is not None and error < o["target"]), budget)
    return {"error": error_of(result), "steps": float(steps)}


def figure(runs: Runs) -> Figure:
    """The error and the steps to the target against the learning rate."""
    rates = runs.study.axes["optimizer.lr"]
    drawn, axes = panels(runs, 2, height=2.6)
    for each, quantity, label in zip(axes, ("error", "steps"), ("test error", "steps to the target"), strict=True):
        for arm in runs.study.arms:
            trace(each, runs, arm.name, runs.along(quantity, arm.name, "optimizer.lr"), marked=True)
        each.set_ylabel(label)
        log_axis(each, rates)
    axes[0].set_yscale("log")
    axes[1].set_xlabel("learning rate")
    return drawn
