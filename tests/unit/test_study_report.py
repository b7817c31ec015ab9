"""The report: the numbers that were measured, in a page that stands alone."""

from __future__ import annotations

import csv
import html
import json
import re

import pytest
from report_fakes import open_page
from study_fakes import fake_result, small_study

from syncbn.study import commands
from syncbn.study.plan.grid import study_cells
from syncbn.study.report.report import print_table, write_report
from syncbn.study.report.words import SPACE, spread
from syncbn.study.run.jobs import Job
from syncbn.study.run.status import Outcome
from syncbn.train.config import ConfigError

ERRORS = {"batch": (0.40, 0.36), "sync": (0.02, 0.03), "iid": (0.02, 0.024)}


def outcomes_of(study, errors=ERRORS):
    cells = study_cells(study)
    found = {}
    for cell in cells:
        error = errors[cell.arm][cell.seed]
        result = fake_result(cell.config, error, "diverged" if error is None else "ok")
        found[cell.key] = Outcome(job=None, state="done", result=result)
    return cells, found


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    study = small_study(notes="Mind <this>.")
    cells, outcomes = outcomes_of(study)
    (out / "parity.json").write_text(json.dumps({"lines": ["2 processes against 1 process: the <same>"]}))
    path = write_report(study, cells, outcomes, out, command="syncbn study run --config <x>")
    return path, path.read_text()


def test_page_has_the_answer_the_tables_and_the_figures(page):
    path, text = page
    words = re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", text)))
    assert "Not enough seeds to claim anything: with 2 seeds, none of the 2 comparisons can become significant" in words
    assert "SyncBatchNorm has the lowest mean of the other arms, 2.5 %, 0.30 points" in words
    assert "above that of the reference, Reference <b> (2.2 %); Local BatchNorm has the highest, 38.0 %." in words
    assert "no claim: 2 seeds, needs 7" in words
    assert "2 processes against 1 process: the <same>" in words
    assert "Means go from 2.2 % (Reference <b>) to 38.0 % (Local BatchNorm)" in words
    assert text.count("<svg") == 2 + 3  # the main figure for either width, and the learning curves
    assert "Small &lt;study&gt; &amp; more" in text
    assert "Reference <b>" not in text
    assert '<p id="notes">Mind &lt;this&gt;.</p>' in text
    assert "--config &lt;x&gt;" in text
    assert "<svg" in path.with_name("error_by_arm.svg").read_text()
    assert path.with_name("error_by_arm.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(file.name for file in path.parent.iterdir()) == [
        "error_by_arm.png",
        "error_by_arm.svg",
        "parity.json",
        "report.html",
        "results.csv",
    ]


def test_page_needs_no_network(page):
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!#|data:)""", page[1])
    assert not re.findall(r"https?://|@import|url\((?!#|data:)", page[1])


def test_csv_has_every_cell(page):
    lines = list(csv.DictReader(page[0].with_name("results.csv").open()))
    assert len(lines) == 6
    assert [float(line["test_error"]) for line in lines if line["arm"] == "sync"] == [0.02, 0.03]
    assert {line["status"] for line in lines} == {"ok"}


def test_labels_and_digits_are_printed_as_they_are(capsys):
    arms = {"batch": {"label": "a [/b] $x$ [red]", "overrides": {"norm": {"name": "batch"}}}}
    study = small_study(arms=arms, title="[/title]")
    cells, outcomes = outcomes_of(study)
    print_table(study, cells, outcomes)
    printed = capsys.readouterr().out
    assert "a [/b] $x$ [red]" in printed
    assert "[/title]" in printed
    assert "a [/b] $x$ [red] has 38.0" in printed
    # A mean and its deviation have the same digits.
    assert [spread(0.0173, 0.004), spread(0.0052, 0.0101)] == [
        text.replace(" ", SPACE) for text in ("1.7 ± 0.4 %", "0.52 ± 1.01 %")
    ]


def test_command_reports_failures_and_says_where_the_report_is(tmp_path, monkeypatch, capsys):
    study = small_study()
    _, outcomes = outcomes_of(study)
    monkeypatch.setattr(commands, "load_study", lambda name: study)
    monkeypatch.setattr(commands, "run_cells", lambda *args, **kwargs: outcomes)
    assert commands.run_study("small", tmp_path / "out") == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"report: {tmp_path / 'out' / 'report.html'}"
    assert str(tmp_path) not in (tmp_path / "out" / "report.html").read_text()
    cell = study_cells(study)[4]
    outcomes[cell.key] = Outcome(job=Job(cell=cell, out=tmp_path), state="failed", message="no luck <today>")
    assert commands.run_study("small", tmp_path / "out") == 1
    printed = capsys.readouterr()
    assert "failed: sync, seed 1: no luck <today>" in printed.err
    assert printed.out.splitlines()[-1].startswith("report: ")
    assert "no luck &lt;today&gt;" in (tmp_path / "out" / "report.html").read_text()
    lines = list(csv.DictReader((tmp_path / "out" / "results.csv").open()))
    assert [line["status"] for line in lines] == ["ok", "ok", "ok", "ok", "failed", "ok"]
    with pytest.raises(ConfigError, match="workers"):
        commands.run_study("small", tmp_path / "out", workers=0)


def test_page_opens_without_an_error(page, tmp_path):
    dom = open_page(page[0], tmp_path)
    assert dom.count("<svg") == 5
    assert dom.count("<table") == 3  # comparisons, speed, all numbers
    assert dom.count("<tr>") == (1 + 2) + (1 + 3) + (1 + 3)
