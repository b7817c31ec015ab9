"""A study's table for LaTeX and other programs, and its figures as files."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess

import pytest
from study_fakes import fake_result, small_study

from syncbn.cli import main
from syncbn.study import commands
from syncbn.study.analysis.findings import findings_of
from syncbn.study.analysis.summary import summary_of
from syncbn.study.plan.grid import study_cells
from syncbn.study.report.export import export, latex

STUDY = small_study(seeds=[0, 1, 2], title="50 % of a_b & {c}^2 \\ #1 ~ $x$")
CELLS = study_cells(STUDY)
ERRORS = {"batch": 0.4, "sync": 0.03, "iid": 0.02}
RESULTS = {cell.key: fake_result(cell.config, ERRORS[cell.arm] + 0.001 * cell.seed) for cell in CELLS}
LOST = next(cell for cell in CELLS if cell.arm == "sync")
RESULTS[LOST.key] = fake_result(LOST.config, status="diverged")


def test_the_table_has_numbers_as_the_task_gives_them(tmp_path):
    export(STUDY, CELLS, RESULTS, "csv", tmp_path / "deep" / "table.csv")
    export(STUDY, CELLS, RESULTS, "json", tmp_path / "table.json")
    rows = list(csv.DictReader((tmp_path / "deep" / "table.csv").open()))
    assert [row["arm"] for row in rows] == ["batch", "sync", "iid"]
    batch, sync, reference = rows
    assert float(batch["mean"]) == pytest.approx(0.401)
    assert (batch["against"], batch["verdict"]) == ("iid", "worse")
    assert float(batch["difference"]) == pytest.approx(0.38)
    assert (sync["finished"], sync["diverged"], sync["verdict"]) == ("2", "1", "diverged")
    assert (reference["verdict"], reference["normalization_batch_size"]) == ("", "4")
    assert json.loads((tmp_path / "table.json").read_text())[0]["mean"] == pytest.approx(0.401)


def test_latex_has_no_command_of_the_users_text():
    summary = summary_of(STUDY, CELLS, RESULTS)
    text = latex(summary, findings_of(summary))
    assert r"50 \% of a\_b \& \{c\}\textasciicircum{}2 \textbackslash{} \#1 \textasciitilde{} \$x\$." in text
    assert r"Local BatchNorm & 40.1 & 39.9 to 40.3 & worse \\" in text
    assert r"SyncBatchNorm & 3.1 (1 run diverged) &" in text
    assert text.count(r"\\") == 4
    if shutil.which("pdflatex"):
        page = r"\documentclass{article}\usepackage{booktabs}\begin{document}" + text + r"\end{document}"
        command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "-output-directory=/tmp"]
        assert subprocess.run(command, input=page, text=True, check=False, timeout=60).returncode == 0


@pytest.mark.parametrize(("form", "start"), [("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_every_figure_is_a_file(tmp_path, form, start):
    paths = export(STUDY, CELLS, RESULTS, form, tmp_path / "figures")
    assert [path.name for path in paths] == [f"{name}.{form}" for name in ("error_by_arm", "contrasts", "curves")]
    assert all(path.read_bytes().startswith(start) for path in paths)


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(commands, "load_study", lambda _: STUDY)
    found = {key: type("Record", (), {"result": result}) for key, result in RESULTS.items()}
    monkeypatch.setattr(commands, "read_records", lambda _: found)
    words = ["study", "export", "--config", "small", "--out", str(tmp_path)]
    assert main(words) == 0
    assert capsys.readouterr().out == f"{tmp_path}/small.tex\n"
    assert main([*words, "--format", "csv", "--to", str(tmp_path / "a.csv")]) == 0
    assert (tmp_path / "a.csv").exists()
    for wrong, message in {
        ("--format", "doc"): "format: got 'doc', expected one of latex, csv, json, parquet, pdf, svg",
        ("--format", "csv", "--to", str(tmp_path)): "expected the name of a csv file, not a folder",
        ("--format", "pdf", "--to", str(tmp_path / "a.csv")): "expected a folder for the figures (pdf)",
    }.items():
        assert main([*words, *wrong]) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setattr(commands, "read_records", lambda _: {})
    assert main(words) == 2
    assert "a folder with at least one finished run" in capsys.readouterr().err
