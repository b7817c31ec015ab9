"""The report: the numbers that were measured, in a page that stands alone."""

from __future__ import annotations

import csv
import html
import json
import math
import re
from dataclasses import replace

import pytest
from report_fakes import open_page
from study_fakes import fake_result, small_study

from syncbn.study import commands
from syncbn.study.plan.grid import study_cells
from syncbn.study.report.format import coordinate, percent, percent_interval, points, points_interval
from syncbn.study.report.report import write_report
from syncbn.study.report.tables import print_table
from syncbn.study.run.jobs import Job
from syncbn.study.run.status import Outcome
from syncbn.train.config import ConfigError

ERRORS = {"batch": (0.40, 0.36), "sync": (0.02, 0.03), "iid": (0.02, 0.024)}
NAMESPACES = r"http://www\.w3\.org/(2000/svg|1999/xlink)"
"""Names in SVG that look like addresses; nothing is fetched from them."""


def results_of(study, errors=ERRORS):
    cells = study_cells(study)
    found = {}
    for cell in cells:
        error = errors[cell.arm][cell.seed]
        found[cell.key] = fake_result(cell.config, error, "diverged" if error is None else "ok")
    return cells, found


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    study = small_study(notes="Mind <this>.")
    cells, results = results_of(study)
    parity = {"key": cells[0].key, "arm": "sync", "processes": [1, 2], "steps": 3}
    parity |= {"lines": ["sync: 1 and 2 processes agree to 3e-16"], "agrees": True}
    (out / "parity.json").write_text(json.dumps(parity))
    path = write_report(study, cells, results, out, command="syncbn study run --config <x>")
    return path, path.read_text()


def test_page_has_the_verdict_the_figure_and_the_table_in_this_order(page):
    path, text = page
    words = re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", text)))
    assert "2 seeds cannot show a difference; 3 are needed. No arm's learning rate was tuned." in words
    assert text.index('id="verdict"') < text.index("<svg") < text.index("<table") < text.index("<h2")
    assert "SyncBatchNorm − Reference <b> too few seeds +0.30" in words
    assert "sync: 1 and 2 processes agree to 3e-16" in words
    assert "different numbers of processes agrees." in words
    assert text.count("<svg") == 3  # the main figure, the contrasts, the learning curves
    assert "Small &lt;study&gt; &amp; more" in text
    assert "Reference <b>" not in text
    assert '<p id="notes">Mind &lt;this&gt;.</p>' in text
    assert "--config &lt;x&gt;" in text
    assert "<svg" in path.with_name("error_by_arm.svg").read_text()
    assert path.with_name("error_by_arm.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(file.name for file in path.parent.iterdir()) == [
        "contrasts.svg",
        "curves.svg",
        "error_by_arm.png",
        "error_by_arm.svg",
        "parity.json",
        "report.html",
        "results.csv",
    ]


def test_verdict_words_are_defined_once(page):
    terms = re.findall(r"<dt>(.*?)</dt>", page[1][page[1].index('<h2 id="methods">') :])
    assert terms == ["better, worse", "no worse", "no difference shown", "too few seeds", "diverged", "k runs missing"]


def test_page_needs_no_network(page):
    text = re.sub(NAMESPACES, "", page[1])
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!#|data:)""", text)
    assert not re.findall(r"https?://|@import|url\((?!#|data:)", text)


def test_csv_has_every_run(page):
    lines = list(csv.DictReader(page[0].with_name("results.csv").open()))
    assert len(lines) == 6
    assert [float(line["test_error"]) for line in lines if line["arm"] == "sync"] == [0.02, 0.03]
    assert {line["status"] for line in lines} == {"done"}
    assert {line["level"] for line in lines} == {"no"}


def test_labels_and_digits_are_printed_as_they_are(capsys):
    arms = {"batch": {"label": "a [/b] $x$ [red]", "overrides": {"norm": {"name": "batch"}}}}
    study = small_study(arms=arms, title="[/title]")
    cells, results = results_of(study)
    print_table(study, cells, results)
    printed = capsys.readouterr().out
    assert "a [/b] $x$ [red]" in printed
    assert "[/title]" in printed
    assert "38.0" in printed


