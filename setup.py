"""The package fastflow, the folder kernels/ as fastflow.kernels, and the native libraries."""

import os
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

import build_native


class BuildNative(build_ext):
    """Compiles csrc/ into plain shared libraries beside the Python files (see build_native.py)."""

    def run(self) -> None:
        root = "." if self.inplace or self.editable_mode else self.build_lib
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


setup(
    packages=[*find_packages(include=["fastflow", "fastflow.*"]), "fastflow.kernels"],
    package_dir={"fastflow.kernels": "kernels"},
    ext_modules=[Extension("fastflow._native", sources=[])],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": AnyPythonWheel},
)
