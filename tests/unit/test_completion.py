"""The completion script, which bash executes here, as it does when Tab is pressed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from syncbn.cli import COMMANDS, main

pytest.importorskip("jsonargparse", reason="the commands' parser")

PRESS_TAB = """
cd "$1"; source ./syncbn.bash; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
_shtab_syncbn
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture
def folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A folder with the script and two other files."""
    pytest.importorskip("shtab", reason="shtab writes the script")
    if shutil.which("bash") is None:
        pytest.skip("bash executes the script")
    assert main(["completion", "bash"]) == 0
    (tmp_path / "syncbn.bash").write_text(capsys.readouterr().out)
    (tmp_path / "study.yaml").touch()
    (tmp_path / "other.txt").touch()
    return tmp_path


def completed(folder: Path, *words: str) -> list[str]:
    command = ["bash", "-c", PRESS_TAB, "bash", str(folder), "syncbn", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout.split()


def test_bash_completes_commands_options_values_and_files(folder: Path) -> None:
    tops = dict.fromkeys(name.split()[0] for name in COMMANDS)
    assert completed(folder, "") == list(tops)
    subcommands = [name.split()[1] for name in COMMANDS if name.startswith("study ")]
    assert completed(folder, "study", "") == subcommands
    assert completed(folder, "study", "r") == ["run", "report"]
    assert completed(folder, "train", "--norm.gh") == ["--norm.ghost_batch_size"]
    assert completed(folder, "train", "--norm.name", "g") == ["ghost", "group"]
    assert completed(folder, "train", "--norm.affine", "") == ["true", "false"]
    assert completed(folder, "study", "run", "--config", "stu") == ["study.yaml"]
    assert completed(folder, "completion", "") == ["bash", "zsh"]


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "bench"])
def test_bash_knows_every_option(folder: Path, name: str) -> None:
    options = [option for option in COMMANDS[name].options if option.startswith("--")]
    options += ["--config", "--gpus", "--evaluation.batch"] if COMMANDS[name].takes_run else []
    assert set(options) <= set(completed(folder, *name.split(), "--"))


def test_zsh_gets_a_description_of_each_command(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab", reason="shtab writes the script")
    assert main(["completion", "zsh"]) == 0
    script = capsys.readouterr().out
    assert script.startswith("#compdef syncbn\n")
    for name, command in COMMANDS.items():
        description = command.help.replace("'", "'\"'\"'").replace("(", "\\(").replace(")", "\\)")
        assert f"{name.split()[-1]}:'" in script
        assert command.help.split("'")[0] in script or description in script, name


def test_without_shtab_or_for_another_shell_there_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 2
    said = "syncbn: error: shtab is not installed; pip install 'syncbn[completion]'\n"
    assert capsys.readouterr().err == said
    assert main(["completion", "fish"]) == 2
    assert capsys.readouterr().err == "syncbn: error: shell: got 'fish', expected one of 'bash', 'zsh'\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_option_has_a_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert COMMANDS[name].help.endswith((".", ")."))
    assert all(details["help"].endswith(".") for details in COMMANDS[name].options.values())
    assert main(["--help"]) == 0
    assert f"  {name} " in capsys.readouterr().out
    with pytest.raises(SystemExit, match="0"):
        main([*name.split(), "--help"])
    words = " ".join(capsys.readouterr().out.split())
    assert f"usage: syncbn {name}" in words
    assert name == "bench" or command_help(name) in words


def command_help(name: str) -> str:
    return " ".join(COMMANDS[name].help.split())
