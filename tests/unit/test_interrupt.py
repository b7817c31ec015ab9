"""Ctrl-C: one line, which says how to go on, and exit code 130."""

from __future__ import annotations

import pytest
import study_fakes
from study_fakes import small_study

from syncbn.cli import COMMANDS, Command, main
from syncbn.study import commands
from syncbn.train import loop

pytest.importorskip("jsonargparse", reason="the commands' parser")


def test_a_study(tmp_path, monkeypatch, capsys):
    """In place of the trainer: two runs, then Ctrl-C."""

    def train(config, out=None, *, resume=False):
        if len(runs) == 2:
            raise KeyboardInterrupt
        runs.append(out)
        study_fakes.train(config, out)

    runs = []
    monkeypatch.setattr(commands, "load_study", lambda _: small_study())
    monkeypatch.setattr(commands, "train_function", lambda _: train)
    run_cells = commands.run_cells
    monkeypatch.setattr(commands, "run_cells", lambda *given, **how: run_cells(*given, **{**how, "executor": "here"}))
    out = tmp_path / "my study"
    assert main(["study", "run", "--config", "small", "--out", str(out)]) == 130
    again = f"to go on: syncbn study run --config small --out '{out}'"
    assert capsys.readouterr().err == f"syncbn: stopped by Ctrl-C with 2 of 6 runs done; {again}\n"


@pytest.mark.parametrize("launched", [False, True], ids=["alone", "under_a_launcher"])
def test_a_run(tmp_path, monkeypatch, capsys, launched):
    out = tmp_path / "run"

    def train(config, out, **options):
        if options["trackers"]:
            out.mkdir()
            (out / "config.yaml").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "train", train)
    assert main(["train", "--out", str(out)]) == 130
    assert capsys.readouterr().err == "syncbn: stopped by Ctrl-C; the run had not begun\n"
    if launched:
        monkeypatch.setenv("RANK", "0")
    assert main(["train", "--out", str(out), "--trackers", "[tensorboard]"]) == 130
    again = f"to go on from the last checkpoint: syncbn train --resume --out {out} --trackers '[tensorboard]'"
    again = "to go on from the last checkpoint, add --resume to the command" if launched else again
    assert capsys.readouterr().err == f"syncbn: stopped by Ctrl-C; {again}\n"
    monkeypatch.setenv("RANK", "1")
    assert main(["train", "--out", str(out)]) == 130
    assert not capsys.readouterr().err, "one process speaks"


def test_any_other_command(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setitem(COMMANDS, "env", Command(interrupted, "Raises."))
    assert main(["env"]) == 130
    assert capsys.readouterr().err == "syncbn: stopped by Ctrl-C\n"
