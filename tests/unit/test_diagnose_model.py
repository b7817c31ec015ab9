"""The diagnosis of models that no run of this package made, and that they are left as they were."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import syncbn
from syncbn.population import gaussian_divergence
from syncbn.train import Metric, diagnose_model
from syncbn.train.config import ConfigError

ACCURACY = Metric("accuracy", higher_is_better=True, of_samples=True)


def network(layer=nn.BatchNorm2d):
    torch.manual_seed(0)
    convs = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3)
    model = nn.Sequential(convs[0], layer(6), nn.ReLU(), nn.Dropout(0.5), convs[1], layer(4), nn.Flatten())
    model(torch.randn(16, 3, 8, 8))  # running statistics of other data
    return model


def images(n=128, seed=1, size=8):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed)) + 2


def snapshot(model):
    """Everything that a diagnosis could change."""
    modules = {
        name: (type(m), m.training, list(m._forward_pre_hooks), list(m._forward_hooks), getattr(m, "sample_groups", 0))
        for name, m in model.named_modules()
    }
    observers = [getattr(m, "observer", None) for m in model.modules()]
    return modules, observers, {k: v.clone() for k, v in (*model.named_buffers(), *model.named_parameters())}


def same(before, after):
    keys = before[2].keys() == after[2].keys()
    return before[:2] == after[:2] and keys and all(torch.equal(v, after[2][k]) for k, v in before[2].items())


LAYERS = {
    "torch": nn.BatchNorm2d,
    "sync": syncbn.SyncBatchNorm,
    "ghost": lambda c: syncbn.GhostBatchNorm(c, 2),
    "renorm": syncbn.BatchRenorm,
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("training", [True, False])
def test_the_table_and_that_the_model_is_left_as_it_was(kind, training, capsys):
    model = network(LAYERS[kind]).train(training)
    model[1].train(not training)
    before = snapshot(model)
    found = diagnose_model(model, images().split(20), trained_at=4)
    assert same(before, snapshot(model))
    assert list(found.layers) == [1, 2, 4, 8, 16]
    assert [x.layer for x in found.layers[4]] == ["1", "5"]
    assert [x.count for x in found.layers[4]] == [4 * 36, 4 * 16]
    for place in (0, 1):
        kl = [layers[place].kl for layers in found.layers.values()]
        assert kl == sorted(kl, reverse=True), "a larger batch is nearer to the population"
    found.print()
    printed = capsys.readouterr().out
    assert "Sequential, trained with 4 samples per mean; measured on 128 training samples" in printed
    assert "4*" in printed


def test_every_size_is_measured_on_whole_batches_of_that_size():
    """Independent numbers: the divergence is the closed form of batches of that many, whatever the loader's batches."""
    layer = nn.BatchNorm1d(32)
    x = torch.randn(4096, 32, generator=torch.Generator().manual_seed(0))
    found = diagnose_model(layer, x.split(100), sizes=[4, 16, 64], samples=4096)
    for size, (only,) in found.layers.items():
        assert only.count == size
        assert only.kl == pytest.approx(gaussian_divergence(size), rel=0.1)  # 64 batches of 32 channels at the least


def test_layers_of_this_package_group_as_asked_and_not_by_their_own_options():
    x = images()
    torchs, ghosts = (diagnose_model(network(LAYERS[kind]), [x], sizes=[8]) for kind in ("torch", "ghost"))
    for one, other in zip(torchs.layers[8], ghosts.layers[8], strict=True):
        assert (one.count, one.kl) == pytest.approx((other.count, other.kl), rel=1e-4)


def test_volumes():
    model = nn.Sequential(nn.Conv3d(1, 4, 3), nn.BatchNorm3d(4), nn.ReLU())
    found = diagnose_model(model, torch.randn(32, 1, 5, 5, 5).split(4))
    assert list(found.layers) == [1, 2, 4]
    assert found.layers[2][0].count == 2 * 27
    assert found.trained_at is None


class Twice(nn.Module):
    """One layer for two inputs of different scale, as a head that all levels of a pyramid share."""

    def __init__(self):
        super().__init__()
        self.norm, self.other = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(x), self.norm(5 * x + 7), self.other(x)


def test_a_layer_that_is_applied_twice():
    model = Twice()
    found = diagnose_model(model, [images(256)], sizes=[32])
    assert [x.layer for x in found.layers[32]] == ["norm", "other"]
    assert found.uses == {"norm": 2}
    assert found.layers[32][0].effective < 16 < found.layers[32][1].effective
    running, words = found.advice
    assert running.startswith("Running: in 1 of 1 layers"), "which were never estimated; of the shared one, who knows"
    assert words.startswith("Shared: norm is applied 2 times in each forward pass")


