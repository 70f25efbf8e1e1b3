"""Builds the optional C++ extension; everything else is in pyproject.toml.

Without torch or a working compiler the package installs without it and says so.
"""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
FLAGS = ["-O3", "-ffp-contract=fast", "-Wno-psabi"]


def warn(reason: object) -> None:
    """Say why the extension is missing, where pip -v and a plain build show it."""
    print(f"mcpo_kernels: installing without the C++ extension: {reason}", file=sys.stderr)


def extension() -> dict[str, object]:
    """Arguments of ``setup`` that build the extension if that is possible."""
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        warn(f"it is compiled against torch; install with --no-build-isolation ({error})")
        return {}

    class OptionalBuild(BuildExtension):
        """A build whose failure is a warning."""

        def run(self) -> None:
            # Compilers fail with errors of many types, and none may stop the installation.
            try:
                super().run()
            except Exception as error:
                warn(error)
                self.extensions = []

    sources = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("csrc/*.cpp"))
    headers = sorted(path.as_posix() for path in ROOT.glob("csrc/*.[hi]*"))
    module = CppExtension("mcpo_kernels._C", sources, depends=headers, extra_compile_args=FLAGS)
    return {"ext_modules": [module], "cmdclass": {"build_ext": OptionalBuild}}


setup(**extension())
