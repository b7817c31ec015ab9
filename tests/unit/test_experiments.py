"""The literature's experiments: each runs at a tiny size, and its arithmetic is compared with a closed form."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import experiment_table
import pytest
import torch
from torch import nn

from syncbn.cli import main
from syncbn.experiments import experiment_names, load_experiment
from syncbn.experiments.checks import measure
from syncbn.experiments.curvature import largest_eigenvalues
from syncbn.experiments.drift import divergence
from syncbn.experiments.experiment import experiment_from_dict
from syncbn.experiments.gradient_shift import shift_of_gradients
from syncbn.experiments.inference import AverageNorm
from syncbn.experiments.noise import Noise, noisy
from syncbn.experiments.page import verdict, write_experiment
from syncbn.experiments.runs import Runs
from syncbn.study.plan.grid import study_cells
from syncbn.study.run.own_loop import Setting, train_function
from syncbn.train.config import ConfigError
from syncbn.train.result import RunResult

TRAINING = {
    "batch_noise": {"task": {"depth": 2, "look_every": 2, "silhouette_samples": 50}, "steps": 6},
    "curvature": {"task": {"look_every": 3, "depth": 2}, "steps": 6},
    "inference": {"task": {"width": 2}, "steps": 4},
    "length": {"task": {}, "steps": 30},
    "drift": {"task": {"look_every": 2}, "steps": 6},
    "gradient_shift": {"task": {"look_every": 2, "depth": 4, "width": 8}, "steps": 6},
    "landscape": {"task": {"look_every": 100, "depth": 2}, "steps": 102},
    "learning_rate": {"task": {"depth": 2}, "steps": 4},
    "noise": {"task": {"depth": 2}, "steps": 6},
}
"""Experiments that train, and a size for seconds."""


def measured(
    name: str, arm: str, seed: int = 0, per_gpu_batch_size: int | None = None, **options: Any
) -> dict[str, float]:
    """What an experiment's function returns for an arm, with other options."""
    study = load_experiment(name).study
    cell = next(c for c in study_cells(study) if c.arm == arm)
    config = replace(
        cell.config, seed=seed, task=replace(cell.config.task, options={**cell.config.task.options, **options})
    )
    config = config if per_gpu_batch_size is None else replace(config, per_gpu_batch_size=per_gpu_batch_size)
    torch.manual_seed(seed)
    return run_of(name)(Setting(config=config, out=None, resume=False))


def run_of(name: str) -> Any:
    loop = train_function(load_experiment(name).study)
    module, _, function = loop.run.partition(":")  # type: ignore[attr-defined]
    return getattr(__import__(module, fromlist=[function]), function)


# -- closed forms ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [8, 16])
def test_growth_of_a_linear_network(size: int) -> None:
    # For an infinite width; 256 units and 20 layers leave some percent, which the check's range of 1/10 allows for.
    found = measured("depth", "linear", per_gpu_batch_size=size, depth=20, width=256)
    assert found["growth"] - 1 == pytest.approx(1 / (size - 3), rel=0.5)


def test_growth_with_relu() -> None:
    found = measured("depth", "relu", per_gpu_batch_size=128, depth=20, width=256)
    assert found["growth"] == pytest.approx(math.pi / (math.pi - 1), rel=0.05)


def test_synchronized_layers_are_one_batch() -> None:
    four = measured("depth", "sync4", per_gpu_batch_size=4, depth=10, width=32)
    one = measured("depth", "relu", per_gpu_batch_size=16, depth=10, width=32)
    local = measured("depth", "local4", per_gpu_batch_size=4, depth=10, width=32)
    assert four["growth"] == pytest.approx(one["growth"], abs=1e-12)
    assert abs(local["growth"] - one["growth"]) > 0.01


@pytest.mark.parametrize("arm", ["one", "sync"])
def test_both_sides_of_the_smoothing_theorems(arm: str) -> None:
    found = measured("smoothing", arm, per_gpu_batch_size=8, trials=20)
    # Sums of tens of float64 terms, of which some cancel; eps of the layer is 1e-14.
    assert found["first"] < 1e-9
    assert found["second"] < 1e-9
    assert 0 < found["violated"] < 1


