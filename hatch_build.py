"""What hatchling does besides packing files: it compiles the CPU kernels, and writes the package index's page.

Without a C++ compiler the wheel is pure Python.
"""

from __future__ import annotations

import re
import runpy
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from hatchling.metadata.plugin.interface import MetadataHookInterface

BUILD = Path("syncbn/kernels/cpu/build.py")
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!\w+:)([^)\s]+)\)")
"""A picture or a link to another file of the repository, in Markdown."""


class CompiledKernels(BuildHookInterface):
    """Runs the kernels' ``build.py``, which needs no other package, before a wheel or an editable install is made."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        script = Path(self.root) / BUILD
        if self.target_name != "wheel" or not script.exists():
            return
        module = runpy.run_path(str(script), run_name="syncbn_build")
        try:
            built = module["build"]()
        except module["BuildError"] as error:
            self.app.display_warning(f"the CPU kernels are not compiled, so the layers will be slower: {error}")
            return
        # The libraries use neither Python's nor torch's headers, so one wheel works with all versions of both. torch's
        # operators for them are compiled when they are first used. The wheel is tagged for this platform; `auditwheel
        # repair` checks the symbols and gives it a manylinux tag.
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform}"
        build_data["pure_python"] = False
        build_data["artifacts"] += [f"/{path.relative_to(self.root).as_posix()}" for path in built]


class IndexPage(MetadataHookInterface):
    """README.md as the page of a package index, which has no other files of the repository.

    With an address ``Source`` in ``project.urls``, pictures and links lead there. Without one, a picture is replaced by
    its title, and a link by its text.
    """

    def update(self, metadata: dict[str, Any]) -> None:
        source = metadata.get("urls", {}).get("Source")

        def rewritten(found: re.Match[str]) -> str:
            mark, text, file = found.groups()
            if source is not None:
                return f"{mark}[{text}]({source}/{'raw' if mark else 'blob'}/HEAD/{file})"
            return f"*Figure: {text}*" if mark else text

        page = LINK.sub(rewritten, (Path(self.root) / "README.md").read_text(encoding="utf-8"))
        metadata["readme"] = {"content-type": "text/markdown", "text": page}
