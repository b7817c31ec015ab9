"""``syncbn bench``: its options, the run, and its exit code. It needs the standard library and torch alone."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import torch

from syncbn.bench.compiled import measure_compiled
from syncbn.bench.costs import measure_bandwidth
from syncbn.bench.growth import growth_lines, growth_rows
from syncbn.bench.peers import CONTENDERS, Contender, UnavailableError
from syncbn.bench.problem import DEFAULT_FAMILIES, DTYPES, FAMILIES, GROUPS, SHORT_DTYPES, Problem, Shape, make_problem
from syncbn.bench.report import heading, machine, summary, write_files
from syncbn.bench.rows import COMPILED_ROWS, ROWS, BenchResults, comparison, judge, table
from syncbn.bench.steps import measure_emulation, run_steps
from syncbn.bench.suites import Selection, WrongError, large_mean_errors, run_suite, suites_of, world_of_one
from syncbn.bench.timing import ProcessError, progress, run_with_environment
from syncbn.kernels.cpu.library import instruction_sets, wanted

ROUNDS = {"cpu": 7, "cuda": 15}
DEFAULT_DTYPES = {"cpu": ("float32",), "cuda": ("float32", "bfloat16")}
ONEDNN_NAMES = {"avx512": "ALL", "avx2": "AVX2", "default": "SSE41"}
"""oneDNN, which computes torch's convolutions, has names of its own for the instruction sets."""

