"""Damaged files in the folder of a run or a study: they count as missing, or one line says what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from syncbn.cli import main
from syncbn.study.plan.folder import save_study
from syncbn.study.plan.grid import study_cells
from syncbn.study.plan.parity_file import ParityResult, read_parity, write_parity
from syncbn.study.run import parity
from syncbn.study.run.records import Records, read_records
from syncbn.train import stored
from syncbn.train.config import ConfigError
from syncbn.train.result import RunResult
from tests.unit.study_fakes import NOON, fake_result, small_study

RUN = ["--data.name", "synthetic", "--data.synthetic_samples", "32", "--data.image_size", "8", "--model.width", "4"]
RUN += ["--gpus", "2", "--per_gpu_batch_size", "4", "--budget.epochs", "2", "--device", "cpu", "--progress", "false"]
NOT_WHOLE = {
    "empty": b"",
    "cut off": b'{"status": "ok", "task": "classifi',
    "bytes": bytes(range(128, 256)),
    "deep": b"[" * 100_000,
    "digits": b"9" * 5000,
    "zeros": bytes(4096),
}
"""What a file may hold after a crash of the machine or of its disk."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "out"
    assert main(["train", *RUN, "--out", str(out)]) == 0
    return out


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "out")


def one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("syncbn: error: "), error
    assert error.count("\n") == 1, error
    assert len(error) < 1000
    return error


@pytest.mark.parametrize("damage", NOT_WHOLE)
@pytest.mark.fault(
    "file",
    "`result.json` is empty, cut off, zeros or other bytes",
    moment="after the run",
    outcome="`--resume` makes the same result again",
    lost="the steps since the last checkpoint",
)
def test_a_result_that_is_not_whole_is_made_again(out: Path, damage: str) -> None:
    before = RunResult.from_json(out / "result.json")
    (out / "result.json").write_bytes(NOT_WHOLE[damage])
    assert main(["train", "--out", str(out), "--resume", "--progress", "false"]) == 0
    after = RunResult.from_json(out / "result.json")
    assert (after.losses, after.test, after.history) == (before.losses, before.test, before.history)


OTHER_RESULTS: dict[str, Any] = {
    "a list": [],
    "null": None,
    "no fields": {},
    "a status": {"status": "fine"},
    "a text for a number": {"steps": "many"},
    "no number": {"seconds": None},
    "losses": {"losses": [1.0, "x"]},
    "more fields": {"colour": "red"},
    "a metric": {"metric": {"name": "error", "percent": "yes"}},
    "another metric": {"metric": {"name": "dice"}},
    "no test": {"test": None},
    "a test": {"test": {"error": "small"}},
    "history": {"history": [{"step": "x", "test": None}]},
    "history without a test": {"history": [{"step": 1}]},
    "evaluations": {"evaluations": [{"statistics": "running", "test": [1]}]},
    "layers": {"layers": ["conv"]},
}


