"""YAML files: plain values as YAML 1.2 has them, and one line for everything that is wrong."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from syncbn.cli import main
from syncbn.train.config import ConfigError, RunConfig, config_from_dict, config_to_dict, known_keys, load_config
from syncbn.train.yaml_file import plain_value, read_yaml, yaml_text


def read(tmp_path: Path, content: str | bytes) -> dict[str, Any]:
    path = tmp_path / "c.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_yaml(path, "config")


PLAIN: dict[str, Any] = {
    "no": "no",
    "yes": "yes",
    "on": "on",
    "off": "off",
    "true": True,
    "False": False,
    "null": None,
    "~": None,
    "": None,
    "1e3": 1000.0,
    "1E-3": 0.001,
    "1.5": 1.5,
    ".5": 0.5,
    "5.": 5.0,
    "-.inf": -math.inf,
    "12": 12,
    "-12": -12,
    "010": 10,
    "0o10": 8,
    "0x1F": 31,
    "1:30": "1:30",
    "1_000": "1_000",
    "2024-13-45": "2024-13-45",
    "2024-01-02": "2024-01-02",
    "'12'": "12",
    "1.2.3": "1.2.3",
    "=": "=",
}


@pytest.mark.parametrize("text", PLAIN)
def test_plain_values(tmp_path: Path, text: str) -> None:
    expected = PLAIN[text]
    found = read(tmp_path, f"key: {text}\n")["key"]
    assert (type(found), found) == (type(expected), expected)


def test_keys_are_texts_too(tmp_path: Path) -> None:
    assert read(tmp_path, "{no: 1, on: 2, 3: 4}") == {"no": 1, "on": 2, 3: 4}
    with pytest.raises(ConfigError, match=r"^no: got 1, expected a known key"):
        load_config(tmp_path / "c.yaml")


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    texts = [*PLAIN, "a\nb", "a: b", " a", "#", "é", "'", '"', "- 1", "0b1", "1e", "true ", "0.1e-5", "<<"]
    values = {"texts": texts, "numbers": [1e-5, 1e22, 10**20, 0.1, -0.0, math.inf], "others": [None, True, {}, []]}
    assert read(tmp_path, yaml_text(values)) == values
    same = [1, 2]
    assert "&" not in yaml_text({"a": same, "b": same})
    config = config_from_dict({"task": {"name": "no", "options": {"x": "1e3", "y": "on", "z": ["010", 1e-7]}}})
    assert config_from_dict(read(tmp_path, yaml_text(config_to_dict(config)))) == config


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)
)
BAD: dict[str, tuple[str | bytes, str]] = {
    "twice": ("gpus: 1\nnorm: {}\ngpus: 2\n", "(line 3: key 'gpus' is given twice)"),
    "twice within": ("norm: {eps: 1, eps: 2}", "(line 1: key 'eps' is given twice)"),
    "text": ("secret words", "keys with their values, not a str"),
    "list": ("[1, 2]", "keys with their values, not a list"),
    "number": ("3", "keys with their values, not a int"),
    "not closed": ("norm: [1\n", "(line 2: "),
    "tab": ("norm:\n\teps: 1", "(line 2: "),
    "latin-1": ("title: é".encode("latin-1"), "a file in UTF-8 (byte 7 is not)"),
    "utf-16": ("gpus: 4".encode("utf-16"), "a file in UTF-8 (byte 0 is not)"),
    "binary": (bytes(range(256)), "a file in"),
    "nul": (b"gpus: 4\0", "a file in YAML"),
    "deep": ("[" * 50_000, "nested too deeply"),
    "deep mappings": ("".join(f"{' ' * i}a:\n" for i in range(1200)), "nested too deeply"),
    "digits": ("gpus: " + "9" * 5000, "a file in YAML (Exceeds the limit"),
    "bomb": (BOMB, "its anchors repeat more than 100,000 values"),
    "anchor of itself": ("a: &a [1, *a]", "a value holds itself"),
    "mapping of itself": ("a: &a {b: *a}", "a value holds itself"),
    "unknown anchor": ("a: *b", "found undefined alias"),
    "python object": ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
    "a list as key": ("? [1, 2]\n: 3", "found unhashable key"),
    "large": ("a: " + "x" * 2**20, "it has 1,048,579 bytes"),
    "two documents": ("a: 1\n---\nb: 2", "but found another document"),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", BAD)
def test_what_is_wrong_is_one_line(tmp_path: Path, kind: str) -> None:
    content, words = BAD[kind]
    with pytest.raises(ConfigError) as error:
        read(tmp_path, content)
    message = str(error.value)
    assert message.startswith(f"config: got '{tmp_path / 'c.yaml'}', expected a file")
    assert words in message
    assert "\n" not in message
    assert "secret" not in message


def test_files_that_are_none(tmp_path: Path) -> None:
    for path, words in ((tmp_path, "Is a directory"), (tmp_path / "none", "No such file"), (Path("a\0b"), "null")):
        with pytest.raises(ConfigError, match=f"a file that can be read .*{words}"):
            read_yaml(path, "config")
    assert read(tmp_path, "") == read(tmp_path, "# nothing\n") == {}
    assert read(tmp_path, b"\xef\xbb\xbfgpus: 4") == {"gpus": 4}


ODD = (None, [], {}, "", "x", -1, 0, 2.5, True, [None], {"a": None}, 10**30, 1e308, math.nan, math.inf, "9" * 400)


@pytest.mark.parametrize("key", known_keys())
def test_odd_values_are_a_configuration_or_one_line(key: str) -> None:
    """An empty section, null, a list for a section, and what else a key may be given by mistake."""
    *parents, name = key.split(".")
    for value in ODD:
        values: dict[str, Any] = {}
        section = values
        for parent in parents:
            section = section.setdefault(parent, {})
        section[name] = value
        try:
            config = config_from_dict(values)
        except ConfigError as error:
            message = str(error)
            assert "\n" not in message, value
        else:
            assert isinstance(config, RunConfig)


# A configuration has no infinities, and the quotes of a word are part of it, as in a shell.
@pytest.mark.parametrize("text", [text for text in PLAIN if text not in ("", "-.inf", "'12'")])
def test_a_value_means_the_same_on_the_command_line(capsys: pytest.CaptureFixture[str], text: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", "--task.name", "a:b", "--task.options.key", text, "--print-config"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    found = plain_value(printed)["task"]["options"]["key"]
    assert (type(found), found) == (type(PLAIN[text]), PLAIN[text])


@pytest.mark.parametrize("text", ["{a: 1, a: 2}", "{a: [", "[" * 5000, "&a [*a]", "{a: !x y}"])
def test_a_mistake_in_a_value_is_one_line(capsys: pytest.CaptureFixture[str], text: str) -> None:
    assert main(["train", "--task.name", "a:b", "--task.options", text]) == 2
    error = capsys.readouterr().err
    assert error.startswith("syncbn: error: task.options: got ")
    assert error.count("\n") == 1


def test_the_command_ends_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text("gpus: 1\ngpus: 2\n")
    assert main(["train", "--config", str(tmp_path / "c.yaml")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