@pytest.mark.parametrize(("rate", "diverges"), [(1.9, 0.0), (2.1, 1.0)])
def test_plain_descent_has_a_largest_learning_rate(rate: float, diverges: float) -> None:
    cell = study_cells(load_experiment("least_squares").study)[0]
    options = {**cell.config.task.options, "normalized": False, "steps": 2000}
    config = replace(
        cell.config, optimizer=replace(cell.config.optimizer, lr=rate), task=replace(cell.config.task, options=options)
    )
    torch.manual_seed(0)
    found = run_of("least_squares")(Setting(config=config, out=None, resume=False))
    assert found["diverged"] == diverges
    assert (found["gap"] < 1e-6) == (not diverges)


def test_tuned_descent_is_at_least_as_fast() -> None:
    tuned = measured("least_squares", "normalized_best", steps=300)
    assert 0 < tuned["steps"] < measured("least_squares", "normalized", steps=300)["steps"] + 1


def test_the_direction_converges_at_the_rate_of_the_theorem() -> None:
    found = measured("half_spaces", "decoupled", kappa=10.0, steps=60)
    # A factor of (1 - mu / L)^2 = 0.81 a step, at most: 30 steps are 1.8e-3.
    assert found["gap"] <= found["halved"] * 0.81**30 * 1.01


@pytest.mark.parametrize(("mean", "error"), [(1.0, 0.01), (100.0, 1.0)])
def test_half_precision_loses_the_variance(mean: float, error: float) -> None:
    found = measured("precision", "squares", mean=mean)
    assert found["error"] <= error if mean == 1 else found["error"] == error
    assert measured("precision", "syncbn", mean=mean)["error"] < 1e-6  # the rounding of the float32 buffer


def test_squares_overflow() -> None:
    assert measured("precision", "squares", mean=1000.0)["finite"] == 0


def test_noise_has_the_moments_of_the_paper() -> None:
    torch.manual_seed(0)
    x = torch.ones(20_000, 400, dtype=torch.float64)
    y = Noise()(x)  # s + m
    # The means of units are spread by 0.125 and 0.5, uniformly around 1.125; the samples of a unit, by 0.1 in two ways.
    assert y.mean() == pytest.approx(1.125, abs=0.05)
    assert y.mean(0).std() == pytest.approx(math.sqrt((0.25**2 + 1) / 12), rel=0.1)
    assert y.std(0).mean() == pytest.approx(math.sqrt(0.1**2 + 0.2**2 / 12), rel=0.02)
    assert Noise().eval()(x) is x


def test_noise_stands_behind_each_normalization() -> None:
    block = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    model = noisy(nn.Sequential(block, nn.Flatten(), nn.BatchNorm1d(8), nn.Linear(8, 2)))
    kinds = [type(module) for module in model.modules()]
    assert [kinds[i + 1] for i, kind in enumerate(kinds) if kind in (nn.BatchNorm1d, nn.BatchNorm2d)] == [Noise] * 2
    assert model(torch.randn(3, 1, 4, 4)).shape == (3, 2)


def test_largest_eigenvalues() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, labels = torch.randn(12, 3, dtype=torch.float64), torch.arange(12) % 3
    names = [name for name, _ in model.named_parameters()]
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    sizes = [p.numel() for p in model.parameters()]

    def outputs(flat: torch.Tensor) -> torch.Tensor:
        parts = zip(names, flat.split(sizes), model.parameters(), strict=True)
        z: torch.Tensor = torch.func.functional_call(model, {name: part.view_as(p) for name, part, p in parts}, x)
        return z

    hessian = torch.autograd.functional.hessian(lambda w: nn.functional.cross_entropy(outputs(w), labels), flat)
    j = torch.autograd.functional.jacobian(outputs, flat)  # (samples, classes, parameters)
    p = outputs(flat).softmax(1)
    of_softmax = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    fisher = torch.einsum("nap,nab,nbq->pq", j, of_softmax, j) / len(x)
    found = largest_eigenvalues(model, x, labels)
    # Lanczos stops at 1 percent.
    assert found[0] == pytest.approx(torch.linalg.eigvalsh(hessian).flip(0)[:10].tolist(), rel=0.01)
    assert found[1] == pytest.approx(float(torch.linalg.eigvalsh(fisher)[-1]), rel=0.01)


