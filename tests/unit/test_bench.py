"""The bench: its statistics, its verdicts, its instruments and its command."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import nn

from syncbn.bench import command, rows, suites
from syncbn.bench.correctness import avoid_kinks, errors, references, tolerances
from syncbn.bench.costs import Bandwidth, OperationCounter, measure_bandwidth, measure_costs
from syncbn.bench.peers import CONTENDERS, Contender, LayerStep, UnavailableError
from syncbn.bench.problem import DEFAULT_FAMILIES, DTYPES, Shape, layer_shapes, make_problem, resnet50
from syncbn.bench.report import ALL_SUITES
from syncbn.bench.rows import COMPILED_ROWS, ROWS, BenchResults, NotMeasuredError, Row, judge
from syncbn.bench.suites import GROUPS, SUITES, Measurement, Selection, WrongError
from syncbn.bench.timing import Spread, Timing, geometric_mean_of_ratios, interleaved, ratio, spread
from syncbn.cli import main
from syncbn.compat import import_torchvision
from syncbn.kernels.cpu.library import wanted

CPU = torch.device("cpu")
SMALL = Shape("tiny", (GROUPS, 3, 5, 4))


# -- timing ------------------------------------------------------------------------------------------------------------


class FakeClock:
    """Stands still but for what the contenders say they take."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def contender(self, name: str, seconds: float, drift: float = 0.0) -> Callable[[], None]:
        def step() -> None:
            self.calls.append(name)
            self.now += seconds * (1 + drift * self.now)

        return step


