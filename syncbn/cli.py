"""The command line: a table from each command to its function, its options and its help.

What only reads the words of a command does not import torch, which takes seconds.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shlex
import signal
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import syncbn
from syncbn.error_report import report_error
from syncbn.options import read_options, run_options
from syncbn.train.config import (
    ConfigError,
    LocalError,
    RunConfig,
    RunWarning,
    config_to_dict,
    config_to_yaml,
    load_config,
    require,
)
from syncbn.train.launch_error import LaunchError
from syncbn.train.launcher_variables import restarts
from syncbn.train.lifeline import end_with_parent


@dataclass(frozen=True)
class Command:
    """One command: what it calls with its options as keyword arguments, and what ``--help`` says.

    ``options`` has the arguments of ``add_argument`` for each option. With ``takes_run`` there is also ``--config`` and
    an option for each key of a run, and the command is called with the ``RunConfig``.
    """

    call: Callable[..., int]
    help: str
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    takes_run: bool = False


_pythons_format = warnings.formatwarning
_WRONG_PATHS = (FileExistsError, FileNotFoundError, IsADirectoryError, NotADirectoryError)
"""Errors of a path that the user gave. Others, as of a full or read-only disk, are failures of a run."""


class _Remarks(logging.Handler):
    """What the package remarks on, as lines of standard error as it is at the time."""

    def emit(self, record: logging.LogRecord) -> None:
        kind = "note" if record.levelno < logging.WARNING else record.levelname.lower()
        print(f"syncbn: {kind}: {record.getMessage()}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns 0 if done, 1 if a run or check failed, 2 for a user's mistake, 130 if interrupted.

    ``train`` returns 85 if a signal stopped it after it had written a checkpoint.
    """
    warnings.formatwarning = _format_warning
    log = logging.getLogger("syncbn")
    log.setLevel(logging.INFO)
    if not any(isinstance(handler, _Remarks) for handler in log.handlers):
        log.addHandler(_Remarks())
    words = list(sys.argv[1:] if arguments is None else arguments)
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return _run(words)
    from torch.distributed.elastic.multiprocessing.errors import record

    end_with_parent(signal.SIGKILL)  # torchrun, which cannot end its processes if it is killed
    return record(_run)(words) or 0  # its summary, which comes last, then shows an error that nobody has foreseen


def _run(words: list[str]) -> int:
    name = next((name for name in (" ".join(words[:2]), *words[:1]) if name in COMMANDS), "")
    if not name and words[-1:] == ["--version"]:
        print(syncbn.__version__)
        return 0
    if not name and words[-1:] in (["--help"], ["-h"]):
        print(f"usage: syncbn COMMAND ...\n\n{syncbn.__doc__}\n")
        print("\n".join(f"  {name:<14}{command.help}" for name, command in COMMANDS.items()))
        return 0
    try:
        expected = f"one of {', '.join(COMMANDS)} (see syncbn --help)"
        require(bool(name), "command", " ".join(words[:2]) or None, expected)
        rest = words[len(name.split()) :]
        if name == "bench":  # reads its own options, as it has to work where only torch is installed
            return COMMANDS[name].call(rest)
        return COMMANDS[name].call(**_parse(name, rest))
    except (ConfigError, ImportError) as error:
        return _fail(str(error))
    except LocalError as error:
        return _fail(str(error), everywhere=True)
    except OSError as error:
        code = 2 if isinstance(error, _WRONG_PATHS) or error.errno == errno.ENAMETOOLONG else 1
        return _fail(f"{error.filename or name}: {error.strerror or error}", everywhere=True, code=code)
    except LaunchError as error:
        report_error(str(error))
        return 2 if error.mistake else 1
    except RuntimeError as error:
        # Torch raises this in a signal handler, so it may come from anywhere.
        if not re.match(r"DataLoader worker \(pid.*\) (is killed|exited)", str(error)):
            raise
        return _fail(str(error), everywhere=True)
    except KeyboardInterrupt as interrupt:
        if os.environ.get("RANK", "0") == "0":
            print(f"syncbn: {str(interrupt) or 'stopped by Ctrl-C'}", file=sys.stderr)
        return 130