DESCRIPTION = """Compare the speed of the layers with that of other implementations. All are checked against float64
before they are timed. With --check, measure only what the table of limits needs."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise argparse.ArgumentError(None, f"{message.removeprefix('argument --')} (see --help)")


def run_bench(words: Sequence[str]) -> int:
    """Run the command line after ``bench``.

    Returns:
        The exit code: 0 done, 1 a row falls short or a result is wrong, 2 a mistake of the user.
    """
    try:
        options = _parser().parse_args(list(words))
        dtypes, rounds = options.dtype or DEFAULT_DTYPES[options.device], options.rounds or ROUNDS[options.device]
        sets = options.cpu or ()
        if options.device == "cuda" and (sets or options.compile):
            raise argparse.ArgumentError(None, "--cpu and --compile measure on the CPU, got --device cuda (see --help)")
        if options.cpu is None and options.check and options.device == "cpu" and not options.compile:
            sets = tuple(instruction_sets())
        selection = Selection(
            options.device, dtypes, options.shapes, rounds, options.check, options.compile, instruction_sets=sets
        )
        if options.list:
            _print_list(selection)
            return 0
        if options.out is not None:
            options.out.mkdir(parents=True, exist_ok=True)
        return _run(selection, options.out)
    except (argparse.ArgumentError, WrongError, ProcessError) as error:
        print(f"syncbn: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, argparse.ArgumentError) else 1


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="syncbn bench", description=DESCRIPTION, allow_abbrev=False)
    add = parser.add_argument
    add("--device", type=_device, default="cpu", help="cpu (one thread per process) or cuda (default: cpu)")
    add("--out", metavar="DIR", type=Path, help="write bench.json, bench.csv and growth.csv there")
    add("--check", action="store_true", help="measure only what the table needs; exit with 1 if a row falls short")
    add("--dtype", type=_several(DTYPES), help="of float32,bfloat16,float16 (default: float32; on cuda also bfloat16)")
    families = f"of {','.join(FAMILIES)} (default: all but tiny)"
    add("--shapes", type=_several(FAMILIES), default=DEFAULT_FAMILIES, help=families)
    add(
        "--cpu",
        type=_several(instruction_sets()),
        help=f"of {','.join(instruction_sets())}: measure with these instructions, in turn (default: those in use; "
        "with --check, all); what several processes do together is measured with the first and the last",
    )
    add("--compile", action="store_true", help="measure the steps of a compiled ResNet-18 instead; takes minutes")
    add("--rounds", type=_positive, help="samples of each contender (default: 7; on cuda 15)")
    add("--list", action="store_true", help="print the contenders and the shapes, and stop")
    return parser


def _device(text: str) -> str:
    if text not in ROUNDS:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected one of cpu, cuda")
    if text == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("got 'cuda', but torch finds no CUDA device")
    return text


def _positive(text: str) -> int:
    if not (text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a positive integer")
    return int(text)


def _several(known: Iterable[str]) -> Callable[[str], tuple[str, ...]]:
    """A function that reads a comma-separated list of ``known`` words, and drops repeats."""

    def read(text: str) -> tuple[str, ...]:
        words = [SHORT_DTYPES.get(word.strip(), word.strip()) for word in text.split(",")]
        for word in words:
            if word not in known:
                expected = f"any of {', '.join(known)}, separated by commas"
                raise argparse.ArgumentTypeError(f"got {word!r}, expected {expected}")
        return tuple(dict.fromkeys(words))

    return read


def _print_list(selection: Selection) -> None:
    device = torch.device(selection.device)
    print("contenders:")
    with world_of_one(device):
        samples = [Shape("tiny", (GROUPS, 4)), Shape("tiny", (GROUPS, 4, 3, 3))]
        problems = [make_problem(shape, torch.float32, device) for shape in samples]
        for contender in CONTENDERS.values():
            reasons = dict.fromkeys(_unavailable(contender, problem) for problem in problems)
            reason = "" if "" in reasons else f": not here: {'; '.join(reasons)}"
            print(f"  {contender.name}{' (ours)' if contender.ours else ''}{reason}")
    for suite in suites_of(selection):
        print(f"{suite.name}: {suite.title}")
        for dtype in selection.dtypes:
            shapes = suite.shapes(selection, DTYPES[dtype])
            print("\n".join([f"  {dtype}, {len(shapes)} shapes:", *(f"    {shape.label}" for shape in shapes)]))


def _unavailable(contender: Contender, problem: Problem) -> str:
    """Why a contender cannot run; empty if it can."""
    try:
        contender.make(problem)
    except UnavailableError as error:
        return str(error)
    return ""


def _run(selection: Selection, out: Path | None) -> int:
    start = time.monotonic()
    if selection.instruction_sets:
        # Instructions hardly matter to what several processes do together, which takes half of the time.
        ends = (selection.instruction_sets[0], selection.instruction_sets[-1])
        runs = [_measure_with(s, replace(selection, several_processes=s in ends)) for s in selection.instruction_sets]
    else:
        runs = [_measure(selection)]
    rows = COMPILED_ROWS if selection.compiled else ROWS
    judged = [judge(rows, results) for results in runs]
    whole = not (selection.check or selection.compiled)
    growth = growth_rows() if "resnet50" in selection.families and whole else []
    for results in runs:
        print("\n".join([heading(results), "", *summary(results), ""]))
    print("\n".join(growth_lines(growth)))
    if out is not None:
        write_files(out, selection, list(zip(runs, judged, strict=True)), growth)
        print(f"all files are in {out}")
    for results, found in zip(runs, judged, strict=True):  # last, where they are seen
        print("\n".join(["", heading(results), "", *table(found)]))
    if len(runs) > 1:
        columns = dict(zip(selection.instruction_sets, judged, strict=True))
        print("\n".join(["", *comparison(columns)]))
    if set(selection.families) != set(DEFAULT_FAMILIES):
        print(f"measured on {', '.join(selection.families)} alone: the limits are for the default shapes")
    print(f"{time.monotonic() - start:.0f} s")
    short = any(row.word == "falls short" for found in judged for row in found)
    return 1 if selection.check and short else 0


def _measure_with(instruction_set: str, selection: Selection) -> BenchResults:
    """:func:`_measure` in a process in which this package, torch and oneDNN use these instructions."""
    progress(f"instruction set: {instruction_set}")
    if {wanted(), torch.backends.cpu.get_cpu_capability().lower()} == {instruction_set}:
        return _measure(selection)  # this process is one
    variables = {
        "SYNCBN_CPU": instruction_set,
        "ATEN_CPU_CAPABILITY": instruction_set,
        "ONEDNN_MAX_CPU_ISA": ONEDNN_NAMES[instruction_set],
    }
    results: BenchResults = run_with_environment(variables, _measure, selection)
    return results


def _measure(selection: Selection) -> BenchResults:
    threads = torch.get_num_threads()
    try:
        if selection.device == "cpu":  # as each of several processes has, and steadier
            torch.set_num_threads(1)
        results = BenchResults(selection.device, machine=machine(selection.device))
        if selection.compiled:
            results.measurements += measure_compiled(selection.rounds)
        else:
            _measure_layers(selection, results)
            _measure_steps(selection, results)
        return results
    finally:
        torch.set_num_threads(threads)


def _measure_layers(selection: Selection, results: BenchResults) -> None:
    device = torch.device(selection.device)
    with world_of_one(device):
        progress("copy bandwidth")
        results.bandwidth = measure_bandwidth(device)
        progress("errors at a large mean")
        results.measurements.append(large_mean_errors(selection))
        for suite in suites_of(selection):
            results.measurements += run_suite(suite, selection)


def _measure_steps(selection: Selection, results: BenchResults) -> None:
    steps = []
    if "resnet50" in selection.families:  # the training steps are ResNets'
        if not selection.check:
            steps.append(run_steps(torch.device(selection.device), selection.rounds))
        if selection.device == "cpu" and selection.several_processes:
            steps.append(measure_emulation(selection.rounds))
    for measurements, checks in steps:
        results.measurements += measurements
        results.step_checks |= checks
