"""``syncbn bench``: the options, the run, and what it ends with. Standard library and torch alone."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from syncbn.bench.bandwidth import measure_bandwidth
from syncbn.bench.parts import Parts, emulation_ratio, run_parts
from syncbn.bench.peers import CONTENDERS, UnavailableError
from syncbn.bench.plot import write_plot
from syncbn.bench.problem import make_problem
from syncbn.bench.processes import ProcessError
from syncbn.bench.report import as_json, csv_rows, summary, write_csv, write_json
from syncbn.bench.rows import ROWS, Results, Verdict, judge, table
from syncbn.bench.shapes import DEFAULT_FAMILIES, DTYPES, FAMILIES, SHORT_DTYPES, Shape
from syncbn.bench.suites import (
    GROUPS,
    Selection,
    WrongError,
    large_mean_errors,
    progress,
    run_suite,
    suites_of,
    world_of_one,
)

ROUNDS = {"cpu": 7, "cuda": 15}
DEFAULT_DTYPES = {"cpu": ("float32",), "cuda": ("float32", "bfloat16")}

DESCRIPTION = """Time the layers beside their peers, in turns, after their results were checked against float64; ratios
are printed first. With --check the table of what must hold, with what was measured here."""


class MistakeError(Exception):
    """What a user got wrong, in one line."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise MistakeError(f"bench: {message} (see --help)")


def run_bench(words: Sequence[str]) -> int:
    """Run the command; the exit code: 0 done, 1 a row falls short or a result is wrong, 2 the user's mistake."""
    try:
        options = _parser().parse_args(list(words))
        selection = _selection(options)
        if options.list:
            _print_list(selection)
            return 0
        out = None if options.out is None else Path(options.out)
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
        return _run(selection, out)
    except MistakeError as error:
        return _fail(str(error), 2)
    except OSError as error:
        return _fail(f"{error.filename or 'bench'}: {error.strerror or error}", 2)
    except (WrongError, ProcessError) as error:
        return _fail(str(error), 1)
    except KeyboardInterrupt:
        return 130


def _fail(message: str, code: int) -> int:
    print(f"syncbn: error: {message}", file=sys.stderr)
    return code


# -- options -----------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="syncbn bench", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--device", default="cpu", help="cpu (one thread a process) or cuda (default: cpu)")
    parser.add_argument("--out", metavar="DIR", help="write bench.json, bench.csv and bench.svg there")
    parser.add_argument(
        "--check", action="store_true", help="measure what the table needs alone, and exit 1 if a row falls short"
    )
    parser.add_argument(
        "--dtype", help="float32, bfloat16, float16 or several (default: float32; on cuda float32,bfloat16)"
    )
    parser.add_argument(
        "--shapes", default=",".join(DEFAULT_FAMILIES), help=f"any of {','.join(FAMILIES)} (default: %(default)s)"
    )
    parser.add_argument("--rounds", help="samples of each contender (default: 7; on cuda 15)")
    parser.add_argument("--list", action="store_true", help="say what would be timed on which shapes, and stop")
    return parser


def _selection(options: Any) -> Selection:
    device = options.device
    if device not in ROUNDS:
        raise MistakeError(f"device: got {device!r}, expected one of cpu, cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise MistakeError("device: got 'cuda', and torch finds no CUDA device here")
    dtypes = DEFAULT_DTYPES[device]
    if options.dtype is not None:
        dtypes = _several("dtype", options.dtype, tuple(DTYPES), SHORT_DTYPES)
    rounds = ROUNDS[device]
    if options.rounds is not None:
        if not (options.rounds.isdigit() and int(options.rounds) > 0):
            raise MistakeError(f"rounds: got {options.rounds!r}, expected a positive integer")
        rounds = int(options.rounds)
    return Selection(device, dtypes, _several("shapes", options.shapes, FAMILIES, {}), rounds, options.check)


def _several(name: str, text: str, known: Sequence[str], short: dict[str, str]) -> tuple[str, ...]:
    """The words of a list separated by commas, each one of ``known``, without repeats."""
    words = [short.get(word.strip(), word.strip()) for word in text.split(",")]
    for word in words:
        if word not in known:
            raise MistakeError(f"{name}: got {word!r}, expected any of {', '.join(known)}, separated by commas")
    return tuple(dict.fromkeys(words))


def _print_list(selection: Selection) -> None:
    device = torch.device(selection.device)
    samples = [Shape("tiny", (GROUPS, 4)), Shape("tiny", (GROUPS, 4, 3, 3))]
    print("contenders:")
    with world_of_one(device):
        problems = [make_problem(shape, torch.float32, device, groups=GROUPS) for shape in samples]
        for name, contender in CONTENDERS.items():
            reasons = []
            for problem in problems:
                try:
                    contender.make(problem)
                except UnavailableError as error:
                    reasons.append(str(error))
            note = f": not here: {'; '.join(dict.fromkeys(reasons))}" if len(reasons) == len(problems) else ""
            print(f"  {name}{' (ours)' if contender.ours else ''}{note}")
    for suite in suites_of(selection):
        print(f"{suite.name}: {suite.title}")
        for dtype in selection.dtypes:
            shapes = suite.shapes(selection, DTYPES[dtype])
            print(f"  {dtype}, {len(shapes)} shapes:")
            for shape in shapes:
                print(f"    {shape.label}")


# -- the run -----------------------------------------------------------------------------------------------------------


def _run(selection: Selection, out: Path | None) -> int:
    start = time.monotonic()
    device = torch.device(selection.device)
    results = Results(selection.device)
    threads = torch.get_num_threads()
    parts = Parts()
    try:
        if device.type == "cpu":  # as each of several processes has; and steadier
            torch.set_num_threads(1)
        with world_of_one(device):
            progress("copy bandwidth")
            results.bandwidth = measure_bandwidth(device)
            progress("errors at a large mean")
            results.measurements.append(large_mean_errors(selection))
            for suite in suites_of(selection):
                results.measurements += run_suite(suite, selection)
        if "resnet50" in selection.families:
            if not selection.check:
                parts = run_parts(selection, progress)
            if device.type == "cpu":
                results.emulation = emulation_ratio(selection, parts, progress)
        verdicts = judge(ROWS, results)
    finally:
        torch.set_num_threads(threads)
    print("\n".join([*summary(results), "", *parts.lines]))
    if out is not None:
        _write(out, selection, results, verdicts, parts)
    return _conclude(selection, verdicts, time.monotonic() - start)


def _write(out: Path, selection: Selection, results: Results, verdicts: Sequence[Verdict], parts: Parts) -> None:
    write_json(out / "bench.json", as_json(selection, results, verdicts, parts.plain))
    for name, rows in {"bench": csv_rows(results), **parts.tables}.items():
        write_csv(out / f"{name}.csv", rows)
    print(write_plot(out / "bench.svg", results.measurements, results.bandwidth))
    print(f"everything is in {out}")


def _conclude(selection: Selection, verdicts: Sequence[Verdict], seconds: float) -> int:
    """Print the table last, where it is seen; the exit code."""
    print("\n".join(["", *table(verdicts)]))
    if set(selection.families) != set(DEFAULT_FAMILIES):
        print(f"measured on {', '.join(selection.families)} alone: the limits are for all shapes")
    print(f"{seconds:.0f} s")
    return 1 if selection.check and any(verdict.falls_short for verdict in verdicts) else 0