def _parse(name: str, words: Sequence[str]) -> dict[str, Any]:
    """Keyword arguments for a command's function."""
    command = COMMANDS[name]
    if not (words or command.options or command.takes_run):
        return {}  # without the parser, which may not be installed
    given = read_options(name, command.help, command.options, words, command.takes_run)
    values: dict[str, Any] = {}
    for option, details in command.options.items():
        key = option.removeprefix("--").replace("-", "_")
        values[key] = given.pop(key, details.get("default", False if "action" in details else None))
    if command.takes_run:
        file, show = given.pop("config", None), given.pop("print_config", False)
        if values.get("resume"):
            out = values["out"]
            require(out is not None, "resume", True, "--out with it, the folder of the run to continue")
            file = file or _begun(out, given)
        values["run"] = load_config(file, given)
        if show:
            print(config_to_yaml(values["run"]), end="")
            raise SystemExit(0)
    return values


def _begun(out: Path, given: Mapping[str, Any]) -> Path | None:
    """The configuration of the run that was begun in ``out``; None if there is none, and ``given`` starts a new one."""
    begun = out / "config.yaml"
    if begun.is_file():
        _kept(begun)
        return begun
    expected = "the folder of a run, with config.yaml; or give the options of the run, to start it if it is not there"
    require(bool(given), "out", out, expected)
    return None


def _kept(begun: Path) -> RunConfig:
    """The configuration that a run wrote into its folder."""
    try:
        return load_config(begun)
    except ConfigError as error:
        value = begun if error.key == "config" else error.value
        remedy = f"or remove {begun}, and give the run's --config and options with --resume"
        raise ConfigError(error.key, value, f"{error.expected}; {remedy}") from None


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    if issubclass(category, RunWarning):
        return f"syncbn: warning: {message}\n"
    return _pythons_format(message, category, filename, lineno, line)


def _fail(message: str, everywhere: bool = False, code: int = 2) -> int:
    # All processes of a node meet the same mistake, and the first one reports it, except for what only one can meet.
    if everywhere or os.environ.get("LOCAL_RANK", "0") == "0":
        report_error(" ".join(message.split()))
    else:
        time.sleep(10)  # a launcher ends all processes as soon as one has ended
    return code


def _train(run: RunConfig, out: Path | None, resume: bool, trackers: list[str], progress: bool) -> int:
    from syncbn.train.checkpoint import check_same
    from syncbn.train.loop import train
    from syncbn.train.stopping import STOP_SIGNALS, STOPPED, Stopped, leave_mark

    resume = resume or (restarts() > 0 and out is not None)  # torchrun gives the same options again
    if resume and out is not None and (begun := out / "config.yaml").is_file():
        check_same(config_to_dict(_kept(begun)), config_to_dict(run), out)
    out = out or Path(f"runs/train-{time.strftime('%Y%m%d-%H%M%S')}")
    if resume and not ((out / "result.json").exists() or any(out.glob("checkpoint/step-*"))):
        print(f"nothing to resume in {out}: starting", flush=True)
    first = os.environ.get("RANK", "0") == "0"
    try:
        result = train(run, out, resume=resume, progress=progress, trackers=trackers, stop_on=STOP_SIGNALS)
    except Stopped as error:
        leave_mark()
        if first:
            print(f"syncbn: {error}", file=sys.stderr)
        return STOPPED
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped by Ctrl-C; {_how_to_resume(out, trackers)}") from None
    if first:
        metric = result.metric
        score = "diverged" if result.test is None else f"test {metric.name} {metric.shown(result.score)}"
        speed = f"{result.samples_per_second:.0f} samples/s on {result.processes} process(es)"
        print(f"{score} after {result.steps} steps, {speed}; everything is in {out}")
    return 0


def _how_to_resume(out: Path, trackers: Sequence[str]) -> str:
    if not (out / "config.yaml").is_file():
        return "the run had not begun"
    if "RANK" in os.environ:
        return "to go on from the last checkpoint, add --resume to the command"
    words = ["syncbn", "train", "--resume", "--out", str(out)]
    words += ["--trackers", f"[{','.join(trackers)}]"] * bool(trackers)
    return f"to go on from the last checkpoint: {shlex.join(words)}"


def _parity(run: RunConfig, processes: str, steps: int) -> int:
    from syncbn.train.parity import run_parity

    same = run_parity(run, _integers("processes", processes), steps, lambda line: print(line, flush=True))
    return 0 if same else 1


def _diagnose(checkpoint: Path, samples: int, sizes: str | None) -> int:
    from syncbn.train.diagnosis import diagnose

    diagnose(checkpoint, samples, None if sizes is None else _integers("sizes", sizes)).print()
    return 0


