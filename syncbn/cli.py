"""The command line: ``syncbn train``, ``syncbn parity``, ``syncbn diagnose``, ``syncbn study``, ``syncbn bench``."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import syncbn


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code: 0 done, 1 a check failed, 2 the user's mistake (one line), 130 interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["bench"]:  # reads its own options: where GPUs are measured there may be nothing but torch
        from syncbn.bench.command import run_bench

        return run_bench(words[1:])
    try:
        from jsonargparse import ArgumentError
    except ImportError as error:
        print(f"syncbn: error: {error.name} is not installed; pip install 'syncbn[study]'", file=sys.stderr)
        return 2
    from syncbn.train.config import ConfigError, LocalError
    from syncbn.train.launch import LaunchError

    parser, parsers = _parsers()
    command = "syncbn"
    try:
        parsed = parser.parse_args(words)
        command = parsed.subcommand
        return _COMMANDS[command](parsers[command], parsed[command])
    except ArgumentError as error:
        return _fail(_argument_error(str(error), error, words))
    except (ConfigError, ImportError) as error:
        return _fail(str(error))
    except LocalError as error:
        return _fail(str(error), everywhere=True)
    except OSError as error:
        return _fail(f"{error.filename or command}: {error.strerror or error}", everywhere=True)
    except LaunchError as error:
        print(f"syncbn: error: {error}", file=sys.stderr)
        return 2 if error.mistake else 1
    except KeyboardInterrupt:
        return 130


_SILENT_SECONDS = 10.0
"""How long a process that leaves the word to another one stays: a launcher ends all as soon as one has ended."""


def _fail(message: str, everywhere: bool = False) -> int:
    # The processes of a node find the same mistake, and one says so; but for what only one of them meets.
    if everywhere or os.environ.get("LOCAL_RANK", "0") == "0":
        print("syncbn: error: " + " ".join(message.split()), file=sys.stderr)
    else:
        time.sleep(_SILENT_SECONDS)
    return 2


def _argument_error(text: str, error: Exception, words: Sequence[str]) -> str:
    """What is wrong with the words of a command, in one line."""
    from syncbn.train.config_io import config_error

    if choice := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", text):
        choices = choice[2].replace("'", "")
        return f"command: got {choice[1]!r}, expected one of {choices}"
    if choice := re.search(r"subcommand\" to be one of \{(.*?)\}", text):
        return f"command: got none, expected one of {choice[1].replace(',', ', ')}"
    if missing := re.search(r"arguments are required: (.+)", text):
        names = ", ".join(f"--{name.split('.')[-1]}" for name in missing[1].split(", "))
        return f"{' '.join(words[:2])}: expected {names} too (see --help)"
    if words[0] == "study" and (unknown := re.search(r"unrecognized arguments: (\S+)", text)):
        return f"{' '.join(words[:2])}: got {unknown[1]}, expected an option of this command (see --help)"
    return str(config_error(error))


def _parsers() -> tuple[Any, dict[str, Any]]:
    from syncbn.train.config_io import add_run_arguments, make_parser

    parser = make_parser(prog="syncbn", description=syncbn.__doc__, version=syncbn.__version__)
    train = make_parser(description="Train one configuration, in this process or in all those of a launcher.")
    add_run_arguments(train)
    train.add_argument("--out", type=str | None, default=None, help="Folder of the run (default: runs/train-TIME).")
    train.add_argument("--resume", action="store_true", help="Go on from the last checkpoint in --out.")
    train.add_argument("--trackers", type=list[str], default=[], help="Accelerate's trackers, such as '[tensorboard]'.")
    train.add_argument("--progress", type=bool, default=True, help="Show a progress bar.")
    parity = make_parser(description="Train a configuration in fp64 under several numbers of processes, and compare.")
    add_run_arguments(parity)
    parity.add_argument("--processes", type=str, default="1,2,4", help="Numbers of processes, separated by commas.")
    parity.add_argument("--steps", type=int, default=20, help="Optimizer steps.")
    diagnose = make_parser(description="Say which layers of a trained model suffer from small batches, and what helps.")
    diagnose.add_argument(
        "--checkpoint", type=str, required=True, help="Folder of a run, finished or with a checkpoint."
    )
    diagnose.add_argument("--samples", type=int, default=1024, help="Training images to measure on.")
    diagnose.add_argument(
        "--sizes",
        type=str | None,
        default=None,
        help="Normalization batch sizes, such as 1,2,4 (default: powers of 2).",
    )
    study = make_parser(description="Compare arms over seeds and normalization batches.")
    # Named for the list of commands alone: `main` has handed it on before it comes to this parser.
    bench = make_parser(description="Time the layers beside their peers; see 'syncbn bench --help'.")
    parsers = {"train": train, "parity": parity, "diagnose": diagnose, "study": study, "bench": bench}
    subcommands = parser.add_subcommands(required=True)
    for name, subparser in parsers.items():
        subcommands.add_subcommand(name, subparser)
    commands = study.add_subcommands(required=True)
    for name, subparser in _study_parsers().items():
        commands.add_subcommand(name, subparser)
    return parser, parsers


def _study_parsers() -> dict[str, Any]:
    from syncbn.train.config_io import make_parser

    words = {
        "plan": "Say what a study runs, and estimate from its finished runs how long the rest takes.",
        "run": "Run what is missing of a study, and write its report; under a launcher, on all its processes together.",
        "status": "Say which runs of a study are missing, running, done, diverged and failed, also while it runs.",
        "report": "Write a study's report from what is there, without running anything.",
    }
    parsers = {name: make_parser(description=description) for name, description in words.items()}
    for name, parser in parsers.items():
        parser.add_argument(
            "--config", type=str, required=True, help="A study's YAML file, or the name of a packaged one."
        )
        if name == "plan":
            parser.add_argument("--out", type=str | None, default=None, help="Folder of the study, if it was begun.")
        else:
            more = "; run again, it goes on there" if name == "run" else ""
            parser.add_argument("--out", type=str, required=True, help=f"Folder of the study{more}.")
    run = parsers["run"]
    for name in ("plan", "run"):
        default = "one a core" if name == "plan" else "one a core; on a Slurm cluster all at once"
        parsers[name].add_argument("--workers", type=int | None, default=None, help=f"Runs side by side ({default}).")
    run.add_argument(
        "--executor",
        type=str,
        default="pool",
        help="Who does the runs: pool, processes of this machine; slurm, jobs of a Slurm cluster, through submitit "
        "(pip install 'syncbn[slurm]'); local, the same on this machine, without its GPUs unless --slurm-options has "
        "gpus_per_node.",
    )
    run.add_argument(
        "--slurm-options",
        type=str | None,
        default=None,
        help="submitit's parameters of a job, such as '{partition: gpu, gpus_per_node: 1, timeout_min: 120}'.",
    )
    return parsers


def _train(parser: Any, parsed: Any) -> int:
    from syncbn.train.config import ConfigError
    from syncbn.train.config_io import instantiate_run
    from syncbn.train.loop import train

    config = instantiate_run(parser, parsed)
    if parsed.resume and parsed.out is None:
        raise ConfigError("resume", True, "--out with it, the folder of the run to go on with")
    out = Path(parsed.out or f"runs/train-{time.strftime('%Y%m%d-%H%M%S')}")
    if parsed.resume and not any((out / name).exists() for name in ("result.json", "checkpoint/latest")):
        print(f"nothing to resume in {out}: starting", flush=True)
    result = train(config, out, resume=parsed.resume, progress=parsed.progress, trackers=parsed.trackers)
    if os.environ.get("RANK", "0") == "0":
        error = "diverged" if result.test_error is None else f"test error {100 * result.test_error:.2f} %"
        speed = f"{result.images_per_second:.0f} images/s on {result.processes} process(es)"
        print(f"{error} after {result.steps} steps, {speed}; everything is in {out}")
    return 0


def _parity(parser: Any, parsed: Any) -> int:
    from syncbn.train.config import ConfigError
    from syncbn.train.config_io import instantiate_run
    from syncbn.train.parity import run_parity

    config = instantiate_run(parser, parsed)
    if parsed.steps < 1:
        raise ConfigError("steps", parsed.steps, "a positive integer")
    processes = _integers("processes", parsed.processes)
    same = run_parity(config, processes, parsed.steps, lambda line: print(line, flush=True))
    return 0 if same else 1


def _diagnose(parser: Any, parsed: Any) -> int:
    from syncbn.train.diagnose import diagnose, print_diagnosis

    sizes = None if parsed.sizes is None else _integers("sizes", parsed.sizes)
    print_diagnosis(diagnose(Path(parsed.checkpoint), parsed.samples, sizes))
    return 0


def _integers(key: str, text: str) -> list[int]:
    from syncbn.train.config import ConfigError

    words = text.split(",")
    if not all(word.strip().isdigit() and int(word) > 0 for word in words):
        raise ConfigError(key, text, "positive integers separated by commas, such as 1,2,4")
    return [int(word) for word in words]


def _study(parser: Any, parsed: Any) -> int:
    command = parsed.subcommand
    options = parsed[command]
    from syncbn.study.commands import plan_study, print_status, report_study, run_study

    if command == "plan":
        return plan_study(options.config, None if options.out is None else Path(options.out), options.workers)
    if command == "status":
        return print_status(options.config, Path(options.out))
    if command == "report":
        return report_study(options.config, Path(options.out))
    return run_study(
        options.config,
        Path(options.out),
        options.workers,
        executor=options.executor,
        slurm_options=_mapping(options.slurm_options),
    )


def _mapping(text: str | None) -> dict[str, Any] | None:
    import yaml

    from syncbn.train.config import ConfigError

    try:
        found = None if text is None else yaml.safe_load(text)
    except yaml.YAMLError:
        found = text
    if found is not None and not isinstance(found, dict):
        raise ConfigError("slurm-options", text, "a mapping, such as '{partition: gpu, timeout_min: 120}'")
    return found


_COMMANDS = {"train": _train, "parity": _parity, "diagnose": _diagnose, "study": _study}