@pytest.mark.parametrize("change", OTHER_RESULTS)
@pytest.mark.fault(
    "file",
    "`result.json` is of another version or kind",
    moment="after the run",
    outcome="one line; the file stays as it is",
    lost="nothing",
)
def test_a_result_of_another_kind_is_not_overwritten(
    out: Path, change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    values, new = json.loads((out / "result.json").read_text()), OTHER_RESULTS[change]
    content = json.dumps({**values, **new} if isinstance(new, dict) and new else new)
    (out / "result.json").write_text(content)
    error = one_line(["train", "--out", str(out), "--resume"], capsys)
    assert f"result: got '{out}/result.json', expected a result that this version of syncbn can read" in error
    assert "move it away to run that run again" in error
    assert (out / "result.json").read_text() == content


@pytest.mark.fault(
    "file",
    "`config.yaml` of a run is damaged",
    moment="before `--resume`",
    outcome="one line that says how to go on",
    lost="nothing",
)
def test_the_configuration_in_the_folder_of_a_run(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for content in (b"gpus: [", bytes(range(256)), b"gpus: 2\ncolour: red\n", b"gpus: no\n", b"x"):
        (out / "config.yaml").write_bytes(content)
        for words in ([], RUN):
            error = one_line(["train", *words, "--out", str(out), "--resume"], capsys)
            assert f"or remove {out}/config.yaml, and give the run's --config and options with --resume" in error
    one_line(["diagnose", "--checkpoint", str(out)], capsys)
    (out / "config.yaml").unlink()
    assert main(["train", *RUN, "--out", str(out), "--resume"]) == 0


@pytest.mark.parametrize("damage", NOT_WHOLE)
@pytest.mark.fault(
    "file",
    "`model.safetensors` is damaged",
    moment="before `syncbn diagnose`",
    outcome="one line that names it",
    lost="the final weights",
)
def test_weights_that_are_not_whole(out: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = out / "model.safetensors"
    path.write_bytes(NOT_WHOLE[damage])
    error = one_line(["diagnose", "--checkpoint", str(out)], capsys)
    assert f"weights: got '{path}', expected a file in safetensors' format" in error
    with pytest.raises(stored.IncompleteFile, match="weights: got"):
        stored.load_tensors(path)


@pytest.mark.parametrize("damage", NOT_WHOLE)
@pytest.mark.fault(
    "file",
    "a line of a user's `metrics.jsonl` is damaged",
    moment="before a report",
    outcome="the other lines are read",
    lost="the line",
)
def test_reported_metrics_lose_only_the_lines_that_are_damaged(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [b'{"step": 1, "x": 0.1}', NOT_WHOLE[damage], b'{"step": 2, "x": null}', b'{"x": 1}', b"[3]", b"7"]
    lines += [b'{"step": "2"}', b'{"step": [1]}', b'{"step": 3, "x": 1e-17}', b'{"step": 4}', b'{"step": 1']
    path.write_bytes(b"\n".join(lines))
    found = [{"step": 1, "x": 0.1}, {"step": 2, "x": None}, {"step": 3, "x": 1e-17}, {"step": 4}]
    assert stored.json_lines(path) == found


# ---- the folder of a study


@pytest.mark.parametrize("damage", NOT_WHOLE)
@pytest.mark.fault(
    "file",
    "a line of a study's records is damaged",
    moment="after the run",
    outcome="the run counts as missing, the others as done",
    lost="the record, if the run's folder is gone too",
)
def test_a_damaged_line_of_a_record_file_is_no_record(tmp_path: Path, damage: str) -> None:
    cells = study_cells(small_study())
    records = Records(tmp_path)
    for cell in cells[:3]:
        records.add(cell.key, NOON, 1.0, fake_result(cell.config))
    path = next((tmp_path / "records").iterdir())
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + NOT_WHOLE[damage].replace(b"\n", b"") + b"\n" + lines[2])
    assert read_records(tmp_path).keys() == {cells[0].key, cells[2].key}


@pytest.mark.fault(
    "file",
    "a bit of a study's record is turned, in a number perhaps",
    moment="after the run",
    outcome="a warning; the run counts as missing, and is recorded again from its folder",
    lost="the record, if the run's folder is gone too",
)
def test_a_turned_bit_in_a_record_is_never_another_result(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cell = study_cells(small_study())[0]
    Records(tmp_path).add(cell.key, NOON, 1.0, fake_result(cell.config))
    whole, path = read_records(tmp_path), next((tmp_path / "records").iterdir())
    line, lost, refused = path.read_bytes(), 0, []
    places = range(0, len(line) - 1, 3)
    for place in places:
        path.write_bytes(line[:place] + bytes([line[place] ^ 1 << place % 8]) + line[place + 1 :])
        try:
            found = read_records(tmp_path)
        except ConfigError as error:
            refused.append(str(error))
            continue
        assert found in ({}, whole), place
        lost += not found
    assert lost > 0.95 * len(places)
    assert all("a newer version of syncbn wrote them" in words for words in refused)
    assert f"the record at byte 0 of {path} is not what was written" in caplog.text
    path.write_bytes(line[: line.rindex(b', "digest"')] + b"}\n")
    assert read_records(tmp_path) == whole, "records of earlier versions have no digest"


@pytest.mark.parametrize("damage", NOT_WHOLE)
@pytest.mark.fault(
    "file",
    "`parity.json` of a study is damaged",
    moment="after the study",
    outcome="the check is made again",
    lost="the check",
)
def test_a_damaged_parity_check_is_made_again(tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    study = small_study(parity={"arm": "sync", "processes": [1, 2], "steps": 3})
    cells, calls = study_cells(study), []
    monkeypatch.setattr(parity, "run_parity", lambda *arguments: bool(calls.append(arguments)) or True)
    for number in (1, 2):
        (tmp_path / "parity.json").write_bytes(NOT_WHOLE[damage])
        assert read_parity(tmp_path) is None
        assert parity.check_parity(study, cells, tmp_path)
        assert len(calls) == number
        assert parity.check_parity(study, cells, tmp_path)
        assert len(calls) == number, "a whole one is kept"


def test_a_parity_check_of_another_kind_is_none(tmp_path: Path) -> None:
    whole = ParityResult(key="k", arm="a", processes=[1, 2], steps=3, lines=["same"], agrees=True)
    write_parity(whole, tmp_path)
    assert read_parity(tmp_path) == whole
    for change in ({"lines": None}, {"agrees": "yes"}, {"processes": 2}, {"arm": [1]}):
        (tmp_path / "parity.json").write_text(json.dumps({**whole, **change}))
        assert read_parity(tmp_path) is None


@pytest.mark.fault(
    "file",
    "`study.yaml` in a study's folder is damaged",
    moment="before `study compare`",
    outcome="one line that says how to go on",
    lost="nothing",
)
def test_the_file_of_a_study_in_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = small_study()
    for name in "ab":
        save_study(study, tmp_path / name)
    for content in (b"", b"name: [", bytes(range(256)), b"name: x\n", b"&a [*a]"):
        (tmp_path / "b/study.yaml").write_bytes(content)
        Records(tmp_path / "a").add(study_cells(study)[0].key, NOON, 1.0, fake_result(study_cells(study)[0].config))
        error = one_line(["study", "compare", str(tmp_path / "a"), str(tmp_path / "b")], capsys)
        assert f"{tmp_path}/b/study.yaml" in error
        assert "or name the study with --config-b" in error


@pytest.mark.fault(
    "file",
    "a folder has the name of a file",
    moment="when it is read",
    outcome="one line with the path",
    lost="nothing",
)
def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    for name in ("result.json", "parity.json"):
        (tmp_path / name).mkdir()
    with pytest.raises(ConfigError, match=r"^result: got '.*result.json', expected a file that can be read \(Is a dir"):
        RunResult.from_json(tmp_path / "result.json")
    with pytest.raises(ConfigError, match=r"^parity: got '.*parity.json', expected a file that can be read \(Is a dir"):
        read_parity(tmp_path)
    with pytest.raises(ConfigError, match=r"expected a file that can be read .No such file"):
        RunResult.from_json(tmp_path / "none.json")
    with pytest.raises(ConfigError, match=r"a file in JSON .*null"):
        RunResult.from_json(Path("a\0b"))
