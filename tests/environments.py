"""Scratch virtual environments that see the packages of this one, fastflow excepted."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = (
    *("setup.py", "build_native.py", "build_tools.py", "pyproject.toml", "MANIFEST.in"),
    *("README.md", "LICENSE", "fastflow", "kernels", "src", "csrc"),
)


def copy_tree(destination: Path, objects: bool = True) -> Path:
    """The sources of the package, and the object files of earlier builds to save their time."""
    built = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, destination / name, ignore=built, symlinks=True)
        elif source.exists():  # an sdist holds the package in src/ alone
            destination.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, destination / name)
    if objects and (ROOT / "build" / "native").is_dir():
        shutil.copytree(ROOT / "build" / "native", destination / "build" / "native")
    return destination


class Environment:
    """A virtual environment in a folder; `without` names packages it is not to see."""

    def __init__(self, folder: Path, without: tuple[str, ...] = ()) -> None:
        self.folder = folder
        venv.create(folder / "venv", with_pip=False, symlinks=True)
        self.python = str(folder / "venv" / "bin" / "python")
        seen = folder / "seen"
        seen.mkdir()
        hidden = ("fastflow", "__editable__", "distutils-precedence", *without)
        for folder in map(Path, sys.path):  # one path file may have brought another folder along
            for entry in folder.iterdir() if folder.name == "site-packages" else ():
                if not entry.name.lower().startswith(hidden) and not (seen / entry.name).exists():
                    (seen / entry.name).symlink_to(entry)
        # pip removes nothing outside its environment, so these links are safe from it
        (self.packages / "seen.pth").write_text(f"{seen}\n")

    @property
    def packages(self) -> Path:
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        return self.folder / "venv" / "lib" / version / "site-packages"

    def run(
        self, *arguments: str, cwd: Path | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run the environment's Python, in a folder or from one that holds nothing."""
        elsewhere = self.folder / "elsewhere"
        elsewhere.mkdir(exist_ok=True)
        return subprocess.run(
            [self.python, *arguments],
            cwd=cwd or elsewhere,
            env=clean_environment() | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=900,
        )

    def install(self, tree: Path, *options: str, **environment: str) -> str:
        """pip install with these options; its output, which is that of a success."""
        run = self.run("-m", "pip", "install", "-v", *options, str(tree), **environment)
        assert run.returncode == 0, run.stdout
        return run.stdout


def clean_environment() -> dict[str, str]:
    """The variables of this process less those that steer a build or Python's search path."""
    steering = ("FASTFLOW_", "CXX", "CUDA", "TORCH_CUDA", "PYTHONPATH", "TRITON_INTERPRET")
    return {name: value for name, value in os.environ.items() if not name.startswith(steering)}
