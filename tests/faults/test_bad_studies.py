"""A study file with a value of the wrong kind anywhere in it is a study, or one line; any other file is one line."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from task_cases import Sign

from syncbn.cli import main
from syncbn.study.plan.grid import Study
from syncbn.study.plan.study_file import study_from_dict
from syncbn.train import train
from syncbn.train.config import ConfigError, config_from_dict, shown
from syncbn.train.yaml_file import read_yaml

TUNED = {
    "name": "tuned",
    "title": "Tuned",
    "question": "What?",
    "notes": "None.",
    "base": {"data": {"name": "digits", "validation_fraction": 0.2}, "budget": {"epochs": 8}, "task": {"options": {}}},
    "arms": {
        "batch": {"label": "B", "reference": True, "tune": {"optimizer.lr": [0.1, 0.2, 0.3, 0.4]}},
        "sync": {"overrides": {"norm": {"name": "sync"}}, "only": {"data.class_skew": [1]}},
    },
    "axes": {"data.class_skew": [1, 2]},
    "sweep": {"kind": "decoupled", "vary": "per_gpu_batch_size", "values": [2, 4], "global_batch_size": 8},
    "seeds": [0],
    "tune": {"optimizer.lr": [0.1, 0.2, 0.3, 0.4], "seeds": 2, "untuned": True, "halving": 2},
    "contrasts": [{"arm": "sync", "against": {"arm": "batch"}, "no_worse_by": 1}],
    "parity": {"arm": "batch", "processes": [1, 2], "steps": 3, "at": {"per_gpu_batch_size": 2}},
}
OWN = {
    "name": "own",
    "title": "Own",
    "question": "What?",
    "base": {"gpus": 4, "task": {"options": {"a": {"b": 1}}}},
    "arms": {"batch": {}, "sync": {"overrides": {"norm": {"name": "sync"}}}},
    "seeds": [0],
    "run": "module:function",
    "metric": {"name": "dice", "higher_is_better": True, "percent": True},
    "processes": 2,
    "sweep": {"kind": "coupled", "values": [2, 4], "hold": ["epochs", "steps"], "steps": 4},
}
ODD = (None, [], "x" * 5000, {1: 2}, 10**400, math.nan)


def places(tree: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield at
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from places(value, (*at, key))


def with_value(tree: Any, place: tuple[Any, ...], value: Any) -> Any:
    if not place:
        return value
    copy = json.loads(json.dumps(tree))
    below = copy
    for key in place[:-1]:
        below = below[key]
    below[place[-1]] = value
    return copy


@pytest.mark.timeout(120)
@pytest.mark.parametrize("content", [TUNED, OWN], ids=["tuned", "own"])
@pytest.mark.fault(
    "mistake",
    "a value of the wrong kind in a study's file ({id})",
    moment="before the study",
    outcome="one line of bounded length",
    lost="nothing",
)
def test_odd_values_are_a_study_or_one_line(content: dict[str, Any]) -> None:
    assert isinstance(study_from_dict(content), Study)
    for place in places(content):
        for value in ODD:
            try:
                study_from_dict(with_value(content, place, value))
            except ConfigError as error:
                message = str(error)
                assert message.isprintable(), (place, value)
                assert len(message) < 900, (place, value)
            except Exception as error:
                raise AssertionError(f"{place}: {value!r:.40}: {type(error).__name__}: {error}") from error


def test_a_study_that_no_memory_holds_is_refused_at_once() -> None:
    axes = {name: list(range(1, 1001)) for name in ("data.class_skew", "data.train_samples", "model.width")}
    for change, number in (
        ({"axes": axes}, 1000**3),
        ({"seeds": list(range(60_000))}, 60_000),
        ({"tune": {**axes, "optimizer.lr": [0.1], "seeds": 1000}}, 1000**4),
    ):
        arms = {"batch": {}}
        content = {"name": "n", "title": "t", "question": "q", "base": {}, "arms": arms, "seeds": [0], **change}
        if number > 100_000:
            with pytest.raises(ConfigError, match=f"^study: got {number}, expected a study of at most 100,000 runs"):
                study_from_dict(content)
    with pytest.raises(ConfigError, match=r"tune.seeds: got 1000000000000, expected a number of seeds up to 1000"):
        study_from_dict({**TUNED, "tune": {"optimizer.lr": [0.1, 0.2], "seeds": 10**12}})


FILES = {
    "nothing": b"",
    "a section without a value": b"name: x\ntitle: x\nquestion: x\nbase:\narms:\nseeds: [0]\n",
    "latin-1": "title: é".encode("latin-1"),
    "utf-16": "title: x".encode("utf-16"),
    "binary": bytes(range(256)),
    "deep": b"[" * 1000,
    "deep mappings": b"".join(b" " * level + b"a:\n" for level in range(1000)),
    "digits": b"seeds: [" + b"9" * 5000 + b"]",
    "a NUL": b"name: x\0",
    "an escaped NUL": b'name: "x\\0"',
    "half a character": b'title: "\\ud800"',
    "a bomb": b"a: &a [x, x]\n"
    + b"".join(b"%c: &%c [*%c, *%c, *%c, *%c]\n" % (c, c, *[c - 1] * 4) for c in range(98, 120)),
    "itself": b"base: &a {b: *a}",
    "twice": b"seeds: [0]\nseeds: [1]\n",
}


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.fault(
    "mistake",
    "a file that is no study, such as binary, UTF-16 or a YAML bomb",
    moment="before the study",
    outcome="one line and exit code 2; nothing is written",
    lost="nothing",
)
def test_a_file_that_is_no_study(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "s.yaml"
    path.write_bytes(FILES[kind])
    for words in (["plan"], ["run", "--out", str(tmp_path / "out")], ["status", "--out", str(tmp_path / "out")]):
        assert main(["study", words[0], "--config", str(path), *words[1:]]) == 2
        error = capsys.readouterr().err
        assert error.startswith("syncbn: error: "), error
        assert str(path) in error
        assert error.count("\n") == 1
        assert len(error) < 1000
    assert not (tmp_path / "out").exists()


def test_what_no_path_and_no_file_can_hold(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    for text in ('data: {root: "a\\0b"}', '{"a\\0": 1}', 'task: {options: {x: "\\uDFFF"}}'):
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"a file in YAML \(line 1: a text has a NUL or half a character in it\)"):
            read_yaml(path, "config")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optimizer": {"lr": 1e308}}, "optimizer.lr: got 1e+308, expected a number of at most 3.4e+38"),
        ({"norm": {"r_max": -1e39}}, "norm.r_max: got -1e+39, expected a number of at least -3.4e+38"),
        ({"gpus": 10**30}, f"gpus: got {10**30}, expected a number of at most 2147483647"),
        ({"gpus": 2**21}, "gpus: got 2097152, expected an integer of at most 1,048,576"),
        ({"optimizer": {"lr": 10**400}}, "optimizer.lr: got 100000"),
        ({"model": {"options": {"a": {1: 2}}}}, "model.options: got {'a': {1: 2}}, expected names, and values as"),
        ({"task": {"options": {"a": [{None: 2}]}}}, "task.options: got {'a': [{None: 2}]}, expected names, and"),
    ],
    ids=str,
)
def test_numbers_that_nothing_can_be_computed_with(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        config_from_dict(values)
    assert str(error.value).startswith(message)


@pytest.mark.fault(
    "mistake",
    "memory does not hold the network",
    moment="when it is built",
    outcome="one line and exit code 2",
    lost="the run",
)
def test_a_network_that_no_memory_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """torch's own error, as to allocate what is just too much would take the machine's memory first."""

    def fails(*arguments: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory\nand a traceback in C++")

    monkeypatch.setattr("syncbn.train.tasks.classification.Classification.normalized_model", fails)
    assert main(["train", "--data.name", "digits", "--device", "cpu", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    expected = "task classification: the network raised RuntimeError: DefaultCPUAllocator: can't allocate memory (trace"
    assert error.startswith(f"syncbn: error: {expected}"), error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "options",
    [{"name": "adamw", "lr": 3e38}, {"lr": 3e38, "lr_scaling": "linear", "lr_reference_batch_size": 1}],
    ids=lambda options: options.get("name", "scaled"),
)
@pytest.mark.fault(
    "mistake",
    "a learning rate outgrows the weights' type",
    moment="in the first step",
    outcome="one line that names `optimizer.lr`",
    lost="the run",
)
def test_a_learning_rate_that_outgrows_the_weights(options: dict[str, Any]) -> None:
    config = config_from_dict({"per_gpu_batch_size": 32, "device": "cpu", "optimizer": options})
    with pytest.raises(ConfigError, match=r"^optimizer.lr: got 3e\+38, expected one whose steps can be taken \(value"):
        train(config, task=Sign())


def test_a_message_is_one_printable_line_of_a_bounded_length() -> None:
    assert shown("a" * 58) == repr("a" * 58)
    assert shown("a" * 5000) == f"'{'a' * 29}...{'a' * 29}'"
    assert shown(Path("a" * 200)) == repr("a" * 200), "a path is shown whole"
    error = ConfigError("key\x1b[31m\n" * 200, "v\n" * 500, "e\n" * 2000)
    assert str(error).isprintable()
    assert len(str(error)) < 900
    assert (error.key[:3], error.value[:2], error.expected[:2]) == ("key", "v\n", "e\n")
