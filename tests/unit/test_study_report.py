"""The report: the numbers that were measured, in a page that stands alone."""

from __future__ import annotations

import csv
import html
import re
import shutil
import subprocess

import pytest
from study_fakes import fake_result, small_study

from syncbn.study import commands
from syncbn.study.plan import study_cells
from syncbn.study.report import print_table, write_report
from syncbn.study.runner import Outcome, repeat_id
from syncbn.study.summary import SPACE, answer, spread, summary_rows
from syncbn.study.worker import Job
from syncbn.train.config import ConfigError

ERRORS = {"batch": (0.40, 0.36), "sync": (0.02, 0.03), "iid": (0.02, 0.024)}


def outcomes_of(study, errors=ERRORS):
    cells = study_cells(study)
    found = {}
    for cell in cells:
        error = errors[cell.arm][cell.seed]
        result = fake_result(cell.config, error, "diverged" if error is None else "ok")
        found[cell.key] = Outcome(job=None, status="ran", result=result)
    return cells, found


@pytest.fixture
def page(tmp_path):
    study = small_study(repeat_distributed={"arm": "sync", "seed": 0, "processes": 2})
    cells, outcomes = outcomes_of(study)
    repeated = fake_result(cells[1].config, 0.02, losses=(1.0, 0.75))
    outcomes[repeat_id(study.repeat_distributed, cells)] = Outcome(job=None, status="ran", result=repeated)
    path = write_report(study, cells, outcomes, tmp_path, command="syncbn study run --config <x>")
    return path, path.read_text()


def test_page_has_the_answer_the_table_and_the_figures(page):
    path, text = page
    words = html.unescape(re.sub(r"<[^>]+>", " ", text)).replace("\N{NO-BREAK SPACE}", " ")
    assert "Local BatchNorm is the worst arm: 38.0 % test error, against 2.2 % for the reference" in words
    assert "SyncBatchNorm gives back 99" in words
    assert "40.0 %" in words
    assert "36.0 %" in words
    assert "The training losses differ by 0 at the first step and by at most 0.25, at step 2 of 2" in words
    assert text.count("<svg") == 1 + 3
    assert "Small &lt;study&gt; &amp; more" in text
    assert "Reference <b>" not in text
    assert path.with_name("error_by_arm.svg").stat().st_size > 1000
    assert path.with_name("error_by_arm.png").read_bytes().startswith(b"\x89PNG")


def test_page_needs_no_network(page):
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!#|data:)""", page[1])
    assert not re.findall(r"https?://|@import|url\((?!#|data:)", page[1])


def test_csv_has_every_cell(page):
    lines = list(csv.DictReader(page[0].with_name("results.csv").open()))
    assert len(lines) == 6
    assert [float(line["test_error"]) for line in lines if line["arm"] == "sync"] == [0.02, 0.03]


def test_diverged_and_missing_runs_are_in_the_words():
    study = small_study()
    cells, outcomes = outcomes_of(study, {**ERRORS, "sync": (None, 0.03)})
    del outcomes[cells[0].key]
    rows = summary_rows(study, cells, {k: o.result for k, o in outcomes.items()})
    caveat = answer(rows).caveat
    assert "SyncBatchNorm: 1 of 2 runs diverged" in caveat
    assert "1 of 6 runs have no result" in caveat
    sync = next(row for row in rows if row.name == "sync")
    assert sync.mean == pytest.approx(0.03)


def test_an_arm_below_the_reference_is_no_cost():
    study = small_study()
    cells, outcomes = outcomes_of(study, {"batch": (0.010, 0.012), "sync": (0.008, 0.008), "iid": (0.02, 0.024)})
    found = answer(summary_rows(study, cells, {k: o.result for k, o in outcomes.items()}))
    assert found.headline.startswith("No arm did worse than the reference")
    assert "worst" not in found.headline + found.remedies


def test_labels_and_digits_are_printed_as_they_are(capsys):
    arms = {"batch": {"label": "a [/b] $x$ [red]", "overrides": {"norm": {"name": "batch"}}}}
    study = small_study(arms=arms, title="[/title]")
    cells, outcomes = outcomes_of(study)
    print_table(study, cells, outcomes)
    printed = capsys.readouterr().out
    assert "a [/b] $x$ [red]" in printed
    assert "[/title]" in printed
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
    job = Job(id="k", label="sync, seed 1", config=None, directory=tmp_path, lock=tmp_path / "l", log=tmp_path / "log")
    outcomes[study_cells(study)[4].key] = Outcome(job=job, status="failed", message="no luck <today>")
    assert commands.run_study("small", tmp_path / "out") == 1
    printed = capsys.readouterr()
    assert "failed: sync, seed 1: no luck <today>" in printed.err
    assert printed.out.splitlines()[-1].startswith("report: ")
    assert "no luck &lt;today&gt;" in (tmp_path / "out" / "report.html").read_text()
    with pytest.raises(ConfigError, match="workers"):
        commands.run_study("small", tmp_path / "out", workers=0)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium to open the page")
def test_page_opens_without_an_error(page, tmp_path):
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        ["chromium", *flags, "--enable-logging=stderr", "--v=0", "--dump-dom", page[0].as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "CONSOLE" not in done.stderr
    assert done.stdout.count("<tr>") == 1 + 3
    assert done.stdout.count("<svg") == 4