def test_divergence_of_gaussians() -> None:
    x = torch.randn(50, 3, dtype=torch.float64)
    std = x.std(0)
    torch.testing.assert_close(divergence(x, x), torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(divergence(x, x + 2 * std), torch.full((3,), 2.0, dtype=torch.float64))
    assert divergence(x, 2 * x + std)[0] != pytest.approx(float(divergence(2 * x + std, x)[0]))


def test_shift_is_that_of_the_layers_below() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).double()
    x, labels = torch.randn(6, 4, dtype=torch.float64), torch.arange(6) % 2

    def gradient() -> torch.Tensor:
        """That of the last layer; leaves those of the others in place."""
        model.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        return torch.cat([p.grad.flatten() for p in model[2].parameters() if p.grad is not None])

    assert shift_of_gradients(model, x, labels, 0.0) == pytest.approx({"cosine": 1, "distance": 0, "relative": 0})
    found = shift_of_gradients(model, x, labels, 0.5)
    old = gradient()
    with torch.no_grad():
        for p in model[:2].parameters():
            assert p.grad is not None
            p -= 0.5 * p.grad
    new = gradient()
    distance = float((old - new).norm())
    assert distance > 1e-3
    cosine = float(nn.functional.cosine_similarity(old, new, dim=0))
    assert found == pytest.approx({"cosine": cosine, "distance": distance, "relative": distance / float(old.norm())})


