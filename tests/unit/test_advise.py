"""Advice before training: the alignment against plain torch in float64, the rule, and what the command says."""

from __future__ import annotations

import itertools
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from task_cases import Sign
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from syncbn.advise import Advice, Remedy, advise, try_nearest
from syncbn.advise.remedies import ENOUGH, LITTLE, group_sizes
from syncbn.advise.trial import nearest
from syncbn.advise.words import sentences
from syncbn.bench.growth import LINKS
from syncbn.cli import main
from syncbn.experiments.advice import Foretold, aligned, judge, lines, validate
from syncbn.experiments.advice import run as trained
from syncbn.study import Setting
from syncbn.train import RunConfig, load_config, train
from syncbn.train.config import BudgetConfig, ConfigError, NormConfig, OptimizerConfig
from syncbn.train.data.order import order_of

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = 32


def config(**values: Any) -> RunConfig:
    return RunConfig(**{"gpus": 8, "per_gpu_batch_size": 4, "precision": "fp64", "device": "cpu", **values})


def advice(*alignments: float | None) -> Advice:
    remedies = [
        Remedy(gpus=2**i, normalization_batch_size=4 * 2**i, alignment=value, exchange_ms=0.1 * i)
        for i, value in enumerate(alignments)
    ]
    return Advice(
        title="net", layers=2, remedies=remedies, needed=None, step_ms=1.0, link=LINKS[0], device="cpu", samples=128
    )


def test_alignment_is_that_of_plain_torch() -> None:
    made: list[nn.Module] = []

    class Kept(Sign):
        def model(self) -> nn.Module:
            model = super().model()
            made.append(model)
            return model

    found = advise(config(gpus=4), task=Kept(), steps=0, samples=SAMPLES, probes=2)
    ours = made[0]
    plain = Sign().model().double()
    plain.load_state_dict(ours.state_dict())  # the weights are as they were at first
    order = order_of(64, None, 1, 0, 0)  # of the first epoch, which has two probes of 32
    data = Sign().data(0).train
    x, y = (torch.stack(each) for each in zip(*(data[i] for i in order), strict=True))

    def gradients(size: int) -> list[Tensor]:
        plain.zero_grad()
        for part, labels in zip(x.double().split(size), y.split(size), strict=True):
            nn.functional.cross_entropy(plain(part), labels, reduction="sum").backward()
        return [layer.weight.grad.flatten() for layer in plain if isinstance(layer, nn.Linear)]

    whole = gradients(SAMPLES)
    for remedy in found.remedies:
        pairs = zip(gradients(remedy.normalization_batch_size), whole, strict=True)
        expected = torch.stack([nn.functional.cosine_similarity(a, b, dim=0) for a, b in pairs]).mean()
        # Sums of 64 samples in another order.
        assert remedy.alignment == pytest.approx(float(expected), abs=1e-12)
    assert [remedy.gpus for remedy in found.remedies] == [1, 2, 4]
    alignments = [remedy.alignment for remedy in found.remedies]
    assert all(small < large for small, large in pairwise(alignments)), alignments


def test_nothing_of_the_model_changes() -> None:
    made: list[tuple[nn.Module, dict[str, Tensor]]] = []

    class Kept(Sign):
        def model(self) -> nn.Module:
            model = super().model()
            made.append((model, {name: t.clone().double() for name, t in model.state_dict().items()}))
            return model

    advise(config(), task=Kept(), steps=0, samples=SAMPLES, probes=1)
    model, before = made[0]
    assert all(torch.equal(t.double(), before[name]) for name, t in model.state_dict().items())


def test_it_is_measured_after_some_steps_of_all_gpus() -> None:
    at_first, later = (advise(config(), task=Sign(), steps=steps, samples=SAMPLES).remedies for steps in (0, 10))
    assert at_first[0].alignment != later[0].alignment


def test_no_size_is_compared_with_itself() -> None:
    found = advise(config(gpus=16), task=Sign(), steps=0, samples=2)  # a global batch is all of the 64 samples
    assert found.samples == 64
    assert [remedy.harm == "not measured" for remedy in found.remedies] == [False, False, False, False, True]
    assert advise(config(gpus=2), task=Sign(), steps=0, samples=2).samples == 16  # two global batches


