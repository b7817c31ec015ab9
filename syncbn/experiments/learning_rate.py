"""Which learning rates a deep network bears (Ioffe and Szegedy 2015, section 4.2), by norm, activation and weights."""

from __future__ import annotations

from matplotlib.figure import Figure
from torch import nn

from syncbn.experiments.drawing import log_axis, panels, trace
from syncbn.experiments.runs import Runs
from syncbn.experiments.training import Perceptron, error_of, features, report_errors, trained
from syncbn.study import Setting

ACTIVATIONS = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid}


def run(setting: Setting) -> dict[str, float]:
    """Train a deep perceptron; ``error`` of the test set at the end, and ``steps`` to the target error.

    ``steps`` are counted to the first evaluation below the target; the whole budget if there is none.
    """
    o = setting.options
    sizes = (features(setting), 100, o["depth"], 10)
    own = {name: o[name] for name in ("norm_after", "dropout", "scale")}
    result = trained(setting, lambda: Perceptron(sizes, ACTIVATIONS[o["activation"]], **own)).result
    evaluated = [(entry["step"], entry["test"]["error"]) for entry in result.history if entry["test"] is not None]
    report_errors(setting, result)
    budget = setting.config.budget.steps
    assert budget is not None, "the experiment counts steps"
    steps = next((step for step, error in evaluated if error is not None and error < o["target"]), budget)
    return {"error": error_of(result), "steps": float(steps)}


def figure(runs: Runs) -> Figure:
    """The error and the steps to the target against the learning rate.

    Arms at some of the learning rates have a row of their own, beside the first arm.
    """
    arms = runs.study.arms
    drawn, axes = panels(runs, 4, columns=2)
    main, varied = [arm for arm in arms if not arm.only], [arms[0], *(arm for arm in arms if arm.only)]
    shown = zip(axes, (main, main, varied, varied), ("error", "steps") * 2, strict=True)
    for each, some, quantity in shown:
        for arm in some:
            trace(each, runs, arm.name, runs.along(quantity, arm.name, "optimizer.lr"), marked=True)
        each.set(ylabel="test error" if quantity == "error" else "steps to the target", xlabel="learning rate")
        log_axis(each, runs.study.axes["optimizer.lr"])
        each.set_yscale("log" if quantity == "error" else "linear")
    return drawn