def test_averages_are_constants() -> None:
    layer = AverageNorm(2, momentum=0.5).double()
    x = torch.randn(4, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    torch.testing.assert_close(layer.running_mean, 0.5 * x.detach().mean((0, 2, 3)))
    (g,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(g, (layer.running_var + 1e-5).rsqrt()[:, None, None].expand_as(x))


def test_normalized_weights_have_a_direction_alone() -> None:
    study = load_experiment("length").study
    for arm, scale_matters in (("batch", False), ("sync", False), ("none", True)):
        cell = next(c for c in study_cells(study) if c.arm == arm)
        options = {**cell.config.task.options, "train_samples": 120}
        config = replace(
            cell.config, task=replace(cell.config.task, options=options), budget=replace(cell.config.budget, steps=30)
        )
        found = run_of("length")(Setting(config=config, out=None, resume=False))
        # float64, where eps = 1e-12 counts for the smallest weights.
        assert (found["output"] > 0.1) == scale_matters
        assert scale_matters or found["output"] < 1e-6
        assert scale_matters or found["slope"] == pytest.approx(-1, abs=1e-5)
        assert scale_matters or found["orthogonal"] < 1e-6


# -- those that train --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRAINING)
def test_each_arm_trains(name: str) -> None:
    small = TRAINING[name]
    study = load_experiment(name).study
    for cell in [c for c in study_cells(study) if c.seed == study.seeds[0]][: len(study.arms)]:
        options = {**cell.config.task.options, "train_samples": 120, **small["task"]}  # type: ignore[dict-item]
        budget = replace(cell.config.budget, epochs=None, steps=small["steps"])
        config = replace(cell.config, task=replace(cell.config.task, options=options), budget=budget)
        found = run_of(name)(Setting(config=config, out=None, resume=False))
        assert all(math.isfinite(value) for value in found.values())
        assert 0 <= found["error"] <= 1


@pytest.mark.parametrize("name", ["batch_noise", "curvature", "landscape", "noise"])
def test_networks_of_the_trainer(name: str) -> None:
    """With the option ``model``, as the sizes for a GPU have it."""
    small = {**TRAINING[name]["task"], "train_samples": 60, "model": "convnet"}  # type: ignore[dict-item]
    cells = study_cells(load_experiment(name).study)
    special = {"curvature": "outputs", "noise": "noisy"}.get(name, "batch")
    config = next(cell for cell in cells if cell.arm == special).config
    options = {**config.task.options, **small, **({"look_every": 50} if name == "landscape" else {})}
    budget = replace(config.budget, epochs=None, steps=102 if name == "landscape" else 4)
    config = replace(config, task=replace(config.task, options=options), budget=budget)
    assert all(math.isfinite(value) for value in run_of(name)(Setting(config=config, out=None, resume=False)).values())


def test_looking_changes_nothing() -> None:
    """The walks along the gradient leave the training as it was."""
    from syncbn.experiments import landscape
    from syncbn.experiments.training import Perceptron, trained

    cell = study_cells(load_experiment("landscape").study)[0]
    config = replace(
        cell.config,
        budget=replace(cell.config.budget, steps=12),
        task=replace(cell.config.task, options={"train_samples": 120}),
    )
    setting = Setting(config=config, out=None, resume=False)

    def network() -> nn.Module:
        return Perceptron((784, 16, 2, 10))

    looked = trained(setting, network, lambda step, *rest: landscape._walk(*rest, 0.1) and None).result
    assert looked.losses == trained(setting, network).result.losses


# -- checks and the page -----------------------------------------------------------------------------------------------

CONTENT: dict[str, Any] = {
    "title": "Two arms",
    "source": "Nobody 2000, section 1",
    "claim": "The first is larger.",
    "paper": "A table.",
    "run": "tests.unit.test_experiments:numbers",
    "metric": {"name": "value", "percent": False},
    "base": {"task": {"options": {"shift": 0.0}}},
    "arms": {"first": {"overrides": {"task": {"options": {"shift": 3.0}}}}, "second": {}},
    "axes": {"optimizer.lr": [0.1, 0.2]},
    "seeds": [0, 1, 2],
    "checks": [
        {"text": "larger", "of": {"quantity": "value", "arm": "first", "at": {"optimizer.lr": 0.1}}, "above": 2}
    ],
}


def numbers(setting: Setting) -> dict[str, float]:
    return {"value": setting.options["shift"] + 0.1 * setting.seed + setting.config.optimizer.lr}


def figure(runs: Runs) -> Any:
    from syncbn.experiments.drawing import panels, trace

    drawn, axes = panels(runs, 1)
    for arm in runs.study.arms:
        trace(axes[0], runs, arm.name, runs.along("value", arm.name, "optimizer.lr"), marked=True)
    return drawn


def results_of(experiment: Any, tmp_path: Path) -> dict[str, RunResult]:
    train = train_function(experiment.study)
    found = {}
    for cell in study_cells(experiment.study):
        out = tmp_path / cell.key
        train(cell.config, out)  # type: ignore[call-arg]
        found[cell.key] = RunResult.from_json(out / "result.json")
    return found


@pytest.mark.parametrize(
    ("change", "words", "agreement"),
    [
        ({"above": 2}, "3.2 (2.95 to 3.45)", "agrees"),
        ({"above": 3.1}, "3.2 (2.95 to 3.45)", "open"),
        ({"above": 2, "below": 2.5}, "3.2 (2.95 to 3.45)", "disagrees"),
        ({"minus": {"quantity": "value", "arm": "second", "at": {"optimizer.lr": 0.1}}, "below": 3.5}, "3", "agrees"),
        (
            {"over": {"quantity": "value", "arm": "second", "at": {"optimizer.lr": 0.1}}, "above": 100},
            "19.",
            "disagrees",
        ),
        ({"of": {"quantity": "other", "arm": "first", "at": {"optimizer.lr": 0.1}}, "above": 0}, "–", "open"),
    ],
)
def test_checks(change: dict[str, Any], words: str, agreement: str, tmp_path: Path) -> None:
    check = {key: value for key, value in CONTENT["checks"][0].items() if key != "above"} | change
    experiment = experiment_from_dict({**CONTENT, "checks": [check]}, "two", "two.yaml")
    found = measure(
        experiment.checks[0], Runs(experiment.study, study_cells(experiment.study), results_of(experiment, tmp_path))
    )
    assert found.words.startswith(words)
    assert found.agreement == agreement


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"checks": []}, "two.yaml: checks: got [], expected a list of checks"),
        ({"checks": [{**CONTENT["checks"][0], "above": "2"}]}, "two.yaml: checks[0].above: got '2', expected a number"),
        (
            {"checks": [{"text": "x", "of": {"quantity": "value", "arm": "third"}, "above": 1}]},
            "two.yaml: checks[0].of.arm: got 'third', expected one of first, second",
        ),
        (
            {"checks": [{"text": "x", "of": {"quantity": "value", "arm": "first"}, "above": 1}]},
            "two.yaml: checks[0].of.at: got {}, expected values of the axes (optimizer.lr) that name one point",
        ),
        (
            {"checks": [{key: value for key, value in CONTENT["checks"][0].items() if key != "above"}]},
            "expected `above`, `below` or both",
        ),
    ],
)
def test_mistakes(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        experiment_from_dict(CONTENT | change, "two", "two.yaml")
    assert message in str(error.value)


def test_larger_sizes_are_merged() -> None:
    content = {**CONTENT, "larger": {"base": {"task": {"options": {"more": 1}}}, "seeds": [5]}}
    study = experiment_from_dict(content, "two", "two.yaml", larger=True).study
    assert study.seeds == (5,)
    assert study.base["task"]["options"] == {"shift": 0.0, "more": 1}
    with pytest.raises(ConfigError, match="larger: got nothing"):
        experiment_from_dict(CONTENT, "two", "two.yaml", larger=True)


def test_page(tmp_path: Path) -> None:
    experiment = experiment_from_dict(CONTENT, "two", "two.yaml")
    results = results_of(experiment, tmp_path)
    page = write_experiment(experiment, results, tmp_path, command="syncbn experiment two").read_text()
    assert "Of 1 check, 1 agrees." in page
    for words in ("Two arms", "Nobody 2000, section 1", "3.2 (2.95 to 3.45)", "<svg", "syncbn experiment two"):
        assert words in page
    head, line = (tmp_path / "checks.csv").read_text().splitlines()
    assert head == "check,expected,mean,low,high,seeds,agrees"
    check, expected, *numbers, seeds, agrees = line.split(",")
    assert (check, expected, seeds, agrees) == ("larger", "above 2", "3", "agrees")
    # 3.2 and Student's t for 2 degrees of freedom times a standard deviation of 0.1 over sqrt(3).
    assert list(map(float, numbers)) == pytest.approx([3.2, 3.2 - 0.2484, 3.2 + 0.2484], abs=1e-4)
    some = dict(list(results.items())[:2])
    page = write_experiment(experiment, some, tmp_path, command="x").read_text()
    assert "2 of 12 runs are done" in page
    assert "not decided" in page


def test_every_experiment_can_be_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["experiment", "list"]) == 0
    said = capsys.readouterr().out
    for name in experiment_names():
        experiment = load_experiment(name)
        assert f"{name:<16}{experiment.study.title} ({experiment.source})" in said
        assert len(experiment.study.seeds) >= 5
        assert callable(experiment.figure)