class Regions(nn.Module):
    """As the heads of a detector: the rows of the layer are not samples."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x):
        return self.norm(x.repeat_interleave(3, 0))


@pytest.mark.parametrize("convert", [False, True])
def test_rows_that_are_not_samples(convert):
    model = syncbn.convert(Regions(), "ghost", ghost_batch_size=3) if convert else Regions()
    found = diagnose_model(model, [torch.randn(64, 4)], sizes=[2, 4])
    assert [found.layers[size][0].count for size in (2, 4)] == [6, 12]


def test_pairs_dictionaries_and_several_arguments():
    model = network()
    x, y = images(), torch.arange(128)
    loader = DataLoader(TensorDataset(x, y), batch_size=10)
    plain = diagnose_model(model, [x]).layers
    assert diagnose_model(model, loader, forward=lambda model, batch: model(batch[0])).layers == plain
    trees = ({"x": part, "y": [part.mean((1, 2, 3))]} for part in x.split(7))
    assert diagnose_model(model, trees, forward=lambda model, batch: model(batch["x"])).layers == plain
    model.forward = lambda a, b: nn.Sequential.forward(model, a + b)
    assert diagnose_model(model, zip((x - 1).split(8), torch.ones_like(x).split(8), strict=True)).samples == 128


def test_as_many_samples_as_are_asked_for():
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield images(10)

    assert diagnose_model(network(), endless(), samples=64).samples == 64
    assert len(taken) == 7
    assert diagnose_model(network(), [images(40)], samples=64).samples == 40


@pytest.mark.parametrize(
    ("batches", "options", "message"),
    [
        ([], {}, "batches: got '0 samples', expected at least 2 samples"),
        ([images(1)], {}, "batches: got '1 samples', expected at least 2 samples"),
        ([images(0)], {}, "batches: got '0 samples'"),
        ([images(16)], {"sizes": [9]}, "sizes: got 9, expected from 1 to 8, as the divergence is that of several"),
        ([images(16)], {"sizes": [0]}, "sizes: got 0"),
        ([images(16)], {"sizes": []}, r"sizes: got \[\], expected at least one"),
        ([images(16)], {"trained_at": 16}, "trained_at: got 16, expected from 1 to 8"),
        ([images(16)], {"samples": 1}, "samples: got 1"),
        ([[images(16), torch.zeros(16)]], {}, "batches: got 'list', expected tensors .*; or give `forward`"),
        ([(images(16), torch.zeros(3))], {}, r"batches: got \[3, 16\], expected tensors that all have the samples"),
        ([images(16)], {"evaluate": lambda model: 0.5}, "metric: got nothing, expected a syncbn.train.Metric"),
        ([images(16)], {"metric": ACCURACY}, "metric: got Metric"),
        ([images(16)], {"metric": ACCURACY, "evaluate": lambda m: math.nan}, "evaluate: got nan"),
        ([images(16)], {"metric": ACCURACY, "evaluate": lambda m: "good"}, "evaluate: got 'good'"),
        ([images(16)], {"metric": ACCURACY, "evaluate": lambda m: images(2)}, "evaluate: got 'a torch.float32 tensor"),
    ],
)
def test_mistakes(batches, options, message):
    model = network()
    before = snapshot(model)
    with pytest.raises(ConfigError, match=message):
        diagnose_model(model, batches, **options)
    assert same(before, snapshot(model))


def test_a_model_without_statistics_and_an_error_of_the_model():
    with pytest.raises(ConfigError, match="model: got 'Linear', expected a model with batch normalization that keeps"):
        diagnose_model(nn.Linear(2, 2), [torch.ones(4, 2)])
    model = network(syncbn.SyncBatchNorm)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="channels"):
        diagnose_model(model, [torch.randn(16, 2, 8, 8)])
    assert same(before, snapshot(model))


@pytest.mark.parametrize("layer", [nn.BatchNorm2d, syncbn.SyncBatchNorm])
def test_maps_of_one_value(layer):
    """A batch of one sample has no variance there: by default that size is left out; asked for, it is a mistake."""
    x = images(64, size=5)  # the second layer sees maps of 1x1
    model = network(layer)
    assert min(diagnose_model(model, [x]).layers) == 2
    before = snapshot(model)
    for option in ({"sizes": [1, 2]}, {"trained_at": 1}):
        with pytest.raises(ConfigError, match=r"sizes: got 1, expected a batch that every layer can normalize .*'5'"):
            diagnose_model(model, [x], **option)
    with pytest.raises(ConfigError, match="sizes: got 1"):
        diagnose_model(model, [x[:3]])
    assert same(before, snapshot(model))


def test_the_process_group_of_several_is_refused(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 2)
    with pytest.raises(ConfigError, match="expected one process"):
        diagnose_model(network(), [images()])


# ---- scores


class Threshold(nn.Module):
    """Positive where the normalized input is: right with statistics of the data, wrong with those it starts with."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(1, affine=False)

    def forward(self, x):
        return self.norm(x).squeeze(1)