def _integers(key: str, text: str) -> list[int]:
    words = text.split(",")
    positive = all(word.strip().isdigit() and int(word) > 0 for word in words)
    require(positive, key, text, "positive integers separated by commas, such as 1,2,4")
    return [int(word) for word in words]


def _advise(run: RunConfig, steps: int, samples: int, probes: int, link: str, validate: int | None) -> int:
    from syncbn.advise import advise, print_advice, try_nearest

    require(validate is None or validate > 0, "validate", validate, "a positive number of optimizer steps")
    found = advise(run, steps=steps, samples=samples, probes=probes, link=link)
    print_advice(found)
    if validate is not None:
        for line in try_nearest(run, found, validate):
            print(line, flush=True)
    return 0


def _convert_check(model: str, kind: str, batch_size: int, input_size: int | None) -> int:
    from syncbn.convert_check import compare, lines
    from syncbn.named_model import build

    require(batch_size > 1, "batch-size", batch_size, "an integer of at least 2, as one sample may have no variance")
    require(input_size is None or input_size > 0, "input-size", input_size, "a positive integer")
    found = compare(build(model, batch_size, input_size), kind)
    print("\n".join(lines(found)))
    return 0 if found.same else 1


def _study(function: Callable[[Any], Callable[..., int]]) -> Callable[..., int]:
    def call(**options: Any) -> int:
        import syncbn.study.commands as commands

        return function(commands)(**options)

    return call


def _env() -> int:
    from syncbn.bug_report import lines

    for line in lines():
        print(line, flush=True)
    return 0


def _completion(shell: str) -> int:
    from syncbn.completion import completion_script

    commands = {
        name: (command.help, {**command.options, **(run_options() if command.takes_run else {})})
        for name, command in COMMANDS.items()
    }
    print(completion_script(shell, commands))
    return 0


def _experiment(name: str, out: Path | None, workers: int | None, larger: bool) -> int:
    from syncbn.experiments.commands import list_experiments, run_experiment

    if name == "list":
        return list_experiments()
    return run_experiment(name, out or Path("runs") / "experiments" / Path(name).stem, workers, larger=larger)


def _bench(words: Sequence[str]) -> int:
    from syncbn.bench.command import run_bench

    return run_bench(words)


_STUDY = {"type": str, "required": True, "help": "YAML file of the study, or the name of one in the package."}
_STUDY_OUT = {"type": Path, "required": True, "help": "Folder of the study."}