EXACT = {"half_spaces", "least_squares", "precision", "smoothing"}
"""Experiments of a size that does not matter."""


@pytest.mark.parametrize("name", experiment_names())
def test_sizes_for_a_gpu(name: str) -> None:
    if name in EXACT:
        with pytest.raises(ConfigError, match="the sizes for a GPU"):
            load_experiment(name, larger=True)
        return
    small, large = load_experiment(name), load_experiment(name, larger=True)
    assert large.checks == small.checks
    assert "not been run" in large.study.notes
    assert large.study.base["device"] == "auto"
    assert large.study.base["task"]["options"] != small.study.base["task"]["options"]


# -- the kept results --------------------------------------------------------------------------------------------------


def test_the_documentation_has_the_kept_results() -> None:
    page = experiment_table.PAGE.read_text()
    assert page == experiment_table.written(page), "run: python tests/experiment_table.py"


def test_the_kept_pages_are_those_of_the_experiments() -> None:
    folders = sorted(path for path in experiment_table.RESULTS.iterdir() if path.is_dir())
    assert [path.name for path in folders] == experiment_names()
    for path in folders:
        assert sorted(file.name for file in path.iterdir()) == sorted(experiment_table.KEPT)
        found = experiment_table.kept(load_experiment(path.name))
        assert verdict(found) in (path / "experiment.html").read_text()
        # The checks of deterministic quantities have seeds as well.
        assert all(m.seeds >= 5 for m in found), path.name
    files = [file for path in folders for file in path.iterdir()]
    assert sum(file.stat().st_size for file in files) < 5e6


def test_other_checks_than_the_kept_ones_are_noticed(tmp_path: Path) -> None:
    experiment = load_experiment("depth")
    changed = replace(experiment.checks[0], below=2.0)
    with pytest.raises(ValueError, match="the check is now"):
        experiment_table.kept(replace(experiment, checks=(changed, *experiment.checks[1:])))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "small.yaml"
    source = Path(__file__).parents[2] / "configs" / "experiments" / "precision.yaml"
    text = (
        source.read_text()
        .replace("seeds: [0, 1, 2, 3, 4]", "seeds: [0, 1]")
        .replace("[fp16, bf16, fp32]", "[fp16, fp32]")
    )
    path.write_text(text)
    assert main(["experiment", str(path), "--out", str(tmp_path / "out"), "--workers", "1"]) == 0
    said = capsys.readouterr().out
    assert "page: " in said
    assert (tmp_path / "out" / "experiment.html").exists()
    assert main(["experiment", str(path), "--out", str(tmp_path / "out"), "--workers", "1"]) == 0
    assert "0 runs in" in capsys.readouterr().out
    assert main(["experiment", "smoothing", "--out", str(tmp_path / "out")]) == 2
    assert "expected a new folder, or that of smoothing; it holds small" in capsys.readouterr().err
    assert main(["experiment", "nothing"]) == 2
    assert "experiment: got 'nothing', expected an existing YAML file or the name of" in capsys.readouterr().err
