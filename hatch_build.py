"""Builds the CPU's kernels with the package where there is a C++ compiler; without them torch's own serve."""

from __future__ import annotations

import runpy
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

BUILD = Path("syncbn/kernels/cpu/build.py")


class CompiledKernels(BuildHookInterface):
    """Runs ``build.py`` of the kernels, which needs nothing installed, before a wheel or an editable installation."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        script = Path(self.root) / BUILD
        if self.target_name != "wheel" or not script.exists():
            return
        module = runpy.run_path(str(script), run_name="syncbn_build")
        try:
            built = module["build"]()
        except module["BuildError"] as error:
            self.app.display_warning(f"the CPU's kernels are not built, and torch's will serve: {error}")
            return
        # Libraries without Python's or torch's interface: one wheel for all their versions on a platform.
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform}"
        build_data["pure_python"] = False
        build_data["artifacts"] += [f"/{path.relative_to(self.root).as_posix()}" for path in built]
