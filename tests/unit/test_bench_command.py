"""``syncbn bench`` from its words to its files and exit codes."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys

import pytest
import torch

from syncbn.bench import command, suites
from syncbn.bench.peers import CONTENDERS, Contender, UnavailableError
from syncbn.bench.report import machine
from syncbn.bench.rows import ROWS, BenchResults, Row
from syncbn.bench.suites import SUITES
from syncbn.cli import main
from syncbn.kernels.cpu.build import library
from syncbn.kernels.cpu.library import instruction_sets, wanted


@pytest.fixture
def one_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    """The suites of one process, and no contender that has to be compiled."""
    monkeypatch.setattr(suites, "SUITES", tuple(suite for suite in SUITES if suite.world_size == 1))
    for name, contender in list(CONTENDERS.items()):
        if contender.compiled:

            def left_out(problem):
                raise UnavailableError("left out of this test")

            monkeypatch.setitem(CONTENDERS, name, Contender(name, contender.kind, left_out, compiled=True))


def test_the_command_writes_what_it_measures(one_suite, tmp_path, capfd):
    threads = torch.get_num_threads()
    assert main(["bench", "--shapes", "tiny", "--rounds", "3", "--dtype", "fp32,bf16", "--out", str(tmp_path)]) == 0
    out, err = capfd.readouterr()
    assert torch.get_num_threads() == threads
    assert "alone float32 1/3: tiny N=32 8x6x6" in err
    assert "USDT" not in err
    assert out.index("time / nn.BatchNorm") < out.index("copy bandwidth") < out.index("at most 0.85")
    content = json.loads((tmp_path / "bench.json").read_text())
    assert content["selection"]["dtypes"] == ["float32", "bfloat16"]
    (run,) = content["runs"]
    assert run["machine"]["torch"] == torch.__version__
    assert f"{run['machine']['processor']}, {run['machine']['instructions']}, torch" in out
    assert [line["row"] for line in run["table"]] == [row.name for row in ROWS]
    first = next(m for m in run["measurements"] if m["suite"] == "alone")
    assert len(first["timings"]["SyncBatchNorm"]["samples"]) == 9  # a small input
    assert first["costs"]["SyncBatchNorm"]["collectives"] == 0
    assert "SyncBatchNorm" in first["errors"]
    assert "SyncBatchNorm" not in first["wrong"]
    assert first["unavailable"]["textbook compiled"] == "left out of this test"
    with (tmp_path / "bench.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert {line["suite"] for line in lines} == {"alone", "ghost", "fused", "activation"}
    machine = {name: run["machine"][name] for name in ("processor", "instructions", "torch")}
    assert all(machine.items() <= line.items() for line in lines)
    local = [line for line in lines if line["contender"] == "nn.BatchNorm"]
    assert local
    assert all(float(line["ratio"]) == 1 for line in local)
    assert "memory limit" in out
    assert max(map(len, out.splitlines())) <= 100


@pytest.mark.parametrize(("limit", "code"), [(1e9, 0), (1e-9, 1)])
def test_check_ends_with_1_where_a_row_falls_short(one_suite, monkeypatch, capsys, limit, code):
    row = Row("CPU: a row", limit, ROWS[0].measure, "cpu")
    monkeypatch.setattr(command, "ROWS", (row, Row("CUDA: a row", 0.0, ROWS[0].measure, "cuda")))
    assert main(["bench", "--check", "--shapes", "tiny", "--rounds", "1", "--cpu", wanted()]) == code
    out = capsys.readouterr().out
    assert ("falls short" in out) == bool(code)
    assert "not measured: needs --device cuda" in out
    assert "measured on tiny alone" in out


def measured_instructions(selection):
    """In the child process: what this package and torch use there."""
    results = BenchResults(selection.device, machine=machine(selection.device))
    results.step_checks = {"several processes": float(selection.several_processes)}
    return results


def test_check_measures_each_instruction_set_in_a_process_of_its_own(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(command, "_measure", measured_instructions)
    environment = dict(os.environ)
    assert main(["bench", "--check", "--out", str(tmp_path)]) == 0
    assert dict(os.environ) == environment
    runs = json.loads((tmp_path / "bench.json").read_text())["runs"]
    names = instruction_sets()
    unavailable = [name for name in names if not library(name).exists()]
    for name, run in zip(names, runs, strict=True):
        expected = f"no compiled kernels (torch: {name})" if name in unavailable else name
        assert run["machine"]["instructions"] == expected
        assert run["step_checks"]["several processes"] == (name in (names[0], names[-1]))
    lines = capsys.readouterr().out.splitlines()
    assert (names in [line.split() for line in lines]) == (len(names) > 1)


def test_one_instruction_set_can_be_chosen(monkeypatch, capsys):
    monkeypatch.setattr(command, "_measure", measured_instructions)
    name = instruction_sets()[-1]
    assert main(["bench", "--check", "--cpu", name]) == 0
    assert capsys.readouterr().err == f"instruction set: {name}\n"


MISTAKES = [
    ("--cpu foo", "cpu: got 'foo', expected any of "),
    ("--compile --device cuda", "device: got "),
    ("--device tpu", "device: got 'tpu', expected one of cpu, cuda"),
    ("--rounds 0", "rounds: got '0', expected a positive integer"),
    ("--dtype int8", "dtype: got 'int8', expected any of float32, bfloat16, float16"),
    ("--shapes resnet50,foo", "shapes: got 'foo', expected any of resnet50"),
    ("--nonsense", "unrecognized arguments: --nonsense (see --help)"),
    ("--out", "out: expected one argument"),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES, ids=[words for words, _ in MISTAKES])
def test_a_mistake_is_one_line_and_exit_code_2(words, message, capsys):
    assert main(["bench", *words.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"syncbn: error: {message}"), error
    assert error.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_cuda_is_asked_for_where_there_is_none(capsys):
    assert main(["bench", "--device", "cuda"]) == 2
    assert "finds no CUDA device" in capsys.readouterr().err


def test_a_folder_that_cannot_be(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["bench", "--out", str(tmp_path / "file")]) == 2
    assert f"{tmp_path / 'file'}: File exists" in capsys.readouterr().err


def test_the_list_says_what_is_timed(capsys):
    assert main(["bench", "--list", "--shapes", "mlp"]) == 0
    out = capsys.readouterr().out
    assert "torch's SyncBatchNorm function: not here" in out
    assert "mlp N=1024 1024" in out
    assert "resnet50 N=" not in out


def test_the_bench_needs_torch_alone():
    """A GPU machine may have nothing else: no parser, YAML, progress bars, arrays or plots are imported."""
    code = "import sys, syncbn.cli; print(syncbn.cli.main(['bench', '--list', '--shapes', 'tiny']), *sys.modules)"
    blocked = "import sys; sys.modules.update(dict.fromkeys(sys.argv[1].split(',')));"
    names = "jsonargparse,yaml,rich,matplotlib,accelerate,torchvision,timm,scipy,pandas"
    done = subprocess.run([sys.executable, "-c", blocked + code, names], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "timm's BatchNormAct2d: not here: " in done.stdout


def test_bench_is_listed_with_the_commands(capsys):
    pytest.importorskip("jsonargparse", reason="the other commands' parser")
    assert main(["--help"]) == 0
    assert "bench" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="0"):
        main(["bench", "--help"])
    assert "--check" in capsys.readouterr().out
