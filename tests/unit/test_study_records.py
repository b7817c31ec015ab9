"""Records: a whole line is a finished run, once and for all; anything else is none."""

from __future__ import annotations

import json
import math
import multiprocessing
from datetime import timedelta

import pytest
from study_fakes import NOON, fake_result, small_study

from syncbn.study.plan.grid import state_of, study_cells
from syncbn.study.run.records import Record, Records, append, read_records, worker_name
from syncbn.train.config import ConfigError

CONFIG = study_cells(small_study())[0].config


def record(key="k", *, after=0.0, seconds=10.0, worker="w", **result):
    started = NOON + timedelta(seconds=after)
    ended = started + timedelta(seconds=seconds)
    result = fake_result(CONFIG, **result)
    return Record(key=key, worker=worker, started=started, ended=ended, seconds=seconds, result=result)


def path_of(out, worker="w"):
    return out / "records" / f"{worker}.jsonl"


def test_what_is_appended_is_read(tmp_path):
    assert read_records(tmp_path / "none") == {}
    first, second = record("a"), record("b", after=20, error=0.3)
    append(path_of(tmp_path), first)
    append(path_of(tmp_path), second)
    assert read_records(tmp_path) == {"a": first, "b": second}
    line = json.loads(path_of(tmp_path).read_text().splitlines()[0])
    assert list(line) == ["schema", "key", "worker", "started", "ended", "seconds", "result", "digest"]
    assert line["schema"] == 1
    assert line["started"] == "2026-03-01T12:00:00.000+00:00"


def test_a_diverged_run_has_its_losses_back(tmp_path):
    append(path_of(tmp_path), record(status="diverged", losses=(1.0, math.nan)))
    record_read = read_records(tmp_path)["k"]
    assert (state_of(record_read.result), state_of(record().result)) == ("diverged", "done")
    found = record_read.result
    assert found.status == "diverged"
    assert found.losses[0] == 1.0
    assert math.isnan(found.losses[1])


def test_a_line_torn_at_any_byte_is_no_record(tmp_path):
    path = path_of(tmp_path)
    append(path, record("a"))
    whole = path.read_bytes()
    append(path, record("b", after=20))
    both = path.read_bytes()
    for size in range(len(whole), len(both) + 1):
        path.write_bytes(both[:size])
        assert set(read_records(tmp_path)) == ({"a"} if size < len(both) else {"a", "b"}), size


def test_a_line_is_not_appended_to_a_torn_one(tmp_path):
    """A full disk may cut a line while the worker lives on."""
    path = path_of(tmp_path)
    append(path, record("a"))
    with path.open("ab") as file:
        file.write(b'{"schema": 1, "key": "b", "wor')
    append(path, record("c"))
    assert set(read_records(tmp_path)) == {"a", "c"}


def test_a_line_that_grows_is_read_when_it_is_whole(tmp_path):
    path = path_of(tmp_path)
    append(path, record("a"))
    data = path.read_bytes()
    path.write_bytes(data[:40])
    records = Records(tmp_path)
    records.refresh()
    assert records.get("a") is None
    path.write_bytes(data)
    records.refresh()
    assert records.get("a") == record("a")
    append(path_of(tmp_path, "v"), record("b", worker="v"))
    records.refresh()
    assert set(records.all()) == {"a", "b"}


def test_the_first_record_of_a_key_counts(tmp_path):
    append(path_of(tmp_path), record("a", error=0.1))
    append(path_of(tmp_path), record("a", error=0.2, after=-100))
    assert read_records(tmp_path)["a"].result.score == 0.1
    # Of two files, the run that ended first, whatever the files are called.
    append(path_of(tmp_path, "a"), record("a", error=0.3, after=50, worker="a"))
    assert read_records(tmp_path)["a"].result.score == 0.1
    append(path_of(tmp_path, "z"), record("a", error=0.4, after=-50, worker="z"))
    assert read_records(tmp_path)["a"].result.score == 0.4


@pytest.mark.parametrize(
    "content",
    [
        b"\x00\xff\xfe garbage\n\n\x89PNG\n",
        b"[" * 100_000 + b"\n",
        b'"text"\n17\nnull\n[1, 2]\n{}\n',
        b'{"schema": "1", "key": "a"}\n{"schema": true}\n',
        b'{"schema": 1, "step": 3, "train_loss": 0.5}\n',
    ],
    ids=["bytes", "brackets", "values", "schemas", "other_lines"],
)
def test_foreign_files_are_no_records(tmp_path, content):
    append(path_of(tmp_path), record("a"))
    path_of(tmp_path, "garbage").write_bytes(content)
    (tmp_path / "records" / "notes.txt").write_bytes(content)
    (tmp_path / "records" / "folder.jsonl").mkdir()
    assert set(read_records(tmp_path)) == {"a"}


def test_a_newer_schema_is_an_error_that_says_so(tmp_path):
    append(path_of(tmp_path), record("a"))
    line = path_of(tmp_path).read_text().partition(', "digest"')[0] + "}\n"  # that version's digest would be right
    path_of(tmp_path, "new").write_text(line.replace('"schema": 1', '"schema": 2'))
    with pytest.raises(ConfigError, match=r"new\.jsonl: got 'schema 2', expected schema 1 at most: a newer version"):
        read_records(tmp_path)


def test_a_bit_of_the_schema_is_damage_and_no_newer_version(tmp_path, caplog):
    append(path_of(tmp_path), record("a"))
    path_of(tmp_path).write_text(path_of(tmp_path).read_text().replace('"schema": 1', '"schema": 3'))
    with caplog.at_level("WARNING", "syncbn"):
        assert read_records(tmp_path) == {}
    assert "is not what was written, and does not count" in caplog.text


@pytest.mark.parametrize("change", [('"losses"', '"loss"'), ('"steps"', '"paces"'), ('"2026-', '"')])
def test_a_record_that_cannot_be_read_is_not_taken_for_a_missing_one(tmp_path, change):
    append(path_of(tmp_path), record("a"))
    line = path_of(tmp_path).read_text().partition(', "digest"')[0] + "}\n"  # another version's digest would be right
    path_of(tmp_path).write_text(line.replace(*change))
    with pytest.raises(ConfigError, match="expected a record that this version of syncbn can read"):
        read_records(tmp_path)


def test_every_process_has_a_file_of_its_own(tmp_path):
    assert worker_name() != worker_name()
    first, second = Records(tmp_path), Records(tmp_path)
    first.add("a", NOON, 1.0, fake_result(CONFIG))
    second.add("b", NOON, 1.0, fake_result(CONFIG))
    assert len(list((tmp_path / "records").iterdir())) == 2
    first.refresh()
    assert set(first.all()) == set(read_records(tmp_path)) == {"a", "b"}
    assert first.all()["a"].worker == first.worker


def add_many(out, name):
    records = Records(out)
    for number in range(50):
        records.add(f"{name}-{number}", NOON, 1.0, fake_result(CONFIG))


def test_processes_that_write_at_the_same_time(tmp_path):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=add_many, args=(tmp_path, name)) for name in "ab"]
    for writer in writers:
        writer.start()
    seen = 0
    while any(writer.is_alive() for writer in writers):
        now = len(read_records(tmp_path))
        assert now >= seen
        seen = now
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert len(read_records(tmp_path)) == 100