def test_an_interval_has_the_digits_of_its_middle():
    assert [percent(0.0173), percent(0.0052), percent(math.nan)] == ["1.7", "0.52", "–"]
    assert percent_interval(-0.1, 1.2) == "0.0 to 100.0"
    assert [points(0.701), points(-0.0312, signed=True), points(0.0012, signed=True)] == ["70", "−3.1", "+0.12"]
    assert points_interval(0.494, 0.911, 0.701) == "49 to 91"
    assert points_interval(-0.0021, 0.014, 0.006) == "−0.21 to 1.40"
    assert points(-0.00001) == "0.00"


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("per_gpu_batch_size", 1, "1 image per GPU"),
        ("per_gpu_batch_size", 4, "4 images per GPU"),
        ("sync_group_size", 1, "1 GPU per sync group"),
        ("hold", "steps", "constant steps"),
        ("data.class_skew", 1, "shuffled data"),
        ("data.class_skew", 8, "8 images of one class in a row"),
        ("optimizer.lr", 0.1, "optimizer lr 0.1"),
    ],
)
def test_places_in_words(name, value, words):
    assert coordinate(small_study(), name, value) == words
    other = replace(small_study(), base={"task": {"name": "liver:Liver"}})
    assert coordinate(other, name, value) == words.replace("image", "sample")


def test_command_reports_failures_and_says_where_the_report_is(tmp_path, monkeypatch, capsys):
    study = small_study()
    cells, results = results_of(study)
    outcomes = {key: Outcome(job=None, state="done", result=result) for key, result in results.items()}
    monkeypatch.setattr(commands, "load_study", lambda name: study)
    monkeypatch.setattr(commands, "run_cells", lambda *args, **kwargs: outcomes)
    assert commands.run_study("small", tmp_path / "out") == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"report: {tmp_path / 'out' / 'report.html'}"
    assert str(tmp_path) not in (tmp_path / "out" / "report.html").read_text()
    job = Job(cell=cells[4], out=tmp_path)
    outcomes[job.key] = Outcome(job=job, state="failed", message="no luck <today>")
    assert commands.run_study("small", tmp_path / "out") == 1
    printed = capsys.readouterr()
    assert "failed: sync, seed 1: no luck <today>" in printed.err
    assert printed.out.splitlines()[-1].startswith("report: ")
    assert "no luck &lt;today&gt;" in (tmp_path / "out" / "report.html").read_text()
    lines = list(csv.DictReader((tmp_path / "out" / "results.csv").open()))
    assert [line["status"] for line in lines] == ["done", "done", "done", "done", "failed", "done"]
    with pytest.raises(ConfigError, match="workers"):
        commands.run_study("small", tmp_path / "out", workers=0)


def test_page_opens_without_an_error(page, tmp_path):
    dom = open_page(page[0], tmp_path)
    assert dom.count("<svg") == 3
    assert dom.count("<table") == 3  # settings, contrasts, cost
    assert dom.count("<tr>") == (1 + 3) + (1 + 2) + (1 + 3)


def test_a_note_says_what_a_dash_is_where_there_is_one(tmp_path):
    sweep = {"values": [2, 8], "global_batch_size": 8}
    arms = {name: {"overrides": {"norm": {"name": name}}} for name in ("batch", "sync")}
    notes = {}
    for only in ({}, {"per_gpu_batch_size": [2]}):
        arms["sync"]["only"] = only
        study = small_study(base={"data": {"name": "digits"}}, sweep=sweep, arms=arms, seeds=[0, 1, 2])
        cells = study_cells(study)
        results = {cell.key: fake_result(cell.config, 0.1 + 0.01 * cell.seed) for cell in cells}
        page = write_report(study, cells, results, tmp_path, command="").read_text()
        notes[bool(only)] = "–: the arm is not run there, or has no result there yet." in page
        assert "–: the runs did not record it." not in page
    assert notes == {True: True, False: False}
