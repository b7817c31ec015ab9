"""The annotations reach a user's type checker: mypy accepts what is right in a user's file and finds what is wrong."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow  # mypy reads the annotations of torch, without a cache
def test_a_users_file_under_mypy(tmp_path: Path) -> None:
    pytest.importorskip("mypy", reason="mypy checks the file")
    # An environment in which this tree is an installed package: there mypy trusts annotations only beside `py.typed`.
    venv.create(tmp_path / "environment", with_pip=False)
    python = tmp_path / "environment" / "bin" / "python"
    where = f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages/paths.pth"
    paths = [str(ROOT), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    (tmp_path / "environment" / where).write_text("\n".join(dict.fromkeys(paths)))
    user = tmp_path / "user.py"
    user.write_text((Path(__file__).parent / "typed_user.py").read_text())
    options = ["--strict", "--no-incremental", "--config-file", "", "--python-executable", str(python)]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, user.name],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
