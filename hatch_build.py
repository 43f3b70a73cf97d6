"""Builds the kernel when nmfx is installed or packed: by CMake, into nmfx/runtime/kernel/lib; nothing without a compiler."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class KernelHook(BuildHookInterface):  # type: ignore[misc]
    """The wheel is of this platform, and of any Python and torch, which the kernel does not know."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build; `version` is "standard" or "editable"."""
        root = Path(self.root)
        source, build, built = root / "nmfx" / "runtime" / "kernel", root / "build" / "kernel", []
        folder = source / "lib"
        (folder / "SHA256SUMS").unlink(missing_ok=True)  # of what is built anew now
        try:
            import cmake

            command = str(Path(cmake.CMAKE_BIN_DIR) / "cmake")
            subprocess.run([command, "--fresh", "-S", source, "-B", build], check=True)
            subprocess.run([command, "--build", build, "--parallel"], check=True)
            subprocess.run([sys.executable, source / "record.py", folder], check=True)
            built = sorted((*folder.glob("*.so"), folder / "SHA256SUMS"))
        except (ImportError, OSError, subprocess.CalledProcessError) as error:
            self.app.display_warning(f"nmfx is built without its kernel, and computes sparse layers slowly: {error}")
        if built and version == "standard":
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
            build_data["force_include"] |= {str(path): str(path.relative_to(root)) for path in built}
