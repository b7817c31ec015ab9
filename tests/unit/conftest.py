"""Fixtures of the unit tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

SLOW = {
    "test_bench.py": "it runs every contender of the bench",
    "test_bench_command.py": "it runs the bench",
    "test_bench_compiled.py": "it traces whole models",
    "test_compat.py": "each test imports torch in a process of its own",
    "test_compiled_graphs.py": "torch.compile takes seconds",
    "test_compiled_kernels.py": "it needs a C++ compiler, and works on large inputs",
    "test_compiled_limits.py": "it needs a C++ compiler",
    "test_cpu_operator.py": "it needs a C++ compiler",
    "test_convert_errors.py::test_compiled": "torch.compile takes seconds",
    "test_convert_models.py": "it runs whole models of torchvision and timm",
    "test_cpu_kernels.py": "it needs a C++ compiler, and works on large inputs",
    "test_data.py::test_mnist5k": "the data set takes seconds to read",
    "test_diagnose.py": "it trains networks",
    "test_digit_canvas.py::test_inputs_are_normalized": "the data set takes seconds to read",
    "test_domains.py::test_one_compiled_graph_serves_all_domains_but_the_default": "torch.compile takes seconds",
    "test_example_loops.py::test_script": "it draws whole reports",
    "test_export.py": "torch.export takes seconds",
    "test_freeze.py::test_compiled": "torch.compile takes seconds",
    "test_layer_epilogue.py::test_compiled_in_one_graph": "torch.compile takes seconds",
    "test_layer_gradients.py": "second derivatives are compared number by number",
    "test_layer_shortcuts.py": "it has large inputs, for every layer and memory format",
    "test_mask.py::test_compiled_in_one_graph_for_any_mask": "torch.compile takes seconds",
    "test_models.py::test_torchvision_model_of_grey_images_keeps_its_architecture": "it builds whole models",
    "test_models.py::test_torchvision_models_give_one_output": "it runs whole models of torchvision",
    "test_moving_average.py": "it trains networks",
    "test_norms.py::test_residual_networks": "it runs whole models with each norm",
    "test_openmp.py": "it imports torch in a process of its own",
    "test_profiling.py": "it needs a C++ compiler",
    "test_properties.py": "it checks hundreds of random layers",
    "test_segmentation.py::test_a_short_training_learns": "it trains networks",
    "test_segmentation.py::test_a_short_training_on_volumes_learns": "it trains networks",
    "test_segmentation.py::test_torchvision_models": "it runs whole models of torchvision",
    "test_study_claims.py": "it simulates thousands of studies",
    "test_study_coverage.py": "it simulates thousands of studies",
    "test_study_grid_report.py": "it draws whole reports",
    "test_study_parity.py": "it starts processes",
    "test_study_report.py": "it draws whole reports",
    "test_study_runner.py": "it starts worker processes",
    "test_torch_modules.py": "second derivatives are compared number by number, for every layer and input",
    "test_train.py": "it trains networks",
}
"""Files and tests that are marked `slow`, which `make test-fast` leaves out, and why they take long."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        test = item.nodeid.rpartition("/")[2].partition("[")[0]
        reason = SLOW.get(test) or SLOW.get(item.path.name)
        if reason is not None and item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.slow(reason=reason))


@pytest.fixture
def world(tmp_path: Path) -> Iterator[None]:
    """A world of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def poisoned_memory():
    """Uninitialised memory is filled with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
