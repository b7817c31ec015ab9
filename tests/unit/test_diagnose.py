"""What ``syncbn diagnose`` says of trained models, and of folders that hold none."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch

from syncbn.population import LayerDivergence
from syncbn.train.advice import advice
from syncbn.train.config import ConfigError, config_from_dict
from syncbn.train.diagnosis import Diagnosis, diagnose
from syncbn.train.loop import train
from syncbn.train.result import Metric

RUN = {
    "gpus": 8,
    "per_gpu_batch_size": 4,
    "data": {"name": "digits", "train_samples": 300, "class_skew": 4},
    "model": {"width": 4},
    "budget": {"epochs": 2},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, train(config_from_dict(RUN), folder)


def test_a_run_that_diverged_is_not_diagnosed(run, tmp_path):
    folder, result = run
    shutil.copytree(folder, tmp_path / "run")
    replace(result, status="diverged").to_json(tmp_path / "run" / "result.json")
    with pytest.raises(ConfigError, match=r"checkpoint: got '.*', expected a run that did not diverge"):
        diagnose(tmp_path / "run", samples=32)


def test_the_table_of_a_trained_model(run, capsys):
    folder, result = run
    found = diagnose(folder, samples=256)
    assert list(found.layers) == [1, 2, 4, 8, 16, 32]
    assert [e["statistics"] for e in found.evaluations] == ["running", "batch", "population", "population"]
    assert found.evaluations[0]["test"] == result.test
    for name in ("layer1.norm", "layer6.norm"):
        divergences = [next(x for x in found.layers[size] if x.layer == name).kl for size in found.layers]
        assert divergences == sorted(divergences, reverse=True), "a larger batch is nearer to the population"
    # The samples of a batch are of one class: worth less than as many of any class.
    assert found.layers[4][-1].effective < found.shuffled[-1].effective
    found.print()
    printed = capsys.readouterr().out
    assert "layer6.norm" in printed
    assert "4*" in printed
    assert "test error with population statistics (total, 256 samples)" in printed
    assert torch.get_default_dtype() is torch.float32


def test_sizes_are_the_users_and_the_runs_own(run):
    assert list(diagnose(run[0], samples=64, sizes=[2, 128]).layers) == [2, 4]


def layer(effective, name="a", kl=0.1, running_kl=0.0):
    return LayerDivergence(layer=name, count=8, kl=kl, effective=effective, running_kl=running_kl, channels=4, dead=0)


def diagnosis(layers, shuffled, running=0.1, batch=0.1, population=0.1, test_samples=1000):
    kinds = [("running", None, running), ("batch", None, batch)]
    kinds += [("population", "mean", population), ("population", "total", population)]
    evaluations = [{"statistics": s, "estimator": e, "samples": 9, "test": {"error": x}} for s, e, x in kinds]
    return Diagnosis(
        title="convnet, norm batch",
        trained_at=2,
        samples=64,
        layers=layers,
        shuffled=shuffled,
        metric=Metric("error", of_samples=True),
        evaluations=evaluations,
        test_samples=test_samples,
    )


def test_advice_follows_the_figures():
    fine = [layer(100.0)]
    assert advice(diagnosis({2: fine}, fine)) == ["Nothing here suggests that small batches harmed this model."]
    (words,) = advice(diagnosis({2: fine}, fine, running=0.3))
    assert words.startswith("Estimation: with population statistics the error is 10.0 % and not 30.0 %")
    (words,) = advice(diagnosis({2: fine}, fine, running=0.8, population=0.8, batch=0.2))
    assert words.startswith("Mismatch: with the statistics of its own batches of 2 the error is 20.0 %, with fixed")
    (words,) = advice(diagnosis({2: [layer(40.0)]}, fine))
    assert words.startswith("Order: a shuffled batch of 2 would have 2 times")
    (words,) = advice(diagnosis({1: [layer(3.0)], 2: [layer(8.0)], 4: [layer(15.0)], 8: [layer(30.0)]}, [layer(8.0)]))
    assert "1 of 1 layers have fewer than 16 effective samples (a). 8 are enough: synchronize over 4 GPUs" in words
    (words,) = advice(diagnosis({2: [layer(8.0)]}, [layer(8.0)]))
    assert "No size tried is enough" in words
    unknown = [layer(None)]  # no divergence to speak of
    assert advice(diagnosis({2: unknown}, unknown))[0].startswith("Nothing")


NOTHING = ["Nothing here suggests that small batches harmed this model."]


@pytest.mark.parametrize(
    ("metric", "score", "shown"),
    [
        (Metric("map", higher_is_better=True), 0.0, "map is 0.0 %"),
        (Metric("reward", higher_is_better=True, percent=False), 0.0, "reward is 0"),
        (Metric("error"), 1.0, "error is 100.0 %"),
        (Metric("error"), 0.0, None),
        (Metric("loss", percent=False), 1.0, None),
        (Metric("map", higher_is_better=True), 1.0, None),
    ],
)
def test_scores_that_are_all_the_worst_tell_nothing(metric, score, shown):
    fine = [layer(100.0)]
    found = diagnosis({2: fine}, fine)
    evaluations = [{**entry, "test": {metric.name: score}} for entry in found.evaluations]
    words = advice(replace(found, metric=metric, evaluations=evaluations))
    if shown is None:
        assert words == NOTHING
    else:
        assert words[0].startswith(f"Scores: the {shown} with all kinds of statistics, the worst that it can be.")
        assert len(words) == 1
        evaluations[1] = {**evaluations[1], "test": {metric.name: 0.5}}
        other = advice(replace(found, metric=metric, evaluations=evaluations))
        assert not any(sentence.startswith("Scores") for sentence in other)


def test_running_statistics_that_are_far_off():
    """Nothing is said of what a batch of 16 independent values would be closer than."""
    near = [layer(100.0, running_kl=0.06)]
    assert advice(diagnosis({2: near}, near)) == NOTHING
    behind = [layer(100.0, running_kl=0.3), layer(100.0, "b")]
    (words,) = advice(diagnosis({2: behind}, behind))
    assert words.startswith("Running: in 1 of 2 layers the running statistics are as far from those of the training")
    assert "(a; KL at most 0.3). In layer a, a single batch of 2 is less than half as far" in words
    assert "A larger momentum" in words
    assert words.endswith("The test scores do not show a loss by that.")
    short = [layer(100.0, running_kl=0.15)]
    (words,) = advice(diagnosis({2: short}, short))
    assert "They average too few batches, which a smaller momentum mends, or batches that are small or" in words
    assert "less than half" not in words
    (words,) = advice(replace(diagnosis({2: behind}, behind), trained_at=None))
    assert "or have not followed the weights. Population" in words, "what a batch of the training is, is not known"
    assert advice(replace(diagnosis({2: behind}, behind), uses={"a": 2}))[0].startswith("Shared")
    lost, words = advice(diagnosis({2: behind}, behind, running=0.3))
    assert lost.startswith("Estimation")
    assert "do not show" not in words
    (words,) = advice(replace(diagnosis({2: behind}, behind), evaluations=[], metric=None))
    assert "The test scores" not in words, "there are none"


def test_what_cannot_be_diagnosed(tmp_path):
    with pytest.raises(ConfigError, match=r"checkpoint: got .*model\.safetensors or a checkpoint"):
        diagnose(tmp_path)
    train(config_from_dict({**RUN, "norm": {"name": "group", "groups": 2}}), tmp_path)
    with pytest.raises(ConfigError, match="batch statistics, not group"):
        diagnose(tmp_path)


def test_mistaken_sizes(run):
    with pytest.raises(ConfigError, match="samples"):
        diagnose(run[0], samples=1)
    with pytest.raises(ConfigError, match="batch sizes"):
        diagnose(run[0], sizes=[0])


def test_networks_that_end_in_single_values(tmp_path):
    """1x1 maps: a batch of one has no variance, so the default sizes begin at two; asked for, it is a mistake."""
    config = {**RUN, "model": {"name": "resnet18"}, "budget": {"epochs": None, "steps": 1}}
    train(config_from_dict(config), tmp_path)
    assert min(diagnose(tmp_path, samples=32).layers) == 2
    with pytest.raises(ConfigError, match="sizes: got 1, expected a batch that every layer can normalize"):
        diagnose(tmp_path, samples=32, sizes=[1])
    with pytest.raises(ConfigError, match="samples: got 3, expected at least 4"):
        diagnose(tmp_path, samples=3)


def test_a_claim_needs_more_than_the_noise_of_the_test_set():
    """Three points are noise on 200 samples and not on 20,000; a tenth of a point never matters."""
    fine = {2: [layer(100.0)]}
    nothing = ["Nothing here suggests that small batches harmed this model."]
    few = diagnosis(fine, fine[2], running=0.13, test_samples=200)
    assert advice(few) == nothing
    (words,) = advice(replace(few, test_samples=20_000))
    assert words.startswith("Estimation: with population statistics the error is 10.0 % and not 13.0 %")
    assert "(better by 3.0 points, 95 % interval 2.4 to 3.6, on 20000 test samples)" in words
    assert advice(diagnosis(fine, fine[2], running=0.101, test_samples=10_000_000)) == nothing
    assert advice(diagnosis(fine, fine[2], batch=0.07, test_samples=200)) == nothing
    (words,) = advice(diagnosis(fine, fine[2], batch=0.07, test_samples=20_000))
    assert words.startswith("Mismatch: with the statistics of its own batches of 2 the error is 7.0 %")
    assert "95 % interval 2." in words


def pairs(right):
    """Totals and counts of samples, of which the first ``right`` have an error of 0."""
    errors = torch.ones(200, dtype=torch.float64)
    errors[:right] = 0
    return torch.stack((errors, torch.ones_like(errors)), 1).unsqueeze(2)


def test_the_same_samples_tell_more_than_two_scores():
    fine = {2: [layer(100.0)]}
    found = diagnosis(fine, fine[2], running=0.13, test_samples=200)
    same = {"running": pairs(174), "batch": pairs(180), "mean": pairs(180), "total": pairs(180)}
    (words,) = advice(replace(found, per_sample=same))
    assert "Estimation" in words
    assert "better by 3.0 points" in words
    # As many are right, but others: a difference between samples, not between statistics.
    others = {**same, "mean": same["mean"].flip(0), "total": same["total"].flip(0), "batch": same["running"]}
    assert len(advice(replace(found, per_sample=others))) == 1
    assert advice(replace(found, per_sample=others))[0].startswith("Nothing")


def test_a_metric_whose_noise_is_not_known_is_said_to_be_uncertain():
    fine = {2: [layer(100.0)]}
    found = replace(diagnosis(fine, fine[2], running=0.3), metric=Metric("error"))
    assert found.gain("running", "total") is None
    (words,) = advice(found)
    assert "(which may be noise of the test set, as the values of its samples are not known)" in words


def test_the_samples_of_a_run_are_known(run):
    """All kinds of statistics have the errors of the same test samples, though batches come in another order."""
    found = diagnose(run[0], samples=256)
    assert found.per_sample.keys() == {"running", "batch", "mean", "total"}
    for kind, each in found.per_sample.items():
        assert each.shape == (run[1].test_samples, 2, 1)
        assert float(each[:, 0].mean()) == pytest.approx(found.scores[kind])
    wrong = {kind: each[:, 0, 0] for kind, each in found.per_sample.items()}
    assert (wrong["mean"] == wrong["total"]).float().mean() > 0.9, "paired by sample"


def test_an_error_of_the_data_is_not_taken_for_a_size(run, monkeypatch):
    from syncbn.train import diagnosis as module
    from syncbn.train.config import LocalError

    def broken(*args):
        raise LocalError("data.root: got 'x.png'")

    monkeypatch.setattr(module, "batch_loader", broken)
    with pytest.raises(LocalError, match=r"data\.root"):
        diagnose(run[0], samples=64)
