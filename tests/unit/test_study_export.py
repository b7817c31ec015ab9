"""A study's table for LaTeX and other programs, and its figures as files."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
from dataclasses import replace

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
    assert r"Reference $<$b$>$ (reference) & 2.1 & 1.9 to 2.3 & – \\" in text
    assert "Verdicts are of the planned contrasts against Reference" in text
    assert "– in place of a verdict: no contrast is planned for the setting." in text
    check_latex(text)
    if shutil.which("pdflatex"):
        page = r"\documentclass{article}\usepackage{booktabs}\begin{document}" + text + r"\end{document}"
        command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "-output-directory=/tmp"]
        assert subprocess.run(command, input=page, text=True, check=False, timeout=60).returncode == 0


COMMANDS = {
    *("begin", "end", "centering", "caption", "toprule", "midrule", "bottomrule", "times"),
    *("textbackslash", "textasciitilde", "textasciicircum", "\\\\", *"&%$#_{}"),
}
"""What the packages that the table names know."""


def check_latex(text):
    """What stops LaTeX: unknown commands, braces, environments or dollars that do not close, and uneven rows."""
    tokens = re.findall(r"\\(?:[a-zA-Z]+|.)|[{}$&^_#~%]", text)
    names = [token[1:] if token != r"\\" else token for token in tokens if token.startswith("\\")]
    assert set(names) <= COMMANDS, set(names) - COMMANDS
    assert not {"^", "_", "#", "%"} & set(tokens), "special characters outside of their commands"
    depth = 0
    for token in tokens:
        depth += {"{": 1, "}": -1}.get(token, 0)
        assert depth >= 0
    assert depth == tokens.count("$") % 2 == 0
    ends = []
    for word, name in re.findall(r"\\(begin|end)\{(\w+)\}", text):
        assert word == "begin" or ends.pop() == name
        ends += [name] * (word == "begin")
    assert not ends
    columns = re.search(r"\\begin\{tabular\}\{([lr]+)\}", text)[1]
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert {len(re.findall(r"(?<!\\)&", row)) + 1 for row in rows} == {len(columns)}


def test_latex_says_what_each_setting_was_compared_with():
    contrasts = [
        {"arm": "sync", "against": {"arm": "batch"}},
        {"arm": "iid", "at": {"optimizer.lr": 0.1}, "against": {"at": {"optimizer.lr": 0.2}}},
    ]
    study = small_study(seeds=[0, 1, 2], axes={"optimizer.lr": [0.1, 0.2]}, contrasts=contrasts)
    cells = study_cells(study)
    results = {cell.key: fake_result(cell.config, ERRORS[cell.arm] + 0.001 * cell.seed) for cell in cells}
    summary = summary_of(study, cells, results)
    text = latex(summary, findings_of(summary))
    check_latex(text)
    assert r"optimizer lr & test error in \% & 95 \% interval & verdict & against \\" in text
    assert r"SyncBatchNorm & 0.1 & 3.1 & 2.9 to 3.3 & better & Local BatchNorm \\" in text
    assert re.search(r"\(reference\) & 0\.1 & .* & no difference shown & optimizer lr 0\.2 \\\\", text), "its own"
    assert re.search(r"SyncBatchNorm & 0\.2 & .* & – & – \\\\", text)
    assert "Verdicts are of the planned contrasts, by" in text
    alone = replace(study, contrasts=())
    summary = summary_of(alone, cells, results)
    text = latex(summary, findings_of(summary))
    check_latex(text)
    assert "erdict" not in text


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