def test_every_round_calls_each_contender_in_an_order_of_its_own():
    runs = []
    for _ in range(2):
        clock = FakeClock()
        contenders = {name: clock.contender(name, 1.0) for name in "abc"}
        timings = interleaved(contenders, rounds=12, device=CPU, warmup=2, clock=clock)
        assert all(timing.samples == (1.0,) * 12 and timing.calls == 1 for timing in timings.values())
        runs.append("".join(clock.calls))
    assert runs[0] == runs[1]  # as in all processes that measure together
    assert runs[0].startswith("aabbcc")
    rounds = [runs[0][i : i + 3] for i in range(6, len(runs[0]), 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    followed = {pair for order in rounds for pair in itertools.pairwise(order)}
    assert followed == {(a, b) for a in "abc" for b in "abc" if a != b}


def test_short_calls_are_repeated_and_long_ones_are_not():
    clock = FakeClock()
    timings = interleaved(
        {"short": clock.contender("s", 1e-4), "long": clock.contender("l", 0.5)}, rounds=2, device=CPU, clock=clock
    )
    assert timings["short"].calls == 10
    assert timings["short"].median == pytest.approx(1e-4)
    assert timings["long"].calls == 1


def test_a_ratio_is_steadier_than_the_times_where_the_machine_drifts():
    clock = FakeClock()
    contenders = {name: clock.contender(name, seconds, drift=0.05) for name, seconds in (("a", 0.2), ("b", 0.1))}
    timings = interleaved(contenders, rounds=40, device=CPU, clock=clock)
    found = ratio(timings["a"], timings["b"])
    assert timings["a"].spread.high / timings["a"].spread.low > 1.3
    assert found.median == pytest.approx(2, rel=0.05)
    assert found.high / found.low < 1.05


def test_medians_quartiles_and_geometric_means():
    assert spread([4.0, 1.0, 3.0, 2.0, 5.0]) == Spread(3.0, 2.0, 4.0)
    assert spread([7.0]) == Spread(7.0, 7.0, 7.0)
    assert ratio(Timing((1.0, 4.0, 9.0)), Timing((1.0, 2.0, 3.0))) == Spread(2.0, 1.5, 2.5)
    found = geometric_mean_of_ratios([Spread(2.0, 1.0, 4.0), Spread(8.0, 4.0, 16.0)])
    assert found == pytest.approx((4.0, 2.0, 8.0))


def test_rounds_must_be_positive():
    with pytest.raises(ValueError, match="at least 1"):
        interleaved({}, rounds=0, device=CPU)


# -- shapes ------------------------------------------------------------------------------------------------------------


def test_resnet50_has_53_layers_as_torchvision_has_them():
    pytest.importorskip("PIL", reason="torchvision needs it")
    try:
        models = import_torchvision("models")
    except ImportError as error:
        pytest.skip(str(error))
    found: dict[tuple[int, ...], int] = {}

    def count(module: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        size = tuple(inputs[0].shape)
        found[size] = found.get(size, 0) + 1

    with torch.device("meta"):
        model = models.resnet50()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_pre_hook(count)
        model(torch.empty(2, 3, 224, 224))
    assert found == {shape.size: shape.layers for shape in resnet50(2)}
    assert sum(found.values()) == 53


def test_every_kind_of_shape_is_timed_on_the_cpu():
    selection = Selection("cpu", ("float32",), DEFAULT_FAMILIES, 7, check=True)
    alone = SUITES[0].shapes(selection, torch.float32)
    assert {shape.family for shape in alone} == set(DEFAULT_FAMILIES) - {"host"}
    for n in (2, 8):
        for shape in resnet50(n):
            assert {s.channels_last for s in alone if s.size == shape.size} == {False, True}
    assert any(shape.size[0] == 32 and shape.family == "resnet50" for shape in alone)
    sizes = [shape.size for shape in alone if shape.family == "small"]
    assert len(sizes) == 15
    assert all(sizes.count(size) == (1 if len(size) == 2 else 2) for size in sizes)


def test_short_samples_are_repeated_more_often():
    selection = Selection("cpu", ("float32",), DEFAULT_FAMILIES, 7, check=True)
    alone, host = (next(suite for suite in SUITES if suite.name == name) for name in ("alone", "host"))
    assert alone.rounds(selection, Shape("resnet50", (32, 64, 56, 56))) == 7
    assert alone.rounds(selection, Shape("small", (2, 16, 8, 8))) == 21
    (shape, *_) = shapes = host.shapes(selection, torch.float32)
    assert host.rounds(selection, shape) == 210
    assert all(shape.elements * 4 == 1024 for shape in shapes)


def test_suites_of_several_processes_can_be_left_out():
    selection = Selection("cpu", ("float32",), DEFAULT_FAMILIES, 7, check=True)
    names = [
        [suite.name for suite in suites.suites_of(s)] for s in (selection, replace(selection, several_processes=False))
    ]
    assert names == [["alone", "host", "pair", "ghost"], ["alone", "host", "ghost"]]


def test_large_inputs_are_large_in_every_dtype():
    large = next(suite for suite in SUITES if suite.name == "large")
    for dtype in DTYPES.values():
        shapes = large.shapes(Selection("cuda", (), DEFAULT_FAMILIES, 1), dtype)
        assert shapes
        assert all(shape.elements * dtype.itemsize >= 1e8 for shape in shapes)


@pytest.mark.parametrize("shape", layer_shapes(["tiny", "unet3d"], (), 1 << 19), ids=lambda shape: shape.label)
def test_a_problem_is_reproducible_and_in_its_format(shape):
    first, second = (make_problem(shape, torch.bfloat16, CPU) for _ in range(2))
    assert torch.equal(first.x, second.x)
    assert not torch.equal(first.x, make_problem(shape, torch.bfloat16, CPU, rank=1).x)
    if shape.channels_last:
        format = {4: torch.channels_last, 5: torch.channels_last_3d}[len(shape.size)]
        assert first.x.is_contiguous(memory_format=format)
        assert first.grad_output.is_contiguous(memory_format=format)
    else:
        assert first.x.is_contiguous()


# -- correctness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "name", [name for name, contender in CONTENDERS.items() if not contender.compiled and "torch" not in name]
)
def test_contenders_are_right(name, dtype):
    """Ours within their tolerance; the peers too, at a mean this small, but for torch's ops, which round in between."""
    problem = make_problem(SMALL, DTYPES[dtype], CPU)
    avoid_kinks([problem])
    contender = CONTENDERS[name]
    try:
        step = contender.make(problem)
    except UnavailableError as error:
        pytest.skip(str(error))
    found = errors(step(), references([problem], 0)(contender.kind))
    room = 1 if contender.ours or dtype == "float32" else 4
    limits = tolerances(DTYPES[dtype], problem.x.numel() // problem.num_features)
    assert all(error <= room * limits[tensor] for tensor, error in found.items()), found


def test_a_wrong_layer_of_ours_stops_the_bench(monkeypatch, capsys):
    def biased(problem):
        step = CONTENDERS["SyncBatchNorm"].make(problem)
        return LayerStep(lambda x: step.function(x) + 1e-3, step.known, step.grad_output)

    monkeypatch.setitem(CONTENDERS, "BatchRenorm", Contender("BatchRenorm", "batch", biased, ours=True))
    suite = SUITES[0]
    selection = Selection("cpu", ("float32",), ("tiny",), 1, check=True)
    with pytest.raises(WrongError, match="BatchRenorm on tiny N=32 3x5x4, float32: output is off"):
        suites.measure(suite, selection, SMALL, "float32", None)
    assert main(["bench", "--shapes", "tiny", "--rounds", "1", "--check", "--cpu", wanted()]) == 1
    assert "syncbn: error: BatchRenorm" in capsys.readouterr().err


def test_a_wrong_peer_is_timed_and_marked(monkeypatch):
    make = CONTENDERS["nn.BatchNorm"].make

    def wrong(problem):
        step = make(problem)
        return LayerStep(lambda x: 2 * step.function(x), step.known, step.grad_output)

    def broken(problem):
        raise RuntimeError("no such thing\non this machine")

    monkeypatch.setitem(CONTENDERS, "nn.BatchNorm", Contender("nn.BatchNorm", "local", wrong))
    monkeypatch.setitem(CONTENDERS, "textbook", Contender("textbook", "batch", broken))
    selection = Selection("cpu", ("float32",), ("tiny",), 1)
    found = suites.measure(SUITES[0], selection, Shape("tiny", (8, 3, 4, 4), channels_last=True), "float32", None)
    assert found.wrong == ["nn.BatchNorm"]
    assert found.timings["nn.BatchNorm"].median > 0
    assert found.unavailable["textbook"] == "RuntimeError: no such thing"


def test_one_wrong_number_of_a_large_tensor_is_found():
    right = torch.linspace(-2, 1, 4 * 3 * 200 * 200, dtype=torch.float64).view(4, 3, 200, 200)
    for format in (torch.contiguous_format, torch.channels_last):
        tensor = right.float().contiguous(memory_format=format)
        assert errors([tensor], [right])["output"] < 1e-7
        tensor[3, 1, 150, 7] += 0.5
        assert errors([tensor], [right])["output"] == pytest.approx(0.25)
        tensor[0, 0, 0, 0] = float("nan")
        assert errors([tensor], [right])["output"] == float("inf")


def test_what_is_not_finite_is_infinitely_wrong():
    assert errors([torch.tensor([1.0, float("nan")])], [torch.ones(2).double()]) == {"output": float("inf")}
    with pytest.raises(ValueError, match="returned 1 tensors"):
        errors([torch.ones(2)], [torch.ones(2).double()] * 2)


# -- costs -------------------------------------------------------------------------------------------------------------


def test_figures_of_a_layer_that_is_known():
    """nn.BatchNorm saves its input, which is not counted, and the batch's mean and inverse deviation, float32."""
    problem = make_problem(Shape("tiny", (8, 16, 12, 12)), torch.float32, CPU)
    step = CONTENDERS["nn.BatchNorm"].make(problem)
    found = measure_costs(step, (*step.known, *step.buffers), device=CPU, channels_and_groups=16)
    assert found.saved_bytes == 2 * 16 * 4
    assert found.saved_numbers == 2
    size = problem.x.numel() * 4
    assert 2 * size <= found.peak_bytes <= 3 * size + 4096  # y and dx, of which y is held by the step
    assert (found.collectives, found.wire_bytes) == (0, 0)
    assert 1 <= found.operations <= 6
    assert found.kernels is None
    assert "CUDA only" in found.missing


def test_collectives_and_their_bytes_are_counted(world):
    x = torch.ones(10)
    with OperationCounter() as counter:
        torch.distributed.all_reduce(x)
        torch.distributed.all_gather([torch.empty(10)], x)
        torch.distributed.barrier()
        name = torch.distributed.group.WORLD.group_name
        torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.all_reduce(x, "sum", name))
    assert (counter.collectives, counter.wire_bytes) == (3, 120)


def test_a_figure_that_cannot_be_had_is_left_out_with_the_reason(monkeypatch):
    def broken(step, device):
        raise AttributeError("not in this torch")

    monkeypatch.setattr("syncbn.bench.costs.peak_bytes", broken)
    step = CONTENDERS["SyncBatchNorm"].make(make_problem(SMALL, torch.float32, CPU))
    found = measure_costs(step, step.known, device=CPU, channels_and_groups=3)
    assert found.peak_bytes is None
    assert "peak memory: AttributeError: not in this torch" in found.missing
    assert found.saved_numbers is not None


def test_bandwidth_is_that_of_reading_and_writing():
    found = measure_bandwidth(CPU, rounds=3, tensor_bytes=1 << 22)
    assert 1e8 < found.bytes_per_second.median < 1e13
    limit = Bandwidth(Spread(8e9, 8e9, 8e9), 0).seconds(Shape("tiny", (10, 10, 10)), torch.float32)
    assert limit == pytest.approx(8 * 4000 / 8e9)


# -- the table ---------------------------------------------------------------------------------------------------------


def fake(suite: str, times: dict[str, Sequence[float]], dtype: str = "float32") -> Measurement:
    timings = {name: Timing(tuple(samples)) for name, samples in times.items()}
    return Measurement(suite, SMALL, dtype, timings)


def test_verdicts():
    def give(value: float) -> Callable[[BenchResults], tuple[Spread, str]]:
        return lambda results: (Spread(value, value, value), "")

    def none(results: BenchResults) -> tuple[Spread, str]:
        raise NotMeasuredError("nothing there")

    table = (
        Row("a", 1.0, give(1.0)),
        Row("b", 1.0, give(1.1), "cpu"),
        Row("c", 1.0, give(1.1), "cuda"),
        Row("d", 1.0, give(0.9), at_least=True),
        Row("e", 1.0, none),
        Row("f", 1.0, give(float("nan"))),
    )
    verdicts = judge(table, BenchResults("cpu"))
    words = [verdict.word for verdict in verdicts]
    assert words == ["ok", "falls short", "not measured", "falls short", "not measured", "falls short"]
    assert (verdicts[2].note, verdicts[4].note) == ("needs --device cuda", "nothing there")
    text = rows.table(verdicts)
    assert text[::2] == list("abcdef")
    assert "at least 1" in text[7]


def test_a_ratio_row_is_the_geometric_mean_over_the_shapes():
    ours, local = "SyncBatchNorm", "nn.BatchNorm"
    measurements = [fake("alone", {ours: [0.5], local: [1.0]}), fake("alone", {ours: [2.0], local: [1.0]})]
    verdict = judge(ROWS[:1], BenchResults("cpu", measurements))[0]
    assert verdict.value.median == pytest.approx(1.0)
    assert verdict.word == "falls short"
    other = [fake("alone", {ours: [0.5], local: [1.0]}, "bfloat16")]
    assert judge(ROWS[:1], BenchResults("cpu", other))[0].word == "not measured"


def test_a_worst_row_is_the_largest_ratio_of_any_shape_and_contender():
    measurements = [
        fake("host", {"a": [0.5], "b": [1.2], "base": [1.0]}),
        fake("host", {"a": [2.0], "b": [1.1], "base": [1.0]}),
    ]
    value, note = rows.worst("host", ("a", "b"), "base")(BenchResults("cpu", measurements))
    assert value.median == 2
    assert note == f"a 2.00 ({SMALL.label}); b 1.20 ({SMALL.label})"


def test_tables_side_by_side():
    def give(value: float) -> Callable[[BenchResults], tuple[Spread, str]]:
        return lambda results: (Spread(value, value, value), "")

    columns = {}
    for name, value in (("avx512", 0.5), ("avx2", 1.25)):
        columns[name] = judge((Row("a", 1.0, give(value)), Row("b", 1.0, give(1.0), "cuda")), BenchResults("cpu"))
    assert [line.split() for line in rows.comparison(columns)] == [
        ["avx512", "avx2"],
        ["a"],
        ["at", "most", "1", "0.5", "ok", "1.25", "falls", "short"],
    ]


def test_every_row_names_contenders_that_its_suite_has():
    for device in ("cpu", "cuda"):
        dtypes = command.DEFAULT_DTYPES[device]
        measurements = [
            fake(suite.name, dict.fromkeys(suite.needed, (1.0, 1.0)), dtype)
            for suite in ALL_SUITES
            for dtype in dtypes
            if device in suite.rows_on
        ]
        for measurement in measurements:
            measurement.shape = resnet50(32)[0]
        results = BenchResults(device, measurements, Bandwidth(Spread(1e9, 1e9, 1e9), 0))
        own = [row for row in (*ROWS, *COMPILED_ROWS) if row.device == device]
        assert [verdict.value is not None for verdict in judge(own, results)] == [True] * len(own)


def test_the_row_of_saved_numbers_takes_the_worst_of_ours():
    selection = Selection("cpu", ("float32",), ("tiny",), 1, check=True)
    found = suites.measure(SUITES[0], selection, SMALL, "float32", None)
    ours = ("SyncBatchNorm", "BatchRenorm", "GhostBatchNorm of 2 groups")
    assert set(found.costs) == set(ours)  # of the peers no row needs the costs
    most = max(found.costs[name].saved_numbers for name in ours)
    assert rows.saved(BenchResults("cpu", [found]))[0].median == most