def thresholded(n):
    x = 10 + torch.randn(n, 1, generator=torch.Generator().manual_seed(n))
    return x, (x > 10).squeeze(1)


def right(x, y):
    def evaluate(model):
        model.eval()  # as an evaluation usually begins
        return ((model(x) > 0) == y).double()

    return evaluate


def test_statistics_that_were_never_estimated():
    model, (x, y) = Threshold(), thresholded(400)
    before = snapshot(model)
    found = diagnose_model(model, [x], evaluate=right(x, y), metric=ACCURACY, trained_at=8)
    assert same(before, snapshot(model))
    assert found.scores["running"] == pytest.approx(0.5, abs=0.1), "all are positive"
    assert found.scores["batch"] > 0.9, "though evaluate() calls model.eval()"
    assert found.scores["mean"] > 0.9
    assert found.scores["total"] > 0.9
    assert found.evaluated_at == 400
    assert found.advice[0].startswith("Estimation: with population statistics the accuracy is 9")
    assert "95 % interval" in found.advice[0]
    assert "on 400 test samples" in found.advice[0]
    assert not any(words.startswith("Mismatch") for words in found.advice)
    running = next(words for words in found.advice if words.startswith("Running"))
    assert "in 1 of 1 layers" in running
    assert "have not followed the weights, or are of other data" in running
    syncbn.update_population_statistics(model, [x])
    again = diagnose_model(model, [x], evaluate=right(x, y), metric=ACCURACY, trained_at=8)
    assert not any(words.startswith("Running") for words in again.advice)


def test_the_same_on_a_test_set_that_is_too_small_to_tell():
    """Three of four samples differ: not beyond the noise of four samples."""
    (x, y), (train, _) = thresholded(400), thresholded(300)
    some = torch.cat((x[~y][:3], x[y][:1])), torch.tensor([False] * 3 + [True])
    found = diagnose_model(Threshold(), [train], evaluate=right(*some), metric=ACCURACY)
    assert found.scores["total"] - found.scores["running"] >= 0.5
    assert not any(words.startswith("Estimation") for words in found.advice)


def test_scores_without_those_of_the_samples_are_said_to_be_uncertain(capsys):
    model, (x, y) = Threshold(), thresholded(400)
    each = right(x, y)
    found = diagnose_model(model, [x], evaluate=lambda m: float(each(m).mean()), metric=ACCURACY)
    assert found.per_sample == {}
    assert "(which may be noise of the test set, as the values of its samples are not known)" in found.advice[0]
    found.print()
    assert "test accuracy with running statistics: 5" in capsys.readouterr().out


def test_a_model_that_uses_its_batch():
    """The label is whether a sample is above the mean of its own pair."""
    x = 10 * torch.randn(200, 1, generator=torch.Generator().manual_seed(3)).repeat_interleave(2, 0)
    x = x + torch.tensor([[1.0], [-1.0]]).repeat(200, 1)
    y = torch.tensor([True, False]).repeat(200)

    def evaluate(model):
        return torch.cat([right(*pair)(model) for pair in zip(x.split(2), y.split(2), strict=True)])

    found = diagnose_model(Threshold(), [x], evaluate=evaluate, metric=ACCURACY, trained_at=2)
    assert found.scores["batch"] == 1
    assert found.evaluated_at == 2
    mismatch = next(words for words in found.advice if words.startswith("Mismatch"))
    assert "its own batches of 2 the accuracy is 100.0 %" in mismatch


def test_an_order_of_batches_that_are_alike_is_seen():
    x = images(256)
    x += 5 * torch.arange(16).repeat_interleave(16).view(-1, 1, 1, 1)  # batches of 16 of one kind
    found = diagnose_model(network(), x.split(16), trained_at=16)
    assert any(words.startswith("Order: a shuffled batch of 16") for words in found.advice)
    mixed = x[torch.randperm(256, generator=torch.Generator().manual_seed(0))]
    found = diagnose_model(network(), mixed.split(16), trained_at=16)
    assert not any(words.startswith("Order") for words in found.advice)


def test_evaluation_with_batches_that_cannot_be_normalized():
    model = network()
    x = images(64, size=5)
    found = diagnose_model(
        model, [x], evaluate=lambda m: float(torch.stack([m(i[None]) for i in x]).mean()), metric=Metric("mean")
    )
    assert found.scores["batch"] is None
    assert found.scores["running"] is not None


def test_renormalized_models_have_no_score_of_their_batches():
    found = diagnose_model(network(syncbn.BatchRenorm), [images()], evaluate=lambda m: 0.5, metric=ACCURACY)
    assert sorted(found.scores) == ["mean", "running", "total"]
