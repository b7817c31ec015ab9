"""The command line: ``syncbn train``, ``syncbn parity``, ``syncbn study``."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import syncbn


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code: 0 done, 1 a check failed, 2 the user's mistake (one line), 130 interrupted."""
    try:
        from jsonargparse import ArgumentError
    except ImportError as error:
        print(f"syncbn: error: {error.name} is not installed; pip install 'syncbn[study]'", file=sys.stderr)
        return 2
    from syncbn.train.config import ConfigError, LocalError
    from syncbn.train.config_io import config_error
    from syncbn.train.launch import LaunchError

    parser, parsers = _parsers()
    command = "syncbn"
    try:
        parsed = parser.parse_args(list(sys.argv[1:] if arguments is None else arguments))
        command = parsed.subcommand
        return _COMMANDS[command](parsers[command], parsed[command])
    except ArgumentError as error:
        return _fail(str(config_error(error)))
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


def _fail(message: str, everywhere: bool = False) -> int:
    # The processes of a node find the same mistake, and one says so; but for what only one of them meets.
    if everywhere or os.environ.get("LOCAL_RANK", "0") == "0":
        print("syncbn: error: " + " ".join(message.split()), file=sys.stderr)
    return 2


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
    study = make_parser(description="Compare arms over seeds.")
    study_run = make_parser(description="Run what is missing of a study, and write its report.")
    study_run.add_argument(
        "--config", type=str, required=True, help="A study's YAML file, or the name of a packaged one."
    )
    study_run.add_argument("--out", type=str, required=True, help="Folder of the study; run again, it goes on there.")
    study_run.add_argument("--workers", type=int | None, default=None, help="Runs side by side (default: one a core).")
    parsers = {"train": train, "parity": parity, "study": study}
    subcommands = parser.add_subcommands(required=True)
    for name, subparser in parsers.items():
        subcommands.add_subcommand(name, subparser)
    study.add_subcommands(required=True).add_subcommand("run", study_run)
    return parser, parsers


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
    words = parsed.processes.split(",")
    if not all(word.strip().isdigit() and int(word) > 0 for word in words):
        raise ConfigError("processes", parsed.processes, "positive integers separated by commas, such as 1,2,4")
    same = run_parity(config, [int(word) for word in words], parsed.steps, lambda line: print(line, flush=True))
    return 0 if same else 1


def _study(parser: Any, parsed: Any) -> int:
    from syncbn.study.commands import run_study

    return run_study(parsed.run.config, Path(parsed.run.out), parsed.run.workers)


_COMMANDS = {"train": _train, "parity": _parity, "study": _study}