class Folded(Sign):
    """Its second layer has two rows for each sample."""

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Linear(4, 8), nn.Unflatten(1, (2, 4)), nn.Flatten(0, 1), nn.BatchNorm1d(4),
            nn.Unflatten(0, (-1, 2)), nn.Flatten(1), nn.Linear(8, 2),
        )  # fmt: skip


class Plain(Sign):
    """It has no batch normalization."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.GroupNorm(2, 8), nn.Linear(8, 2))


class Repeated(Sign):
    """A part of it is computed again in the backward pass, in the way that autograd.grad refuses."""

    def outputs(self, model: Any, inputs: Any, targets: Any) -> Any:
        return checkpoint(model, inputs.requires_grad_(), use_reentrant=True)


def test_rows_that_are_no_samples_are_named() -> None:
    with pytest.raises(
        ConfigError, match=r"task.name: got 'Folded', expected a model whose layers all have samples as"
    ):
        advise(config(), task=Folded(), steps=0, samples=SAMPLES)


def test_a_model_without_batch_normalization_is_named() -> None:
    with pytest.raises(ConfigError, match=r"task.name: got 'Plain', expected a task whose model has BatchNorm layers"):
        advise(config(), task=Plain(), steps=0, samples=SAMPLES)


def test_reentrant_checkpoints() -> None:
    repeated, plain = (advise(config(), task=task, steps=0).remedies[0].alignment for task in (Repeated(), Sign()))
    assert repeated == pytest.approx(plain, abs=1e-12)


def test_a_batch_larger_than_half_of_the_data_is_named() -> None:
    with pytest.raises(ConfigError, match=r"per_gpu_batch_size: got 40, expected at most half of the training samples"):
        advise(config(gpus=1, per_gpu_batch_size=40), task=Sign(), steps=0)


class Steep(Sign):
    """Its loss overflows after the first step."""

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        return outputs.square().sum(1).exp().mean()


def test_a_training_that_diverges_is_named() -> None:
    with pytest.raises(
        ConfigError, match=r"optimizer.lr: got 10.0, expected one with which .* steps have a finite loss"
    ):
        advise(config(optimizer=OptimizerConfig(lr=10.0)), task=Steep(), steps=6, samples=SAMPLES)


def test_weights_without_gradient_are_named() -> None:
    with pytest.raises(
        ConfigError, match=r"task.name: got 'Sign', expected a model whose weights get finite gradients"
    ):
        advise(config(optimizer=OptimizerConfig(lr=1e30)), task=Sign(), steps=6, samples=SAMPLES)


def test_one_sample_of_one_value_cannot_be_normalized() -> None:
    found = advise(config(per_gpu_batch_size=1), task=Sign(), samples=SAMPLES, probes=2)
    assert [remedy.alignment is None for remedy in found.remedies] == [True, False, False, False]
    assert found.remedies[0].harm == "cannot be normalized"
    assert found.step_ms is None


def test_larger_batches_are_tried_too() -> None:
    alone = advise(config(gpus=1, per_gpu_batch_size=2), task=Sign(), steps=0, samples=64, probes=1)
    together = advise(config(gpus=16, per_gpu_batch_size=2), task=Sign(), steps=0, samples=64, probes=1)
    assert [remedy.normalization_batch_size for remedy in alone.remedies] == [2]
    assert alone.recommended is None
    assert together.recommended is not None
    assert alone.needed == together.needed == together.recommended.normalization_batch_size > 2


@pytest.mark.parametrize(
    ("alignments", "gpus"),
    [
        ((0.99, 0.999, 1.0), 1),
        ((ENOUGH, 0.999, 1.0), 1),
        ((LITTLE, 0.87, 0.89), 4),
        ((None, 0.97, 0.96), 2),
        ((0.1, 0.2, 0.3), None),
    ],
)
def test_the_cheapest_without_harm(alignments: tuple[float | None, ...], gpus: int | None) -> None:
    found = advice(*alignments).recommended
    assert (None if found is None else found.gpus) == gpus


def test_words_for_harm() -> None:
    assert [remedy.harm for remedy in advice(None, 0.59, 0.6, 0.879, 0.88).remedies] == [
        "cannot be normalized", "large", "some", "some", "none",
    ]  # fmt: skip


def test_group_sizes() -> None:
    assert [group_sizes(gpus) for gpus in (1, 6, 8, 7)] == [[1], [1, 2, 6], [1, 2, 4, 8], [1, 7]]


def test_the_exchange_is_that_of_the_model_of_the_bench() -> None:
    found = advise(config(), task=Sign(), samples=SAMPLES, probes=1, link="ethernet")
    # A layer of 8 channels makes two collectives; over 2 ranks each takes base + 2 alpha + 2 bytes / bandwidth.
    link = next(link for link in LINKS if link.name == "ethernet")
    sizes = [8 * 17, 8 * 16]
    expected = sum(link.base + 2 * link.alpha_node + 2 * size / link.bandwidth_node / 1e3 for size in sizes) / 1e3
    assert found.remedies[0].exchange_ms == 0
    assert found.remedies[1].exchange_ms == pytest.approx(expected)


def test_what_is_said_when_no_group_is_enough() -> None:
    none = advice(0.1, 0.2)
    assert any("no larger batch that could be tried" in sentence for sentence in sentences(none))
    said = list(sentences(Advice(**{**vars(none), "needed": 64})))
    assert said[0].startswith("Recommended: none of these. 64 samples to a mean would do")


# ---- a short training


def test_the_nearest_two() -> None:
    assert [remedy.gpus for remedy in nearest(advice(0.1, 0.96, 0.99))] == [1, 2]
    assert [remedy.gpus for remedy in nearest(advice(0.96, 0.98))] == [1]
    assert [remedy.gpus for remedy in nearest(advice(0.1, 0.2, 0.3))] == [2, 4]
    assert [remedy.gpus for remedy in nearest(advice(None, 0.96))] == [2]


@pytest.mark.parametrize("validated", [True, False])
def test_a_short_training_of_both(validated: bool) -> None:
    first, second = try_nearest(config(), advice(0.1, 0.96, 0.99, 1.0), 5, Sign(validation=24 if validated else 0))
    score = "validation accuracy" if validated else "training loss"
    assert first.startswith(f"local BatchNorm, 5 steps: {score} ")
    assert second.startswith(f"SyncBatchNorm over 2 GPUs, 5 steps: {score} ")


def test_a_short_training_is_that_of_the_remedy() -> None:
    last = list(try_nearest(config(), advice(0.1, 0.96, 0.99, 1.0), 5, Sign(validation=0)))[1]
    budget = BudgetConfig(epochs=None, steps=5, checkpoint_every=0)
    same = train(config(norm=NormConfig(name="sync"), sync_group_size=2, budget=budget), task=Sign(validation=0))
    assert last.endswith(f"training loss {same.history[-1]['train_loss']:.3g}")


# ---- the judgement of the advice by trained errors


def test_judge() -> None:
    errors = {4: [0.50, 0.55, 0.52], 8: [0.031, 0.029, 0.030], 16: [0.029, 0.030, 0.0295]}
    right = judge(errors, {4: 0.5, 8: 0.96, 16: 0.99})
    assert (right.recommended, right.cheapest, right.safe, right.right) == (8, 8, True, True)
    dear = judge(errors, {4: 0.5, 8: 0.85, 16: 0.99})
    assert (dear.recommended, dear.safe, dear.right) == (16, True, False)
    wrong = judge(errors, {4: 0.96, 8: 0.97, 16: 0.99})
    assert (wrong.recommended, wrong.safe, wrong.right) == (4, False, False)
    assert judge(errors, {4: -1.0, 8: 0.1, 16: 0.2}).recommended == 16


def planted(folder: Path, errors: dict[int, float], alignment: dict[int, float]) -> tuple[Path, Path]:
    """The results of both studies for two orders; the seeds of an error differ by less than a point."""
    rows = ["arm,data.class_skew,normalization_batch_size,seed,test_error"]
    measured = [f"arm,data.class_skew,seed,{','.join(f'test_alignment_{size}' for size in errors)}"]
    for skew, seed in itertools.product((1, 4), range(3)):
        measured.append(f"net,{skew},{seed},{','.join(map(str, alignment.values()))}")
        rows += [f"net,{skew},{size},{seed},{error + 1e-4 * (seed - 1) * size}" for size, error in errors.items()]
    folder.mkdir()
    (folder / "errors.csv").write_text("\n".join(rows))
    (folder / "alignments.csv").write_text("\n".join(measured))
    return folder / "errors.csv", folder / "alignments.csv"


def test_validation_of_planted_studies(tmp_path: Path) -> None:
    errors = {2: 0.5, 4: 0.3, 8: 0.05, 16: 0.02}
    foreseen = validate(*planted(tmp_path / "foreseen", errors, {2: 0.2, 4: 0.5, 8: 0.8, 16: 0.99}))
    assert (foreseen.settings, foreseen.advice, foreseen.near) == (6, 18, 1)
    assert foreseen.right == foreseen.safe == (1, 1, 1)
    assert foreseen.foretold["large"] == Foretold(12, 1.0, pytest.approx(0.38))  # sizes of 2 and 4: 0.48 and 0.28
    assert foreseen.correlation == pytest.approx((-1, -1, -1))
    backwards = validate(*planted(tmp_path / "backwards", errors, {2: 0.99, 4: 0.8, 8: 0.5, 16: 0.2}))
    # From 4 samples a GPU on, no size is enough, so that the advice counts as that of the largest.
    assert (backwards.right[0], backwards.safe[0]) == pytest.approx((2 / 3, 2 / 3))
    assert backwards.correlation[0] == pytest.approx(1)
    harmless = {2: 0.02, 4: 0.0201, 8: 0.0202, 16: 0.0203}
    dear = validate(*planted(tmp_path / "dear", harmless, {2: 0.2, 4: 0.5, 8: 0.8, 16: 0.99}))
    assert (dear.right[0], dear.safe[0]) == (0, 1)
    assert dear.near == pytest.approx(1 / 3)  # of 8 samples a GPU alone, 16 are at most twice as many


def test_the_page_has_what_the_kept_studies_say() -> None:
    kept = ROOT / "configs" / "study" / "results"
    found = validate(kept / "advise_errors" / "results.csv", kept / "advise_alignments" / "results.csv")
    page = (ROOT / "docs" / "advise.md").read_text()
    start, end = page.index("advise_alignments -->\n"), page.index("\n<!-- end of validation")
    assert page[start:end].splitlines()[1:] == lines(found)


def test_a_run_of_the_studies_behind_it() -> None:
    options = {"data": {"name": "digits", "train_samples": 200}, "model": {"name": "convnet", "width": 4}}
    run = {"gpus": 8, "per_gpu_batch_size": 4, "budget.epochs": 1, "device": "cpu", "task.options": options}
    setting = Setting(config=load_config(None, run), out=None, resume=False)
    assert 0 < trained(setting)["error"] <= 1
    assert list(measured := aligned(setting)) == ["alignment_4", "alignment_8", "alignment_16", "alignment_32"]
    assert measured["alignment_4"] < measured["alignment_32"] < 1  # a probe has 128 samples


# ---- the command


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    data = [
        "--data.name",
        "synthetic",
        "--data.synthetic_samples",
        "64",
        "--data.image_size",
        "8",
        "--model.width",
        "4",
    ]
    words = [
        "advise",
        *data,
        "--gpus",
        "4",
        "--per_gpu_batch_size",
        "4",
        "--samples",
        "32",
        "--steps",
        "3",
        "--device",
        "cpu",
    ]
    assert main([*words, "--validate", "2"]) == 0
    out = capsys.readouterr().out
    assert "convnet: 6 normalizations, 4 GPUs" in out
    assert "SyncBatchNorm over all 4 GPUs" in out
    assert "- Recommended: " in out
    assert "2 steps: validation error" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--samples", "1"], "samples: got 1, expected an integer of at least 2"),
        (["--steps", "-1"], "steps: got -1, expected an integer of at least 0"),
        (["--probes", "0"], "probes: got 0, expected an integer of at least 1"),
        (["--link", "rail"], "link: got 'rail', expected one of 'nvlink', 'pcie', 'ethernet'"),
        (["--validate", "0"], "validate: got 0, expected a positive number of optimizer steps"),
        (["--task.name", "nowhere:Task"], "a module that Python finds"),
    ],
    ids=str,
)
def test_mistakes(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["advise", "--device", "cpu", *words]) == 2
    assert message in capsys.readouterr().err
