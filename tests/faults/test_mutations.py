"""300 damaged files: each is read right, counts as missing, or is one line. No traceback, no hang, no wrong result.

A failure names the seed; ``SYNCBN_TEST_SEED`` starts from another one than 0.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mutations import mutated
from task_cases import Sign

from syncbn.study.analysis.findings import findings_of
from syncbn.study.analysis.summary import layer_means, summary_of
from syncbn.study.plan.grid import study_cells
from syncbn.study.plan.study_file import load_study
from syncbn.study.report.curves import loss_curve, reported_names, score_curve
from syncbn.study.report.tables import runs_csv, settings_table, statistics_table
from syncbn.study.run.records import Records, read_records
from syncbn.study.run.status import study_outcomes
from syncbn.train.checkpoint import load_checkpoint, save_checkpoint
from syncbn.train.config import ConfigError, RunConfig, config_from_dict, config_to_dict, load_config
from syncbn.train.data.image_file import rgb_image
from syncbn.train.stored import json_lines
from syncbn.train.yaml_file import yaml_text
from tests.unit.study_fakes import NOON, fake_result, small_study

FIRST = int(os.environ.get("SYNCBN_TEST_SEED", "0"))
pytestmark = pytest.mark.timeout(120)  # a file that hangs its reader fails


@contextmanager
def seed_named(seed: int, name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise AssertionError(f"seed {seed}, {name}: {type(error).__name__}: {error}") from error


def one_line(error: ConfigError) -> None:
    assert "\n" not in str(error)
    assert len(str(error)) < 1000
    assert str(error).isprintable()


def read_or_refused(read: Callable[[], Any]) -> Any:
    """What a reader returns, or None if it refuses the file in one line."""
    try:
        return read()
    except ConfigError as error:
        one_line(error)
        return None


RUN = {"gpus": 4, "sync_group_size": 2, "norm": {"name": "sync"}, "task": {"options": {}}, "optimizer": {"lr": 0.1}}
STUDY = {
    "name": "small",
    "title": "Small",
    "question": "What?",
    "base": {"data": {"name": "digits", "validation_fraction": 0.2}, "budget": {"epochs": 8}},
    "arms": {"batch": {"reference": True}, "sync": {"label": "S", "overrides": {"norm": {"name": "sync"}}}},
    "axes": {"data.class_skew": [1, 2]},
    "sweep": {"values": [2, 4], "global_batch_size": 8},
    "seeds": [0, 1],
    "tune": {"optimizer.lr": [0.1, 0.2, 0.3, 0.4], "halving": 2},
    "contrasts": [{"arm": "sync", "against": {"arm": "batch"}, "no_worse_by": 1}],
    "parity": {"arm": "sync", "processes": [1, 2], "at": {"per_gpu_batch_size": 2}},
}


@pytest.mark.fault(
    "file",
    "a YAML file with random damage",
    moment="before a run or a study",
    outcome="it is read right, or one line",
    lost="nothing",
)
def test_yaml_files(tmp_path: Path) -> None:
    run, study = yaml_text(config_to_dict(config_from_dict(RUN))).encode(), yaml_text(STUDY).encode()
    path, read = tmp_path / "c.yaml", 0
    for seed in range(FIRST, FIRST + 50):
        with seed_named(seed, "run"):
            path.write_bytes(mutated(run, seed))
            config = read_or_refused(lambda: load_config(path))
            assert config is None or config_from_dict(config_to_dict(config)) == config
            read += isinstance(config, RunConfig)
        with seed_named(seed, "study"):
            path.write_bytes(mutated(study, seed))
            found = read_or_refused(lambda: load_study(path))
            assert found is None or study_cells(found)
            read += found is not None
    assert 0 < read < 80, "some damage leaves a file that is right, and most does not"


@pytest.mark.fault(
    "file",
    "a checkpoint with random damage, such as a turned bit",
    moment="before `--resume`",
    outcome="the checkpoint before it is used, with the weights that belong to it",
    lost="the steps between the two",
)
def test_checkpoints(tmp_path: Path) -> None:
    """The state that is loaded is always that of a whole checkpoint, with the weights that belong to it."""
    model, config, template = Sign().model(), config_from_dict(RUN), tmp_path / "template"
    weights, used = {}, {1: 0, 2: 0}
    for step in (1, 2):
        with torch.no_grad():
            model[0].weight.fill_(step)
        weights[step] = model[0].weight.detach().clone()
        save_checkpoint(template, step, model, {"at": step, "m": torch.full((3,), float(step))}, config)
    names = sorted(path.name for path in (template / "step-00000002").iterdir())
    for seed in range(FIRST, FIRST + 60):
        folder = shutil.copytree(template, tmp_path / str(seed))
        path = folder / "step-00000002" / names[seed % len(names)]
        path.write_bytes(mutated(path.read_bytes(), seed))
        with seed_named(seed, path.name):
            loaded = Sign().model()
            state = load_checkpoint(folder, loaded, config)
            assert state is not None
            assert torch.equal(loaded[0].weight, weights[state["at"]])
            assert state["m"].tolist() == [state["at"]] * 3
            used[state["at"]] += 1
        shutil.rmtree(folder)
    assert used[1] > 40


@pytest.mark.fault(
    "file",
    "records, results and metrics with random damage",
    moment="before a report",
    outcome="they are read right, count as missing, or one line",
    lost="what was damaged",
)
def test_records_results_and_metrics(tmp_path: Path) -> None:
    """A run that is read is the recorded one or has another valid content; a study's summary never fails on it."""
    study = small_study()
    cells, template = study_cells(study), tmp_path / "template"
    records = Records(template)
    for cell in cells:
        records.add(cell.key, NOON, 1.0, fake_result(cell.config, 0.1 + 0.01 * cell.seed))
    (template / "runs" / cells[0].key).mkdir(parents=True)
    fake_result(cells[0].config).to_json(template / "runs" / cells[0].key / "result.json")
    kinds, read = ["records", "result", "metrics"], 0
    for seed in range(FIRST, FIRST + 70):
        kind = kinds[seed % len(kinds)]
        out = shutil.copytree(template, tmp_path / str(seed))
        with seed_named(seed, kind):
            if kind == "metrics":
                _damaged_metrics(out / "metrics.jsonl", seed)
            elif kind == "result":
                shutil.rmtree(out / "records")
                path = out / "runs" / cells[0].key / "result.json"
                path.write_bytes(mutated(path.read_bytes(), seed))
                read += read_or_refused(lambda: study_outcomes(cells, out)) is not None  # noqa: B023
            else:
                path = next((out / "records").iterdir())
                path.write_bytes(mutated(path.read_bytes(), seed))
                found = read_or_refused(lambda: read_records(out))  # noqa: B023
                if found is not None:
                    read += 1
                    _summarized(study, {key: record.result for key, record in found.items()})
        shutil.rmtree(out)
    assert read > 0


