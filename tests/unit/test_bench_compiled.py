"""``syncbn bench --compile``: its steps are those of the eager models, and its rows are judged."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from syncbn.bench import compiled
from syncbn.bench.rows import COMPILED_ROWS
from syncbn.bench.steps import StepConfig, variants
from syncbn.bench.suites import WrongError
from syncbn.bench.timing import Timing
from syncbn.cli import main
from syncbn.compat import import_torchvision

TINY = StepConfig("resnet20", 4, 8, 2)


def test_compiled_steps_are_the_eager_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced as for the inductor, which would take minutes to compile them, and run by torch's operations."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(compiled, "variants", lambda config: {"renorm": variants(config)["renorm"]})
    timings = compiled.time_compiled_steps(2, TINY)
    assert {name: len(timing.samples) for name, timing in timings.items()} == {"renorm": 2}


def test_a_wrong_loss_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(config: StepConfig, options: Any, *, compiled: bool) -> Any:
        return lambda: torch.tensor(1.001 if compiled else 1.0)

    monkeypatch.setattr(compiled, "_step", step)
    with pytest.raises(WrongError, match=r"compiled resnet20, local: the loss is 1.001, expected 1"):
        compiled.time_compiled_steps(1, TINY)


@pytest.mark.parametrize("slowest", [1.0, 9.0])
def test_the_command_judges_the_slowest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], slowest: float
) -> None:
    try:
        import_torchvision("models")
    except ImportError as error:
        pytest.skip(str(error))
    folders = []

    def run(variables: Mapping[str, str], function: Any, *args: Any) -> Any:
        folder = Path(variables["TORCHINDUCTOR_CACHE_DIR"])
        if function is compiled.first_step_seconds:
            folder.mkdir(parents=True)  # a cold cache
            (folder / folder.name).touch()
            folders.append(folder.name)
            return slowest if folder.name == "ghost" else 1.0
        assert sorted(path.name for path in folder.iterdir()) == sorted(folders)
        return {name: Timing((1.0,)) for name in folders}

    monkeypatch.setattr(compiled, "run_with_environment", run)
    assert main(["bench", "--compile", "--check"]) == (1 if slowest > 1 else 0)
    assert folders == ["local", "sync", "ghost", "renorm"]
    out = capsys.readouterr().out
    assert [row.name for row in COMPILED_ROWS] == [line for line in out.splitlines() if line.startswith("CPU: ")]
    assert ("falls short: sync 1.00 (resnet18 N=8 3x64x64); ghost 9.00" in out) == (slowest > 1)