COMMANDS: dict[str, Command] = {
    "train": Command(
        _train,
        "Train one configuration, in this process or in all processes of a launcher.",
        {
            "--out": {"type": Path, "help": "Folder of the run (default: runs/train-TIME)."},
            "--resume": {"action": "store_true", "help": "Continue the run in --out, with its configuration."},
            "--trackers": {"type": list[str], "default": [], "help": "Accelerate's trackers, as in '[tensorboard]'."},
            "--progress": {"type": bool, "default": True, "help": "Show a progress bar."},
        },
        takes_run=True,
    ),
    "parity": Command(
        _parity,
        "Train a configuration in fp64 under several numbers of processes, and compare.",
        {
            "--processes": {"type": str, "default": "1,2,4", "help": "Numbers of processes, separated by commas."},
            "--steps": {"type": int, "default": 20, "help": "Optimizer steps."},
        },
        takes_run=True,
    ),
    "diagnose": Command(
        _diagnose,
        "Tell which layers of a trained model suffer from small batches, and what helps.",
        {
            "--checkpoint": {"type": Path, "required": True, "help": "Folder of a run, finished or with a checkpoint."},
            "--samples": {"type": int, "default": 1024, "help": "Training images to measure on."},
            "--sizes": {"type": str, "help": "Normalization batch sizes, such as 1,2,4 (default: powers of 2)."},
        },
    ),
    "advise": Command(
        _advise,
        "Tell before training whether the batch per GPU will do, and over how many GPUs to synchronize if not.",
        {
            "--steps": {
                "type": int,
                "default": 50,
                "help": "Optimizer steps to train before, synchronized over all GPUs.",
            },
            "--samples": {"type": int, "default": 128, "help": "Samples of a probe, which are normalized together."},
            "--probes": {"type": int, "default": 8, "help": "Probes whose gradients are added."},
            "--link": {
                "type": Literal["nvlink", "pcie", "ethernet"],
                "default": "nvlink",
                "help": "What connects the GPUs, for the modelled time of the exchange.",
            },
            "--validate": {
                "type": int,
                "help": "Optimizer steps for which the recommended remedy and the next cheaper one are then trained.",
            },
        },
        takes_run=True,
    ),
    "convert-check": Command(
        _convert_check,
        "Convert a model with random weights, revert it, and compare both with the model as it was.",
        {
            "model": {
                "type": str,
                "help": "timm:NAME, torchvision:NAME, transformers:NAME, a bare NAME of these, or MODULE:FUNCTION.",
            },
            "--kind": {"type": Literal["sync", "ghost", "renorm"], "default": "sync", "help": "Of the new layers."},
            "--batch-size": {"type": int, "default": 4, "help": "Images in the batch."},
            "--input-size": {"type": int, "help": "Height and width of the images (default: the model's own)."},
        },
    ),
    "study plan": Command(
        _study(lambda commands: commands.plan_study),
        "List the runs of a study, and estimate from its finished runs how long the rest takes.",
        {
            "--config": _STUDY,
            "--out": {"type": Path, "help": "Folder of the study, if it was started."},
            "--workers": {"type": int, "help": "Runs at a time (default: one per core)."},
        },
    ),
    "study run": Command(
        _study(lambda commands: commands.run_study),
        "Do the missing runs of a study and write its report; under a launcher, all processes train each run together.",
        {
            "--config": _STUDY,
            "--out": {**_STUDY_OUT, "help": "Folder of the study. If it was started, its missing runs are done."},
            "--workers": {"type": int, "help": "Runs at a time (default: one per core; on a Slurm cluster, all)."},
            "--executor": {
                "type": str,
                "default": "pool",
                "help": "Where the runs are done: pool, processes of this machine; slurm, jobs of a Slurm cluster "
                "through submitit (pip install 'syncbn[slurm]'); local, submitit's jobs on this machine, without its "
                "GPUs unless --slurm-options has gpus_per_node.",
            },
            "--slurm-options": {
                "type": dict,
                "help": "submitit's parameters for a job, such as '{partition: gpu, timeout_min: 120}'.",
            },
        },
    ),
    "study status": Command(
        _study(lambda commands: commands.print_status),
        "Tell which runs of a study are missing, running, done, diverged or failed, also while it runs.",
        {"--config": _STUDY, "--out": _STUDY_OUT},
    ),
    "study report": Command(
        _study(lambda commands: commands.report_study),
        "Write a study's report from the runs that are done.",
        {"--config": _STUDY, "--out": _STUDY_OUT},
    ),
    "study export": Command(
        _study(lambda commands: commands.export_study),
        "Write a study's main table for LaTeX or other programs, or its figures as files.",
        {
            "--config": _STUDY,
            "--out": _STUDY_OUT,
            "--format": {
                "type": str,
                "default": "latex",
                "help": "latex, csv, json or parquet (the table), or pdf or svg (the figures).",
            },
            "--to": {"type": Path, "help": "File, or folder for figures (default: in --out)."},
        },
    ),
    "study compare": Command(
        _study(lambda commands: commands.compare_studies),
        "Show two studies side by side: what differs in their configurations, then each arm that both have.",
        {
            "a": {"type": Path, "help": "Folder of the first study."},
            "b": {"type": Path, "help": "Folder of the second study."},
            "--config-a": {"type": str, "help": "Study of the first folder, if the folder has no study.yaml."},
            "--config-b": {"type": str, "help": "Study of the second folder, likewise."},
            "--format": {"type": str, "default": "table", "help": "table, csv or json."},
        },
    ),
    "experiment": Command(
        _experiment,
        "Measure a claim of the literature about batch normalization, and say whether it holds here.",
        {
            "name": {
                "type": str,
                "help": "Name of an experiment, or its YAML file; `list` lists those of the package.",
            },
            "--out": {"type": Path, "help": "Folder of the experiment (default: runs/experiments/NAME)."},
            "--workers": {"type": int, "help": "Runs at a time (default: one per core)."},
            "--larger": {"action": "store_true", "help": "Take the sizes for a GPU, if the experiment has them."},
        },
    ),
    "bench": Command(_bench, "Time the layers beside their peers."),
    "env": Command(_env, "Print what a bug report needs: versions, processor, kernels, GPUs, variables."),
    "completion": Command(
        _completion,
        "Print the script with which a shell completes commands and options (pip install 'syncbn[completion]').",
        {"shell": {"type": Literal["bash", "zsh"], "help": "Of which shell."}},
    ),
}
