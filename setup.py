"""The package fastflow, which is found through the links src/fastflow and fastflow/kernels."""

import build_native  # first: it says in words that a setuptools is too old

# isort: split
import os
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext


class BuildNative(build_ext):
    """Compiles csrc/ into plain shared libraries beside the Python files (see build_native.py)."""

    def run(self) -> None:
        root = "src" if self.inplace or self.editable_mode else self.build_lib
        build_native.build(Path(root) / "fastflow")

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class AnyPythonWheel(bdist_wheel):
    """The libraries use no Python API: a wheel serves every Python 3 of its platform."""

    def get_tag(self) -> tuple[str, str, str]:
        native = os.environ.get("FASTFLOW_BUILD") != "none"
        return "py3", "none", super().get_tag()[2] if native else "any"


# src/ holds nothing but the package: an editable install puts this folder on Python's path, and
# the root would bring tests, kernels and setup along as modules for everybody.
setup(
    packages=find_packages("src"),
    package_dir={"": "src"},
    ext_modules=[Extension("fastflow._native", sources=[])],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": AnyPythonWheel},
    options={"egg_info": {"egg_base": "."}},
)
