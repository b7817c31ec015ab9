"""Importing torchvision beside any torch. What is defined in torch's registry stays, so each case has a process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from syncbn.compat import import_torchvision

ROOT = Path(__file__).resolve().parents[2]

# As torchvision does it: without its extension it goes on, but it needs the schema of what it registers for.
FAKE_TORCHVISION = """
import os, torch
try:
    torch.ops.load_library(os.path.join(os.path.dirname(__file__), "_C.so"))
except OSError:
    loaded = False
else:
    loaded = True
    torch.library.define("torchvision::nms", "(Tensor a, Tensor b, float c) -> Tensor")  # fails if there is one already
    torch.library.define("torchvision::qnms", "(Tensor a, Tensor b, float c) -> Tensor")
for name in ("nms", "qnms"):
    torch.library.register_fake("torchvision::" + name)(lambda *inputs: None)
"""


def python(code: str, first_on_path: Path | None = None) -> str:
    path = os.pathsep.join(map(str, [first_on_path or ROOT, ROOT]))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def fake_package(folder: Path, extension: Path | None) -> Path:
    (folder / "torchvision").mkdir()
    (folder / "torchvision" / "__init__.py").write_text(FAKE_TORCHVISION)
    if extension is not None:
        (folder / "torchvision" / "_C.so").symlink_to(extension)
    return folder


def test_the_installed_torchvision_works_even_after_its_import_failed() -> None:
    out = python("""
import gc
try:
    import torchvision
except RuntimeError:
    pass
from syncbn.compat import import_torchvision
torchvision = import_torchvision()
gc.collect()
import torch
assert import_torchvision() is torchvision
assert torch.ops.torchvision.nms.default._schema.name == "torchvision::nms"
v2 = import_torchvision("transforms.v2")
assert v2.__name__ == "torchvision.transforms.v2"
assert torchvision.models.squeezenet1_1(num_classes=3).eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
boxes, scores = torch.tensor([[0.0, 0.0, 2.0, 2.0]]), torch.tensor([0.5])
try:
    print(torchvision.ops.nms(boxes, scores, 0.5).tolist() == [0])
except RuntimeError as error:
    print("Couldn't load custom C++ ops" in str(error))
""")
    assert out.split() == ["True"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="names of shared libraries are Linux's")
def test_a_torchvision_whose_extension_loads_defines_its_own_operators(tmp_path: Path) -> None:
    library = Path(torch.__file__).parent / "lib" / "libc10.so"  # any that loads
    code = (
        "from syncbn import compat\nassert compat.import_torchvision().loaded and not compat._libraries\n"
        "assert compat.import_torchvision().loaded and not compat._libraries"
    )
    python(code, fake_package(tmp_path, library))


@pytest.mark.parametrize("broken", [True, False], ids=["does_not_load", "absent"])
def test_without_an_extension_the_schemas_are_declared_once(tmp_path: Path, broken: bool) -> None:
    not_a_library = tmp_path / "text"
    not_a_library.write_text("no library")
    code = """
from syncbn import compat
import sys, torch
assert not compat.import_torchvision().loaded
assert hasattr(torch.ops.torchvision, "nms") and hasattr(torch.ops.torchvision, "qnms")
del sys.modules["torchvision"]
compat._declare_missing_operators()
assert len(compat._libraries) == 2
"""
    python(code, fake_package(tmp_path, not_a_library if broken else None))


def test_absent_torchvision_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError, match=r"pip install 'syncbn\[train\]'"):
        import_torchvision()


def test_a_torchvision_for_another_torch_is_named(tmp_path: Path) -> None:
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("raise RuntimeError('operator torchvision::new')")
    out = python(
        "from syncbn.compat import import_torchvision\ntry:\n    import_torchvision()\n"
        "except ImportError as error:\n    print(error)",
        tmp_path,
    )
    assert "operator torchvision::new" in out
    assert f"beside torch {torch.__version__}" in out