ODD: tuple[Any, ...] = (None, {}, "\ud800", 2.5, 10**400)
GONE = object()


def test_every_value_of_a_record_may_be_another(tmp_path: Path) -> None:
    """Each value in turn becomes something else, or is not there: the record is refused, or nothing fails on it."""
    study, records = small_study(seeds=[0]), Records(tmp_path)
    cells = study_cells(study)
    parts = {"estimator": None, "samples": None}
    tests = {"running": {"loss": 0.3, "error": 0.1}, "batch": None}
    evaluations = [{"statistics": kind, **parts, "test": test} for kind, test in tests.items()]
    evaluations.append({"statistics": "population", "estimator": "mean", "samples": 8, "test": tests["running"]})
    layer = {"layer": "a", "count": 3.0, "kl": 0.1, "effective": 4.0, "running_kl": 0.2, "channels": 4, "dead": 0}
    for cell in cells:
        result = replace(fake_result(cell.config), evaluations=evaluations, layers=[layer], peak_memory_bytes=5)
        records.add(cell.key, NOON, 1.0, result)
    path = next((tmp_path / "records").iterdir())
    lines = path.read_text().splitlines()
    whole, read, refused = json.loads(lines[0]), 0, 0
    del whole["digest"]  # with which any other value would be noticed
    for place in list(_places(whole)):
        for value in (*ODD, GONE):
            path.write_text("\n".join([json.dumps(_with(whole, place, value)), *lines[1:], ""]))
            with seed_named(0, f"{place}: {value!r}"):
                found = read_or_refused(lambda: read_records(tmp_path))
                refused += found is None
                if found is not None and _with(whole, place, value) != whole:
                    read += 1
                    results = {key: record.result for key, record in found.items()}
                    read_or_refused(lambda: _summarized(study, results))  # noqa: B023
    assert min(read, refused) > 100


def _places(tree: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where the values of nested lists and mappings are; of the configuration of a run, only the sections."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*at, key)
        if len(at) < 2 or at[:2] != ("result", "config"):
            yield from _places(value, (*at, key))


def _with(tree: Any, place: tuple[Any, ...], value: Any) -> Any:
    """A copy of ``tree`` with another value at a place, or without it."""
    copy = json.loads(json.dumps(tree))
    below = copy
    for key in place[:-1]:
        below = below[key]
    if value is GONE:
        del below[place[-1]]
    else:
        below[place[-1]] = value
    return copy


def _summarized(study: Any, results: Any) -> None:
    cells = study_cells(study)
    summary = summary_of(study, cells, results)
    assert runs_csv(study, cells, results)
    assert settings_table(summary).rows
    findings_of(summary)
    statistics_table(summary)
    reported_names(list(summary.settings.values()))
    for setting in summary.settings.values():
        layer_means(setting)
    for result in results.values():
        assert isinstance(loss_curve(result) + score_curve(result), list)


def _damaged_metrics(path: Path, seed: int) -> None:
    lines = [f'{{"kind": "step", "step": {step}, "train_loss": {step}.5}}\n' for step in range(1, 20)]
    path.write_bytes(mutated("".join(lines).encode(), seed))
    assert all(type(record["step"]) is int for record in json_lines(path))


FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")


@pytest.mark.fault(
    "file",
    "an image with random damage",
    moment="when it is read",
    outcome="it is read, or one line",
    lost="nothing",
)
def test_images(tmp_path: Path) -> None:
    image_module = pytest.importorskip("PIL.Image", reason="Pillow reads images")
    pixels = torch.arange(24 * 20 * 3).remainder(251).to(torch.uint8).view(24, 20, 3)
    whole = {}
    for name in FORMATS:
        held = io.BytesIO()
        image_module.fromarray(pixels.numpy()).save(held, name)
        whole[name] = held.getvalue()
    path, read = tmp_path / "image", 0
    for seed in range(FIRST, FIRST + 70):
        name = FORMATS[seed % len(FORMATS)]
        path.write_bytes(mutated(whole[name], seed))
        with seed_named(seed, name), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on what it skips
            image = read_or_refused(lambda: rgb_image(str(path), "data.root"))
            assert image is None or (image.mode == "RGB" and min(image.size) > 0)
            read += image is not None
    assert 0 < read < 65
